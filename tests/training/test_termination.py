"""SIGTERM is noted while it matters and kills otherwise."""

import signal
import threading

import pytest

from revnets.training.termination import Terminated, Termination, leave_to_parent


def test_noted_within_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.agreed()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # Slurm and torchrun each send one
        assert termination.agreed()
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_happens_in_other_threads() -> None:
    found: list[bool] = []

    def run() -> None:
        with Termination() as termination:
            found.append(termination.agreed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_uncaught_it_ends_the_process_with_its_code() -> None:
    with pytest.raises(SystemExit) as ended:
        raise Terminated("saved")
    assert ended.value.code == 75
    assert str(ended.value) == "saved"


def test_loading_processes_ignore_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        leave_to_parent()
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
