"""RevSilo: reversible bidirectional fusion of feature maps at several scales."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import ReversibleError
from .op import Grads, ReversibleOp, Step, Tensors

Edge = tuple[int, int]


class RevSilo(ReversibleOp):
    r"""Reversible bidirectional multi-scale fusion (RevBiFPN, arXiv 2206.14098).

    From n inputs (scale 0 the finest) to m outputs, m = n or n + 1 (one coarser scale is made):

    .. math::
        u_j = x_j + \sum_{i<j} D_{ij}(x_i), \qquad y_i = u_i + \sum_{j>i} U_{ji}(u_j)

    without the :math:`x_j` term for a new scale. Backwards the up pass is undone from coarse to fine, then the down
    pass from fine to coarse; the new scale is dropped.

    Args:
        down: branches ``D``, keyed ``(i, j)`` with i < j: from the shape of scale i to that of scale j.
        up: branches ``U``, keyed ``(j, i)`` with j > i: from the shape of scale j to that of scale i.
        num_inputs: n. Outputs are counted from the branches' keys.
        exact: see ``ReversibleOp``.

    Raises:
        ValueError: when an edge points the wrong way, or a new scale has no branch to make it.

    Example:
        >>> down = {(0, 1): nn.Conv2d(4, 8, 3, stride=2, padding=1)}
        >>> up = {(1, 0): nn.Sequential(nn.Conv2d(8, 4, 1), nn.Upsample(scale_factor=2))}
        >>> ys = RevSilo(down, up, num_inputs=1)(torch.ones(1, 4, 8, 8))
        >>> [tuple(y.shape) for y in ys]
        [(1, 4, 8, 8), (1, 8, 4, 4)]
    """

    def __init__(
        self,
        down: Mapping[Edge, nn.Module],
        up: Mapping[Edge, nn.Module],
        num_inputs: int,
        exact: bool | int = False,
    ) -> None:
        super().__init__(exact)
        self.num_inputs = num_inputs
        self.num_outputs = max((max(edge) for edge in (*down, *up)), default=num_inputs - 1) + 1
        _check_edges(down, up, num_inputs, self.num_outputs)
        self.down = nn.ModuleDict({f"{i}_{j}": module for (i, j), module in sorted(down.items())})
        self.up = nn.ModuleDict({f"{j}_{i}": module for (j, i), module in sorted(up.items())})

    # Orders matter for bit equality: forward visits down edges by falling j and up edges by rising i, rewind exactly
    # the other way round, which is both possible (each step needs only scales already known) and autograd's order.

    def forward(self, *xs: Tensor) -> Tensors:
        """Fuse.

        Args:
            xs: n maps, finest first, e.g. ``(N, C_i, H / 2^i, W / 2^i)``.

        Returns:
            m maps, finest first.
        """
        if len(xs) != self.num_inputs:
            raise ValueError(f"RevSilo was built for {self.num_inputs} inputs, got {len(xs)}: pass one map per scale")
        us = list(xs)
        if self.num_outputs > self.num_inputs:
            us.append(self._created(self._sum("down", self.num_inputs, xs), xs[0]))
        for j in reversed(range(1, self.num_inputs)):
            us[j] = self._plus(xs[j], self._sum("down", j, xs))
        ys = us
        for i in range(self.num_outputs - 1):
            ys[i] = self._plus(us[i], self._sum("up", i, us))  # us[j] with j > i is not yet replaced
        return tuple(ys)

    def num_outputs_of(self, num_inputs: int) -> int:
        return self.num_outputs

    def inverse(self, *ys: Tensor) -> Tensors:
        """Undo ``forward``: m maps in, n maps out."""
        with self.undoing():
            xs = list(ys)
            for i in reversed(range(self.num_outputs - 1)):
                xs[i] = self._minus(ys[i], self._sum("up", i, xs))
            for j in range(1, self.num_inputs):
                xs[j] = self._minus(xs[j], self._sum("down", j, xs))
        return tuple(xs[: self.num_inputs])

    def rewind(self, step: Step, ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
        xs, grads = list(ys), list(grad_ys)
        for i in reversed(range(self.num_outputs - 1)):
            self._subtract(xs[i], self._rewind_sum(step, "up", i, xs, grads))
        for j in range(1, self.num_outputs):
            total = self._rewind_sum(step, "down", j, xs, grads)
            if j < self.num_inputs:
                self._subtract(xs[j], total)
        return tuple(xs[: self.num_inputs]), tuple(grads[: self.num_inputs])

    def _rewind_sum(
        self, step: Step, direction: str, target: int, xs: list[Tensor], grads: list[Tensor | None]
    ) -> Tensor | None:
        """Sum of the branches into ``target``; adds the gradients of their inputs to ``grads``."""
        total: Tensor | None = None
        for source, branch in self._edges(direction, target):
            needs_grad = direction == "up" or step.needs_input_grad[source]
            value, pull = self.evaluate(step, (direction, source, target), branch, xs[source], needs_grad=needs_grad)
            total = value if total is None else total.add_(value)  # after its pull, a value is ours
            del value
            grads[source] = step.add(grads[source], pull(grads[target])[0])
        return total

    def _edges(self, direction: str, target: int) -> list[tuple[int, nn.Module]]:
        """The branches into scale ``target``, with the scale each comes from."""
        branches = self.down if direction == "down" else self.up
        keys = [(source, f"{source}_{target}") for source in range(self.num_outputs)]
        return [(source, branches[key]) for source, key in keys if key in branches]

    def _sum(self, direction: str, target: int, xs: Sequence[Tensor]) -> Tensor | None:
        total: Tensor | None = None
        ours = False  # a branch's output may be its input; a sum is ours, and outside of autograd changed in place
        for source, branch in self._edges(direction, target):
            value = self.branch((direction, source, target), branch, xs[source])
            if ours and total is not None and not torch.is_grad_enabled():
                total = total.add_(value)  # a traced graph drops what nobody reads
            else:
                total, ours = value if total is None else total + value, total is not None
        return total

    def _created(self, total: Tensor | None, like: Tensor) -> Tensor:
        if total is None:
            raise ReversibleError(f"RevSilo: no down branch makes scale {self.num_inputs}")
        return self.quantize(total.to(like.dtype), like)

    def _plus(self, x: Tensor, total: Tensor | None) -> Tensor:
        return x if total is None else self.plus(x, total)

    def _minus(self, y: Tensor, total: Tensor | None) -> Tensor:
        return y if total is None else self.minus(y, total)

    def _subtract(self, y: Tensor, total: Tensor | None) -> None:
        if total is not None:
            self.subtract(y, total, owned=True)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"{self.num_inputs} -> {self.num_outputs} scales", super().extra_repr()]))


def _check_edges(down: Mapping[Edge, nn.Module], up: Mapping[Edge, nn.Module], inputs: int, outputs: int) -> None:
    if inputs < 1 or outputs not in (inputs, inputs + 1):
        raise ValueError(
            f"RevSilo maps n scales to n or n + 1: got {inputs} inputs and branches up to {outputs} scales"
        )
    for i, j in down:
        if not 0 <= i < j or i >= inputs:
            raise ValueError(f"down branch {(i, j)}: expected (i, j) with i < j and i < {inputs} (the inputs)")
    for j, i in up:
        if not 0 <= i < j:
            raise ValueError(f"up branch {(j, i)}: expected (j, i) with j > i, from coarse to fine")
    if outputs > inputs and not any(j == inputs for _, j in down):
        raise ValueError(f"scale {inputs} is new but no down branch leads to it: add one such as (0, {inputs})")
