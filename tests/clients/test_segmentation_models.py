"""segmentation_models_pytorch: `encoder_name="tu-revbifpn_s0"` in its decoders."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.steps import (
    Case,
    assert_less_memory,
    assert_same_gradients,
    assert_same_weights,
    client,
    images,
    mean_square,
)

DECODERS = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN"),
    *("DeepLabV3", "DeepLabV3Plus", "Segformer", "UPerNet", "DPT"),
)
UNUSED = ("PSPNet", "DeepLabV3", "DeepLabV3Plus", "DPT")  # decoders that do not read all maps
pytestmark = pytest.mark.filterwarnings("ignore")


def case(decoder: str) -> Case:
    smp = client("segmentation_models_pytorch")
    torch.manual_seed(0)
    model: Any = getattr(smp, decoder)("tu-revbifpn_s0", encoder_weights=None, classes=3)
    side = 128 if decoder == "PAN" else 64  # which halves the coarsest map three times
    return Case(model, images(side), mean_square, memory=0.9, unused=decoder in UNUSED)


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_are_those_of_store(decoder: str) -> None:
    assert_same_gradients(case(decoder))


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_needs_less_memory(decoder: str) -> None:
    assert_less_memory(case(decoder))


@pytest.mark.parametrize("decoder", ["Unet", "DeepLabV3Plus"])
def test_its_own_files_hold_the_network(decoder: str, tmp_path: Path) -> None:
    model: Any = case(decoder).model
    model.save_pretrained(tmp_path)
    loaded = client("segmentation_models_pytorch").from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert loaded.encoder.model.model.mode == "reversible"


def test_maps_have_the_stride_that_the_decoder_asks_for() -> None:
    encoder: Any = case("DeepLabV3Plus").model.encoder
    assert [y.shape[-1] for y in encoder(images())] == [64, 32, 16, 8, 4, 4]
