"""``mus`` and ``mus_fp8``: networks converted to munit-scaled layers, their functions kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..convert import Job, Skipped, put_layer
from ..geometry import arguments
from ..registry import LayerConfig, Spec, parse_layers, register_layer
from ..sites import Site, Unsuitable
from ..sparse_ift.sparse import MaskedWeight
from .break_even import break_even
from .fp8 import check_backend, check_grad_scale
from .fp8_conv import padded_words
from .functional import ROLES
from .layers import MunitScaled, MuSConv2d, MuSLinear, SparseMuSConv2d, SparseMuSLinear


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
        grad_scale: static factor around the quantisation of gradients, a power of two; by default 2^14, or 1 for
            float16.
        auto: only layers that are faster in FP8, see ``break_even``. The others stay as they are; with ``init``,
            which takes the whole network, they are munit-scaled but not quantised.
        batch_size: for ``auto``: images per step and device.
        device: for ``auto``: where the network will be trained, or its kind, such as ``cuda sm90``; by default where
            the weights are, or on CUDA if they are on the CPU and there is such a device.
        table: for ``auto``: measured by ``revnets bench-fp8``; by default that of ``REVNETS_FP8_TABLE``, if it is set.

    Raises:
        ValueError: for an unknown backend, or numbers that are not positive.
    """

    backend: str | None = None
    grad_scale: float | None = None
    auto: bool = False
    batch_size: int = 32
    device: str | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)
        check_grad_scale(self.grad_scale)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r}: expected a number of images, 1 at least")


@register_layer("mus", MuSConfig, network=True, everywhere=True, keeps_weights=True)
def mus(job: Job, config: MuSConfig) -> nn.Module:
    """Munit-scaled layers in the usual precision: unit-variance weights, static scales (1/sqrt(fan-in) if hidden)."""
    return _scaled(job, config, "mus")


@register_layer("mus_fp8", MuSFp8Config, network=True, everywhere=True, keeps_weights=True)
def mus_fp8(job: Job, config: MuSFp8Config) -> nn.Module:
    """Munit-scaled layers that multiply in FP8 in training, too; first layer, classifier, grouped ones do not."""
    slow, by_triton = _slower_in_fp8(job, config) if config.auto else ({}, set())
    options: dict[str, Any] = {"backend": config.backend, "grad_scale": config.grad_scale}
    model = _scaled(job, config, "mus_fp8", slow, fp8=True, **options)
    for name in by_triton:
        layer: Any = model.get_submodule(name)
        layer.pointwise = "triton"
    _note_padding(job, model)
    return model


def _note_padding(job: Job, model: nn.Module) -> None:
    """How many layers have zeros added to their channels, into the report."""
    layers = [m for name, m in model.named_modules() if name in job.names and isinstance(m, MunitScaled) and m.fp8]
    padded = sum(bool(padded_words(*layer.weight.shape[1::-1])) for layer in layers)
    if padded:
        job.report.notes.append(
            f"{padded} of {len(layers)} FP8 layers have channels that are no multiple of 16: padded with zeros on GPUs"
        )


def _scaled(
    job: Job, config: MuSConfig, kind: str, slow: Mapping[str, str] | None = None, fp8: bool = False, **options: Any
) -> nn.Module:
    """Convert all layers but those in ``slow``, which gives reasons by name; see ``MuSFp8Config.auto``."""
    _check_network(job, config, kind)
    for name in job.names:
        reason = (slow or {}).get(name)
        if reason is not None and not config.init:
            job.report.skipped.append(Skipped(name, reason))
            continue
        site: Site = job.surroundings.site(name)
        role = config.roles.get(name, site.role)
        made = munit_scaled(site.layer, role, config.init, fp8=fp8 and reason is None, **options)
        put_layer(job.report, site, made, kind)
        if reason is not None:
            done = job.report.converted
            done[-1] = replace(done[-1], kind="mus", note=f"{done[-1].note}: {reason}")
    return job.report.model


def _slower_in_fp8(job: Job, config: MuSFp8Config) -> tuple[dict[str, str], set[str]]:
    """Reasons, by name, why layers are left out by ``auto``, and the 1x1 convolutions that are for Triton; remarks go
    to the report.
    """
    weight: Any = next(job.model.parameters(), torch.empty(0))
    device: Any = "cpu" if weight.device.type == "meta" else weight.device
    if weight.device.type in ("cpu", "meta") and torch.cuda.is_available():
        device = "cuda"
    known = break_even(config.device or device, config.table)
    numbers = {c.module: math.prod(c.outputs[0].shape) for c in job.surroundings.trace.calls if c.outputs}
    found: dict[str, str] = {}
    by_triton: set[str] = set()
    for name in job.names:
        site: Site = job.surroundings.site(name)
        layer: Any = site.layer
        role = config.roles.get(name, site.role)
        reason = f"role {role}, which is never quantised" if role != "hidden" else None
        rows = numbers.get(name, 0) // max(layer.weight.shape[0], 1) * config.batch_size
        reason = reason or known.reason_to_keep(layer, rows)
        if reason is not None:
            found[name] = reason
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and known.pointwise(layer, rows) == "triton":
            by_triton.add(name)
    job.report.notes.append(
        f"auto: {len(job.names) - len(found)} of {len(job.names)} layers are faster in FP8 on {known.device} at batch "
        f"size {config.batch_size}, by {known.source}"
    )
    return found, by_triton


def _check_network(job: Job, config: MuSConfig, kind: str) -> None:
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
        ({'fp8': True, 'backend': 'emulate', 'grad_scale': None}, {})
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
    if config.auto:
        raise ValueError(
            f"layers={spec!r}: 'auto' chooses among the layers of a plain network, expected 'mus_fp8' or 'mus' here: "
            "this network is made of munit-scaled layers from the start"
        )
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
