"""Parallel: independent ops side by side, one per scale, as one op."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from .op import Grads, ReversibleOp, Step, Tensors, rewound


class Parallel(ReversibleOp):
    """Per-scale composition: op k maps the k-th tensor to the k-th tensor.

    Args:
        ops: reversible ops of one tensor each.

    Example:
        >>> import torch
        >>> from revnets.reversible import AdditiveCoupling
        >>> layer = Parallel([AdditiveCoupling(nn.ReLU(), nn.ReLU()) for _ in range(2)])
        >>> [tuple(y.shape) for y in layer(torch.ones(1, 4), torch.ones(1, 6))]
        [(1, 4), (1, 6)]
    """

    def __init__(self, ops: Sequence[ReversibleOp]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)

    def forward(self, *xs: Tensor) -> Tensors:
        if len(xs) != len(self.ops):
            raise ValueError(f"Parallel holds {len(self.ops)} ops, one per tensor, got {len(xs)} tensors")
        return tuple(y for op, x in zip(self.ops, xs, strict=True) for y in op(x))

    def inverse(self, *ys: Tensor) -> Tensors:
        return tuple(x for op, y in zip(self._ops(), ys, strict=True) for x in op.inverse(y))

    def rewind(self, step: Step, ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
        xs, grads = list(ys), list(grad_ys)
        for k, op in reversed(list(enumerate(self._ops()))):
            (xs[k],), (grads[k],) = rewound(op, step.narrowed(k), (ys[k],), (grad_ys[k],))
        return tuple(xs), tuple(grads)

    def _ops(self) -> Sequence[ReversibleOp]:
        return cast(Sequence[ReversibleOp], self.ops)
