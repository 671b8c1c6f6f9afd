"""What two or more processes decide together, and what each gets back of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classification.run.report import read_summary

from .short_runs import SHORT
from .test_train_distributed import torchrun
from .test_train_run import differing, load

DRIVER = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
from classification import loop, train
from revnets.reversible import RevSequential
from revnets.training.checkpoints import integrity

folder, name, stop, hidden, far, *line = sys.argv[1:]
stop, rank, steps = int(stop), int(os.environ["RANK"]), 0
step, validate, damage = loop._step, train._validated, integrity.damage

def stopped(run, images, target, number, total):
    global stop, steps
    stop, steps = stop - 1, steps + 1
    if stop == 0:
        raise KeyboardInterrupt
    scale = 1e9 if rank == 1 and str(steps) in far.split(",") else 1
    chains = [module for module in run.model.modules() if isinstance(module, RevSequential)][:1]
    hooks = [chain.register_forward_pre_hook(lambda m, xs: tuple(x * scale for x in xs)) for chain in chains]
    try:
        return step(run, images, target, number, total)
    finally:
        for hook in hooks:
            hook.remove()

def noted(run, end):
    found = validate(run, end)
    states = {"model": run.model.module.state_dict(), "ema": run.ema.module.state_dict(), "metrics": found}
    torch.save(states, f"{folder}/{name}-{end.epoch}-{rank}.pt")
    return found

def partly(path):
    return "not all of it is there" if rank == 1 and path.name in hidden.split(",") else damage(path)

loop._step, train._validated, integrity.damage = stopped, noted, partly
sys.exit(train.main([*line, "--output", folder, "--experiment", name, "--resume", "auto"]))
"""


def drive(
    folder: Path,
    name: str,
    *line: str,
    stop: int = 0,
    hidden: str = "",
    far: str = "",
    code: int = 0,
    processes: int = 2,
) -> str:
    """Processes, stopped before some step; of the second, files are hidden, and steps far out of range.

    Returns:
        What they said.
    """
    script = folder / "driver.py"
    script.write_text(DRIVER)
    done = torchrun(str(script), str(folder), name, str(stop), hidden, far, *SHORT, *line, processes=processes)
    assert (done.returncode == 0) == (stop == code == 0), done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--no-ddp-bb", "--dist-bn", "none"]], ids=["synchronised", "each its own"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_resumed_run_is_the_same_in_every_process(
    digits: Path, tmp_path: Path, more: list[str], processes: int
) -> None:
    """Weights, EMA, running statistics and mean losses of each, where runs are stopped in the middle of an epoch."""
    line = ["--data-dir", str(digits), "--batch-size", "4", "--recovery-interval", "1", "--val-interval", "1"]
    line += ["--model-ema", "--model-ema-decay", "0.5", *more]
    drive(tmp_path, "whole", *line, processes=processes)
    drive(tmp_path, "parts", *line, stop=3, processes=processes)
    assert "0 epochs and 2 batches done" in drive(tmp_path, "parts", *line, processes=processes)
    states = {
        (name, epoch, rank): torch.load(tmp_path / f"{name}-{epoch}-{rank}.pt", weights_only=False)
        for name in ("whole", "parts")
        for epoch in (0, 1)
        for rank in range(processes)
    }
    for epoch in (0, 1):
        for rank in range(processes):
            assert not differing(states["whole", epoch, rank], states["parts", epoch, rank]), (epoch, rank)
    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    for key in whole.keys() - {"args"}:
        assert not differing(whole[key], parts[key]), key
    columns = ("epoch", "train_loss", "eval_loss", "eval_top1", "lr")
    tables = [
        [[row[c] for c in columns] for row in read_summary(tmp_path / name / "summary.csv")]
        for name in ("whole", "parts")
    ]
    assert tables[0] == tables[1]
    own = states["whole", 1, 0]["ema"].keys() if more else ()
    names = [name for name in own if name.endswith("running_mean")]
    assert all(differing(*(states["whole", 1, rank]["ema"][name] for rank in (0, 1))) for name in names)


@pytest.mark.slow
def test_all_processes_go_on_from_what_the_first_chose(digits: Path, tmp_path: Path) -> None:
    line = ["--data-dir", str(digits), "--batch-size", "4", "--recovery-interval", "1", "--model-ema", "--epochs", "3"]
    drive(tmp_path, "run", *line, stop=11)
    said = drive(tmp_path, "run", *line, hidden="recovery.pth.tar,last.pth.tar")
    assert "recovery.pth.tar', 1 epochs and 2 batches done" in said
    assert [row["epoch"] for row in read_summary(tmp_path / "run" / "summary.csv")] == [0, 1, 2]
    states = [torch.load(tmp_path / f"run-2-{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert not differing(states[0], states[1])


@pytest.mark.slow
def test_one_process_out_of_exact_modes_range(digits: Path, tmp_path: Path) -> None:
    line = ["--data-dir", str(digits), "--batch-size", "8", "--model", "test_revbifpn", "--model-ema"]
    line += ["--nonfinite-limit", "3"]
    said = drive(tmp_path, "run", *line, far="2,3,6")
    assert "step 2: process 1: op " in said, said
    assert [row["train_skipped"] for row in read_summary(tmp_path / "run" / "summary.csv")] == [2, 3]
    said = drive(tmp_path, "ends", *line, far="2,3,4", code=2)
    assert "3 updates in a row were left out" in said
    assert "process 1: op " in said.split("updates in a row")[1]
