"""A detector's checkpoint is read as data: what it says of itself is never run."""

from pathlib import Path

import pytest
import torch

from detection import checkpoints
from revnets.training.errors import UserError
from tests.mm.test_loading import Proof, attributes_of_attributes

PLAIN = (
    "model = dict(type='FasterRCNN', backbone=dict(type='RevBiFPN', arch='s0', init_cfg=dict(type='x')), neck=None)\n"
)


def read(text: object, path: Path) -> str:
    torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": {"cfg": text}}, path)
    return checkpoints.read(path, "CHECKPOINT").trained_as


def test_the_backbone_is_named(tmp_path: Path) -> None:
    assert read(PLAIN, tmp_path / "a.pth") == " (RevBiFPN s0)"
    assert read("optim = 1\n" + PLAIN.replace("arch='s0'", "depth=50"), tmp_path / "a.pth") == " (RevBiFPN 50)"


@pytest.mark.parametrize(
    "text",
    [
        "open(PROOF, 'w').close()\n" + PLAIN,
        "model = dict(backbone=dict(type=str(open(PROOF, 'w'))))",
        "model = dict(backbone=dict(type='x', **dict(arch=open(PROOF, 'w'))))",
        "_base_ = [PROOF]\n" + PLAIN,
        "custom_imports = dict(imports=['this'])\n",
        "model = dict(backbone=dict(type=f'{open(PROOF, chr(119))}'))",
        "model = dict(backbone=dict(type=[x for x in (open(PROOF, 'w'),)][0]))",
        "{{_base_.x}}",
        "import os\nos.mkdir(PROOF)",
        "model = dict(backbone=dict(" + "(" * 1000,
        "model = dict(backbone=dict(type=" + "-" * 100_000 + "1))",
        "model = dict(backbone=dict(type=" + "1+" * 100_000 + "1))",
        "model = dict(backbone=dict(type='" + "x" * 100_000 + "'))",
        "backbone=dict(" * 50_000,
        "\0",
        "x" * 10_000_000,
        "",
        None,
        3,
        ["model"],
    ],
    ids=range(20),
)
def test_odd_texts_are_no_code_and_no_crash(text: object, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    text = text.replace("PROOF", repr(str(proof))) if isinstance(text, str) else text
    assert len(read(text, tmp_path / "a.pth")) < 300
    assert not proof.exists()


@pytest.mark.parametrize("meta", [None, [], "cfg", 3, {}])
def test_odd_places(meta: object, tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": meta}, tmp_path / "a.pth")
    assert checkpoints.read(tmp_path / "a.pth", "CHECKPOINT").trained_as == ""


def test_looking_up_attributes_is_no_way_in(tmp_path: Path) -> None:
    proof = Proof(tmp_path / "ran")
    path = attributes_of_attributes(tmp_path / "evil.pth", proof)
    with pytest.raises(UserError, match=r"holds more than weights"):
        checkpoints.read(path, "CHECKPOINT")
    assert not proof.path.exists()
