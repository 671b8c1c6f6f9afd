"""Random programs, full of views and of changes in place, compute the same exported, lowered and bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from revnets.deploy.bind import bind
from revnets.deploy.graph import export_graph
from revnets.deploy.lower import lower
from revnets.kernels.build import kernel_problem

pytestmark = pytest.mark.skipif(kernel_problem() is not None, reason="no C++ compiler for the sparse kernel")

C = 8
Step = tuple[str, int, int]


class Parts(nn.Module):
    """What programs are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.deep = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, 1, 1, groups=C)
        self.narrow, self.wide = nn.Conv2d(C // 2, C // 2, 1), nn.Conv2d(C, C, 7, 3, 3, groups=C)
        self.norm, self.gain = nn.BatchNorm2d(C), nn.Parameter(torch.rand(C))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def computed_bias(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return F.conv2d(x, self.conv.weight, self.conv.bias * self.gain)


def view_changed(parts: Parts, a: Tensor, b: Tensor) -> list[Tensor]:
    view = a.view(a.shape)
    view += parts.conv(b)
    return []


def sum_changed(parts: Parts, a: Tensor, b: Tensor) -> list[Tensor]:
    y = parts.deep(a)
    y += b
    return [F.relu(y, inplace=True)]


def squeezed(parts: Parts, a: Tensor, b: Tensor) -> list[Tensor]:
    y = F.hardswish(parts.deep(a))
    return [parts.conv(y * F.hardsigmoid(parts.conv(y.mean((2, 3), keepdim=True)))) + b]


def coupled(parts: Parts, a: Tensor, b: Tensor) -> list[Tensor]:
    first, second = a.chunk(2, 1)
    first = first + parts.narrow(second)
    return [torch.cat([first, second + parts.narrow(first)], 1)]


def merged(parts: Parts, a: Tensor, b: Tensor) -> list[Tensor]:
    small = [F.max_pool2d(a, 2), parts.wide(b)]
    y, z = (F.interpolate(x, scale_factor=6 // x.shape[2], mode="bilinear") for x in small)
    return [a + y, z + b]


ALIKE: dict[str, Callable[[Parts, Tensor, Tensor], list[Tensor]]] = {  # of C channels both
    "conv": lambda parts, a, b: [parts.conv(a)],
    "depthwise": lambda parts, a, b: [parts.deep(a)],
    "conv, norm": lambda parts, a, b: [parts.norm(parts.conv(a))],
    "conv, sum, relu": lambda parts, a, b: [F.relu(parts.conv(a) + b)],
    "squeezed": squeezed,
    "coupled": coupled,
    "merged": merged,
    "computed bias": lambda parts, a, b: [parts.computed_bias(a)],
    "view changed": view_changed,
    "sum changed": sum_changed,
    "halves": lambda parts, a, b: list(a.chunk(2, 1)),
    "slice": lambda parts, a, b: [a[:, 2:6]],
    "sum": lambda parts, a, b: [a + b],
    "sum in place": lambda parts, a, b: [a.add_(b)],
}
ANY: dict[str, Callable[[Parts, Tensor, Tensor], list[Tensor]]] = {
    "relu": lambda parts, a, b: [F.relu(a)],
    "relu in place": lambda parts, a, b: [a.relu_()],
    "hardswish": lambda parts, a, b: [F.hardswish(a, inplace=True)],
    "sigmoid": lambda parts, a, b: [torch.sigmoid(a)],
    "scaled in place": lambda parts, a, b: [a.mul_(0.5)],
    "view": lambda parts, a, b: [a.view(a.shape)],
    "gate": lambda parts, a, b: [a * a.mean((2, 3), keepdim=True)],
    "pool": lambda parts, a, b: [F.max_pool2d(a, 3, 1, 1)],
    "cat": lambda parts, a, b: [torch.cat([a, b], 1)] if a.shape[1] + b.shape[1] == C else [],
}
STEPS = st.lists(
    st.tuples(st.sampled_from([*ALIKE, *ANY]), st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=14
)


class Program(nn.Module):
    """Steps, each of which reads two of the last five tensors, in eval mode."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.parts, self.steps = Parts(), steps
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Args: x: ``(N, C, H, W)``. Returns: the last six tensors."""
        live = [x * 1.0]
        for name, i, j in self.steps:
            a, b = (live[-1 - index % len(live[-5:])] for index in (i, j))
            if name in ANY:
                live += ANY[name](self.parts, a, b)
            elif a.shape[1] == b.shape[1] == C:
                live += ALIKE[name](self.parts, a, b)
        return [y * 1.0 for y in live[-6:]]


@torch.no_grad()
def check(steps: list[Step]) -> None:
    program, x = Program(steps), torch.randn(2, C, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = program(x)
    graph = export_graph(program, x)
    for change in (lambda: None, lambda: lower(graph, x, max_density=1.0), lambda: bind(graph)):
        change()
        torch.testing.assert_close(list(graph(x)), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(STEPS)
def test_programs(steps: list[Step]) -> None:
    check(steps)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_many_programs(steps: list[Step]) -> None:
    check(steps)
