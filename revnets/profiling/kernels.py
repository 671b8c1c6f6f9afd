"""What fake tensors do not show: memory that kernels take for a moment, and ops without a fake implementation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _batch_norm_update_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


FAKE_KERNELS: dict[Any, Callable[..., Any]] = {
    # torch would run the real kernel on zeros of the same size
    aten.batch_norm_update_stats.default: _batch_norm_update_stats,
}


def temporary_bytes(func: Any, args: Any, out: Any, device: torch.device) -> int:
    """Bytes that the kernel of ``func`` allocates beside its outputs and releases before it returns.

    Args:
        func: overload of an aten op.
        args: its arguments.
        out: its outputs.
        device: where it would run.
    """
    rule = CPU_TEMPORARIES.get(func) if device.type == "cpu" else None
    return rule(args, out) if rule is not None else 0


def _second_grad_input(args: Any, out: Any) -> int:
    """The CPU kernel allocates the input's gradient twice and drops the first."""
    return out[0].nbytes if out[0] is not None else 0


CPU_TEMPORARIES: dict[Any, Callable[[Any, Any], int]] = {
    aten.native_batch_norm_backward.default: _second_grad_input,
}
