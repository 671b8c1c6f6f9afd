"""A run that was stopped in the middle of an epoch goes on with the same losses, to the bit; files are whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from detection import checkpoints
from detection.train import main

from .short_runs import rows, same_weights


def run(
    config: Path, folder: Path, losses: Path, *more: str, stop: int | None = None, options: tuple[str, ...] = ()
) -> int:
    hooks: list[dict[str, Any]] = [{"type": "LossHook", "path": str(losses)}]
    if stop is not None:
        hooks.append({"type": "StopHook", "after": stop})
    own = config.with_name(f"{folder.name}-{stop}.py")
    own.write_text(f"_base_ = '{config}'\ncustom_hooks = {hooks!r}\n")
    line = [str(own), "--work-dir", str(folder), "--draw", "0", "--save-every", "1", *more]
    return main([*line, *(["--cfg-options", *options] if options else [])])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_in_the_middle_of_an_epoch(
    tiny: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (f"train_dataloader.num_workers={workers}",)
    assert run(tiny, tmp_path / "whole", tmp_path / "whole.jsonl", options=options) == 0
    assert run(tiny, tmp_path / "parts", tmp_path / "parts.jsonl", stop=3, options=options) == 130
    assert "--resume" in capsys.readouterr().err
    assert checkpoints.newest(tmp_path / "parts") == tmp_path / "parts" / "interim.pth"
    options = (f"train_dataloader.num_workers={1 - workers}",)  # which must not matter
    assert run(tiny, tmp_path / "parts", tmp_path / "parts.jsonl", "--resume", stop=6, options=options) == 130
    assert run(tiny, tmp_path / "parts", tmp_path / "parts.jsonl", "--resume", options=options) == 0
    whole, parts = rows(tmp_path / "whole.jsonl"), rows(tmp_path / "parts.jsonl")
    assert [row["iter"] for row in whole] == list(range(8))
    assert parts == whole
    assert any(any(row["flips"]) for row in whole)
    first, second = ([(row["images"], row["flips"]) for row in epoch] for epoch in (whole[:4], whole[4:]))
    assert sorted(first) != sorted(second)  # other batches, not the same ones in another order
    assert same_weights(tmp_path / "whole" / "epoch_2.pth", tmp_path / "parts" / "epoch_2.pth")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert summaries[0]["validations"] == summaries[1]["validations"] != []
    assert not list(tmp_path.rglob(".tmp-*"))
