"""Masks of sparse weights: random ones with an exact count, and how a global sparsity is shared out among layers.

Pure functions of shapes; nothing here knows of layers or of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def check_sparsity(sparsity: float) -> float:
    """The sparsity as a number, once it is one that a mask can have.

    Args:
        sparsity: The share of zeros, ``s``.

    Raises:
        ValueError: if it is not a number in [0, 1).

    Example:
        >>> check_sparsity(0.75)
        0.75
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: expected a number from 0 up to, not including, 1, such as 0.75")
    return float(sparsity)


def kept(numel: int, sparsity: float) -> int:
    """How many of ``numel`` weights stay at sparsity ``s``: ``round((1 - s) * numel)``.

    Example:
        >>> kept(1000, 0.9)
        100
    """
    return round((1 - check_sparsity(sparsity)) * numel)


def mask_with_count(shape: Shape, count: int, generator: torch.Generator | None = None) -> Tensor:
    """A random mask with exactly ``count`` weights: the largest of random scores.

    Args:
        shape: Of the weight.
        count: How many are True.
        generator: Where the scores are drawn, and on which device; None is torch's own.

    Returns:
        A bool tensor of that shape.

    Example:
        >>> int(mask_with_count((4, 8), 5).sum())
        5
    """
    device = None if generator is None else generator.device
    scores = torch.rand(math.prod(shape), generator=generator, device=device)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.index_fill_(0, scores.topk(count, sorted=False).indices, True).view(*shape)


def random_mask(shape: Shape, sparsity: float, generator: torch.Generator | None = None) -> Tensor:
    """A random mask whose count is exact, ``round((1 - s) * numel)``, not one that is so on average.

    Args:
        shape: Of the weight.
        sparsity: The share of zeros, ``s``, in [0, 1).
        generator: Where the scores are drawn, and on which device; None is torch's own.

    Returns:
        A bool tensor of that shape, True where a weight stays.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> int(random_mask((16, 8, 3, 3), 0.75).sum())
        288
    """
    return mask_with_count(shape, kept(math.prod(shape), sparsity), generator)


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Densities of layers that are all equally sparse.

    Args:
        shapes: Of the weights.
        sparsity: Of all of them together, in [0, 1).

    Returns:
        A density per layer. Each is a whole number of weights divided by their number, so that all layers together
        hold exactly ``round((1 - s) * total)`` of them.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> uniform([(8, 8), (8, 16)], 0.75)
        [0.25, 0.25]
    """
    return _share_out(shapes, [1.0] * len(shapes), sparsity)


def er(shapes: Sequence[Shape], sparsity: float, power: float = 1.0) -> list[float]:
    """Densities of an Erdos-Renyi graph between channels: kernels do not count (1707.04780, as in RigL, 1911.11134).

    The density of a layer is proportional to ``((C_in + C_out) / (C_in * C_out)) ** power``: small layers stay denser.

    Args:
        shapes: Of the weights, ``(C_out, C_in, ...)``.
        sparsity: Of all of them together, in [0, 1).
        power: Of the raw probability; 0 is ``uniform``.

    Returns:
        A density per layer, exact in total as those of ``uniform``.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> er([(8, 8), (16, 16)], 0.75)
        [0.421875, 0.20703125]
    """
    return _share_out(shapes, [_raw(shape[:2]) ** power for shape in shapes], sparsity)


def erk(shapes: Sequence[Shape], sparsity: float, power: float = 1.0) -> list[float]:
    """Densities of an Erdos-Renyi graph with kernels (RigL, 1911.11134).

    The density of a layer is proportional to ``(sum of dims / number of elements) ** power``. Layers that would
    exceed 1 become dense and the rest shares what is left, until none exceeds it.

    Args:
        shapes: Of the weights, ``(C_out, C_in, k, k)`` or ``(C_out, C_in)``.
        sparsity: Of all of them together, in [0, 1).
        power: Of the raw probability; 0 is ``uniform``.

    Returns:
        A density per layer, exact in total as those of ``uniform``.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> erk([(8, 8, 1, 1), (32, 32, 3, 3)], 0.9)
        [1.0, 0.09375]
    """
    return _share_out(shapes, [_raw(shape) ** power for shape in shapes], sparsity)


DISTRIBUTIONS: Mapping[str, Callable[..., list[float]]] = {"uniform": uniform, "er": er, "erk": erk}


def densities(shapes: Sequence[Shape], sparsity: float, distribution: str = "uniform") -> list[float]:
    """Densities of layers by the name of the distribution.

    Args:
        shapes: Of the weights.
        sparsity: Of all of them together, in [0, 1).
        distribution: ``uniform``, ``er`` or ``erk``.

    Returns:
        A density per layer, exact in total.

    Raises:
        ValueError: for an unknown distribution, or a sparsity outside [0, 1).

    Example:
        >>> densities([(8, 8), (8, 16)], 0.5, "uniform")
        [0.5, 0.5]
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}")
    return DISTRIBUTIONS[distribution](shapes, sparsity)


def _raw(shape: Shape) -> float:
    return sum(shape) / max(math.prod(shape), 1)


def _share_out(shapes: Sequence[Shape], raw: Sequence[float], sparsity: float) -> list[float]:
    """Densities proportional to ``raw``, none above 1, whose counts have exactly the wanted sum."""
    sizes = [math.prod(shape) for shape in shapes]
    budget = kept(sum(sizes), sparsity)
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense]
        mass = sum(raw[i] * sizes[i] for i in rest)
        scale = (budget - sum(sizes[i] for i in dense)) / mass if mass else 0.0
        exceeding = {i for i in rest if raw[i] * scale > 1}
        if not exceeding:
            break
        dense |= exceeding
    wanted = [float(size) if i in dense else raw[i] * scale * size for i, size in enumerate(sizes)]
    counts = [min(math.floor(w), size) for w, size in zip(wanted, sizes, strict=True)]
    # What rounding down left over goes to the largest remainders.
    order = sorted(rest, key=lambda i: counts[i] - wanted[i])
    for i in [i for i in order if counts[i] < sizes[i]][: budget - sum(counts)]:
        counts[i] += 1
    for i in [i for i, n in enumerate(counts) if n == 0 < sizes[i]]:  # a layer without weights would never learn
        most = counts.index(max(counts))
        if counts[most] > 1:
            counts[most], counts[i] = counts[most] - 1, 1
    return [count / size if size else 1.0 for count, size in zip(counts, sizes, strict=True)]
