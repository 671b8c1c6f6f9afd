"""Trains RevBiFPN on real handwritten digits in minutes on a CPU, and measures what reversibility saves.

python -m classification.quickstart
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "classification"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from reporting that there is no GPU

import torch
from torch import Tensor, nn

from revnets.training.errors import UserError, guarded
from revnets.training.memory import MB, MODES, peaks
from revnets.training.options.parsing import option, parse
from revnets.training.pictures import picture
from revnets.training.progress import clock

from .digits import make_digits
from .images.data import open_dataset, validation_loader
from .networks.models import build_model, data_config, load_weights, read_checkpoint
from .options import CONFIGS, TrainOptions, ValidateOptions
from .run.report import Row, plot_rows
from .runtime import start_runtime
from .train import train
from .validate import validate

CONFIG = CONFIGS / "quickstart.yaml"


@dataclasses.dataclass
class QuickstartOptions:
    """Quickstart"""

    output: str = option("output/quickstart", "folder for the images, the run and the picture", path=True)
    model: str | None = option(None, "another network with reversible parts; the configuration's where not given")
    epochs: int | None = option(None, "epochs; the configuration's where not given", low=1)
    limit: int | None = option(None, "use only so many images per split", low=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""
    return guarded(lambda: quickstart(parse(QuickstartOptions, argv, "RevBiFPN on digits.")))


def quickstart(options: QuickstartOptions) -> str:
    """Makes the data, trains, validates, measures memory, draws the picture.

    Args:
        options: Where to, and what to change.

    Returns:
        The final line, in plain words.

    Raises:
        UserError: A folder in the way, or scikit-learn missing.
    """
    start = time.perf_counter()
    output = Path(options.output)
    data = make_digits(output / "data", limit=options.limit)
    line = ["--config", str(CONFIG), "--data-dir", str(data), "--output", str(output), "--experiment", "train"]
    line += ["--overwrite"]
    line += ["--model", options.model] if options.model else []
    line += ["--epochs", str(options.epochs), "--warmup-epochs", "0"] if options.epochs else []
    settings = parse(TrainOptions, line, "")
    result = train(settings)
    best = result.folder / "model_best.pth.tar"
    use_ema = ["--use-ema"] if settings.model_ema else []
    figures = validate(["--checkpoint", str(best), "--data-dir", str(data), *use_ema])
    memory = activation_memory(settings, best)
    picture = draw(output, result.rows, memory, settings)
    words = final_line(settings.model, figures, memory, settings, time.perf_counter() - start, picture)
    print(words)
    return words


def activation_memory(settings: TrainOptions, checkpoint: Path) -> dict[str, int]:
    """Peak activation memory of one training step of the trained model, in each mode, on the same real images.

    Args:
        settings: Of the training.
        checkpoint: Its best.

    Returns:
        Bytes per mode.
    """
    from revnets.profiling.memory import measure_training_step

    weights = read_checkpoint(checkpoint, "--checkpoint")
    same = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(ValidateOptions)
        if hasattr(settings, field.name)
    }
    options = ValidateOptions(**{**same, "num_classes": weights["args"]["num_classes"], "workers": 0})
    model = build_model(options)
    load_weights(model, weights["state_dict"], f"'{checkpoint}'", options.model)
    if not hasattr(model, "set_mode"):
        raise UserError(f"--model: {options.model} has no reversible parts to compare; give one of revnets' models.")
    runtime = start_runtime(options)
    model.to(runtime.device)
    dataset = open_dataset(options, options.val_split, training=False)
    images, target = next(iter(validation_loader(options, runtime, dataset, data_config(options, model))))

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target.to(logits.device))

    measured = {}
    for mode in MODES:
        torch.manual_seed(settings.seed)
        model.set_mode(mode)  # type: ignore[operator]
        measured[mode] = measure_training_step(model.train(), images.to(runtime.device), loss).activation_bytes
    return measured


def final_line(
    model: str,
    figures: Mapping[str, float],
    memory: Mapping[str, int],
    settings: TrainOptions,
    seconds: float,
    picture: Path | None,
) -> str:
    """What came out, in plain words."""
    right = round(figures["top1"] * figures["images"] / 100)
    saved = f"; picture: {picture}" if picture else ""
    return (
        f"Done in {clock(seconds)}: {model} reads {right} of {figures['images']:.0f} handwritten digits it has never "
        f"seen correctly ({figures['top1']:.1f}% accuracy); the activations of one training step on "
        f"{settings.batch_size} images {peaks(memory)}{saved}."
    )


def draw(output: Path, rows: Sequence[Row], memory: Mapping[str, int], settings: TrainOptions) -> Path | None:
    """Loss, accuracy and the two memory figures as one picture, `quickstart.png`.

    Args:
        output: Folder for it.
        rows: The summary of the run.
        memory: Bytes per mode.
        settings: Of the training, for the titles.

    Returns:
        The file, or None where matplotlib is not installed.
    """

    def paint(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        plot_rows(left, rows, {"train_loss": "training", "eval_loss": "validation"}, "loss")
        plot_rows(middle, rows, {"eval_top1": "validation"}, "top-1, %")
        bars = right.bar(list(memory), [value / MB for value in memory.values()], color=["C2", "C7"])
        right.bar_label(bars, fmt="%.1f MB")
        right.set_ylabel(f"peak activation memory, {settings.batch_size} images, MB")

    return picture(output / "quickstart.png", (13, 4), paint, f"{settings.model} on handwritten digits")


if __name__ == "__main__":
    sys.exit(main())
