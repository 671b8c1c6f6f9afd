"""Copies of the sources in which faults are tried, and the processes that run tests there."""

import compileall
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

from .fault import ROOT, Fault

# Imported once in the process that all others are forked from: nothing of the project's, which is another in each.
PRELOADED = ["torch", "torchvision", "timm", "numpy", "hypothesis", "pytest", "mmengine", "rich", "typer", "yaml"]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",  # of tests that end in the middle
}
PASSED, FAILED, BROKEN = 0, 1, 2  # what pytest says: all passed, some failed, or not even that could be found out


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    Attributes:
        code: pytest's, None where the time was over.
        seconds: that it took.
        first: the test that failed, or what else happened.
        output: all that was printed.
    """

    code: int | None
    seconds: float
    first: str
    output: str

    @property
    def noticed(self) -> bool:
        """Whether something was wrong: a test failed, or a module could not be imported, or nothing came to an end."""
        return self.code in (None, FAILED, BROKEN) or (self.code or 0) < 0


class Copy:
    """A copy of the project's files, without its history.

    Args:
        folder: to make.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout.split("\0")
        for name in names:
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        # compared by content: a fault and its removal may fall in one second and have one length
        compileall.compile_dir(folder, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)

    def tried(self, fault: Fault, limit: float) -> Outcome:
        """Put a fault in, run its tests, take it out."""
        path = self.folder / fault.file
        text = path.read_text(encoding="utf-8")
        path.write_text(fault.applied(text), encoding="utf-8")
        try:
            return self.tested(fault.tests, limit)
        finally:
            path.write_text(text, encoding="utf-8")

    def tested(self, tests: tuple[str, ...], limit: float) -> Outcome:
        """Run quick tests up to the first that fails."""
        log = self.folder.with_suffix(".log")
        start = time.perf_counter()
        process = multiprocessing.get_context("forkserver").Process(
            target=_pytest, args=(str(self.folder), list(tests), str(log))
        )
        process.start()
        process.join(limit)
        code = process.exitcode
        if code is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # a group of its own, see below
            process.join()
        output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return Outcome(code, time.perf_counter() - start, _first(code, output), output)


def prepare() -> None:
    """Settings of the processes to come."""
    os.environ.update(SETTINGS)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def _first(code: int | None, output: str) -> str:
    if code is None:
        return "the time was over"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[1] if found else "" if code == PASSED else f"code {code}"


def _pytest(folder: str, tests: list[str], log: str) -> None:
    """In a new process, forked from one that has the libraries: from here on, sources are those of the copy."""
    os.setsid()
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this module, by which the process was started, is the project's own
    sys.path[:] = [folder, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    os.environ["PYTHONPATH"] = folder
    sys.dont_write_bytecode = True
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    import pytest

    code = pytest.main(["-q", "-x", "--no-header", "-rfE", "-p", "no:cacheprovider", "-m", "not slow", *tests])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))  # threads that a fault leaves behind are not waited for
