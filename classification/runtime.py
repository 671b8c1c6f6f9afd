"""The device, the processes and the precision of a run, and how much memory it used at most."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from timm.utils import NativeScaler, distribute_bn, init_distributed_device
from torch import Tensor, nn

from revnets.training.errors import UserError, one_line, refused
from revnets.training.logs import start_logging

from .options import DeviceOptions


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and how the tensors are computed."""

    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    amp_dtype: torch.dtype | None  # None: no mixed precision
    memory_format: torch.memory_format

    @property
    def distributed(self) -> bool:
        """Whether there are several processes."""
        return self.world_size > 1

    @property
    def primary(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision of the run, on whatever device it is."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def scaler(self) -> NativeScaler | None:
        """timm's loss scaler; only float16 needs one."""
        return NativeScaler(device=self.device.type) if self.amp_dtype is torch.float16 else None

    def place(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Brings a batch to the device, in the memory layout of the run."""
        images = images.to(self.device).contiguous(memory_format=self.memory_format)
        return images, target.to(self.device)

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over all processes."""
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def share_statistics(self, module: nn.Module, how: str) -> None:
        """Gives every process the same running statistics.

        Args:
            module: Model or EMA of it; its `running_mean` and `running_var` are changed.
            how: `reduce`, their mean over the processes; `broadcast`, those of the first; `none`.
        """
        if not self.distributed or how == "none":
            return
        if how == "broadcast":
            distribute_bn(module, self.world_size)
            return
        for name, buffer in module.named_buffers():
            if "running_mean" in name or "running_var" in name:
                # In float64 the mean of equal float32 numbers is that number: who resumes in a validation, where they
                # are shared already, shares them again and has the same bits, with 5 processes, too.
                total = buffer.double()
                torch.distributed.all_reduce(total)
                buffer.copy_(total / self.world_size)

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_runtime(options: DeviceOptions) -> Runtime:
    """Sets up logging, the device and, under torchrun, the processes.

    Args:
        options: Device and precision.

    Raises:
        UserError: The device does not exist here.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args = SimpleNamespace(device=name)
    with refused(f"--device: '{name}' cannot be used here", "give cpu or one that exists"):
        if torch.device(name).type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        if torch.device(name).type == "cpu" and name != "cpu":
            raise RuntimeError("there is one CPU device, which has no number")
        if float(torch.ones(2, device=name).sum()) != 2:  # `meta` has no values
            raise RuntimeError("it computes nothing")
    try:
        device = init_distributed_device(args)
    except torch.distributed.DistError:
        raise
    except Exception as error:
        raise UserError(
            f"processes: the group of '{name}' cannot be started ({one_line(error)}); start them with torchrun, or "
            "unset RANK and WORLD_SIZE."
        ) from error
    start_logging(primary=args.rank == 0)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    amp_dtype = None
    if options.amp:
        usual = "float16" if device.type == "cuda" else "bfloat16"
        amp_dtype = getattr(torch, options.amp_dtype or usual)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return Runtime(device, args.rank, args.local_rank, args.world_size, amp_dtype, layout)
