"""transformers: our networks as TimmWrapper, as TimmBackbone, and under its detectors and segmenters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.steps import (
    CLASSES,
    Case,
    assert_less_memory,
    assert_same_gradients,
    assert_same_weights,
    client,
    images,
)

NARROW = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0},
}
BOXES = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
MASKS = {"mask_labels": [torch.ones(1, 64, 64)] * 2, "class_labels": [torch.tensor([1])] * 2}
pytestmark = pytest.mark.filterwarnings("ignore")


def loss(output: Any) -> torch.Tensor:
    value: torch.Tensor = output.loss
    return value


def backbone(tf: Any) -> Any:
    return tf.TimmBackboneConfig(backbone="revbifpn_s0", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3))


def _wrapper(tf: Any) -> Case:
    model = tf.TimmWrapperForImageClassification(tf.TimmWrapperConfig(architecture="revbifpn_s0", num_labels=CLASSES))
    return Case(model, {"pixel_values": images(), "labels": torch.tensor([0, 2])}, loss, memory=0.6)


def _backbone(tf: Any) -> Case:
    model = tf.TimmBackbone(backbone(tf))
    return Case(model, images(), lambda output: sum(y.square().mean() for y in output.feature_maps), memory=0.6)


def _detr(tf: Any) -> Case:
    config = tf.DetrConfig(backbone_config=backbone(tf), use_timm_backbone=False, num_queries=5, num_labels=3, **NARROW)
    model = tf.DetrForObjectDetection(config)
    return Case(model, {"pixel_values": images(), "labels": BOXES}, loss, unused=True)


def _deformable_detr(tf: Any) -> Case:
    own = {"num_feature_levels": 4, "num_queries": 5, "num_labels": 3, "use_timm_backbone": False}
    model = tf.DeformableDetrForObjectDetection(tf.DeformableDetrConfig(backbone_config=backbone(tf), **own, **NARROW))
    return Case(model, {"pixel_values": images(), "labels": BOXES}, loss, unused=True)


def _upernet(tf: Any) -> Case:
    own = {"hidden_size": 32, "auxiliary_in_channels": 128, "num_labels": CLASSES}
    model = tf.UperNetForSemanticSegmentation(tf.UperNetConfig(backbone_config=backbone(tf), **own))
    return Case(model, {"pixel_values": images(), "labels": torch.zeros(2, 64, 64, dtype=torch.long)}, loss)


def _mask2former(tf: Any) -> Case:
    own = {
        **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
        **{"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32},
        **{"num_queries": 5, "train_num_points": 64, "num_labels": CLASSES},
    }
    model = tf.Mask2FormerForUniversalSegmentation(tf.Mask2FormerConfig(backbone_config=backbone(tf), **own))
    return Case(model, {"pixel_values": images(), **MASKS}, loss, unused=True)


def _maskformer(tf: Any) -> Case:
    decoder = tf.DetrConfig(num_queries=5, **NARROW)
    own = {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": decoder, "num_labels": CLASSES}
    model = tf.MaskFormerForInstanceSegmentation(tf.MaskFormerConfig(backbone_config=backbone(tf), **own))
    return Case(model, {"pixel_values": images(), **MASKS}, loss, unused=True)


MODELS = (_wrapper, _backbone, _detr, _deformable_detr, _upernet, _mask2former, _maskformer)


def case(make: Callable[[Any], Case]) -> Case:
    tf = client("transformers")
    torch.manual_seed(0)
    return make(tf)


@pytest.mark.parametrize("make", MODELS)
def test_gradients_are_those_of_store(make: Callable[[Any], Case]) -> None:
    assert_same_gradients(case(make))


@pytest.mark.parametrize("make", MODELS)
def test_it_needs_less_memory(make: Callable[[Any], Case]) -> None:
    assert_less_memory(case(make))


@pytest.mark.parametrize("make", [_wrapper, _upernet])
def test_its_own_files_hold_the_network(make: Callable[[Any], Case], tmp_path: Path) -> None:
    model: Any = case(make).model
    model.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
