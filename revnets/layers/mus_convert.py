"""``mus`` and ``mus_fp8``: networks converted to munit-scaled layers, their functions kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .fp8 import check_backend, check_grad_scale
from .geometry import arguments
from .mus import MunitScaled, MuSConv2d, MuSLinear, SparseMuSConv2d, SparseMuSLinear
from .mus_functional import GRAD_SCALE, ROLES
from .registry import LayerConfig, Spec, parse_layers, register_layer
from .sites import Site, Unsuitable
from .sparse import MaskedWeight


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
        grad_scale: static factor around the quantisation of gradients, a power of two.

    Raises:
        ValueError: for an unknown backend, or a factor that is not positive.
    """

    backend: str | None = None
    grad_scale: float = GRAD_SCALE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)
        check_grad_scale(self.grad_scale)


@register_layer("mus", MuSConfig, network=True, everywhere=True, keeps_weights=True)
def mus(job: Any, config: MuSConfig) -> nn.Module:
    """Munit-scaled layers in the usual precision: unit-variance weights, static scales (1/sqrt(fan-in) if hidden)."""
    return _scaled(job, config, "mus")


@register_layer("mus_fp8", MuSFp8Config, network=True, everywhere=True, keeps_weights=True)
def mus_fp8(job: Any, config: MuSFp8Config) -> nn.Module:
    """Munit-scaled layers that multiply in FP8 in training, too; first layer, classifier, grouped ones do not."""
    return _scaled(job, config, "mus_fp8", fp8=True, backend=config.backend, grad_scale=config.grad_scale)


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
    if not job.names:
        raise Unsuitable(f"{kind}: no layer of {model} can be munit-scaled: {job.report.skipped[-1].reason}")
    unknown = sorted(set(config.roles) - set(job.names))
    if unknown:
        raise Unsuitable(
            f"{kind}: roles names {unknown[0]!r}, which is no layer to be converted: expected one of "
            f"{', '.join(job.names[:5])}{', ...' if len(job.names) > 5 else ''}"
        )


def munit_options(spec: Spec) -> tuple[dict[str, Any], Mapping[str, str]]:
    """What ``munit_scaled`` needs to know, for networks that are made of munit-scaled layers from the start.

    Args:
        spec: ``"mus"`` or ``"mus_fp8"``, with their options.

    Returns:
        options of the layers, and roles by name.

    Raises:
        ValueError: for other layers.

    Example:
        >>> munit_options("mus_fp8:backend:emulate")
        ({'fp8': True, 'backend': 'emulate', 'grad_scale': 1024.0}, {})
    """
    parts = parse_layers(spec)
    config = parts[0].config
    if len(parts) != 1 or not isinstance(config, MuSConfig):
        raise ValueError(
            f"layers={spec!r}: expected 'mus' or 'mus_fp8' alone, this network is made of munit-scaled layers; "
            "revnets.convert takes a plain one and puts others in, such as 'sparse:0.75+mus_fp8:init'"
        )
    if not isinstance(config, MuSFp8Config):
        return {}, config.roles
    return {"fp8": True, "backend": config.backend, "grad_scale": config.grad_scale}, config.roles


@torch.no_grad()
def munit_scaled(layer: Any, role: str = "hidden", init: bool = False, **options: Any) -> nn.Module:
    """The munit-scaled layer that computes the same as a plain one, to rounding: its weight is divided by the scale.

    Args:
        layer: an ``nn.Linear`` or ``nn.Conv2d``, or a sparse one, whose mask stays.
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        init: keep nothing but the shape, and draw new weights.
        options: ``fp8`` and ``backend`` of the layer.

    Example:
        >>> munit_scaled(nn.Linear(4, 2), "output")
        MuSLinear(in_features=4, out_features=2, bias=True, role=output, scale=0.25, fp8=off)
    """
    masked, two_d = isinstance(layer, MaskedWeight), isinstance(layer, nn.Conv2d)
    kind = (SparseMuSConv2d if two_d else SparseMuSLinear) if masked else (MuSConv2d if two_d else MuSLinear)
    if masked:
        options["sparsity"] = layer.sparsity
    made: Any = kind(**arguments(layer), role=role, **options)
    if masked:
        made.mask.copy_(layer.mask)
        made.reset_parameters()
    if not init:
        made.weight.copy_(layer.weight / made.scale)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    return made
