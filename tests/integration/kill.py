"""Kills runs with SIGKILL at random moments, goes on, and compares with a run that was let be.

python -m tests.integration.kill --kills 50 --seed 0 --folder /tmp/kills

Half of the kills come at a random moment, half while a file is being written. The command can itself be interrupted:
given the same folder it goes on where it was. It ends with code 1 if anything differs in a single bit.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.scenarios import ROOT, Scenario, classification, detection, float16

FINISHED = -1


@dataclass
class Harness:
    """Starts, kills and compares.

    Args:
        scenario: What to run.
        folder: Of everything that is written.
        seed: Of the moments.
        fresh: A new interpreter for each start, instead of a fork of this process, which has imported everything.
        within: Latest moment of a kill, in seconds; 0.6 times the duration of a run that is let be where not given.
        limit: Seconds after which a run that neither ends nor is killed is taken for hung.
    """

    scenario: Scenario
    folder: Path
    seed: int = 0
    fresh: bool = False
    within: float | None = None
    limit: float = 3600
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / "kills.jsonl"
        if self._log.exists():
            self.records = [json.loads(line) for line in self._log.read_text().splitlines()]

    @property
    def kills(self) -> list[dict[str, Any]]:
        """All so far."""
        return [record for record in self.records if "kill" in record]

    @property
    def differences(self) -> list[str]:
        """Of all rounds."""
        return [each for record in self.records for each in record.get("differing", [])]

    def run(self, kills: int) -> None:
        """Kills so many times in all, in rounds that each end with a finished run that is compared."""
        seconds = self._uninterrupted()
        while len(self.kills) < kills:
            self._round(seconds, kills)

    def _uninterrupted(self) -> float:
        for record in self.records:
            if "uninterrupted" in record:
                return float(record["uninterrupted"])
        shutil.rmtree(self.folder / "whole", ignore_errors=True)
        start = time.perf_counter()
        code = self._wait(self._start(self.folder / "whole"))
        self._require(code)
        self._record({"uninterrupted": time.perf_counter() - start})
        return time.perf_counter() - start

    def _round(self, seconds: float, kills: int) -> None:
        number = sum("differing" in record for record in self.records)
        folder = self.folder / f"round{number}"
        code, killed = FINISHED, sum(record.get("round") == number for record in self.kills)
        while len(self.kills) < kills:
            writing, delay = self._moment(seconds, number)
            process, start = self._start(folder), time.perf_counter()
            seen, code = self._kill(process, folder, delay, writing)
            if code is not None:
                break
            killed += 1
            what = {"kill": "while writing" if seen else "at random", "after": time.perf_counter() - start}
            self._record(
                {**what, "file": seen, "round": number, "saved": sorted(p.name for p in folder.glob("*.pth*"))}
            )
        if code is None or code == FINISHED:
            code = self._wait(self._start(folder))
        self._require(code)
        differing = self.scenario.differing(self.folder / "whole", folder)
        left = [str(path) for path in folder.rglob(self.scenario.unfinished)]
        self._record({"differing": [*differing, *left], "kills": killed})
        if not differing:
            shutil.rmtree(folder)
            folder.with_suffix(".jsonl").unlink(missing_ok=True)

    def _moment(self, seconds: float, number: int) -> tuple[bool, float]:
        """Whether to wait for a file, and how long to wait first; another in each round, as one can end unkilled."""
        chance = random.Random(f"{self.seed} {self.scenario.name} {number} {len(self.kills)}")
        return chance.random() < 0.5, chance.uniform(0.08, 1.0) * (self.within or 0.6 * seconds)

    def _start(self, folder: Path) -> int:
        line = self.scenario.line(folder)
        log = open(self.folder / "log.txt", "ab")  # noqa: SIM115  (the child's until it ends)
        pid = os.fork()
        if pid:
            log.close()
            return pid
        try:
            _die_with_parent()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            if self.fresh:
                os.chdir(ROOT)
                script = str(ROOT / self.scenario.module.replace(".", "/")) + ".py"
                os.execv(sys.executable, [sys.executable, script, *line])
            os._exit(importlib.import_module(self.scenario.module).main(line))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(99)

    def _kill(self, pid: int, folder: Path, delay: float, writing: bool) -> tuple[str, int | None]:
        """The file that was being written, if any, and the exit code of a process that was faster."""
        end, seen, started = time.perf_counter() + delay, "", time.time()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return "", os.waitstatus_to_exitcode(status)
            late = time.perf_counter() >= end
            if late and writing:
                seen = next((p.name for p in folder.glob(self.scenario.unfinished) if _newer(p, started)), "")
            if late and (seen or not writing):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return seen, None
            self._end_if_hung(pid, end)
            time.sleep(0.0002 if late else 0.002)

    def _wait(self, pid: int) -> int:
        start = time.perf_counter()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            self._end_if_hung(pid, start)
            time.sleep(0.01)

    def _end_if_hung(self, pid: int, since: float) -> None:
        if time.perf_counter() - since > self.limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"{self.scenario.name} did not end within {self.limit:g} s: see {self.folder}/log.txt")

    def _require(self, code: int) -> None:
        if code:
            tail = (self.folder / "log.txt").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.scenario.name} ended with code {code}:\n{tail}")

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self._log.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _newer(path: Path, moment: float) -> bool:
    """Whether a file is being written now: an earlier kill may have left one."""
    try:
        return path.stat().st_mtime >= moment
    except FileNotFoundError:
        return False


def _die_with_parent() -> None:
    """Or a harness that is killed would leave a run that writes where the next one does (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    line = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    line.add_argument("--kills", type=int, default=50, help="over all scripts (default: 50)")
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--folder", type=Path, required=True, help="of everything that is written; goes on in it")
    line.add_argument("--only", choices=["classification", "detection", "float16"], help="float16: classification, too")
    line.add_argument("--fresh", action="store_true", help="a new interpreter for each start (slow), not a fork")
    line.add_argument("--within", type=float, metavar="SECONDS", help="latest moment of a kill after a start")
    args = line.parse_args(argv)
    scenarios = {"classification": classification, "detection": detection, "float16": float16}
    names = [args.only] if args.only else ["classification", "detection"]
    bad = 0
    for index, name in enumerate(names):
        scenario = scenarios[name](args.folder / f"data-{name}")
        harness = Harness(scenario, args.folder / name, args.seed, args.fresh, args.within)
        importlib.import_module(harness.scenario.module)
        harness.run(args.kills // len(names) + (index < args.kills % len(names)))
        written = sum(record["kill"] == "while writing" for record in harness.kills)
        rounds = sum("differing" in record for record in harness.records)
        print(
            f"{name}: {len(harness.kills)} kills ({written} while a file was written), {rounds} runs finished after "
            f"them, {len(harness.differences)} differences from the run that was let be"
        )
        for each in harness.differences[:20]:
            print(f"  {each}")
        bad += len(harness.differences)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
