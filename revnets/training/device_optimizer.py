"""An optimizer whose update a CUDA graph can hold: no number of it is asked for, or given, by the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CHANGING = ("params", "lr", "initial_lr")  # of a group; the rest is captured as it is


class DeviceOptimizer:
    """Makes an optimizer ready to be captured, and steps it.

    Its groups become ``capturable``, and ``fused`` where it has that, which rounds otherwise than torch's default. The
    learning rates that it computes with are numbers on the device; in the groups they stay as schedulers write them.

    Args:
        optimizer: of torch, or with the same switches.
        device: of its weights.

    Raises:
        ValueError: where it has none.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> DeviceOptimizer(torch.optim.AdamW(layer.parameters()), torch.device("cpu")).skips
        True
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        kind = type(optimizer)
        if not all("capturable" in group for group in optimizer.param_groups) and kind is not torch.optim.SGD:
            raise ValueError(
                f"optimizer {kind.__name__} computes on the host what a CUDA graph would repeat unchanged (it has no "
                "`capturable`): use SGD, Adam or AdamW of torch.optim, or train without capture"
            )
        self.optimizer = optimizer
        self.skips = all("fused" in group for group in optimizer.param_groups)
        """Whether an update can be left out by a number on the device."""
        self.ready = False
        """Whether it has made an update, so that all its state exists."""
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._shown: list[Any] = [None] * len(self._rates)
        self._fixed: list[dict[str, Any]] = []
        self.prepare()
        optimizer.register_load_state_dict_post_hook(lambda _: self.prepare())

    def prepare(self) -> None:
        """Sets the switches and brings counters to the device, which a state from elsewhere lacks."""
        optimizer: Any = self.optimizer
        optimizer._warned_capturable_if_run_uncaptured = True  # a first step is meant to run uncaptured
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            if self.skips:
                group["fused"], group["foreach"] = True, False
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if key == "step" or (isinstance(value, Tensor) and value.dim() == 0):
                    state[key] = torch.as_tensor(value, dtype=torch.float32, device=p.device)
        self.ready = False
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
        """Within, a ``step()`` computes with the learning rates on the device.

        Args:
            on_device: a loss scaler may leave it to the optimizer to skip an update; else it asks the device first.
        """
        optimizer: Any = self.optimizer
        optimizer._step_supports_amp_scaling = on_device and self.skips
        former = [group["lr"] for group in optimizer.param_groups]
        try:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, lr in zip(optimizer.param_groups, former, strict=True):
                group["lr"] = lr

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
