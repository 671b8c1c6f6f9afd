"""Section f: inference of 2:4 linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...deploy.semi_structured import compare_semi_structured
from ..registry import REPORT, Column, Context, Row, Skipped, Target, first
from ..rows import row_by_row

_WIDTHS = (1024, 2048, 4096, 8192)
_ROWS = 4096
_TYPES = ("float16", "bfloat16")


def _plan(tiny: bool) -> list[Row]:
    return [
        {
            "width": width,
            "type": dtype,
            "command": f"revnets bench-2to4 --widths {width} --rows {_ROWS}"
            if dtype == "float16"
            else "revnets gpu-report --sections f --output DIR",
        }
        for dtype in _TYPES
        for width in ((64,) if tiny else _WIDTHS)
    ]


def _speedup(rows: Sequence[Row]) -> float | None:
    return first(rows, "speedup", width=2048, type="float16")


def _words(rows: Sequence[Row]) -> str:
    found = [f"{row['width']} {row['speedup']:.2f}" for row in rows if row.get("speedup") and row["type"] == "float16"]
    return f"2:4 over dense, float16: {', '.join(found)}" if found else ""


@REPORT.section(
    "f",
    "2to4",
    "Inference of 2:4 linear layers against dense ones",
    share=3,
    names=(Column("width", "width"), Column("type", "type")),
    figures=(
        Column("dense_ms", "dense, ms", "{:.3f}"),
        Column("sparse_ms", "2:4, ms", "{:.3f}"),
        Column("speedup", "speed-up", "{:.2f}"),
        Column("error", "largest difference", "{:.1e}"),
        Column("note", "note"),
    ),
    plan=_plan,
    targets=(Target("2:4 inference at 2048 channels, float16, over dense", _speedup, least=1.3),),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Width by width."""
    if context.device == "cpu":
        raise Skipped("2:4 products need the tensor cores of a GPU")
    yield from row_by_row(context, _plan(context.tiny), _figures)


def _figures(row: Row) -> Row:
    found = compare_semi_structured((row["width"],), _ROWS, getattr(torch, row["type"]))
    if not found:
        return {"note": "torch has no 2:4 product for this size here"}
    dense, sparse = found
    return {
        "dense_ms": 1e3 * dense.seconds,
        "sparse_ms": 1e3 * sparse.seconds,
        "speedup": dense.seconds / sparse.seconds,
        "error": sparse.error,
    }
