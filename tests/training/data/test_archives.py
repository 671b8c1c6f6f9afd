"""Archives of images: whole ones are taken, and what would be read wrongly or in part is refused."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from revnets.training.data.archives import check_archive

Make = Callable[[Path], None]


def add(archive: tarfile.TarFile, name: str, size: int = 700, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    member.size = size if kind == tarfile.REGTYPE else 0
    archive.addfile(member, io.BytesIO(b"x" * size) if member.size else None)


def pack(*names: str, like: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=like) as archive:
        for name in names:
            add(archive, name)
    return file.getvalue()


def one(name: str, kind: bytes) -> Make:
    def make(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            add(archive, "a/1.png")
            add(archive, name, kind=kind, target="a/1.png")

    return make


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data) and None


def nested(inner: bytes) -> Make:
    def make(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("a.tar")
            member.size = len(inner)
            archive.addfile(member, io.BytesIO(inner))

    return make


NAMES = tuple(f"{label}/{number}.png" for number in range(4) for label in "ab")
WHOLE = pack(*NAMES)
MEMBER = 512 + 1024  # a header and 700 bytes
LAST = len(NAMES) * MEMBER
SPOILT = bytearray(WHOLE)
SPOILT[3 * MEMBER + 10] ^= 255

BAD: dict[str, tuple[Make, str]] = {
    "cut in an image": (content(WHOLE[: 3 * MEMBER + 900]), "cut off"),
    "cut in a header": (content(WHOLE[: 3 * MEMBER + 100]), "cut off"),
    "cut between two images": (content(WHOLE[: 3 * MEMBER]), "'b/1.png' is followed by no end|'a/1.png' is followed"),
    "cut in the last image": (content(WHOLE[: LAST - 1]), "cut off"),
    "cut before its end": (content(WHOLE[:LAST]), "'b/3.png' is followed by no end"),
    "a spoilt header": (content(bytes(SPOILT)), f"damaged at byte {3 * MEMBER:,}"),
    "two in one file": (content(WHOLE + pack("c/1.png")), "two archives"),
    "rubbish at the end": (content(WHOLE + b"rubbish"), "goes on after its end"),
    "nothing": (content(b""), "no .tar file"),
    "text": (content(b"no archive" * 100), "no .tar file"),
    "zeros": (content(bytes(10240)), "holds no images"),
    "compressed": (content(gzip.compress(WHOLE)), "compressed"),
    "no images": (content(pack("a/readme.txt")), "holds no images"),
    "a name that is there twice": (content(pack("a/1.png", "b/1.png", "./a/1.png")), "'./a/1.png' is there twice"),
    "an image without a class": (content(pack("a/1.png", "2.png")), "'2.png' lies outside"),
    "an absolute name": (content(pack("/data/a/1.png")), "leads out"),
    "a name that leads out": (content(pack("a/../../1.png")), "leads out"),
    "a symbolic link": (one("a/2.png", tarfile.SYMTYPE), "'a/2.png' is a symbolic link"),
    "a hard link": (one("a/2.png", tarfile.LNKTYPE), "'a/2.png' is a hard link"),
    "a device": (one("a/null", tarfile.CHRTYPE), "a device"),
    "a pipe": (one("a/pipe", tarfile.FIFOTYPE), "a pipe"),
    "an archive in it that is cut off": (nested(WHOLE[: 3 * MEMBER + 900]), "'a.tar' is cut off"),
    "an archive in it that is none": (nested(b"text" * 300), "'a.tar' is no .tar file"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_would_be_read_in_part_is_refused(what: str, tmp_path: Path) -> None:
    make, words = BAD[what]
    make(tmp_path / "train.tar")
    with pytest.raises(ValueError, match=words) as caught:
        check_archive(tmp_path / "train.tar")
    assert "train.tar'" in str(caught.value)


@pytest.mark.parametrize("like", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_archives_are_taken(like: int, tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    names = [f"./train/{'long' * 20}/{number}.JPEG" for number in range(3)]
    path.write_bytes(pack("train/readme.txt", *names, like=like))
    assert check_archive(path) == 3
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(2048))  # an end of less than tar's usual 10 kB
    assert check_archive(path) == 3
    nested(WHOLE)(path)
    assert check_archive(path) == len(NAMES)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        check_archive(tmp_path / "train.tar")
