"""What ``revnets prune`` does, from names to files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..arguments import argument, number, path, text, without_effect
from ..models._cached import drop_wrong_cache
from ..models.named import check_model
from ..models.small_stem import small_stem
from ..training.checkpoints.foreign import reaching_argument
from ..training.checkpoints.held import TRAINED
from ..training.checkpoints.reading import in_file, options_in, read_checkpoint
from ..training.checkpoints.weights import unfit
from ..training.errors import reason, refused
from ..training.options.values import COUNT, FINITE, NOT_NEGATIVE, SEED, find_device, words
from ..training.places import check_exists, check_file
from .checkpoint import best_weights, save_weights
from .densify import densify
from .one_shot import check_options, prune
from .report import PruningReport

_DATA = ("img_size", "input_size", "in_chans", "mean", "std", "crop_pct", "interpolation")


@dataclass(frozen=True)
class Source:
    """Where the network and the images come from; see ``revnets prune --help``."""

    model: str
    data: Path
    output: Path
    checkpoint: Path | None = None
    split: str = ""
    img_size: int | None = None
    model_kwargs: tuple[str, ...] = ()
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"


def run(source: Source, images: int, **options: Any) -> PruningReport:
    """Prune as the command line says, write the weights and the report, print a table.

    Args:
        source: network, images and files.
        images: to calibrate on.
        options: of ``prune``.

    Raises:
        ValueError: for whatever cannot be; nothing is written then.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if source.output.suffix != ".safetensors":
        raise ValueError(f"output {str(source.output)!r}: expected a name that ends in .safetensors")
    for suffix in (".safetensors", ".json", ".csv", ".png"):
        check_file(source.output.with_suffix(suffix))
    check_exists(source.data, "folder or .tar file", "--data")  # before weights are loaded, or fetched
    find_device(source.device, here=True)
    check_options(images=images, **options)
    model, trained = load_model(source)
    batches = calibration_batches(source, model, trained, images)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(width=150)
    with Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("reading images", total=1.0)
        report = prune(
            model,
            batches,
            images=images,
            progress=lambda share, name: bar.update(task, completed=share, description=name),
            **options,
        )
        bar.update(task, completed=1.0, description="done")
    words = {"model": source.model, "args": json.dumps({**trained, "model": source.model})}
    save_weights(report.model, source.output, words)
    files = [source.output, *report.save(source.output)]
    console.print(report.table())
    for why, count in Counter(s.reason for s in report.skipped).items():
        console.print(f"left out, {count} layers: {why}", style="dim")
    console.print("written: " + ", ".join(str(file) for file in files))
    return report


def load_model(source: Source) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its weights, and the options that say how it was built and what images it saw.

    Raises:
        ValueError: for an unknown model, or a checkpoint that is missing, damaged or of another network.
    """
    check_model(source.model)
    SEED.check("seed", source.seed)
    for name in ("img_size", "batch_size"):
        if getattr(source, name) is not None:
            COUNT.check(name, getattr(source, name))
    checkpoint = read_checkpoint(source.checkpoint) if source.checkpoint is not None else {}
    trained = _trained(checkpoint, source)
    return _model(source, checkpoint, trained), trained


def _trained(checkpoint: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The options that say how the network was built and what images it saw, of a checkpoint of ``train.py``."""
    values = options_in(checkpoint)
    with in_file(source.checkpoint or ""):
        TRAINED.check(values, ("args",))
    if values.get("model", source.model) != source.model:
        raise ValueError(f"the checkpoint is of {values['model']}, not of {source.model}: give that name")
    reaches = reaching_argument(values.get("model_kwargs"), _keywords(source.model_kwargs))
    if reaches:
        raise ValueError(
            f"{str(source.checkpoint)!r} was trained with {reaches}, and only what you name is read or fetched: give "
            "--model-kwargs yourself if you trust it"
        )
    known = (*_DATA, "model_kwargs", "num_classes", "gp", "small_stem")
    found = {name: values[name] for name in known if values.get(name) not in (None, "", {})}
    found["model_kwargs"] = {**found.get("model_kwargs", {}), **_keywords(source.model_kwargs)}
    if source.img_size is not None:
        found.pop("input_size", None)
        found["img_size"] = source.img_size
    return found


def _keywords(texts: Sequence[str]) -> dict[str, Any]:
    found = {}
    for pair in texts:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"model-kwargs {pair!r}: expected KEY=VALUE, such as stem_stride=2")
        if name in found:
            raise ValueError(f"model-kwargs {pair!r}: {name} is given twice, give it once")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _model(source: Source, checkpoint: Mapping[str, Any], trained: Mapping[str, Any]) -> nn.Module:
    import timm

    arguments = {"num_classes": trained.get("num_classes"), "in_chans": trained.get("in_chans")}
    arguments |= {"global_pool": trained.get("gp"), **trained["model_kwargs"]}
    if source.checkpoint is None:
        drop_wrong_cache(source.model)
    try:
        model: nn.Module = timm.create_model(source.model, pretrained=source.checkpoint is None, **arguments)
        if "small_stem" in trained:
            small_stem(model, trained["small_stem"])
    except Exception as error:  # whatever the network, or the library that fetches its weights, refuses
        raise ValueError(
            f"{source.model} cannot be made ({reason(error)}): give --checkpoint and --model-kwargs"
        ) from error
    if checkpoint:
        weights = densify(best_weights(checkpoint))
        if problem := unfit(model.state_dict(), weights):
            raise ValueError(f"{str(source.checkpoint)!r} cannot be loaded: {problem}: give a file of plain weights")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            first = lines[1 if len(lines) > 1 else 0].strip()[:200]
            raise ValueError(
                f"{str(source.checkpoint)!r} is not of {source.model} with these arguments ({first}): give the same "
                "--model-kwargs; layers other than sparse:S have to be folded first"
            ) from error
    with refused(f"device {source.device!r} cannot be used here", kind=ValueError):
        return model.to(find_device(source.device, here=False))


def calibration_batches(source: Source, model: nn.Module, trained: Mapping[str, Any], images: int) -> Batches:
    """Images of a folder or .tar file of class folders, drawn by the seed, as the network sees them in validation.

    Raises:
        ValueError: where there are none.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config({name: trained.get(name) for name in _DATA}, model=model)
    dataset = open_images(source.data, source.split, config["input_size"][0])
    return draw_batches(dataset, config, images, source.batch_size, source.seed)


def open_images(data: Path, split: str, channels: int) -> Any:
    """A data set of timm, of a folder or .tar file of class folders.

    Args:
        data: the folder or file.
        split: one inside it; where none is named, that to train on, or ``data`` itself.
        channels: 1 for grey images.

    Raises:
        ValueError: where there are none.
    """
    from timm.data import create_dataset

    from ..training.data.splits import check_split, find_split, split_or_root, start_no_programs

    start_no_programs()
    check_exists(data, "folder or .tar file", "--data")
    try:
        path = find_split(data, split) if split else split_or_root(data, "train")
        check_split(path)
        mode = "L" if channels == 1 else "RGB"
        return create_dataset("", root=str(path), search_split=False, input_img_mode=mode)
    except Exception as error:  # timm's readers raise what their libraries raise
        raise ValueError(
            f"--data: cannot open images in {str(data)!r} ({reason(error)}): expected one folder per class"
        ) from error


def draw_batches(dataset: Any, config: Mapping[str, Any], images: int, batch_size: int = 64, seed: int = 0) -> Batches:
    """Images of a data set of timm, drawn by a seed, as a network sees them in validation.

    Args:
        dataset: with a ``transform``, which is replaced.
        config: of ``timm.data.resolve_data_config``.
        images: how many; fewer where there are not as many.
        batch_size: of the batches.
        seed: which ones.
    """
    from timm.data import create_transform
    from torch.utils.data import DataLoader, Subset

    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    dataset.transform = create_transform(**{name: config[name] for name in names})
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    return Batches(DataLoader(Subset(dataset, order), batch_size=batch_size))


class Batches:
    """The batches of a loader; images that cannot be read are one sentence."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        with refused("--data: an image cannot be read", kind=ValueError):
            yield from self._loader


@without_effect("damping", "with --method {method}: choose sparsegpt", lambda v: v["method"] != "sparsegpt")
@without_effect("block_size", "with --method {method}: choose sparsegpt", lambda v: v["method"] != "sparsegpt")
def prune_command(
    model: Annotated[str, argument("any timm model", "MODEL")],
    data: Annotated[Path, path("folder or .tar file of images in class folders, to calibrate on")],
    output: Annotated[Path, path("pruned weights; beside them .json, .csv and .png tell what was done")],
    checkpoint: Annotated[
        Path | None, path("trained weights, also of train.py or pruned; else the published ones")
    ] = None,
    sparsity: Annotated[float | None, number(FINITE, "share of zeros, such as 0.7")] = None,
    pattern: Annotated[str | None, text("instead of --sparsity: N:M, as 2:4; or with it 4x1: zeros in fours")] = None,
    method: Annotated[str, text("sparsegpt, wanda or magnitude")] = "sparsegpt",
    distribution: Annotated[str, text("of the sparsity: uniform, er, erk, global")] = "uniform",
    exclude: Annotated[
        str, text("layers to leave out: these rules, and patterns of names, separated by commas")
    ] = "first,classifier,depthwise,squeeze_excite",
    images: Annotated[int, number(COUNT, "to calibrate on")] = 1024,
    split: Annotated[str | None, text("folder or .tar file inside --data (default: train, train.tar)")] = None,
    img_size: Annotated[int | None, number(COUNT, "default: that of the training, or the published")] = None,
    model_kwargs: Annotated[list[str] | None, text("KEY=VALUE for timm.create_model")] = None,
    batch_size: Annotated[int, number(COUNT, "images per step")] = 64,
    damping: Annotated[float, number(NOT_NEGATIVE, "of SparseGPT's Hessian, relative to its diagonal")] = 0.01,
    block_size: Annotated[int, number(COUNT, "columns that SparseGPT takes at once")] = 128,
    recalibrate: Annotated[bool, typer.Option(help="correct statistics of batch norms afterwards")] = True,
    max_passes: Annotated[int, number(COUNT, "most passes over the images")] = 12,
    seed: Annotated[int, number(SEED, "which images are drawn")] = 0,
    device: Annotated[str, text("cpu, cuda, ...")] = "cpu",
) -> None:
    """Prune a trained network in one shot; what comes out loads into timm.create_model as before."""
    sizes = (img_size, tuple(model_kwargs or ()), batch_size, seed, device)
    run(
        Source(model, data, output, checkpoint, split or "", *sizes),
        images,
        sparsity=sparsity,
        pattern=pattern,
        method=method,
        distribution=distribution,
        exclude=words("--exclude", exclude, blanks=False) if exclude else (),
        damping=damping,
        block_size=block_size,
        recalibrate=recalibrate,
        max_passes=max_passes,
    )
