"""Space-to-depth: the reversible stem."""

import torch.fx
from torch import Tensor

from .op import ReversibleOp, Tensors


def wants_channels_last(x: Tensor) -> bool:
    """Whether convolutions copy maps like ``x`` unless they are channels-last: oneDNN's do, in and out, on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class SpaceToDepth(ReversibleOp):
    """Move blocks of pixels into channels, without loss; optionally repeat the image's channels first.

    ``(N, C, H, W)`` becomes ``(N, block_size^2 * repeated, H / block_size, W / block_size)``; the output channel is
    (row in block, column in block, input channel), rows slowest.

    Args:
        in_chans: C, channels of the image.
        block_size: side of the blocks; 1 only repeats.
        repeated: channels after repetition: whole copies of the image, then its first ``repeated % in_chans`` channels.
        channels_last: in training, lay the output out so where that saves copies (see ``wants_channels_last``),
            whatever the input's layout; what follows stays in it.

    Raises:
        ValueError: when ``repeated < in_chans`` (channels would be lost), or sizes do not fit.

    Example:
        >>> import torch
        >>> SpaceToDepth(3, block_size=4)(torch.zeros(1, 3, 32, 32))[0].shape
        torch.Size([1, 48, 8, 8])
    """

    def __init__(
        self, in_chans: int, block_size: int, repeated: int | None = None, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.block_size = block_size
        self.repeated = in_chans if repeated is None else repeated
        self.channels_last = channels_last
        if self.repeated < in_chans:
            raise ValueError(
                f"SpaceToDepth would lose channels: in_chans={in_chans} does not fit in {self.repeated}; "
                "use a wider network, a smaller block, or fewer input channels"
            )

    @property
    def out_chans(self) -> int:
        """Channels of the output."""
        return self.repeated * self.block_size**2

    def forward(self, *xs: Tensor) -> Tensors:
        (x,) = xs
        _check_channels(x, self.in_chans)
        indices = [c % self.in_chans for c in range(self.repeated)]
        if self.repeated != self.in_chans:
            x = x[:, indices]
        n, c, h, w = x.shape
        s = self.block_size
        x = x.reshape(n, c, h // s, s, w // s, s)
        if self.channels_last and self.training and wants_channels_last(x):
            x = x.permute(0, 2, 4, 3, 5, 1).reshape(n, h // s, w // s, s * s * c)
            return (x.permute(0, 3, 1, 2),)
        x = x.permute(0, 3, 5, 1, 2, 4)
        return (x.reshape(n, s * s * c, h // s, w // s),)

    def inverse(self, *ys: Tensor) -> Tensors:
        (y,) = ys
        n, _, h, w = y.shape
        s = self.block_size
        y = y.reshape(n, s, s, self.repeated, h, w)[:, :, :, : self.in_chans].permute(0, 3, 4, 1, 5, 2)
        return (y.reshape(n, self.in_chans, h * s, w * s),)

    def extra_repr(self) -> str:
        return f"in_chans={self.in_chans}, block_size={self.block_size}, repeated={self.repeated}"


@torch.fx.wrap
def _check_channels(x: Tensor, in_chans: int) -> None:
    if x.shape[1] != in_chans:
        raise ValueError(f"input has {x.shape[1]} channels, expected in_chans={in_chans}: shape {tuple(x.shape)}")
