"""What ``revnets deploy`` tells of the files that it compared and wrote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.build import kernel_problem
from .candidates import FLOAT32, INT8, Candidate, Deployed
from .compare import machine
from .engines import ENGINES
from .quantize import Quantized


def print_deployed(made: Deployed) -> None:
    """The candidates with what each takes and costs, what was chosen and by how much, and what is in the file."""
    if made.candidates:
        say(_table(made.candidates))
        say(_verdict(made))
    problem = kernel_problem()
    if problem is not None:
        say(f"engine sparse runs on torch's dense kernels here: {problem}")
    for choice, count in Counter(layer.choice for layer in made.layers).items():
        chosen = [layer for layer in made.layers if layer.choice == choice]
        weights = sum(torch.Size(layer.shape).numel() for layer in chosen)
        share = sum(torch.Size(layer.shape).numel() * layer.density for layer in chosen) / weights
        say(f"{choice}: {count} layers, {weights / 1e6:.2f} M weights, {100 * (1 - share):.0f}% of them zero")
    size = sum(file.stat().st_size for file in made.path.parent.glob(f"{made.path.stem}.*") if file.suffix != ".json")
    engine, zeros = made.engine, exploits(made.engine, made.precision)
    differ = "outputs differ by at most {:.1e} of the largest" if made.precision != INT8 else "outputs differ by {:.1e}"
    in_precision = "" if made.precision == FLOAT32 else f" in {made.precision}"
    say(
        f"wrote {made.path} for {engine}{in_precision} ({size / 1e6:.2f} MB; exploits {zeros}); "
        + differ.format(made.error)
        + ("" if made.precision != INT8 else " (root mean square, on calibration images)")
    )


def exploits(engine: str, precision: str) -> str:
    """Which zeros make a candidate faster, in words."""
    if engine == "sparse" and precision == INT8:
        return "blocks of four input channels that are zero"
    return ENGINES[engine].exploits if precision == FLOAT32 else "none: zeros are multiplied"


def _table(candidates: Sequence[Candidate]) -> Any:
    from rich.table import Table

    table = Table(title=f"Candidates at this input, least of some calls by turns ({machine()})")
    with_top1 = any(one.accuracy is not None for one in candidates)
    for column in ("engine", "precision", "ms", *(["top-1, %"] if with_top1 else []), "zeros that it exploits"):
        table.add_column(column, justify="right" if column[:2] in ("ms", "to") else "left")
    with_refusals = any(one.refused for one in candidates)
    if with_refusals:
        table.add_column("not taken, since")
    for one in sorted(candidates, key=lambda one: math.inf if math.isnan(one.seconds) else one.seconds):
        top1 = ["-" if one.accuracy is None else f"{one.accuracy:.2f}"] if with_top1 else []
        time = "-" if math.isnan(one.seconds) else f"{1e3 * one.seconds:.2f}"
        why = [one.refused] if with_refusals else []
        table.add_row(one.engine, one.precision, time, *top1, exploits(one.engine, one.precision), *why)
    return table


def _verdict(made: Deployed) -> str:
    """What was chosen, and how many times as fast it is as the next one and as the fastest dense one in float32."""
    taken = [one for one in made.candidates if not one.refused]
    best = next(one for one in taken if (one.engine, one.precision) == (made.engine, made.precision))
    words = f"chose {best.name}, {1e3 * best.seconds:.2f} ms"
    others = sorted((one for one in taken if one is not best), key=lambda one: one.seconds)
    if others:
        words += f": {others[0].seconds / best.seconds:.2f} times as fast as the next, {others[0].name}"
    plain = [one for one in taken if one.dense and one.precision == FLOAT32]
    if not plain:
        return words
    dense = min(plain, key=lambda one: one.seconds)
    if best is not dense and others[0] is not dense:
        words += f", {dense.seconds / best.seconds:.2f} times as fast as the fastest dense one in float32, {dense.name}"
    if best.accuracy is not None and dense.accuracy is not None:
        words += f"; top-1 {best.accuracy:.2f}%, in float32 {dense.accuracy:.2f}%"
    return words


def print_quantized(small: Quantized, engine: str) -> None:
    """What is in an INT8 file."""
    agreement = "" if small.agreement is None else f", the same class for {100 * small.agreement:.1f}%"
    runs = "sparse" if engine == "sparse" else "onnxruntime and openvino"
    say(
        f"wrote {small.path} for {runs} ({small.path.stat().st_size / 1e6:.2f} MB): "
        f"{small.weights / 1e6:.2f} M INT8 weights, {100 * small.zeros / max(small.weights, 1):.0f}% of them zero; on "
        f"calibration images outputs differ by {100 * small.error:.1f}% (root mean square){agreement}"
    )


def print_accuracy(where: str, names: Sequence[str], found: Sequence[float]) -> None:
    """Top-1 of networks on the same images."""
    from rich.table import Table

    table = Table(title=f"Top-1 on {where}")
    table.add_column("network")
    table.add_column("%", justify="right")
    for name, top1 in zip(names, found, strict=True):
        table.add_row(name, f"{top1:.2f}")
    say(table)


def say(what: Any) -> None:
    """A sentence or a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        Console(width=170).print(what)
    else:
        Console(soft_wrap=True, highlight=False).print(what, markup=False)
