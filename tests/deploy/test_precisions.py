"""Candidates of ``deploy`` below float32: what goes wrong with one of them, and on which images they are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.deploy import ENGINES, Candidate, Engine, ExportError, Precisions, deploy
from revnets.deploy.precisions import _Trial

from .nets import Net, images


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing but torch were installed."""
    monkeypatch.setattr(Engine, "missing", lambda engine: list(engine.packages))


def tried(**options: Any) -> Precisions:
    data = images(4)
    return Precisions(100, data, [(data, torch.zeros(4, dtype=torch.long))], **options)


def trial(folder: Path, made: list[Candidate]) -> _Trial:
    return _Trial(Net(nn.ReLU), images(1), True, folder, "model", made, [images(2)], "minmax")


# --- what cannot be asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "sparse", "nothing"])
def test_precisions_are_tried_only_where_engines_are_compared(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"^precisions: only with engine='auto'.*engine='{engine}'"):
        deploy(Net(), images(1), tmp_path / "out", engine, precisions=tried())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [[], [Candidate("openvino", "float32", None, refused="it has no such operator")]])
def test_an_engine_without_a_file_in_float32_has_none_by_default(made: list[Candidate], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^openvino has no file in float32$"):
        trial(tmp_path, made).by_default("openvino", "bfloat16")
