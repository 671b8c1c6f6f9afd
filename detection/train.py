"""Trains a detector of MMDetection, RevBiFPN's or any other, from its configuration.

python detection/train.py configs/detection/coco/faster-rcnn_revbifpn-s3_1x_coco.py --amp
torchrun --nproc_per_node=8 detection/train.py configs/detection/coco/mask-rcnn_revbifpn-s2_1x_coco.py --resume
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: Python then looks for modules in detection/ instead of the project's root
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "detection"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from reporting that there is no GPU
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from revnets.training.capture.cuda_graph import CaptureError
from revnets.training.errors import UserError, guarded, one_line
from revnets.training.files import obstacle
from revnets.training.lock import FolderLock
from revnets.training.memory import MB
from revnets.training.options.parsing import SEED, argument
from revnets.training.processes import of_first
from revnets.training.progress import clock

from . import checkpoints, checks
from .config import PATH, connect, load, parse, parser, primary
from .noise import noise_kept_out
from .report import draw, show, write_summary

_logger = logging.getLogger("detection")
SAVE_EVERY = 1000  # iterations
DESCRIPTION = "Train a detector on MMEngine's runner. Options are those of MMDetection's tools/train.py, and some more."


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with; `best` is empty in processes that write no files."""

    folder: Path
    checkpoint: Path | None
    best: dict[str, float]
    memory: dict[str, Any]


def main(argv: Sequence[str] | None = None, program: str = "") -> int:
    """Runs the script; returns its exit code: 2 after a user mistake.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.
    """
    return guarded(lambda: train(argv, program), program)


def options(program: str = "") -> Any:
    """The command line."""
    line = parser(program, DESCRIPTION)
    add, number = line.add_argument, functools.partial(argument, int, low=0)
    words = "go on from a checkpoint, in the middle of an epoch, too; auto or nothing: from the folder's last one"
    add("--resume", type=PATH, nargs="?", const="auto", metavar="CHECKPOINT", help=words)
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--amp", action="store_true", help="bfloat16 mixed precision")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch")
    add("--tensorboard", action="store_true", help="write events for TensorBoard, too")
    words = "of everything random (default: the configuration's, else 0)"
    add("--seed", type=number(high=SEED), help=words)
    words = "also save in the middle of an epoch, every N iterations; 0: do not (default: 1000)"
    add("--save-every", type=number(high=1 << 31), metavar="N", help=words)
    return line


def train(argv: Sequence[str] | None = None, program: str = "") -> Result:
    """Trains as the command line says.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.

    Returns:
        The run's folder and its figures.

    Raises:
        UserError: A mistake in the options, the configuration, the data or a checkpoint.
    """
    args = parse(options(program), argv)
    with contextlib.ExitStack() as held:
        return _train(load(args), args, held)


def _train(cfg: Any, args: argparse.Namespace, held: contextlib.ExitStack) -> Result:
    from revnets.mm import DriftHook, FiniteHook, MemoryReportHook, ResumeCheckHook, TrainingFlopsHook
    from revnets.mm.hooks.checkpoint import UnknownMetric
    from revnets.reversible import RangeError
    from revnets.training.guards.finite import NonFinite

    from .runner import Leftovers, build, first_step, progress, started

    folder = Path(cfg.work_dir)
    resumed = _resume(cfg, args, folder, held)
    _adapt(cfg, args)
    checks.check_classes(cfg)
    checks.check_save_best(cfg)
    if not args.no_check and primary():
        checks.check_data(cfg, ["train", "val"])
    checkpoint = _read_checkpoint(cfg, resumed)
    leftovers = Leftovers(folder)
    with leftovers.removed():
        runner = build(cfg, args.verbose, checked=not args.no_check)
        checks.check_neck(runner.model)
        if checkpoint is not None:
            checks.check_weights(runner.model, checkpoint, whole=resumed)
    told, memory = progress(runner), MemoryReportHook()
    for hook in (memory, FiniteHook(), DriftHook(), TrainingFlopsHook(), ResumeCheckHook()):
        if not any(isinstance(each, type(hook)) for each in runner.hooks):  # the configuration's has its own options
            runner.register_hook(hook)
    if runner.rank == 0:
        if args.overwrite and not (resumed and _lies_in(cfg.load_from or "", folder)):
            checkpoints.forget(folder, cfg.get("load_from"))
        _announce(runner, cfg, resumed)
    with noise_kept_out(args.verbose):
        try:
            with leftovers.removed(lambda: not started(runner)), first_step(runner, args.verbose):
                runner.train()
        except (NonFinite, RangeError, UnknownMetric, CaptureError) as error:
            raise UserError(f"iteration {runner.iter}: {one_line(error)}.") from error
    return _finish(runner, cfg, args, told, memory.report)


def _resume(cfg: Any, args: argparse.Namespace, folder: Path, held: contextlib.ExitStack) -> bool:
    """Takes the folder, for the first process, and sets what is to be loaded; says whether the run goes on from it."""
    again = cfg.get("resume") and not cfg.get("load_from") and not args.resume and not args.overwrite
    auto, saved = args.resume == "auto" or again, _saved_in(cfg, folder)
    if args.resume == "auto" and args.overwrite:
        raise UserError("--resume auto and --overwrite contradict each other; leave one of them out.")
    if args.resume and not auto and "load_from" in args.cfg_options:
        raise UserError(
            "--resume: it wins over load_from of --cfg-options, which has no effect; leave one of them out."
        )

    def take() -> Path | None:
        held.enter_context(FolderLock(folder, "give another --work-dir"))
        if problem := obstacle(folder, checkpoints.writes):
            raise UserError(
                f"--work-dir: {problem}, where a run has files of its own; move it away or give another folder."
            )
        return checkpoints.newest_whole(folder, saved) if auto else checkpoints.newest(folder, saved)

    connect(cfg)
    last = of_first(take)
    if auto:
        if last is None:
            _logger.info(f"--resume auto: no checkpoint in '{folder}', starting from the beginning")
        cfg.load_from, cfg.resume = str(last) if last else cfg.get("load_from"), last is not None
        return last is not None
    own = args.resume and _lies_in(args.resume, folder)
    if last is not None and not args.overwrite and not own:
        raise UserError(
            f"--work-dir: '{folder}' already holds a run; add --resume to go on with it, --overwrite to start anew, "
            "or give another folder."
        )
    if args.resume:
        cfg.load_from, cfg.resume = args.resume, True
    return bool(cfg.get("resume"))


def _saved_in(cfg: Any, folder: Path) -> Path:
    """Where the checkpoints are: as `CheckpointHook` has it, below `out_dir` where that is set."""
    out = ((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("out_dir")
    return Path(out) / folder.name if out and Path(out) != folder else folder


def _lies_in(file: str, folder: Path) -> bool:
    return os.path.dirname(os.path.realpath(file)) == os.path.realpath(folder)


def _adapt(cfg: Any, args: argparse.Namespace) -> None:
    """Puts what the command line asks for, and the resumable loop and whole checkpoints, into the configuration."""
    randomness = cfg.get("randomness") or {}
    cfg.randomness = {**randomness, "seed": randomness.get("seed", 0) if args.seed is None else args.seed}
    if args.amp:
        kept = {key: value for key, value in cfg.optim_wrapper.items() if key not in ("dtype", "loss_scale")}
        cfg.optim_wrapper = {**kept, "type": "Bf16OptimWrapper"}
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError("--auto-scale-lr: the configuration sets no auto_scale_lr.base_batch_size; set it or lr.")
        cfg.auto_scale_lr.enable = True
    if args.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard: TensorBoard is not installed: pip install tensorboard")
        visualizer = cfg.get("visualizer") or {"type": "Visualizer"}
        backends = visualizer.get("vis_backends") or [{"type": "LocalVisBackend"}]
        cfg.visualizer = {**visualizer, "vis_backends": [*backends, {"type": "TensorboardVisBackend"}]}
    if cfg.train_cfg.get("type") == "EpochBasedTrainLoop" or cfg.train_cfg.get("by_epoch"):
        kept = {key: value for key, value in cfg.train_cfg.items() if key != "by_epoch"}
        cfg.train_cfg = {**kept, "type": "ResumableTrainLoop"}
    hooks = cfg.get("default_hooks") or {}
    saving = hooks.get("checkpoint", {"type": "CheckpointHook", "interval": 1})
    elsewhere = saving and (saving.get("backend_args") or saving.get("file_client_args"))  # no local folder
    if saving and saving.get("type") == "CheckpointHook" and not elsewhere:
        saving = {**saving, "type": "WholeCheckpointHook", "interim": SAVE_EVERY}
        saving |= {} if args.save_every is None else {"interim": args.save_every}
        if not saving.get("save_best") and _measures_boxes(cfg):
            saving["save_best"] = "coco/bbox_mAP"
    elif args.save_every:
        raise UserError(
            "--save-every: it has no effect, the configuration's default_hooks.checkpoint is no CheckpointHook that "
            "saves to a local folder; leave it out."
        )
    cfg.default_hooks = {**hooks, "checkpoint": saving}


def _measures_boxes(cfg: Any) -> bool:
    evaluators = cfg.get("val_evaluator") or []
    for each in evaluators if isinstance(evaluators, list) else [evaluators]:
        metrics = each.get("metric", "bbox")
        if each.get("type") in checks.METRICS and "bbox" in ([metrics] if isinstance(metrics, str) else metrics):
            return True
    return False


def _read_checkpoint(cfg: Any, resumed: bool) -> checkpoints.Checkpoint | None:
    if not cfg.get("load_from"):
        return None
    return checkpoints.read(cfg.load_from, "--resume" if resumed else "load_from", resumed)


def _announce(runner: Any, cfg: Any, resumed: bool) -> None:
    import torch
    from mmengine.device import get_device

    model = getattr(runner.model, "module", runner.model)
    parameters = sum(p.numel() for p in model.parameters())
    backbone = cfg.model.get("backbone", {})
    names = " ".join(str(backbone[key]) for key in ("type", "model_name", "arch", "depth") if key in backbone)
    device = torch.cuda.get_device_name() if get_device() == "cuda" else get_device()
    loaded = cfg.get("load_from") or (backbone.get("init_cfg") or {}).get("checkpoint")
    start = f"starts from '{loaded}'" if loaded else "starts from random weights"
    if resumed:
        start = f"goes on from '{cfg.load_from}'"
    _logger.info(
        f"{cfg.model.type} on {names} ({parameters:,} parameters) {start}; {runner.world_size} x {device}, "
        f"{cfg.train_cfg.get('max_epochs', '?')} epochs; results in '{runner.work_dir}'"
    )


def _finish(runner: Any, cfg: Any, args: argparse.Namespace, progress: Any, memory: dict[str, Any]) -> Result:
    """Table, summary and picture, of the best weights."""
    from revnets.mm.hooks.training_flops import FLOPS

    folder = Path(runner.work_dir)
    if runner.rank != 0:
        return Result(folder, None, {}, memory)
    rows = progress.validations
    best, checkpoint = _best(runner, rows)
    metrics = {name: value for name, value in best.items() if name not in ("epoch", "iter")}
    more: dict[str, Any] = {"epoch": best.get("epoch"), "training time": clock(progress.seconds), **_megabytes(memory)}
    known = runner.message_hub.runtime_info
    flops = {name: known[name] for name in FLOPS if name in known}  # where they were counted
    more |= {f"{name.replace('_', ' ')}, T": f"{value / 1e12:.3f}" for name, value in flops.items()}
    model = getattr(runner.model, "module", runner.model)
    if checkpoint is not None:
        model.load_state_dict(checkpoints.read(checkpoint, "the best checkpoint").state)
    picture = None
    if runner.val_loop is not None:
        picture = draw(model, runner.val_dataloader.dataset, args.draw, folder)
    values = {"config": cfg.filename, "checkpoint": str(checkpoint), "best_epoch": best.get("epoch"), **metrics}
    write_summary(folder, {**values, **flops, "seconds": progress.seconds, "memory": memory, "validations": rows})
    show(f"{Path(cfg.filename).stem}, validation", metrics, more)
    _logger.info(f"weights in '{checkpoint}'" + (f", predictions drawn in '{picture}'" if picture else ""))
    return Result(folder, checkpoint, metrics, memory)


def _best(runner: Any, rows: Sequence[dict[str, float]]) -> tuple[dict[str, float], Path | None]:
    """The validation that the checkpoint hook holds for the best, and its checkpoint; else the last ones."""
    hook = next((each for each in runner.hooks if getattr(each, "save_best", None)), None)
    key = hook.key_indicators[0] if hook is not None else ""
    best = rows[-1] if rows else {}
    scored = [row for row in rows if not math.isnan(row.get(key, math.nan))]
    if hook is not None and scored:
        better = hook.is_better_than[key]
        best = functools.reduce(lambda old, new: new if better(new[key], old[key]) else old, scored)
    known = runner.message_hub.runtime_info
    found = [known.get(name) for name in ("best_ckpt", f"best_ckpt_{key}", "last_ckpt")]
    return best, next((Path(each) for each in found if each and Path(each).is_file()), None)


def _megabytes(memory: dict[str, Any]) -> dict[str, str]:
    words = {key.removesuffix("_bytes").replace("_", " "): key for key in memory if key.endswith("_bytes")}
    return {f"{name}, MB": f"{memory[key] / MB:,.1f}" for name, key in words.items()}


if __name__ == "__main__":
    sys.exit(main())
