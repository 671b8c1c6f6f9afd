"""Put each fault of the table into a copy of the sources, run its nearest quick tests, and print the share that is seen.

python -m tests.mutants [--only AREA or NAME] [--jobs N]
"""

import argparse
import json
import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .copies import PASSED, Copy, Outcome, prepare
from .fault import ROOT, Fault, TableError, table

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where too few faults are seen, 2 where there is nothing to measure."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], help="area, or name or pattern of faults; may be repeated"
    )
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="copies that are tried at once"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="most seconds that the tests of a fault may take")
    parser.add_argument("--at-least", type=float, default=90.0, help="percent of the faults that have to be seen")
    parser.add_argument("--json", type=Path, default=ROOT / "output" / "mutants.json", help="file for the results")
    options = parser.parse_args(argv)
    try:
        if options.jobs < 1 or not options.limit > 0:
            raise TableError(f"--jobs {options.jobs}, --limit {options.limit}: expected 1 at least, and some seconds")
        chosen = table(options.only)
        for faults in chosen.values():
            for fault in faults:
                fault.applied((ROOT / fault.file).read_text(encoding="utf-8"))
        rows = tried(chosen, options.jobs, options.limit)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return report(rows, options.at_least, options.json)


def tried(chosen: dict[str, tuple[Fault, ...]], jobs: int, limit: float) -> list[dict[str, Any]]:
    """A row for every fault.

    Raises:
        TableError: tests fail without any fault.
    """
    prepare()
    every = [(area, fault) for area, faults in chosen.items() for fault in faults]
    tests = list(dict.fromkeys(test for _, fault in every for test in fault.tests))
    copies: queue.Queue[Copy] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="revnets-mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        for number in range(min(jobs, len(every))):
            copies.put(Copy(Path(folder, f"copy-{number}")))

        def with_copy(work: Any) -> Outcome:
            copy = copies.get()
            try:
                return work(copy)  # type: ignore[no-any-return]
            finally:
                copies.put(copy)

        clean = {pool.submit(with_copy, lambda c, t=test: c.tested((t,), limit)): test for test in tests}
        seconds: dict[str, float] = {}
        for future, left in _counted(clean, "without a fault"):
            outcome, test = future.result(), clean[future]
            if outcome.code != PASSED:
                pool.shutdown(cancel_futures=True)
                raise TableError(f"{test} without any fault: {outcome.first}\n{outcome.output[-3000:]}")
            seconds[test] = outcome.seconds
            print(f"{left} {test}: green in {outcome.seconds:.0f} s", flush=True)

        def work(copy: Copy, fault: Fault) -> Outcome:
            return copy.tried(fault, min(limit, 60 + 5 * sum(seconds[test] for test in fault.tests)))

        works = {pool.submit(with_copy, lambda c, f=fault: work(c, f)): (area, fault) for area, fault in every}
        rows = {}
        for future, left in _counted(works, "faults"):
            (area, fault), outcome = works[future], future.result()
            if not outcome.noticed and outcome.code != PASSED:
                raise TableError(
                    f"fault {fault.name!r}: {' '.join(fault.tests)} cannot be run: {outcome.output[-1000:]}"
                )
            print(f"{left} {fault.name}: {f'seen by {outcome.first}' if outcome.noticed else 'NOT SEEN'}", flush=True)
            rows[fault.name] = {
                "area": area,
                "name": fault.name,
                "file": fault.file,
                "seen": outcome.noticed,
                "by": outcome.first,
                "seconds": round(outcome.seconds, 1),
            }
    return [rows[fault.name] for _, fault in every]


def _counted(futures: dict[Any, Any], words: str) -> Iterator[tuple[Any, str]]:
    """The futures as they end, each with how far it is and how long the rest will take."""
    start = time.perf_counter()
    for done, future in enumerate(as_completed(futures), start=1):
        rest = (time.perf_counter() - start) / done * (len(futures) - done)
        yield future, f"[{words} {done}/{len(futures)}, {rest / 60:.0f} min left]"


def report(rows: Sequence[dict[str, Any]], at_least: float, path: Path) -> int:
    """Print the share that is seen, by area and of all, and write it; 1 where it is too small."""
    areas = {row["area"]: [other["seen"] for other in rows if other["area"] == row["area"]] for row in rows}
    for area, seen in areas.items():
        print(f"{area:<16} {sum(seen):>3} of {len(seen)}")
    unseen = [row for row in rows if not row["seen"]]
    for row in unseen:
        print(f"not seen: {row['name']} in {row['file']}")
    share = 100 * (len(rows) - len(unseen)) / len(rows)
    print(f"{len(rows) - len(unseen)} of {len(rows)} faults are seen: {share:.1f}%, expected {at_least:g}% at least")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"share": share, "faults": list(rows)}, indent=2) + "\n", encoding="utf-8")
    return int(share < at_least)


if __name__ == "__main__":
    sys.exit(main())
