"""A backbone from a sparse pre-training, dense again."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

import revnets
from revnets.mm.backbone import TimmBackbone
from revnets.sparsity import sparse_layers


@pytest.mark.parametrize("name", ["test_revbifpn", "test_resnet"])
def test_masks_of_a_pretraining_are_dropped(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = revnets.convert(timm.create_model(name, num_classes=3), "sparse:0.75").model.eval()
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "last.pth.tar")
    start = {"type": "Pretrained", "checkpoint": str(tmp_path / "last.pth.tar")}
    backbone = TimmBackbone(name, init_cfg=start)
    backbone.init_weights()
    assert not sparse_layers(backbone)
    dense = revnets.densify(whole).state_dict()
    for key, value in backbone.net.state_dict().items():
        assert torch.equal(value, dense[key.removeprefix("model.")]), key
    masked = TimmBackbone(name, init_cfg=start, layers="sparse:0.75")
    masked.init_weights()
    for layer in sparse_layers(masked.net):
        assert torch.equal(layer.mask, whole.get_submodule(layer.name.removeprefix("model.")).mask)
