"""The shortest useful command lines (a module of its own: several folders have a conftest)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--model", "test_efficientnet", "--img-size", "32", "--batch-size", "16", "--workers", "0", "--device", "cpu"]
SHORT = [*TINY, "--epochs", "2", "--warmup-epochs", "0", "--opt", "adamw", "--lr", "3e-3", "--experiment", "run"]

Trainer = Callable[..., int]
