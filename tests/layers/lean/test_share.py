"""What stays although it could be dropped: up to the share, the costliest first, and without any change of values."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revnets.layers import convert, make_lean
from revnets.layers.lean import keeping
from revnets.layers.lean.network import kept_per_image
from revnets.layers.lean.nodes import Ledger
from revnets.layers.lean.share import Plan
from revnets.profiling.memory import measure_training_step
from tests.helpers import assert_same_step, training_step

from .networks import BLOCKS, C, images, network
from .test_network import kept_bytes, loss, saved_bytes

SIZE = (C, 16, 16)
ROWS = {name: ("bottleneck", name, "gated", name, "mlp") for name in BLOCKS}


def lean_at(share: float, plain: nn.Module) -> Any:
    return convert(copy.deepcopy(plain), f"lean:{share}", input_size=SIZE).model.train()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BLOCKS)
def test_same_step(name: str, layout: torch.memory_format) -> None:
    plain = network(*ROWS[name]).to(memory_format=layout)
    x = images().to(memory_format=layout)
    nets = [lean_at(share, plain) for share in (0.6, 0.75)]
    expected = training_step(plain, (x,), loss)
    for net in nets:
        assert_same_step(training_step(net, (x,), loss), expected, 1e-10)


@pytest.mark.parametrize("name", ["gated", "gated by hardswish", "scales", "dropout"])
def test_bytes_grow_with_the_share_and_stay_below(name: str) -> None:
    plain, x = network(*ROWS[name]), images(2)
    all_of_it = saved_bytes(plain, x)
    kept = {share: kept_bytes(lean_at(share, plain), x) for share in (0, 0.6, 0.7, 0.8)}
    assert list(kept.values()) == sorted(kept.values())
    assert kept[0] < kept[0.8]
    assert all(kept[share] <= max(kept[0], share * all_of_it) for share in kept)
    for share in kept:
        found = kept_per_image(plain, SIZE, share=share)
        assert found is not None
        assert found.lean * 2 == pytest.approx(kept[share], rel=1e-3)


def test_the_costliest_stay() -> None:
    plan = _plan(nn.Sequential(network("gated", "gated"), nn.Conv2d(C, C, 1), nn.ReLU(), nn.Conv2d(C, C, 1)), 0.65)
    assert "silu" in plan.spared
    assert "relu" not in plan.spared


def _plan(model: nn.Module, share: float) -> Plan:
    found = kept_per_image(model.double(), SIZE, share=share)
    assert found is not None
    assert found.plan is not None
    return found.plan


def test_small_last_layers_are_left_alone() -> None:
    """After the last result that is dropped, the recorder notes nothing."""
    plain = (
        nn.Sequential(network("gated", "gated"), nn.AvgPool2d(8), network("gated", "gated", "gated")).double().train()
    )
    plan = _plan(plain, 0.6)
    with keeping.Recorder([*plain.parameters(), *plain.buffers()], plan).active() as recorder:
        y = plain[0](images())
        known = len(recorder._memory)
        assert known
        plain[2](plain[1](y)).sum().backward()
        assert len(recorder._memory) == known
    assert recorder.kept < recorder.asked


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_other_sizes_and_frozen_parts(name: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10)
    plain.get_submodule("conv_stem" if "eff" in name else "conv1").requires_grad_(False)
    lean = convert(copy.deepcopy(plain), "lean:0.6", input_size=(3, 160, 160)).model
    for size, p in ((96, 0.0), (64, 0.2)):
        for net in (plain, lean):
            net.train()
            net.drop_rate = p
        x = torch.randn(2, 3, size, size)
        assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 0)
        assert kept_bytes(lean, x) <= 0.65 * saved_bytes(plain, x)


def test_copies_keep_the_plan() -> None:
    lean = lean_at(0.7, network(*ROWS["gated"]))
    assert kept_bytes(copy.deepcopy(lean), images()) == kept_bytes(lean, images())


@pytest.mark.parametrize("spec", ["lean:1", "lean:-0.1", "lean:much", {"type": "lean", "share": 7}, "lean:nan"])
def test_bad_shares_are_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^lean: share=.*expected a number"):
        convert(network("gated"), spec, input_size=SIZE)


# --- what comes back -------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Counts batch norms that run forward."""

    norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.norms += func._schema.name == "aten::native_batch_norm"
        return func(*args, **(kwargs or {}))


def norms_again(net: nn.Module, x: Tensor) -> int:
    y = loss(net(x))
    with Counted() as counted:
        y.backward()
    return counted.norms


def test_nothing_is_computed_twice_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_lean(network(*["bottleneck"] * 8)), images(16)
    once = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    found = norms_again(net, x)
    monkeypatch.setattr(Ledger, "fits", lambda self, nbytes: False)
    without = norms_again(net, x)
    assert once <= found < without
    assert found <= 1.4 * once


@pytest.mark.parametrize("row", [["bottleneck"] * 8, ["gated"] * 6, ["mlp"] * 8, ["bottleneck", "scales"] * 3])
def test_what_comes_back_takes_no_memory(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_lean(network(*row)), images(8)
    found = measure_training_step(net, x, loss).peak_bytes
    monkeypatch.setattr(Ledger, "fits", lambda self, nbytes: False)
    assert found <= measure_training_step(net, x, loss).peak_bytes
