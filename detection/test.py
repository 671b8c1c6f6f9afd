"""Measures COCO's AP of a trained detector on its test set, and draws some of what it finds.

python detection/test.py CONFIG output/NAME/best_coco_bbox_mAP_epoch_12.pth
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "detection"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from reporting that there is no GPU
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from revnets.training.errors import UserError, guarded

from . import checkpoints, checks
from .config import PATH, load, parse, parser, primary
from .noise import noise_kept_out
from .report import draw, show, write_summary

_logger = logging.getLogger("detection")
DESCRIPTION = "Test a detector on MMEngine's runner. Options are those of MMDetection's tools/test.py, and some more."


def main(argv: Sequence[str] | None = None, program: str = "") -> int:
    """Runs the script; returns its exit code: 2 after a user mistake.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.
    """
    return guarded(lambda: run_test(argv, program), program)


def options(program: str = "") -> Any:
    """The command line."""
    line = parser(program, DESCRIPTION)
    line.add_argument("checkpoint", type=PATH, help="of a run of train.py, or of MMDetection")
    line.add_argument("--classwise", action="store_true", help="AP of every class, too")
    return line


def run_test(argv: Sequence[str] | None = None, program: str = "") -> dict[str, float]:
    """Tests as the command line says; results go to `<work-dir>/test/`.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.

    Returns:
        The metrics, as MMDetection names them.

    Raises:
        UserError: A mistake in the options, the configuration, the data or the checkpoint.
    """
    args = parse(options(program), argv)
    cfg = load(args)
    from .runner import Leftovers, build, progress

    cfg.work_dir = str(Path(cfg.work_dir) / "test")
    if args.classwise:
        for each in cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]:
            each.classwise = True
    if not args.no_check and primary():
        checks.check_data(cfg, ["test"])
    if "load_from" in args.cfg_options:
        raise UserError("--cfg-options: load_from has no effect, CHECKPOINT is what is tested; leave it out.")
    checkpoint = checkpoints.read(args.checkpoint, "CHECKPOINT")
    cfg.load_from, cfg.resume = args.checkpoint, False
    with Leftovers(Path(cfg.work_dir)).removed():
        runner = build(cfg, args.verbose, checked=not args.no_check)
        checks.check_neck(runner.model)
        checks.check_weights(runner.model, checkpoint, whole=True)
    progress(runner)
    with noise_kept_out(args.verbose):
        metrics: dict[str, float] = {key: float(value) for key, value in runner.test().items()}
    if runner.rank == 0:
        folder = Path(runner.work_dir)
        images = len(runner.test_dataloader.dataset)
        model = getattr(runner.model, "module", runner.model)
        picture = draw(model, runner.test_dataloader.dataset, args.draw, folder)
        write_summary(folder, {"config": cfg.filename, "checkpoint": args.checkpoint, "images": images, **metrics})
        show(f"{Path(cfg.filename).stem}, test", metrics, {"images": images})
        _logger.info(f"figures in '{folder}'" + (f", predictions drawn in '{picture}'" if picture else ""))
    return metrics


if __name__ == "__main__":
    sys.exit(main())
