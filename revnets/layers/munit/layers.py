"""Munit-scaled layers, dense and sparse: weights start with variance 1, and the scales are static."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..fold import folded_layer, plain_layer
from ..sparse_ift.sparse import MaskedWeight
from .fp8 import check_backend, check_floating, check_grad_scale
from .fp8_conv import choose, padded_words
from .functional import munit_scale, mus_conv2d, mus_linear

for _name in ("check_floating", "mus_conv2d", "mus_linear"):  # which look at their tensors: nodes of a traced graph
    torch.fx.wrap(_name)


class MunitScaled(nn.Module):
    r"""What the munit-scaled layers share: weights of variance 1, and the static factor :math:`\alpha`.

    Attributes:
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        scale: :math:`\alpha`, see ``munit_scale``.
        fp8: whether products are in FP8: asked for, and the layer is hidden and not grouped.
        backend: of FP8 products.
        grad_scale: static factor around the quantisation of gradients; None: see ``functional.gradient_scale``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    role: str
    scale: float
    fp8: bool
    backend: str | None
    grad_scale: float | None

    def _init_scale(
        self, fp8: bool, role: str, backend: str | None, grad_scale: float | None, density: float = 1.0
    ) -> None:
        self.scale = munit_scale(self.weight.shape[1:].numel() * density, role)
        self.role, self.backend, self.grad_scale = role, check_backend(backend), check_grad_scale(grad_scale)
        self.fp8 = fp8 and role == "hidden" and getattr(self, "groups", 1) == 1
        if self.fp8 and not self.weight.numel():
            raise ValueError(
                f"fp8=True with a weight of shape {tuple(self.weight.shape)}: expected widths of 1 at least, which are "
                "padded to multiples of 16"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of variance 1; biases 0."""
        self.weight.normal_()
        if self.bias is not None:
            self.bias.zero_()

    def unscaled_weight(self) -> Tensor:
        """The weight before the scale: the parameter, or what is left of it under a mask."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same: with the scale in it, not quantised."""
        return self.unscaled_weight() * self.scale

    @property
    def note(self) -> str:
        """What is active, for the report of a conversion."""
        padded = padded_words(self.weight.shape[1], self.weight.shape[0]) if self.fp8 else ""
        return f"role {self.role}, scale {self.scale:.4g}, {self._precision()}" + (f", {padded}" if padded else "")

    def _precision(self) -> str:
        return "e4m3/e5m2" if self.fp8 else "not quantised"

    def extra_repr(self) -> str:
        """Torch's own, with role, scale and what is active of FP8."""
        active = f"fp8={self._precision()}" if self.fp8 else "fp8=off"
        backend = f", backend={self.backend}" if self.fp8 and self.backend else ""
        return f"{super().extra_repr()}, role={self.role}, scale={self.scale:.4g}, {active}{backend}"


class MuSLinear(MunitScaled, nn.Linear):  # type: ignore[misc]
    r"""Munit-scaled linear layer, in FP8 on request (arXiv 2502.05967).

    .. math:: y = \alpha x W^\top + b, \qquad W_{ij} \sim N(0, 1), \qquad \alpha = 1/\sqrt{\text{fan\_in}}

    for a hidden layer; see ``munit_scale`` for the first and the last, which are never quantised. Forward pass, input
    gradient and weight gradient are products of e4m3 inputs and weights and e5m2 gradients; see ``mus_linear``.

    Args:
        in_features: fan-in.
        out_features: fan-out.
        bias: whether there is one; it starts at 0.
        fp8: multiply in FP8, if the layer is hidden.
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        backend: ``"scaled_mm"``, ``"emulate"``, or None for the best on the device.
        grad_scale: static factor around the quantisation of gradients, a power of two; None: see ``gradient_scale``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an unknown role or backend, or widths of 0 in FP8.

    Example:
        >>> MuSLinear(64, 16, fp8=True)
        MuSLinear(in_features=64, out_features=16, bias=True, role=hidden, scale=0.125, fp8=e4m3/e5m2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        fp8: bool = False,
        role: str = "hidden",
        backend: str | None = None,
        grad_scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_scale(fp8, role, backend, grad_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(..., in_features)``. Returns: ``(..., out_features)``."""
        weight = self.unscaled_weight()
        return mus_linear(
            *(x, weight, self.bias),
            scale=self.scale,
            fp8=self.fp8,
            backend=self.backend,
            grad_scale=self.grad_scale,
        )


class MuSConv2d(MunitScaled, nn.Conv2d):  # type: ignore[misc]
    r"""Munit-scaled convolution, in FP8 on request; fan-in is :math:`C_{in} / \text{groups} \cdot k^2`.

    On GPUs with FP8 units 1x1 convolutions are products of matrices and larger kernels are ours, in Triton; elsewhere
    quantised operands are convolved in float32, so the numbers are those of FP8. Grouped convolutions (depthwise) are
    not quantised. See ``mus_conv2d``.

    Args:
        args: those of ``nn.Conv2d``, in its order.
        fp8: multiply in FP8, if the layer is hidden and not grouped.
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        backend: ``"scaled_mm"``, ``"emulate"``, or None for the best on the device.
        grad_scale: static factor around the quantisation of gradients, a power of two; None: see ``gradient_scale``.
        kwargs: those of ``nn.Conv2d``.

    Attributes:
        pointwise: what computes 1x1 convolutions on FP8 units, ``"scaled_mm"`` or ``"triton"``: set by
            ``mus_fp8:auto``, from what was measured.

    Raises:
        ValueError: for an unknown role or backend, or widths of 0 in FP8.

    Example:
        >>> MuSConv2d(16, 32, 1, bias=False, fp8=True)
        MuSConv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False, role=hidden, scale=0.25, fp8=e4m3/e5m2)
    """

    pointwise: str = "scaled_mm"

    def __init__(
        self,
        *args: Any,
        fp8: bool = False,
        role: str = "hidden",
        backend: str | None = None,
        grad_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_scale(fp8, role, backend, grad_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)``. Returns: ``(N, C_out, H', W')``."""
        check_floating(x, type(self).__name__)
        if not self.fp8:
            return self._conv_forward(x, self.effective_weight(), self.bias)
        padding: Any = self.padding
        if self._pads_before():
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), 0
        return mus_conv2d(
            *(x, self.unscaled_weight(), self.bias, self.stride, padding, self.dilation),
            scale=self.scale,
            fp8=True,
            backend=self.backend,
            grad_scale=self.grad_scale,
            pointwise=self.pointwise,
        )

    def _pads_before(self) -> bool:
        """Whether padding is none of the convolution's, which knows numbers of zeros only."""
        return isinstance(self.padding, str) or self.padding_mode != "zeros"

    @property
    def note(self) -> str:
        """What is active, and what computes it where the layer is, for the report of a conversion."""
        if not self.fp8:
            return super().note
        padding: Any = (0, 0) if self._pads_before() else self.padding
        options: dict[str, Any] = {"backend": self.backend, "pointwise": self.pointwise, "quiet": True}
        choice = choose(self.weight.shape, padding, self.weight.device, self.weight.dtype, **options)
        how = f"emulated: {choice.reason}" if choice.how == "emulate" else f"on FP8 units, {choice.reason}"
        return f"{super().note}, {how}"


# --- under masks -----------------------------------------------------------------------------------------------------


class _SparseMunitScaled(MaskedWeight):
    """A mask over the weight of a munit-scaled layer; the fan-in of its scale counts the weights that stay."""

    scale: float

    def __init__(self, *args: Any, sparsity: float, **kwargs: Any) -> None:
        super().__init__(*args, sparsity=sparsity, **kwargs)
        layer: Any = self  # the munit-scaled one, which comes after the mask
        layer._init_scale(layer.fp8, layer.role, layer.backend, layer.grad_scale, 1 - sparsity)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of variance 1 where the mask leaves them; biases 0."""
        if "mask" not in self._buffers:
            return  # called by torch's own constructor
        self._draw_missing_mask()
        self.weight.normal_().mul_(self.mask)
        if self.bias is not None:
            self.bias.zero_()

    def unscaled_weight(self) -> Tensor:
        """The masked weight, before the scale."""
        return super().effective_weight()

    def effective_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same: masked, with the scale in it, not quantised."""
        return self.unscaled_weight() * self.scale


class SparseMuSLinear(_SparseMunitScaled, MuSLinear):  # type: ignore[misc]
    r"""``MuSLinear`` of which a share s of the weights is masked out: :math:`\alpha = 1/\sqrt{(1-s)\,\text{fan\_in}}`.

    Args:
        args: those of ``MuSLinear``, in its order.
        sparsity: share of zeros, in [0, 1).
        kwargs: those of ``MuSLinear``.

    Raises:
        ValueError: as ``MuSLinear`` and ``SparseLinear`` do.

    Example:
        >>> SparseMuSLinear(64, 8, sparsity=0.75, fp8=True).scale
        0.25
    """


class SparseMuSConv2d(_SparseMunitScaled, MuSConv2d):  # type: ignore[misc]
    r"""``MuSConv2d`` of which a share s of the weights is masked out; see ``SparseMuSLinear``.

    Args:
        args: those of ``MuSConv2d``, in its order.
        sparsity: share of zeros, in [0, 1).
        kwargs: those of ``MuSConv2d``.

    Raises:
        ValueError: as ``MuSConv2d`` and ``SparseConv2d`` do.

    Example:
        >>> SparseMuSConv2d(16, 8, 2, sparsity=0.75, fp8=True).scale
        0.25
    """


@folded_layer.register(MuSConv2d)
@folded_layer.register(MuSLinear)
def _folded(layer: Any) -> nn.Module:
    """The scale baked in, and the zeros; nothing quantises any more."""
    return plain_layer(layer, layer.effective_weight(), layer.bias)
