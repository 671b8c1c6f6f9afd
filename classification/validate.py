"""Measures top-1, top-5 and loss of any timm model on a validation set.

python classification/validate.py --data-dir output/quickstart/data --checkpoint output/.../model_best.pth.tar
python classification/validate.py --data-dir /data/imagenet --model resnet18 --pretrained
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "classification"

from rich.console import Console

import revnets  # noqa: F401  (registers its models with timm)
from revnets.training.checkpoints.foreign import reaching_argument, reaching_name
from revnets.training.errors import UserError, guarded
from revnets.training.files import NotWritten, write_csv, write_json, writing
from revnets.training.memory import memory_words, peak_memory
from revnets.training.options.parsing import Layer, joined, options_of, read_layers, settled

from .images.data import check_labels, open_dataset, validation_loader
from .networks.models import build_model, check_batch_fits, check_model_fits, data_config, load_weights, read_checkpoint
from .options import CONFIGS, TrainOptions, ValidateOptions, from_checkpoint_args
from .run.loop import validate as measure
from .run.report import table
from .runtime import start_runtime

_logger = logging.getLogger("classification")
DESCRIPTION = "Validate a timm model. With --checkpoint, the model is that of the training unless given."


def main(argv: Sequence[str] | None = None, program: str = "") -> int:
    """Runs the script; returns its exit code: 2 after a user mistake.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.
    """
    return guarded(lambda: validate(argv, program), program)


def validate(argv: Sequence[str] | None = None, program: str = "") -> dict[str, Any]:
    """Validates as the command line says, prints a table and writes the results file.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.

    Returns:
        The figures.

    Raises:
        UserError: A mistake in the options, the data or the checkpoint.
    """
    training_only = frozenset(set(options_of(TrainOptions)) - set(options_of(ValidateOptions)))
    layers = read_layers(ValidateOptions, argv, DESCRIPTION, prog=program, ignored=training_only, ours=CONFIGS)
    path = joined(layers).get("checkpoint")
    checkpoint = read_checkpoint(path, "--checkpoint") if path else None
    options = settled(ValidateOptions, [_trained_with(joined(layers), checkpoint), *layers])
    options.check()
    runtime = start_runtime(options)
    dataset = open_dataset(options, options.val_split, training=False)
    model = build_model(_as_trained(options, checkpoint))
    source = "published weights" if options.pretrained else "random weights"
    if checkpoint is not None:
        source = _load(model, checkpoint, options)
    model.to(device=runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
    config = data_config(options, model)
    check_batch_fits(options.batch_size, config["input_size"], runtime.device)
    check_model_fits(model, config["input_size"], options.num_classes, options.model)
    check_labels(dataset, int(getattr(model, "num_classes", 1000)))
    loader = validation_loader(options, runtime, dataset, config)
    figures = measure(model, loader, runtime, "validate", options.log_interval)
    results = {
        "model": options.model,
        "weights": source,
        "top1": figures["top1"],
        "top5": figures["top5"],
        "loss": figures["loss"],
        "images": int(figures["images"]),
        "img_size": config["input_size"][-1],
        "images_per_s": figures["images_per_s"],
        **peak_memory(runtime.device),
    }
    if runtime.primary:
        Console().print(table("validation", results))
        if options.results_file:
            _write(Path(options.results_file), results)
        _logger.info(f"peak memory: {memory_words(peak_memory(runtime.device))}")
    return results


def _trained_with(values: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> Layer:
    """What the checkpoint was trained with, under what the user sets.

    A checkpoint says how its network is built and how images are prepared. Where images are, and what else is read or
    fetched, only the user says.

    Raises:
        UserError: The checkpoint names such things, and the user does not.
    """
    where = f"--checkpoint: '{values.get('checkpoint')}'"
    trained = from_checkpoint_args(checkpoint.get("args"), where) if checkpoint is not None else {}
    if values.get("model", trained.get("model")) != trained.get("model"):
        trained = {}  # another model: the error about it comes from its weights
    _check_reaches_nothing(trained, values)
    known = {name: each for name, each in options_of(ValidateOptions).items() if name not in _PLACES}
    wanted = {name: value for name, value in trained.items() if name in known and value is not None}
    wanted = {name: value for name, value in wanted.items() if name not in values or known[name].kind is dict}
    return Layer(where, wanted, asked=False)


_PLACES = {"data_dir", "dataset", "dataset_download", "class_map"}


def _check_reaches_nothing(trained: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses what would be read or fetched because the checkpoint says so.

    Raises:
        UserError: Naming the option that allows it.
    """
    what, option = "model" not in values and reaching_name(trained.get("model", "")), "--model"
    if not what:
        kwargs = trained.get("model_kwargs")
        what, option = reaching_argument(kwargs, values.get("model_kwargs", {})), "--model-kwargs"
    if not what:
        wanted = ["class_map"] if values.get("data_dir") else ["dataset"] if trained.get("dataset") else ["data_dir"]
        missing = [name for name in wanted if trained.get(name) and not values.get(name) and not values.get("dataset")]
        split = Path(str(trained.get("val_split", "")))
        if missing:
            option = f"--{missing[0].replace('_', '-')}"
            what = f"{option} {str(trained[missing[0]])[:100]!r}"
        elif "val_split" not in values and (split.is_absolute() or ".." in split.parts or ":" in str(split)):
            what, option = f"--val-split {str(split)[:100]!r}", "--val-split"
    if what:
        raise UserError(
            f"--checkpoint: '{values['checkpoint']}' was trained with {what}, and only what you name is read or "
            f"fetched; give {option} yourself if you trust it."
        )


def _as_trained(options: ValidateOptions, checkpoint: Mapping[str, Any] | None) -> ValidateOptions:
    """The options with the image size of the training, which its layers were converted for."""
    trained = from_checkpoint_args(checkpoint.get("args")) if checkpoint is not None else {}
    size = {name: trained[name] for name in ("img_size", "input_size") if name in trained}
    return dataclasses.replace(options, **size)


def _load(model: Any, checkpoint: Mapping[str, Any], options: ValidateOptions) -> str:
    weights = checkpoint["state_dict"]
    if options.use_ema:
        weights = checkpoint.get("state_dict_ema")
        if weights is None:
            raise UserError(f"--use-ema: '{options.checkpoint}' holds no running mean of weights; leave --use-ema out.")
    load_weights(model, weights, f"--checkpoint: '{options.checkpoint}'", options.model)
    return options.checkpoint + (" (EMA)" if options.use_ema else "")


def _write(path: Path, results: Mapping[str, Any]) -> None:
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(path, results)
        else:
            write_csv(path, [results])
    except NotWritten as error:
        raise UserError(f"--results-file: {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
