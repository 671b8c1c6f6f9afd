"""A teacher for a training: its network, its weights, and the task that compares the student with it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from revnets.pruning import densify
from revnets.pruning.checkpoint import best_weights
from revnets.training.checkpoints.foreign import reaching_argument, reaching_name
from revnets.training.errors import UserError, one_line

from ..options import ModelOptions, TrainOptions, from_checkpoint_args, renamed
from ..runtime import Runtime
from .models import build_model, check_model_fits, data_config, load_weights, read_checkpoint

WEIGHTS = {"task_weight": "distill_task", "logit_weight": "distill_logits", "feature_weight": "distill_features"}
_logger = logging.getLogger("classification")


def distillation(options: TrainOptions, runtime: Runtime, model: nn.Module, loss: nn.Module) -> Any:
    """timm's training task with SquareHead around the model.

    Args:
        options: All options.
        runtime: Device and processes.
        model: The student, not wrapped.
        loss: On the labels.

    Raises:
        UserError: A teacher that cannot be had, or whose features are not the student's.
    """
    try:
        from revnets.pruning.distillation import SquareHeadTask
    except ImportError as error:
        raise UserError("--teacher: this timm has no timm.task (1.0.31 has it); pip install -U timm.") from error
    if options.aug_splits:
        raise UserError("--teacher: a teacher sees each image once; leave --aug-splits out.")
    teacher, config = _teacher(options)
    teacher.to(device=runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
    own = data_config(options, model)
    outputs = int(getattr(model, "num_classes", 0)) or None
    check_model_fits(teacher, own["input_size"], outputs, "--teacher")
    try:
        task = SquareHeadTask(
            model,
            teacher,
            loss,
            **renamed(options, layers="distill_layers", temperature="distill_temperature", **WEIGHTS),
            device=runtime.device,
        )
        task.normalize(own, config)
        image = torch.zeros(2, *own["input_size"], device=runtime.device)
        with torch.no_grad():
            was = model.training
            model.eval()
            task.compare(image)
            model.train(was)
    except ValueError as error:
        raise UserError(f"--distill-layers: {one_line(error)}.") from error
    _logger.info(
        f"teacher: {type(teacher).__name__} of '{options.teacher_checkpoint or 'published weights'}', features of "
        f"{', '.join(task.layers) or 'no layer'}"
    )
    return task


def _teacher(options: TrainOptions) -> tuple[nn.Module, dict[str, Any]]:
    """The network with its weights, and the data configuration that it was trained with."""
    if not options.teacher_checkpoint:
        how = dataclasses.replace(
            _plain(options), model=options.teacher, model_kwargs=options.teacher_kwargs, pretrained=True
        )
        teacher = build_model(how)
        return teacher, data_config(dataclasses.replace(how, mean=None, std=None), teacher)
    checkpoint = read_checkpoint(options.teacher_checkpoint, "--teacher-checkpoint")
    how = _as_trained(options, checkpoint)
    teacher = build_model(how)
    weights = best_weights(checkpoint)
    weights = weights if how.layers else densify(weights)
    load_weights(teacher, weights, f"--teacher-checkpoint: '{options.teacher_checkpoint}'", how.model)
    return teacher, data_config(how, teacher)


def _as_trained(options: TrainOptions, checkpoint: Mapping[str, Any]) -> TrainOptions:
    """The options that the teacher was trained with or, where they are not stored, those of the student."""
    stored = from_checkpoint_args(checkpoint.get("args"), f"--teacher-checkpoint: '{options.teacher_checkpoint}'")
    wanted = {field.name for field in dataclasses.fields(ModelOptions)} | {"mean", "std"}
    trained = {name: value for name, value in stored.items() if name in wanted}
    name = "" if options.teacher else reaching_name(trained.get("model", ""))
    if reaches := name or reaching_argument(trained.get("model_kwargs")):
        raise UserError(
            f"--teacher-checkpoint: '{options.teacher_checkpoint}' was trained with {reaches}, and only what you name "
            f"is read or fetched; {'give --teacher yourself if you trust it' if name else 'give another file'}."
        )
    if options.teacher and trained.get("model", options.teacher) != options.teacher:
        raise UserError(
            f"--teacher: '{options.teacher_checkpoint}' is of {trained['model']}, not {options.teacher}; correct one."
        )
    how = dataclasses.replace(_plain(options), **trained)
    if options.teacher and not trained:
        how = dataclasses.replace(how, model=options.teacher, model_kwargs=options.teacher_kwargs)
    return how


def _plain(options: TrainOptions) -> TrainOptions:
    """The student's options without what only concerns its start."""
    return dataclasses.replace(
        options, layers="", pretrained=False, pretrained_path="", initial_checkpoint="", keep_zeros=False
    )
