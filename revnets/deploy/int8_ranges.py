"""INT8 numbers of a network: ranges of activations, seen on images, and weights per output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_SMALLEST = 1e-12  # span of a range


@dataclass(frozen=True)
class Range:
    """What bytes stand for: ``(q - zero) * scale``."""

    scale: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """The range that holds these numbers, and 0 exactly.

        Example:
            >>> Range.of(-1.0, 1.55).zero
            100
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(torch.tensor(max(high - low, _SMALLEST) / 255, dtype=torch.float32))
        return cls(scale, min(max(round(-low / scale), 0), 255))

    def byte(self, value: float) -> int:
        """The nearest byte."""
        return min(max(round(value / self.scale) + self.zero, 0), 255)


class Observed(fx.Interpreter):
    """Runs the graph; notes the shape and the range of every node's value."""

    def __init__(self, graph: fx.GraphModule, share: float) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.ends: dict[fx.Node, tuple[float, float]] = {}
        self._share = share

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype == torch.float32 and n.op != "get_attr" and value.numel():
            low, high = self._range(value.flatten())
            before = self.ends.get(n, (low, high))
            self.ends[n] = (min(low, before[0]), max(high, before[1]))
            self.shapes[n] = tuple(value.shape)
        return value

    def _range(self, values: Tensor) -> tuple[float, float]:
        beyond = int(self._share * len(values))
        if not beyond:
            return float(values.min()), float(values.max())
        return float(values.kthvalue(1 + beyond).values), float(values.kthvalue(len(values) - beyond).values)


def quantised_weights(
    weight: Tensor, bias: Tensor | None, scale_in: float, scale_out: float
) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 weights, int32 bias, and what sums are multiplied by to reach the output's bytes, per channel."""
    matrix = weight.detach().double().flatten(1)
    offset = torch.zeros(len(matrix), dtype=torch.float64) if bias is None else bias.detach().double()
    step = matrix.abs().amax(1) / 127
    step = torch.maximum(step, offset.abs() / (scale_in * 2**24))  # the bias has to fit beside the products
    step = torch.where(step > 0, step, 1.0)
    quantised = (matrix / step[:, None]).round().clamp(-127, 127)
    whole = (offset / (scale_in * step)).round()
    most = 255 * quantised.abs().sum(1) + whole.abs()
    scale = torch.minimum(scale_in * step / scale_out, 2**29 / most.clamp(min=1))  # beyond it is saturated anyway
    return quantised.to(torch.int8).view(weight.shape), whole.to(torch.int32), scale.float()
