"""Networks under munit scaling: conversion and back, roles, masks, reversible gradients to the bit."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from revnets.layers import convert, count_costs, fold, fp8_products
from revnets.layers.munit.layers import MunitScaled
from revnets.reversible import every_pass
from tests.helpers import assert_same_step, training_step

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")

# --- conversion ------------------------------------------------------------------------------------------------------

TINY = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"]


@pytest.mark.parametrize("name", [*TINY, pytest.param("test_revbifpn", marks=pytest.mark.slow)])
def test_conversion_keeps_the_function_and_back(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, *timm.get_pretrained_cfg(name).input_size)
    expected = model(x)
    report = convert(copy.deepcopy(model), "mus")
    assert not report.skipped
    assert report.after.flops == report.before.flops
    assert report.after.parameters == report.before.parameters
    atol = 1e-5 * expected.abs().max().item()
    assert torch.allclose(report.model(x), expected, rtol=1e-4, atol=atol)
    plain = fold(report.model)
    assert not [m for m in plain.modules() if isinstance(m, MunitScaled)]
    assert list(plain.state_dict()) == list(model.state_dict())
    for (key, value), was in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(value, was, rtol=1e-6, atol=0), key
    fp8 = convert(copy.deepcopy(model), "mus_fp8").model
    assert sum(m.fp8 for m in fp8.modules() if isinstance(m, MunitScaled)) > 3
    assert F.cosine_similarity(fp8(x).flatten(), expected.flatten(), dim=0) > 0.9
    assert torch.allclose(fold(fp8)(x), expected, rtol=1e-4, atol=atol)


def test_roles_by_position_and_by_name() -> None:
    def roles(model: nn.Module) -> dict[str, str]:
        return {name: m.role for name, m in model.named_modules() if isinstance(m, MunitScaled)}

    found = roles(convert(timm.create_model("test_resnet"), "mus_fp8").model)
    ends = {name: role for name, role in found.items() if role != "hidden"}
    assert ends == {"conv1.0": "input", "fc": "output"} or ends == {"conv1": "input", "fc": "output"}
    options = {"type": "mus_fp8", "roles": {"patch_embed.proj": "hidden"}}
    found = roles(convert(timm.create_model("test_vit"), options).model)
    assert {name for name, role in found.items() if role != "hidden"} == {"head"}


def test_new_weights_on_request() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1))
    layer: Any = net[2]
    layer.weight.requires_grad_(False)
    kept = convert(copy.deepcopy(net), "mus", input_size=(3, 16, 16)).model
    assert torch.allclose(kept[2].weight * kept[2].scale, layer.weight, rtol=1e-6)
    assert [layer.weight.requires_grad for layer in kept[::2]] == [True, False, True]
    drawn = convert(net, "mus_fp8:init:backend:emulate", input_size=(3, 16, 16)).model
    assert all(layer.weight.std().item() == pytest.approx(1, abs=0.1) for layer in drawn[::2])
    assert [layer.fp8 for layer in drawn[::2]] == [False, True, False]
    assert drawn[2].backend == "emulate"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "mus+mus_fp8",
            r"mus_fp8: Sequential is munit-scaled already \(2 layers, such as 0\): revnets.layers.fold makes",
        ),
        ({"type": "mus", "roles": {"fc": "hidden"}}, "roles names 'fc', which is no layer to be converted: .* 0, 1"),
        (
            {"type": "mus", "roles": {"0": "middle"}},
            "roles={'0': 'middle'}: expected a dictionary from names of layers",
        ),
        ("mus_fp8:backend:cuda", "mus_fp8: backend='cuda': expected one of scaled_mm, emulate"),
    ],
)
def test_conversions_that_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), spec, input_size=(8,))


def test_converting_twice_changes_nothing() -> None:
    model = convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "mus", input_size=(8,)).model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="munit-scaled already"):
        convert(model, "mus", input_size=(8,))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "member",
    [
        "sparse",
        "sparse_doped",
        "sparse_factorized",
        "sparse_wide",
        pytest.param("sparse_parallel", marks=pytest.mark.slow),
    ],
)
def test_sparse_layers_under_munit_scaling(member: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model("test_resnet", num_classes=10)
    sparse = convert(model, f"{member}:0.75").model.eval()
    expected, cost = sparse(x), count_costs(sparse, (3, 64, 64))
    report = convert(copy.deepcopy(sparse), "mus", input_size=(3, 64, 64))
    assert torch.allclose(report.model(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert report.after.sparse_flops == cost.sparse_flops
    assert report.after.active_parameters == cost.active_parameters
    assert torch.allclose(fold(report.model.eval())(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    both = convert(timm.create_model("test_resnet", num_classes=10), f"{member}:0.75+mus_fp8:init").model
    both(x).square().mean().backward()
    masked = [m for m in both.modules() if hasattr(m, "mask")]
    assert masked
    assert all(isinstance(m, MunitScaled) for m in masked)
    assert not any(m.weight.grad[~m.mask].any() for m in masked)


# --- reversible networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "autocast"),
    [("mus_fp8", False), ("mus_fp8:backend:scaled_mm", True), pytest.param("mus:init", False, marks=pytest.mark.slow)],
)
def test_reversible_gradients_are_the_same_bits(layers: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", layers=layers, num_classes=10, drop_path_rate=0.2).train()
    x, twin = torch.randn(2, 3, 32, 32), copy.deepcopy(model)
    fp8_products(reset=True)
    stored = training_step(model, (x,), lambda y: y.float().square().mean(), "store", autocast=autocast)
    products = sum(fp8_products(reset=True).values())
    rebuilt = training_step(twin, (x,), lambda y: y.float().square().mean(), "reversible", autocast=autocast)
    assert_same_step(rebuilt, stored, 0)
    if "fp8" in layers:
        assert sum(fp8_products().values()) > products > 100  # it did recompute


@pytest.mark.parametrize("backend", ["emulate", pytest.param("scaled_mm", marks=pytest.mark.slow)])
def test_recomputed_branches_are_the_same_bits(backend: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_revbifpn", layers=f"mus_fp8:backend:{backend}", num_classes=10).train()
    model.set_mode("reversible")
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MunitScaled) and m.fp8}
    for name, layer in layers.items():
        layer.register_forward_hook(every_pass(lambda m, a, y, name=name: seen.setdefault(name, []).append(y.clone())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 32, 32))
    y.float().square().mean().backward()
    again = [name for name, outputs in seen.items() if len(outputs) == 2]
    assert len(again) > 0.9 * len(layers)
    assert all(torch.equal(*seen[name]) for name in again)
