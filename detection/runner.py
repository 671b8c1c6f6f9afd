"""MMEngine's runner, quiet in the terminal, with what runs here have besides: whole checkpoints, progress, memory."""

from __future__ import annotations

import functools
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from mmdet.registry import OPTIMIZERS, VISUALIZERS
from mmengine.registry import OPTIMIZERS as TORCH_OPTIMIZERS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from revnets.mm.coco import use_checked
from revnets.mm.hooks.checkpoint import UnknownMetric
from revnets.reversible import RangeError
from revnets.training.errors import UserError, did_you_mean, one_line, refused
from revnets.training.guards.finite import NonFinite
from revnets.training.logs import start_logging

from .config import primary
from .noise import noise_kept_out
from .progress import Progress

_logger = logging.getLogger("detection")
LATE = (  # what MMEngine builds and reads only when it is about to train or test
    "build_train_loop",
    "build_val_loop",
    "build_test_loop",
    "build_optim_wrapper",
    "build_param_scheduler",
    "_init_model_weights",
    "load_or_resume",
)


def _configuring(cfg: Any) -> AbstractContextManager[None]:
    return refused(f"CONFIG: '{cfg.filename}' cannot be built", "correct it")


class Leftovers:
    """What MMEngine writes for a run before a mistake of the user's keeps it from starting; it is taken away again.

    Args:
        folder: Of the run. What is there already stays there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._there = set(folder.iterdir()) if folder.is_dir() else set()
        self._missing = [each for each in (folder, *folder.parents) if not each.exists()]

    @contextmanager
    def removed(self, before: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Around what may find a mistake.

        Args:
            before: Whether the run has not started yet when it is found.
        """
        try:
            yield
        except UserError:
            if primary() and before() and self.folder.is_dir():
                self._remove()
            raise

    def _remove(self) -> None:
        for new in set(self.folder.iterdir()) - self._there:
            shutil.rmtree(new, ignore_errors=True) if new.is_dir() and not new.is_symlink() else new.unlink()
        with suppress(OSError):  # others write there
            for each in self._missing:
                each.rmdir()
        for kind in (Visualizer, *VISUALIZERS.module_dict.values()):
            if issubclass(kind, Visualizer):
                kind._instance_dict.clear()  # the next run of this process would write into the folder that is gone


def started(runner: Runner) -> bool:
    """Whether a step of training is done; asking `runner.iter` would build the loop, which may be what fails."""
    return bool(getattr(runner._train_loop, "iter", 0) > 0)


@contextmanager
def first_step(runner: Runner, verbose: bool) -> Iterator[None]:
    """Around training: what fails before its first step is done is a mistake of the configuration that MMEngine built.

    Errors with words of their own pass: values that are not finite or out of range, and unknown metrics. So does
    everything later.

    Args:
        runner: That trains.
        verbose: Whether to show the traceback, too.
    """
    try:
        yield
    except (NonFinite, RangeError, UnknownMetric, UserError):
        raise
    except Exception as error:
        if started(runner):
            raise
        if verbose:
            _logger.error("the first step fails", exc_info=error)
        words = f"{type(error).__name__}: {one_line(error)[:400]}"
        raise UserError(
            f"CONFIG: '{runner.cfg.filename}': the first step fails ({words}); correct it, --verbose shows where."
        ) from error


class CheckedRunner(Runner):
    """Says as a user's mistake what fails before the first step."""

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """MMEngine's, which does not say which optimizer is unknown."""
        kind = optim_wrapper.get("optimizer", {}).get("type") if isinstance(optim_wrapper, dict) else None
        if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
            hint = did_you_mean(kind, TORCH_OPTIMIZERS.module_dict)
            raise UserError(f"CONFIG: '{self.cfg.filename}': there is no optimizer '{kind}'{hint}; correct its type.")
        return super().build_optim_wrapper(optim_wrapper)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """MMEngine's; what a hook refuses before the first step is a mistake of the configuration."""
        if fn_name in ("before_run", "before_train", "after_load_checkpoint"):
            with _configuring(self.cfg):
                super().call_hook(fn_name, **kwargs)
        else:
            super().call_hook(fn_name, **kwargs)


def _checked(name: str) -> Callable[..., Any]:
    plain = getattr(CheckedRunner, name)

    @functools.wraps(plain)
    def method(self: Runner, *args: Any, **kwargs: Any) -> Any:
        with _configuring(self.cfg):
            return plain(self, *args, **kwargs)

    return method


for _name in LATE:
    setattr(CheckedRunner, _name, _checked(_name))


class QuietRunner(CheckedRunner):
    """Writes its log to a file only; warnings go to the terminal, too."""

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """MMEngine's logger, with less in the terminal."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setStream(sys.stderr)  # stdout is closed to what libraries print
                handler.setLevel(max(handler.level, logging.WARNING))
                handler.addFilter(_of_interest)
        return logger


def build(cfg: Any, verbose: bool, checked: bool = True) -> Runner:
    """The runner of a configuration.

    Args:
        cfg: The configuration.
        verbose: MMEngine's whole log in the terminal.
        checked: The data were looked at, so that data sets need not report what they skip.

    Raises:
        UserError: The configuration asks for what is not there, or for what CPUs cannot do.
    """
    start_logging(primary())
    use_checked(cfg, report=not checked)
    with noise_kept_out(verbose), _configuring(cfg):
        runner = (CheckedRunner if verbose else QuietRunner).from_cfg(cfg)
    check_norms(runner.model, runner.world_size)
    return runner


def check_norms(model: nn.Module, processes: int) -> None:
    """Refuses synchronised batch norms in several processes on CPUs, as torch would in the first step.

    Raises:
        UserError: There are some.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if processes > 1 and on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            "CONFIG: torch's SyncBatchNorm needs GPUs, and these processes run on CPUs; set norm_cfg.type=BN and "
            "leave sync_bn out."
        )


def progress(runner: Runner) -> Progress:
    """Has the runner tell its progress, every so many iterations as its logger hook has it."""
    logger = (runner.cfg.get("default_hooks") or {}).get("logger") or {}
    hook = Progress(logger.get("interval", 50), runner.rank == 0)
    runner.register_hook(hook)
    return hook


def _of_interest(record: logging.LogRecord) -> bool:
    """MMEngine warns of its own use of its older names."""
    text = record.getMessage()
    return not any(word in text for word in ("FileClient", "HardDiskBackend", "is not a meta file", "simply pass"))
