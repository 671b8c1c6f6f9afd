"""Bad input: one sentence that says what and where, exit code 2, before anything is trained or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detection import checkpoints
from detection import test as testing
from detection import train as training
from revnets.training.errors import UserError

from .conftest import tiny_config

Change = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def own(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes, to be damaged."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


def changed(data: Path, change: Change, split: str = "train") -> None:
    path = data / f"{split}.json"
    content = json.loads(path.read_text())
    change(content, data)
    path.write_text(json.dumps(content))


def rename(content: dict[str, Any], data: Path) -> None:
    content["categories"][3]["name"] = "three"


def swap(content: dict[str, Any], data: Path) -> None:
    content["categories"] = content["categories"][::-1]


def no_images(content: dict[str, Any], data: Path) -> None:
    content["images"], content["annotations"] = [], []


def no_objects(content: dict[str, Any], data: Path) -> None:
    content["annotations"] = []


def no_list(content: dict[str, Any], data: Path) -> None:
    del content["annotations"]


def bad_box(content: dict[str, Any], data: Path) -> None:
    content["annotations"][0]["bbox"] = [1, 2, 3]


def missing_image(content: dict[str, Any], data: Path) -> None:
    (data / "train" / "00002.png").unlink()


def truncated_image(content: dict[str, Any], data: Path) -> None:
    path = data / "train" / "00002.png"
    path.write_bytes(path.read_bytes()[:2000])


def truncated_jpeg(content: dict[str, Any], data: Path) -> None:
    with Image.open(data / "train" / "00002.png") as image:
        image.save(data / "train" / "00002.jpg")
    path = data / "train" / "00002.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    content["images"][2]["file_name"] = path.name


def text_as_image(content: dict[str, Any], data: Path) -> None:
    (data / "train" / "00002.png").write_text("no image")


def all_too_small(content: dict[str, Any], data: Path) -> None:
    for image in content["images"]:
        shrink(image, data / "train")
    polygons(content)


def shrink(image: dict[str, Any], folder: Path, width: int = 8) -> None:
    """An image that is narrower than it was, and a file of that size."""
    image["width"] = width
    with Image.open(folder / image["file_name"]) as picture:
        picture.resize((width, image["height"])).save(folder / image["file_name"])


def polygons(content: dict[str, Any]) -> None:
    """Masks that fit an image of any size, where those of the scenes are of a certain one."""
    for each in content["annotations"]:
        each["segmentation"] = [[1, 1, 5, 1, 5, 5]]


def without(kind: str, key: str, value: Any = None) -> Change:
    def change(content: dict[str, Any], data: Path) -> None:
        content[kind][0][key] = value

    return change


def twice(kind: str) -> Change:
    def change(content: dict[str, Any], data: Path) -> None:
        content[kind][1]["id"] = content[kind][0]["id"]

    return change


STOPS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "unknown categories": (rename, ("train.json", "'3'", "three", "metainfo.classes")),
    "categories in another order": (swap, ("train.json", "order")),
    "no images": (no_images, ("train.json", "no images")),
    "no objects": (no_objects, ("train.json", "no image with an object")),
    "no annotations": (no_list, ("train.json", "'annotations'")),
    "a box of three numbers": (bad_box, ("annotation 1", "[1, 2, 3]", "[x, y, width, height]")),
    "an object without area": (without("annotations", "area"), ("train.json", "annotation 1", "'area'")),
    "an object without category": (without("annotations", "category_id"), ("annotation 1", "'category_id'")),
    "an object without image": (without("annotations", "image_id"), ("annotation 1", "'image_id'")),
    "a box that is no number": (without("annotations", "bbox", [0, 0, float("nan"), 1]), ("annotation 1", "nan")),
    "an object without mask": (without("annotations", "segmentation"), ("annotation 1", "'segmentation'", "masks")),
    "an object without id": (without("annotations", "id"), ("train.json", "annotation number 0 has no 'id'")),
    "two objects of one id": (twice("annotations"), ("train.json", "1 ids", "more than one annotation (1)")),
    "two images of one id": (twice("images"), ("train.json", "1 ids", "more than one image (1)")),
    "two categories of one id": (twice("categories"), ("train.json", "1 ids", "more than one category")),
    "a file name that is a number": (without("images", "file_name", 5), ("image 1", "file_name 5", "expected text")),
    "a category without name": (without("categories", "name"), ("train.json", "category", "'name'")),
    "missing image": (missing_image, ("00002.png", "No such file")),
    "truncated image": (truncated_image, ("00002.png", "truncated or damaged")),
    "truncated JPEG": (truncated_jpeg, ("00002.jpg", "truncated or damaged")),
    "no image at all": (text_as_image, ("00002.png", "damaged")),
    "all images too small": (all_too_small, ("train.json", "no image with an object")),
}


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("what", STOPS)
def test_bad_data_stop_before_training(
    what: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = STOPS[what]
    changed(own, change)
    folder = tmp_path / "run"
    code = training.main([str(tiny_config(tmp_path, own)), "--work-dir", str(folder)])
    refused(capsys, code, *words)
    assert not list(folder.rglob("*.pth"))


def test_only_heads_of_our_classes_are_compared(tiny: Path, tmp_path: Path) -> None:
    from detection.checks import check_classes
    from detection.config import read

    cfg = read(str(tiny))
    cfg.model.roi_head.semantic_head = {"num_classes": 183}  # of HTC
    check_classes(cfg)
    cfg.model.roi_head.bbox_head = [{"num_classes": 10}, {"num_classes": 80}]  # of Cascade R-CNN
    with pytest.raises(UserError, match=r"bbox_head\[1\].num_classes=80"):
        check_classes(cfg)


def test_what_mmdetection_skips_is_counted(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from detection.checks import check_data
    from detection.config import read

    def change(content: dict[str, Any], data: Path) -> None:
        annotations = content["annotations"]
        annotations[0]["bbox"][2] = 0
        annotations[1]["bbox"][3] = 0.5
        annotations[2]["area"] = 0
        annotations[3]["bbox"][0] = 1000
        annotations[4]["category_id"] = 99
        annotations[5]["image_id"] = 1234
        content["images"].append({**content["images"][7], "id": 77})
        shutil.copy(data / "train" / "00007.png", data / "train" / "narrow.png")
        content["images"].append({**content["images"][7], "id": 78, "file_name": "narrow.png"})
        shrink(content["images"][-1], data / "train", 20)

    changed(own, change)
    check_data(read(str(tiny_config(tmp_path, own))), ["train"])
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "2 annotations with a box narrower or lower than one pixel are skipped (ids 1, 2)" in said
    assert "1 annotations with an 'area' of 0 or less, though their boxes have one" in said
    assert "width x height) are skipped (ids 3)" in said
    assert "1 annotations with a box outside of its image are skipped (ids 4)" in said
    assert "1 annotations of a category that the file does not list are skipped (ids 5)" in said
    assert "1 annotations of an image that the file does not list are skipped (ids 6)" in said
    assert "1 images with a side under 32 pixels are skipped (narrow.png)" in said
    assert "2 images without an object are skipped (1 have no annotation: 00007.png; 1 none that can be used: " in said
    assert "1 image files are listed more than once (00007.png)" in said


def test_small_images_that_are_kept_are_named(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from detection.checks import check_data
    from detection.config import read

    def change(content: dict[str, Any], data: Path) -> None:
        shrink(content["images"][0], data / "val", 20)
        polygons(content)

    changed(own, change, "val")
    check_data(read(str(tiny_config(tmp_path, own))), ["val"])
    assert "1 images are smaller than one cell of the coarsest map (32 pixels)" in caplog.text


PRETRAINED = ["--cfg-options", "model.backbone.init_cfg.type=Pretrained"]
OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown option": (["--ampp"], ("--ampp", "--help")),
    "no KEY=VALUE": (["--cfg-options", "data_root"], ("--cfg-options", "KEY=VALUE")),
    "unknown key": (["--cfg-options", "modl.type=X"], ("'modl'", "'model'")),
    "unknown backbone": (["--cfg-options", "model.backbone.type=RevBiFNP"], ("RevBiFNP",)),
    "unknown arch": (["--cfg-options", "model.backbone.arch=s9"], ("'s9'", "s6")),
    "channels": (["--cfg-options", "model.neck.in_channels=[1,2,3,4]"], ("[1, 2, 3, 4]", "[16, 16, 32, 96]")),
    "classes": (["--cfg-options", "model.roi_head.bbox_head.num_classes=3"], ("num_classes=3", "10 classes")),
    "no data": (["--cfg-options", "data_root=/nowhere"], ("/nowhere/train.json", "data_root")),
    "no checkpoint": (["--resume", "/nowhere.pth"], ("--resume", "there is no file '/nowhere.pth'")),
    "unknown optimizer": (["--cfg-options", "optim_wrapper.optimizer.type=AdamX"], ("'AdamX'", "did you mean")),
    "unknown transform": (["--cfg-options", "train_dataloader.dataset.pipeline.2.type=Rezise"], ("tiny.py", "Rezise")),
    "no pretrained weights": ([*PRETRAINED, "model.backbone.init_cfg.checkpoint=/nowhere.pth"], ("/nowhere.pth",)),
    "unknown metric": (
        ["--cfg-options", "default_hooks.checkpoint.save_best=coco/bbox_mPA"],
        ("save_best", "'coco/bbox_mPA'", "did you mean"),
    ),
    "seed of 70 bits": (["--seed", str(2**70)], ("--seed", "4294967295")),
    "fewer than no pictures": (["--draw", "-2"], ("--draw", "at least 0")),
    "saving backwards": (["--save-every", "-5"], ("--save-every", "at least 0")),
    "folder that cannot be": (["--work-dir", "x" * 300], ("--work-dir", "too long")),
    "folder that is a device": (["--work-dir", "/dev/null"], ("--work-dir", "/dev/null", "is no folder")),
    "no training": (["--cfg-options", "train_cfg=None"], ("sets no train_cfg",)),
    "a number for a part": (["--cfg-options", "model.backbone=5"], ("model.backbone: 5", "dict(...)")),
    "epochs in words": (["--cfg-options", "train_cfg.max_epochs=many"], ("train_cfg.max_epochs: 'many'", "a whole")),
    "batches of nothing": (["--cfg-options", "train_dataloader.batch_size=0"], ("batch_size: 0", "from 1")),
    "rate in words": (["--cfg-options", "optim_wrapper.optimizer.lr=fast"], ("tiny.py", "cannot be built")),
    "a neck that fails at the first step": (["--cfg-options", "model.neck.num_outs=0"], ("the first step fails",)),
    "slurm": (["--launcher", "slurm"], ("slurm", "SLURM_PROCID", "srun")),
    "torchrun": (["--launcher", "pytorch"], ("torchrun",)),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_options(
    what: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    more, words = OPTIONS[what]
    refused(capsys, training.main([str(tiny), "--work-dir", str(tmp_path / "run"), *more]), *words)
    assert not (tmp_path / "run").exists()


def test_bad_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, bare = tmp_path / "broken.py", tmp_path / "bare.py"
    broken.write_text("model = dict(")
    bare.write_text("model = dict(type='FasterRCNN')")
    refused(
        capsys, training.main([str(tmp_path / "faster-rcnn_revbifpn-s0_digit.py")]), "there is no file", "did you mean"
    )
    refused(capsys, training.main([str(broken)]), "broken.py", "cannot be read")
    refused(capsys, training.main([str(bare)]), "sets no train_dataloader")


@pytest.fixture(scope="module")
def weights(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that are not what they should be, and one that is."""
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    from detection.config import read

    folder = tmp_path_factory.mktemp("weights")
    found = {name: folder / f"{name}.pth" for name in ("right", "other", "short", "text", "empty", "code")}
    with DefaultScope.overwrite_default_scope("mmdet"):
        cfg = read(str(tiny))
        torch.save({"state_dict": MODELS.build(cfg.model).state_dict(), "meta": {}}, found["right"])
        cfg.model.backbone.arch, cfg.model.neck.in_channels = "s0", [48, 64, 128, 320]
        other = MODELS.build(cfg.model).state_dict()
        hub = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        meta = {"cfg": cfg.pretty_text, "epoch": 1, "iter": 4}
        torch.save({"state_dict": other, "meta": meta, "optimizer": {}, "message_hub": hub}, found["other"])
    found["short"].write_bytes(found["right"].read_bytes()[:5000])
    found["text"].write_text("weights")
    torch.save({"state_dict": {}}, found["empty"])
    torch.save({"state_dict": {"x": torch.ones(1)}, "more": Path("runs code")}, found["code"])
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other", ("another network", "RevBiFPN s0", "tensors do not fit")),
        ("short", ("damaged",)),
        ("text", ("damaged",)),
        ("empty", ("state_dict is a mapping of 0, a mapping of names to tensors was expected",)),
        ("code", ("more than weights",)),
    ],
)
def test_bad_checkpoints(
    name: str, words: tuple[str, ...], weights: dict[str, Path], tiny: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = ["--work-dir", str(tmp_path / "run")]
    path = str(weights[name])
    refused(capsys, testing.main([str(tiny), path, *folder]), "CHECKPOINT", path, *words)
    refused(capsys, training.main([str(tiny), "--resume", path, *folder]), "--resume", path, *words)
    refused(
        capsys, training.main([str(tiny), *folder, "--cfg-options", f"load_from={path}"]), "load_from", path, *words
    )


def test_pretrained_weights_of_another_network(
    weights: dict[str, Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"model.backbone.init_cfg.checkpoint={weights['other']}"
    line = [str(tiny), "--work-dir", str(tmp_path), *PRETRAINED, own, "model.backbone.init_cfg.prefix=backbone."]
    refused(capsys, training.main(line), "tiny.py", "checkpoint", "not of")


def test_weights_alone_cannot_be_resumed(
    weights: dict[str, Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = training.main([str(tiny), "--resume", str(weights["right"]), "--work-dir", str(tmp_path / "run")])
    refused(capsys, code, "no optimizer", "load_from=")


def test_a_run_is_not_overwritten(
    weights: dict[str, Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "epoch_1.pth"
    shutil.copy(weights["right"], saved)
    (tmp_path / "last_checkpoint").write_text(str(saved))
    refused(capsys, training.main([str(tiny), "--work-dir", str(tmp_path)]), "already holds a run", "--resume")
    elsewhere = ["--resume", str(weights["other"])]
    refused(capsys, training.main([str(tiny), "--work-dir", str(tmp_path), *elsewhere]), "already holds a run")
    assert saved.read_bytes() == weights["right"].read_bytes()
    for more in (["--resume", str(saved)], [*elsewhere, "--overwrite"]):  # go on to the next check
        code = training.main([str(tiny), "--work-dir", str(tmp_path), *more])
        refused(capsys, code, "--resume", "no optimizer" if str(saved) in more else "another network")


def test_what_was_overwritten_is_not_resumed(tmp_path: Path) -> None:
    for name in (checkpoints.LAST, "interim.pth", "epoch_1.pth", "best_epoch_1.pth"):
        (tmp_path / name).write_text(str(tmp_path / "interim.pth"))
    checkpoints.forget(tmp_path, str(tmp_path / "interim.pth"))  # which is to be loaded
    assert {path.name for path in tmp_path.iterdir()} == {"interim.pth", "best_epoch_1.pth"}
    checkpoints.forget(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["best_epoch_1.pth"]


def test_checkpoints_in_torchs_old_format(tmp_path: Path) -> None:
    content = {"state_dict": {"x": torch.arange(3.0)}, "meta": None}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = checkpoints.read(tmp_path / "old.pth", "CHECKPOINT")
    assert read.state["x"].tolist() == [0, 1, 2]


def test_synchronised_norms_need_gpus() -> None:
    from detection.runner import check_norms

    check_norms(torch.nn.SyncBatchNorm(2), 1)
    check_norms(torch.nn.BatchNorm2d(2), 2)
    with pytest.raises(UserError, match="SyncBatchNorm needs GPUs"):
        check_norms(torch.nn.SyncBatchNorm(2), 2)


def test_what_a_hook_refuses() -> None:
    from types import SimpleNamespace

    from detection.runner import CheckedRunner
    from revnets.sparsity import Schedule

    runner = CheckedRunner.__new__(CheckedRunner)
    runner.cfg = SimpleNamespace(filename="net.py")
    runner._hooks = [SimpleNamespace(before_run=lambda runner: Schedule("rigl", 100, start=0.9))]
    with pytest.raises(UserError, match=r"CONFIG: 'net.py' cannot be built \(end=0.75: .* before they start"):
        runner.call_hook("before_run")
