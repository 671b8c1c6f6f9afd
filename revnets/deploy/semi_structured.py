"""2:4 sparsity on a GPU: ``torch.sparse.to_sparse_semi_structured`` against dense products, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from ..arguments import number, text
from ..profiling.turns import milliseconds
from ..training.errors import refused
from ..training.options.values import COUNT
from .compare import Measurement
from .graph import ExportError


def two_to_four(weight: Tensor) -> Tensor:
    """The weight with the two smallest of every four neighbours in a row set to 0.

    Args:
        weight: ``(outputs, inputs)``, inputs divisible by 4.

    Raises:
        ExportError: where they are not.

    Example:
        >>> two_to_four(torch.tensor([[1.0, -4.0, 2.0, 3.0]]))
        tensor([[ 0., -4.,  0.,  3.]])
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ExportError(f"a weight of shape {tuple(weight.shape)}: expected (outputs, inputs), inputs divisible by 4")
    groups = weight.reshape(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    return (groups * kept).reshape(weight.shape)


def is_two_to_four(weight: Tensor) -> bool:
    """Whether no four neighbours in a row hold more than two weights.

    Example:
        >>> is_two_to_four(torch.eye(4)), is_two_to_four(torch.ones(4, 4))
        (True, False)
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2


def semi_structured(model: nn.Module) -> list[str]:
    """Compress the 2:4 weights of linear layers on a GPU, in place; inference only, float16 or bfloat16.

    Returns:
        Names of the layers; others, and sizes that the format refuses, stay as they are.
    """
    done = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or not module.weight.is_cuda or not is_two_to_four(module.weight):
            continue
        try:
            compressed = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        except RuntimeError:  # sizes that are no multiples of what the tensor cores take
            continue
        module.weight = nn.Parameter(compressed, requires_grad=False)
        done.append(name)
    return done


@torch.no_grad()
def compare_semi_structured(
    widths: Sequence[int] = (1024, 2048, 4096, 8192),
    rows: int = 4096,
    dtype: torch.dtype = torch.float16,
    repeats: int = 25,
) -> list[Measurement]:
    """Time square linear layers dense and 2:4 on a GPU, by turns, medians.

    Args:
        widths: inputs and outputs of the layers.
        rows: of the input: images times pixels, or tokens.
        dtype: float16 or bfloat16.
        repeats: timed calls per case.

    Raises:
        ExportError: where there is no CUDA device.
    """
    for name, value in (*(("widths", width) for width in widths), ("rows", rows), ("repeats", repeats)):
        COUNT.check(name, value)
    if not torch.cuda.is_available():
        raise ExportError("2:4 sparsity is measured on a CUDA device, and there is none here")
    found = []
    for width in widths:
        with refused(f"{width} -> {width}, {rows} rows cannot be measured", kind=ExportError):
            x = torch.randn(rows, width, device="cuda", dtype=dtype)
            dense = nn.Linear(width, width, device="cuda", dtype=dtype)
        dense.weight.copy_(two_to_four(dense.weight))
        sparse = nn.Linear(width, width, device="cuda", dtype=dtype)
        sparse.load_state_dict(dense.state_dict())
        if not semi_structured(sparse):
            continue
        expected = dense(x)
        error = float((sparse(x) - expected).float().abs().max() / expected.float().abs().max())
        name = f"{width} -> {width}, {rows} rows"
        times = milliseconds({"dense": partial(dense, x), "2:4": partial(sparse, x)}, x.device, repeats)
        found.append(Measurement(name, 0.0, "dense", 0, times["dense"] / 1e3, 0.0))
        found.append(Measurement(name, 0.5, "2:4", 0, times["2:4"] / 1e3, 0.0, error))
    return found


def bench_two_to_four_command(
    widths: Annotated[str, text("inputs and outputs of the layers")] = "1024,2048,4096,8192",
    rows: Annotated[int, number(COUNT, "of the input: images times pixels, or tokens")] = 4096,
    repeats: Annotated[int, number(COUNT, "timed calls per case; their median counts")] = 25,
) -> None:
    """Inference time of linear layers, dense and 2:4, on a GPU: interleaved, medians."""
    from .bench_report import print_measurements

    sizes = COUNT.read_list("--widths", widths)
    print_measurements("2:4 on the GPU, float16", compare_semi_structured(sizes, rows, repeats=repeats))
