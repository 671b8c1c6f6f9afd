"""Parts of sections that a rehearsal on a CPU does not reach."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from revnets.gpu_report import predictions
from revnets.gpu_report.registry import Context, Row, Skipped
from revnets.gpu_report.rows import row_by_row
from revnets.gpu_report.sections import networks, tests
from revnets.gpu_report.timing import Energy
from revnets.gpu_report.worker import out_of_memory
from revnets.profiling.memory import StepMemory
from revnets.profiling.target import Setting, Target

TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu

def test_one(): pass
def test_two(): os._exit(3)
def test_three(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_four(): pytest.skip("no abacus")
def test_five(): pass
"""


@pytest.mark.slow
def test_tests_go_on_after_one_that_takes_its_process_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "helpers.py").touch()
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_other.py").write_text("def test_not_for_gpus(): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tests.ROOT))
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    rows = list(tests.measure(Context("cpu", seconds=300)))
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows}
    assert outcomes == {
        "test_one": "passed",
        "test_two": "crashed",
        "test_three": "failed",
        "test_four": "skipped",
        "test_five": "passed",
        tests.ALL: "1 crashed, 1 failed, 2 passed, 1 skipped",
    }
    assert [row["note"] for row in rows if row["outcome"] == "skipped"] == ["no abacus"]
    assert (rows[-1]["not_passed"], rows[-1]["failed"]) == (2, True)


def test_a_wheel_has_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    with pytest.raises(Skipped, match="run it from a checkout"):
        next(tests.measure(Context("cpu")))


class Pool:
    """Of processes, all of which were killed."""

    def submit(self, *_: Any) -> Future[int]:
        future: Future[int] = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future


def test_predictions_go_on_where_their_processes_were_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "peak_bytes", lambda target, setting: 1000 + 10 * target.batch_size)
    found = predictions.Predictions(Pool())  # type: ignore[arg-type]
    target, setting = Target("test_resnet", 64, 1, "store"), Setting()
    found.want_line(target, setting)
    assert found.largest(target, setting, 2000) == 100
    assert found.largest(target, setting, 1000) == 0


@pytest.mark.slow
def test_predictions_in_processes_of_their_own() -> None:
    target, setting = Target("test_resnet", 64, 1, "store"), Setting("cuda", optimizer="adamw")
    with predictions.predicting("cuda", tiny=False) as found:
        found.want_line(target, setting)
        largest = found.largest(target, setting, 2**28)
        assert found._found
    assert largest == predictions.Predictions(None).largest(target, setting, 2**28) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", networks._ORDER)
def test_networks_have_the_modes_of_the_plan(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for mode in (*networks._modes(name), "store"):
        networks.switch(model, mode)
        if hasattr(model, "mode"):
            assert model.mode == mode
        elif mode == "checkpoint":
            assert model.grad_checkpointing
        else:
            assert not getattr(model, "grad_checkpointing", False)


class FakePredictions:
    """Of a card that holds a thousand images, by prediction."""

    def want_line(self, *_: Any) -> None:
        pass

    def largest(self, *_: Any) -> int:
        return 1000


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a card that really holds 900 images."""
    names = ("test_revbifpn @32", "float32", "", ["reversible", "store"])
    made = networks._Group(Context("cpu"), FakePredictions(), *names)  # type: ignore[arg-type]
    made.ms_per_image = {"reversible": 1.0, "store": 100.0}

    def once(mode: str, batch: int) -> tuple[float | None, str]:
        return (2.0 * batch, "") if batch <= 900 else (None, f"batch {batch}: out of memory")

    monkeypatch.setattr(made, "once", once)
    return made


def merged(rows: Any) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["mode"], {}).update(row)
    return found


def test_the_largest_batch_is_tried_until_it_trains(group: Any) -> None:
    rows = merged(group.largest({}))
    ours, theirs = rows["reversible"], rows["store"]
    assert (ours["largest_predicted"], ours["largest"], ours["largest_images_per_s"]) == (1000, 900, 500)
    assert ours["note"] == "batch 1000: out of memory"
    assert "largest" not in theirs  # a step of it would take 100 seconds
    assert theirs["note"] == "the largest batch was not tried: 100 s a step"
    assert merged(group.largest({})) == {}  # once is enough


def test_a_network_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, x: Any, *_: Any) -> StepMemory:
        if "resnet" in type(model).__name__.lower():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 EiB")
        return StepMemory(1, 1, 1e-3)

    monkeypatch.setattr(networks, "measure_training_step", fails)
    monkeypatch.setattr(networks, "milliseconds", lambda steps, *_, **__: dict.fromkeys(steps, 1.0))
    monkeypatch.setattr(networks._Group, "largest", lambda self, before: iter(()))
    rows = list(networks.measure(Context("cpu", tiny=True, seconds=600)))
    failed = [row for row in rows if row.get("failed")]
    assert {row["network"] for row in failed} == {"test_resnet @32"}
    assert all("out of memory" in row["note"] for row in failed)
    assert len(rows) == 6


def test_rows_one_after_the_other() -> None:
    def figures(row: Row) -> Row:
        if row["n"] == 1:
            raise RuntimeError("no\nluck")
        return {"square": row["n"] ** 2}

    planned = [{"n": n, "command": f"measure {n}"} for n in range(4)]
    context = Context("cpu", before=[{"n": 0, "command": "another", "square": 0}])
    assert list(row_by_row(context, planned, figures)) == [
        {"n": 1, "note": "no luck", "failed": True},
        {"n": 2, "square": 4},
        {"n": 3, "square": 9},
    ]
    assert list(row_by_row(Context("cpu", seconds=0), planned, figures)) == []


def test_there_is_no_energy_without_a_counter() -> None:
    assert Energy(torch.device("cpu")).joules(lambda: None, torch.device("cpu"), 1) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_no_memory_left(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
