"""What every client is asked: gradients of `store` to the bit, a bound on memory, and its own files read back."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.profiling.memory import measure_training_step

CLASSES = 3


def client(module: str) -> Any:
    """The client's module, or a test that is skipped."""
    return pytest.importorskip(module, reason=f"{module} is not installed: pip install 'revnets[clients]'")


@dataclass
class Case:
    """A client's network on our backbone and one batch.

    Attributes:
        model: in training mode.
        batch: what it is called with: a tensor, several, or keywords.
        loss: of what it gives.
        memory: its activations in reversible mode are at most this part of those in `store`.
        unused: parameters that get no gradient, in any mode: the client reads no coarser map, say.
    """

    model: nn.Module
    batch: Any
    loss: Callable[[Any], Tensor]
    memory: float = 0.8
    unused: bool = False


def images(side: int = 64, number: int = 2) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))


def network(name: str = "revbifpn_s0", **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **arguments)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def gradients(case: Case, mode: str) -> dict[str, Tensor | None]:
    model = copy.deepcopy(case.model).train()
    revnets.set_mode(model, mode)
    torch.manual_seed(3)  # for what drops out or samples
    case.loss(called(model, case.batch)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(case: Case) -> None:
    got, expected = gradients(case, "reversible"), gradients(case, "store")
    for name, grad in expected.items():
        assert grad is not None or case.unused, name
        assert (got[name] is None) is (grad is None), name
        assert grad is None or torch.equal(grad, got[name]), name


def assert_less_memory(case: Case) -> None:
    """Activations of a step in reversible mode relative to those in `store`, which docs/clients.md has: `pytest -s`."""
    measured = {}
    for mode in ("reversible", "store"):
        model = copy.deepcopy(case.model).train()
        revnets.set_mode(model, mode)
        measured[mode] = measure_training_step(model, case.batch, case.loss).activation_bytes
    share = measured["reversible"] / measured["store"]
    print(f"{type(case.model).__name__}: {share:.2f} of the activations of `store`")
    assert share < case.memory


def assert_same_weights(got: nn.Module, expected: nn.Module) -> None:
    mine, theirs = got.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
