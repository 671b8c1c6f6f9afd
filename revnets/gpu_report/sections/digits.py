"""Section g: two short trainings on scikit-learn's digits, in bfloat16 and in FP8."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import fp8_products, mus_param_groups
from ...profiling.memory import synchronize
from ..registry import REPORT, Column, Context, Row, Skipped, Target
from ..rows import row_by_row, todo

COMMAND = "revnets gpu-report --sections g --output DIR"
_HELD_OUT, _BATCH, _SIDE = 360, 128, 32
_MOST_STEPS = 400
_CLIP = 1.0


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: rates as in configs/classification (quickstart.yaml, mus/cifar10_revbifpn-s0.yaml)."""

    layers: str | None
    lr: float
    weight_decay: float


RECIPES = {"bfloat16": Recipe(None, 2e-3, 0.02), "FP8": Recipe("mus_fp8:init", 0.08, 5e-5)}


def _plan(tiny: bool) -> list[Row]:
    return [{"training": name, "command": COMMAND} for name in RECIPES]


def _non_finite(rows: Sequence[Row]) -> float | None:
    counts = [row["non_finite"] for row in rows if row.get("non_finite") is not None]
    return sum(counts) if len(counts) == len(RECIPES) else None


def _words(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['training']} {row['accuracy']:.1f}%" for row in rows if row.get("accuracy") is not None)


@REPORT.section(
    "g",
    "digits",
    "Two short trainings of RevBiFPN-S0 on handwritten digits",
    share=12,
    names=(Column("training", "training"),),
    figures=(
        Column("steps", "steps"),
        Column("images_per_s", "images/s", "{:.0f}"),
        Column("accuracy", "accuracy, %", "{:.1f}"),
        Column("loss", "last loss", "{:.3f}"),
        Column("non_finite", "losses not finite"),
        Column("products", "FP8 by"),
        Column("note", "note"),
    ),
    plan=_plan,
    targets=(Target("losses that are not finite, of both trainings", _non_finite, most=0),),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """One after the other, each in its half of the time."""
    if importlib.util.find_spec("sklearn") is None:
        raise Skipped("scikit-learn, which brings the digits, is not installed")
    planned = _plan(context.tiny)
    half = context.left / max(1, len(todo(context, planned))) - 2
    device = torch.device(context.device)
    yield from row_by_row(context, planned, lambda row: _train(RECIPES[row["training"]], device, context.tiny, half))


def _digits(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (_SIDE, _SIDE), mode="bicubic").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(42))
    images, labels = images[order].to(device, memory_format=torch.channels_last), labels[order].to(device)
    return (images[_HELD_OUT:], labels[_HELD_OUT:]), (images[:_HELD_OUT], labels[:_HELD_OUT])


def _build(recipe: Recipe, device: torch.device, tiny: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {} if tiny else {"stem_stride": 2, "width": 0.6667, "extra_silos": 0}
    model = timm.create_model(
        "test_revbifpn" if tiny else "revbifpn_s0", num_classes=10, layers=recipe.layers, **kwargs
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    groups: Any = model.parameters()
    if recipe.layers is not None:
        groups = mus_param_groups(model, recipe.lr, recipe.weight_decay, base_width=64)
    return model, torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _train(recipe: Recipe, device: torch.device, tiny: bool, seconds: float) -> Row:
    """Steps until the time is up or there are enough; the rate rises for a tenth of them and falls with a cosine."""
    (images, labels), held_out = _digits(device)
    model, optimizer = _build(recipe, device, tiny)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    losses: list[Tensor] = []
    most, batch = (3, 8) if tiny else (_MOST_STEPS, _BATCH)
    fp8_products(reset=True)
    start = begin = time.monotonic()
    warm = min(5, most - 1)
    while len(losses) < most and time.monotonic() - start < 0.85 * seconds:
        done = max(len(losses) / most, (time.monotonic() - start) / (0.85 * seconds))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, 10 * done + 0.02) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        chosen = torch.randint(len(labels), (batch,), generator=generator).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images[chosen]).float(), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        losses.append(loss.detach())
        if len(losses) == warm:
            synchronize(device)
            begin = time.monotonic()
        elif len(losses) % 8 == 0:
            synchronize(device)  # else the clock would say when steps were asked for
    synchronize(device)
    speed = (len(losses) - warm) * batch / (time.monotonic() - begin) if len(losses) > warm else None
    found = torch.stack(losses)
    return {
        "steps": len(losses),
        "images_per_s": speed,
        "accuracy": 100 * _accuracy(model, *held_out),
        "loss": found[-1].item(),
        "non_finite": int((~found.isfinite()).sum()),
        "products": ", ".join(sorted(fp8_products())) or None,
        "note": None if tiny or len(losses) == most else "fewer steps: time was up",
    }


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        right = [(model(x).argmax(1) == y) for x, y in zip(images.split(120), labels.split(120), strict=True)]
    return torch.cat(right).float().mean().item()
