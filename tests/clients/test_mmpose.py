"""mmpose: RevBiFPN in the slot of its HRNet, by `configs/pose/`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clients.steps import Case, assert_less_memory, assert_same_gradients, assert_same_weights, client, images
from tests.clients.toolboxes import build, loader, read, run, total

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = "pose/td-hm_revbifpn-s0_8xb64-210e_coco-256x192.py"
JOINTS = 17


def config() -> Any:
    reason = "mmpose is not installed, or xtcocotools not for this NumPy: docs/clients.md says how"
    pytest.importorskip("xtcocotools.mask", reason=reason, exc_type=(ImportError, ValueError))  # type: ignore[arg-type]
    pytest.importorskip("mmpose", reason=reason)
    return read(CONFIG)


def case(memory: float = 0.8) -> Case:
    cfg = config()
    from mmengine.structures import InstanceData, PixelData
    from mmpose.structures import PoseDataSample

    model: Any = build(cfg)
    sample = PoseDataSample()
    sample.gt_fields = PixelData(heatmaps=torch.rand(JOINTS, 16, 16, generator=torch.Generator().manual_seed(2)))
    sample.gt_instance_labels = InstanceData(keypoint_weights=torch.ones(1, JOINTS))
    batch = {"inputs": images(), "data_samples": [sample, sample], "mode": "loss"}
    return Case(model, batch, total(model), memory)


def test_the_config_has_our_backbone_in_the_slot() -> None:
    model: Any = build(config())
    assert model.backbone.mode == "reversible"
    assert model.backbone.out_channels == [model.head.in_channels]


def test_gradients_are_those_of_store() -> None:
    assert_same_gradients(case())


def test_it_needs_less_memory() -> None:
    assert_less_memory(case(memory=0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people a picture, as COCO has them."""
    config()
    made, random = tmp_path_factory.mktemp("mmpose"), np.random.default_rng(0)
    (made / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (made / split).mkdir()
        pictures: list[dict[str, Any]] = []
        people: list[dict[str, Any]] = []
        for k in range(2):
            pictures.append({"id": k, "file_name": f"{k}.jpg", "height": 80, "width": 80})
            Image.fromarray(random.integers(255, size=(80, 80, 3), dtype=np.uint8)).save(made / split / f"{k}.jpg")
            for box in ([4, 4, 30, 60], [40, 10, 30, 60]):
                at = random.integers(0, 30, (JOINTS, 2)) + box[:2]
                joints = np.concatenate([at, np.full((JOINTS, 1), 2)], axis=1).ravel().tolist()
                person = {"bbox": box, "area": 1800, "iscrowd": 0, "keypoints": joints, "num_keypoints": JOINTS}
                people.append({"id": len(people) + 1, "image_id": k, "category_id": 1, **person})
        category = {"id": 1, "name": "person", "keypoints": [], "skeleton": []}
        text = json.dumps({"images": pictures, "annotations": people, "categories": [category]})
        (made / "annotations" / f"person_keypoints_{split}.json").write_text(text)
    return made


def script(folder: Path, name: str, epochs: int, *words: str) -> str:
    data = {"dataset.data_root": "."}
    options = {
        **loader("train", **data),
        **loader("val", **data, **{"dataset.bbox_file": "None"}),
        **loader("test", **data, **{"dataset.bbox_file": "None"}),
        "val_evaluator.ann_file": "annotations/person_keypoints_val2017.json",
        "test_evaluator.ann_file": "annotations/person_keypoints_val2017.json",
        **{"model.backbone.arch": "s0", "train_cfg.max_epochs": epochs, "train_cfg.val_interval": 1},
        **{"default_hooks.checkpoint.interval": 1, "default_hooks.logger.interval": 1},
    }
    return run(client("mmpose"), name, folder, CONFIG, *words, options=options)


@pytest.mark.slow
def test_its_scripts_train_resume_and_test(folder: Path) -> None:
    from mmengine.runner import load_checkpoint

    script(folder, "train.py", 1)
    assert "resumed epoch: 1" in script(folder, "train.py", 2, "--resume")
    file = folder / "run" / "epoch_2.pth"
    assert "coco/AP" in script(folder, "test.py", 2, str(file))
    models = [build(config()), build(config())]
    for model in models:
        load_checkpoint(model, str(file), strict=True)
    assert_same_weights(*models)
    stored = torch.load(file, weights_only=False)["state_dict"]
    assert all(torch.equal(stored[name], value) for name, value in models[0].state_dict().items())
