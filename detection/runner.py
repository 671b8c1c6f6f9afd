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

from mmdet.registry import OPTIMIZERS
from mmengine.registry import OPTIMIZERS as TORCH_OPTIMIZERS
from mmengine.runner import Runner
from torch import nn

from classification.runtime import start_logging
from detection.config import primary
from detection.noise import noise_kept_out
from detection.progress import Progress
from revnets.mm import ResumableTrainLoop
from revnets.training.errors import UserError, did_you_mean, one_line, refusals

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
    return refusals(f"CONFIG: '{cfg.filename}' cannot be built", "correct it")


@contextmanager
def nothing_left(folder: Path, before: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Takes away the logs that MMEngine makes for a run that a mistake of the user's keeps from starting.

    Args:
        folder: Of the run. What was there stays there.
        before: Whether the run has not started yet when the mistake is found.
    """
    there = set(folder.iterdir()) if folder.is_dir() else None
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except UserError:
        if primary() and before() and folder.is_dir() and not folder.is_symlink():
            for new in set(folder.iterdir()) - (there or set()):
                shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink(missing_ok=True)
            with suppress(OSError):  # others write there
                for each in made:
                    each.rmdir()
        raise


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

    def load_or_resume(self) -> None:
        """MMEngine's, and a look at whether the loop can go on from there."""
        super().load_or_resume()
        if self._resume and isinstance(self._train_loop, ResumableTrainLoop):
            try:
                self._train_loop.batches_done()
            except ValueError as error:
                raise UserError(f"--resume: {one_line(error)}.") from error


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


def build(cfg: Any, verbose: bool) -> Runner:
    """The runner of a configuration.

    Args:
        cfg: The configuration.
        verbose: MMEngine's whole log in the terminal.

    Raises:
        UserError: The configuration asks for what is not there, or for what CPUs cannot do.
    """
    start_logging(primary())
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
