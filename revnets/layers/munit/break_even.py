"""From which sizes on FP8 is faster than bfloat16, by kind of device: defaults, or what ``revnets bench-fp8`` found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

VARIABLE = "REVNETS_FP8_TABLE"
"""Environment variable with the path of a measured table."""

KINDS = ("linear", "1x1 conv", "3x3 conv")
"""Of layers; what was measured of 3x3 convolutions is taken for all larger kernels."""

POINTWISE = "1x1 conv, triton"
"""In tables: from where on our kernel computes 1x1 convolutions faster than ``scaled_mm`` does."""

Points = tuple[tuple[int, int | None], ...]
"""Of one kind of layer: (rows of the product, least width), by rows; a width of None is never faster."""

_HOPPER: Mapping[str, Points] = dict.fromkeys(("linear", "1x1 conv"), ((2048, 2048),))
DEFAULTS: Mapping[str, Mapping[str, Points]] = {"cuda sm90": _HOPPER, "cuda sm100": _HOPPER, "cuda sm103": _HOPPER}
"""Not measured by us: torchao, whose dynamic scales cost more than static ones, skips layers with fewer than one to
four thousand inputs or outputs on an H100. Of larger kernels nothing is known before it was measured. Other devices
multiply no FP8, or it is not known whether it pays there."""


@dataclass(frozen=True)
class BreakEven:
    """What is known of one kind of device.

    Attributes:
        device: such as ``"cuda sm90"`` or ``"cpu"``.
        least: for each of ``KINDS``, and ``POINTWISE``, see ``Points``; what is missing was not measured.
        source: where it is from, in words.
    """

    device: str
    least: Mapping[str, Points]
    source: str

    def reason_to_keep(self, layer: nn.Module, rows: int) -> str | None:
        """Why a layer would not be faster in FP8; None where it would.

        Args:
            layer: an ``nn.Linear`` or ``nn.Conv2d``, or a subclass.
            rows: of the product: images times pixels, or tokens.

        Example:
            >>> known = break_even("cuda sm90")
            >>> known.reason_to_keep(nn.Linear(1024, 4096), 8192)
            '1024 to 4096 is below break-even 2048x2048 on cuda sm90'
            >>> known.reason_to_keep(nn.Linear(4096, 4096), 8192)
        """
        kind = "linear"
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1:
                return "grouped convolutions are not quantised"
            plain = layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid")
            kind = "1x1 conv" if plain else "3x3 conv"
        return self._below(kind, layer, rows)

    def pointwise(self, layer: nn.Module, rows: int) -> str:
        """What is faster for a 1x1 convolution in FP8: ``"scaled_mm"``, unless ``"triton"`` was measured to be.

        Args:
            layer: an ``nn.Conv2d``.
            rows: of the product.
        """
        return "scaled_mm" if self._below(POINTWISE, layer, rows) else "triton"

    def _below(self, kind: str, layer: nn.Module, rows: int) -> str | None:
        """Why nothing says that a layer of this kind is faster."""
        weight: Any = layer.weight
        fan_out, fan_in = weight.shape[:2]
        points = sorted(self.least.get(kind, ()))
        if all(width is None for _, width in points):
            return f"no {kind} is known to be faster in FP8 on {self.device}"
        if rows < points[0][0]:
            return f"{rows} rows are below break-even {points[0][0]} on {self.device}"
        _, least = [point for point in points if point[0] <= rows][-1]
        if least is None:
            return f"no {kind} of {rows} rows is known to be faster in FP8 on {self.device}"
        if min(fan_in, fan_out) < least:
            return f"{fan_in} to {fan_out} is below break-even {least}x{least} on {self.device}"
        return None


def device_kind(device: torch.device | str) -> str:
    """What devices of equal speed have in common: ``"cuda sm90"``, ``"cpu"``, ``"xpu"``, ...

    Args:
        device: a device of torch, or such a kind, which need not be at hand.

    Raises:
        ValueError: for neither.

    Example:
        >>> device_kind("cpu"), device_kind("cuda sm90")
        ('cpu', 'cuda sm90')
    """
    if isinstance(device, str) and device.startswith("cuda sm") and device[7:].isdigit():
        return device
    try:
        found = torch.device(device)
        if found.type != "cuda":
            return found.type
        major, minor = torch.cuda.get_device_capability(found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r}: expected a device that is here, such as 'cpu' or 'cuda', or a kind such as 'cuda sm90'"
        ) from error
    return f"cuda sm{major}{minor}"


def break_even(device: torch.device | str, table: str | Path | None = None) -> BreakEven:
    """What is known of a device: from a measured table, or by default.

    Args:
        device: see ``device_kind``.
        table: written by ``revnets bench-fp8 --output``; by default that which the environment variable
            ``REVNETS_FP8_TABLE`` names, if it is set.

    Raises:
        ValueError: for a table that cannot be read, or that was measured on another kind of device.

    Example:
        >>> break_even("cpu").least
        {}
    """
    kind = device_kind(device)
    path = table or os.environ.get(VARIABLE)
    if not path:
        return BreakEven(kind, DEFAULTS.get(kind, {}), "the default table")
    try:
        data = json.loads(Path(path).read_text())
        measured_on = data["device"]
        points = data["break_even"]
        kinds = [name for name in (*KINDS, POINTWISE) if name in points]
        least = {name: tuple((int(rows), width) for rows, width in points[name]) for name in kinds}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the table {str(path)!r} cannot be read ({type(error).__name__}: {error}): expected what "
            "'revnets bench-fp8 --output' writes"
        ) from error
    if measured_on != kind:
        raise ValueError(f"the table {str(path)!r} was measured on {measured_on!r}, not on {kind!r}: measure there")
    return BreakEven(kind, least, str(path))
