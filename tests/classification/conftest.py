"""A small folder of digits, and the shortest useful training."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from classification import train
from classification.digits import make_digits

from .short_runs import SHORT, Trainer


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return make_digits(tmp_path_factory.mktemp("data") / "digits", size=32, limit=64)


@pytest.fixture
def run_train(digits: Path, tmp_path: Path) -> Trainer:
    """Calls train.py's main in this process, for two short epochs into `tmp_path/run` unless told otherwise."""

    def run(*more: str) -> int:
        return train.main([*SHORT, "--data-dir", str(digits), "--output", str(tmp_path), *more])

    return run


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short run with EMA; look, do not write."""
    output = tmp_path_factory.mktemp("trained")
    more = ["--model-ema", "--model-ema-decay", "0.5", "--model-kwargs", "act_layer=relu"]
    assert train.main([*SHORT, "--data-dir", str(digits), "--output", str(output), *more]) == 0
    return output / "run"


@pytest.fixture
def tars(digits: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}.tar", "w") as file:
            file.add(digits / split, arcname=split)
    return folder
