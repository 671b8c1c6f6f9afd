"""Activation memory of fine-tuning, predicted: networks plain, with timm's checkpointing, and made reversible.

python -m classification.tables.retrofit_memory

Nothing is trained or allocated, and no data is read.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

import revnets
from revnets.profiling.predict import predict_training_step
from revnets.training.errors import refused

from . import runner
from .runner import Column, Outcomes, average, flag, positive, same

PLAIN, CHECKPOINTED = "plain", "timm's checkpointing"
WAYS = {"reversible": {}, "reversible, two streams": {"streams": 2}, "reversible, no bits": {"streams": 2, "bits": 0}}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One network, trained in one way."""

    network: str
    way: str
    activation_mb: float  # per image


def _share(found: Outcomes, lines: runner.Lines) -> str:
    return runner.number(
        average(found, "activation_mb") / average(lines[found[0].network, PLAIN], "activation_mb"), ".3f"
    )


class Table(runner.Table):
    """Networks x ways."""

    folder = "retrofit_memory"
    description = "Networks x ways to train them: activation memory."
    options = (
        flag(
            "--networks",
            nargs="+",
            default=["resnet50", "convnext_tiny", "vit_small_patch16_224", "vit_large_patch16_224"],
        ),
        flag("--batch-size", type=positive, default=32),
    )
    columns = (
        Column("network", same("network")),
        Column("trained", same("way")),
        Column("activation MB per image", same("activation_mb", ".2f")),
        Column("of plain", _share),
    )

    def line(self, outcome: Any) -> tuple[str, str]:
        return outcome.network, outcome.way

    def outcomes(self) -> Iterator[Outcome]:
        for name in self.args.networks:
            with refused(f"--networks: {name}", "give names of timm's networks, as timm.list_models() has them"):
                model = timm.create_model(name).train()
            size = model.pretrained_cfg["input_size"]
            yield self._outcome(name, PLAIN, model, size)
            checkpointed = copy.deepcopy(model)
            checkpointed.set_grad_checkpointing()
            yield self._outcome(name, CHECKPOINTED, checkpointed, size)
            for way, how in WAYS.items():
                with refused("--networks"):
                    made = revnets.reversible(copy.deepcopy(model), **how)  # type: ignore[operator]
                yield self._outcome(name, way, made, size)

    def _outcome(self, name: str, way: str, model: nn.Module, size: tuple[int, ...]) -> Outcome:
        x = torch.empty(self.args.batch_size, *size, device="meta")
        step = predict_training_step(model, x)
        return Outcome(name, way, (step.step_bytes - step.gradient_bytes) / 1e6 / self.args.batch_size)

    def draw(self, figure: Any, done: Outcomes) -> None:
        axes, networks = figure.subplots(), list(dict.fromkeys(each.network for each in done))
        ways = list(dict.fromkeys(each.way for each in done))
        for i, way in enumerate(ways):
            found = [each.activation_mb for each in done if each.way == way]
            axes.bar([n + (i - len(ways) / 2) * 0.16 for n in range(len(found))], found, 0.16, label=way)
        axes.set_xticks(range(len(networks)), networks)
        axes.set_ylabel("activation MB per image")
        axes.legend()


if __name__ == "__main__":
    sys.exit(Table.main())
