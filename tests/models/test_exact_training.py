"""Exact mode over a training run: after 200 steps, reversible and stored weights are the same bits."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revnets  # noqa: F401 - registers the models

STEPS = 200
EXTRA_SILOS = {"S0": 2, "S6": 5}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, amp: bool) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("depth", sorted(EXTRA_SILOS))
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_reversible_and_stored_training_are_the_same_to_the_bit(depth: str, amp: bool) -> None:
    torch.manual_seed(0)
    stored = timm.create_model(
        "test_revbifpn", mode="store", num_classes=10, extra_silos=EXTRA_SILOS[depth], drop_path_rate=0.2
    ).train()
    rebuilt = copy.deepcopy(stored)
    rebuilt.set_mode("reversible")
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)) for m in (stored, rebuilt)]
    data = torch.Generator().manual_seed(1)
    for n in range(STEPS):
        x, target = torch.randn(4, 3, 32, 32, generator=data), torch.randint(10, (4,), generator=data)
        losses = []
        for model, optimizer in pairs:
            torch.manual_seed(n)  # the same samples are dropped
            losses.append(step(model, optimizer, x, target, amp))
        assert losses[0] == losses[1], f"step {n}"
    for (name, a), b in zip(stored.state_dict().items(), rebuilt.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
