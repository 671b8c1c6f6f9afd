"""The slot of an HRNet in mmsegmentation and mmpose, as docs/detection.md has it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.registry import MODELS, DefaultScope, Registry  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "detection.md"


@pytest.fixture
def page() -> dict[str, Any]:
    """What the page's config assigns."""
    (_, section) = PAGE.read_text(encoding="utf-8").split("## The slot of an HRNet", 1)
    (program,) = re.findall(r"^```python\n(.*?)^```", section.split("\n## ")[0], re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    return names


def test_found_by_its_scope_from_another_toolbox(page: dict[str, Any]) -> None:
    theirs = Registry("model", parent=MODELS, scope="of_a_test")
    for key, channels in (("backbone", page["segmentation_head"]["in_channels"]), ("pose_backbone", [48])):
        backbone = theirs.build(dict(page[key]))
        y = backbone(torch.zeros(1, 3, 64, 64))
        assert [tuple(each.shape) for each in y] == [
            (1, count, side, side) for count, side in zip(channels, (16, 8, 4, 2), strict=False)
        ]


def test_a_step_in_mmsegmentation(page: dict[str, Any]) -> None:
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS as THEIRS
    from mmseg.structures import SegDataSample

    with DefaultScope.overwrite_default_scope("mmseg"):
        model = THEIRS.build(
            {"type": "EncoderDecoder", "backbone": page["backbone"], "decode_head": page["segmentation_head"]}
        )
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 64, 64, dtype=torch.long)))
    losses = model.loss(torch.randn(2, 3, 64, 64), [sample, sample])
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_heatmaps_in_mmpose(page: dict[str, Any]) -> None:
    pytest.importorskip("mmpose", reason="mmpose is not installed")
    from mmpose.registry import MODELS as THEIRS

    with DefaultScope.overwrite_default_scope("mmpose"):
        backbone, head = THEIRS.build(page["pose_backbone"]), THEIRS.build(page["pose_head"])
    assert head(backbone(torch.zeros(1, 3, 64, 64))).shape == (1, 17, 16, 16)
