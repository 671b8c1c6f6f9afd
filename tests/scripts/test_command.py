"""``revnets train``, ``validate``, ``detect`` and ``detect-test``: the scripts', word by word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from revnets import scripts
from revnets.cli import app
from revnets.training.termination import TERMINATED, Terminated

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "train": "classification.train",
    "validate": "classification.validate",
    "detect": "detection.train",
    "detect-test": "detection.test",
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("line", [[], ["--help"], ["--", "-h", "--config", "a b", "--x=", "--x=", "é"]])
def test_arguments_pass_as_they_are(name: str, line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []

    def main(argv: list[str], program: str) -> int:
        got.append((argv, program))
        return 75

    monkeypatch.setattr(scripts.script(SCRIPTS[name]), "main", main)
    result = CliRunner().invoke(app, [name, *line])
    assert result.exit_code == 75
    assert got == [(line, f"revnets {name}")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_that_of_the_script(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"usage: revnets {name} ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_mistakes_name_the_command(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--no-such-option"])
    assert result.exit_code == 2
    assert result.stderr.startswith("revnets: ")
    assert f"`revnets {name} --help` lists" in result.stderr


def test_an_end_by_sigterm_keeps_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(options: Any, *more: Any) -> None:
        raise Terminated(f"{options.data_dir}: saved")

    monkeypatch.setattr(scripts.script("classification.train"), "train", train)
    result = CliRunner().invoke(app, ["train", "--data-dir", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (TERMINATED, f"{tmp_path}: saved\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_faults_of_a_script_are_not_taken_for_mistakes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: list[str], program: str) -> int:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(scripts.script(SCRIPTS[name]), "main", main)
    result = CliRunner().invoke(app, [name])
    assert isinstance(result.exception, ValueError)


def test_scripts_of_a_checkout_lie_beside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    module = scripts.script("classification.digits")
    assert Path(str(module.__file__)) == ROOT / "classification" / "digits.py"
    assert sys.path[0] == str(ROOT)


def test_scripts_of_a_wheel_lie_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "classification"
    inside.mkdir()
    (inside / "__init__.py").write_text("")
    (inside / "inside.py").write_text("from . import __name__ as package\n")
    monkeypatch.setattr(scripts, "_INSIDE", tmp_path)
    monkeypatch.setattr(scripts, "__path__", [str(tmp_path)])
    module = scripts.script("classification.inside")
    assert module.package == "revnets.scripts.classification"
    for name in [name for name in sys.modules if name.startswith("revnets.scripts.classification")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["detect", "detect-test"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `pip install revnets` alone, without MMDetection."""
    monkeypatch.setitem(sys.modules, "mmengine", None)
    result = CliRunner().invoke(app, [name, "config.py", "checkpoint.pth"][: 3 if name == "detect-test" else 2])
    assert result.exit_code == 2
    assert result.stderr == "revnets: MMDetection's mmengine is not installed: pip install 'revnets[detection]'\n"
