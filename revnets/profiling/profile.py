"""Predicted and measured figures of targets, side by side."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import timm
import torch

from ..training.errors import reason, refused
from .fake import ProfileError
from .memory import StepMemory, measure_training_step
from .predict import StepPrediction, predict_training_step
from .target import Job, Setting, Target

SLOW_FLOPS = 1e12
"""Training FLOPs beyond which a step on a CPU is only measured when asked for: it takes minutes."""


@dataclass(frozen=True)
class Row:
    """What is known about one target.

    Attributes:
        target: what.
        predicted: on fake tensors.
        measured: on the device at hand, or None.
        resident_bytes: parameters, buffers, optimizer state and input of the measured step.
        note: why it was not measured.
        seconds: that the prediction took.
    """

    target: Target
    predicted: StepPrediction
    seconds: float
    measured: StepMemory | None = None
    resident_bytes: int = 0
    note: str = ""

    @property
    def measured_bytes(self) -> int | None:
        """Measured peak of allocated bytes, all included."""
        return None if self.measured is None else self.measured.peak_bytes + self.resident_bytes

    @property
    def error(self) -> float | None:
        """Predicted over measured peak, less 1."""
        return None if self.measured_bytes is None else self.predicted.peak_bytes / self.measured_bytes - 1


def predict(target: Target, setting: Setting) -> StepPrediction:
    """The prediction for a target.

    Raises:
        ProfileError: one sentence that names the target.
    """
    optimizer = setting.make_optimizer if setting.optimizer is not None else None
    try:
        try:
            job = target.build(setting, "meta")
        except (NotImplementedError, RuntimeError):  # its constructor looks at values
            job = target.build(setting, "cpu")
        except ProfileError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            job = target.build(setting, "cpu")
        return predict_training_step(job.model, job.x, job.loss_fn, optimizer, setting.device)
    except ProfileError as error:
        message = str(error)
        raise ProfileError(message if target.name in message else f"{target} cannot run: {message}") from error
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        raise ProfileError(f"{target} cannot run: {reason(error)}") from error


def profile(target: Target, setting: Setting, measure: bool | None = None) -> Row:
    """Predict a step of ``target`` and, where that is possible, measure it.

    Args:
        target: what.
        setting: how.
        measure: True, False, or None: if it takes seconds.

    Raises:
        ProfileError: one sentence.
    """
    start = time.perf_counter()
    predicted = predict(target, setting)
    seconds = time.perf_counter() - start
    note = "not asked for" if measure is False else reason_not_to_measure(predicted, setting, measure is True)
    if note:
        return Row(target, predicted, seconds, note=note)
    repeats = 1 if predicted.training_flops > SLOW_FLOPS else 3
    measured, resident = measured_step(target, setting, repeats)
    return Row(target, predicted, seconds, measured, resident)


def measured_step(target: Target, setting: Setting, repeats: int = 3) -> tuple[StepMemory, int]:
    """A step of ``target`` on the setting's device, and the bytes of what is there before it.

    Args:
        target: what.
        setting: how.
        repeats: timed steps.

    Raises:
        ProfileError: one sentence that names the target.
    """
    job = target.build(setting, setting.device)
    optimizer = setting.make_optimizer(job.model) if setting.optimizer is not None else None
    with refused(f"{target} cannot run", kind=ProfileError):
        measured = measure_training_step(job.model, job.x, job.loss_fn, optimizer, repeats)
    return measured, resident_bytes(job, optimizer)


def resident_bytes(job: Job, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of parameters, buffers, input and optimizer state."""
    state = [v for s in (optimizer.state.values() if optimizer is not None else ()) for v in s.values()]
    tensors = [*job.model.parameters(), *job.model.buffers(), job.x, *(v for v in state if torch.is_tensor(v))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def reason_not_to_measure(predicted: StepPrediction, setting: Setting, forced: bool) -> str:
    """Why a step cannot or should not run here; empty if it can."""
    device = torch.device(setting.device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        return f"no {device.type} here"
    if predicted.peak_bytes > 0.9 * free_bytes(device):
        return f"needs more than the {free_bytes(device) / 1e9:.1f} GB free here"
    if device.type == "cpu" and predicted.training_flops > SLOW_FLOPS and not forced:
        return "slow here: --measure does it"
    return ""


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses now."""
    if device.type != "cpu":
        return torch.get_device_module(device).mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def recomputation(rows: Sequence[Row]) -> dict[Target, float]:
    """Training FLOPs of each row relative to storing everything, where that row is there."""
    stored = {r.target: r for r in rows if r.target.mode == "store"}
    found = {}
    for row in rows:
        base = stored.get(replace(row.target, mode="store"))
        if base is not None and base.predicted.training_flops:
            found[row.target] = row.predicted.training_flops / base.predicted.training_flops
    return found


def describe(setting: Setting) -> str:
    """The machine, versions and settings, in words, to stand beside every figure."""
    device = torch.device(setting.device)
    where = setting.device
    if device.type == "cpu":
        where = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    elif torch.get_device_module(device).is_available():
        where = torch.get_device_module(device).get_device_name(device)
    precision = f"{setting.amp_dtype} autocast" if setting.amp_dtype else "float32"
    layout = "channels-last" if setting.channels_last else "contiguous"
    optimizer = setting.optimizer or "no optimizer"
    return (
        f"{where}, torch {torch.__version__}, timm {timm.__version__}, {precision}, {layout}, {optimizer}, "
        f"exact={setting.exact}, {time.strftime('%Y-%m-%d')}"
    )
