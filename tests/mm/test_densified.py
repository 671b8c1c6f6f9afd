"""A backbone from a sparse pre-training, dense again, and the FLOPs of both phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from mmengine.model import BaseModel
from mmengine.runner import Runner

import revnets
from revnets.layers import count_costs
from revnets.mm import TrainingFlopsHook
from revnets.mm.networks.backbone import TimmBackbone
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


class Levels(BaseModel):
    """A backbone alone, with images as MMEngine's models take them."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.backbone = TimmBackbone("test_resnet", init_cfg={"type": "Pretrained", "checkpoint": str(checkpoint)})

    def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> Any:
        out = self.backbone(inputs)
        return {"loss": out[-1].square().mean()} if mode == "loss" else out


def fine_tuned(folder: Path, epochs: int = 2, resume: bool = False) -> Runner:
    runner = Runner(
        model=Levels(folder / "last.pth.tar"),
        work_dir=str(folder / "run"),
        train_dataloader=torch.utils.data.DataLoader([{"inputs": torch.randn(3, 32, 32)}] * 12, batch_size=2),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}, "accumulative_counts": 2},
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        resume=resume,
        default_scope="mmengine",
        experiment_name=f"{folder.name}-{epochs}-{resume}",
    )
    runner.register_hook(TrainingFlopsHook())
    runner.train()
    return runner


@pytest.mark.parametrize("known", [{"flops_of_all_phases": 1e12}, {}])
def test_flops_of_both_phases(known: dict[str, float], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = revnets.convert(timm.create_model("test_resnet", num_classes=3), "sparse:0.75").model
    torch.save({"state_dict": first.state_dict(), **known}, tmp_path / "last.pth.tar")
    found = fine_tuned(tmp_path)
    if not known:
        assert found.message_hub.get_info("train_flops") is None
        return
    own = 24 * 3 * count_costs(found.model, (3, 32, 32)).flops  # 2 epochs of 12 images, of the dense backbone
    assert found.message_hub.get_info("train_flops") == own
    assert found.message_hub.get_info("train_flops_all_phases") == 1e12 + own
    resumed = fine_tuned(tmp_path, epochs=3, resume=True)
    assert resumed.message_hub.get_info("train_flops_all_phases") == 1e12 + own * 3 / 2
