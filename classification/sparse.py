"""Sparse layers in a run: what changes their masks, what the training costs, and the files about both."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from classification.errors import UserError, one_line
from classification.models import data_config
from classification.options import TrainOptions
from revnets.layers import ModelCost, count_costs
from revnets.layers.trace import TraceError
from revnets.sparsity import Schedule, SparsityController, run_flops, sparse_layers
from revnets.sparsity.report import PICTURE, TABLE, draw_picture, write_table

_logger = logging.getLogger("classification")
FILES = (TABLE, PICTURE)


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
        if options.sparsity_schedule != "static":
            raise UserError(
                f"--sparsity-schedule: {options.sparsity_schedule} changes masks, and {options.model} has no sparse "
                "layers; add --layers sparse_wide:0.75, say."
            )
        return None
    even = options.sparsity_distribution == "uniform"
    before = None if even else _costs(model, data_config(options, model)["input_size"])
    try:
        controller = SparsityController(
            model,
            optimizer,
            options.sparsity_schedule,
            total_steps=updates,
            interval=options.sparsity_interval,
            start=options.sparsity_start,
            end=options.sparsity_end,
            drop_fraction=options.sparsity_drop_fraction,
            distribution=options.sparsity_distribution,
            seed=options.seed,
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


class TrainingFlops:
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
        costs = _costs(model, input_size)
        self.dense = 0.0 if costs is None else costs.flops * images
        self.sparse = 0.0 if costs is None else costs.sparse_flops * images
        self.recomputed = 0.0 if costs is None else _recomputed(model, costs) * images

    def after(self, updates: int) -> dict[str, float]:
        """The columns of the summary after so many updates; none where they could not be counted."""
        if not self.dense:
            return {}
        total = run_flops(self._schedule, self.dense, self.sparse, updates, self.recomputed)
        columns = {"train_flops": total, "train_flops_recomputed": self.recomputed * updates}
        return {**columns, "train_flops_all_phases": self.before + total} if self.before else columns


def _recomputed(model: nn.Module, costs: ModelCost) -> int:
    """FLOPs of one image in parts that the backward pass evaluates anew."""
    if any(vars(module).get("grad_checkpointing") is True for module in model.modules()):  # timm's switch
        return costs.sparse_flops
    modes = {name: vars(module).get("mode") for name, module in model.named_modules()}
    parts = tuple(f"{name}." if name else "" for name, mode in modes.items() if mode in ("reversible", "checkpoint"))
    return sum(layer.sparse_flops for layer in costs.layers if f"{layer.name}.".startswith(parts))


def sparsity_words(sparsity: SparsityController) -> str:
    """The masks for the log."""
    sizes = [layer.mask.numel() for layer in sparsity.layers]
    active = sum(density * size for density, size in zip(sparsity.density.values(), sizes, strict=True))
    return f"{len(sizes)} sparse layers of density {active / sum(sizes):.4f}, {sparsity.schedule.name} masks"


def draw_sparsity(sparsity: SparsityController, folder: Path, title: str) -> None:
    """Writes `sparsity.csv` and `sparsity.png`; says so where matplotlib is not installed."""
    write_table(sparsity, folder)
    try:
        draw_picture(sparsity, folder, title)
    except ImportError:
        _logger.info(f"no {PICTURE}: matplotlib is not installed (pip install matplotlib); the figures are in {TABLE}")
