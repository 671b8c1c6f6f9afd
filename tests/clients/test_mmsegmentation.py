"""mmsegmentation: RevBiFPN in the slot of its HRNet, by `configs/segmentation/`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.clients.steps import Case, assert_less_memory, assert_same_gradients, assert_same_weights, client, images
from tests.clients.toolboxes import build, loader, read, run, total

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = "segmentation/ocrnet_revbifpn-s0_80k_ade20k-512x512.py"
CLASSES = 150
HEADS = {
    "FCNHead": {"channels": 560, "kernel_size": 1, "num_convs": 1, "concat_input": False},
    "UPerHead": {"channels": 32, "pool_scales": (1, 2)},
    "SegformerHead": {"channels": 32},
    "FPNHead": {"channels": 32, "in_channels": [48, 64, 128, 320], "feature_strides": [4, 8, 16, 32]},
    "PSAHead": {"channels": 8, "mask_size": (3, 3), "in_channels": 320, "in_index": 3},
}


def config(head: str | None = None) -> Any:
    """Ours, or a segmenter with one head of the toolbox's on the same backbone."""
    client("mmseg")
    cfg = read(CONFIG)
    if head is None:
        return cfg
    first = cfg.model.decode_head[0]
    keys = ("in_channels", "in_index", "num_classes", "norm_cfg", "dropout_ratio", "align_corners")
    one = {"type": head, **{key: first[key] for key in keys}, **HEADS[head]}
    if head == "FCNHead":
        one["input_transform"] = "resize_concat"
    cfg.model = {"type": "EncoderDecoder", "backbone": cfg.model.backbone, "decode_head": one}
    return cfg


def case(head: str | None = None, memory: float = 0.8) -> Case:
    client("mmseg")
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model: Any = build(config(head))
    labels = torch.randint(CLASSES, (1, 64, 64), generator=torch.Generator().manual_seed(2))
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo={"img_shape": (64, 64)})
    batch = {"inputs": images(), "data_samples": [sample, sample], "mode": "loss"}
    return Case(model, batch, total(model), memory, unused=head == "PSAHead")  # which reads the coarsest map alone


def test_the_config_has_our_backbone_in_the_slot() -> None:
    cfg = config()
    model: Any = build(cfg)
    assert model.backbone.mode == "reversible"
    assert all(head.in_channels == model.backbone.out_channels for head in cfg.model.decode_head)


def test_gradients_are_those_of_store() -> None:
    assert_same_gradients(case())


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_gradients_under_its_other_heads(head: str) -> None:
    assert_same_gradients(case(head))


def test_it_needs_less_memory() -> None:
    assert_less_memory(case(memory=0.85))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares on a background, laid out as ADE20K, whose labels count from 1; and a training of two steps."""
    client("mmseg")
    made, random = tmp_path_factory.mktemp("mmseg"), np.random.default_rng(0)
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (made / "ade" / part / split).mkdir(parents=True)
        for k in range(2):
            labels = np.ones((64, 64), np.uint8)
            row, column = random.integers(40, size=2)
            labels[row : row + 20, column : column + 20] = 2 + k
            picture = random.integers(60, size=(64, 64, 3), dtype=np.uint8) + 60 * labels[..., None]
            Image.fromarray(picture).save(made / "ade" / "images" / split / f"{k}.jpg")
            Image.fromarray(labels).save(made / "ade" / "annotations" / split / f"{k}.png")
    script(made, "train.py", 2)
    return made


def script(folder: Path, name: str, steps: int, *words: str) -> str:
    options = {
        **loader("train", **{"dataset.data_root": "ade"}),
        **loader("val", **{"dataset.data_root": "ade"}),
        **loader("test", **{"dataset.data_root": "ade"}),
        "train_dataloader.dataset.pipeline.2.scale": "(64,64)",
        "train_dataloader.dataset.pipeline.3.crop_size": "(64,64)",
        "val_dataloader.dataset.pipeline.1.scale": "(64,64)",
        "test_dataloader.dataset.pipeline.1.scale": "(64,64)",
        "model.data_preprocessor.size": "(64,64)",
        **{"model.backbone.arch": "test", "train_cfg.max_iters": steps, "train_cfg.val_interval": 2},
        **{f"model.decode_head.{k}.in_channels": "[16,16,32,96]" for k in range(2)},
        **{"default_hooks.checkpoint.interval": 2, "default_hooks.logger.interval": 1},
    }
    return run(client("mmseg"), name, folder, CONFIG, *words, options=options)


@pytest.mark.slow
def test_its_scripts_train_resume_and_test(folder: Path) -> None:
    said = script(folder, "train.py", 4, "--resume")
    assert "resumed epoch: 0, iter: 2" in said
    assert "mIoU" in script(folder, "test.py", 4, "run/iter_4.pth")


@pytest.mark.slow
def test_the_checkpoint_of_its_runner_holds_the_network(folder: Path) -> None:
    from mmengine.runner import load_checkpoint

    cfg = config()
    cfg.model.backbone.arch = "test"
    for head in cfg.model.decode_head:
        head.in_channels = [16, 16, 32, 96]
    models: list[nn.Module] = [build(cfg), build(cfg)]
    assert_same_weights(*models)  # before
    for model in models:
        load_checkpoint(model, str(folder / "run" / "iter_2.pth"), strict=True)
    stored = torch.load(folder / "run" / "iter_2.pth", weights_only=False)["state_dict"]
    assert stored.keys() == models[0].state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in models[0].state_dict().items())
