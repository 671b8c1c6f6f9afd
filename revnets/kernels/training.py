"""The kernel in training: 1x1 convolutions and linear layers whose passes touch the non-zeros only."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .build import CallStruct, Geometry, GradStruct, PixelStruct, kernel_problem, load_kernel, warn_of_dense_path
from .calls import chunk_size, in_chunks
from .compressed import MAX_COLUMNS, compress
from .layouts import by_pixel, check_images, images_by_pixel, is_channels_last, like, pixels, sums
from .operands import call, pointing, readable

MAX_DENSITY = 0.5  # above it torch's dense kernels are about as fast
MIN_PRODUCTS = (
    2**20
)  # of a dense layer in its forward pass: below, what it costs to call the kernel is more than it saves


@dataclass(frozen=True)
class Compressed:
    """Where the non-zeros of a 1x1 convolution are, in the order in which the kernel reads them.

    Attributes:
        in_channels: of the convolution.
        out_channels: likewise.
        groups: likewise.
        columns: int16, input channel within its chunk.
        rows: int32, where each output channel's non-zeros of each chunk begin, and the end.
        chunk: input channels of a group that are read at a time.
    """

    in_channels: int
    out_channels: int
    groups: int
    columns: Tensor
    rows: Tensor
    chunk: int

    @classmethod
    def of(cls, matrix: Tensor, groups: int) -> tuple[Compressed, Tensor]:
        """From an int32 matrix ``(C_out, C_in / groups)`` with 0 where there is no weight, else any number.

        Returns:
            Itself, and those numbers in its order.
        """
        kept = matrix != 0
        _, columns, rows = compress(kept)
        numbers, (outputs, inputs) = matrix[kept], matrix.shape
        chunk = chunk_size(inputs, len(numbers) / max(matrix.numel(), 1))
        if chunk < inputs:
            numbers, columns, rows = in_chunks(numbers, columns, rows, chunk, -(-inputs // chunk))
        return cls(inputs * groups, outputs, groups, columns, rows, chunk), numbers

    def convolve(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of ``(N, C_in, H, W)`` with these values of the non-zeros, in the same memory layout."""
        n, channels, height, width = x.shape
        if channels != self.in_channels:
            raise ValueError(f"input of {channels} channels: the sparse layer expects {self.in_channels}")
        values = readable("values", values, numel=len(self.columns))
        bias = None if bias is None else readable("bias", bias, numel=self.out_channels)
        if by_pixel(x):
            return self._by_pixel(x, values, bias)
        x = readable("input", x)
        y = x.new_empty(n, self.out_channels, height, width)
        sizes = (n, self.in_channels, height, width, self.out_channels, height, width)
        tensors = (x, values, self.columns, self.rows, bias, None, y, None, None)
        struct = pointing(CallStruct, tensors, *sizes, 1, 1, 1, 1, 0, 0, 1, 1, self.groups, chunk=self.chunk)
        if y.numel():
            call(load_kernel().revnets_run, ctypes.byref(struct), 1, torch.get_num_threads(), None)
        return y

    def _by_pixel(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        shape = (len(x), self.out_channels, *x.shape[2:])
        y = images_by_pixel(x, shape) if is_channels_last(x) else x.new_empty(shape)
        x = readable("input", pixels(x))
        sizes = (x.numel() // self.in_channels, self.in_channels, self.out_channels, self.groups, self.chunk)
        struct = pointing(PixelStruct, (x, values, self.columns, self.rows, bias, pixels(y)), *sizes)
        call(load_kernel().revnets_pixels, ctypes.byref(struct), torch.get_num_threads())
        return y


class Structure:
    """What the kernel has to know of a mask, for the convolution and for its transpose.

    Args:
        mask: bool, ``(C_out, C_in / groups, ...)``, on the CPU; further sizes are 1.
        groups: of the convolution.

    Raises:
        ValueError: for a mask that is not bool on the CPU, or that does not divide into the groups.

    Attributes:
        density: share of True.
        places: int32, where the non-zeros are in the flattened weight, in the order of their values.
        geometry: of the convolution.
        verdicts: whether it pays, by kind of input: see ``breakeven.pays``.

    Example:
        >>> structure = Structure(torch.tensor([[True, False], [True, False]]))
        >>> structure.density, structure.places.tolist()
        (0.5, [0, 2])
    """

    geometry: Geometry
    verdicts: dict[tuple[Any, ...], bool]

    def __init__(self, mask: Tensor, groups: int = 1) -> None:
        self._check_mask(mask)
        outputs, inputs = mask.shape[:2]
        if groups < 1 or outputs % groups:
            raise ValueError(f"{groups} groups of {outputs} outputs: expected whole ones")
        mask = readable("mask", mask.detach(), torch.bool)
        matrix = mask.reshape(outputs, inputs)
        places = torch.arange(1, matrix.numel() + 1, dtype=torch.int32, device=mask.device).view_as(matrix) * matrix
        self.geometry, self.verdicts = Geometry(inputs * groups, outputs, groups=groups), {}
        self._forward, found = Compressed.of(places, groups)
        self.places = found - 1
        self._numel = mask.numel()
        self.density = len(found) / max(mask.numel(), 1)
        ranks = torch.zeros(matrix.numel(), dtype=torch.int32, device=mask.device)
        ranks[self.places.long()] = torch.arange(1, len(found) + 1, dtype=torch.int32, device=mask.device)
        turned = ranks.view(groups, -1, inputs).transpose(1, 2).reshape(groups * inputs, -1)
        self._transposed, found = Compressed.of(turned, groups)
        self._order = found - 1

    @staticmethod
    def _check_mask(mask: Tensor) -> None:
        if mask.dtype is not torch.bool or not mask.is_cpu or mask.dim() < 2:
            raise ValueError(
                f"a mask of {mask.dtype} and shape {tuple(mask.shape)} on {mask.device}: expected torch.bool on cpu, "
                "(C_out, C_in / groups, ...); convert it by .bool()"
            )

    def values(self, weight: Tensor) -> Tensor:
        """The weights that stay, in the kernel's order.

        Raises:
            ValueError: for a weight of another size than the mask.
        """
        self._check_size(weight.numel())
        return gathered(readable("weight", weight), self.places)

    def convolve(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H, W)`` in the same memory layout.

        Raises:
            ValueError: for other numbers of dimensions, channels or values, other types, another device.
        """
        check_images(x)
        return self._forward.convolve(x, values, bias)

    def grads(
        self,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor,
        shape: torch.Size,
        needed: Sequence[bool],
        size: torch.Size | None = None,
        last: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias, where they are needed.

        Args:
            grad: of the output, ``(N, C_out, H, W)``.
            x: ``(N, C_in, H, W)``; read for the weight's gradient only.
            values: see ``values()``.
            shape: of the weight, whose gradient is 0 where the mask is False.
            needed: three.
            size: of the input, where there is no x.
            last: likewise whether it was channels last.

        Raises:
            ValueError: for tensors that do not belong together.
        """
        check_images(grad)
        values = readable("values", values, numel=len(self.places))
        grad = like(grad, x)
        grad_x = grad_weight = None
        if needed[0]:
            grad_x = self._transposed.convolve(grad, gathered(values, self._order), None)
        if needed[1] and x is not None:
            grad_weight = self._weight_grad(x, grad, shape)
        return grad_x, grad_weight, sums(grad) if needed[2] else None

    def _weight_grad(self, x: Tensor, dy: Tensor, shape: torch.Size) -> Tensor:
        """Sums are made in one order, whatever the number of threads."""
        f = self._forward
        n, *size = len(x), *x.shape[2:]
        self._check_size(math.prod(shape))
        for name, found, channels in (("input", x, f.in_channels), ("gradient", dy, f.out_channels)):
            if found.shape != (n, channels, *size):
                raise ValueError(f"{name} of shape {tuple(found.shape)}: expected {(n, channels, *size)}")
        last = by_pixel(dy)
        if last:
            x, dy = pixels(x), pixels(dy)
        x, dy = readable("input", x), readable("gradient", dy)
        gradient, sums = dy.new_empty(shape), dy.new_empty(len(self.places))
        sizes = (n, f.in_channels, f.out_channels, size[0] * size[1], f.groups, f.chunk, last)
        struct = pointing(GradStruct, (x, dy, f.columns, f.rows, self.places, gradient), *sizes)
        call(load_kernel().revnets_weight_grad, ctypes.byref(struct), sums, torch.get_num_threads())
        return gradient

    def _check_size(self, numel: int) -> None:
        if numel != self._numel:
            raise ValueError(f"a weight of {numel} numbers: expected {self._numel}, those of the mask")


def gathered(numbers: Tensor, places: Tensor) -> Tensor:
    """Some of the float32 numbers of a contiguous tensor, by int32 places in it, which nobody checks.

    Example:
        >>> gathered(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0], dtype=torch.int32))
        tensor([3., 1.])
    """
    found = numbers.new_empty(len(places))
    call(load_kernel().revnets_gather, numbers, places, len(places), found, torch.get_num_threads())
    return found


class _SparseConv(torch.autograd.Function):
    """Keeps the input and the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, structure: Structure) -> Tensor:
        values = structure.values(weight.detach())
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
        ctx.structure, ctx.shape, ctx.input = structure, weight.shape, (x.shape, is_channels_last(x))
        return structure.convolve(x, values, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, values = ctx.saved_tensors
        return *ctx.structure.grads(grad, x, values, ctx.shape, ctx.needs_input_grad, *ctx.input), None


def sparse_conv(x: Tensor, weight: Tensor, bias: Tensor | None, structure: Structure) -> Tensor:
    """``conv2d(x, weight * mask, bias)`` of a 1x1 convolution, with its gradients; differentiable once.

    Args:
        x: ``(N, C_in, H, W)``, float32 on the CPU, contiguous or channels last; the output is laid out alike.
        weight: ``(C_out, C_in / groups, 1, 1)``; what it holds where the mask is False has no effect.
        bias: ``(C_out,)`` or None.
        structure: of the mask.

    Raises:
        KernelUnavailable: where there is no compiler.
        ValueError: for tensors of other sizes or types.

    Example:
        >>> mask = torch.tensor([[True, False]])
        >>> sparse_conv(torch.ones(1, 2, 1, 1), torch.tensor([[2.0, 3.0]]), None, Structure(mask)).flatten()
        tensor([2.])
    """
    y: Tensor = _SparseConv.apply(x, weight, bias, structure)
    return y


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, structure: Structure) -> Tensor:
    """``linear(x, weight * mask, bias)``, as ``sparse_conv``.

    Args:
        x: ``(..., in_features)``, float32 on the CPU.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        structure: of the mask.

    Raises:
        KernelUnavailable: where there is no compiler.

    Example:
        >>> mask = torch.tensor([[True, False]])
        >>> sparse_linear(torch.ones(3, 2), torch.tensor([[2.0, 3.0]]), None, Structure(mask)).flatten()
        tensor([2., 2., 2.])
    """
    y = sparse_conv(x.reshape(-1, x.shape[-1], 1, 1), weight, bias, structure)
    return y.view(*x.shape[:-1], -1)


class StructureCache:
    """The structure of a mask that may change, made anew when it has.

    Seen are another tensor and changes in place, but for those through ``mask.data``. Where ``torch.distributed`` is in
    use the mask is compared every time: what it receives (``broadcast(mask)``, the buffers that
    ``DistributedDataParallel`` sends in every step) does not count as a change.

    Args:
        settings: of the layer, kept as they are: for others another cache is made.
    """

    def __init__(self, settings: Any = ()) -> None:
        self.settings = settings
        self._mask: Tensor | None = None
        self._version = 0
        self._known: Tensor | None = None
        self._structure: Structure | None = None

    def of(self, mask: Tensor, make: Callable[[Tensor], Structure]) -> Structure:
        """The structure of the mask as it is now, which a function makes of it."""
        uncounted = mask.is_inference() or (dist.is_available() and dist.is_initialized())
        version = -1 if uncounted else mask._version
        if self._structure is None or mask is not self._mask or version != self._version or version < 0:
            if self._structure is None or self._known is None or not _equal(self._known, mask):
                self._known, self._structure = mask.clone(), make(mask)
            self._mask, self._version = mask, version
        return self._structure


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two masks are the same: eight numbers at a time where that can be, in a seventh of the time."""
    whole = all(t.is_contiguous() and t.numel() % 8 == 0 and t.storage_offset() % 8 == 0 for t in (a, b))
    if whole and a.dtype == b.dtype == torch.bool and a.shape == b.shape:
        a, b = a.view(-1).view(torch.int64), b.view(-1).view(torch.int64)
    return torch.equal(a, b)


def kernel_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``sparse_conv`` computes what torch would here: plain float32 tensors on the CPU, nothing that looks on.

    Not under autocast, ``torch.compile``, ``torch.func`` and forward-mode gradients, not while operators are recorded
    or counted, and not without a compiler, of which a warning tells.
    """
    return type(x) is Tensor and x.numel() > 0 and serves(x, weight, *(() if bias is None else (bias,)))


def serves(*tensors: Tensor) -> bool:
    """Whether all are plain float32 tensors on the CPU, and nothing looks on: see ``kernel_serves``."""
    plain = all(type(t) in (Tensor, Parameter) and _is_plain(t) for t in tensors)
    return plain and not _watched() and _available()


def kernel_fits(weight: Tensor) -> bool:
    """Whether the kernel's numbers can count the weights of a layer."""
    return weight.numel() < 2**31 and max(weight.shape[:2]) <= MAX_COLUMNS


def _is_plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_cpu


def _watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _available() -> bool:
    if kernel_problem() is None:
        return True
    warn_of_dense_path()
    return False
