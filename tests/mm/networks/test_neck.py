"""RevSilo as a neck: shapes, gradients, and memory that does not grow with its depth."""

from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from revnets.mm.networks.hrfpn import LeanHRFPN
from revnets.mm.networks.neck import RevBiFPNNeck
from revnets.profiling import predict_training_step

CHANNELS = (8, 16, 24, 32)


def maps(size: int = 32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, c, size >> k, size >> k) for k, c in enumerate(CHANNELS)]


def neck(**kwargs: Any) -> RevBiFPNNeck:
    torch.manual_seed(0)
    return RevBiFPNNeck(CHANNELS, **{"out_channels": 16, "num_silos": 2, **kwargs})


@pytest.mark.parametrize("start_level", [0, 1])
@pytest.mark.parametrize("add_extra_convs", [False, "on_output"])
def test_shapes(start_level: int, add_extra_convs: bool | str) -> None:
    outs = neck(num_outs=5, start_level=start_level, add_extra_convs=add_extra_convs)(maps())
    assert [tuple(y.shape) for y in outs] == [(2, 16, s, s) for s in (32, 16, 8, 4, 2, 1)[start_level:][:5]]


@pytest.mark.parametrize("extra", [1, 2])
def test_further_levels_by_hand(extra: int) -> None:
    """As of mmdet's FPN: the first is made of the coarsest level as it is, those after it of positive parts."""
    module = neck(num_outs=4 + extra, add_extra_convs="on_output").eval()
    with torch.no_grad():
        outs = module(maps())
        expected = module.extra[0](outs[3])
        assert torch.equal(outs[4], expected)
        assert (outs[3] < 0).any()
        if extra == 2:
            assert (outs[4] < 0).any()
            assert torch.equal(outs[5], module.extra[1](expected.relu()))


def test_modes_have_the_same_gradients() -> None:
    found = []
    for mode in ("reversible", "checkpoint", "store"):
        module = neck(mode=mode, drop_path_rate=0.3, se_ratio=0.25, exp_ratio=2).train()
        inputs = [x.requires_grad_() for x in maps()]
        torch.manual_seed(3)
        sum(y.square().mean() for y in module(inputs)).backward()
        found.append([p.grad for p in module.parameters()] + [x.grad for x in inputs])
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


def test_memory_does_not_grow_with_depth() -> None:
    def activations(num_silos: int, mode: str) -> int:
        class Whole(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.neck = neck(num_silos=num_silos, mode=mode)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                inputs = [x[..., : 64 >> k, : 64 >> k].expand(-1, c, -1, -1) for k, c in enumerate(CHANNELS)]
                return sum(y.square().mean() for y in self.neck(inputs))

        step = predict_training_step(Whole(), torch.zeros(16, 1, 64, 64))
        return step.step_bytes - step.gradient_bytes

    few, many = (activations(n, "reversible") for n in (2, 8))
    assert many <= 1.01 * few
    assert activations(8, "store") > 2 * activations(2, "store")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_silos": 0}, "num_silos=0"),
        ({"num_outs": 3}, "num_outs=3: expected at least the 4"),
        ({"start_level": 3}, "leave 1 levels"),
        ({"init_cfg": {"type": "Pretrained"}}, "initialises itself"),
        ({"add_extra_convs": "on_input"}, "add_extra_convs='on_input'"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        neck(**kwargs)


def test_maps_that_do_not_halve() -> None:
    x = maps()
    x[1] = x[1][..., :15]
    with pytest.raises(ValueError, match=r"sizes \[\(32, 32\), \(16, 15\)"):
        neck()(x)


# --- HRFPN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("pooling_type", ["AVG", "MAX"])
def test_lean_hrfpn_is_hrfpn(pooling_type: str, with_cp: bool) -> None:
    from mmdet.models.necks import HRFPN

    torch.manual_seed(0)
    lean = LeanHRFPN(list(CHANNELS), 12, pooling_type=pooling_type, with_cp=with_cp).double()
    stock = HRFPN(list(CHANNELS), 12, pooling_type=pooling_type).double()
    stock.load_state_dict(lean.state_dict())
    found = []
    for module in (lean, stock):
        inputs = [x.double().requires_grad_() for x in maps()]
        outs = module(inputs)
        sum(y.square().sum() for y in outs).backward()
        found.append([*outs, *(x.grad for x in inputs), *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
