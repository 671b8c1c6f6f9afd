"""Graphs: batch norms folded, layers swapped for the kernel, what follows them computed along, same outputs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revnets
from revnets.deploy.bind import bind
from revnets.deploy.engines import load
from revnets.deploy.graph import ATEN, ExportError, calls, export_graph, export_program, worst_error
from revnets.deploy.lower import NEW_MEMORY, OPS, lower
from revnets.kernels.build import kernel_problem

from .nets import Fused, Net, Odd, evaluated, images, pruned_weight

needs_kernel = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")


def targets(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.ReLU, nn.GELU])
def test_lowered_network(act: type[nn.Module]) -> None:
    model, x = Net(act), images(3)
    expected = evaluated(model, x)
    graph = export_graph(model, x)
    assert not list(calls(graph, ATEN.batch_norm.default))
    assert worst_error(evaluated(graph, x), expected) < 1e-5
    layers = lower(graph, x, max_density=0.3)
    assert [layer.choice for layer in layers].count("sparse") == 5
    assert [layer.choice for layer in layers].count("depthwise") == 2
    if act is not nn.GELU:  # which stays an operator of its own
        kinds = targets(graph)
        assert kinds.count("revnets.sparse_conv2d.default") == 5
        assert sum("add" in kind for kind in kinds) == 0, "residual sums are part of the convolutions"
        assert sum(kind.startswith("aten.") for kind in kinds) <= 5, kinds
    assert worst_error(evaluated(graph, x), expected) < 1e-5
    bound = bind(copy.deepcopy(graph))
    for batch in (1, 3, 8):
        x = images(batch, 24)
        assert worst_error(evaluated(bound, x), evaluated(model, x)) < 1e-5


@needs_kernel
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_linear_layers_of_one_pixel_are_bound(batch: int) -> None:
    """Those of few images, a number that is known."""
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 7)).eval()
    model[0].weight.data[:, 1:] = 0
    x = images(batch, 12)
    graph = export_graph(model, x, any_batch=False)
    lower(graph, x, max_density=0.5)
    bind(graph)
    assert (ATEN.linear.default in [node.target for node in graph.graph.nodes]) == (batch > 8)
    assert worst_error(evaluated(graph, x), evaluated(model, x)) < 1e-5


def test_only_what_is_safe_is_fused() -> None:
    model, x = Odd().eval(), images(2, 12, channels=8)
    expected = evaluated(model, x.clone())
    graph = export_graph(model, x)
    layers = lower(graph, x, max_density=1.0)
    assert [layer.choice for layer in layers] == ["sparse"] * 5
    assert worst_error(evaluated(graph, x.clone()), expected) < 1e-5


def _other_half(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y.chunk(2, 1)[0].relu_()
    return net.b(y)


def _viewed(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y.view(x.shape[0], 4, 24, 12).relu_()
    return net.b(y)


def _sum_in_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    view = y.view(y.shape)
    view += net.b(x)
    return y * 2.0


def _input_changed_by_a_view(net: Any, x: Tensor) -> Tensor:
    u = x * 1.0
    view, y = u.view(u.shape), net.a(u)
    view.relu_()
    return F.relu(y) + u


def _residual_changed(net: Any, x: Tensor) -> Tensor:
    r = x * 1.0
    y = net.a(x) + r
    r.relu_()
    return F.relu(y) + r


def _residual_changed_by_a_view(net: Any, x: Tensor) -> Tensor:
    r = x * 1.0
    view, y = r.view(r.shape), net.a(x) + r
    view.sigmoid_()
    return F.relu(y) * 2.0


ODD_WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a computed bias": lambda net, x: F.conv2d(x, net.a.weight, net.a.bias * 3.0),
    "a computed bias before a norm": lambda net, x: net.norm(F.conv2d(x, net.a.weight, net.a.bias * 3.0)),
    "a computed bias of a depthwise layer": lambda net, x: F.conv2d(x, net.d.weight, net.d.bias * 3.0, 1, 1, groups=8),
    "a norm of computed weights": lambda net, x: F.batch_norm(
        net.a(x), net.norm.running_mean, net.norm.running_var, net.norm.weight * 3.0, net.norm.bias - 1.0
    ),
    "a sum with bools": lambda net, x: net.a(x) + (x > 0),
    "a sum with whole numbers": lambda net, x: F.relu(net.a(x) + (4 * x).long()),
    "without a batch": lambda net, x: F.relu(net.a(x[0])),
    "a sum with a factor": lambda net, x: torch.add(net.a(x), x, alpha=2.0),
    "a sum with a factor, turned": lambda net, x: torch.add(x, net.a(x), alpha=-0.5),
    "a clamp from below 0": lambda net, x: F.hardtanh(net.a(8 * x), -1.0, 6.0),
    "a clamp to less than 6": lambda net, x: F.hardtanh(net.a(8 * x), 0.0, 1.0),
    "a clamp as ReLU6's": lambda net, x: F.hardtanh(net.a(8 * x), 0.0, 6.0),
    "a norm that is not alone": lambda net, x: net.norm(y := net.a(x)) + y,
    "a norm of the batch": lambda net, x: F.batch_norm(
        net.a(x), net.norm.running_mean, net.norm.running_var, training=True, momentum=0.0
    ),
    "corners aligned": lambda net, x: net.b(
        F.interpolate(net.a(x), scale_factor=2, mode="bilinear", align_corners=True)
    ),
    "unequal factors": lambda net, x: net.b(F.interpolate(net.a(x), scale_factor=(2, 4), mode="bilinear")),
    "unequal strides": lambda net, x: F.conv2d(x, net.d.weight, net.d.bias, (1, 2), (0, 1), 1, 8),
    "a half is changed": _other_half,
    "a view is changed": _viewed,
    "a sum in a view": _sum_in_a_view,
    "the input is changed by a view": _input_changed_by_a_view,
    "the residual is changed": _residual_changed,
    "the residual is changed by a view": _residual_changed_by_a_view,
}


class OddWay(nn.Module):
    """Convolutions for ``ODD_WAYS``."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        self.way = ODD_WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_output_that_is_none_is_never_near(place: int, odd: float) -> None:
    expected = [torch.ones(2), torch.ones(3), torch.ones(4)]
    outputs = [t.clone() for t in expected]
    outputs[place][-1] = odd
    assert worst_error(outputs, expected) == float("inf")
    assert worst_error(expected, expected) == 0


@pytest.mark.parametrize("way", ODD_WAYS)
def test_numbers_stay_the_same(way: str) -> None:
    """Whatever is read late, changed in place or computed: by the graph, lowered, and bound."""
    model, x = OddWay(way).eval(), images(2, 12, channels=8)
    expected = evaluated(model, x)
    graph = export_graph(model, x, any_batch=False)
    torch.testing.assert_close(evaluated(graph, x), expected, rtol=1e-5, atol=1e-5)
    lower(graph, x, max_density=1.0)
    torch.testing.assert_close(evaluated(graph, x), expected, rtol=1e-5, atol=1e-5)
    if kernel_problem() is None:
        torch.testing.assert_close(evaluated(bind(graph), x), expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("batch", [1, 3])
def test_what_stands_between_layers_is_bound_with_them(batch: int) -> None:
    """The whole network in one call of the kernel, for other batch sizes as well."""
    model = Fused().eval()
    for size in (32, 64):
        x = images(2, size)
        graph = export_graph(model, x)
        lower(graph, x, max_density=1.0)
        bind(graph)
        targets = [node.op for node in graph.graph.nodes if node.op.startswith("call") and "getitem" not in node.name]
        assert targets == ["call_module"]
        x = images(batch, size, seed=2)
        torch.testing.assert_close(graph(x), evaluated(model, x), rtol=1e-5, atol=1e-5)


@needs_kernel
def test_bound_graphs_are_copied_and_refuse_what_they_cannot_compute() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    x = images(2, 9)
    graph = export_graph(net, x)
    lower(graph, x, max_density=1.0)
    bound = bind(graph)
    for one in (bound, copy.deepcopy(bound)):
        with torch.device("meta"):
            y = evaluated(one, x)
        torch.testing.assert_close(y, evaluated(net, x))
    for other in (x.double(), x.half(), x.bool()):
        with pytest.raises(ValueError, match=r"expected torch.float32"):
            bound(other)
    for size in (3, 4):
        with pytest.raises(ValueError, match=r"too small"):
            bound(images(2, size))


@needs_kernel
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_under_autocast(act: type[nn.Module]) -> None:
    """Dense layers compute in bfloat16 there; what the kernel reads of them is converted."""
    model, x = Net(act), images(2)
    graph = export_graph(model, x)
    lower(graph, x, max_density=0.3)
    bound = bind(copy.deepcopy(graph))
    assert list(calls(bound, ATEN.conv2d.default))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one in (graph, bound):
            assert worst_error(evaluated(one, x), evaluated(model, x)) < 0.05


def test_choice_by_measuring() -> None:
    """What was measured decides; nothing is said of which is faster, that is the machine's."""
    net = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1))
    nn.init.zeros_(net[0].weight)
    x = images(1, 48, channels=64)
    new_memory = NEW_MEMORY * 4 * x.numel()  # which torch's output takes, and the kernel's does not
    for layer in lower(export_graph(net, x), x):
        assert layer.dense_seconds is not None
        assert layer.sparse_seconds is not None
        faster = "sparse" if layer.sparse_seconds < layer.dense_seconds + new_memory else "dense"
        assert layer.choice == faster, layer.reason


def test_linear_layers_and_sequences() -> None:
    net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6)).eval()
    for layer in (net[0], net[2]):
        layer.weight.data.copy_(pruned_weight(*layer.weight.shape, sparsity=0.8))
    x = torch.randn(2, 9, 12)
    graph = export_graph(net, x)
    assert [layer.choice for layer in lower(graph, x, max_density=0.5)] == ["sparse", "sparse"]
    torch.testing.assert_close(evaluated(graph, x), evaluated(net, x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluated(graph, x[:1, :1]), evaluated(net, x[:1, :1]), rtol=1e-5, atol=1e-6)


def test_sparse_layers_of_the_library_become_plain_ones() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    model = revnets.convert(net, "sparse:0.75", input_size=(3, 8, 8)).model.eval()
    x = images(2, 8)
    graph = export_graph(model, x)
    (layer,) = [one for one in lower(graph, x, max_density=0.3) if one.choice == "sparse"]
    assert layer.density == 0.25
    torch.testing.assert_close(evaluated(graph, x), evaluated(model, x), rtol=1e-5, atol=1e-6)


def test_lowered_programs_are_saved_and_compiled(tmp_path: Any) -> None:
    model, x = Net(), images(2)
    graph = export_graph(model, x)
    lower(graph, x, max_density=0.3)
    torch.export.save(export_program(graph, x), tmp_path / "model.pt2")
    size = (tmp_path / "model.pt2").stat().st_size
    run = load(tmp_path / "model.pt2", trust=True)  # of torch, without the seal of `deploy`
    assert worst_error(run(images(5)), [evaluated(model, images(5))]) < 1e-5
    assert {node.target for node in calls(graph, OPS.sparse_conv2d.default)} == {OPS.sparse_conv2d.default}
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    assert worst_error(evaluated(compiled, x), evaluated(model, x)) < 1e-5
    assert size > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["revbifpn_s0", "mobilenetv3_small_100", "resnet18", "vit_tiny_patch16_224"])
def test_networks_of_timm(name: str) -> None:
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() > 2000 and parameter.shape[1] > 3:
            parameter.data *= torch.rand_like(parameter) < 0.1
    x = images(2, 224)
    expected = evaluated(model, x)
    graph = export_graph(model, x)
    layers = lower(graph, x, max_density=0.3)
    assert sum(layer.choice == "sparse" for layer in layers) > 10
    bind(graph)
    assert worst_error(evaluated(graph, x), expected) < 1e-4


def test_models_that_cannot_be_exported() -> None:
    class Data(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch.export refuses the model"):
        export_graph(Data(), images(2))
