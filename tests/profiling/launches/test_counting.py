"""Launches: what is counted, what the networks' steps may call at most, and the command that tells."""

import json
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import revnets
from revnets.cli import app
from revnets.layers import MBConv
from revnets.profiling.bench.ablation import COMPILED
from revnets.profiling.bench.launches import LaunchRow, ratios
from revnets.profiling.bench.timing import Case
from revnets.profiling.fake import ProfileError
from revnets.profiling.launches.counting import Kernels, LaunchCounter, Launches, count_kernels, count_launches
from revnets.profiling.launches.cuda import count_cuda_kernels
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


BOUNDS = {"reversible": 1250, "checkpoint": 1250, "store": 1000}  # a hundredth more than counted
ON_CUDA = {"reversible": 1180, "checkpoint": 1180, "store": 925}  # likewise


@pytest.mark.parametrize("mode", BOUNDS)
def test_a_small_network_keeps_its_launches(mode: str) -> None:
    assert launches("test_revbifpn", mode).calls.total() <= BOUNDS[mode]


def cuda_kernels(name: str, mode: str, size: int = 64, batch: int = 4) -> Counter[str]:
    model = timm.create_model(name, num_classes=10).train().to(memory_format=torch.channels_last)
    x = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
    return count_cuda_kernels(revnets.set_mode(model, mode), x)


@pytest.mark.parametrize("mode", ON_CUDA)
def test_a_small_network_keeps_its_kernels_on_cuda(mode: str) -> None:
    assert cuda_kernels("test_revbifpn", mode).total() <= ON_CUDA[mode]


@pytest.mark.slow
def test_s0_keeps_its_kernels_on_cuda() -> None:
    found = cuda_kernels("revbifpn_s0", "reversible")
    assert found.total() <= 2500
    assert found["triton.se_kernel"] == found["triton.se_grad_kernel"] == 99
    assert cuda_kernels("revbifpn_s0", "reversible", size=224, batch=64).total() <= 2800


def test_kernels_on_cuda_are_those_of_its_implementation() -> None:
    """One norm with squeeze-and-excite between two convolutions, in each pass; sizes choose other kernels."""
    net = MBConv(4, 4, se_ratio=0.5)
    forward = ["moments_kernel", "se_kernel", "small_norm_act_kernel"]
    backward = ["norm_act_kernel", "norm_grad_kernel", "norm_grad_kernel", "se_grad_kernel"]  # p is computed again
    found = count_cuda_kernels(net, torch.ones(2, 4, 6, 6), lambda y: y.sum())
    ours = sorted(name.partition(".")[2] for name in found.elements() if name.startswith("triton."))
    assert ours == sorted(forward + backward)
    assert found["aten.convolution"] == 2
    assert found["aten.convolution_backward"] == 3  # the image's gradient is not asked for
    large = count_cuda_kernels(net, torch.ones(2, 4, 300, 300), lambda y: y.sum())
    assert large["triton.gate_sums_kernel"] == large["triton.scale_kernel"] == 1
    assert large["triton.sums_kernel"] == 2
    assert large["triton.small_norm_act_kernel"] == 0


def test_what_fake_tensors_cannot_run_is_one_sentence() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0] * float(x.sum())

    with pytest.raises(ProfileError, match="depends on values"):
        count_cuda_kernels(Odd(), torch.ones(2, requires_grad=True))


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
    on_cuda = rows[0]["on_cuda"]
    assert on_cuda.pop("total") == sum(on_cuda.values())
    assert "kernels on CUDA (Triton)" in " ".join(result.output.split())
