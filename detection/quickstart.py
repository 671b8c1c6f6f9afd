"""Trains Faster R-CNN on RevBiFPN-S0 to find real handwritten digits, in minutes on a CPU, and measures memory.

python -m detection.quickstart
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "detection"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from reporting that there is no GPU

import torch
from torch import Tensor, nn

from revnets.training.errors import UserError, guarded
from revnets.training.memory import MODES, peaks
from revnets.training.options.parsing import Parser, argument
from revnets.training.progress import clock

from .config import CONFIGS, PATH, check_installed
from .digits import SceneOptions, make_scenes
from .noise import noise_kept_out
from .test import run_test
from .train import train

CONFIG = CONFIGS / "digits" / "faster-rcnn_revbifpn-s0_digits.py"
DATA = Path("data/digits-scenes")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""
    return guarded(lambda: quickstart(argv))


def quickstart(argv: Sequence[str] | None = None) -> str:
    """Makes the scenes, trains, tests on scenes of digits never seen, measures memory.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.

    Returns:
        The final line, in plain words.

    Raises:
        UserError: A folder in the way, or a package missing.
    """
    args = _options().parse_args(argv)
    check_installed()  # before the scenes are made
    start = time.perf_counter()
    output = Path(args.output)
    scenes = SceneOptions()
    if args.scenes is not None:
        scenes = SceneOptions(train=args.scenes, val=max(1, args.scenes // 8), test=max(1, args.scenes // 4))
    data = make_scenes(Path(args.data_dir), scenes)
    settings = [f"data_root={data}", *args.cfg_options]
    result = train([str(CONFIG), "--work-dir", str(output), "--overwrite", "--draw", "0", "--cfg-options", *settings])
    if result.checkpoint is None:
        raise UserError(
            f"--cfg-options: no checkpoint was saved in '{output}'; leave default_hooks.checkpoint as it is."
        )
    metrics = run_test([str(CONFIG), str(result.checkpoint), "--work-dir", str(output), "--cfg-options", *settings])
    memory = activation_memory(settings)
    words = final_line(metrics, memory, time.perf_counter() - start, output / "test" / "predictions.png")
    print(words)
    return words


def activation_memory(settings: Sequence[str]) -> dict[str, int]:
    """Peak activation memory of one training step of the whole detector, in each mode of its backbone.

    Args:
        settings: What the command line sets in the configuration.

    Returns:
        Bytes per mode.
    """
    from mmdet.registry import MODELS
    from mmengine.device import get_device
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from revnets.profiling.memory import measure_training_step

    from .config import load, parse, parser

    cfg = load(parse(parser("", ""), [str(CONFIG), "--cfg-options", *settings]))
    init_default_scope("mmdet")
    with noise_kept_out(verbose=False):
        batch = next(
            iter(Runner.build_dataloader({**cfg.train_dataloader, "num_workers": 0, "persistent_workers": False}))
        )
    measured = {}
    for mode in MODES:
        torch.manual_seed(0)
        cfg.model.backbone.mode = mode
        detector = MODELS.build(cfg.model)
        detector.init_weights()
        detector.to(get_device()).train()
        data = detector.data_preprocessor(batch, True)
        step = _Losses(detector, data["data_samples"])
        measured[mode] = measure_training_step(step, data["inputs"], lambda loss: loss).activation_bytes
    return measured


class _Losses(nn.Module):
    """From images to the sum of a detector's losses."""

    def __init__(self, detector: Any, samples: Sequence[Any]) -> None:
        super().__init__()
        self.detector, self.samples = detector, samples

    def forward(self, images: Tensor) -> Tensor:
        total: Tensor = self.detector.parse_losses(self.detector.loss(images, self.samples))[0]
        return total


def final_line(metrics: Mapping[str, float], memory: Mapping[str, int], seconds: float, picture: Path) -> str:
    """What came out, in plain words."""
    ap, ap50 = (metrics.get(f"coco/bbox_{key}", 0.0) for key in ("mAP", "mAP_50"))  # none where nothing was found
    found = f"; picture: {picture}" if picture.is_file() else ""
    return (
        f"Done in {clock(seconds)}: Faster R-CNN on RevBiFPN-S0 finds and reads handwritten digits it has never seen "
        f"with AP50 {ap50:.3f} (COCO AP {ap:.3f}); the activations of one "
        f"training step of the whole detector {peaks(memory)}{found}."
    )


def _options() -> argparse.ArgumentParser:
    line = Parser(description="RevBiFPN finds digits.")
    folder = "output/quickstart-detection"
    line.add_argument("--output", type=PATH, default=folder, help="folder for the run and the picture")
    line.add_argument("--data-dir", type=PATH, default=str(DATA), help="folder for the scenes")
    scenes = argument(int, low=1, high=100_000)
    line.add_argument("--scenes", type=scenes, help="use so many scenes to train on (for quick tests)")
    line.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="see detection/train.py")
    return line


if __name__ == "__main__":
    sys.exit(main())
