"""Whole networks of bytes: equal to whole numbers to the bit, near to the float network, with the zeros skipped."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from revnets.deploy.bind import bind
from revnets.deploy.engines import load
from revnets.deploy.graph import ExportError, export_graph
from revnets.deploy.int8_ranges import Range
from revnets.deploy.lower_int8 import lower_int8
from revnets.deploy.quantize import quantize
from revnets.kernels import byte_ops
from revnets.kernels.build import kernel_problem

from .nets import Net, pruned_weight
from .test_programs import STEPS, C, Program, Step

pytestmark = pytest.mark.skipif(kernel_problem() is not None, reason="no C++ compiler for the sparse kernel")


class Residuals(nn.Module):
    """What ResNets have: a max pool, sums in place of two convolutions, ReLUs in place, a gate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc = nn.Conv2d(3, 10, 7, 2, 3), nn.Linear(12, 5)
        self.a, self.b, self.down = nn.Conv2d(10, 12, 3, 2, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(10, 12, 1, 2)
        self.grouped, self.reduce, self.expand = (
            nn.Conv2d(12, 12, 3, 1, 1, groups=2),
            nn.Conv2d(12, 5, 1),
            nn.Conv2d(5, 12, 1),
        )
        for layer in (self.a, self.b, self.grouped):
            layer.weight.data.copy_(pruned_weight(*layer.weight.shape, sparsity=0.6) / layer.weight[0].numel() ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, 3, H, W)``. Returns: ``(N, 5)``."""
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, 2, 1)
        y = self.b(F.relu(self.a(x), inplace=True))
        y += self.down(x)
        y = F.relu(y, inplace=True)
        z = F.silu(self.grouped(y))
        z = z * torch.sigmoid(self.expand(F.relu(self.reduce(z.mean((2, 3), keepdim=True)))))
        z = F.hardswish(y + z)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(z, 1), 1))


def plain(graph: fx.GraphModule, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """By whole numbers of torch."""
    with monkeypatch.context() as patch:
        patch.setattr(byte_ops, "kernel_problem", lambda: "there is none")
        patch.setattr(byte_ops, "warn_of_dense_path", lambda: None)
        found = graph(x)
    return [found] if isinstance(found, Tensor) else list(found)


def float_layers(graph: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "int8" not in str(n.target)]


@torch.no_grad()
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
@pytest.mark.parametrize("kind", [Net, Residuals])
def test_networks(kind: type[nn.Module], act: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    net = (Net(act) if kind is Net else Residuals()).eval()
    x = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(1))
    graph = export_graph(net, x)
    made = lower_int8(graph, [x])
    assert (made.left, made.layers) == (0, 9 if kind is Net else 8)
    assert set(float_layers(graph)) <= {"aten.flatten.using_ints"}
    expected = plain(graph, x, monkeypatch)[0]
    assert float((expected - net(x)).norm() / net(x).norm()) < 0.1
    bound = bind(copy.deepcopy(graph))
    for batch in (x, x[:1]):
        assert torch.equal(bound(batch), expected[: len(batch)])
        assert torch.equal(graph(batch), expected[: len(batch)])


@torch.no_grad()
def test_zeros_are_skipped() -> None:
    net = Net().eval()
    x = torch.randn(2, 3, 32, 32)
    graph = export_graph(net, x)
    lower_int8(graph, [x])
    node = next(
        n for n in graph.graph.nodes if str(n.target) == "revnets.int8_conv2d.default" and n.kwargs["in_channels"] > 3
    )
    values = getattr(graph, node.kwargs["values"].target)
    dense = net.blocks[0].expand.weight  # type: ignore[union-attr]
    assert len(values) < 0.5 * dense.numel() / 4  # type: ignore[union-attr,operator]


@torch.no_grad()
def test_files(tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(8, 3, 32, 32)
    made = quantize(net, x, tmp_path, engine="sparse")
    assert made.path.suffix == ".pt2"
    assert made.error < 0.1
    assert made.zeros > 0.5 * made.weights
    graph = export_graph(net, x)
    lower_int8(graph, [x])
    assert torch.equal(load(made.path)(x)[0], graph(x))
    with pytest.raises(ExportError, match="entropy"):
        quantize(net, x, tmp_path, engine="sparse", calibration="entropy")
    with pytest.raises(ExportError, match="runs no INT8"):
        quantize(net, x, tmp_path, engine="torch")


@torch.no_grad()
def test_percentile_cuts_off_the_outermost() -> None:
    net, x = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval(), torch.randn(2, 4, 80, 80)
    x[0, 0, 0, 0] = 1e4
    errors = []
    for calibration in ("minmax", "percentile"):
        graph = export_graph(net, x)
        lower_int8(graph, [x], calibration)
        y = x[1:]
        errors.append(float((graph(y) - net(y)).norm() / net(y).norm()))
    assert errors[1] < 0.05 < errors[0]


def test_ranges_hold_zero() -> None:
    assert Range.of(1.0, 2.55) == Range.of(0.0, 2.55)
    assert Range.of(-2.55, -1.0).zero == 255
    assert Range.of(0.0, 0.0).byte(1.0) == 255


@torch.no_grad()
def check(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit as by whole numbers; and near enough to floats that no step read what was changed, or was not."""
    program, x = Program(steps), torch.randn(2, C, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = program(x)
    graph = export_graph(program, x)
    lower_int8(graph, [x])
    numbers = plain(graph, x, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(graph(x), numbers, strict=True))
    bound = list(bind(graph)(x))  # floats between bytes are rounded otherwise there
    for a, b, c in zip(numbers, bound, expected, strict=True):
        assert float((a - c).norm()) <= 0.2 * float(c.norm()) + 1e-3
        assert float((b - c).norm()) <= 0.2 * float(c.norm()) + 1e-3


@settings(max_examples=6, deadline=None)
@given(STEPS)
def test_programs(steps: list[Step]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(steps, patch)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_many_programs(steps: list[Step]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(steps, patch)
