"""Zeros in blocks of four input channels: drawn, shared out, dropped and grown as wholes, and kept in checkpoints."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from revnets.layers import SparseConv2d, SparseLinear, convert
from revnets.sparsity import BLOCKED, SCHEDULES, SparsityController, masks, sparse_layers
from revnets.sparsity.blocks import is_whole, norms, of_blocks, shape_of_blocks, spread
from revnets.training.checkpoints.fitting import check_sparsity
from revnets.training.checkpoints.held import SPARSITY

shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 9).map(lambda n: 4 * n)),
    st.tuples(
        st.integers(1, 12), st.integers(1, 5).map(lambda n: 4 * n), st.sampled_from([1, 3]), st.sampled_from([1, 3])
    ),
)
sparsities = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9]), st.floats(0, 0.99))


def grouped(mask: Tensor) -> Tensor:
    """By hand: the four neighbours of each block along the last dimension."""
    return torch.stack([mask[:, i::4] for i in range(4)], -1)


def whole(mask: Tensor) -> bool:
    fours = grouped(mask)
    return bool((fours.all(-1) == fours.any(-1)).all())


@given(shapes, sparsities, st.integers(0, 99))
def test_masks_hold_whole_blocks_and_exactly_so_many(shape: tuple[int, ...], sparsity: float, seed: int) -> None:
    mask = masks.random_mask(shape, sparsity, torch.Generator().manual_seed(seed), BLOCKED)
    assert mask.shape == shape
    assert whole(mask)
    assert int(mask.sum()) == 4 * round((1 - sparsity) * math.prod(shape) / 4)
    assert is_whole(mask, 4)
    assert torch.equal(spread(of_blocks(mask, 4), 4), mask)
    assert of_blocks(mask, 4).shape == shape_of_blocks(shape, 4)


@given(shapes, st.integers(0, 99))
def test_norms_of_blocks(shape: tuple[int, ...], seed: int) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(norms(numbers, 1), numbers.abs())
    torch.testing.assert_close(norms(numbers, 4), grouped(numbers).square().sum(-1).sqrt())


@given(
    st.lists(st.tuples(shapes, st.sampled_from([1, 4])), min_size=1, max_size=8),
    sparsities,
    st.sampled_from(sorted(masks.DISTRIBUTIONS)),
)
def test_densities_are_of_whole_blocks(
    layers: list[tuple[tuple[int, ...], int]], sparsity: float, distribution: str
) -> None:
    used, blocks = [shape for shape, _ in layers], [of for _, of in layers]
    sizes = [math.prod(shape) for shape in used]
    densities = masks.densities(used, sparsity, distribution, blocks=blocks)
    counts = [round(d * size) for d, size in zip(densities, sizes, strict=True)]
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(count % of == 0 for count, of in zip(counts, blocks, strict=True))
    missing = round((1 - sparsity) * sum(sizes)) - sum(counts)
    assert abs(missing) <= 2 if set(blocks) == {4} else 0 <= missing < 4
    if set(blocks) == {1}:
        assert densities == masks.densities(used, sparsity, distribution)


def network(seed: int = 0, sparsity: float = 0.75) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        SparseConv2d(8, 16, 3, padding=1, groups=2, sparsity=sparsity, pattern=BLOCKED),
        nn.Tanh(),
        SparseConv2d(16, 8, 1, sparsity=sparsity),
        nn.Tanh(),
        nn.Flatten(),
        SparseLinear(8 * 16, 12, sparsity=sparsity, pattern=BLOCKED),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    nn.functional.cross_entropy(
        model(torch.randn(6, 8, 4, 4, generator=generator)), torch.randint(12, (6,), generator=generator)
    ).backward()
    optimizer.step()


def controlled(model: nn.Module, schedule: str, **more: Any) -> tuple[torch.optim.Optimizer, SparsityController]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    more = {"total_steps": 16, "interval": 2, **more}
    return optimizer, SparsityController(model, optimizer, schedule, **more)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([0.3, 0.75, 0.9]), st.sampled_from(["uniform", "er", "erk"]), st.floats(0.05, 1), st.integers(0, 99)
)
def test_growth_and_drop_by_block_at_every_step(
    schedule: str, sparsity: float, dist: str, share: float, seed: int
) -> None:
    model = network(seed, sparsity)
    optimizer, controller = controlled(model, schedule, distribution=dist, drop_fraction=share, seed=seed)
    start = [int(layer.mask.sum()) for layer in controller.layers]
    sizes = [layer.mask.numel() for layer in controller.layers]
    assert abs(sum(start) - sum((1 - sparsity) * n for n in sizes)) <= 6
    for number in range(1, 13):
        before = [layer.mask.clone() for layer in controller.layers]
        step(model, optimizer, number)
        weights = [layer.weight.detach().clone() for layer in controller.layers]
        update = controller.step()
        assert [int(layer.mask.sum()) for layer in controller.layers] == start
        for layer in controller.layers:
            assert layer.block == 1 or whole(layer.mask)
            assert not layer.weight[~layer.mask].any()
        if update is None:
            continue
        for layer, old, weight, count in zip(controller.layers, before, weights, update.exchanged, strict=True):
            assert count % layer.block == 0
            stayed = old & layer.mask & (layer.weight != 0)
            gone = old & ~stayed
            if layer.block == 1 or not count or count == int(old.sum()):
                continue
            assert int(gone.sum()) >= count
            sums = grouped(weight.square()).sum(-1)
            kept, lost = grouped(stayed).any(-1), grouped(old & ~layer.mask).all(-1)
            if lost.any() and kept.any():
                assert sums[lost].max() <= sums[kept].min() * (1 + 1e-5), "blocks of the smallest norm go"


def test_rigl_grows_the_blocks_of_the_largest_dense_gradient() -> None:
    model = network()
    optimizer, controller = controlled(model, "rigl")
    step(model, optimizer, 1)
    controller.step()
    for module in model.modules():
        assert getattr(module, "gather_dense_grad", True)
    step(model, optimizer, 2)
    gathered = [layer.dense_grads[0].clone() for layer in controller.layers]
    before = [layer.mask.clone() for layer in controller.layers]
    assert controller.step() is not None
    for layer, grad, old in zip(controller.layers, gathered, before, strict=True):
        if layer.block == 1:
            continue
        grown = grouped(layer.mask & ~old).all(-1)
        free = grouped(~layer.mask).all(-1) & grouped(~old).all(-1)
        sizes = grouped(grad.square()).sum(-1)
        assert grown.any()
        assert sizes[grown].min() >= sizes[free].max()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_goes_on_in_blocks(schedule: str) -> None:
    model = network()
    optimizer, controller = controlled(model, schedule)
    for number in range(1, 5):
        step(model, optimizer, number)
        controller.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": optimizer.state_dict(), "masks": controller.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    SPARSITY.check(saved["masks"], ("sparsity",))
    assert saved["masks"]["blocks"] == {"0": 4, "5": 4}
    other = network(seed=1)
    other_optimizer, resumed = controlled(other, schedule)
    check_sparsity(resumed, saved["masks"], saved["model"])
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(copy.deepcopy(saved["opt"]))
    resumed.load_state_dict(saved["masks"])
    for number in range(5, 9):
        for net, opt, control in ((model, optimizer, controller), (other, other_optimizer, resumed)):
            step(net, opt, number)
            control.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_checkpoint_of_another_pattern_is_refused() -> None:
    plain = nn.Sequential(SparseLinear(8, 8, sparsity=0.5))
    blocked = nn.Sequential(SparseLinear(8, 8, sparsity=0.5, pattern=BLOCKED))
    (_, of_plain), (_, of_blocked) = controlled(plain, "set"), controlled(blocked, "set")
    with pytest.raises(ValueError, match=r"'0' has zeros in blocks of 1 in the checkpoint, 4 in the model"):
        of_blocked.check_state_dict(of_plain.state_dict())
    with pytest.raises(ValueError, match=r"'0' has zeros in blocks of 4 in the checkpoint, 1 in the model"):
        of_plain.check_state_dict(of_blocked.state_dict())
    plain[0].set_mask(torch.arange(64).view(8, 8) % 2 == 0)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="single zeros, where the pattern 4x1 of the layer has blocks"):
        blocked.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="single zeros, where the pattern 4x1 has blocks"):
        network()[0].set_mask(torch.rand(16, 4, 3, 3) < 0.5)  # type: ignore[operator]


@pytest.mark.parametrize("spec", ["sparse:0.75:pattern:4x1", "sparse_parallel:0.75:pattern:4x1"])
def test_conversion(spec: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
    )
    net.extend([nn.Conv2d(16, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(8 * 4 * 4, 4)])
    report = convert(net, spec, input_size=(3, 10, 10))
    assert [one.name for one in report.converted] == ["2", "6"]
    assert any(
        "6 input channels per group, where zeros in blocks of 4 need a multiple of 4" in s.reason
        for s in report.skipped
    )
    layers = sparse_layers(report.model)
    assert all(layer.block == 4 and whole(layer.mask) for layer in layers)
    kept = sum(int(layer.mask.sum()) for layer in layers)
    dense = 16 * 8 * 9 + 6 * 16
    assert kept == (dense // 4 if spec.startswith("sparse:") else dense), "densities are those that were asked for"
    assert ", pattern=4x1, " in repr(report.model)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sparse:0.5:pattern:2x1", r"sparse: pattern='2x1': expected '4x1'"),
        ("sparse:0.5:pattern", r"option pattern needs a value"),
        ("sparse_doped:0.5:pattern:4x1", r"sparse_doped has no option 'pattern'"),
    ],
)
def test_patterns_that_are_none(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), spec, input_size=(3, 10, 10))


def test_counts_and_channels_that_make_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"count=6: zeros in blocks of 4 leave a multiple of 4 weights"):
        SparseLinear(8, 8, sparsity=0.5, count=6, pattern=BLOCKED)
    with pytest.raises(ValueError, match=r"it has 6 input channels per group"):
        SparseLinear(6, 8, sparsity=0.5, pattern=BLOCKED)
    assert int(SparseLinear(4, 2, sparsity=0.99, pattern=BLOCKED).mask.sum()) == 4, "one block stays at least"
