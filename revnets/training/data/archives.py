"""Whether a .tar file of images is whole and holds what a data set reads, before anything is trained on it."""

import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO

IMAGES = (".png", ".jpg", ".jpeg")  # what timm takes for images
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_VOLUME_LABEL = b"V"
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


def check_archive(path: str | Path) -> int:
    """Goes over all headers of a .tar file of images, and of .tar files inside of it; the images are not read.

    A reader stops without a word where a file was cut off at a header, at what is no header, and at the first of two
    archives in one file; it leaves out links, and takes both of two members of one name. All that is refused.

    Args:
        path: Of the file. 50,000 images take about a second.

    Returns:
        How many images it holds.

    Raises:
        ValueError: Naming the file, what is wrong, and the first member that it concerns.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            count = _check(file, f"'{path}'")
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror or error})") from error
    if not count:
        raise ValueError(f"'{path}' holds no images ({', '.join(IMAGES)})")
    return count


def _check(file: IO[bytes], where: str, nested: bool = False) -> int:
    """Args: file: at its start. where: in words. nested: within another one. Returns: the number of images."""
    start = file.read(_BLOCK)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start[:6] == b"\xfd7zXZ\x00" or start[:4] == b"(\xb5/\xfd":
        raise ValueError(
            f"{where} is compressed, which cannot be read at random places: unpack it to a plain .tar file"
        )
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    cut = f"{where} is cut off after {size:,} bytes: copy or download it again"
    names: dict[str, None] = {}
    images = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                images += _check_member(archive, member, where, names, nested)
            end = archive.offset
    except tarfile.TarError as error:
        reason = " ".join(str(error).split())
        if names or "unexpected end" in reason:
            raise ValueError(cut) from error
        raise ValueError(f"{where} is no .tar file ({reason})") from error
    last = next(reversed(names), "nothing")
    file.seek(end)
    marker = file.read(_BLOCK)
    if len(marker) < _BLOCK:
        raise ValueError(f"{cut}; '{last}' is followed by no end of the archive")
    if any(marker):
        raise ValueError(f"{where} is damaged at byte {end:,}: what follows '{last}' is no member")
    _check_rest(file, where)
    return images


def _check_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, where: str, names: dict[str, None], nested: bool
) -> int:
    """Refuses a member that a data set would leave out or misread; returns how many images it is."""
    name = member.name
    if member.type in _KINDS:
        raise ValueError(
            f"{where}: '{name}' is {_KINDS[member.type]}, which no data set follows: pack files, as tar does with "
            "--dereference --hard-dereference"
        )
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{where}: '{name}' is a name that leads out of the archive: pack it again with plain names")
    if member.isdir() or member.type == _VOLUME_LABEL:
        return 0
    if not member.isfile():
        raise ValueError(f"{where}: '{name}' is of the unknown kind {member.type!r}: pack plain files")
    plain = str(PurePosixPath(name))
    if plain in names:
        raise ValueError(f"{where}: '{name}' is there twice, and both would be read: pack it again")
    names[plain] = None
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in IMAGES and "/" not in plain and not nested:
        raise ValueError(f"{where}: '{name}' lies outside of class folders: pack images in a folder for each class")
    if suffix == ".tar" and not nested:
        inner = archive.extractfile(member)
        return _check(inner, f"{where}: '{name}'", nested=True) if inner is not None else 0
    return int(suffix in IMAGES)


def _check_rest(file: IO[bytes], where: str) -> None:
    """Behind its end there is nothing but zeros."""
    position = file.tell()
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise ValueError(
                f"{where} goes on after its end (byte {position:,}), where no reader looks; two archives in one file? "
                "unpack it with tar --ignore-zeros and pack it again"
            )
