"""Launches: what is counted, what the networks' steps may call at most, and the command that tells."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import revnets
from revnets.cli import app
from revnets.profiling.ablation import COMPILED
from revnets.profiling.bench import Case
from revnets.profiling.launch_bench import LaunchRow, ratios
from revnets.profiling.launches import Kernels, LaunchCounter, Launches, count_kernels, count_launches
from revnets.profiling.target import Target
from revnets.reversible.grid import add_rounded


def launches(name: str, mode: str, layout: torch.memory_format = torch.channels_last) -> Launches:
    model = timm.create_model(name, num_classes=10).train().to(memory_format=layout)
    return count_launches(revnets.set_mode(model, mode), torch.randn(4, 3, 64, 64).to(memory_format=layout))


def test_views_and_empty_tensors_are_no_launches() -> None:
    with LaunchCounter() as counter:
        x = torch.empty(2, 2).fill_(1.0).view(4)[1:].detach()
        x.add_(1)
    assert dict(counter.launches.calls) == {"aten.fill_": 1, "aten.add_": 1}


def test_one_operator_of_ours_is_one_call_and_several_kernels() -> None:
    with LaunchCounter() as counter:
        add_rounded(torch.ones(2), torch.ones(2), 12)
    assert counter.launches.calls["revnets.add_rounded"] == 1
    assert counter.launches.kernels.total() == counter.launches.calls.total() + 2


@pytest.mark.parametrize("first", [True, False])
def test_the_floor_is_products_forward_and_backward(first: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    found = count_launches(net, torch.randn(2, 3, 4, 4).requires_grad_(not first))
    assert found.products["convolution"] == found.products["convolution's weight"] == 2
    assert found.products["convolution's input"] == (1 if first else 2)
    assert found.products["matrix"] == 3
    assert found.floor < found.calls.total()


BOUNDS = {"reversible": 1570, "checkpoint": 1555, "store": 1240}  # a hundredth more than counted


@pytest.mark.parametrize("mode", BOUNDS)
def test_a_small_network_keeps_its_launches(mode: str) -> None:
    assert launches("test_revbifpn", mode).calls.total() <= BOUNDS[mode]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_s0_keeps_its_launches(layout: torch.memory_format) -> None:
    reversible, store = (launches("revbifpn_s0", mode, layout).calls.total() for mode in ("reversible", "store"))
    assert reversible <= 5000
    assert reversible <= 1.3 * store


def test_recomputation_costs_forward_products_only() -> None:
    reversible, store = (launches("test_revbifpn", mode) for mode in ("reversible", "store"))
    assert reversible.products["convolution"] > store.products["convolution"]
    for name in ("convolution's input", "convolution's weight"):
        assert reversible.products[name] == store.products[name]


@pytest.mark.slow
def test_kernels_of_compiled_parts_are_counted_as_they_run() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Hardswish())
    net[1].compile(dynamic=False)
    x = torch.randn(2, 3, 4, 4)
    eager = count_launches(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish()), x)
    found = count_kernels(nn.Sequential(net, net[1]), x)  # the compiled norm twice: it is made once and runs twice
    assert found.fused.total() >= 4
    assert all("cpp_fused" in name for name in found.fused)
    assert found.others["aten.convolution"] == eager.calls["aten.convolution"] == 1
    assert not any("batch_norm" in name for name in found.others)


def test_ratios_are_to_storing() -> None:
    def row(mode: str, total: int) -> LaunchRow:
        launches = Launches()
        launches.calls["aten.mul"] = total
        return LaunchRow(Case(Target("m", 1, 1, mode)), launches)

    compiled = Kernels()
    compiled.fused["cpp_fused_mul_0"] = 5
    rows = [
        row("reversible", 13),
        LaunchRow(Case(Target("m", 1, 1, "reversible"), COMPILED), kernels=compiled),
        row("store", 10),
        LaunchRow(Case(Target("other", 1, 1, "reversible")), Launches()),
    ]
    assert [ratio for _, ratio in ratios(rows)] == [1.3, 0.5, 1.0, None]
    assert rows[1].kinds() == [("fused", 5)]


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "launches.json"
    line = ["bench", "test_revbifpn@32:4", "--launches", "--modes", "reversible,store", "--output", str(output)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    rows = json.loads(output.read_text())["rows"]
    assert [row["case"]["target"]["mode"] for row in rows] == ["reversible", "store"]
    assert f"{rows[0]['total']:,}" in result.output
    assert rows[0]["total"] == sum(rows[0]["calls"].values())
    assert rows[0]["times_store"] == rows[0]["total"] / rows[1]["total"]
    assert rows[0]["floor"] > rows[1]["floor"] > 0
