"""Backbones whose training passes are replayed, within detectors that train by MMEngine's own step."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from mmengine.optim import OptimWrapper

from revnets.mm.amp import Bf16OptimWrapper
from revnets.mm.hooks.sparsity import SparsityHook
from revnets.mm.networks.backbone import RevBiFPN, TimmBackbone
from revnets.training.capture import graphed
from revnets.training.capture.graphed import FIRST, MORE, REPLAYED
from tests.training.capture.fake_graph import FakeGraph


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "CudaGraph", FakeGraph)


def detector(divisor: int = 32, **backbone: Any) -> Any:
    """A small RetinaNet."""
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    head = {
        "type": "RetinaHead",
        "num_classes": 3,
        "in_channels": 8,
        "feat_channels": 8,
        "stacked_convs": 1,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "octave_base_scale": 4,
            "scales_per_octave": 1,
            "ratios": [1.0],
            "strides": [4, 8, 16],
        },
        "loss_bbox": {"type": "SmoothL1Loss", "beta": 0.11},
    }
    assigner = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0}
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(
            {
                "type": "RetinaNet",
                "data_preprocessor": {"type": "DetDataPreprocessor", "pad_size_divisor": divisor},
                "backbone": {"type": "RevBiFPN", "arch": "test", "out_indices": (1, 2, 3), **backbone},
                "neck": {"type": "FPN", "in_channels": [16, 32, 96], "out_channels": 8, "num_outs": 3},
                "bbox_head": head,
                "train_cfg": {
                    "assigner": assigner,
                    "sampler": {"type": "PseudoSampler"},
                    "allowed_border": -1,
                    "pos_weight": -1,
                },
            }
        )
    return model.train()


def batches(sizes: list[tuple[int, int]]) -> list[Any]:
    """Two images each, of these heights and widths."""
    from mmdet.testing import demo_mm_inputs

    return [demo_mm_inputs(2, [(3, *size)] * 2, num_items=[2, 3], num_classes=3, use_box_type=False) for size in sizes]


SIZES = [(20, 25), (32, 17), (30, 50), (18, 30), (25, 33)]  # padded to 32: 32x32 and 32x64


def trained(model: Any, data: list[Any], wrapper: type = OptimWrapper, accumulate: int = 1) -> list[Tensor]:
    """Losses of a training by MMEngine, and what it leaves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wrapped = wrapper(optimizer=optimizer, accumulative_counts=accumulate, clip_grad={"max_norm": 1.0})
    wrapped.initialize_count_status(model, 0, len(data))
    torch.manual_seed(3)
    found: list[Tensor] = []
    for batch in data:
        losses = model.train_step(copy.deepcopy(batch), wrapped)
        found += [value.detach() for value in losses.values()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*found, *(t.detach().clone() for t in (*model.parameters(), *model.buffers()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("wrapper", "accumulate"), [(OptimWrapper, 2), (Bf16OptimWrapper, 1)])
def test_a_detector_trains_as_without_graphs(graph: None, wrapper: type, accumulate: int) -> None:
    data, options = batches(SIZES), {"drop_path_rate": 0.3, "frozen_stages": 1}
    model = detector(**options, cuda_graph={"max_graphs": 2})
    found = trained(model, data, wrapper, accumulate)
    assert same(found, trained(detector(**options), data, wrapper, accumulate))
    assert model.backbone.graphs.counts == {FIRST: 2, REPLAYED: 3}


def test_shapes_that_are_padded_less_are_more(graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr("revnets.mm.networks.backbone.print_log", lambda *what: said.append(what))
    model, data = detector(16, cuda_graph={"max_graphs": 1}), batches(SIZES)
    assert same(trained(model, data), trained(detector(16), data))
    assert sum(model.backbone.graphs.counts.values()) == 5
    assert model.backbone.graphs.counts[MORE] > 0
    assert [level for _, _, level in said] == [logging.WARNING]
    assert "(2x3x32x32): pad images to fewer shapes (pad_size_divisor), or raise max_graphs=1" in said[0][0]


def test_evaluation_is_as_ever(graph: None) -> None:
    model, plain = detector(cuda_graph=True), detector()
    trained(model, batches(SIZES[:2]))
    plain.load_state_dict(model.state_dict())
    counts = dict(model.backbone.graphs.counts)
    for each in (model, plain):
        each.eval()
    images = torch.randn(1, 3, 32, 32)
    assert same(list(model.backbone(images)), list(plain.backbone(images)))
    assert model.backbone.graphs.counts == counts


def test_weights_are_stored_and_copied_as_without(graph: None, tmp_path: Path) -> None:
    model = detector(cuda_graph=True)
    trained(model, batches(SIZES[:2]))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    plain = detector()
    plain.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    other = copy.deepcopy(model)
    assert other.backbone.graphs.module is other.backbone.net
    assert not other.backbone.graphs.counts


def test_other_networks(graph: None) -> None:
    def make(**more: Any) -> nn.Module:
        torch.manual_seed(0)
        return TimmBackbone("resnet10t", out_indices=(2, 3), norm_eval=True, **more)

    def gradients(net: nn.Module) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        for _ in range(3):
            sum(y.square().mean() for y in net(torch.randn(1, 3, 32, 32, generator=draw))).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    net = make(cuda_graph=True)
    assert same(gradients(net), gradients(make()))
    assert net.graphs.counts[REPLAYED] == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"max_graph": 2}, r"'max_graph' is no setting of it \(did you mean 'max_graphs'\?\)"),
        ({"size_divisor": 128}, "shapes are the data preprocessor's, pad_size_divisor"),
        ({"max_graphs": 0}, "max_graphs=0: expected a whole number from 1 on"),
        ({"max_graphs": True}, "max_graphs=True: expected a whole number"),
    ],
)
def test_settings_that_are_none(setting: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RevBiFPN("test", cuda_graph=setting)


def test_what_no_graph_can_hold() -> None:
    with pytest.raises(ValueError, match="resnet10t recomputes by torch's checkpoint, which asks generators"):
        TimmBackbone("resnet10t", out_indices=(2, 3), with_cp=True, cuda_graph=True)
    assert RevBiFPN("test", mode="checkpoint", cuda_graph=True).graphs is not None
    assert RevBiFPN("test", cuda_graph=False).graphs is None


def test_masks_that_change_are_refused() -> None:
    class Runner:
        max_iters = 10
        model = nn.Sequential(RevBiFPN("test", layers={"type": "sparse_wide", "sparsity": 0.5}, cuda_graph=True))
        optim_wrapper = OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(
        ValueError, match=r"schedule 'rigl' changes masks .* leave cuda_graph of 0 out, or use 'static'"
    ):
        SparsityHook("rigl").before_run(Runner())
    SparsityHook("static").before_run(Runner())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_gpu_a_detector_trains_as_without_graphs() -> None:
    data, found = batches(SIZES), []
    torch.backends.cudnn.deterministic = True
    try:
        for setting in (True, None, None):
            model = detector(cuda_graph=setting).cuda()
            found.append(trained(model, data))
            assert setting is None or model.backbone.graphs.counts == {FIRST: 2, REPLAYED: 3}
    finally:
        torch.backends.cudnn.deterministic = False
    # what differs from run to run without graphs (sums by atomic additions) cannot be compared
    assert all(torch.equal(c, a) for c, a, b in zip(*found, strict=True) if torch.equal(a, b))
