"""`--cuda-graph`: refused where a graph would not do what is asked; resumed to the bit where it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from revnets.training.capture import step as capture
from tests.training.capture.fake_graph import FakeGraph

from .short_runs import Trainer
from .test_train_interrupted import terminate_at
from .test_train_run import differing, load


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "the run is on cpu, which has none; leave it out"),
        (["--amp", "--amp-dtype", "float16"], "float16 asks the GPU after each step; give --amp-dtype bfloat16"),
        (["--grad-accum-steps", "2"], "--grad-accum-steps 2 makes an update of several steps"),
        (["--clip-grad", "1", "--clip-mode", "agc"], "--clip-mode agc is not captured; give --clip-mode norm"),
        (["--numerics-interval", "5"], "--numerics-interval looks into steps"),
        (["--teacher", "test_vit"], "leave --teacher and --teacher-checkpoint out"),
        (["--opt", "lamb"], "--opt lamb: optimizer Lamb computes on the host"),
        (["--opt", "nadam"], "cannot leave out an update on the device"),
        (
            ["--opt", "nadam", "--nonfinite-limit", "0", "--model", "test_revbifpn", "--model-kwargs", "exact=true"],
            "(it has no `fused`), which exact mode's range check needs",
        ),
    ],
)
def test_refusals_leave_nothing_behind(
    run_train: Trainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    if more:
        monkeypatch.setattr(capture, "CudaGraph", FakeGraph)
    assert run_train("--cuda-graph", *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: --cuda-graph")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_captured_run_is_resumed_to_the_bit(
    run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capture, "CudaGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "captures", 0)
    line = ["--cuda-graph", "--mixup", "0.2", "--sched-on-updates", "--drop-path", "0.2", "--clip-grad", "1"]
    assert run_train(*line, "--experiment", "whole") == 0
    assert FakeGraph.captures == 1
    with monkeypatch.context() as patch:
        terminate_at(patch, "_step", 6)
        assert run_train(*line, "--experiment", "parts") == 75
    assert run_train(*line, "--experiment", "parts", "--resume", "auto") == 0
    assert FakeGraph.captures == 3
    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    for key in whole.keys() - {"args"}:
        assert not differing(whole[key], parts[key]), key
