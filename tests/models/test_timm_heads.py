"""Heads that are replaced, and networks that are pruned: what timm's own tests ask, for every registered name."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.models.registry import (
    NAMES,
    REVBIFPN,
    TINY,
    TINY_TRANSFORMERS,
    absolute,
    images,
    make,
    meta_image,
    meta_model,
    meta_outputs,
    own_images,
    parametrize_by_cost,
    unpooled_shape,
    with_statistics,
)

TINIES = (TINY, *TINY_TRANSFORMERS)

# --- the classifier --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name: str) -> None:
    model, features = copy.deepcopy(meta_model(name)), meta_outputs(name)[0]

    def pooling() -> str:
        return getattr(model.global_pool, "pool_type", model.global_pool)

    def shape_after(*arguments: Any) -> tuple[int, ...]:
        model.reset_classifier(*arguments)
        assert model.num_classes == arguments[0]
        assert not any(module.training for module in model.modules())
        return tuple(model.forward_head(features).shape)

    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.get_classifier() is getattr(model, model.pretrained_cfg["classifier"])
    assert shape_after(0) == (1, model.head_hidden_size)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert shape_after(0, "") == unpooled_shape(model)
    assert shape_after(7, "max") == (1, 7)
    assert pooling() == "max"
    assert shape_after(5) == (1, 5), "the pooling stays"
    assert pooling() == "max"
    assert model.get_classifier().out_features == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TINIES)
def test_a_new_classifier_is_of_the_networks_type(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    model.reset_classifier(7)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.eval()(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_stays_frozen(name: str) -> None:
    model = copy.deepcopy(meta_model(name)).requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", TINIES)
def test_another_type_after_a_forward_pass(name: str) -> None:
    """Nothing that a pass left behind keeps the old type."""
    model, x = copy.deepcopy(meta_model(name)), meta_image(name)
    model(x)
    assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)


@pytest.mark.parametrize("pooling", ["avg", "catavgmax"])
@pytest.mark.parametrize("name", REVBIFPN)
def test_head_hidden_size_is_the_width_before_the_classifier(name: str, pooling: str) -> None:
    """Concatenated poolings are twice as wide; the features are not."""
    features = meta_outputs(name)[0]
    made = timm.create_model(name, device="meta", global_pool=pooling).eval()
    reset = copy.deepcopy(meta_model(name))
    reset.reset_classifier(7, pooling)
    for model in (made, reset):
        assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size
        assert features.shape[1] == model.num_features


# --- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [1, 2, (0, 2), (3, 0)])
def test_prune_intermediate_layers(indices: int | tuple[int, ...]) -> None:
    model = with_statistics(make(TINY))
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        full = sum(p.numel() for p in model.parameters())
        assert list(model.prune_intermediate_layers(indices)) == absolute(indices)
        maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))
    assert sum(p.numel() for p in model.parameters()) < full
    assert model.num_classes == 0


@pytest.mark.parametrize("indices", [(1,), (0, 1, 2, 3)])
def test_prune_can_keep_the_head(indices: tuple[int, ...]) -> None:
    model = with_statistics(make(TINY))
    with torch.no_grad():
        expected = model(images())
        assert model.prune_intermediate_layers(indices, prune_head=False) == list(indices)
        assert torch.equal(model(images()), expected)


def pruned_outputs(model: Any, x: Tensor, index: int) -> list[Tensor]:
    """Of everything that can be called on a network that ends at one of its maps."""
    take = model.prune_intermediate_layers([index], prune_norm=True)
    final, taken = model.forward_intermediates(x, indices=take)
    only = model.forward_intermediates(x, indices=take, intermediates_only=True)
    return [model(x), model.forward_features(x), final, *taken, *only]


@pytest.mark.parametrize("name", REVBIFPN)
def test_a_pruned_network_ends_at_the_map_that_is_left(name: str) -> None:
    model, expected = copy.deepcopy(meta_model(name)), meta_outputs(name)[1][1]
    model.prune_intermediate_layers([1, 0], prune_norm=True)
    assert model(meta_image(name)).shape == expected.shape
    assert model.num_features == model.head_hidden_size == expected.shape[1]


@pytest.mark.parametrize("index", [0, 2, 3])
def test_what_a_pruned_network_gives_is_that_map(index: int) -> None:
    model = with_statistics(make(TINY))
    with torch.no_grad():
        expected = model.forward_pyramid(images())[index]
        assert all(torch.equal(y, expected) for y in pruned_outputs(model, images(), index))


@pytest.mark.parametrize("pooling", ["avg", "catavgmax"])
@pytest.mark.parametrize("name", TINIES)
def test_a_classifier_after_pruning(name: str, pooling: str) -> None:
    if pooling == "catavgmax" and name != TINY:
        pytest.skip("timm's transformers do not concatenate poolings")
    model = make(name)
    model.prune_intermediate_layers((1,))
    model.reset_classifier(5, pooling)
    assert model.get_classifier().in_features == model.head_hidden_size
    loss = model.train()(images()).square().mean()
    loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


# --- features --------------------------------------------------------------------------------------------------------


@parametrize_by_cost()
def test_features_take_the_switch_that_timms_wrappers_have(name: str) -> None:
    """Detectors of others call it on whatever `features_only=True` gave them; gradients stay."""
    grads = []
    for enable in (False, True):
        arguments = {"mode": "store"} if hasattr(meta_model(name), "set_mode") else {}
        features = make(name, features_only=True, drop_path_rate=0.0, **arguments).train()
        features.set_grad_checkpointing(enable)
        if arguments:
            assert features.model.mode == ("checkpoint" if enable else "store")
        sum(y.square().mean() for y in features(own_images(name))).backward()
        grads.append({key: p.grad for key, p in features.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, msg=key)


def test_reversible_features_stay_reversible() -> None:
    features = make(TINY, features_only=True)
    features.set_grad_checkpointing()
    assert features.model.mode == "reversible"
