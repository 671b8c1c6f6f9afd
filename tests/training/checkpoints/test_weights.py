"""What would be loaded as other numbers is refused, by every loader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets  # noqa: F401 - registers models
from revnets.training.checkpoints.weights import odd, unfit

Change = Callable[[Tensor], Tensor]


def with_one(number: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = number
        return changed

    return change


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


BAD: dict[str, tuple[Change, str]] = {
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "int8": (lambda t: (t * 10).to(torch.int8), "int8"),
    "uint8": (lambda t: t.abs().to(torch.uint8), "uint8"),
    "int64": (lambda t: t.long(), "int64"),
    "bool": (lambda t: t > 0, "bool"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "quantised": (quantised, "quantised"),
    "meta": (lambda t: t.to("meta"), "meta"),
    "NaN": (with_one(float("nan")), "(1 numbers that are NaN or infinite|holds NaN or infinity)"),
    "infinite": (with_one(float("-inf")), "(1 numbers that are NaN or infinite|holds NaN or infinity)"),
    "too large for float32": (lambda t: with_one(1e300)(t.double()), "infinite as float32"),
}
GOOD: dict[str, Change] = {name: lambda t, name=name: t.to(getattr(torch, name)) for name in ("float64", "float16")} | {
    "bfloat16": lambda t: t.bfloat16(),
    "strided": lambda t: t.t().contiguous().t(),
}


def weights(change: Change | None) -> dict[str, Tensor]:
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    return state if change is None else {**state, "0.weight": change(state["0.weight"])}


@pytest.mark.parametrize("what", BAD)
def test_other_numbers_are_named(what: str) -> None:
    change, words = BAD[what]
    problem = unfit(weights(None), weights(change))
    assert problem.startswith("'0.weight' "), problem
    assert re.search(words, problem), problem
    if what not in ("too large for float32", "float8"):  # which a network may be of
        assert odd(weights(change)).startswith("'0.weight' ")


@pytest.mark.parametrize("what", GOOD)
def test_the_same_numbers_are_taken(what: str) -> None:
    assert unfit(weights(None), weights(GOOD[what])) == ""
    assert odd(weights(GOOD[what])) == ""


def test_counters_and_masks() -> None:
    own = {"n": torch.tensor(0), "mask": torch.ones(2, dtype=torch.bool)}
    assert unfit(own, {"n": torch.tensor(7.0), "mask": torch.tensor([0.0, 1.0])}) == ""
    assert unfit(own, {"n": torch.tensor(7, dtype=torch.int32), "mask": torch.tensor([0, 1], dtype=torch.uint8)}) == ""
    for value in (torch.tensor(7.5), torch.tensor(float("nan")), torch.tensor(7 + 1j)):
        assert unfit(own, {"n": value}).startswith("'n' ")
    assert "'mask'" in unfit(own, {"mask": torch.tensor([0.5, 1.0])})
    assert "is list" in unfit(own, {"n": [1]})


def test_a_mask_of_minus_infinity_stays() -> None:
    own = {"attn_mask": torch.full((2, 2), float("-inf"))}
    assert unfit(own, own) == ""


def classification(path: Path, model: nn.Module) -> None:
    from classification.networks.models import load_weights, read_checkpoint

    load_weights(model, read_checkpoint(path, "--checkpoint")["state_dict"], "--checkpoint", "test_revbifpn")


def pretrained_path(path: Path, model: nn.Module) -> None:
    from classification.networks.models import build_model
    from classification.options import TrainOptions

    build_model(TrainOptions(model="test_revbifpn", pretrained_path=str(path), num_classes=5))


def published(path: Path, model: nn.Module) -> None:
    from revnets.models.revbifpn import checkpoint_filter_fn

    checkpoint_filter_fn(torch.load(path, weights_only=True), model)


def pruning(path: Path, model: nn.Module) -> None:
    from revnets.pruning.command import Source, load_model

    source = Source("test_revbifpn", Path(), Path(), path, model_kwargs=["num_classes=5"])
    load_model(source)


def detection(path: Path, model: nn.Module) -> None:
    pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    from detection.checkpoints import read
    from detection.checks import check_weights

    check_weights(model, read(path, "--resume"), whole=True)


def backbone(path: Path, model: nn.Module) -> None:
    pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    from revnets.mm.networks.pretrained import load_pretrained

    load_pretrained(model, "test_revbifpn", str(path))


LOADERS = (classification, pretrained_path, published, pruning, detection, backbone)


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
@pytest.mark.parametrize("what", ["complex", "int8", "NaN"])
def test_every_loader_refuses(load: Callable[[Path, nn.Module], None], what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", num_classes=5)
    state = model.state_dict()
    name = next(key for key in state if key.startswith("body.") and key.endswith(".weight"))
    before = state[name].clone()
    torch.save({**state, name: BAD[what][0](state[name])}, tmp_path / "w.pth")
    with pytest.raises(Exception, match=BAD[what][1]) as caught:
        load(tmp_path / "w.pth", model)
    assert name in str(caught.value)
    assert torch.equal(model.state_dict()[name], before)
    torch.save(dict(state), tmp_path / "w.pth")
    load(tmp_path / "w.pth", model)
