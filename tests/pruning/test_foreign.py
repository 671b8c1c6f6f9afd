"""A checkpoint's own arguments reach no file and no network in `revnets prune` and `revnets deploy`."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from revnets.pruning.command import Source, load_model


@pytest.mark.parametrize(
    "kwargs", [{"checkpoint_path": "/etc/passwd"}, {"pretrained_cfg_overlay": {"url": "https://example.invalid/x"}}]
)
def test_arguments_of_a_checkpoint(kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("test_resnet").state_dict()
    torch.save({"state_dict": state, "args": {"model": "test_resnet", "model_kwargs": kwargs}}, tmp_path / "a.pth")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(
        ValueError, match=r"was trained with .*only what you name is read or fetched: give --model-kwargs"
    ):
        load_model(Source("test_resnet", tmp_path, tmp_path, tmp_path / "a.pth"))
