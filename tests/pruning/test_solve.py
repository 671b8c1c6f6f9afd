"""SparseGPT against brute force, and the masks of all methods, on matrices in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.pruning.solve import METHODS, Blocks, Pattern, error, inverse_factor, solve, sparsegpt, wanda_scores


def problem(seed: int, groups: int = 1, rows: int = 3, columns: int = 6, samples: int = 40) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, samples, columns, generator=generator, dtype=torch.float64) @ mix
    return weight, 2 / samples * x.transpose(1, 2) @ x


def brute_force(weight: Tensor, hessian: Tensor, zeros: int, block: int) -> Tensor:
    """OBS by its definition: after each column the inverse of what is left is computed anew; masks are chosen by block.

    The saliency of a weight is what removing it alone costs when only the columns after it may answer.
    """
    rows, columns = weight.shape
    w = weight.clone()
    taken = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        cost = torch.stack([w[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, stop)], 1)
        upto = round(zeros * stop / columns)
        chosen = cost.flatten().argsort()[: upto - taken]
        taken = upto
        mask = torch.zeros(rows * (stop - start), dtype=torch.bool).index_fill_(0, chosen, True).view(rows, -1)
        for j in range(start, stop):
            inverse = torch.linalg.inv(hessian[j:, j:])
            for r in range(rows):
                if mask[r, j - start]:
                    w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0]
                    w[r, j] = 0
    return w


@pytest.mark.parametrize("block", [1, 2, 3, 6, 128])
@pytest.mark.parametrize("zeros", [0, 5, 9, 13, 18])
def test_sparsegpt_is_obs(block: int, zeros: int) -> None:
    weight, hessian = problem(seed=zeros)
    found = sparsegpt(weight, hessian, zeros, damping=0.0, block_size=block)
    torch.testing.assert_close(found.weight[0], brute_force(weight[0], hessian[0], zeros, block), rtol=1e-9, atol=1e-9)
    assert int((found.weight == 0).sum()) == zeros
    assert found.damping == 0


@pytest.mark.parametrize("seed", range(3))
def test_one_row_is_between_the_optimum_and_magnitude(seed: int) -> None:
    """Against every mask, each with the exact least-squares answer of the weights that stay."""
    weight, hessian = problem(seed, rows=1, columns=7)
    best = min(best_with(weight[0, 0], hessian[0], kept) for kept in itertools.combinations(range(7), 4))
    whole = float(weight[0, 0] @ hessian[0] @ weight[0, 0])
    found = error(weight, solve(weight, hessian, 3, damping=0.0).weight, hessian)
    simple = error(weight, solve(weight, hessian, 3, "magnitude").weight, hessian)
    assert best / whole - 1e-12 <= found <= simple


def best_with(weight: Tensor, hessian: Tensor, kept: tuple[int, ...]) -> float:
    """The least error of weights that are 0 outside ``kept``."""
    index = list(kept)
    w = torch.zeros_like(weight)
    w[index] = torch.linalg.solve(hessian[index][:, index], hessian[index] @ weight)
    return float((weight - w) @ hessian @ (weight - w))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 4),
    samples=st.integers(1, 30),
    share=st.floats(0, 0.99),
    pattern=st.sampled_from([None, Pattern(2, 4), Pattern(1, 4), Pattern(1, 2)]),
)
def test_never_worse_than_magnitude(
    seed: int, groups: int, rows: int, columns: int, samples: int, share: float, pattern: Pattern | None
) -> None:
    weight, hessian = problem(seed, groups, rows, 4 * columns, samples)
    target = pattern or round(share * weight.numel())
    errors = {}
    for method in METHODS:
        found = solve(weight, hessian, target, method)
        errors[method] = error(weight, found.weight, hessian)
        zeros = found.weight == 0
        if pattern is None:
            assert int(zeros.sum()) == target
        else:
            assert (zeros.unflatten(-1, (-1, pattern.of)).sum(-1) == pattern.of - pattern.kept).all()
    assert errors["sparsegpt"] <= errors["magnitude"]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    samples=st.integers(1, 30),
    share=st.floats(0, 0.99),
    block_size=st.sampled_from([1, 8, 128]),
)
def test_whole_blocks_go(
    seed: int, groups: int, rows: int, blocks: int, samples: int, share: float, block_size: int
) -> None:
    """As many as asked for, by every method; what is 0 already counts, and SparseGPT is no worse than magnitude."""
    weight, hessian = problem(seed, groups, rows, 4 * blocks, samples)
    weight[0, 0, :4] = 0
    weight[0, -1, 1] = 0
    target, errors = Blocks(round(share * weight.numel() / 4)), {}
    for method in METHODS:
        found = solve(weight, hessian, target, method, block_size=block_size).weight
        errors[method] = error(weight, found, hessian)
        empty = (found == 0).unflatten(-1, (-1, 4)).all(-1)
        extra = int(empty.sum()) - target.count  # the empty one may be besides those that its row has to lose
        assert extra in (0, 1) if method == "wanda" or not target.count else extra == 0
        assert (found[weight == 0] == 0).all()
    assert errors["sparsegpt"] <= errors["magnitude"]


def test_the_block_that_costs_least_goes_first() -> None:
    """Against the exact least-squares answer without each block."""
    weight, hessian = problem(5, rows=1, columns=12)
    rest = [[i for i in range(12) if i // 4 != block] for block in range(3)]
    exact = [best_with(weight[0, 0], hessian[0], tuple(kept)) for kept in rest]
    found = sparsegpt(weight, hessian, Blocks(1), damping=0.0).weight
    assert int((found[0, 0] == 0).unflatten(-1, (3, 4)).all(-1).nonzero()) == exact.index(min(exact))


def test_groups_are_solved_as_if_alone() -> None:
    weight, hessian = problem(1, groups=3)
    together = sparsegpt(weight, hessian, Pattern(1, 2)).weight
    for g in range(3):
        alone = sparsegpt(weight[g : g + 1], hessian[g : g + 1], Pattern(1, 2)).weight
        torch.testing.assert_close(together[g : g + 1], alone, rtol=1e-12, atol=1e-12)


def test_singular_hessian_is_damped_until_it_works() -> None:
    weight, hessian = problem(2, columns=8, samples=2)  # of rank 2
    found = sparsegpt(weight, hessian, 12, damping=0.0)
    assert found.damping > 0
    assert found.weight.isfinite().all()
    assert sparsegpt(weight, hessian, 12, damping=0.01).damping == 0.01
    both = torch.cat((hessian, problem(3, columns=8)[1]))  # only the group that needs it is damped more
    factor, used = inverse_factor(both, 0.0)
    assert used == found.damping
    torch.testing.assert_close(factor[1].mT @ factor[1] @ both[1], torch.eye(8, dtype=torch.float64))
    exactly = torch.ones(1, 3, 3, dtype=torch.float64)  # pivots of exactly 0
    assert sparsegpt(weight[..., :3], exactly, 3, damping=0.0).damping > 0
    with pytest.raises(ValueError, match="cannot be factorised"):
        inverse_factor(torch.full((1, 2, 2), torch.nan, dtype=torch.float64), 0.01)


def test_weights_of_dead_inputs_go_first_and_change_nothing_else() -> None:
    weight, hessian = problem(4)
    wide = torch.zeros(1, 8, 8, dtype=torch.float64)
    wide[:, :6, :6] = hessian
    more = torch.cat((weight, torch.tensor([[[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]]], dtype=torch.float64)), 2)
    found = sparsegpt(more, wide, 6 + 9, block_size=8).weight
    assert (found[..., 6:] == 0).all()
    torch.testing.assert_close(found[..., :6], sparsegpt(weight, hessian, 9).weight)
    few = sparsegpt(more, wide, 2).weight  # the smallest of them, and no more than asked for
    torch.testing.assert_close(few, more * (~((more == 1) | (more == 2))))
    assert int((sparsegpt(more, torch.zeros_like(wide), 5).weight == 0).sum()) == 5
    halves = sparsegpt(more, wide, Pattern(2, 4)).weight
    assert ((halves == 0).unflatten(-1, (2, 4)).sum(-1) == 2).all()
    assert (halves[..., 6:] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [12, Pattern(1, 4)])
def test_zeros_stay_zeros(method: str, target: int | Pattern) -> None:
    weight, hessian = problem(5, columns=8)
    weight[0, :, ::3] = 0
    found = solve(weight, hessian, target, method, block_size=4).weight
    assert (found[weight == 0] == 0).all()
    if isinstance(target, int):
        assert int((found == 0).sum()) == target
    same = solve(weight, hessian, 2, method).weight  # less than there is
    torch.testing.assert_close(same, weight)


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[[1.0, -2.0, 3.0], [4.0, 1.0, 1.0]]])
    hessian = torch.diag(torch.tensor([16.0, 1.0, 0.25]))[None]
    assert wanda_scores(weight, hessian).tolist() == [[[4.0, 2.0, 1.5], [16.0, 1.0, 0.5]]]
    assert solve(weight, hessian, 2, "wanda").weight.tolist() == [[[1.0, -2.0, 0.0], [4.0, 1.0, 0.0]]]
    assert solve(weight, hessian, 3, "magnitude").weight.tolist() == [[[0.0, -2.0, 3.0], [4.0, 0.0, 0.0]]]


@pytest.mark.parametrize("text", ["4:2", "2", "0:4", "a:b", "2:2"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected N:M"):
        Pattern.parse(text)
