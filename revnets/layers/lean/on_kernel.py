"""The operators of ``ops.py`` on the C++ kernel: norms that were told to be computed there, where it serves.

Each is a pass or two over the maps where torch's own kernels in a row take five to ten, and as many calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.norms import NAMES, Norm, grads, measured, measured_means, norm_serves, normed, plane_sums
from ...reversible.operators import calls
from .ops import NORM, Gate, Running, gate_grads, gate_of


class KernelCalls:
    """Operators by name, with the arguments and results that ``ops.py`` describes."""

    @staticmethod
    def batch_norm_act_(*batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        norm, value = measured(*batch[:5])
        _move(norm, Running(*batch[5:]))
        return value, norm.mean, norm.var

    @staticmethod
    def batch_norm_act_se_(*arguments: Any) -> tuple[Tensor, ...]:
        batch, layers = arguments[: -len(Gate._fields)], arguments[-len(Gate._fields) :]
        norm, pooled = measured_means(*batch[:5])
        _move(norm, Running(*batch[5:]))
        gate = gate_of(pooled, *layers)
        return normed(norm, gate), norm.mean, norm.var, pooled, gate

    @staticmethod
    def norm_act(*norm: Any) -> Tensor:
        return normed(Norm(*norm))

    @staticmethod
    def norm_act_gated(*arguments: Any) -> Tensor:
        *norm, gate = arguments
        return normed(Norm(*norm), gate)

    @staticmethod
    def norm_act_again(*arguments: Any) -> tuple[Tensor, Tensor]:
        """As on CUDA, the norm's own output is left empty."""
        norm = Norm(*arguments[:NORM])
        return norm.x[:0], normed(norm, arguments[NORM])

    @staticmethod
    def norm_act_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
        return _needed(grads(grad, Norm(*arguments[:NORM]), arguments[NORM][0]), arguments[NORM])

    @staticmethod
    def norm_act_backward_(grad: Tensor, *arguments: Any) -> list[Tensor]:
        needed = arguments[-1]
        found = grads(grad, Norm(*arguments[:NORM]), needed[0], owned=True)
        return [g for g in _needed(found, needed) if g is not grad]

    @staticmethod
    def norm_act_se_backward_(grad: Tensor, *arguments: Any) -> list[Tensor]:
        norm, (_, gate, pooled, *layers, needed) = Norm(*arguments[:NORM]), arguments[NORM:]
        of_mean, *of_weights = gate_grads(plane_sums(norm, grad), gate, pooled, *layers)
        pixels = norm.x.shape[2] * norm.x.shape[3]
        found = grads(grad, norm, needed[0], gate, of_mean / pixels, owned=True)
        return [*of_weights, *(g for g in _needed(found, needed) if g is not grad)]


def calls_for(norm: Any, act: str, x: Tensor) -> Any:
    """The operators of a norm that is followed by the activation of this name."""
    if not getattr(norm, "sparse_kernel", False) or act not in NAMES or not norm_serves(x, norm.weight, norm.bias):
        return calls
    return KernelCalls


def _move(norm: Norm, running: Running) -> None:
    """Running statistics towards those of the batch; as with torch's norm, without a new version of them."""
    running.batches.add_(1)
    pixels = norm.x.numel() // norm.x.shape[1]
    with torch.autograd._unsafe_preserve_version_counter((running.mean, running.var)):
        running.mean.lerp_(norm.mean.to(running.mean.dtype), running.momentum)
        running.var.lerp_((norm.var * (pixels / (pixels - 1))).to(running.var.dtype), running.momentum)


def _needed(found: tuple[Tensor | None, ...], needed: Any) -> list[Tensor]:
    return [g for g, wanted in zip(found, needed, strict=True) if wanted and g is not None]
