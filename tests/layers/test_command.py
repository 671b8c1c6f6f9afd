"""``revnets layers``: the registry and conversions on the terminal."""

import pytest
from typer.testing import CliRunner

from revnets.cli import app
from revnets.layers import command, list_layers


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["layers", *arguments])
    return result.exit_code, result.output


def test_lists_the_registry() -> None:
    code, output = run()
    assert code == 0
    assert all(name in output for name in list_layers())


def test_shows_a_conversion() -> None:
    code, output = run("test_efficientnet", "sparse_doped:0.75", "--img-size", "64")
    assert code == 0
    assert "the first layer stays dense" in output
    assert "MFLOPs per image" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet999", "sparse:0.5"], "unknown model 'resnet999'"),
        (["test_resnet"], "which layers? Give one of"),
        (["test_resnet", "sparse:2"], "sparse: sparsity=2.0: expected a number from 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output


def test_unknown_weights_and_options() -> None:
    with pytest.raises(ValueError, match=r"unknown weights 'resnet18\.nonsense': expected resnet18 alone or one of"):
        command.print_conversion("resnet18.nonsense", "sparse:0.5", None)
