"""What a NumericsMonitor sees: against the casts themselves, in every memory mode, once per step."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import revnets
from revnets.layers import MuSLinear, quantize
from revnets.layers.munit.fp8 import E4M3, E5M2
from revnets.numerics import NumericsMonitor, tensor_stats

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_shares_are_those_of_the_cast(dtype: torch.dtype, kind: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    exponents = torch.randint(-26, 20, (4000,)).double()
    x = (torch.randn(4000).double() * 2**exponents).to(kind)
    least = {E4M3: 2.0**-9, E5M2: 2.0**-16}[dtype] / scale
    ties = torch.tensor([0.0, least, least / 2, -least / 2, least * 0.51, torch.finfo(dtype).max / scale]).to(kind)
    x = torch.cat([x[x.isfinite()], ties])
    cast = quantize(x, dtype, scale).double()
    found = tensor_stats(x, dtype, scale)
    beyond = x.double().abs() * scale > torch.finfo(dtype).max
    assert found.flushed == ((cast == 0) & (x != 0)).double().mean()
    assert found.clipped == beyond.double().mean()
    assert (cast[beyond].abs() == torch.finfo(dtype).max).all()
    assert found.rms == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-12)
    assert tensor_stats(x).flushed is None


@pytest.mark.parametrize(("kind", "below", "above"), [(torch.bfloat16, 149.0, 150.0), (torch.float16, 149.5, 149.625)])
def test_limits_between_two_numbers_of_half_precision(kind: torch.dtype, below: float, above: float) -> None:
    """A limit that the tensor's own type would round: each number is on its side of it all the same."""
    found = tensor_stats(torch.tensor([below, -above, above, 1.0], dtype=kind), E4M3, 448 / 149.6)
    assert found.clipped == 0.5
    scale = 2.0**-10 / (149.4 * 2.0**-12)
    x = torch.tensor([149.0, 150.0, 1.0, 0.0], dtype=torch.bfloat16) * 2.0**-12
    assert tensor_stats(x, E4M3, scale).flushed == 0.5


@pytest.mark.parametrize("step", [0, 3, 4, 5, 8])
def test_a_step_that_is_made_again_is_watched_once(tmp_path: Path, step: int) -> None:
    """Records from the next step on are of what is about to be repeated."""
    net = nn.Linear(2, 2)

    def train(monitor: NumericsMonitor, steps: range) -> None:
        for _ in steps:
            net(torch.ones(1, 2)).sum().backward()
            monitor.step()

    with NumericsMonitor(net, every=4) as first:
        train(first, range(9))
        first.save(tmp_path)
    with NumericsMonitor(net, every=4) as second:
        second.resume(tmp_path, step)
        assert [r["step"] for r in second.records] == [s for s in (0, 4, 8) if s < step]
        train(second, range(step, 9))
        assert [r["step"] for r in second.records] == [0, 4, 8]


def test_what_is_not_finite_shows() -> None:
    assert math.isnan(tensor_stats(torch.tensor([1.0, math.nan]), E4M3).rms)
    found = tensor_stats(torch.tensor([1.0, math.inf]), E4M3)
    assert math.isinf(found.rms)
    assert found.clipped == 0.5
    with pytest.raises(ValueError, match=r"a tensor of shape \(0, 3\) has no numbers"):
        tensor_stats(torch.zeros(0, 3))


def step(model: Any, x: torch.Tensor, autocast: bool = False) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().mean().backward()


def records(model: Any, mode: str, autocast: bool) -> list[dict[str, Any]]:
    revnets.set_mode(model, mode)
    with NumericsMonitor(model, every=1) as monitor:
        torch.manual_seed(0)
        step(model, torch.randn(2, 3, 32, 32), autocast)
        monitor.step()
    return monitor.records


@pytest.mark.parametrize(
    ("layers", "autocast"), [("mus_fp8", False), pytest.param("dense", True, marks=pytest.mark.slow)]
)
def test_the_same_in_every_mode(layers: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", layers=layers, num_classes=10, drop_path_rate=0.2).train()
    twins = {mode: copy.deepcopy(model) for mode in ("store", "checkpoint", "reversible")}
    found = {mode: records(twin, mode, autocast) for mode, twin in twins.items()}
    assert len(found["store"]) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    for mode in ("checkpoint", "reversible"):
        assert found[mode] == found["store"], mode  # exact mode: the same bits
    assert any(r["fp8"] for r in found["store"]) == ("mus" in layers)
    assert all(r["output_grad_rms"] is not None and r["weight_grad_rms"] is not None for r in found["reversible"])
    assert sum(r["output_grad_rms"] > 0 for r in found["reversible"]) > 100  # a dropped path has none


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_torchs_checkpoint(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    found = []
    for run in (inner, lambda x: checkpoint(inner, x, use_reentrant=reentrant)):
        inner.zero_grad(set_to_none=True)
        with NumericsMonitor(inner, every=1) as monitor:
            run(x).square().sum().backward()  # type: ignore[operator]
            monitor.step()
        found.append(monitor.records)
    assert found[0] == found[1]


def test_figures_of_a_layer_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), MuSLinear(5, 4, fp8=True, backend="emulate", grad_scale=2.0**12))
    x = torch.randn(7, 6)
    with NumericsMonitor(net, grad_scale=4.0) as monitor:
        first = net[0](x)
        y = net(x)  # the first layer runs twice: its figures are those of both runs together
        (y.sum() + 0 * first.sum()).backward()
        monitor.step()
    plain, scaled = monitor.records
    assert plain["input_rms"] == pytest.approx(x.square().mean().sqrt().item())
    assert plain["output_rms"] == pytest.approx(first.square().mean().sqrt().item())
    assert (plain["grad_scale"], scaled["grad_scale"]) == (4.0, 2.0**12)
    assert (plain["kind"], scaled["kind"], scaled["fp8"]) == ("Linear", "MuSLinear", True)
    assert scaled["output_grad_rms"] == pytest.approx(1.0)
    assert scaled["weight_rms"] == pytest.approx(net[1].weight.square().mean().sqrt().item())  # before the scale
    grad: Any = net[1].weight.grad
    assert scaled["weight_grad_rms"] == pytest.approx(grad.square().mean().sqrt().item())


def test_only_some_steps_and_only_training() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ema = ModelEmaV3(net)
    watched = []
    with NumericsMonitor(net, every=3) as monitor:
        copied = copy.deepcopy(net)  # takes the hooks along
        for index in range(7):
            step(net.train(), torch.full((2, 4), float(index)))
            watched.append(monitor.step())
            net.eval()(torch.full((2, 4), 1e6))
            copied.train()(torch.full((2, 4), 1e6))
            ema.module(torch.full((2, 4), 1e6))
    assert watched == [True, False, False, True, False, False, True]
    first = [r for r in monitor.records if r["layer"] == "0"]
    assert [r["step"] for r in first] == [0, 3, 6]
    assert [r["input_rms"] for r in first] == pytest.approx([0.0, 3.0, 6.0])
    modules = [m for m in net.modules() if m._forward_hooks]
    assert not modules
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in net.parameters())


def test_layers_that_did_not_run_and_frozen_ones() -> None:
    net = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4), "frozen": nn.Linear(4, 4)})
    net["frozen"].requires_grad_(False)
    with NumericsMonitor(net) as monitor:
        net["frozen"](net["used"](torch.randn(2, 4))).sum().backward()
        monitor.step()
    used, idle, frozen = monitor.records
    assert used["weight_grad_rms"] > 0
    assert idle["input_rms"] is idle["weight_rms"] is idle["output_grad_clipped"] is None
    assert frozen["weight_grad_rms"] is None
    assert frozen["output_grad_rms"] == pytest.approx(1.0)


def test_nothing_is_changed() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4)
    x, grads = torch.randn(2, 3, 160, 160), []
    for watch in (False, True):
        torch.manual_seed(0)
        monitor = NumericsMonitor(model) if watch else None
        step(model, x)
        grads.append([p.grad for p in model.parameters()])
        if monitor is not None:
            monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).train()

    def run(monitor: NumericsMonitor, steps: range) -> None:
        for index in steps:
            step(net, torch.full((2, 4), float(index)))
            monitor.step()
        monitor.save(tmp_path)
        monitor.close()

    whole = NumericsMonitor(net, every=2)
    run(whole, range(6))
    again = NumericsMonitor(net, every=2)
    again.resume(tmp_path, 3)
    run(again, range(3, 6))
    assert again.records == whole.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numerics.csv", "numerics.png"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="every=0: expected a whole number of at least 1"):
        NumericsMonitor(nn.Linear(2, 2), every=0)
    with pytest.raises(ValueError, match="ReLU has no linear layer and no convolution"):
        NumericsMonitor(nn.ReLU())
