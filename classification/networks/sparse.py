"""Sparse layers in a run: what changes their masks, what the training costs, and the files about both."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from revnets.kernels import KernelUnavailable
from revnets.layers import ModelCost, count_costs, use_sparse_kernel
from revnets.layers.trace import TraceError
from revnets.profiling.training_flops import FILES as FLOPS_FILES
from revnets.profiling.training_flops import FlopsReport, by_schedule, training_flops
from revnets.sparsity import Schedule, SparsityController, sparse_layers
from revnets.training.errors import UserError, one_line
from revnets.training.mask_report import PICTURE, TABLE, draw_picture, write_table
from revnets.training.options.parsing import options_of

from ..options import SparsityOptions, TrainOptions
from .models import data_config

_logger = logging.getLogger("classification")
CONTROLLED = ("schedule", "interval", "start", "end", "drop_fraction", "distribution")
FILES = (TABLE, PICTURE, *FLOPS_FILES)


def start_sparsity(
    options: TrainOptions, model: nn.Module, optimizer: torch.optim.Optimizer, updates: int
) -> SparsityController | None:
    """What keeps and changes the masks of the model's sparse layers; None where it has none.

    Args:
        options: All options.
        model: Not wrapped, on its device.
        optimizer: Its optimizer.
        updates: Of the weights in the whole training.

    Raises:
        UserError: Options without sparse layers, or a schedule that cannot be.
    """
    if not sparse_layers(model):
        for option in options_of(SparsityOptions).values():
            value = getattr(options, option.name)
            if option.name != "sparse_kernel" and value != option.default:
                raise UserError(
                    f"{option.flag}: {value} is about masks, and {options.model} has no sparse layers; add --layers "
                    f"sparse_wide:0.75, say, or leave {option.flag} out."
                )
        return None
    even = options.sparsity_distribution == "uniform"
    before = None if even else _costs(model, data_config(options, model)["input_size"])
    try:
        controller = SparsityController(
            model,
            optimizer,
            total_steps=updates,
            seed=options.seed,
            **{name: getattr(options, f"sparsity_{name}") for name in CONTROLLED},
        )
    except ValueError as error:
        raise UserError(f"--sparsity-...: {one_line(error)}.") from error
    if before is not None:
        after = count_costs(model, before.input_size).sparse_flops
        _logger.info(
            f"--sparsity-distribution {options.sparsity_distribution}: MFLOPs per image: "
            f"{before.sparse_flops / 1e6:.2f} before, {after / 1e6:.2f} after ({after / before.sparse_flops - 1:+.1%})"
        )
    return controller


def _costs(model: nn.Module, input_size: tuple[int, ...]) -> ModelCost | None:
    try:
        return count_costs(model, input_size)
    except TraceError as error:
        _logger.info(f"no FLOPs: {one_line(error)}")
        return None


class RunFlops:
    """FLOPs of the training, by the schedule of the masks and with what is recomputed; theoretical.

    Args:
        model: Not wrapped.
        input_size: Channels, height and width.
        sparsity: What changes the masks, or None.
        images: Per update of the weights, in all processes.
        before: FLOPs of earlier trainings that the weights come from.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        sparsity: SparsityController | None,
        images: float,
        before: float = 0.0,
    ) -> None:
        self.before = before
        self._schedule = Schedule("static") if sparsity is None else sparsity.schedule
        self._images = images
        self.costs = _costs(model, input_size)
        self._step = None if self.costs is None else training_flops(model, self.costs, images)

    def after(self, updates: int) -> dict[str, float]:
        """The columns of the summary after so many updates; none where they could not be counted."""
        if self._step is None:
            return {}
        total = self._step.run(self._schedule, updates)
        columns = {"train_flops": total, "train_flops_recomputed": self._step.recomputed * updates}
        return {**columns, "train_flops_all_phases": self.before + total} if self.before else columns

    def report(self, updates: int) -> FlopsReport | None:
        """By layer, and by schedule after so many updates; None where they could not be counted."""
        if self.costs is None or self._step is None:
            return None
        unit = f"run of {updates} steps of {self._images:.4g} images"
        return FlopsReport(self.costs, by_schedule(self._step, self._schedule, updates), unit)


def start_sparse_kernel(options: TrainOptions, model: nn.Module, device: torch.device) -> None:
    """Has the model's sparse layers train on the kernel that skips zeros, where that is asked for.

    Raises:
        UserError: It cannot be used: not on the CPU, mixed precision, no such layers, no compiler.
    """
    if not options.sparse_kernel:
        return
    if device.type != "cpu":
        raise UserError(f"--sparse-kernel: it runs on CPUs, the training on {device.type}; leave it out.")
    if options.amp:
        raise UserError("--sparse-kernel: it computes in float32, --amp does not; leave one of the two out.")
    try:
        count = use_sparse_kernel(model)
    except KernelUnavailable as error:
        raise UserError(f"--sparse-kernel: {one_line(error)}; or leave it out.") from error
    if not count:
        raise UserError(
            f"--sparse-kernel: {options.model} has no sparse layers that it has a loop for; add --layers sparse:0.9, "
            "say, or leave it out."
        )
    _logger.info(
        f"--sparse-kernel: {count} layers skip their zeros, where those are half of the weights or more and it pays"
    )


def sparsity_words(sparsity: SparsityController) -> str:
    """The masks for the log."""
    sizes = [layer.mask.numel() for layer in sparsity.layers]
    active = sum(density * size for density, size in zip(sparsity.density.values(), sizes, strict=True))
    return f"{len(sizes)} sparse layers of density {active / sum(sizes):.4f}, {sparsity.schedule.name} masks"


def draw_sparsity(sparsity: SparsityController, flops: FlopsReport | None, folder: Path, title: str) -> None:
    """Writes the tables and pictures of masks and of FLOPs."""
    write_table(sparsity, folder)
    draw_picture(sparsity, folder, title)
    if flops is not None:
        flops.write(folder)
        flops.draw(folder, title)
