"""Masks of sparse weights: random ones with an exact count, and how a global sparsity is shared out among layers.

Pure functions of shapes; nothing here knows of layers or of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .blocks import block_of, shape_of_blocks, spread

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


def kept(numel: int, sparsity: float, block: int = 1) -> int:
    """How many of ``numel`` weights stay at sparsity ``s``: ``round((1 - s) * numel)``; of blocks, whole ones.

    Example:
        >>> kept(1000, 0.9), kept(1000, 0.9, block=8)
        (100, 96)
    """
    return block * round((1 - check_sparsity(sparsity)) * numel / block)


def mask_with_count(shape: Shape, count: int, generator: torch.Generator | None = None, block: int = 1) -> Tensor:
    """A random mask with exactly ``count`` weights: the largest of random scores.

    Args:
        shape: Of the weight.
        count: How many are True; of blocks, a multiple of their size.
        generator: Where the scores are drawn, and on which device; None is torch's own.
        block: How many input channels of an output are zero together.

    Returns:
        A bool tensor of that shape.

    Example:
        >>> int(mask_with_count((4, 8), 5).sum())
        5
    """
    if block > 1:
        return spread(mask_with_count(shape_of_blocks(shape, block), count // block, generator), block)
    device = None if generator is None else generator.device
    scores = torch.rand(math.prod(shape), generator=generator, device=device)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.index_fill_(0, scores.topk(count, sorted=False).indices, True).view(*shape)


def random_mask(
    shape: Shape, sparsity: float, generator: torch.Generator | None = None, pattern: str | None = None
) -> Tensor:
    """A random mask whose count is exact, ``round((1 - s) * numel)``, not one that is so on average.

    With a pattern it is the number of blocks that is exact in this way.

    Args:
        shape: Of the weight.
        sparsity: The share of zeros, ``s``, in [0, 1).
        generator: Where the scores are drawn, and on which device; None is torch's own.
        pattern: ``4x1``: zeros in blocks of four input channels; None: single ones.

    Returns:
        A bool tensor of that shape, True where a weight stays.

    Raises:
        ValueError: if the sparsity is outside [0, 1), or input channels make no whole blocks.

    Example:
        >>> int(random_mask((16, 8, 3, 3), 0.75).sum())
        288
        >>> random_mask((1, 8), 0.5, pattern="4x1").unflatten(1, (2, 4)).all(2).sum()
        tensor(1)
    """
    block = block_of(pattern)
    return mask_with_count(shape, kept(math.prod(shape), sparsity, block), generator, block)


def uniform(shapes: Sequence[Shape], sparsity: float, *, blocks: Sequence[int] | None = None) -> list[float]:
    """Densities of layers that are all equally sparse.

    Args:
        shapes: Of the weights.
        sparsity: Of all of them together, in [0, 1).
        blocks: Of each layer, how many weights stay or go together; None: single ones.

    Returns:
        A density per layer. Each is a whole number of weights divided by their number, so that all layers together
        hold exactly ``round((1 - s) * total)`` of them; with blocks, whole blocks, and as many as fit into that.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> uniform([(8, 8), (8, 16)], 0.75)
        [0.25, 0.25]
    """
    return _share_out(shapes, [1.0] * len(shapes), sparsity, blocks)


def er(
    shapes: Sequence[Shape], sparsity: float, power: float = 1.0, *, blocks: Sequence[int] | None = None
) -> list[float]:
    """Densities of an Erdos-Renyi graph between channels: kernels do not count (1707.04780, as in RigL, 1911.11134).

    The density of a layer is proportional to ``((C_in + C_out) / (C_in * C_out)) ** power``: small layers stay denser.

    Args:
        shapes: Of the weights, ``(C_out, C_in, ...)``.
        sparsity: Of all of them together, in [0, 1).
        power: Of the raw probability; 0 is ``uniform``.
        blocks: As ``uniform`` has it.

    Returns:
        A density per layer, exact in total as those of ``uniform``.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> er([(8, 8), (16, 16)], 0.75)
        [0.421875, 0.20703125]
    """
    return _share_out(shapes, [_raw(shape[:2]) ** power for shape in shapes], sparsity, blocks)


def erk(
    shapes: Sequence[Shape], sparsity: float, power: float = 1.0, *, blocks: Sequence[int] | None = None
) -> list[float]:
    """Densities of an Erdos-Renyi graph with kernels (RigL, 1911.11134).

    The density of a layer is proportional to ``(sum of dims / number of elements) ** power``. Layers that would
    exceed 1 become dense and the rest shares what is left, until none exceeds it.

    Args:
        shapes: Of the weights, ``(C_out, C_in, k, k)`` or ``(C_out, C_in)``.
        sparsity: Of all of them together, in [0, 1).
        power: Of the raw probability; 0 is ``uniform``.
        blocks: As ``uniform`` has it.

    Returns:
        A density per layer, exact in total as those of ``uniform``.

    Raises:
        ValueError: if the sparsity is outside [0, 1).

    Example:
        >>> erk([(8, 8, 1, 1), (32, 32, 3, 3)], 0.9)
        [1.0, 0.09375]
    """
    return _share_out(shapes, [_raw(shape) ** power for shape in shapes], sparsity, blocks)


DISTRIBUTIONS: Mapping[str, Callable[..., list[float]]] = {"uniform": uniform, "er": er, "erk": erk}


def densities(
    shapes: Sequence[Shape], sparsity: float, distribution: str = "uniform", *, blocks: Sequence[int] | None = None
) -> list[float]:
    """Densities of layers by the name of the distribution.

    Args:
        shapes: Of the weights.
        sparsity: Of all of them together, in [0, 1).
        distribution: ``uniform``, ``er`` or ``erk``.
        blocks: Of each layer, how many weights stay or go together; None: single ones.

    Returns:
        A density per layer, exact in total; see ``uniform``.

    Raises:
        ValueError: for an unknown distribution, or a sparsity outside [0, 1).

    Example:
        >>> densities([(8, 8), (8, 16)], 0.5, "uniform")
        [0.5, 0.5]
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}")
    return DISTRIBUTIONS[distribution](shapes, sparsity, blocks=blocks)


def _raw(shape: Shape) -> float:
    return sum(shape) / max(math.prod(shape), 1)


def _share_out(
    shapes: Sequence[Shape], raw: Sequence[float], sparsity: float, blocks: Sequence[int] | None
) -> list[float]:
    """Densities proportional to ``raw``, none above 1, whose counts have exactly the wanted sum of whole blocks."""
    sizes = [math.prod(shape) for shape in shapes]
    blocks = blocks or [1] * len(sizes)
    budget = kept(sum(sizes), sparsity, max(blocks, default=1) if len(set(blocks)) == 1 else 1)
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
    counts = [min(of * math.floor(w / of), n) for w, n, of in zip(wanted, sizes, blocks, strict=True)]
    # What rounding down left over goes to the largest remainders.
    left = budget - sum(counts)
    for i in sorted(rest, key=lambda i: counts[i] - wanted[i]):
        if counts[i] < sizes[i] and blocks[i] <= left:
            counts[i], left = counts[i] + blocks[i], left - blocks[i]
    for i in [i for i, n in enumerate(counts) if n == 0 < sizes[i]]:  # a layer without weights would never learn
        most = counts.index(max(counts))
        some = max(blocks[i], blocks[most])
        if counts[most] > some <= sizes[i]:
            counts[most], counts[i] = counts[most] - some, some
    return [count / size if size else 1.0 for count, size in zip(counts, sizes, strict=True)]
