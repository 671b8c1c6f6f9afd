"""Section a: the machine, its versions, its two ceilings, and a first step of every kind."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch

from ...profiling.target import training_loss
from ...profiling.turns import milliseconds
from ...reversible import MODES
from ...training.errors import reason
from ...version import __version__
from ..registry import REPORT, Column, Context, Row

COMMAND = "revnets gpu-report --sections a --output DIR"
PRECISIONS = ("float32", "bfloat16")
CARD, VERSIONS = "card", "versions"
_CEILINGS = ("copy, GB/s", "bfloat16 product, TFLOP/s")
_PACKAGES = ("torchvision", "timm", "triton", "torchao", "onedl-mmdetection", "mmdet", "nvidia-ml-py")


def _step_name(mode: str, precision: str) -> str:
    return f"test_revbifpn, {mode}, {precision}"


def _plan(tiny: bool) -> list[Row]:
    names = [CARD, VERSIONS, "settings", *_CEILINGS, *(_step_name(m, p) for p in PRECISIONS for m in MODES)]
    return [{"what": name, "command": COMMAND} for name in names]


def machine_of(rows: Sequence[Row]) -> str:
    """Card and versions in words, as they stand above every table."""
    found = {row["what"]: row.get("found") for row in rows}
    return "; ".join(str(found[what]) for what in (CARD, VERSIONS) if found.get(what))


def _words(rows: Sequence[Row]) -> str:
    failed = [row["what"] for row in rows if row.get("failed")]
    card = next((str(row.get("found")) for row in rows if row["what"] == CARD), "")
    return card + (f"; FAILED: {', '.join(failed)}" if failed else "; a step of every kind runs")


@REPORT.section(
    "a",
    "machine",
    "The machine, and one step of every kind",
    share=5,
    names=(Column("what", "what"),),
    figures=(Column("found", "found"), Column("note", "note")),
    plan=_plan,
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Whatever fails here is said, and the rest goes on."""
    for name, function in _questions(context).items():
        try:
            yield {"what": name, "found": function()}
        except Exception as error:  # a driver, or a kernel, may fail in any way
            yield {"what": name, "note": reason(error), "failed": True}
    yield from _steps(context)


def _questions(context: Context) -> dict[str, Callable[[], Any]]:
    device = torch.device(context.device)
    names = dict(zip(_CEILINGS, (_copy_rate, _product_rate), strict=True))
    ceilings = {name: lambda rate=rate: rate(device, context.tiny) for name, rate in names.items()}
    return {CARD: lambda: _card(device), VERSIONS: _versions, "settings": lambda: _settings(device), **ceilings}


def _card(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, "
        f"{total / 2**30:.1f} GiB ({free / 2**30:.1f} free), L2 {getattr(found, 'L2_cache_size', 0) / 2**20:.0f} MiB"
    )


def _versions() -> str:
    parts = [f"revnets {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        parts.append(f"CUDA {torch.version.cuda}")
    if torch.backends.cudnn.is_available():
        parts.append(f"cuDNN {torch.backends.cudnn.version()}")
    for name in _PACKAGES:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name == "timm":
                parts.append(f"timm {timm.__version__}")
    return ", ".join(parts)


def _settings(device: torch.device) -> str:
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS")
    given = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
    convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    products = "TF32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
    tuned = "on" if torch.backends.cudnn.benchmark else "off"
    words = f"float32 convolutions in {convolutions}, products in {products}, cuDNN benchmark {tuned}"
    return ", ".join([words if device.type == "cuda" else "float32", *(given or ["allocator as it comes"])])


def _copy_rate(device: torch.device, tiny: bool) -> str:
    size = 2**16 if tiny else 2**30
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    taken = milliseconds({"": lambda: goal.copy_(source)}, device, rounds=3 if tiny else 10)[""]
    return f"{2 * size / taken / 1e6:.0f}"


def _product_rate(device: torch.device, tiny: bool) -> str:
    size = 64 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = milliseconds({"": lambda: a @ b}, device, rounds=3 if tiny else 10)[""]
    return f"{2 * size**3 / taken / 1e9:.3g}"


def _steps(context: Context) -> Iterator[Row]:
    """One step per mode and precision; losses of the three modes are equal to the bit in exact mode."""
    device = torch.device(context.device)
    for precision in PRECISIONS:
        losses: dict[str, float] = {}
        for mode in MODES:
            what = _step_name(mode, precision)
            try:
                losses[mode], finite = _smoke(device, mode, precision)
            except Exception as error:
                yield {"what": what, "note": reason(error), "failed": True}
                continue
            same = losses[mode] == losses[MODES[0]] if MODES[0] in losses else None
            words = f"loss {losses[mode]:.6f}, gradients {'finite' if finite else 'NOT FINITE'}"
            wrong = not finite or same is False
            yield {"what": what, "found": words, "failed": wrong, "note": "another loss" if same is False else None}


def _smoke(device: torch.device, mode: str, precision: str) -> tuple[float, bool]:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", mode=mode, num_classes=10).to(device).train()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        loss = training_loss(model(x))
    loss.backward()
    return loss.item(), all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
