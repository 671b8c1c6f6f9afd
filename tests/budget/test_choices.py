"""What single blocks do under their choices."""

import copy

import pytest
import torch
from torch import nn

from revnets.budget.choices import CHOICES, BudgetError, apply_choices, is_planned, remove_choices
from revnets.layers.lean.network import make_lean
from tests.budget.networks import make
from tests.budget.test_fit import one_step


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_computes_the_same(choice: str) -> None:
    model, size = make("flat" if choice != "checkpoint" else "lists")
    model, x = model.double(), torch.randn(4, *size, dtype=torch.float64)
    plain = one_step(copy.deepcopy(model), x)
    apply_choices(model, {"": choice})
    for key, value in one_step(model, x).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-10, atol=1e-12, msg=key)
    assert remove_choices(model)
    assert not remove_choices(model)
    assert not any(is_planned(module) for module in model.modules())


def test_a_block_that_stores_does_so_among_lean_ones() -> None:
    """The middle one of three stores: what it keeps is held by autograd itself, without a recorder's hooks."""
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3)]
    model = nn.Sequential(*blocks)
    apply_choices(model, {"": "lean", "1": "store"})
    answered: dict[int, bool] = {}
    for index, block in enumerate(blocks):
        block[1].register_forward_hook(
            lambda *_, index=index: answered.update(
                {index: torch._C._autograd._top_saved_tensors_default_hooks(False) is not None}
            )
        )
    model(torch.ones(512, 64)).sum().backward()
    assert answered == {0: True, 1: False, 2: True}


def test_a_slice_must_be_there_and_only_checkpoints() -> None:
    model, _ = make("flat")
    for choices, said in (
        ({"[0:99]": "checkpoint"}, "no blocks '\\[0:99\\]' in a row"),
        ({"[0:2]": "lean"}, "can be checkpointed as one"),
        ({"0": "forget"}, "unknown choice 'forget'"),
        ({"nowhere": "lean"}, "no block 'nowhere'"),
    ):
        with pytest.raises(BudgetError, match=said):
            apply_choices(model, choices)
    assert not any(is_planned(module) for module in model.modules())


def test_a_lean_network_is_refused() -> None:
    model = make_lean(make("flat")[0])
    with pytest.raises(BudgetError, match="lean already"):
        apply_choices(model, {})
