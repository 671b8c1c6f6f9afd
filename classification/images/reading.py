"""Image files as they come: any mode and depth, turned as the camera says, and what cannot be read left out."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from revnets.training.data.splits import start_no_programs
from revnets.training.errors import UserError

_logger = logging.getLogger("classification")
start_no_programs()  # here, so that loading processes do it, too
IN_A_ROW = 50
ORIENTATION = 0x0112  # of EXIF
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class UnreadableImages(UserError, RuntimeError):
    """Nothing but files that are no images."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("UnreadableImages: ")[2].strip())  # without a loading process's traceback


class Images(Dataset[Any]):
    """A timm data set whose images are made alike, and where one that cannot be read is warned of and left out.

    timm converts images itself, but fails on 16-bit ones and ignores which way up the camera was held.

    Args:
        dataset: timm's, with a length.
        mode: Pillow's, to convert to: RGB or L.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.transform: Any = None
        dataset.transform, dataset.load_bytes = None, True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        for step in range(min(IN_A_ROW, len(self))):  # the next one instead, as timm has it
            number = (index + step) % len(self)
            try:
                content, *rest = self.dataset[number]
                image: Any = upright(Image.open(io.BytesIO(content)), self.mode)
                break
            except UNREADABLE as error:
                problem = " ".join(str(error).split())
                _logger.warning(f"image '{self._name(number)}' cannot be read and is left out: {problem}")
        else:
            count, last = min(IN_A_ROW, len(self)), self._name(number)
            raise UnreadableImages(
                f"--data-dir: {count} files in a row, up to '{last}', cannot be read; give a folder of images."
            )
        return (image if self.transform is None else self.transform(image), *rest)

    def _name(self, index: int) -> str:
        try:
            return str(self.dataset.filename(index, absolute=True))
        except (AttributeError, NotImplementedError, AssertionError):
            return f"number {index}"


def upright(image: Image.Image, mode: str) -> Image.Image:
    """An image decoded, turned as its EXIF data say, of 8 bits per channel.

    Args:
        image: As opened.
        mode: Pillow's: RGB or L.

    Example:
        >>> upright(Image.new("I;16", (2, 1), 65535), "RGB").getpixel((0, 0))
        (255, 255, 255)
    """
    image.load()  # here, where what is wrong with it is caught
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut off what is above 255
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
