"""FP8: quantisation without scales, and products of quantised matrices, real or emulated."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
"""Inputs and weights: 4 bits of exponent, 3 of mantissa, up to 448, no infinities."""

E5M2 = torch.float8_e5m2
"""Gradients of outputs: 5 bits of exponent, 2 of mantissa, up to 57344."""

BACKENDS = ("scaled_mm", "emulate")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""GPUs want every dimension of a product, and channels, to be multiples of it."""


def quantize(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Clip to the format's range, then cast: round to nearest, ties to even, subnormals kept.

    What lies outside becomes the largest finite number of its sign, infinities included; NaN stays NaN. The cast alone
    would not do: it overflows to NaN or infinity in some releases of torch and saturates in others. float64 is rounded
    to float32 on the way.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: a static factor before all that, best a power of two, which rounds nothing.

    Raises:
        TypeError: for another dtype of ``x``.

    Example:
        >>> quantize(torch.tensor([1.06, 17.0, -1e9]), torch.float8_e4m3fn).float().tolist()
        [1.0, 16.0, -448.0]
    """
    check_floating(x, "quantize")
    top = torch.finfo(dtype).max / scale
    x = x.clamp(-top, top)
    return (x if scale == 1 else x * scale).to(dtype)


def quantize_both(x: Tensor, dtype: torch.dtype, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """A matrix quantised, and its transpose; on GPUs by one kernel, which writes both contiguous.

    Products on GPUs want both operands with the summed dimension contiguous, and training needs a matrix both ways.
    Elsewhere, in compiled code (where inductor fuses what is around it) and without Triton the transpose is a view,
    which a product copies at need. The numbers are those of ``quantize`` either way.

    Args:
        x: ``(M, K)``, any strides.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: a static factor, a power of two.
        backend: of the products: the kernel serves ``"scaled_mm"``.

    Returns:
        ``(M, K)`` and ``(K, M)``.
    """
    fuses = backend == "scaled_mm" and x.device.type == "cuda" and not torch.compiler.is_compiling()
    if fuses and x.dtype != torch.float64 and (kernel := _kernel(x.device.type, x.device.index)) is not None:
        check_floating(x, "quantize_both")
        return kernel(x, dtype, scale)
    quantized = quantize(x, dtype, scale)
    return quantized, quantized.t()


@cache
def _kernel(kind: str, index: int | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The fused kernel, if it works on this device and gives the numbers of the composition; else None, and it says so.

    Tried on all codes, the ties between them, and what is beyond.
    """
    try:
        from .fp8_triton import cast_transpose

        for dtype in (E4M3, E5M2):
            codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
            values = codes[codes.isfinite()].sort().values
            values = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([torch.inf, -torch.inf])])
            x = values.repeat(6).view(6, -1).to(device=kind if index is None else f"{kind}:{index}")
            expected = quantize(x, dtype)
            for got, wanted in zip(cast_transpose(x, dtype), (expected, expected.t()), strict=True):
                if not torch.equal(got.view(torch.uint8), wanted.contiguous().view(torch.uint8)):
                    raise RuntimeError(f"its casts to {dtype} differ from torch's")
    except Exception as error:  # whatever a compiler on a user's machine may raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        warnings.warn(f"FP8 without its fused Triton kernel, so more slowly: {reason}", stacklevel=2)
        return None
    return cast_transpose


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations have the precision of their operands."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_floating(x: Tensor, who: str) -> None:
    """Raises ``TypeError`` for a tensor that FP8 cannot be made of."""
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{who}: got an input of {x.dtype}: expected float16, bfloat16, float32 or float64; "
            "convert it with .float() first"
        )


# --- products --------------------------------------------------------------------------------------------------------


def fp8_matmul(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    r"""Product of FP8 matrices: :math:`y = s \, a b^\top`, summed in float32 and rounded to ``dtype`` once.

    With ``"scaled_mm"``, dimensions that are no multiples of 16 are padded with zeros on GPUs, which changes no number.

    Args:
        a: ``(M, K)`` in FP8, any strides.
        b: ``(N, K)`` in FP8, any strides; one of the two at least is e4m3.
        scale: s.
        dtype: of the result; float64 is summed in float64 (emulation only).
        backend: ``"scaled_mm"`` or ``"emulate"``.

    Returns:
        ``(M, N)``.

    Example:
        >>> a, b = quantize(torch.ones(3, 5), E4M3), quantize(torch.full((2, 5), 2.0), E4M3)
        >>> fp8_matmul(a, b, 0.5, torch.float32, "emulate").tolist()
        [[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]
    """
    if backend == "emulate" or not (a.numel() and b.numel()):
        _count("emulate")
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(a.device):
            return (a.to(wide) @ b.to(wide).t()).mul_(scale).to(dtype)
    (m, k), n = a.shape, b.shape[0]
    if a.device.type != "cpu":
        a, b = _padded(a), _padded(b)
    _count("scaled_mm" if a.shape[0] == m and b.shape == (n, k) else "scaled_mm, padded")
    with without_autocast(a.device):  # under autocast, torch's product on CPUs rounds twice
        return _scaled_mm(a.contiguous(), b.contiguous(), scale, dtype)[:m, :n]


def _padded(x: Tensor) -> Tensor:
    """With zeros below and on the right, up to multiples of 16."""
    rows, columns = (-size % ALIGNMENT for size in x.shape)
    if not (rows or columns):
        return x
    bits = F.pad(x.view(torch.uint8), (0, columns, 0, rows))  # torch pads no FP8; zero is zero in all formats
    return bits.view(x.dtype)


def _scaled_mm(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """torch's product, by the public function where this release has it; both operands have K contiguous."""
    scale_a = torch.full((), scale, dtype=torch.float32, device=a.device)
    one = torch.ones((), dtype=torch.float32, device=a.device)
    public, kinds = getattr(F, "scaled_mm", None), getattr(F, "ScalingType", None)
    if public is None or kinds is None or a.device.type == "cpu":  # torch 2.11 has the public one for GPUs only
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=one, out_dtype=dtype)
    whole = kinds.TensorWise
    return public(a, b.t(), scale_a, whole, one, whole, output_dtype=dtype)


# --- which backend ---------------------------------------------------------------------------------------------------


def check_backend(backend: str | None) -> str | None:
    """The backend, if there is one of that name; None stands for the best on each device.

    Raises:
        ValueError: for an unknown one.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}, or None for the best")
    return backend


def check_grad_scale(scale: float | None) -> float | None:
    """The scale of gradients, if it is one; None stands for what suits their precision.

    Raises:
        ValueError: for what is no positive number.
    """
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"grad_scale={scale!r}: expected a number greater than 0, best a power of two, such as 1024")
    return scale


def resolve_backend(
    backend: str | None, device: torch.device, dtype: torch.dtype = torch.float32, quiet: bool = False
) -> str:
    """What computes FP8 products on a device.

    None means ``"scaled_mm"`` on GPUs with FP8 units, else ``"emulate"``, with one warning per kind of device: the
    numbers are those of FP8, the speed is not. float64 is emulated always, sums of FP8 units have less precision.

    Args:
        backend: asked for, or None.
        device: of the operands.
        dtype: of the result.
        quiet: do not warn.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: for ``"scaled_mm"`` on a device that has none.

    Example:
        >>> resolve_backend("emulate", torch.device("cpu"))
        'emulate'
    """
    check_backend(backend)
    if backend == "emulate" or dtype == torch.float64 or device.type == "meta":
        return "emulate"
    if backend == "scaled_mm":
        if not _offers_scaled_mm(device.type, device.index):
            raise RuntimeError(
                f"backend='scaled_mm': this torch ({torch.__version__}) multiplies no FP8 on {device}; "
                "use backend='emulate', or None to choose by device"
            )
        return "scaled_mm"
    return _best_backend(device.type, device.index, quiet)


@torch.compiler.assume_constant_result
def _best_backend(kind: str, index: int | None, quiet: bool) -> str:
    if kind != "cpu" and _multiplies_fp8(kind, index):  # torch multiplies FP8 on CPUs, but not faster than float32
        return "scaled_mm"
    if not quiet:
        _warn_of_emulation(kind)
    return "emulate"


@torch.compiler.assume_constant_result
def _offers_scaled_mm(kind: str, index: int | None) -> bool:
    return _multiplies_fp8(kind, index)


@cache
def _multiplies_fp8(kind: str, index: int | None) -> bool:
    """Whether a small product works, of the formats of the forward pass and of the backward pass."""
    device = kind if index is None else f"{kind}:{index}"
    try:
        zeros = torch.zeros(16, 16, device=device)
        operands = [quantize(zeros, dtype) for dtype in (E4M3, E5M2)]
        for a in operands:
            _scaled_mm(a, operands[0], 1.0, torch.float32)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return True


@cache
def _warn_of_emulation(kind: str) -> None:
    warnings.warn(
        f"FP8 is emulated: this {kind} device has no FP8 units that torch can use. The numbers are those of FP8, "
        "the speed is that of float32 at best (backend='emulate' says that this is intended)",
        stacklevel=2,
    )


# --- what was done ---------------------------------------------------------------------------------------------------

_PRODUCTS: Counter[str] = Counter()


def _count(kind: str) -> None:
    if not torch.compiler.is_compiling():  # compiled code keeps no count
        _PRODUCTS[kind] += 1


def fp8_products(reset: bool = False) -> dict[str, int]:
    """How many FP8 products there were so far, by how they were computed.

    Keys: ``"scaled_mm"``, ``"triton"``, either with ``", padded"`` where sizes are no multiples of 16, ``"emulate"``,
    ``"emulate, convolution"``. Compiled code is not counted.

    Args:
        reset: start again from zero afterwards.

    Example:
        >>> counts = fp8_products(reset=True)
        >>> fp8_products()
        {}
    """
    counts = dict(_PRODUCTS)
    if reset:
        _PRODUCTS.clear()
    return counts
