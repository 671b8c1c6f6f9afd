"""OpenMMLab's toolboxes other than MMDetection: a config of ours in them, and their own scripts run by path."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]


def read(config: str) -> Any:
    """A config of ``configs/``."""
    from mmengine.config import Config

    return Config.fromfile(str(ROOT / "configs" / config))


def build(config: Any) -> nn.Module:
    """Its model, by the registry of the toolbox that it names."""
    from mmengine.registry import MODELS, DefaultScope

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model: nn.Module = MODELS.build(config.model)
    return model


def total(model: Any) -> Any:
    """Of the losses that the toolbox gives in mode ``"loss"``, as its training step adds them up."""

    def add(losses: Any) -> Tensor:
        value: Tensor = model.parse_losses(losses)[0]
        return value

    return add


def run(module: Any, script: str, folder: Path, config: str, *words: str, options: dict[str, Any]) -> str:
    """What a script of the toolbox prints; ``options`` are its ``--cfg-options``."""
    tool = Path(module.__file__).parent / ".mim" / "tools" / script
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    line = [sys.executable, "-W", "ignore", str(tool), str(ROOT / "configs" / config), *words]
    line += ["--work-dir", "run", "--cfg-options", *(f"{key}={value}" for key, value in options.items())]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def loader(name: str, **more: Any) -> dict[str, Any]:
    """Options of a data loader that reads in its own process, two images at a time."""
    own = {"batch_size": 2, "num_workers": 0, "persistent_workers": False, **more}
    return {f"{name}_dataloader.{key}": value for key, value in own.items()}
