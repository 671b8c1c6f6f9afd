"""An optimizer whose update a CUDA graph can hold: no number of it is asked for, or given, by the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...reversible import RevSequential

CHANGING = ("params", "lr", "initial_lr")  # of a group; the rest is captured as it is


def check_capturable(optimizer: torch.optim.Optimizer, watched: str = "") -> None:
    """Refuses an optimizer whose update no CUDA graph can hold.

    Args:
        optimizer: to be captured.
        watched: who may leave out an update, in words; nothing where nobody does.

    Raises:
        ValueError: naming it, and those that can.
    """
    kind = type(optimizer)
    instead = "use SGD, Adam or AdamW of torch.optim"
    if kind is not torch.optim.SGD and not all("capturable" in group for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer {kind.__name__} computes on the host what a CUDA graph would repeat unchanged (it has no "
            f"`capturable`): {instead}, or train without capture"
        )
    if watched and not _fused(optimizer):
        raise ValueError(
            f"optimizer {kind.__name__} cannot leave out an update on the device (it has no `fused`), which {watched} "
            f"needs: {instead}, or train without capture"
        )


def left_out_by(model: nn.Module) -> str:
    """What in a model may have an update left out, in words; nothing where nothing does."""
    exact = any(isinstance(m, RevSequential) and m.grid_bits is not None for m in model.modules())
    return "exact mode's range check" if exact else ""


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return all("fused" in group for group in optimizer.param_groups)


class DeviceOptimizer:
    """Steps an optimizer in a way that can be captured.

    While it steps, its groups are ``capturable``, and ``fused`` where it has that, which rounds otherwise than torch's
    default; its learning rates are numbers on the device. Between steps all is as schedulers and checkpoints know it.

    Args:
        optimizer: see ``check_capturable``.
        device: of its weights.

    Raises:
        ValueError: for an optimizer that cannot be captured.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> DeviceOptimizer(torch.optim.AdamW(layer.parameters()), torch.device("cpu")).ready
        False
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        check_capturable(optimizer)
        self.optimizer = optimizer
        self.ready = False
        """Whether it has made an update, so that all its state exists."""
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._shown: list[Any] = [None] * len(self._rates)
        self._fixed: list[dict[str, Any]] = []
        self.prepare()
        optimizer.register_load_state_dict_post_hook(lambda _: self.prepare())

    def prepare(self) -> None:
        """Brings counters to the device, where a state from elsewhere lacks them."""
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                if key == "step" or (isinstance(value, Tensor) and value.dim() == 0):
                    state[key] = torch.as_tensor(value, dtype=torch.float32, device=p.device)
        self.ready = False

    def fix(self) -> None:
        """Notes the settings that are captured now."""
        self._fixed = self._settings()

    def refusal(self) -> str:
        """What has changed in the groups that a captured step would not follow, or nothing."""
        settings = self._settings()
        if len(settings) != len(self._fixed):
            return f"the optimizer has {len(settings)} groups, where {len(self._fixed)} were captured"
        for number, (now, then) in enumerate(zip(settings, self._fixed, strict=True)):
            for key, value in then.items():
                if now.get(key) is not value and now.get(key) != value:
                    return f"{key} of the optimizer's group {number} was {value} when captured and is {now.get(key)}"
        return ""

    def show_rates(self) -> None:
        """Brings the groups' learning rates to the device, where they have changed."""
        for index, (group, rate) in enumerate(zip(self.optimizer.param_groups, self._rates, strict=True)):
            if isinstance(group["lr"], Tensor):
                rate.copy_(group["lr"], non_blocking=True)
            elif group["lr"] != self._shown[index]:
                rate.fill_(group["lr"])
                self._shown[index] = group["lr"]

    @contextmanager
    def computing(self, on_device: bool) -> Iterator[None]:
        """Within, a ``step()`` computes as it is captured.

        Args:
            on_device: a loss scaler may leave it to the optimizer to skip an update; else it asks the device first.
        """
        optimizer: Any = self.optimizer
        own, fused = [dict(group) for group in optimizer.param_groups], _fused(optimizer)
        scaling = getattr(optimizer, "_step_supports_amp_scaling", False)
        optimizer._step_supports_amp_scaling = on_device and fused
        optimizer._warned_capturable_if_run_uncaptured = True  # a first step is meant to run uncaptured
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
            if fused:
                group["fused"], group["foreach"] = True, False
        try:
            yield
        finally:
            optimizer._step_supports_amp_scaling = scaling
            for group, former in zip(optimizer.param_groups, own, strict=True):
                group.update(former)

    def step(self, bad: Tensor | None) -> None:
        """One update, without a look at the device.

        Args:
            bad: 1.0 on the device leaves it out, 0.0 does not.
        """
        optimizer: Any = self.optimizer
        if bad is None:
            optimizer.step()
            return
        optimizer.grad_scale, optimizer.found_inf = None, bad
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def inventory(self) -> set[tuple[int, str, int]]:
        """Which tensors its state consists of."""
        return {(id(p), key, id(v)) for p, state in self.optimizer.state.items() for key, v in state.items()}

    def _settings(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k not in CHANGING} for group in self.optimizer.param_groups]
