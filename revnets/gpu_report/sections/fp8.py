"""Section e: FP8 layers against bfloat16 and torchao's, and the table of break-even sizes for ``mus_fp8:auto``."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...layers.fp8_break_even import KINDS
from ...profiling import fp8_bench
from ...training.values import reason
from ..registry import REPORT, Column, Context, Row, Target, first
from ..results import TABLE
from ..timing import release

_WIDTHS = (512, 1024, 2048, 4096, 8192)
_ROWS = 8192
_MODES = ("eager", "compiled")


def _plan(tiny: bool) -> list[Row]:
    """Eager first: compiling takes seconds per size."""
    rows = []
    for mode in _MODES[: 1 if tiny else 2]:
        for kind in KINDS:
            for width in (32,) if tiny else _WIDTHS:
                count = 64 if tiny else _ROWS
                command = (
                    f'revnets bench-fp8 --device cuda --kinds "{kind}" --widths {width} --rows {count} --modes {mode}'
                )
                rows.append({"kind": kind, "rows": count, "width": width, "mode": mode, "command": command})
    return rows


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
        Column("torchao_ms", "torchao, ms", "{:.3f}"),
        Column("speedup", "speed-up", "{:.2f}"),
        Column("backend", "multiplied by"),
        Column("note", "note"),
    ),
    plan=_plan,
    targets=(
        Target("FP8 linear, 8192, eager, over bfloat16", _speedup(kind="linear", width=8192, mode="eager"), least=1.33),
    ),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Size by size; the table is written anew after each."""
    device = torch.device(context.device)
    raw = [fp8_bench.Row(**one) for row in context.before for one in row.get("raw", ())]
    done = {_key(row) for row in context.before}
    for row in _plan(context.tiny):
        if _key(row) in done:
            continue
        if context.left < 2:
            return
        names = {key: row[key] for key in ("kind", "rows", "width", "mode")}
        notes: list[str] = []
        request = fp8_bench.Request(
            device, [row["width"]], [row["rows"]], [row["kind"]], [row["mode"]], 1 if context.tiny else 7
        )
        try:
            found = fp8_bench.run(request, say=notes.append)
        except Exception as error:
            traceback.print_exc()
            yield {**names, "note": reason(error), "failed": True}
            continue
        raw += found
        fp8_bench.save(raw, request, context.output / TABLE)
        yield {**names, **_figures(found), "raw": [asdict(one) for one in found], "note": "; ".join(notes) or None}
        release(device)


def _key(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["rows"], row["width"], row["mode"]


def _figures(found: Sequence[fp8_bench.Row]) -> Row:
    seconds = {row.layer: row.seconds for row in found}
    ours = next((row for row in found if row.layer == fp8_bench.OURS), None)
    keys = {"plain_ms": fp8_bench.PLAIN, "fp8_ms": fp8_bench.OURS, "torchao_ms": fp8_bench.TORCHAO}
    figures: Row = {key: 1e3 * seconds[layer] for key, layer in keys.items() if layer in seconds}
    if ours is not None:
        figures |= {"speedup": ours.speedup, "backend": ours.backend}
    return figures
