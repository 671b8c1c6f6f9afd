"""From the command line to a configuration that MMEngine's Runner takes: file, overrides, folder, processes."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from revnets.training.errors import UserError, did_you_mean, one_line, refused, shown
from revnets.training.options.parsing import Parser, argument
from revnets.training.places import check_folder
from revnets.training.recipes import find

from .keys import check_keys
from .noise import noise_kept_out

try:
    from mmengine.config import Config, DictAction
except ImportError:  # said by `check_installed`, as a user's mistake
    Config, DictAction = Any, "store"

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "detection"
PATH = argument(str, path=True)
PACKAGES = ("mmengine", "mmcv", "mmdet")
PARTS = ("revnets.mm", "mmdet.datasets")  # in this order: the former stands in for operators that mmdet asks for
RUNNER_KEYS = (  # of MMEngine's Runner, which a configuration need not have
    "auto_scale_lr",
    "compile",
    "custom_hooks",
    "default_hooks",
    "find_unused_parameters",
    "load_from",
    "log_level",
    "model_wrapper_cfg",
    "randomness",
    "sync_bn",
    "visualizer",
    "work_dir",
)


def parser(prog: str, description: str) -> Parser:
    """The options that training and testing share; spelled as MMDetection's tools spell them."""
    line = Parser(prog, description=description)
    add, number = line.add_argument, functools.partial(argument, int, low=0)
    add("config", type=PATH, help="path of a configuration, or the name of one of ours")
    add("--work-dir", type=PATH, help="folder of the run (default: output/<name of the configuration>)")
    words = "values to set in the configuration; data_root=/path moves the whole data set"
    add("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE", help=words)
    add("--launcher", choices=["none", "pytorch", "slurm", "mpi"], help="default: pytorch under torchrun")
    add("--local-rank", "--local_rank", type=number(high=1 << 20), help=argparse.SUPPRESS)
    add("--draw", type=number(high=1000), default=3, metavar="N", help="images to draw predictions on (default: 3)")
    add("--no-check", action="store_true", help="do not look at all annotations and image files first")
    add("--verbose", action="store_true", help="MMEngine's whole log in the terminal, not only in its file")
    return line


def parse(line: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: An unknown option, or a KEY=VALUE that is none.
    """
    with refused("--cfg-options: not KEY=VALUE", "write for example a.b=3"):  # of DictAction
        return line.parse_args(argv)


def load(args: argparse.Namespace) -> Any:
    """The configuration, with what the command line changes in it.

    Args:
        args: Of a parser that `parser` made.

    Returns:
        MMEngine's `Config`.

    Raises:
        UserError: MMDetection is missing, no such file, a mistake in it, or an unknown key.
    """
    cfg = read(args.config)
    _override(cfg, args.cfg_options)
    name = Path(cfg.filename).stem
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("output") / name)
    try:
        check_folder(Path(cfg.work_dir))
    except ValueError as error:
        raise UserError(f"--work-dir: {error}.") from error
    _processes(cfg, args)
    return cfg


def read(path: str) -> Any:
    """A configuration file alone, by its path or, if it is one of ours, by its name.

    Raises:
        UserError: MMDetection is missing, no such file, or a mistake in it.
    """
    check_installed()
    path = str(find(path, CONFIGS, ".py", "CONFIG"))
    try:
        with noise_kept_out(verbose=False):
            for name in PARTS:
                importlib.import_module(name)
            cfg = Config.fromfile(path)
    except (Exception, SystemExit) as error:  # a configuration is a program: it may fail in any way
        raise UserError(f"CONFIG: '{path}' cannot be read ({one_line(error)}); correct it.") from error
    check_keys(cfg, path)
    return cfg


def check_installed() -> None:
    """Whether the packages are there that every configuration needs.

    Raises:
        UserError: Naming one that is not, and what installs it.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"MMDetection's {missing[0]} is not installed: pip install 'revnets[detection]'")


def _override(cfg: Any, options: dict[str, Any]) -> None:
    for key in options:
        first = key.split(".")[0]
        if first not in cfg and first not in RUNNER_KEYS:
            raise UserError(f"--cfg-options: the configuration has no '{first}'{did_you_mean(first, cfg)}; correct it.")
    old, new = cfg.get("data_root"), options.get("data_root")
    with refused(f"--cfg-options: {shown(options)} does not fit", "correct the path of the key"):
        cfg.merge_from_dict(options)
    check_keys(cfg, cfg.filename)
    if old is not None and new is not None:
        moved = _moved(cfg._cfg_dict.to_dict(), old.rstrip("/"), str(new).rstrip("/"))
        cfg.merge_from_dict({key: moved[key] for key in moved if key.endswith(("_dataloader", "_evaluator"))})


def _moved(value: Any, old: str, new: str) -> Any:
    """All paths below the old data root, below the new one."""
    if isinstance(value, dict):
        return {key: _moved(each, old, new) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, old, new) for each in value)
    if isinstance(value, str) and (value.rstrip("/") == old or value.startswith(old + "/")):
        return new + value[len(old) :]
    return value


def primary() -> bool:
    """Whether this process writes the files and the log; the first of torchrun's."""
    return int(os.environ.get("RANK", "0")) == 0


def _processes(cfg: Any, args: argparse.Namespace) -> None:
    """Starts the process group where MMEngine would insist on GPUs."""
    under_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    cfg.launcher = args.launcher or ("pytorch" if under_torchrun else "none")
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    number = {"slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}.get(cfg.launcher)
    if number is not None:
        if number not in os.environ:
            raise UserError(
                f"--launcher {cfg.launcher}: started by hand ({number} is not set); start with srun or mpirun."
            )
        os.environ["RANK"] = os.environ[number]  # as MMEngine does later; `primary` looks at it
    if cfg.launcher == "pytorch" and not under_torchrun:
        raise UserError("--launcher pytorch: started by hand; start with torchrun --nproc_per_node=N detection/...")
    if cfg.launcher != "pytorch" or torch.cuda.is_available():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    unused = cfg.get("find_unused_parameters", False)
    cfg.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
        "find_unused_parameters": unused,
    }


def connect(cfg: Any) -> None:
    """Starts the process group as MMEngine's runner would later, for what the processes decide before it is built.

    Args:
        cfg: Of `load`.
    """
    from mmengine.dist import init_dist
    from mmengine.utils.dl_utils import set_multi_processing

    if cfg.launcher == "none" or torch.distributed.is_initialized():
        return
    environment = cfg.get("env_cfg") or {}
    set_multi_processing(**environment.get("mp_cfg", {}), distributed=True)  # else init_dist has loaders spawn
    init_dist(cfg.launcher, **environment.get("dist_cfg", {}))
