"""`torch.fx` traces every registered network: torchvision's feature extractors, timm's, and plain symbolic tracing."""

import warnings
from typing import Any

import pytest
import timm
import torch
import torch.fx
from timm.models import create_feature_extractor as timm_feature_extractor
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import revnets
from revnets.layers import list_layers
from revnets.layers.lean.norm_act import lean_layers
from revnets.reversible import RevSequential
from tests.models.registry import NAMES, TINY, make, own_images

pytestmark = pytest.mark.filterwarnings("ignore:The nodes obtained by tracing")


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    y.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def last_nodes(model: nn.Module) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, evaluation = get_graph_node_names(model)
    return {"train_return_nodes": [train[-1]], "eval_return_nodes": [evaluation[-1]]}


QUICK = [name for name in NAMES if name.startswith("test_")]
parametrize_tiny = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)


@parametrize_tiny
def test_torchvision_extracts_what_the_network_computes(name: str) -> None:
    model, x = make(name, num_classes=7, drop_rate=0.0).eval(), own_images(name)
    expected = model(x)
    traced = create_feature_extractor(model, **last_nodes(model))
    model.train(False)
    assert torch.equal(next(iter(traced.eval()(x).values())), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


@parametrize_tiny
def test_a_traced_network_trains_like_the_network(name: str) -> None:
    """As timm's own test of the backward pass, and to the bit: the traced chain still rebuilds what it needs."""
    model, x = make(name, num_classes=7, drop_rate=0.0), own_images(name)
    traced = create_feature_extractor(model, **last_nodes(model)).train()
    chains = [[m for m in net.modules() if isinstance(m, RevSequential)] for net in (traced, model)]
    assert chains[0] == chains[1]
    with lean_layers(False):  # whose gradients are the same to rounding: the ends are traced without
        got = gradients(model, next(iter(traced(x).values())))
        expected = gradients(model, model.train()(x))
    for key, grad in expected.items():
        other = got[key]
        assert grad is not None, key
        assert other is not None, key
        assert torch.equal(other, grad), key


@pytest.mark.parametrize("name", [TINY])
def test_features_by_graph_are_those_of_the_network(name: str) -> None:
    features = make(name, features_only=True).eval()
    by_graph = make(name, features_only=True, feature_cls="fx").eval()
    for got, expected in zip(by_graph(own_images(name)), features(own_images(name)), strict=True):
        assert torch.equal(got, expected)


def test_timm_extracts_by_the_name_of_a_module() -> None:
    model = make(TINY).eval()
    nodes = {f"neck.blocks.{k}": str(k) for k in range(4)}
    with torch.no_grad():
        maps = timm_feature_extractor(model, nodes)(own_images(TINY))
        expected = model.forward_pyramid(own_images(TINY))
    assert all(torch.equal(maps[str(k)], y) for k, y in enumerate(expected))


@pytest.mark.parametrize("spec", [name for name in list_layers() if name not in ("dense", "lean")])
def test_networks_of_every_layer_are_traced(spec: str) -> None:
    options = ":0.5" if spec.startswith("sparse") else ":backend:emulate" if spec == "mus_fp8" else ""
    layers = [nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    net = revnets.convert(net, spec + options, input_size=(3, 8, 8)).model.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_a_traced_network_still_says_what_it_takes() -> None:
    traced = torch.fx.symbolic_trace(timm.create_model(TINY).eval())
    with pytest.raises(ValueError, match="height and width must be divisible by 16"):
        traced(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ValueError, match="create the model with in_chans=C"):
        traced(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", [pytest.param(QUICK[0], marks=pytest.mark.slow), TINY])
def test_a_trace_of_operations_holds_each_once(name: str, training: bool) -> None:
    """`torch.jit.trace`, with which counters look at a network: those of the forward pass, in whatever mode."""
    graphs = []
    for mode in ("reversible", "store"):
        model = make(name, drop_rate=0.0)
        if hasattr(model, "mode"):
            model.set_mode(mode)
        trace = torch.jit.trace(model.train(training), own_images(name), check_trace=False)
        kinds = [node.kind() for node in trace.inlined_graph.nodes()]
        graphs.append(sorted(kinds))
    assert graphs[0] == graphs[1]
    assert graphs[0].count("aten::_convolution") >= len([m for m in model.modules() if type(m) is nn.Conv2d])
