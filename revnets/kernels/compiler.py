"""The C++ compiler as a program that may do anything: it has little time, and is not believed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

_PATIENCE = 300.0  # seconds for a command, on a machine that has a core for it
_MOMENT = 30.0  # seconds for a compiler to show that it is one
_ROOM = 2**22  # bytes that compiling takes, and more
_MOST_WORDS = 2**16  # bytes of what a compiler complains of


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
    seconds: float | None = None,
) -> None:
    """Compile and link a shared library.

    Args:
        compiler: the command.
        source: the file.
        whole: the library, in a folder of this process's own.
        flags: to compile with.
        link_flags: to link with.
        seconds: for each of the two; by default some minutes, and as many times as long as a busy machine takes.

    Raises:
        KernelUnavailable: it cannot be compiled by this compiler.
    """
    seconds = _patience() if seconds is None else seconds
    part = whole.with_suffix(".o")
    _run([*compiler, *flags, "-c", str(source), "-o", str(part)], seconds)
    _run([*compiler, "-shared", str(part), "-o", str(whole), *link_flags], seconds)
    if not (whole.is_file() and whole.stat().st_size):
        raise KernelUnavailable(f"{compiler[0]} has ended without an error, but has written nothing")


def _patience() -> float:
    """Seconds for a command that shares the machine with others."""
    return _PATIENCE * min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0), 10.0)


def _run(command: Sequence[str], seconds: float) -> None:
    """A command that gets no input, of limited time, with all that it has started."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise KernelUnavailable(str(error)) from error
    try:
        text = _errors(process, cast(IO[bytes], process.stderr), seconds)
    except subprocess.TimeoutExpired as error:
        raise CompilerHangs(f"{command[0]} has not ended within {seconds:g} seconds") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = text.strip().splitlines() or [f"exit code {process.returncode}"]
        raise KernelUnavailable(next((line for line in lines if "error" in line), lines[0])[:300])


def _errors(process: subprocess.Popen[bytes], pipe: IO[bytes], seconds: float) -> str:
    """The beginning of what it says until it ends; others that it has started may hold the pipe open after that."""
    deadline, text = time.monotonic() + seconds, b""
    with pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            ready = selector.select(0.05)
            part = os.read(pipe.fileno(), 2**16) if ready else b""
            text += part[: _MOST_WORDS - len(text)]
            if ready and not part:
                break
            if not ready and process.poll() is not None:
                break
        process.wait(max(deadline - time.monotonic(), 0.0))
    return text.decode(errors="replace")


@contextlib.contextmanager
def turn(path: Path) -> Iterator[bool]:
    """One process at a time: a lock that ends with the process; gives whether others had it before.

    It only saves work: where file systems cannot lock, or somebody takes too long, several processes compile.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        waited, deadline = False, time.monotonic() + 2 * _patience()
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
