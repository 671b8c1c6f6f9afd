"""The shortest recipe of a table."""

from __future__ import annotations

from pathlib import Path


def recipe(tars: Path, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"data_dir: {tars}\ntrain_split: train.tar\nval_split: validation.tar\nmodel: test_resnet\nimg_size: 32\n"
        "batch_size: 10\nworkers: 0\nwarmup_epochs: 0\nlr: 0.01\ndevice: cpu\n"
    )
    return path
