"""Building the model, checking that it fits the images, and reading weights, with every mistake named."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import nn

from revnets.layers import convert, parse_layers
from revnets.models._cached import drop_wrong_cache
from revnets.models.small_stem import small_stem
from revnets.training.checkpoints.reading import read_checkpoint
from revnets.training.checkpoints.weights import odd, unfit
from revnets.training.errors import UserError, did_you_mean, one_line, refused, shown
from revnets.training.memory import physical_memory

from ..options import TrainOptions, ValidateOptions

_logger = logging.getLogger("classification")


def build_model(options: TrainOptions | ValidateOptions) -> nn.Module:
    """`timm.create_model` with the options, and a sentence for what can go wrong in it.

    Raises:
        UserError: Unknown model, or arguments that it does not take.
    """
    if not timm.is_model(options.model) and not options.model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        hint = did_you_mean(options.model, timm.list_models())
        raise UserError(f"--model: timm knows no {shown(options.model)}{hint}; timm.list_models() names all.")
    arguments: dict[str, Any] = {
        "num_classes": options.num_classes,
        "in_chans": options.in_chans,
        "global_pool": options.gp,
        "drop_rate": getattr(options, "drop", None),
        "drop_path_rate": getattr(options, "drop_path", None),
        **options.model_kwargs,
    }
    path = getattr(options, "pretrained_path", "")
    if options.layers and (options.pretrained or path):
        _check_keeps_weights(options)
    if path:
        if not Path(path).is_file():
            raise UserError(f"--pretrained-path: there is no file '{path}'; give one with published weights.")
        _check_numbers(path)
        arguments["pretrained_cfg_overlay"] = {"file": path}
    if options.pretrained and not path:
        drop_wrong_cache(options.model)
    weights = options.pretrained or bool(path)
    shown_arguments = {name: shown(value) for name, value in arguments.items() if value is not None}
    words = ", ".join(f"{name}={text}" for name, text in shown_arguments.items())
    with refused(
        f"--model: {shown(options.model)} cannot be built with {words or 'its own arguments'}",
        "correct --model and --model-kwargs" + (", --pretrained or --pretrained-path" if weights else ""),
    ):
        model = timm.create_model(options.model, pretrained=weights, **arguments)
    if options.small_stem is not None:
        try:
            small_stem(model, options.small_stem)
        except ValueError as error:
            raise UserError(f"--small-stem: {options.model} is {error}; leave it out.") from error
    return _converted(model, options) if options.layers else model


def _check_numbers(path: str) -> None:
    """Refuses a file whose tensors timm would cast into other numbers."""
    if Path(path).suffix.lower() in (".npz", ".npy"):  # of JAX, which timm reads itself
        return
    content = read_checkpoint(path, "--pretrained-path")
    for key in ("state_dict_ema", "state_dict"):
        weights = content.get(key)
        problem = odd(weights) if isinstance(weights, Mapping) else ""
        if problem:
            raise UserError(f"--pretrained-path: '{path}' cannot be loaded: {problem}; give a file of plain weights.")


def _check_keeps_weights(options: TrainOptions | ValidateOptions) -> None:
    try:
        anew = [part.entry.name for part in parse_layers(options.layers) if not part.keeps_weights]
    except ValueError as error:
        raise UserError(f"--layers: {one_line(error)}.") from error
    if anew:
        raise UserError(
            f"--pretrained: layers of {anew[0]} are newly initialised, which would throw the weights away; leave out "
            "--pretrained and --pretrained-path, or give --layers sparse:0.75, say."
        )


def _converted(model: nn.Module, options: TrainOptions | ValidateOptions) -> nn.Module:
    """The model with other layers, whose FLOPs are met at the size of the run."""
    try:
        report = convert(model, options.layers, input_size=data_config(options, model)["input_size"])
    except ValueError as error:
        raise UserError(f"--layers: {one_line(error)}.") from error
    counts = f"{len(report.converted)} layers converted, {len(report.skipped)} left"
    _logger.info(f"--layers {options.layers}: {counts}; {'; '.join([*report.notes, report.summary()])}")
    return report.model


def data_config(options: TrainOptions | ValidateOptions, model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of a model, with the options over it."""
    names = ("img_size", "input_size", "in_chans", "crop_pct", "mean", "std", "interpolation")
    given = {name: getattr(options, name) for name in names}
    with refused(f"--img-size: timm has no data configuration for {options.model}", "correct --img-size or --mean"):
        config: dict[str, Any] = resolve_data_config(given, model=model)
    return config


def check_model_fits(model: nn.Module, input_size: tuple[int, int, int], num_classes: int | None, name: str) -> None:
    """Sends one black image through the model in eval mode, so that a wrong size is found before any data is read.

    Args:
        model: On its device.
        input_size: Channels, height and width.
        num_classes: How many numbers are expected for an image; None: any.
        name: The model's name for the message.

    Raises:
        UserError: The model does not take such images, or gives another number of classes.
    """
    was_training = model.training
    parameter = next(model.parameters(), None)
    words = "x".join(str(n) for n in input_size)
    if parameter is None:
        raise UserError(f"--model: {name} has no parameters, there is nothing to train or measure; give another.")
    with refused(f"--img-size: {name} does not take {words} images", "give another size"):
        image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            output = model.eval()(image)
    model.train(was_training)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        kind = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(
            f"--model: {name} gives {kind} for an image, one row of class scores was expected; leave features_only and "
            "the like out of --model-kwargs."
        )
    if num_classes is not None and output.shape[-1] != num_classes:
        raise UserError(
            f"--num-classes: {name} gives {output.shape[-1]} outputs, {num_classes} classes were expected; correct it."
        )


def check_batch_fits(batch_size: int, input_size: tuple[int, int, int], device: torch.device) -> None:
    """Compares the bytes of a batch of images, which is the least that a step needs, with the device's memory.

    Raises:
        UserError: They are more.
    """
    needed = batch_size * math.prod(input_size) * 4
    there = physical_memory(device)
    if there is not None and needed > there:
        raise UserError(
            f"--batch-size: {batch_size} images of {'x'.join(map(str, input_size))} take {needed / 1e9:,.1f} GB, there "
            f"are {there / 1e9:,.1f} GB of memory; lower it or --img-size."
        )


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str, name: str) -> None:
    """Loads weights that must fit the model exactly.

    Args:
        model: Not wrapped for several processes.
        weights: Names to tensors.
        source: Option and path, for messages.
        name: The model's name.

    Raises:
        UserError: A name or a shape differs, or a tensor's numbers are none for the model's, such as complex, quantised
            or NaN; the first one is named.
    """
    model.load_state_dict(fitting_weights(model, weights, source, name))


def fitting_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor], source: str, name: str
) -> dict[str, torch.Tensor]:
    """Weights under the model's own names; the model stays as it is.

    Args:
        model: Not wrapped for several processes.
        weights: Names to tensors.
        source: Option and path, for messages.
        name: The model's name.

    Raises:
        UserError: A name or a shape differs; the first one is named.
    """
    weights = clean_state_dict(weights)
    problem = _difference(model, weights)
    if problem:
        renamed = _published_layout(model, weights)
        problem = problem if renamed is None or _difference(model, renamed) else ""
        weights = weights if renamed is None else renamed
    if problem:
        raise UserError(
            f"{source} is of another model than {name}: {problem}; give the same --model, --model-kwargs and --layers."
        )
    problem = unfit(model.state_dict(), weights)
    if problem:
        raise UserError(f"{source} cannot be loaded: {problem}; give a file of plain weights.")
    return dict(weights)


def _difference(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """The first way in which weights do not fit a model, in words, or nothing."""
    own = model.state_dict()
    odd = [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if odd:
        return f"'{odd[0]}' is {type(weights[odd[0]]).__name__}, a tensor was expected"
    missing = [key for key in own if key not in weights]
    extra = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or extra:
        return f"{len(missing)} tensors are missing and {len(extra)} left over, such as '{(missing or extra)[0]}'"
    if shapes:
        key = shapes[0]
        return f"'{key}' has shape {tuple(weights[key].shape)}, the model's {tuple(own[key].shape)}"
    return ""


def _published_layout(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor] | None:
    """The weights through the `checkpoint_filter_fn` of the model's file; None where it does not apply."""
    rename = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is None:
        return None
    try:
        renamed: Mapping[str, torch.Tensor] = rename(dict(weights), model)
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError, TypeError):
        return None  # not the published layout either
    return renamed
