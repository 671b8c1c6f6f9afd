"""``revnets train``, ``validate``, ``detect`` and ``detect-test``: scripts, which read their arguments themselves."""

from typing import Annotated

import typer

from ..arguments import passing
from . import script

Arguments = Annotated[list[str] | None, typer.Argument(help="of the script; --help lists them", metavar="[OPTIONS]")]


def _run(name: str, program: str, arguments: list[str] | None) -> None:
    raise typer.Exit(script(name).main(arguments or [], program))


@passing
def train_command(arguments: Arguments = None) -> None:
    """Train any timm model on images: classification/train.py; `--config NAME` finds our recipes."""
    _run("classification.train", "revnets train", arguments)


@passing
def validate_command(arguments: Arguments = None) -> None:
    """Validate any timm model, or a checkpoint of ours: classification/validate.py."""
    _run("classification.validate", "revnets validate", arguments)


@passing
def detect_command(arguments: Arguments = None) -> None:
    """Train a detector of MMDetection: detection/train.py; `detect NAME` finds our configurations."""
    _run("detection.train", "revnets detect", arguments)


@passing
def detect_test_command(arguments: Arguments = None) -> None:
    """Measure COCO's AP of a trained detector, and draw what it finds: detection/test.py."""
    _run("detection.test", "revnets detect-test", arguments)
