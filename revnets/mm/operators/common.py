"""What the stand-ins share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class MissingOperatorError(NotImplementedError):
    """An operator of mmcv that has no stand-in was called."""


def get_compiler_version() -> str:
    """What mmcv's ``collect_env`` says where nothing is compiled."""
    return "n/a"


def get_compiling_cuda_version() -> str:
    """See ``get_compiler_version``."""
    return "n/a"


def wide(x: Tensor) -> Tensor:
    """torchvision's kernels know no bfloat16, and half precision would lose pixels of a box."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def gradients(
    tensors: Sequence[Tensor], needed: Sequence[bool], function: Callable[..., Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of the needed tensors through ``function``, computed again."""
    inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
    with torch.enable_grad():
        y = function(*inputs)
    return torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.ones_like(y) if grad is None else grad)
