"""The C++ compiler as a program that may do anything: it has little time, and is not believed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_PATIENCE = 300.0  # seconds for a command
_MOMENT = 30.0  # seconds for a compiler to show that it is one
_ROOM = 2**22  # bytes that compiling takes, and more


class KernelUnavailable(RuntimeError):
    """The kernel cannot be built here; the message says why."""


class CompilerHangs(KernelUnavailable):
    """It has not ended in time: other flags would not change that."""


def try_room(path: Path) -> None:
    """Whether there is room: compilers have many words for that there is none.

    Raises:
        OSError: there is none.
    """
    with path.open("xb") as file:
        file.write(bytes(_ROOM))
    path.unlink()


def try_compiler(compiler: Sequence[str], folder: Path, options: Sequence[str], more: Sequence[str]) -> None:
    """Whether it is one at all, in a moment: it may wait for something, do nothing, not know the user's flags.

    Args:
        compiler: the command.
        folder: to write to.
        options: to compile with.
        more: the user's, to compile and to link with.

    Raises:
        KernelUnavailable: it is none.
    """
    source = folder / "nothing.cpp"
    source.write_text('extern "C" int revnets_nothing() { return 0; }\n')
    compile_library(compiler, source, folder / "nothing.so", [*options, *more], more, _MOMENT)


def compile_library(
    compiler: Sequence[str],
    source: Path,
    whole: Path,
    flags: Sequence[str],
    link_flags: Sequence[str],
    seconds: float = _PATIENCE,
) -> None:
    """Compile and link a shared library.

    Args:
        compiler: the command.
        source: the file.
        whole: the library, in a folder of this process's own.
        flags: to compile with.
        link_flags: to link with.
        seconds: for each of the two.

    Raises:
        KernelUnavailable: it cannot be compiled by this compiler.
    """
    part = whole.with_suffix(".o")
    _run([*compiler, *flags, "-c", str(source), "-o", str(part)], whole.parent, seconds)
    _run([*compiler, "-shared", str(part), "-o", str(whole), *link_flags], whole.parent, seconds)
    if not (whole.is_file() and whole.stat().st_size):
        raise KernelUnavailable(f"{compiler[0]} has ended without an error, but has written nothing")


def _run(command: Sequence[str], folder: Path, seconds: float) -> None:
    """A command that gets no input, of limited time, with all that it has started."""
    with (folder / "errors").open("w+b") as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise KernelUnavailable(str(error)) from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise CompilerHangs(f"{command[0]} has not ended within {seconds:g} seconds") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        text = errors.read(2**16).decode(errors="replace")
    if code:
        lines = text.strip().splitlines() or [f"exit code {code}"]
        raise KernelUnavailable(next((line for line in lines if "error" in line), lines[0])[:300])


@contextlib.contextmanager
def turn(path: Path) -> Iterator[bool]:
    """One process at a time: a lock that ends with the process; gives whether others had it before.

    It only saves work: where file systems cannot lock, or somebody takes too long, several processes compile.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        waited, deadline = False, time.monotonic() + 2 * _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                time.sleep(0.05)
            except OSError:
                break
        yield waited
    finally:
        os.close(handle)
