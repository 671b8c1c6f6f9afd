"""What short runs leave behind, and how to stop one."""

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class StopHook(Hook):
    """Ends a run as Ctrl-C would, after an iteration."""

    priority = "LOWEST"

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


@HOOKS.register_module(force=True)
class LossHook(Hook):
    """Writes every iteration's losses and images to a file of JSON lines, to the bit."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        losses = {key: float(value).hex() for key, value in outputs.items() if "loss" in key}
        images = sum(float(image.double().sum()) for image in data_batch["inputs"])
        flips = [sample.flip for sample in data_batch["data_samples"] if "flip" in sample]
        row = {"iter": runner.iter, **losses, "images": images, "flips": flips}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """What LossHook wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights, to the bit."""
    first, second = (torch.load(path, weights_only=False)["state_dict"] for path in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
