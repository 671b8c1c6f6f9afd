"""Step time and memory of several networks in one run: interleaved, medians, ratios."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reversible import MODES
from .memory import measure_training_step


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Args:
        model: name known to timm.
        img_size: side of the images, pixels.
        batch_size: images per step.
        mode: ``"reversible"``, ``"checkpoint"`` or ``"store"``; for other networks ``"store"`` (plain) or
            ``"checkpoint"`` (their own).
    """

    model: str
    img_size: int
    batch_size: int
    mode: str

    def __str__(self) -> str:
        return f"{self.model} @{self.img_size} batch {self.batch_size}"


@dataclass(frozen=True)
class Row:
    """What was measured for a case: median seconds of a step, and activation bytes per sample (see ``StepMemory``)."""

    case: Case
    seconds: float
    bytes_per_sample: float


@dataclass(frozen=True)
class Setting:
    """What all cases of a benchmark share."""

    device: str = "cpu"
    channels_last: bool = True
    amp_dtype: str | None = None
    exact: bool | int = True
    repeats: int = 5


def parse_case(text: str) -> list[Case]:
    """Cases of ``NAME[@SIZE][:BATCH]``, one per mode that the network knows.

    Example:
        >>> [c.mode for c in parse_case("revbifpn_s0@224:8")]
        ['reversible', 'checkpoint', 'store']

    Raises:
        ValueError: for an unknown model or numbers that are not.
    """
    name, _, batch = text.partition(":")
    name, _, size = name.partition("@")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:12]}*")[:3]
        raise ValueError(
            f"unknown model {name!r}: expected a name known to timm" + (f", such as {near}" if near else "")
        )
    if not (size or "1").isdigit() or not (batch or "1").isdigit() or batch == "0":
        raise ValueError(f"{text!r}: expected NAME@SIZE:BATCH with whole numbers, such as revbifpn_s0@224:8")
    cfg = timm.get_pretrained_cfg(name)
    side = int(size) if size else (cfg.input_size[-1] if cfg is not None else 224)
    modes = MODES if "revbifpn" in name else ("store", "checkpoint")
    return [Case(name, side, int(batch or 8), mode) for mode in modes]


def check(setting: Setting, modes: str, output: Path | None) -> None:
    """Refuse what would fail later, before anything is measured.

    Raises:
        ValueError: for an unknown precision or mode, or a folder that does not exist.
    """
    if setting.amp_dtype not in (None, "bfloat16", "float16"):
        raise ValueError(f"unknown amp dtype {setting.amp_dtype!r}: expected bfloat16 or float16")
    unknown = [mode for mode in modes.split(",") if mode and mode not in MODES]
    if unknown:
        raise ValueError(f"unknown mode {unknown[0]!r}: expected some of {', '.join(MODES)}")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"the folder {str(output.parent)!r} for the output does not exist: create it first")


def run(
    cases: Sequence[Case], setting: Setting, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> list[Row]:
    """Measure all cases: memory first, then ``repeats`` rounds in which every case takes one timed step.

    Args:
        cases: rows of the table.
        setting: what they share.
        progress: wraps the list of pieces of work, e.g. ``rich.progress.track``.
    """
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    memory: dict[Case, float] = {}
    names = list(dict.fromkeys((c.model, c.img_size, c.batch_size) for c in cases))
    models = {name: _build(name, setting) for name in names}
    work = [(case, None) for case in cases] + [(case, n) for n in range(setting.repeats) for case in cases]
    for case, n in progress(work):
        model, x = models[case.model, case.img_size, case.batch_size]
        _set_mode(model, case.mode)
        if n is None:
            memory[case] = measure_training_step(_autocast(model, setting), x, _loss).activation_bytes / case.batch_size
        else:
            seconds[case].append(_timed_step(model, x, setting))
    return [Row(case, statistics.median(seconds[case]), memory[case]) for case in cases]


def _build(name: tuple[str, int, int], setting: Setting) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kwargs = {"exact": setting.exact} if "revbifpn" in name[0] else {}
    model = timm.create_model(name[0], **kwargs).to(setting.device).train()
    x = torch.randn(name[2], 3, name[1], name[1], device=setting.device)
    if setting.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return model, x


def _set_mode(model: Any, mode: str) -> None:
    if hasattr(model, "set_mode"):
        model.set_mode(mode)
    else:
        model.set_grad_checkpointing(mode == "checkpoint")


class _autocast(nn.Module):
    def __init__(self, model: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.model, self.setting = model, setting

    def forward(self, x: Tensor) -> Tensor:
        dtype = getattr(torch, self.setting.amp_dtype or "bfloat16")
        with torch.autocast(x.device.type, dtype=dtype, enabled=self.setting.amp_dtype is not None):
            return self.model(x)


def _loss(y: Tensor) -> Tensor:
    return F.cross_entropy(y.float(), torch.arange(len(y), device=y.device) % y.shape[1])


def _timed_step(model: nn.Module, x: Tensor, setting: Setting) -> float:
    wrapped = _autocast(model, setting)
    model.zero_grad(set_to_none=True)
    synchronize = (lambda: None) if x.device.type == "cpu" else torch.get_device_module(x.device).synchronize
    synchronize()
    start = time.perf_counter()
    _loss(wrapped(x)).backward()
    synchronize()
    return time.perf_counter() - start


def machine(setting: Setting) -> str:
    """The machine and versions, in words, to stand beside every figure."""
    if setting.device == "cpu":
        where = f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()})"
    else:
        where = torch.get_device_module(setting.device).get_device_name(setting.device)
    precision = f"{setting.amp_dtype} autocast" if setting.amp_dtype else "float32"
    layout = "channels-last" if setting.channels_last else "contiguous"
    return (
        f"{where}, torch {torch.__version__}, timm {timm.__version__}, {precision}, {layout}, exact={setting.exact}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def ratios(rows: Sequence[Row]) -> Iterator[tuple[Row, float, float]]:
    """Each row with its time and memory relative to storing everything, in the same run."""
    stored = {(r.case.model, r.case.img_size, r.case.batch_size): r for r in rows if r.case.mode == "store"}
    for row in rows:
        base = stored.get((row.case.model, row.case.img_size, row.case.batch_size), row)
        yield row, row.seconds / base.seconds, row.bytes_per_sample / base.bytes_per_sample


def save(rows: Sequence[Row], setting: Setting, path: Path) -> None:
    """Write the measurements as JSON, complete or not at all."""
    data = {"machine": machine(setting), "setting": asdict(setting), "rows": [asdict(r) for r in rows]}
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    temporary.rename(path)
