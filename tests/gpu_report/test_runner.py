"""Sections that crash, hang, starve and babble: each loses itself only, and what it had measured is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from revnets.gpu_report import command, runner
from revnets.gpu_report.registry import Registry, choose, load
from revnets.gpu_report.results import DONE, FAILED, PARTLY, REPORT, ROWS, SKIPPED, SUMMARY, Report, RowWriter, Store

from .broken import PIDS, REPAIRED

CATALOG = "tests.gpu_report.broken"


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, list[str]]:
    """All sections in one run."""
    folder = tmp_path_factory.mktemp("report") / "new"
    said: list[str] = []
    report = command.run(folder, minutes=15, device="cpu", tiny=True, say=said.append, catalog=CATALOG)
    return folder, report, said


def test_each_loses_itself_only(broken: tuple[Path, Report, list[str]]) -> None:
    folder, report, said = broken
    states = {letter: outcome.state for letter, outcome in report.outcomes.items()}
    assert states == {**dict.fromkeys("abcde", PARTLY), "f": SKIPPED, "g": DONE}
    reasons = {letter: outcome.reason for letter, outcome in report.outcomes.items()}
    for letter, words in {"a": "exit code 7", "b": "SIGSEGV", "c": "stopped at its limit of", "d": "ran out of memory",
                          "e": "SIGKILL", "f": "there is no abacus here", "g": ""}.items():  # fmt: skip
        assert words in reasons[letter], letter
    assert [sentence[:1] for sentence in said[:7]] == list("abcdefg")
    assert json.loads((folder / REPORT).read_text())["outcomes"].keys() == set("abcdefg")


def test_rows_are_kept(broken: tuple[Path, Report, list[str]]) -> None:
    folder, report, _ = broken
    for letter in "abcde":
        assert report.outcomes[letter].rows == [{"what": "one", "value": 1, "command": "measure one"}], letter
    assert [row["value"] for row in report.outcomes["g"].rows] == [1, 2]
    assert not (folder / ROWS).exists()


def test_nothing_is_left_running(broken: tuple[Path, Report, list[str]]) -> None:
    pids = [int(pid) for pid in (broken[0] / PIDS).read_text().split()]
    assert not any(alive(pid) for pid in pids)


def test_every_row_has_its_command_and_what_was_not_measured_is_blank(broken: tuple[Path, Report, list[str]]) -> None:
    text = (broken[0] / SUMMARY).read_text()
    for letter in "abcde":
        part = text.split(f"## {letter}. ")[1].split("## ")[0]
        assert "| one | 1.0 |  | `measure one` |" in part
        assert "| two |  |  | `measure two` |" in part


def test_resume_measures_what_is_missing(
    broken: tuple[Path, Report, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before, _ = broken
    monkeypatch.setenv(REPAIRED, "1")
    said: list[str] = []
    report = command.run(
        folder, device="cpu", tiny=True, sections="crashes,g", resume=True, say=said.append, catalog=CATALOG
    )
    assert [sentence[:1] for sentence in said[:-1]] == ["b"]  # the other was done
    assert report.outcomes["b"].state == DONE
    assert [row["value"] for row in report.outcomes["b"].rows] == [1, 3]  # the first as it was
    assert report.outcomes["a"] == before.outcomes["a"]


def test_a_report_is_not_overwritten(broken: tuple[Path, Report, list[str]]) -> None:
    content = (broken[0] / REPORT).read_bytes()
    for more, words in (
        ({}, "--resume goes on"),
        ({"resume": True, "tiny": False}, "holds a report of --device cpu --tiny"),
    ):
        with pytest.raises(ValueError, match=words):
            command.run(broken[0], **{"device": "cpu", "tiny": True, "catalog": CATALOG, **more})  # type: ignore[arg-type]
    assert (broken[0] / REPORT).read_bytes() == content


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"outcomes": {"a": 1}}', '{"outcomes": {"a": {"colour": 1}}}'])
def test_a_file_that_is_no_report(content: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(content)
    with pytest.raises(ValueError, match="is no report of gpu-report"):
        command.run(tmp_path, device="cpu", resume=True, catalog=CATALOG)


def test_rows_of_a_run_that_was_killed_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(Report("cpu", True))
    writer = RowWriter(tmp_path / ROWS, "a")
    writer.row({"what": "one", "value": 5})
    with (tmp_path / ROWS).open("ab") as file:
        file.write(b'\xff\n{"section": "a", "row": {"wh')
    writer.row({"what": "two", "value": 6})
    report = store.load()
    assert report is not None
    assert (report.outcomes["a"].state, [row["value"] for row in report.outcomes["a"].rows]) == (PARTLY, [5, 6])


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    report = command.run(tmp_path, minutes=0.01, device="cpu", tiny=True, sections="g", say=str, catalog=CATALOG)
    assert report.outcomes["g"].state == FAILED
    assert "no time was left" in report.outcomes["g"].reason


def test_time_that_is_not_used_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def end_at_once(section: object, request: object, before: object, limit: float, deadline: float) -> str:
        limits.append(limit)
        return "it was not run"

    monkeypatch.setattr(runner, "_run", end_at_once)
    request = runner.Request(tmp_path, choose("a,b,d,g", load(CATALOG)), "cpu", minutes=1, tiny=True, catalog=CATALOG)
    runner.run_sections(request, Report("cpu", True), say=str)
    assert limits == pytest.approx([58.2 / 4, 58.2 / 3, 58.2 / 2, 58.2], abs=1)


def test_sigterm_ends_the_section_too(tmp_path: Path) -> None:
    code = (
        f"from revnets.gpu_report import command; from pathlib import Path; "
        f"command.run(Path({str(tmp_path)!r}), minutes=60, device='cpu', tiny=True, sections='c', catalog={CATALOG!r})"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL)
    pids = tmp_path / PIDS
    deadline = time.monotonic() + 120
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
    outcome = json.loads((tmp_path / REPORT).read_text())["outcomes"]["c"]
    assert (outcome["state"], len(outcome["rows"])) == (PARTLY, 1)
    assert (tmp_path / SUMMARY).is_file()


def test_sections_are_chosen_by_letter_or_name() -> None:
    sections = load(CATALOG)
    assert [s.letter for s in choose("g,exits", sections)] == ["a", "g"]
    assert len(choose("", sections)) == 7
    with pytest.raises(ValueError, match=r"unknown section 'z': expected some of a \(exits\), b"):
        choose("a,z", sections)


def test_a_letter_is_given_once() -> None:
    registry = Registry()
    more = {"share": 1, "names": (), "figures": (), "plan": lambda tiny: []}
    registry.section("a", "one", "One", **more)(lambda context: iter(()))
    with pytest.raises(ValueError, match="'a' is there twice"):
        registry.section("a", "two", "Two", **more)(lambda context: iter(()))
