"""The network of a training, and the weights that it starts from, whose masks, zeros and classifier may be others."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from revnets.pruning import densify, keep_zeros
from revnets.pruning.checkpoint import best_weights, flops_of
from revnets.sparsity import sparse_layers
from revnets.training.errors import UserError, one_line

from ..options import TrainOptions
from ..runtime import Runtime
from .models import build_model, check_batch_fits, check_model_fits, data_config, load_weights, read_checkpoint

_logger = logging.getLogger("classification")


@dataclasses.dataclass(frozen=True)
class Network:
    """A model on its device that takes the images, and what is known of it."""

    model: nn.Module
    config: dict[str, Any]  # timm's data configuration
    num_classes: int
    flops_before: float  # that its weights have cost so far

    @classmethod
    def of(cls, options: TrainOptions, runtime: Runtime) -> Network:
        """Builds it, with the weights to start from.

        Raises:
            UserError: It cannot be built, does not fit images or memory, or has no such weights or switches.
        """
        model = build_model(options)
        before = load_start(options, model)
        if options.grad_checkpointing:
            try:
                model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
            except (AttributeError, AssertionError) as error:
                raise UserError(f"--grad-checkpointing: {options.model} has no such switch; leave it out.") from error
        model.to(device=runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
        config = data_config(options, model)
        check_batch_fits(options.batch_size, config["input_size"], runtime.device)
        check_model_fits(model, config["input_size"], options.num_classes, options.model)
        if options.sync_bn:
            if runtime.device.type == "cpu":
                raise UserError(
                    "--sync-bn: torch has it for GPUs only; leave it out, --dist-bn reduce averages the statistics."
                )
            model = convert_sync_batchnorm(model) if runtime.distributed else model
        return cls(model, config, options.num_classes or int(getattr(model, "num_classes", 1000)), before)


def load_start(options: TrainOptions, model: nn.Module) -> float:
    """Loads `--initial-checkpoint`, and puts masks over zeros with `--keep-zeros`.

    Averaged weights are preferred. Masks of layers that are dense in the model are dropped, so that a network that was
    trained sparse is fine-tuned dense. A classifier for another number of classes starts anew.

    Args:
        options: All options.
        model: Not wrapped.

    Returns:
        FLOPs of the trainings that the weights come from, as far as the checkpoint knows.

    Raises:
        UserError: No such file, or weights of another model, or no zeros to keep.
    """
    before = 0.0
    if options.initial_checkpoint:
        checkpoint = read_checkpoint(options.initial_checkpoint, "--initial-checkpoint")
        weights = best_weights(checkpoint)
        if not sparse_layers(model):
            weights = densify(weights)
        weights = _with_own_classifier(model, weights)
        load_weights(model, weights, f"--initial-checkpoint: '{options.initial_checkpoint}'", options.model)
        before = flops_of(checkpoint)
    if options.keep_zeros:
        _keep_zeros(model)
    return before


def _keep_zeros(model: nn.Module) -> None:
    try:
        names = keep_zeros(model)
    except ValueError as error:
        raise UserError(f"--keep-zeros: {one_line(error)}.") from error
    active = sum(int(layer.mask.sum()) for layer in sparse_layers(model))
    total = sum(layer.mask.numel() for layer in sparse_layers(model))
    _logger.info(f"--keep-zeros: {len(names)} layers of density {active / total:.4f} have a fixed mask")


def _with_own_classifier(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, with the model's own classifier where theirs has another number of classes."""
    own = model.state_dict()
    classifier: Any = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    heads = set(classifier if isinstance(classifier, (tuple, list)) else [classifier])
    names = [name for name, module in model.named_modules() if name and module in heads]
    odd = {
        key: own[key]
        for key in own
        if key.rpartition(".")[0] in names and key in weights and weights[key].shape != own[key].shape
    }
    if odd:
        _logger.info(f"--initial-checkpoint: another number of classes, so {', '.join(odd)} start anew")
    return {**weights, **odd}
