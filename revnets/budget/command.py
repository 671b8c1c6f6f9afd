"""``revnets fit``: a plan for a network and a budget, or a whole curve of budgets, measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..arguments import SIZED, argument, excludes, needs, number, path, sized, text, without_effect
from ..profiling.bench.peers import compare, read_target, ways
from ..profiling.bench.peers_shown import print_comparison, save_table
from ..profiling.command import track
from ..profiling.fake import ProfileError
from ..profiling.fit import parse_budget
from ..profiling.target import Setting
from ..training.options.values import COUNT
from ..training.places import check_file, check_folder, make_folder
from .step import as_amp_dtype
from .table import planner_of


@excludes("budget", "sweep")
@excludes("plan", "sweep")
@excludes("picture", "sweep")
@excludes("amp", "sweep")
@needs("output", "sweep")
@needs("repeats", "sweep")
@needs("peers", "sweep")
@without_effect("batch_size", SIZED, lambda v: sized([v["model"]], ":"))
def fit_command(
    model: Annotated[str, argument("NAME@SIZE:BATCH of timm, or an MMDetection CONFIG.py@800x1333:1", "MODEL")],
    budget: Annotated[str | None, text("bytes of the whole training step: 6GB (10^9 bytes) or 6GiB")] = None,
    batch_size: Annotated[int, number(COUNT, "where MODEL has none")] = 8,
    amp: Annotated[str | None, text("autocast to bf16 or fp16")] = None,
    optimizer: Annotated[str, text("any of timm's, whose state counts, or none")] = "sgd",
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, text("cpu, cuda, ...; to plan, it need not be here")] = "cpu",
    compile: Annotated[
        bool, typer.Option("--compile", help="have plans by torch.compile, too; runs the model, and takes minutes")
    ] = False,
    plan: Annotated[Path | None, path("also write the plan as JSON, for revnets.Plan.load")] = None,
    picture: Annotated[Path | None, path("also draw the step before and after, as PNG")] = None,
    sweep: Annotated[
        int | None, number(COUNT, "instead: measure so many budgets, from the least possible to plain")
    ] = None,
    repeats: Annotated[int, number(COUNT, "of --sweep: timed steps per row; their median counts")] = 5,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="of --sweep: beside torch.compile's own budget, too; compiling takes minutes"),
    ] = False,
    output: Annotated[Path | None, path("of --sweep: folder for CSV and picture")] = None,
) -> None:
    """Train any network within a budget of bytes: what each of its blocks keeps, chosen for the shortest step.

    The network and its batch stay as they are. The largest batch that fits a network without such a plan:
    revnets profile --fit.
    """
    if (budget is None) == (sweep is None):
        raise ProfileError("--budget or --sweep: give one of them, such as --budget 6GB")
    allowed = None if budget is None else parse_budget(budget)
    as_amp_dtype(amp)
    for file in (plan, picture):
        if file is not None:
            check_file(file)
    if output is not None:
        check_folder(output)
    setting = Setting(device, channels_last, None, True, None if optimizer == "none" else optimizer)
    target = read_target(model, setting, batch_size)
    if sweep is not None:
        work = ways(target, setting, sweep, peers, compile)
        measured = compare(target, setting, work, repeats, lambda pieces: track(list(pieces), "measuring"))
        print_comparison(measured, setting)
        if output is not None:
            for written in save_table(measured, make_folder(output)):
                typer.echo(f"wrote {written}")
        return
    found = planner_of(target, setting, amp, compile, _compiling).plan(allowed or 0)
    typer.echo(str(found))
    if plan is not None:
        typer.echo(f"wrote {found.save(plan)}")
    if picture is not None:
        typer.echo(f"wrote {found.draw(picture)}")


def _compiling(shares: Iterable[Any]) -> Iterable[Any]:
    return track(list(shares), "compiling")
