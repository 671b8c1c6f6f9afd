"""What fake tensors do not show: memory that kernels take for a moment, and ops without a fake implementation."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..reversible.operators import DECOMPOSED, ON_CUDA

aten = torch.ops.aten


def _batch_norm_update_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _batch_norm_backward(_grad: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    mask = rest[-1]
    statistics = x if weight is None else weight  # dtype of the parameters' gradients
    channels = [statistics.new_empty(x.shape[1]) if wanted else None for wanted in mask[1:]]
    return (torch.empty_like(x) if mask[0] else None), *channels


FAKE_KERNELS: dict[Any, Callable[..., Any]] = {
    # torch would run the real kernel on zeros of the same size
    aten.batch_norm_update_stats.default: _batch_norm_update_stats,
    # torch's fake one makes the input's gradient even where it is not asked for (2.15)
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}


def decomposition(func: Any, device: torch.device) -> Callable[..., Any] | None:
    """What one of our own operators calls and allocates on a device; None for any other operator."""
    return (ON_CUDA.get(func) if device.type == "cuda" else None) or DECOMPOSED.get(func)


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


def excess(*changes: int) -> int:
    """Highest running sum of allocations and releases, less what is left at the end.

    Example:
        >>> excess(10, 5, -5, 3)
        2
    """
    sums = list(itertools.accumulate(changes))
    return max(sums, default=0) - (sums[-1] if sums else 0)


# --- oneDNN's convolutions on a CPU, float32, as the profiler's [memory] events show them (torch 2.15, oneDNN 3.13) ---
#
# Contiguous tensors are copied to a layout in blocks of one vector of channels and the result is copied back;
# channels-last ones are taken as they are, only the weights are copied. Torch's own kernel for pointwise convolutions,
# which it prefers for small batches on one thread, takes anything as it is.
# Depthwise ones have kernels of their own: the gradient of wide weights, and all with much padding, goes through
# matrices, one column per pixel and thread. So does, without AVX-512, that of weights which are taller than the images.


class _Conv:
    """Bytes of a convolution's tensors: x, y, w as torch has them; xb, yb, wb in blocks; and which kernels it gets."""

    def __init__(self, x: Tensor, weight: Tensor, y: Tensor, args: Any) -> None:
        stride, padding, dilation, _transposed, _output_padding, groups = args
        kernel = max(weight.shape[2:])
        pointwise = kernel == 1 and max(stride) == 1 and groups == 1
        few, threads = x.shape[0] == 1 and x.numel() <= 20480, torch.get_num_threads()
        self.plain = pointwise and (few or (x.shape[0] < 16 and threads == 1))
        self.depthwise = groups > 1 and groups == x.shape[1]
        self.wide = self.depthwise and kernel > 3
        extent = (kernel - 1) * max(dilation) + 1
        self.by_matrices = self.depthwise and (max(padding) > 6 or max(padding) >= extent)
        own = few and groups == 1 and min(weight.shape[2:]) <= 3  # torch's kernel
        self.tall = _vector() == 8 and (weight.shape[2] - 1) * dilation[0] + 1 > x.shape[2] and not own
        self.strided = max(stride) > 1
        self.channels_last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
        self.x, self.y, self.w = (math.prod(t.shape) * 4 for t in (x, y, weight))
        self.yb, self.wb = _padded(self.y, y.shape[1]), _padded(self.w, y.shape[1])
        if groups == 1 and x.shape[1] > 3:
            self.wb = _padded(self.wb, x.shape[1])
        self.xb = _padded(self.x, x.shape[1]) if x.shape[1] > 3 else 0  # an image goes in as it is
        column = math.prod(weight.shape[2:]) * math.prod(y.shape[2:]) * 4
        self.columns = threads * column
        self.matrices = self.columns + 4 * self.w
        if _vector() == 8:
            shares = threads if self.depthwise else min(threads, x.shape[0])
            self.matrices = shares * (weight.shape[1] * column + 4 * self.w) + 256

    def ordered_copy(self, t: Tensor) -> int:
        """Bytes of the copy of a tensor that is in another layout, such as a slice of channels."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return 0 if t.is_contiguous(memory_format=layout) else math.prod(t.shape) * 4

    def forward(self) -> list[int]:
        if self.plain:
            return [self.y]
        if self.channels_last:
            return [self.y, self.wb, -self.wb]
        if self.by_matrices:
            return [self.columns, self.y, -self.columns, self.y, -self.y]
        return [self.xb, self.wb, self.yb, -self.wb, -self.xb, self.y, -self.yb]

    def input_gradient(self) -> list[int]:
        if self.plain:
            return [self.x]
        if self.channels_last:
            return [self.x, self.wb, -self.wb]
        again = [self.x, -self.x] if self.strided and not self.depthwise else []  # one more copy
        return [self.yb, self.wb, self.xb, -self.wb, -self.yb, self.x, *again, -self.xb]

    def weight_gradient(self) -> list[int]:
        if self.plain:
            return [self.w]
        if self.tall or self.by_matrices or (self.wide and not self.channels_last):
            return [self.wb, self.matrices, -self.matrices, self.w, -self.wb]
        if self.channels_last:
            scratch = self.w * _vector() ** 2 if self.wide else self.wb  # wide: dense blocks, vector x vector
            return [scratch, self.w, self.w, -self.w, -scratch]
        return [self.yb, self.xb, self.wb, -self.xb, -self.yb, self.w, -self.wb]


def _vector() -> int:
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _padded(nbytes: int, channels: int) -> int:
    """``nbytes`` of a tensor whose channels are filled up to whole vectors."""
    return nbytes // channels * (-(-channels // _vector()) * _vector())


def _by_onednn(x: Tensor, transposed: bool) -> bool:
    return x.ndim == 4 and x.dtype == torch.float32 and not transposed and torch.backends.mkldnn.is_available()


def _convolution(args: Any, out: Any) -> int:
    x, weight, _bias, *settings = args[:9]
    if not _by_onednn(x, settings[3]):
        return 0
    conv = _Conv(x, weight, out, settings)
    copies = conv.ordered_copy(x) + conv.ordered_copy(weight)
    return excess(copies, *conv.forward(), -copies)


def _convolution_backward(args: Any, out: Any) -> int:
    grad, x, weight, _sizes, *settings, needed = args[:11]
    if not _by_onednn(x, settings[3]):
        return 0
    conv = _Conv(x, weight, grad, settings)
    copies = conv.ordered_copy(grad) + conv.ordered_copy(weight) + (conv.ordered_copy(x) if needed[1] else 0)
    changes = (conv.input_gradient() if needed[0] else []) + (conv.weight_gradient() if needed[1] else [])
    return excess(copies, *changes, -copies)


# --- other kernels on a CPU -------------------------------------------------------------------------------------------


def _upsample(args: Any, out: Any) -> int:
    """Small outputs are computed channels-last, whatever the layout: both tensors are copied."""
    x = args[0]
    ordered = x.is_contiguous(memory_format=torch.channels_last)
    return 0 if ordered or sum(out.shape[2:]) > 128 else x.nbytes + out.nbytes


def _mm(args: Any, out: Any) -> int:
    """BLAS wants one stride to be 1: other matrices (an expanded gradient, that of a sum) are copied."""
    return sum(t.numel() * t.element_size() for t in args[:2] if t.numel() > 1 and 1 not in t.stride())


def _layer_norm(args: Any, out: Any) -> int:
    """Rows that do not lie one after the other are copied: of the input, in the backward pass of its gradient, too."""
    return sum(t.nbytes for t in args[:2] if isinstance(t, Tensor) and not t.is_contiguous())


def _second_grad_input(args: Any, out: Any) -> int:
    """The CPU kernel allocates the input's gradient twice and drops the first."""
    return out[0].nbytes if out[0] is not None else 0


CPU_TEMPORARIES: dict[Any, Callable[[Any, Any], int]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.native_batch_norm_backward.default: _second_grad_input,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm,
    aten.upsample_bilinear2d.default: _upsample,
    aten.mm.default: _mm,
}
