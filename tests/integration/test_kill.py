"""A few kills; the command for many is in `kill.py`."""

from pathlib import Path

import pytest

from .kill import Harness
from .scenarios import classification, detection, differing


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [classification, detection], ids=lambda make: make.__name__)
def test_killed_runs_end_as_the_one_that_was_let_be(scenario: object, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    if scenario is detection:
        pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
        harness = Harness(detection(tmp_path / "data"), tmp_path / "kills", seed=1)
    else:
        harness = Harness(classification(tmp_path / "data"), tmp_path / "kills", seed=1)
    harness.run(3)
    assert len(harness.kills) == 3
    assert harness.differences == []


def test_differences_are_found() -> None:
    import torch

    one = {"a": [torch.zeros(2), 1], "b": {"c": 2.0}}
    assert differing(one, {"a": [torch.zeros(2), 1], "b": {"c": 2.0}}) == []
    assert differing(one, {"a": [torch.tensor([0.0, 1e-40]), 2], "b": {}}) == ["/a/0", "/a/1", "/b: keys"]
