"""What ``revnets numerics`` does: a few training steps of a network, watched layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..arguments import PLAIN, SIZED, argument, needs, number, path, reversible, sized, text, without_effect
from ..layers import convert, fp8_products
from ..layers.munit.fp8 import check_grad_scale
from ..layers.munit.layers import MunitScaled
from ..profiling.command import choose_targets, track
from ..profiling.fake import ProfileError
from ..profiling.memory import check_loss
from ..profiling.profile import describe
from ..profiling.target import Setting, Target, as_job, training_loss
from ..pruning.command import draw_batches, open_images
from ..reversible import MODES
from ..training.errors import refused
from ..training.files import write_json
from ..training.options.values import COUNT, POSITIVE, find_device, words
from ..training.places import check_folder, make_folder
from .monitor import LAYERS, NumericsMonitor
from .report import FILES, print_table

JSON = "numerics.json"
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Request:
    """What was asked for; see ``revnets numerics --help``."""

    model: str
    data: Path | None = None
    split: str = ""
    layers: str = ""
    mode: str = ""
    img_size: int | None = None
    batch_size: int = 32
    batches: int = 4
    grad_scale: float = 1.0
    output: Path | None = None


def run(request: Request, setting: Setting) -> None:
    """Watch, print and save.

    Raises:
        ProfileError: for what does not exist or cannot run.
        ValueError: for layers that cannot be, and numbers that cannot.
    """
    COUNT.check("batches", request.batches)
    check_grad_scale(request.grad_scale)
    if request.mode and len(words("mode", request.mode, MODES)) > 1:
        raise ProfileError(f"mode {request.mode!r}: a step runs in one mode, give one")
    if request.output is not None:
        check_folder(request.output, (*FILES, JSON))
    target = choose_targets([request.model], request.mode, setting, request.img_size, request.batch_size)[0]
    if target.part:
        raise ProfileError(
            f"{request.model} is a detector: in its config, add custom_hooks=[dict(type='NumericsHook')]"
        )
    channels = _channels(target)
    dataset = None if request.data is None else open_images(request.data, request.split, channels)
    network, converted = _network(target, setting, request.layers, _classes(dataset))
    if dataset is None:
        source = f"{request.batches} batches of RANDOM numbers as images (give --data for real ones)"
        batches: Iterable[Any] = list(_random_batches(target, channels, request.batches))
    else:
        count, batches = _sample(dataset, target, channels, request.batches)
        source = f"{count} batches of {request.data} ({request.split or 'train'})"
    fp8_products(reset=True)
    records = _watch(network, batches, target, setting, request.grad_scale)
    title = f"{target}, {target.mode_name}{converted}: {source} ({describe(setting)})"
    print_table(records.records, title)
    products = ", ".join(f"{n} {kind}" for kind, n in sorted(fp8_products().items()))
    _say(f"FP8 products: {products or 'none'}")
    if request.output is not None:
        folder = make_folder(request.output)
        for path in [*records.save(folder, title), _write_json(records.records, title, folder)]:
            _say(f"wrote {path}")


def _network(target: Target, setting: Setting, layers: str, classes: int | None) -> tuple[nn.Module, str]:
    """The network in training mode on its device, converted, and in words what was converted."""
    if classes is not None:
        target = replace(target, options=(*target.options, ("num_classes", classes)))
    with refused(f"{target} cannot be built on {setting.device}", kind=ProfileError):
        network = target.build(setting, find_device(setting.device, here=True)).network
    if not layers:
        return network, ""
    report = convert(network, layers, input_size=(_channels(target), target.img_size, target.img_size))
    return report.model, f", {layers} ({len(report.converted)} layers converted, {len(report.skipped)} not)"


def _channels(target: Target) -> int:
    import timm

    cfg = timm.get_pretrained_cfg(target.name)
    return int(cfg.input_size[0]) if cfg is not None else 3


def _watch(
    network: nn.Module, batches: Iterable[Any], target: Target, setting: Setting, grad_scale: float
) -> NumericsMonitor:
    """One record of all batches: forward and backward pass of each, weights unchanged."""
    if grad_scale != 1 and all(isinstance(m, MunitScaled) for m in network.modules() if isinstance(m, LAYERS)):
        raise ProfileError(
            f"--grad-scale {grad_scale:g} has no effect: every layer has a scale of its own, leave it out"
        )
    monitor = NumericsMonitor(network, every=1, grad_scale=grad_scale)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    with monitor:
        for x, labels in track(batches, "watching") if isinstance(batches, list) else batches:
            with refused(f"{target} cannot run", kind=ProfileError):
                x = x.to(setting.device).contiguous(memory_format=layout)
                job = as_job(network, x, training_loss, setting)
                network.zero_grad(set_to_none=True)
                check_loss(_loss(job.model.train()(x), labels)).backward()
        monitor.step()
        monitor.close()
    network.zero_grad(set_to_none=True)
    return monitor


def _loss(y: Any, labels: Tensor | None) -> Tensor:
    """Cross entropy with the labels of the data where there are some."""
    if labels is not None and isinstance(y, Tensor) and y.ndim == 2:
        return F.cross_entropy(y.float(), labels.to(y.device))
    return training_loss(y)


# --- data ------------------------------------------------------------------------------------------------------------


def _random_batches(target: Target, channels: int, count: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    shape = (target.batch_size, channels, target.img_size, target.img_size)
    for _ in range(count):
        yield torch.randn(shape, generator=generator), None


def _classes(dataset: Any) -> int | None:
    index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return len(index) if index else None


def _sample(dataset: Any, target: Target, channels: int, count: int) -> tuple[int, Iterable[Any]]:
    """Batches drawn without replacement, as the network sees them in validation, and how many: at most so many.

    Raises:
        ProfileError: for fewer images than one batch.
    """
    import timm
    from timm.data import resolve_data_config

    if len(dataset) < target.batch_size:
        raise ProfileError(f"--data: {len(dataset)} images do not fill one batch of {target.batch_size}: lower it")
    cfg = timm.get_pretrained_cfg(target.name)
    config = resolve_data_config(
        {"input_size": (channels, target.img_size, target.img_size)},
        pretrained_cfg=cfg.to_dict() if cfg is not None else {},
        verbose=False,
    )
    count = min(count, len(dataset) // target.batch_size)
    return count, draw_batches(dataset, config, count * target.batch_size, target.batch_size)


def _write_json(records: list[dict[str, Any]], title: str, folder: Path) -> Path:
    return write_json(folder / JSON, {"title": title, "rows": records})


def _say(line: str) -> None:
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(line, markup=False)


@needs("split", "data")
@without_effect("img_size", SIZED, lambda v: sized([v["model"]], "@"))
@without_effect("batch_size", SIZED, lambda v: sized([v["model"]], ":"))
@without_effect("exact", PLAIN, lambda v: not reversible([v["model"]]))
def numerics_command(
    model: Annotated[str, argument("NAME@SIZE:BATCH, any timm model", "MODEL")],
    data: Annotated[
        Path | None, path("folder or .tar file of class folders of images (default: random numbers)")
    ] = None,
    split: Annotated[str | None, text("folder or .tar file inside --data (default: train, train.tar)")] = None,
    layers: Annotated[str | None, text("convert first, such as mus_fp8")] = None,
    batches: Annotated[int, number(COUNT, "batches to watch")] = 4,
    img_size: Annotated[int | None, number(COUNT, "where MODEL has none")] = None,
    batch_size: Annotated[int, number(COUNT, "where MODEL has none")] = 32,
    mode: Annotated[str | None, text("memory mode (default: reversible where there is one)")] = None,
    amp_dtype: Annotated[str | None, text("autocast to bfloat16 or float16")] = None,
    grad_scale: Annotated[float, number(POSITIVE, "before the cast of gradients, for layers that have none")] = 1.0,
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, text("cpu, cuda, ...")] = "cpu",
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    output: Annotated[Path | None, path("folder for JSON, CSV and a picture")] = None,
) -> None:
    """Sizes of activations, weights and gradients layer by layer, and what a cast to FP8 flushes and clips of them."""
    setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
    sizes = (img_size, batch_size, batches, grad_scale, output)
    run(Request(model, data, split or "", layers or "", mode or "", *sizes), setting)
