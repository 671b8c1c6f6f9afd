"""Conversion of the layers of any model by a spec of the layer registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .accounting import ModelCost, count_costs
from .registry import Part, Spec, parse_layers
from .sites import LEFT_OUT, Filter, Site, Surroundings, Unsuitable
from .trace import Trace, TraceError, trace

WHOLE = "(the network)"  # what a report calls a model that is converted as one


@dataclass(frozen=True)
class Converted:
    """A layer that was changed: its name, what it became, and a remark where there is something to say."""

    name: str
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A layer that stayed as it was, and why."""

    name: str
    reason: str


@dataclass
class ConversionReport:
    """What ``convert`` did.

    Attributes:
        model: the result; the model that was given, where it could be changed in place.
        converted: layers that were changed.
        skipped: layers that stayed, each with the reason.
        before: costs of the model as it was given.
        after: costs of the result: FLOPs dense-equivalent and sparse, parameters all and active.
        notes: remarks about the whole network.
    """

    model: nn.Module
    converted: list[Converted]
    skipped: list[Skipped]
    before: ModelCost
    after: ModelCost
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} layers, skipped {len(self.skipped)}"]
        lines += [f"  {c.name or WHOLE}: {c.kind}" + (f" ({c.note})" if c.note else "") for c in self.converted]
        lines += [f"  {s.name}: skipped, {s.reason}" for s in self.skipped]
        return "\n".join([*lines, *self.notes, self.summary()])

    def summary(self) -> str:
        """FLOPs and parameters before and after, in one line."""
        a, b = self.after, self.before
        change = a.sparse_flops / b.sparse_flops - 1 if b.sparse_flops else 0.0
        return (
            f"MFLOPs per image: {b.sparse_flops / 1e6:.2f} before, {a.sparse_flops / 1e6:.2f} after ({change:+.3%}; "
            f"dense-equivalent {a.flops / 1e6:.2f}); parameters: {b.active_parameters / 1e6:.3f} M before, "
            f"{a.active_parameters / 1e6:.3f} M active of {a.parameters / 1e6:.3f} M after"
        )

    def table(self) -> Any:
        """A rich table of the layers."""
        from rich.table import Table

        table = Table(title="Converted layers", caption="\n".join([*self.notes, self.summary()]))
        for column in ("layer", "became", "remark"):
            table.add_column(column)
        for one in self.converted:
            table.add_row(one.name or WHOLE, one.kind, one.note)
        for other in self.skipped:
            table.add_row(other.name, "-", other.reason)
        return table


@dataclass
class Job:
    """What a registered conversion of whole networks gets.

    Attributes:
        model: to be changed, in place or not.
        surroundings: its data flow.
        names: of the layers that may be converted.
        report: where converted layers, skipped ones and remarks are noted.
        input_size: of one example.
    """

    model: nn.Module
    surroundings: Surroundings
    names: list[str]
    report: ConversionReport
    input_size: tuple[int, ...]


def convert(
    model: nn.Module, spec: Spec, filter: Filter | None = None, input_size: Sequence[int] | None = None
) -> ConversionReport:
    """Put layers of the registry into a model, in place where possible.

    The first layer (if it takes the image's channels) and the classifier stay as they are, but for munit scaling,
    where they have factors of their own.

    Args:
        model: any, timm's included; on any device.
        spec: such as ``"sparse_parallel:0.75"`` or ``dict(type="sparse_parallel", sparsity=0.75)``; see
            ``revnets.layers.registry``.
        filter: ``filter(module, name)`` says whether a layer may be converted.
        input_size: of one example, without batch: to follow the data through the network, and to count FLOPs. By
            default that of ``model.pretrained_cfg``, or ``(3, 224, 224)``.

    Returns:
        A report, whose ``.model`` is the result.

    Raises:
        ValueError: for an unknown layer, an option out of range, an input size that the model does not take, or a
            network that the conversion cannot take.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = convert(net, "sparse_parallel:0.5", input_size=(3, 16, 16))
        >>> report.converted[0].name, report.skipped[0].reason
        ('1', 'the first layer stays dense')
        >>> report.before.flops == report.after.sparse_flops
        True
    """
    parts = parse_layers(spec)
    size = input_size_of(model, input_size)
    if not any(_is_channels_last(p) for p in model.parameters()):
        return _converted(model, parts, size, filter)
    model.to(memory_format=torch.contiguous_format)  # some ops leave other traces channels last (torch 2.9: pooling)
    try:
        report = _converted(model, parts, size, filter)
        report.model.to(memory_format=torch.channels_last)
    finally:
        model.to(memory_format=torch.channels_last)
    return report


def _converted(
    model: nn.Module, parts: Sequence[Part], size: tuple[int, ...], filter: Filter | None
) -> ConversionReport:
    try:
        recorded = trace(model, size)
    except TraceError as error:
        raise ValueError(f"convert: {error}") from None
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    before = count_costs(model, size, recorded)
    report = ConversionReport(model, [], [], before, before, [])
    for part in parts:
        _apply(part, report, filter, recorded)
        recorded = trace(report.model, size)
    if report.converted and not all(part.keeps_weights for part in parts):
        report.notes.append("converted layers are newly initialised")
    report.skipped = list(dict.fromkeys(report.skipped))
    for name, parameter in report.model.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
    report.after = count_costs(report.model, size, recorded)
    return report


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def input_size_of(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    """Of one example: as given, or of the model's configuration and what it was made with."""
    if given is not None:
        return tuple(given)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, *sides = cfg.get("input_size") or (3, 224, 224)
    first = cfg.get("first_conv")
    if isinstance(first, str) and first in dict(model.named_modules()):  # made with in_chans=, which the cfg ignores
        channels = getattr(model.get_submodule(first), "in_channels", channels)
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None) or sides
    return (getattr(model, "in_chans", channels), *sides)


def _apply(part: Part, report: ConversionReport, filter: Filter | None, recorded: Trace) -> None:
    surroundings = Surroundings(report.model, recorded)
    size = tuple(recorded.inputs[0].shape[1:])
    names = []
    for name, module in report.model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if part.entry.whole:
            reason = None if filter is None or filter(module, name) else LEFT_OUT
        else:
            reason = surroundings.reason_to_keep(name, filter, part.entry.everywhere)
            reason = reason or surroundings.reason_by_config(name, part.config)
        if reason is None:
            names.append(name)
        else:
            report.skipped.append(Skipped(name, reason))
    if part.entry.network:
        report.model = part.entry.make(Job(report.model, surroundings, names, report, size), part.config)
        return
    for name in names:
        _convert_site(part, report, surroundings, name)


def _convert_site(part: Part, report: ConversionReport, surroundings: Surroundings, name: str) -> None:
    site = surroundings.site(name)
    try:
        made = part.entry.make(site, part.config)
    except Unsuitable as error:
        report.skipped.append(Skipped(name, str(error)))
        return
    put_layer(report, site, made, part.entry.name)


def put_layer(report: ConversionReport, site: Site, made: nn.Module, kind: str) -> None:
    """Put a layer where the site's is, with device, dtype and training mode of that one, and note it."""
    made.train(site.layer.training)
    weight: Any = site.layer.weight
    made.to(device=weight.device, dtype=weight.dtype)
    for layer in made.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            for leaf, parameter in layer.named_parameters(recurse=False):
                parameter.requires_grad_(getattr(getattr(site.layer, leaf, None), "requires_grad", True))
    report.model = replace_module(report.model, site.name, made)
    for other, module in site.replaced.items():
        report.model = replace_module(report.model, other, module)
    report.converted.append(Converted(site.name, kind, getattr(made, "note", "")))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` wherever the module called ``name`` is, and return the model: ``module`` where it is the model."""
    if not name:
        return module
    former = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, present in parent._modules.items():
            if present is former:
                parent._modules[child] = module
    return model
