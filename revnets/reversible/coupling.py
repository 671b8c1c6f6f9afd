"""Additive coupling of two halves: the reversible residual block."""

import torch
import torch.fx
from torch import Tensor, nn

from .op import Grads, ReversibleOp, Step, Tensors


class AdditiveCoupling(ReversibleOp):
    r"""Reversible residual block (RevNet, arXiv 1707.04585) on the two channel halves of a tensor, or on two tensors.

    .. math:: y_2 = x_2 + F(x_1), \qquad y_1 = x_1 + G(y_2)

    and backwards :math:`x_1 = y_1 - G(y_2)`, :math:`x_2 = y_2 - F(x_1)`. With one tensor of C channels the first half
    has ``C - C // 2``.

    Args:
        f: module from the first half's shape to the second's.
        g: module from the second half's shape to the first's.
        exact: see ``ReversibleOp``.

    Example:
        >>> block = AdditiveCoupling(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
        >>> (y,) = block(torch.ones(1, 4, 8, 8))
        >>> y.shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(self, f: nn.Module, g: nn.Module, exact: bool | int = False) -> None:
        super().__init__(exact)
        self.f = f
        self.g = g

    def forward(self, *xs: Tensor) -> Tensors:
        """Args: xs: one tensor ``(N, C, ...)`` or two. Returns as many, of the same shapes."""
        x1, x2 = self._halves(xs)
        y2 = self.plus(x2, self.branch("f", self.f, x1))
        y1 = self.plus(x1, self.branch("g", self.g, y2))
        return _joined((y1, y2), len(xs))

    def inverse(self, *ys: Tensor) -> Tensors:
        """Undo ``forward``: same shapes."""
        with self.undoing():
            y1, y2 = self._halves(ys)
            x1 = self.minus(y1, self.branch("g", self.g, y2))
            x2 = self.minus(y2, self.branch("f", self.f, x1))
        return _joined((x1, x2), len(ys))

    def rewind(self, step: Step, ys: Tensors, grad_ys: Grads) -> tuple[Tensors, Grads]:
        xs, grads = ys, grad_ys  # changed in place
        x1, x2 = self._halves(xs)
        unused = grads[0] is None  # of one tensor: then nothing here has a gradient, as with stored activations
        grad_1, grad_2 = (
            grads if len(grads) == 2 else (None, None) if unused else self._halves(grads)  # type: ignore[arg-type]
        )

        value, pull = self.evaluate(step, "g", self.g, x2)
        self.subtract(x1, value)
        del value
        grad_2 = step.add(grad_2, pull(grad_1)[0])

        value, pull = self.evaluate(step, "f", self.f, x1, needs_grad=step.needs_input_grad[0], dense_grad=True)
        self.subtract(x2, value)
        del value
        grad_1 = step.add(grad_1, pull(grad_2)[0])
        return xs, grads if len(xs) == 1 else (grad_1, grad_2)

    def _halves(self, xs: Tensors) -> tuple[Tensor, Tensor]:
        if len(xs) == 2:
            return xs
        if len(xs) != 1:
            raise ValueError(
                f"AdditiveCoupling takes one tensor, to be split along its channels, or two; got {len(xs)}"
            )
        first, second = split_channels(xs[0])
        return first, second


@torch.fx.wrap
def split_channels(x: Tensor) -> Tensors:
    """The two halves of a tensor's channels, the first the larger one.

    Raises:
        ValueError: there is only one channel.
    """
    channels = x.shape[1]
    if channels < 2:
        raise ValueError(f"AdditiveCoupling splits the channels in halves: expected at least 2, got {channels}")
    return x.split((channels - channels // 2, channels // 2), dim=1)


def _joined(pair: tuple[Tensor, Tensor], count: int) -> Tensors:
    return pair if count == 2 else (torch.cat(pair, dim=1),)
