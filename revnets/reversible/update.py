"""``KeptUpdate``: any block that keeps its shape, undone from its output and its update, of which few bits are kept."""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ReversibleError
from .grid import round_to_grid
from .op import Grads, ReversibleOp, Step, Tensors
from .replay import Lent
from .side import laid_out, layout, pack, unpack
from .traced import as_one_node, is_traced

UPDATE_BITS = (4, 8, 16)
GROUP = 64  # neighbours in memory that share a scale


class KeptUpdate(ReversibleOp):
    r"""A block of a trained network whose update is rounded to few bits, which are kept in place of its input.

    .. math:: y = x + s q, \qquad q = \mathrm{round}((B(x) - x) / s)

    with q of 4, 8 or 16 bits and a scale s for 64 numbers at a time, so that the largest of them fits. Undone without
    computing the block: :math:`x = y - s q`, in exact mode to the bit. The gradient passes the rounding as if it were
    not there; then what x gets through the block is all of it, as in the network itself. Nothing is alive in the
    backward pass but what checkpointing has there, and a byte is kept per number where that keeps four.

    Args:
        block: maps a tensor to one of the same shape; a module, or one that is ``Lent``.
        bits: 4, 8 or 16: of side information per number.
        exact: see ``ReversibleOp``.

    Raises:
        ValueError: for another number of bits.

    Example:
        >>> (y,) = KeptUpdate(nn.Linear(4, 4))(torch.ones(2, 4))
        >>> y.shape
        torch.Size([2, 4])
    """

    def __init__(self, block: nn.Module | Lent, bits: int = 8, exact: bool | int = False) -> None:
        super().__init__(exact)
        if bits not in UPDATE_BITS:
            raise ValueError(f"bits={bits!r}: expected one of {', '.join(map(str, UPDATE_BITS))}")
        self.bits = bits
        if isinstance(block, Lent):
            self.lent = block
        else:
            self.own = block

    @property
    def block(self) -> nn.Module:
        """What is run."""
        return self.lent.module if "lent" in vars(self) else self.own

    def forward(self, *xs: Tensor) -> Tensors:
        """Args: xs: one tensor. Returns one of the same shape."""
        if is_traced(*xs):
            return as_one_node(self, 1, *xs)
        (x,) = xs
        value = self.branch("block", self.block, x)
        if value.shape != x.shape:
            raise ReversibleError(
                f"{type(self.block).__name__} makes {tuple(value.shape)} of {tuple(x.shape)}: a block that is to be "
                "reversible keeps the shape"
            )
        grid_bits = self.grid_bits if self.rounds else None
        if torch.is_grad_enabled() and (x.requires_grad or value.requires_grad):
            return (_Step.apply(x, value, self.bits, grid_bits),)
        y, kept = _forward(x, value, self.bits, grid_bits)
        self.keep("update", lambda: (layout(x), layout(y), pack(kept[0], self.bits), kept[1]))
        return (y,)

    def inverse(self, *ys: Tensor) -> Tensors:
        """Undo ``forward``.

        Raises:
            ReversibleError: outside of the engine, whose forward pass keeps the update.
        """
        (y,) = ys
        kept = self.kept("update")
        if kept is None:
            raise ReversibleError(
                "KeptUpdate cannot be undone from its output alone: the update is kept in training steps only (see "
                "check_reversibility)"
            )
        return (self._before_(y.clone(), kept),)

    def rewind(self, step: Step, ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
        x = self._before_(ys[0], step.kept(self, "update"))
        (grad,) = grad_ys
        value, pull = self.evaluate(step, "block", self.block, x, needs_grad=step.needs_input_grad[0])
        strides = layout(value)
        del value
        through = pull(None if grad is None else laid_out(grad, strides))
        return (x,), through

    def _before_(self, y: Tensor, kept: Any) -> Tensor:
        """The input, in place of the output."""
        strides, grouped, packed, scale = kept
        integers = unpack(packed, self.bits, torch.Size((scale.numel(), GROUP)))
        y.sub_(_update(integers, scale, y.shape, grouped, self.grid_bits if self.rounds else None))
        return laid_out(y, strides)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"bits={self.bits}", super().extra_repr()]))


def _forward(x: Tensor, value: Tensor, bits: int, grid_bits: int | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The output, and the update as integers in groups, with the scale of each."""
    update = value.to(x.dtype) - x  # dense, whatever the layout
    flat = update.as_strided((update.numel(),), (1,))
    groups = nn.functional.pad(flat, (0, -update.numel() % GROUP)).view(-1, GROUP)
    largest = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(1, keepdim=True).div_(largest)
    smallest = torch.finfo(scale.dtype).tiny
    integers = (groups / scale.clamp(min=smallest)).round_().to(torch.int16 if bits > 8 else torch.int8)
    return _update(integers, scale, x.shape, update.stride(), grid_bits).add_(x), (integers, scale)


def _update(
    integers: Tensor, scale: Tensor, shape: torch.Size, strides: tuple[int, ...], grid_bits: int | None
) -> Tensor:
    """What is added."""
    update = integers.to(scale.dtype).mul_(scale)
    if grid_bits is not None:
        update = round_to_grid(update, grid_bits)
    return update.as_strided(shape, strides)


class _Step(torch.autograd.Function):
    """What ``_forward`` does, where autograd keeps its books: in the modes that store or checkpoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, bits: int, grid_bits: int | None) -> Tensor:
        ctx.strides, ctx.dtype = layout(value), value.dtype
        return _forward(x, value, bits, grid_bits)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, laid_out(grad, ctx.strides).to(ctx.dtype), None, None
