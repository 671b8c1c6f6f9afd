"""Files as they come: what can be read trains and validates, what cannot is named and left out."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classification.images.reading import Images, UnreadableImages, upright

from ..short_runs import SHORT, Trainer


def photo(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def truncated(path: Path) -> None:
    photo(200, 200).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:5000])


def broken_png(path: Path) -> None:
    photo(200, 200).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(content)


def sixteen_bit(path: Path) -> None:
    Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)).save(path, "PNG")


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo().save(path, "JPEG", exif=exif)


GOOD: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one pixel": ("a.png", lambda path: photo(1, 1).save(path)),
    "20,000 pixels wide": ("a.png", lambda path: photo(20000, 4).save(path)),
    "CMYK": ("a.jpg", lambda path: photo(mode="CMYK").save(path)),
    "16 bits": ("a.png", sixteen_bit),
    "grey": ("a.png", lambda path: photo(mode="L").save(path)),
    "grey with alpha": ("a.png", lambda path: photo(mode="LA").save(path)),
    "palette": ("a.png", lambda path: photo(mode="P").save(path, transparency=3)),
    "EXIF-rotated": ("a.jpg", rotated),
    "a PNG called JPEG": ("a.jpg", lambda path: photo().save(path, "PNG")),
}
BAD: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated": ("a.jpg", truncated),
    "truncated in the middle": ("a.png", broken_png),
    "zero bytes": ("a.jpg", lambda path: path.write_bytes(b"") and None),
    "text": ("a.png", lambda path: path.write_text("no image") and None),
}


def dataset(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Images:
    from timm.data import create_dataset

    return Images(create_dataset("", root=str(folder)), "RGB")


@pytest.mark.parametrize("what", GOOD)
def test_unusual_images_are_read(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, make = GOOD[what]
    (tmp_path / "class").mkdir()
    make(tmp_path / "class" / name)
    image, target = dataset(tmp_path)[0]
    assert (image.mode, target) == ("RGB", 0)
    assert "left out" not in caplog.text
    if what == "EXIF-rotated":
        assert image.size == (30, 40)
    if what == "16 bits":
        assert np.asarray(image)[..., 0].max() == round(1199 * 50 / 257)


@pytest.mark.parametrize("what", BAD)
def test_broken_images_are_named_and_left_out(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, make = BAD[what]
    (tmp_path / "class").mkdir()
    photo().save(tmp_path / "class" / "b.png")
    make(tmp_path / "class" / name)
    images = dataset(tmp_path)
    with caplog.at_level(logging.WARNING):
        first, _ = images[0]
    assert np.array_equal(np.asarray(first), np.asarray(images[1][0]))
    assert f"class/{name}' cannot be read and is left out" in caplog.text
    (tmp_path / "class" / "b.png").write_text("no image either")
    with pytest.raises(UnreadableImages, match="2 files in a row"):
        images[0]


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes PostScript for what it is, whatever its name, and would give it to Ghostscript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "images" / "class").mkdir(parents=True)
    photo().save(tmp_path / "images" / "class" / "a.png", format="EPS")
    photo().save(tmp_path / "images" / "class" / "b.png")
    assert dataset(tmp_path / "images")[0][0].size == (40, 30)
    assert not (tmp_path / "started").exists()


def test_a_picture_that_would_fill_the_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "class").mkdir()
    photo(400, 400).save(tmp_path / "class" / "a.png")
    photo().save(tmp_path / "class" / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert dataset(tmp_path)[0][0].size == (40, 30)


def test_all_of_them_in_one_run(
    digits: Path, tmp_path: Path, run_train: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    from classification import train

    shutil.copytree(digits, tmp_path / "data")
    for folder in ("train", "validation"):
        for number, (name, make) in enumerate([*GOOD.values(), *BAD.values()]):
            make(tmp_path / "data" / folder / "3" / f"{number}-{name}")
    assert train.main([*SHORT, "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path), "--epochs", "1"]) == 0
    for number in range(len(GOOD), len(GOOD) + len(BAD)):
        assert f"/3/{number}-" in caplog.text


def test_grey_networks_get_one_channel() -> None:
    assert upright(photo(), "L").mode == "L"
