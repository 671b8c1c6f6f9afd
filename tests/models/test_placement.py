"""`device=` and `dtype=` of every registered network and every layer of the registry, `"meta"` included."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.layers import list_layers
from revnets.layers.geometry import children_first, reset_parameters
from revnets.layers.sparse_ift.sparse import MaskedWeight, SparseLinear
from tests.models.registry import TINY, TINY_TRANSFORMERS, own_images, parametrize_by_cost

SPECS = [
    f"{name}:0.5" if name.startswith("sparse") else f"{name}:backend:emulate" if name == "mus_fp8" else name
    for name in list_layers()
]
DEFERRED = [
    *((name, {}) for name in (TINY, *TINY_TRANSFORMERS)),
    # plain convolutions inside that are not drawn as others
    pytest.param(TINY, {"layers": "sparse_doped:0.5"}, marks=pytest.mark.slow),
    (TINY, {"zero_init_last": True, "in_chans": 5, "stem_stride": 1, "num_classes": 7}),
    (TINY_TRANSFORMERS[1], {"class_token": True, "reg_tokens": 2, "num_classes": 7}),
]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fill_with_rubbish(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


def assert_placed(model: nn.Module) -> None:
    for key, tensor in tensors(model).items():
        assert tensor.is_meta, key
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point(), key


@parametrize_by_cost()
def test_every_network_is_made_where_and_as_it_is_told(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16, num_classes=7)
    assert_placed(model)
    model.reset_classifier(5)
    assert_placed(model)


@pytest.mark.parametrize("spec", SPECS)
def test_every_layer_of_the_registry_is_made_where_it_is_told_and_initialises_itself(spec: str) -> None:
    place: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    layers = [nn.Conv2d(c, 8, 3, padding=1, **place) for c in (3, 8)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.BatchNorm2d(8, **place), nn.ReLU(), nn.Flatten())
    net = revnets.convert(nn.Sequential(net, nn.Linear(512, 4, **place)), spec, input_size=(3, 8, 8)).model
    assert_placed(net)
    fill_with_rubbish(net.to_empty(device="cpu"))
    for module in children_first(net):
        reset_parameters(module)
    for module in net.modules():
        if isinstance(module, MaskedWeight):
            assert int(module.mask.sum()) == module.effective_weight().count_nonzero() < module.mask.numel()
    assert net(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(("name", "arguments"), DEFERRED, ids=str)
def test_a_deferred_network_starts_as_one_made_at_once(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    at_once, deferred = timm.create_model(name, **arguments), timm.create_model(name, device="meta", **arguments)
    fill_with_rubbish(deferred.to_empty(device="cpu"))
    deferred.init_weights()
    expected = tensors(at_once)
    for key, tensor in tensors(deferred).items():
        like = expected[key]
        if not like.is_floating_point():
            assert tensor.sum() == like.sum(), key  # masks: as many weights; counters
        elif like.unique().numel() == 1:
            assert tensor.equal(like), key
        elif like.numel() > 500:
            assert tensor.detach().std().item() == pytest.approx(like.detach().std().item(), rel=0.25), key
    x = own_images(name)[:, :1].expand(-1, arguments.get("in_chans", 3), -1, -1)
    loss = deferred.train()(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in deferred.parameters() if p.requires_grad)


def test_masks_that_were_loaded_or_set_are_not_drawn_again() -> None:
    source = SparseLinear(8, 8, sparsity=0.5)
    layer = SparseLinear(8, 8, sparsity=0.5, device="meta").to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    layer.reset_parameters()
    assert layer.mask.equal(source.mask)
    for other in (layer, SparseLinear(8, 8, sparsity=0.5, device="meta").to_empty(device="cpu")):
        other.set_mask(~source.mask)
        other.reset_parameters()
        assert other.mask.equal(~source.mask)
        assert other.weight[~other.mask].count_nonzero() == 0


def test_a_mask_is_drawn_again_after_the_network_was_on_the_meta_device() -> None:
    layer = SparseLinear(8, 8, sparsity=0.5).to("meta").to_empty(device="cpu")
    layer.mask.fill_(True)
    layer.reset_parameters()
    assert layer.mask.sum() == 32


def test_placement_of_norms_that_know_no_placement() -> None:
    """Factories that take channels alone go on to work where nothing is said about device or dtype."""
    model = timm.create_model(TINY, norm_layer=lambda channels: nn.GroupNorm(1, channels))
    assert isinstance(model.head.bn, nn.GroupNorm)
