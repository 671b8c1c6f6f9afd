"""What ``revnets prune`` does, from names to files."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.small_stem import small_stem
from ..sparsity.masks import check_sparsity
from ..training.held import TRAINED
from ..training.reading import options_in, read_checkpoint, refused
from .checkpoint import best_weights, save_weights
from .densify import densify
from .one_shot import prune
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
    if not source.output.parent.is_dir():
        raise ValueError(f"the folder {str(source.output.parent)!r} for the output does not exist: create it first")
    if not source.data.exists():  # before weights are loaded, or fetched
        raise ValueError(f"there is no folder or .tar file {str(source.data)!r}: give the one that holds the images")
    if options.get("sparsity") is not None:
        check_sparsity(options["sparsity"])
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
    for reason, count in Counter(s.reason for s in report.skipped).items():
        console.print(f"left out, {count} layers: {reason}", style="dim")
    console.print("written: " + ", ".join(str(file) for file in files))
    return report


def load_model(source: Source) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its weights, and the options that say how it was built and what images it saw.

    Raises:
        ValueError: for an unknown model, or a checkpoint that is missing, damaged or of another network.
    """
    check_known(source.model)
    checkpoint = read_checkpoint(source.checkpoint) if source.checkpoint is not None else {}
    trained = _trained(checkpoint, source)
    return _model(source, checkpoint, trained), trained


def check_known(model: str) -> None:
    """Make sure that timm knows the model.

    Raises:
        ValueError: if not.
    """
    import timm

    if not timm.is_model(model):
        near = ", ".join(difflib.get_close_matches(model, timm.list_models(), 3, 0.5))
        hint = f"did you mean {near}?" if near else "timm.list_models() names all"
        raise ValueError(f"unknown model {model!r}: {hint}")


def _trained(checkpoint: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The options that say how the network was built and what images it saw, of a checkpoint of ``train.py``."""
    values = options_in(checkpoint)
    with refused(source.checkpoint or ""):
        TRAINED.check(values, ("args",))
    if values.get("model", source.model) != source.model:
        raise ValueError(f"the checkpoint is of {values['model']}, not of {source.model}: give that name")
    known = (*_DATA, "model_kwargs", "num_classes", "gp", "small_stem")
    found = {name: values[name] for name in known if values.get(name) not in (None, "", {})}
    found["model_kwargs"] = {**found.get("model_kwargs", {}), **_keywords(source.model_kwargs)}
    if source.img_size is not None:
        found.pop("input_size", None)
        found["img_size"] = source.img_size
    return found


def _keywords(texts: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"model-kwargs {text!r}: expected KEY=VALUE, such as stem_stride=2")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _model(source: Source, checkpoint: Mapping[str, Any], trained: Mapping[str, Any]) -> nn.Module:
    import timm

    arguments = {"num_classes": trained.get("num_classes"), "in_chans": trained.get("in_chans")}
    arguments |= {"global_pool": trained.get("gp"), **trained["model_kwargs"]}
    try:
        model: nn.Module = timm.create_model(source.model, pretrained=source.checkpoint is None, **arguments)
        if "small_stem" in trained:
            small_stem(model, trained["small_stem"])
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source.model} cannot be made ({reason}): give --checkpoint and --model-kwargs") from error
    if checkpoint:
        try:
            model.load_state_dict(densify(best_weights(checkpoint)))
        except RuntimeError as error:
            reason = (str(error).strip().splitlines()[1:] or [str(error)])[0].strip()[:200]
            raise ValueError(
                f"{str(source.checkpoint)!r} is not of {source.model} with these arguments ({reason}): give the same "
                "--model-kwargs; layers other than sparse:S have to be folded first"
            ) from error
    try:
        return model.to(torch.device(source.device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {source.device!r} cannot be used here: {error}") from error


def calibration_batches(
    source: Source, model: nn.Module, trained: Mapping[str, Any], images: int
) -> Iterator[tuple[Tensor, ...]]:
    """Images of a folder or .tar file of class folders, drawn by the seed, as the network sees them in validation.

    Raises:
        ValueError: where there are none.
    """
    from timm.data import create_dataset, resolve_data_config

    config = resolve_data_config({name: trained.get(name) for name in _DATA}, model=model)
    if not source.data.exists():
        raise ValueError(f"there is no folder or .tar file {str(source.data)!r}: give the one that holds the images")
    if source.split and not (source.data / source.split).exists():
        raise ValueError(f"there is no {source.split!r} in {str(source.data)!r}: give a folder or .tar file of it")
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    try:
        split = source.split or ("train.tar" if (source.data / "train.tar").is_file() else "train")
        dataset: Any = create_dataset("", root=str(source.data), split=split, input_img_mode=mode)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise ValueError(f"no images in {str(source.data)!r} ({error}): give class folders of them") from error
    return draw_batches(dataset, config, images, source.batch_size, source.seed)


def draw_batches(
    dataset: Any, config: Mapping[str, Any], images: int, batch_size: int = 64, seed: int = 0
) -> Iterator[tuple[Tensor, ...]]:
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
    return iter(DataLoader(Subset(dataset, order), batch_size=batch_size))
