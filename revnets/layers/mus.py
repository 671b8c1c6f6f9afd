"""``mus`` and ``mus_fp8``: munit-scaled layers, whose weights start with variance 1 and whose scales are static."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparsity.found import is_sparse
from .fp8 import check_backend, check_floating
from .geometry import arguments
from .mus_functional import ROLES, munit_scale, mus_conv2d, mus_linear
from .registry import LayerConfig, register_layer
from .sites import Site, Unsuitable


class MunitScaled(nn.Module):
    r"""What the munit-scaled layers share: weights of variance 1, and the static factor :math:`\alpha`.

    Attributes:
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        scale: :math:`\alpha`, see ``munit_scale``.
        fp8: whether products are in FP8: asked for, and the layer is hidden and not grouped.
        backend: of FP8 products.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    role: str
    scale: float
    fp8: bool
    backend: str | None

    def _init_scale(self, fp8: bool, role: str, backend: str | None) -> None:
        self.scale = munit_scale(self.weight.shape[1:].numel(), role)
        self.role, self.backend = role, check_backend(backend)
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

    def effective_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same: with the scale in it, not quantised."""
        return self.weight * self.scale

    @property
    def note(self) -> str:
        """What is active, for the report of a conversion."""
        return f"role {self.role}, scale {self.scale:.4g}, {self._precision()}"

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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_scale(fp8, role, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(..., in_features)``. Returns: ``(..., out_features)``."""
        return mus_linear(x, self.weight, self.bias, scale=self.scale, fp8=self.fp8, backend=self.backend)


class MuSConv2d(MunitScaled, nn.Conv2d):  # type: ignore[misc]
    r"""Munit-scaled convolution, in FP8 on request; fan-in is :math:`C_{in} / \text{groups} \cdot k^2`.

    1x1 convolutions are products of FP8 matrices where the device has them; larger kernels convolve quantised operands
    in float32, so the numbers are those of FP8; grouped convolutions (depthwise) are not quantised. See ``mus_conv2d``.

    Args:
        args: those of ``nn.Conv2d``, in its order.
        fp8: multiply in FP8, if the layer is hidden and not grouped.
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        backend: ``"scaled_mm"``, ``"emulate"``, or None for the best on the device.
        kwargs: those of ``nn.Conv2d``.

    Raises:
        ValueError: for an unknown role or backend, or widths of 0 in FP8.

    Example:
        >>> MuSConv2d(16, 32, 1, bias=False, fp8=True)
        MuSConv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False, role=hidden, scale=0.25, fp8=e4m3/e5m2)
    """

    def __init__(
        self, *args: Any, fp8: bool = False, role: str = "hidden", backend: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_scale(fp8, role, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)``. Returns: ``(N, C_out, H', W')``."""
        check_floating(x, type(self).__name__)
        if not self.fp8:
            return self._conv_forward(x, self.effective_weight(), self.bias)
        padding: Any = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), 0
        return mus_conv2d(
            *(x, self.weight, self.bias, self.stride, padding, self.dilation),
            scale=self.scale,
            fp8=True,
            backend=self.backend,
        )


# --- conversion ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MuSConfig(LayerConfig):
    """Options of ``mus``.

    Args:
        init: draw new weights of variance 1, to train from scratch; else the network keeps its function.
        roles: role by the name of the layer, where its position does not tell.

    Raises:
        ValueError: for an unknown role.
    """

    init: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.roles, Mapping) or not set(self.roles.values()) <= set(ROLES):
            raise ValueError(
                f"roles={self.roles!r}: expected a dictionary from names of layers to {', '.join(ROLES)}, such as "
                "dict(type='mus', roles={'patch_embed.proj': 'hidden'})"
            )


@dataclass(frozen=True)
class MuSFp8Config(MuSConfig):
    """Options of ``mus_fp8``.

    Args:
        backend: of the products: ``scaled_mm``, ``emulate``, or by default the best on the device.

    Raises:
        ValueError: for an unknown backend.
    """

    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)


@register_layer("mus", MuSConfig, network=True, ends=True)
def mus(job: Any, config: MuSConfig) -> nn.Module:
    """Munit-scaled layers in the usual precision: unit-variance weights, static scales (1/sqrt(fan-in) if hidden)."""
    return _scaled(job, config, "mus")


@register_layer("mus_fp8", MuSFp8Config, network=True, ends=True)
def mus_fp8(job: Any, config: MuSFp8Config) -> nn.Module:
    """Munit-scaled layers that multiply in FP8 in training, too; first layer, classifier, grouped ones do not."""
    return _scaled(job, config, "mus_fp8", fp8=True, backend=config.backend)


def _scaled(job: Any, config: MuSConfig, kind: str, **options: Any) -> nn.Module:
    from .convert import put_layer

    _check_network(job, config, kind)
    for name in job.names:
        site: Site = job.surroundings.site(name)
        role = config.roles.get(name, site.role)
        put_layer(job.report, site, munit_scaled(site.layer, role, config.init, **options), kind)
    return job.report.model


def _check_network(job: Any, config: MuSConfig, kind: str) -> None:
    """Refuse what cannot be munit-scaled as a whole."""
    model = type(job.model).__name__
    modules = dict(job.model.named_modules())
    found = [name for name, module in modules.items() if isinstance(module, MunitScaled)]
    if found:
        raise Unsuitable(
            f"{kind}: {model} is munit-scaled already ({len(found)} layers, such as {found[0]}): "
            "revnets.layers.fold makes it plain again, to be converted anew"
        )
    masked = [name for name, module in modules.items() if is_sparse(module)]
    if masked:
        raise Unsuitable(
            f"{kind}: {model} has {len(masked)} sparse layers, such as {masked[0]}, and masked weights are not "
            f"munit-scaled: use {kind} without sparse layers before it"
        )
    if not job.names:
        raise Unsuitable(f"{kind}: no layer of {model} can be munit-scaled: {job.report.skipped[-1].reason}")
    unknown = sorted(set(config.roles) - set(job.names))
    if unknown:
        raise Unsuitable(
            f"{kind}: roles names {unknown[0]!r}, which is no layer to be converted: expected one of "
            f"{', '.join(job.names[:5])}{', ...' if len(job.names) > 5 else ''}"
        )


@torch.no_grad()
def munit_scaled(layer: Any, role: str = "hidden", init: bool = False, **options: Any) -> nn.Module:
    """The munit-scaled layer that computes the same as a plain one, to rounding: its weight is divided by the scale.

    Args:
        layer: an ``nn.Linear`` or ``nn.Conv2d``.
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        init: keep nothing but the shape, and draw new weights.
        options: ``fp8`` and ``backend`` of the layer.

    Example:
        >>> munit_scaled(nn.Linear(4, 2), "output")
        MuSLinear(in_features=4, out_features=2, bias=True, role=output, scale=0.25, fp8=off)
    """
    kind = MuSConv2d if isinstance(layer, nn.Conv2d) else MuSLinear
    made: Any = kind(**arguments(layer), role=role, **options)
    if not init:
        made.weight.copy_(layer.weight / made.scale)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    for name, parameter in layer.named_parameters():  # frozen layers stay frozen
        getattr(made, name).requires_grad_(parameter.requires_grad)
    return made
