"""Builds an sdist and, from it, a wheel; installs that into an environment of its own, and does there what users do.

python -m tests.integration.wheel --folder output/wheel            # a fresh environment, 5 GB
python -m tests.integration.wheel --folder output/wheel --borrow   # the packages of this one, our own excepted
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
SHIPPED = ("revnets", "classification", "detection", "configs")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
IMPORT = """
import sys, timm, revnets
from pathlib import Path
assert timm.is_model("revbifpn_s0") and Path(revnets.__file__).is_relative_to(sys.prefix), revnets.__file__
print(revnets.__version__, revnets.__file__)
"""
IMAGES = """
import numpy as np
from pathlib import Path
from PIL import Image
draw = np.random.default_rng(0)
for split in ("train", "validation"):
    for bright, name in enumerate(("dark", "bright")):
        folder = Path("images") / split / name
        folder.mkdir(parents=True)
        for number in range(16):
            pixels = draw.integers(0, 128, (32, 32, 3)) + 127 * bright
            Image.fromarray(pixels.astype("uint8")).save(folder / f"{number}.png")
"""
DETECTOR = "retinanet_revbifpn-s0_digits"
LOADERS = [f"{split}_dataloader" for split in ("train", "val", "test")]
SHORT = [
    *("train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=2", "data_root=scenes"),
    *(f"{loader}.{option}" for loader in LOADERS for option in ("num_workers=0", "persistent_workers=False")),
]


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel made from it, both made of a copy, since setuptools leaves its own files beside sources.

    Args:
        folder: Where to; what is there of earlier builds goes.
    """
    for old in ("sources", "dist"):
        shutil.rmtree(folder / old, ignore_errors=True)
    sources = folder / "sources"
    sources.mkdir(parents=True)
    for name in SHIPPED:
        shutil.copytree(ROOT / name, sources / name, ignore=LEFT_OUT)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, sources)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(sources)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def contents(wheel: Path) -> list[str]:
    """Names of its files."""
    with zipfile.ZipFile(wheel) as file:
        return sorted(file.namelist())


@dataclass
class Environment:
    """A virtual environment with the wheel.

    Args:
        folder: Of the environment, and of a folder to work in.
        quiet: Whether what commands say is only shown where they fail.
    """

    folder: Path
    quiet: bool = False

    @property
    def bin(self) -> Path:
        """Of its commands."""
        return self.folder / "venv" / "bin"

    def make(self, wheel: Path, borrow: bool) -> None:
        """Installs the wheel.

        Args:
            wheel: Of `build`.
            borrow: Take all other packages from the environment that runs this; else from where pip finds them.
        """
        shutil.rmtree(self.folder / "venv", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder / "venv")], check=True)
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if borrow:
            (packages,) = (self.folder / "venv" / "lib").glob("*/site-packages")
            # a path alone: .pth files in there, such as that of an editable installation of ours, are not read
            (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        else:
            subprocess.run([*pip, "--constraint", str(CONSTRAINTS), f"{wheel}[detection]"], check=True)

    def run(self, *command: str) -> str:
        """What a command of the environment says, run where nothing of the checkout can be found."""
        place = self.folder / "work"
        place.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        line = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(line, cwd=place, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not self.quiet:
            print("$", " ".join(command) if "\n" not in command[-1] else f"{command[0]} ...", "\n" + done.stdout)
        if done.returncode:
            raise RuntimeError(f"{command[:2]} ended with {done.returncode}")
        return done.stdout


def use(environment: Environment, detect: bool = True) -> None:
    """Imports, profiles, trains, validates and, with MMDetection, detects."""
    shutil.rmtree(environment.folder / "work", ignore_errors=True)
    environment.run("python", "-c", IMPORT)
    environment.run("revnets", "profile", "test_revbifpn@32:2")
    environment.run("python", "-c", IMAGES)
    line = ["--data-dir", "images", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8", "--experiment", "run"]
    environment.run("revnets", "train", "--config", "quickstart", *line)
    checkpoint = "output/train/run/last.pth.tar"
    environment.run("revnets", "validate", "--checkpoint", checkpoint, "--data-dir", "images")
    if detect:
        sizes = ["--train", "4", "--val", "2", "--test", "2"]
        environment.run("python", "-m", "revnets.scripts.detection.digits", "--data-dir", "scenes", *sizes)
        environment.run("revnets", "detect", DETECTOR, "--work-dir", "run", "--cfg-options", *SHORT)
        environment.run("revnets", "detect-test", DETECTOR, "run/epoch_1.pth", "--cfg-options", *SHORT)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="A wheel in an environment of its own.")
    parser.add_argument("--folder", type=Path, default=Path("output/wheel"), help="for everything that is made")
    parser.add_argument("--borrow", action="store_true", help="packages of this environment instead of new ones")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    sdist, wheel = build(folder)
    print(f"built {sdist.name} and {wheel.name}: {len(contents(wheel))} files")
    environment = Environment(folder)
    environment.make(wheel, args.borrow)
    use(environment)
    print(f"the wheel works in '{environment.folder / 'venv'}'")


if __name__ == "__main__":
    main()
