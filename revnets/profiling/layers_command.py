"""What ``revnets layers`` prints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch

from ..arguments import argument, needs, number, path
from ..layers.convert import ConversionReport, convert
from ..layers.registry import layer_entry, list_layers
from ..models.named import build_model, check_model
from ..sparsity.schedules import SCHEDULES
from ..training.options.values import COUNT
from ..training.places import check_folder, make_folder
from .training_flops import FlopsReport, training_flops


def print_layers() -> None:
    """A table of the registry: names, options with their defaults, what they are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Layers for layers=, revnets.convert and backbone=dict(layers=)")
    for column in ("name", "options", "what it is"):
        table.add_column(column)
    for name in list_layers():
        entry = layer_entry(name)
        options = []
        for field in dataclasses.fields(entry.config):
            default: Any = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            options.append(field.name if default is dataclasses.MISSING else f"{field.name}={default}")
        table.add_row(name, ", ".join(options), entry.summary)
    Console(width=140).print(table)


def print_conversion(model: str, spec: str, img_size: int | None, output: Path | None = None) -> None:
    """The report of converting a model, on the meta device: sizes and counts only; its FLOPs, in files, too.

    Raises:
        ValueError: for an unknown model or layer, a conversion that is refused, or a folder that cannot be written to.
    """
    import timm
    from rich.console import Console

    check_model(model)
    if img_size is not None:
        COUNT.check("img_size", img_size)
    if not spec:
        raise ValueError(f"which layers? Give one of {', '.join(list_layers())}, such as {model} sparse_wide:0.75")
    if output is not None:
        check_folder(output)
    kwargs: dict[str, Any] = {}
    if img_size is not None and timm.get_pretrained_cfg(model).fixed_input_size:
        kwargs["img_size"] = img_size
    with torch.device("meta"):
        network = build_model(model, **kwargs)
    channels = timm.get_pretrained_cfg(model).input_size[0]
    report = convert(network, spec, input_size=None if img_size is None else (channels, img_size, img_size))
    flops = _flops(report)
    console = Console(width=140)
    console.print(report.table())
    console.print(flops.table())
    if output is not None:
        folder = make_folder(output)
        files = [*flops.write(folder), flops.draw(folder, f"{model} · {spec}")]
        console.print("\n".join(f"wrote {path}" for path in files if path), soft_wrap=True)


def _flops(report: ConversionReport) -> FlopsReport:
    """Of the forward pass by layer, of training one image by schedule."""
    before = training_flops(report.model, report.before)
    after = training_flops(report.model, report.after)
    training = {"dense": (before.average("dense"), before.recomputed)}
    if report.after.sparse_flops != report.after.flops:
        training |= {name: (after.average(name), after.recomputed) for name in SCHEDULES}
    else:
        training["converted"] = (after.average("dense"), after.recomputed)
    return FlopsReport(report.after, training, "image", report.before)


@needs("img_size", "model")
@needs("output", "model")
def layers_command(
    model: Annotated[str | None, argument("convert this one, any timm model", "[MODEL")] = None,
    spec: Annotated[str | None, argument("such as sparse_wide:0.75", "SPEC]")] = None,
    img_size: Annotated[int | None, number(COUNT, "to count FLOPs at (default: the published one)")] = None,
    output: Annotated[Path | None, path("folder for FLOPs as CSV, JSON and a picture")] = None,
) -> None:
    """The layers that specs can name, or what one of them makes of a network: layer by layer, with FLOPs."""
    if model is None:
        print_layers()
    else:
        print_conversion(model, spec or "", img_size, output)
