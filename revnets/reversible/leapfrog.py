"""``Leapfrog``: any block that keeps its shape, reversible without changing what it computes by more than a trifle."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ReversibleError
from .grid import round_to_grid
from .op import Grads, ReversibleOp, Step, Tensors
from .replay import Lent
from .side import laid_out, layout, pack, unpack
from .traced import as_one_node, is_traced

BITS = (0, 1, 2, 4, 8)
DEFAULT_BITS = 8


class Leapfrog(ReversibleOp):
    r"""A block of a trained network on two streams: ``z``, which the network has, and ``x``, on which the block runs.

    .. math:: z' = z + (B(x) - x), \qquad x' = z' + b (z' - x), \qquad b = 2^{-bits}

    With ``b = 0`` both streams are the network's own. The larger b, the further x runs ahead of z: by b times the
    block's update. Undone from the outputs, :math:`x = z' - (x' - z') / b` and :math:`z = z' - (B(x) - x)`: a
    division, which loses ``bits`` bits of every number, so that floating-point inverses are of little use (the error
    grows by ``1 / b`` with each block). In exact mode what is lost is known, an integer of ``bits`` bits per number on
    the grid; it is kept in the forward pass, a byte or less in place of an activation, and the inverse is exact.

    Args:
        block: maps a tensor to one of the same shape; a module, or one that is ``Lent``.
        bits: 0, 1, 2, 4 or 8: of side information per number; 0 needs none, and x leaps as far ahead as z came.
        start: takes one tensor, which both streams start from.
        end: leaves x where it is: nothing runs on it any more.
        exact: see ``ReversibleOp``.

    Raises:
        ValueError: for another number of bits.

    Example:
        >>> pair = Leapfrog(nn.Linear(4, 4), start=True, end=True)(torch.ones(2, 4))
        >>> [tuple(stream.shape) for stream in pair]
        [(2, 4), (2, 4)]
    """

    def __init__(
        self,
        block: nn.Module | Lent,
        bits: int = DEFAULT_BITS,
        start: bool = False,
        end: bool = False,
        exact: bool | int = False,
    ) -> None:
        super().__init__(exact)
        if bits not in BITS or isinstance(bits, bool):
            raise ValueError(f"bits={bits}: expected one of {', '.join(map(str, BITS))}")
        self.bits, self.start, self.end = bits, start, end
        if isinstance(block, Lent):
            self.lent = block
        else:
            self.own = block

    def num_outputs_of(self, num_inputs: int) -> int:
        return 2

    @property
    def block(self) -> nn.Module:
        """What runs on x."""
        return self.lent.module if "lent" in vars(self) else self.own

    def forward(self, *xs: Tensor) -> Tensors:
        """Args: xs: z and x, of one shape; for a ``start`` one tensor. Returns z and x."""
        if is_traced(*xs):
            return as_one_node(self, 2, *xs)
        z, x = self._streams(xs)
        value = self.branch("block", self.block, x)
        if value.shape != x.shape:
            raise ReversibleError(
                f"{type(self.block).__name__} makes {tuple(value.shape)} of {tuple(x.shape)}: a block that is to be "
                "reversible keeps the shape"
            )
        how = self._how()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*xs, value)):
            return _Step.apply(z, x, value, how)
        z, ahead, rest = _forward(z, x, value, how)
        self.keep("rest", lambda: (layout(x), None if rest is None else pack(rest(), self.bits)))
        return z, ahead

    def inverse(self, *ys: Tensor) -> Tensors:
        """Undo ``forward``.

        Raises:
            ReversibleError: in exact mode with ``bits``, where a forward pass of the engine has kept none.
        """
        z, ahead = ys
        with self.undoing():
            x = ahead if self.end else self._behind_(z, ahead.clone(), self.kept("rest"))
            if self.start:
                return (x,)
            value = self.branch("block", self.block, x)
            return self.minus(z, value.to(z.dtype) - x), x

    def rewind(self, step: Step, ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
        (z, x), (grad_z, grad_ahead) = ys, grad_ys
        if not self.end:
            x = self._behind_(z, x, step.kept(self, "rest"))
        value, pull = self.evaluate(step, "block", self.block, x, needs_grad=step.needs_input_grad[-1])
        if not self.start:
            self.subtract(z, value.to(z.dtype) - x, owned=True)
        strides = layout(value)
        del value
        grad = _grad_of_value(grad_z, grad_ahead, self._how(), owned=True)
        (through,) = pull(None if grad is None else laid_out(grad, strides))
        grad_x = step.add(_grad_of_x(grad, grad_ahead, self._how(), owned=True), through)
        return ((x,), (grad_x,)) if self.start else ((z, x), (grad, grad_x))

    def _how(self) -> "_How":
        return _How(self.bits, self.grid_bits if self.rounds else None, self.start, self.end)

    def _streams(self, xs: Tensors) -> tuple[Tensor | None, Tensor]:
        if len(xs) != (1 if self.start else 2):
            raise ValueError(
                f"Leapfrog takes {'one tensor, being the start' if self.start else 'two tensors'}; got {len(xs)}"
            )
        return (None, xs[0]) if self.start else (xs[0], xs[1])

    def _behind_(self, z: Tensor, ahead: Tensor, kept: Any) -> Tensor:
        """The former x, in place: as far behind z as its successor is ahead of it, times ``2^bits``, and the rest."""
        strides, packed = (ahead.stride(), None) if kept is None else kept
        lead = ahead.sub_(z)
        if self.bits:
            lead.mul_(2.0**self.bits)
        if self.bits and self.rounds and self.grid_bits is not None:
            if packed is None:
                raise ReversibleError(
                    f"Leapfrog with bits={self.bits} cannot be undone from its outputs alone: the rest is kept in "
                    "training steps only (see check_reversibility); bits=0 needs none"
                )
            lead.add_(unpack(packed, self.bits, lead.shape), alpha=2.0**-self.grid_bits)
        return laid_out(lead.neg_().add_(z), strides)

    def extra_repr(self) -> str:
        parts = [f"bits={self.bits}", "start" * self.start, "end" * self.end, super().extra_repr()]
        return ", ".join(filter(None, parts))


class _How(NamedTuple):
    """``bits`` of the op, k of the grid where it rounds now, and what it does at the ends of a chain."""

    bits: int
    grid_bits: int | None
    start: bool
    end: bool


def _forward(z: Tensor | None, x: Tensor, value: Tensor, how: _How) -> tuple[Tensor, Tensor, Any]:
    """Both streams, and a function that makes the rest (None where there is none): integers of ``bits`` bits."""
    update = value.to(x.dtype) - x
    if how.grid_bits is not None:
        update = round_to_grid(update, how.grid_bits)
    z = update.add_(x if z is None else z)  # in the layout of the value, as in the network
    if how.end:
        return z, x, None
    lead = z - x
    if not how.bits:
        return z, lead.add_(z), None
    if how.grid_bits is None:
        return z, lead.mul_(2.0**-how.bits).add_(z), None
    # a shift in whole steps of the grid, rounded to the nearest: products by powers of two are exact
    shifted = (lead * 2.0 ** (how.grid_bits - how.bits)).add_(0.5).floor_()
    ahead = torch.add(z, shifted, alpha=2.0**-how.grid_bits)
    return z, ahead, lambda: lead.mul_(2.0**how.grid_bits).sub_(shifted, alpha=2.0**how.bits).to(torch.int8)


# Factors of gradients are powers of two: the numbers are the same whether or not a kernel rounds between a product and
# a sum, in place or not. Each sum has two terms, whose order does not matter.


def _grad_of_value(grad_z: Tensor | None, grad_ahead: Tensor | None, how: _How, owned: bool = False) -> Tensor | None:
    """Of what the block gives, and of the former z; in place of ``grad_z`` where that is ``owned``."""
    if how.end or grad_ahead is None:
        return grad_z
    b = 2.0**-how.bits
    if grad_z is None:
        return grad_ahead.add(grad_ahead, alpha=b)
    if owned:
        return grad_z.add_(grad_ahead).add_(grad_ahead, alpha=b)
    return (grad_z + grad_ahead).add(grad_ahead, alpha=b)


def _grad_of_x(grad: Tensor | None, grad_ahead: Tensor | None, how: _How, owned: bool = False) -> Tensor | None:
    """Of x, without what it gets through the block; ``grad`` is that of the value."""
    rest = grad_ahead
    if rest is not None and not how.end:
        rest = rest.mul_(-(2.0**-how.bits)) if owned else rest * -(2.0**-how.bits)
    if grad is None or how.start:  # what x loses to the update it gains as the start of z
        return rest
    if rest is None:
        return grad.neg()
    return rest.sub_(grad) if owned else rest - grad


class _Step(torch.autograd.Function):
    """What ``_forward`` does, where autograd keeps its books: in the modes that store or checkpoint."""

    @staticmethod
    def forward(ctx: Any, z: Tensor | None, x: Tensor, value: Tensor, how: _How) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.how, ctx.strides, ctx.dtype = how, layout(value), value.dtype
        return _forward(z, x, value, how)[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_z, grad_ahead = grads
        grad = _grad_of_value(grad_z, grad_ahead, ctx.how)
        grad_x = _grad_of_x(grad, grad_ahead, ctx.how)
        if grad is None:
            return None, grad_x, None, None
        return None if ctx.how.start else grad, grad_x, laid_out(grad, ctx.strides).to(ctx.dtype), None
