"""The parts of munit-scaled vision transformers: weighted residuals, patch embedding, blocks, branches of streams."""

from __future__ import annotations

import math
from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from ..layers.munit.convert import munit_scaled
from ..layers.munit.layers import MuSConv2d


def residual_weight(branch: int, depth: int, residual: str | float = "fixed") -> float:
    r"""The share t of a branch in :math:`x' = \sqrt{1-t} \, x + \sqrt{t} \, f(x)`.

    ``"fixed"``: :math:`t = \min(0.5, 0.8 / \sqrt{\text{depth}})`, the same for all branches: 0.4 at 4 blocks, 0.23 at
    12, 0.1 at 64. The paper gives such values and that they fall with depth and do not depend on width; the formula is
    ours. ``"mean"``: :math:`t = 1 / (l + 1)` in branch l (from 1), which weighs the input and all branches alike.

    Args:
        branch: its number, from 1.
        depth: blocks of the network.
        residual: ``"fixed"``, ``"mean"``, or t itself.

    Raises:
        ValueError: for another word, or a t outside (0, 1).

    Example:
        >>> residual_weight(3, 4), residual_weight(3, 4, "mean"), residual_weight(3, 4, 0.3)
        (0.4, 0.25, 0.3)
    """
    if residual == "fixed":
        return min(0.5, 0.8 / math.sqrt(depth))
    if residual == "mean":
        return 1 / (branch + 1)
    if isinstance(residual, int | float) and 0 < residual < 1:
        return float(residual)
    raise ValueError(f"residual={residual!r}: expected 'fixed', 'mean', or a share t between 0 and 1")


class MuSPatchEmbed(PatchEmbed):
    """timm's patch embedding as munit scaling's input layer.

    The scale of an input layer is 1, which suits one-hot words, of length 1. Patches have length sqrt(fan-in) where
    pixels have variance 1, so they are divided by it; a constant, as the fan-in does not grow with the network.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proj: nn.Conv2d = munit_scaled(self.proj, "input", init=True)  # type: ignore[assignment]
        self.input_scale = self.proj.weight[0].numel() ** -0.5

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """timm's, which puts a plain convolution in for a new size of patches; the function is kept, scale included."""
        super().set_input_size(*args, **kwargs)
        if not isinstance(self.proj, MuSConv2d):
            self.proj = munit_scaled(self.proj, "input")  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C, H, W)``. Returns: ``(N, tokens, embed_dim)``."""
        return super().forward(x * self.input_scale)


class MuSBlock(ResPostBlock):
    """Transformer block with the norm at the end of each branch, and weighted residuals.

    Attributes:
        residual: the shares t of attention and of the MLP.
    """

    residual: tuple[float, float] = (0.5, 0.5)

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """Args: x: ``(N, tokens, dim)``; mask: timm's ``attn_mask`` or ``is_causal``. Returns the same shape."""
        x = _weighted(x, self.drop_path1(self.norm1(self.attn(x, **mask))), self.residual[0])
        return _weighted(x, self.drop_path2(self.norm2(self.mlp(x))), self.residual[1])


def _weighted(x: Tensor, branch: Tensor, t: float) -> Tensor:
    return x * (1 - t) ** 0.5 + branch * t**0.5


class StreamBranch(nn.Module):
    """A branch of a block between streams that are kept without their residual factors.

    Args:
        fn: attention or MLP.
        norm: at its end.
        drop_path: stochastic depth, or an identity.
        gain: factor of the stream that it reads, to variance 1.
        scale: of what is added to the other stream.
    """

    def __init__(self, fn: nn.Module, norm: nn.Module, drop_path: nn.Module, gain: float, scale: float) -> None:
        super().__init__()
        self.fn, self.norm, self.drop_path = fn, norm, drop_path
        self.gain, self.scale = gain, scale

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: a stream, ``(N, tokens, dim)``. Returns: what is added to the other one."""
        return self.drop_path(self.norm(self.fn(x * self.gain))) * self.scale

    def extra_repr(self) -> str:
        return f"gain={self.gain:.4g}, scale={self.scale:.4g}"
