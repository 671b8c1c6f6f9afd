"""What others put around layers and networks: reversible training gives the gradients of `store` to the bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import default_fake_quant, default_weight_fake_quant
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.helpers import assert_same_step, training_step
from tests.models.registry import TINY, images, make, own_images

NETWORKS = (TINY, "test_rev_mus_vit")
each_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str, mode: str) -> Any:
    torch.manual_seed(0)
    model = make(name, num_classes=3, mode=mode)
    for p in model.parameters():
        if p.dim() == 1:  # as after some steps: norms that start at 0 or 1 hide what is behind them
            nn.init.uniform_(p, 0.5, 1.0)
    return model.train()


def layers(model: nn.Module) -> list[nn.Module]:
    """Every fifth of those with a weight inside of the reversible chain."""
    chain = model.body if hasattr(model, "body") else model.blocks
    return [m for m in chain.modules() if isinstance(m, nn.Conv2d | nn.Linear)][::5]


class LowRank(nn.Module):
    """LoRA as a parametrization."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, fan_in = weight.flatten(1).shape
        self.a, self.b = nn.Parameter(torch.randn(2, fan_in) / 8), nn.Parameter(torch.randn(out, 2) / 8)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def _low_rank(model: nn.Module) -> None:
    model.requires_grad_(False)
    for layer in layers(model):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))


def _weight_norm(model: nn.Module) -> None:
    for layer in layers(model):
        parametrizations.weight_norm(layer)


def _older_weight_norm(model: nn.Module) -> None:
    for layer in layers(model):
        torch.nn.utils.weight_norm(layer)


def _spectral_norm(model: nn.Module) -> None:
    for layer in layers(model):
        parametrizations.spectral_norm(layer)


def _pruned(model: nn.Module) -> None:
    for layer in layers(model):
        prune.l1_unstructured(layer, "weight", 0.5)


def before(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """A wrapper module in the place of a layer, with a part of its own in front."""
    for layer in layers(model):
        parent = next(m for m in model.modules() if layer in m.children())
        name = next(n for n, child in parent.named_children() if child is layer)
        setattr(parent, name, nn.Sequential(make(), layer))


def _dropped(model: nn.Module) -> None:
    """Randomness of its own: adapters of most libraries."""
    before(model, lambda: nn.Dropout(0.2))


def _quantised_activations(model: nn.Module) -> None:
    """Training that knows of quantisation: observers follow the range of what they see, once a step."""
    before(model, default_fake_quant)


def _quantised_weights(model: nn.Module) -> None:
    for layer in layers(model):
        parametrize.register_parametrization(layer, "weight", default_weight_fake_quant())


WRAPPERS = (
    *(_low_rank, _weight_norm, _older_weight_norm, _spectral_norm, _pruned, _dropped),
    *(_quantised_activations, _quantised_weights),
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.filterwarnings("ignore:.*torch.ao.*")
@pytest.mark.parametrize("wrap", WRAPPERS)
@each_network
def test_wrapped_layers(name: str, wrap: Callable[[nn.Module], None]) -> None:
    steps = []
    for mode in ("reversible", "store"):
        model = network(name, mode)
        torch.manual_seed(1)
        wrap(model)
        steps.append(training_step(model, (own_images(name),), lambda y: y.square().mean()))
    assert_same_step(*steps, 0)
    assert sum(g is not None for g in steps[0].grads.values()) >= len(layers(model))


@pytest.mark.parametrize("name", [pytest.param(TINY, marks=pytest.mark.slow), NETWORKS[1]])
def test_averages_and_accumulation(name: str) -> None:
    """Two optimizer steps of two small batches each, and a moving average of the network."""
    results = []
    for mode in ("reversible", "checkpoint", "store"):
        model = network(name, mode)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(2)
        for batch in range(4):
            x = images(2, own_images(name).shape[-1]) + batch
            (model(x).square().mean() / 2).backward()
            if batch % 2:
                optimizer.step()
                optimizer.zero_grad()
                averaged.update_parameters(model)
        step = training_step(averaged.train(), (own_images(name),), lambda y: y.square().mean())
        results.append((copy.deepcopy(model.state_dict()), averaged.state_dict(), step))
    for got in results[:2]:
        for mine, stored in zip(got[:2], results[2][:2], strict=True):
            assert all(torch.equal(mine[key], value) for key, value in stored.items())
        assert_same_step(got[2], results[2][2], 0)
