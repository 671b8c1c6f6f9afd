"""Section e: FP8 layers against bfloat16 and torchao's, and the table of break-even sizes for ``mus_fp8:auto``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...benchmarks import fp8 as fp8_bench
from ...layers.munit.break_even import KINDS
from ..registry import REPORT, Column, Context, Row, Target, first
from ..results import TABLE
from ..rows import row_by_row

_KINDS = ("linear", "1x1 conv", "3x3 conv")
_WIDTHS = (512, 1024, 2048, 4096, 8192)
_WIDEST_CONV = 2048
_ROWS = 8192
_MAPS = 64 * 56 * 56  # rows of a ResNet's first stage at batch size 64
_MODES = ("eager", "compiled")


def _plan(tiny: bool) -> list[Row]:
    """Eager first: compiling takes seconds per size."""
    if tiny:
        return [_row(kind, 64, 32, "eager") for kind in KINDS]
    sizes = [(kind, _ROWS, w) for w in _WIDTHS for kind in _KINDS if kind == "linear" or w <= _WIDEST_CONV]
    sizes += [(kind, _MAPS, 256) for kind in _KINDS[1:]]
    return [_row(*size, mode) for mode in _MODES for size in sizes]


def _row(kind: str, rows: int, width: int, mode: str) -> Row:
    what = f'--kinds "{kind}" --widths {width} --rows {rows} --modes {mode}'
    names = {"kind": kind, "rows": rows, "width": width, "mode": mode}
    return {**names, "command": f"revnets bench-fp8 --device cuda {what}"}


def _speedup(**names: Any) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: first(rows, "speedup", **names)


def _words(rows: Sequence[Row]) -> str:
    best = max((row for row in rows if row.get("speedup")), key=lambda row: row["speedup"], default=None)
    if best is None:
        return ""
    emulated = ", EMULATED" if "emulate" in str(best.get("backend")) else ""
    return f"best {best['speedup']:.2f} times bfloat16 ({best['kind']} {best['width']}, {best['mode']}{emulated})"


@REPORT.section(
    "e",
    "fp8",
    "FP8 layers against bfloat16, forward and backward",
    share=14,
    names=(Column("kind", "kind"), Column("rows", "rows"), Column("width", "width"), Column("mode", "mode")),
    figures=(
        Column("plain_ms", "bfloat16, ms", "{:.3f}"),
        Column("fp8_ms", "mus_fp8, ms", "{:.3f}"),
        Column("triton_ms", "1x1 by Triton, ms", "{:.3f}"),
        Column("torchao_ms", "torchao, ms", "{:.3f}"),
        Column("speedup", "speed-up", "{:.2f}"),
        Column("backend", "multiplied by"),
        Column("note", "note"),
    ),
    plan=_plan,
    targets=(
        Target("FP8 linear, 8192, eager, over bfloat16", _speedup(kind="linear", width=8192, mode="eager"), least=1.33),
        Target(
            "FP8 3x3 convolution, 256 to 256 at 56x56, batch 64, eager, over bfloat16",
            _speedup(kind="3x3 conv", rows=_MAPS, width=256, mode="eager"),
            least=1.25,
        ),
    ),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Size by size; the table is written anew after each."""
    raw = [fp8_bench.Row(**one) for row in context.before for one in row.get("raw", ())]

    def figures(row: Row) -> Row:
        notes: list[str] = []
        sizes = ([row["width"]], [row["rows"]], [row["kind"]], [row["mode"]])
        request = fp8_bench.Request(torch.device(context.device), *sizes, repeats=1 if context.tiny else 7)
        found = fp8_bench.run(request, say=notes.append)
        raw.extend(found)
        fp8_bench.write_table(raw, request.device, context.output / TABLE)
        return {**_figures(found), "raw": [asdict(one) for one in found], "note": "; ".join(notes) or None}

    yield from row_by_row(context, _plan(context.tiny), figures)


def _figures(found: Sequence[fp8_bench.Row]) -> Row:
    seconds = {row.layer: row.seconds for row in found}
    ours = next((row for row in found if row.layer == fp8_bench.OURS), None)
    keys = {
        "plain_ms": fp8_bench.PLAIN,
        "fp8_ms": fp8_bench.OURS,
        "triton_ms": "mus_fp8, triton",
        "torchao_ms": fp8_bench.TORCHAO,
    }
    figures: Row = {key: 1e3 * seconds[layer] for key, layer in keys.items() if layer in seconds}
    if ours is not None:
        figures |= {"speedup": ours.speedup, "backend": ours.backend}
    return figures
