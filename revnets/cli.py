"""The ``revnets`` command: its commands by name, each in the room that it is about, imported when it is called."""

from typing import Annotated, Any

import timm
import torch
import typer

from .arguments import Commands, Later
from .version import __version__

COMMANDS = {
    "profile": (
        "profiling.command:profile_command",
        "Memory, FLOPs and time of a training step: predicted without running it, measured beside it.",
    ),
    "fit": (
        "budget.command:fit_command",
        "Train any network within a budget of bytes: what each of its blocks keeps, chosen for the shortest step.",
    ),
    "train": (
        "scripts.command:train_command",
        "Train any timm model on images: classification/train.py; `--config NAME` finds our recipes.",
    ),
    "validate": (
        "scripts.command:validate_command",
        "Validate any timm model, or a checkpoint of ours: classification/validate.py.",
    ),
    "detect": (
        "scripts.command:detect_command",
        "Train a detector of MMDetection: detection/train.py; `detect NAME` finds our configurations.",
    ),
    "detect-test": (
        "scripts.command:detect_test_command",
        "Measure COCO's AP of a trained detector, and draw what it finds: detection/test.py.",
    ),
    "layers": (
        "profiling.layers_command:layers_command",
        "The layers that specs can name, or what one of them makes of a network: layer by layer, with FLOPs.",
    ),
    "prune": (
        "pruning.command:prune_command",
        "Prune a trained network in one shot; what comes out loads into timm.create_model as before.",
    ),
    "deploy": (
        "deploy.command:deploy_command",
        "Write a trained network for the engine that is fastest here, zeros exploited where that pays; verified.",
    ),
    "numerics": (
        "numerics.command:numerics_command",
        "Sizes of activations, weights and gradients layer by layer, and what a cast to FP8 flushes and clips of them.",
    ),
    "bench": (
        "profiling.bench.command:bench_command",
        "Step time and activation memory of networks in their memory modes, in one interleaved run.",
    ),
    "bench-deploy": (
        "deploy.bench_command:bench_deploy_command",
        "Inference time of dense and pruned networks on every engine, and of single layers: interleaved, medians.",
    ),
    "bench-sparse-training": (
        "benchmarks.sparse_training:bench_sparse_training_command",
        "Training steps on the CPU, dense, masked and on the kernel that skips zeros: interleaved, medians.",
    ),
    "bench-fp8": (
        "benchmarks.fp8:bench_fp8_command",
        "From which sizes on FP8 layers are faster than bfloat16 here: linear layers and convolutions, interleaved.",
    ),
    "bench-2to4": (
        "deploy.semi_structured:bench_two_to_four_command",
        "Inference time of linear layers, dense and 2:4, on a GPU: interleaved, medians.",
    ),
    "gpu-report": (
        "gpu_report.command:gpu_report_command",
        "Everything that only a GPU shows, section by section, each in a process of its own; see docs/gpu.md.",
    ),
}
"""``module:function`` within this package, and the first line of the function's docstring."""


class _Table(Commands):
    """The commands of the table."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: Later(name, *row) for name, row in COMMANDS.items()}


app = typer.Typer(
    cls=_Table,
    help="Memory-efficient vision backbones: profile, train, prune and deploy them.",
    epilog="An option that has no effect is an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"revnets {__version__}, torch {torch.__version__}, timm {timm.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    say_version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Memory-efficient vision backbones: profile, train, prune and deploy them."""


if __name__ == "__main__":
    app()
