"""MMDetection's detectors on our backbone: a training step in reversible mode has the gradients of `store`."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.logging import MessageHub  # noqa: E402

from revnets.mm.detectors import DetectorTarget  # noqa: E402
from revnets.profiling.memory import measure_training_step  # noqa: E402
from revnets.profiling.profile import predict  # noqa: E402
from revnets.profiling.target import Job, Setting  # noqa: E402
from tests.mm.zoo import ZOO, write  # noqa: E402

SETTING = Setting(optimizer=None, channels_last=False)
QUICK = ("FCOS", "Deformable DETR", "Faster R-CNN, CARAFE")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


def job(name: str, mode: str, folder: Path, side: int = 64) -> Job:
    """The loss of two images, from the same weights each time."""
    target = DetectorTarget(name, side, 2, mode, config=write(ZOO[name], folder), aspect=1.0)
    return target.build(SETTING, "cpu")


def step(name: str, mode: str, folder: Path) -> tuple[Tensor, dict[str, Tensor | None]]:
    made = job(name, mode, folder)
    torch.manual_seed(3)  # for what samples regions and points, or drops out
    np.random.seed(3)
    random.seed(3)
    loss = made.loss_fn(made.model(made.x))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.model.named_parameters()}


def assert_gradients_are_those_of_store(name: str, folder: Path) -> None:
    (got, gradients), (loss, expected) = (step(name, mode, folder) for mode in ("reversible", "store"))
    assert loss.isfinite()
    assert torch.equal(got, loss)
    for parameter, grad in expected.items():
        if any(part in parameter for part in ZOO[name].unused):
            assert grad is None
            assert gradients[parameter] is None
        else:
            assert grad is not None, parameter
            assert torch.equal(gradients[parameter], grad), parameter
    assert any(grad.any() for parameter, grad in expected.items() if "backbone" in parameter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_store(name: str, tmp_path: Path) -> None:
    assert_gradients_are_those_of_store(name, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_reads_its_strides_is_predicted(tmp_path: Path) -> None:
    config = write(ZOO["RTMDet"], tmp_path)
    target = DetectorTarget("RTMDet", 64, 2, "reversible", config=config, aspect=1.0)
    assert 0 < predict(target, SETTING).macs < predict(replace(target, img_size=128), SETTING).macs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_second_assigner_of_tood(tmp_path: Path) -> None:
    """After a few epochs, which its head reads in MMEngine's message hub, boxes are assigned by another rule."""
    hub = MessageHub.get_current_instance()
    hub.update_info("epoch", 0)
    first, _ = step("TOOD", "store", tmp_path)
    hub.update_info("epoch", 4)
    assert not torch.equal(step("TOOD", "store", tmp_path)[0], first)
    assert_gradients_are_those_of_store("TOOD", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, detector in ZOO.items() if detector.memory])
def test_memory_is_less_than_that_of_store(name: str, tmp_path: Path) -> None:
    """Of a whole step, heads included, which are stored in both modes."""
    measured = {}
    for mode in ("reversible", "store"):
        made = job(name, mode, tmp_path, 128)
        measured[mode] = measure_training_step(made.model, made.x, made.loss_fn).activation_bytes
    bound = ZOO[name].memory
    assert bound is not None
    assert measured["reversible"] < bound * measured["store"]
