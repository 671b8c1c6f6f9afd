"""The spine: reversible, checkpointed and stored training are the same training."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revnets.models.revbifpn import RevBiFPN
from revnets.reversible import MODES, RevSequential
from tests.helpers import assert_same_step, training_step
from tests.reversible.graphs import BRANCHES, build, cubic, graphs

S0_DEPTH, S6_DEPTH = 2, 5  # extra silos


def image(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def narrow_revbifpn(extra_silos: int, exact: bool | int) -> RevBiFPN:
    torch.manual_seed(0)
    return RevBiFPN(
        width=1 / 3, num_classes=10, extra_silos=extra_silos, exact=exact, stem_stride=2, drop_path_rate=0.2
    ).train()


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(graph=graphs())
def test_modes_agree_on_random_graphs(exact: bool, graph: tuple[list[int], list[str], int]) -> None:
    net = build(*graph[:2], exact=exact, seed=graph[2]).double()
    x = image(torch.float64)
    expected = training_step(copy.deepcopy(net), (x,), cubic, "store")
    for mode in ("reversible", "checkpoint"):
        assert_same_step(training_step(copy.deepcopy(net), (x,), cubic, mode), expected, 0 if exact else 1e-8)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(graph=graphs(), autocast=st.booleans())
def test_exact_mode_is_equal_to_the_bit(graph: tuple[list[int], list[str], int], autocast: bool) -> None:
    net = build(*graph[:2], exact=True, seed=graph[2])
    expected = training_step(copy.deepcopy(net), (image(),), cubic, "store", autocast=autocast)
    for mode in ("reversible", "checkpoint"):
        got = training_step(copy.deepcopy(net), (image(),), cubic, mode, autocast=autocast)
        assert_same_step(got, expected, 0)


@pytest.mark.parametrize("kind", sorted(BRANCHES))
@pytest.mark.parametrize("mode", MODES)
def test_statistics_move_once_per_step(kind: str, mode: str) -> None:
    net = build([1, 2], [kind])
    result = training_step(net, (image(),), cubic, mode)
    for name, buffer in result.buffers.items():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1, name


@settings(max_examples=12, deadline=None, derandomize=True)
@given(graph=graphs())
def test_inverse_of_random_graphs(graph: tuple[list[int], list[str], int]) -> None:
    stages, kinds, seed = graph
    kinds = [k for k in kinds if "drop" not in k and k != "mbconv"] or ["batch_norm"]  # randomness is not replayed
    x = image(torch.float64)
    (back,) = (net := build(stages, kinds, seed=seed).double()).inverse(*net(x))
    assert (back - x).abs().max() < 1e-10
    before = {n: b.clone() for n, b in net.named_buffers()}
    net.inverse(*net.eval()(x))
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("extra_silos", [S0_DEPTH, S6_DEPTH])
def test_inverse_is_exact_at_full_depth(extra_silos: int, autocast: bool, capsys: pytest.CaptureFixture[str]) -> None:
    errors = {}
    for exact in (True, False):
        body: RevSequential = narrow_revbifpn(extra_silos, exact).body
        for module in body.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        x = torch.round(x * 2**12) / 2**12 if exact else x  # an image on the grid
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            (back,) = body.inverse(*body(x))
        errors[exact] = (back - x).abs().max().item()
    with capsys.disabled():
        print(
            f"\n  inverse at depth of {extra_silos} extra silos, {'bf16 autocast' if autocast else 'float32'}: "
            f"exact {errors[True]:g}, plain {errors[False]:.2g}"
        )
    assert errors[True] == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("extra_silos", [S0_DEPTH, S6_DEPTH])
def test_gradients_are_equal_to_the_bit_at_full_depth(extra_silos: int, autocast: bool) -> None:
    model = narrow_revbifpn(extra_silos, exact=True)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last) if autocast else x
    steps = {
        mode: training_step(copy.deepcopy(model), (x,), lambda y: y.float().square().mean(), mode, autocast=autocast)
        for mode in MODES
    }
    assert_same_step(steps["reversible"], steps["store"], 0)
    assert_same_step(steps["checkpoint"], steps["store"], 0)
