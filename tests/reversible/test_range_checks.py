"""Range checks of exact mode that wait until the caller wants them."""

import pytest
import torch
from torch import nn

from revnets.reversible import AdditiveCoupling, RangeError, RevSequential
from revnets.reversible.node import range_checks_put_off


def net() -> RevSequential:
    torch.manual_seed(0)
    return RevSequential([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)], exact=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_values_of_either_sign_leave_the_range(mode: str, sign: int) -> None:
    chain = net()
    chain.mode = mode
    with torch.no_grad():
        for p in chain.parameters():
            p.zero_()
    with pytest.raises(RangeError, match=r"op 0.*beyond the range"):
        chain(torch.full((1, 4), sign * 1e4))


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_a_forward_pass_ends_and_its_guard_tells_later(mode: str) -> None:
    chain = net()
    chain.mode = mode
    with range_checks_put_off() as guards:
        chain(torch.ones(1, 4))
        chain(torch.full((1, 4), 1e9))
    guards[0].settle()
    with pytest.raises(RangeError, match=r"op 0.*beyond the range"):
        guards[1].settle()
    with pytest.raises(RangeError):
        chain(torch.full((1, 4), 1e9))  # outside, at once


def test_one_that_nobody_settles_raises_in_the_backward_pass() -> None:
    with range_checks_put_off():
        outputs = net()(torch.full((1, 4), 1e9))
    with pytest.raises(RangeError):
        sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]


def test_settled_guards_let_gradients_be_the_same() -> None:
    found = []
    for put_off in (True, False):
        chain, x = net(), torch.ones(1, 4, requires_grad=True)
        if put_off:
            with range_checks_put_off() as guards:
                outputs = chain(x)
            guards[0].settle()
        else:
            outputs = chain(x)
        sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]
        found.append([x.grad, *(p.grad for p in chain.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_plain_and_evaluated_chains_have_no_guard() -> None:
    with range_checks_put_off() as guards:
        net().eval()(torch.ones(1, 4))
        RevSequential([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))])(torch.ones(1, 4))
    assert guards == []
