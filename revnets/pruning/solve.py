"""Which weights of one layer go, and what the others become: SparseGPT, Wanda, magnitude, on matrices.

A layer is a stack of matrices ``(G, R, D)``: G groups, R outputs of a group, D inputs (of a convolution: of its
unfolded image). ``H`` is ``(G, D, D)``, the inputs' second moments. Everything here is in float64 and knows no modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("sparsegpt", "wanda", "magnitude")
"""How ``prune`` chooses weights."""

_MOST_DAMPING = 1e4


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: at most ``kept`` of every ``of`` consecutive input channels stay.

    Example:
        >>> Pattern.parse("2:4").sparsity
        0.5
    """

    kept: int
    of: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.of

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From a text such as ``2:4``.

        Raises:
            ValueError: for anything but N:M with 1 <= N < M.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 1 <= int(found[1]) < int(found[2]):
            raise ValueError(
                f"pattern={text!r}: expected N:M, N of every M weights stay, such as '2:4', or with a sparsity '4x1'"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@dataclass(frozen=True)
class Blocked:
    """A sparsity of whole blocks of ``of`` consecutive input channels of an output: the pattern ``4x1``."""

    sparsity: float
    of: int = 4

    def __str__(self) -> str:
        return f"{self.of}x1"


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of consecutive input channels of an output go, as ``4x1``: ``count`` of them in a layer.

    Example:
        >>> solve(torch.tensor([[[3.0, 0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 1.0]]]), None, Blocks(1), "magnitude").weight
        tensor([[[3., 0., 0., 1., 0., 0., 0., 0.]]])
    """

    count: int
    of: int = 4

    def __str__(self) -> str:
        return f"{self.of}x1"

    def whole(self, numbers: Tensor) -> Tensor:
        """Numbers of inputs as ``(..., blocks, inputs of a block)``."""
        return numbers.unflatten(-1, (-1, self.of))

    def spread(self, mask: Tensor) -> Tensor:
        """A mask of blocks as one of inputs."""
        return mask.repeat_interleave(self.of, -1)


@dataclass(frozen=True)
class Solved:
    """A pruned layer: its weights ``(G, R, D)``, the damping that was needed, and a remark where there is one."""

    weight: Tensor
    damping: float = 0.0
    note: str = ""


def solve(
    weight: Tensor,
    hessian: Tensor | None,
    target: int | Pattern | Blocks,
    method: str = "sparsegpt",
    damping: float = 0.01,
    block_size: int = 128,
) -> Solved:
    """Prune one layer; weights that are 0 already stay so.

    SparseGPT is greedy, so that in rare layers its result is further from the layer's output than that of plain
    magnitude pruning. Both errors are known, and the better result is taken.

    Args:
        weight: ``(G, R, D)``, float64.
        hessian: ``(G, D, D)``; only ``magnitude`` does without.
        target: how many weights of the whole layer become 0, or N:M, or how many blocks.
        method: one of ``METHODS``.
        damping: of SparseGPT, relative to the mean of the diagonal.
        block_size: of SparseGPT, columns whose mask is chosen at once.

    Raises:
        ValueError: when the Hessian holds no finite numbers.

    Example:
        >>> solve(torch.tensor([[[3.0, -1.0, 2.0, 0.5]]]), None, 2, "magnitude").weight
        tensor([[[3., 0., 2., 0.]]])
    """
    if method == "magnitude" or hessian is None:
        return Solved(weight.masked_fill(_lowest(weight.abs(), target), 0))
    if method == "wanda":
        return Solved(weight.masked_fill(_lowest(wanda_scores(weight, hessian), target, by_row=True), 0))
    found = sparsegpt(weight, hessian, target, damping, block_size)
    simple = weight.masked_fill(_lowest(weight.abs(), target), 0)
    if error(weight, simple, hessian) < error(weight, found.weight, hessian):
        return Solved(simple, found.damping, "plain magnitude was better")
    return found


def wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    r""":math:`|W_{ij}| \cdot \|X_j\|_2` (Wanda, 2306.11695), up to a factor; compared within a row."""
    norms = hessian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return weight.abs() * norms[:, None, :]


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    r"""Relative error of the layer's outputs, :math:`\|WX - \hat W X\|^2 / \|WX\|^2`.

    Example:
        >>> error(torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0]]]), torch.eye(2)[None])
        0.5
    """
    off, whole = ((m @ hessian * m).sum().item() for m in (weight - pruned, weight))
    return max(off, 0.0) / whole if whole > 0 else 0.0


def sparsegpt(
    weight: Tensor, hessian: Tensor, target: int | Pattern | Blocks, damping: float = 0.01, block_size: int = 128
) -> Solved:
    r"""Optimal brain surgery column by column (SparseGPT, 2301.00774, algorithm 1).

    With :math:`H^{-1} = U^T U` of the damped Hessian, the mask of a block of columns takes the lowest
    :math:`w^2 / U_{jj}^2`; then every masked weight of column j hands
    :math:`-w / U_{jj} \cdot U_{j, j:}` on to the columns after it. Weights of inputs that are always 0 go first; where
    there are more of them than are to go, the largest stay (the paper's code takes them all), as other images or sizes
    may need them: counts are exact.

    Of ``Blocks``, the mask takes those whose columns together cost least, each after what those before it hand on:
    :math:`\|w_S U_{SS}^{-1}\|^2`.

    Args:
        weight: ``(G, R, D)``.
        hessian: ``(G, D, D)``, undamped.
        target: how many weights become 0, or N:M, or how many blocks.
        damping: relative to the mean of the diagonal; ten times more as often as the factorisation fails.
        block_size: columns of a block.

    Raises:
        ValueError: when the Hessian holds no finite numbers.
    """
    factor, used = inverse_factor(hessian, damping)
    weight, gone, columns = weight.clone(), weight == 0, weight.shape[-1]
    dead = (hessian.diagonal(dim1=-2, dim2=-1) == 0)[:, None, :] & ~gone
    if isinstance(target, Pattern):
        block_size = max(block_size // target.of, 1) * target.of
        quota = None
    elif isinstance(target, Blocks):
        block_size = max(block_size // target.of, 1) * target.of
        quota = _Quota(target.whole(gone).all(-1), target.count)
    else:
        count = min(max(target - int(gone.sum()), 0), int(dead.sum()))
        gone = _lowest_left(weight.abs().masked_fill(~dead, torch.inf), gone, count)
        quota = _Quota(gone, target)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        own = factor[:, start:stop, start:stop]
        diagonal = own.diagonal(dim1=-2, dim2=-1)[:, None, :]
        block, lost = weight[..., start:stop].clone(), gone[..., start:stop]
        errors = torch.zeros_like(block)
        if isinstance(target, Blocks) and quota is not None:
            empty = target.whole(lost).all(-1)
            costs = _block_costs(block.masked_fill(dead[..., start:stop], 0), own, target)
            mask = target.spread(_lowest_left(costs, empty, quota.of(empty))) | lost
        elif quota is not None:
            mask = _lowest_left((block / diagonal).square(), lost, quota.of(lost))
        for j in range(stop - start):
            if isinstance(target, Pattern) and j % target.of == 0:
                some = slice(j, j + target.of)
                scores = (block[..., some] / diagonal[..., some]).square()
                scores = scores.masked_fill(dead[..., start:stop][..., some], -1).masked_fill(lost[..., some], -2)
                chosen = _lowest(scores, target) | lost[..., some]
                mask = chosen if j == 0 else torch.cat((mask, chosen), -1)
            errors[..., j] = torch.where(mask[..., j], block[..., j] / diagonal[..., j], 0)
            block[..., j + 1 :] -= errors[..., j, None] * own[:, None, j, j + 1 :]
        weight[..., start:stop] = block.masked_fill(mask, 0)
        weight[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return Solved(weight, used)


def _block_costs(weight: Tensor, factor: Tensor, target: Blocks) -> Tensor:
    """What it costs to lose each block: ``(G, R, blocks)``."""
    found = []
    for j in range(0, weight.shape[-1], target.of):
        some = slice(j, j + target.of)
        errors = torch.linalg.solve_triangular(factor[:, some, some], weight[..., some], upper=True, left=False)
        found.append(errors.square().sum(-1))
    return torch.stack(found, -1)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular ``U`` with ``U^T U = (H + damping * mean(diag H) * I)^-1``, and the largest damping used.

    Rows and columns of inputs that are always 0 count as those of the identity. Each group is damped more by itself,
    until both factorisations succeed.

    Raises:
        ValueError: for a Hessian that holds no finite numbers.

    Example:
        >>> factor, used = inverse_factor(torch.ones(1, 2, 2, dtype=torch.float64), damping=0.0)
        >>> used > 0  # this one is singular
        True
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.sum(-1) / (~dead).sum(-1).clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    whole = hessian + torch.diag_embed(dead.to(hessian.dtype) * mean[:, None])
    level = torch.full_like(mean, damping)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    while True:
        lower, first = torch.linalg.cholesky_ex(whole + (level * mean)[:, None, None] * eye)
        lower = torch.where((first != 0)[:, None, None], eye, lower)  # a pivot of 0 would be an exception of torch's
        upper, second = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        failed = (first != 0) | (second != 0) | ~upper.isfinite().flatten(1).all(1)
        if not failed.any():
            return upper, float(level.max())
        level = torch.where(failed, (10 * level).clamp(min=1e-4), level)
        if level.max() > _MOST_DAMPING:
            raise ValueError("the Hessian of its inputs cannot be factorised, however much it is damped")


class _Quota:
    """Shares the weights that are still to go out among blocks of columns, by how many there are left in each."""

    def __init__(self, gone: Tensor, target: int) -> None:
        self.left = gone.numel() - int(gone.sum())
        self.extra = max(target - int(gone.sum()), 0)
        self.seen = self.taken = 0

    def of(self, gone: Tensor) -> int:
        """How many weights of the next block go besides those that are gone."""
        self.seen += gone.numel() - int(gone.sum())
        upto = round(self.extra * self.seen / self.left) if self.left else 0
        count, self.taken = upto - self.taken, upto
        return count


def _lowest_left(scores: Tensor, gone: Tensor, count: int) -> Tensor:
    """``gone``, and the ``count`` lowest of the rest."""
    order = scores.masked_fill(gone, torch.inf).flatten().topk(count, largest=False, sorted=False).indices
    return gone.flatten().index_fill(0, order, True).view(gone.shape)


def _lowest(scores: Tensor, target: int | Pattern | Blocks, by_row: bool = False) -> Tensor:
    """A mask of the lowest scores: of each M inputs, of each row (numbers differ by 1 at most), or of all.

    The score of a block is the sum of the squares of its inputs' scores.
    """
    if isinstance(target, Blocks):
        return target.spread(_lowest(target.whole(scores).square().sum(-1), target.count, by_row))
    if isinstance(target, Pattern):
        grouped = scores.unflatten(-1, (-1, target.of))
        chosen = grouped.argsort(dim=-1, stable=True)[..., : target.of - target.kept]
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, chosen, True).flatten(-2)
    if not by_row:
        return _lowest_left(scores, torch.zeros_like(scores, dtype=torch.bool), target)
    rows = scores.shape[0] * scores.shape[1]
    ends = torch.arange(rows + 1, device=scores.device) * target // rows
    ranks = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks < ends.diff().view(*scores.shape[:2], 1)
