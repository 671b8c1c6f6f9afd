"""``revnets bench``: steps timed, or what they start counted."""

from pathlib import Path
from typing import Annotated

import typer

from ...arguments import PLAIN, argument, excludes, number, path, reversible, text, without_effect
from ...training.options.values import COUNT
from ...training.places import check_file
from ..command import Setting, track
from . import launches as launch_bench
from . import timing as bench


@excludes("repeats", "launches")
@excludes("ablate", "launches")
@without_effect("exact", PLAIN, lambda v: not reversible(v["models"] or ["revbifpn"]))
def bench_command(
    models: Annotated[list[str] | None, argument("NAME@SIZE:BATCH, any timm model", "MODEL")] = None,
    repeats: Annotated[int, number(COUNT, "timed steps per row; their median counts")] = 5,
    device: Annotated[str, text("cpu, cuda, ...")] = "cpu",
    amp_dtype: Annotated[str | None, text("autocast to bfloat16 or float16")] = None,
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    modes: Annotated[str | None, text("of these modes only, separated by commas")] = None,
    ablate: Annotated[bool, typer.Option(help="also each part of our work left out, in reversible mode")] = False,
    compiled: Annotated[bool, typer.Option(help="also with compiled branches; compiling takes minutes")] = False,
    launches: Annotated[
        bool, typer.Option(help="instead: count operator calls, and kernels, also of what is compiled")
    ] = (False),
    output: Annotated[Path | None, path("also write the figures as JSON")] = None,
) -> None:
    """Step time and activation memory of networks in their memory modes, in one interleaved run."""
    setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
    if output is not None:
        check_file(output)
    names = models or ["revbifpn_s0@224:8", "revbifpn_s1@256:8", "efficientnet_b0@224:8"]
    cases = bench.make_cases(names, modes or "", setting, ablate, compiled)
    if launches:
        counted = launch_bench.run(cases, setting, lambda work: track(list(work), "counting"))
        launch_bench.print_rows(counted, setting)
        if output is not None:
            launch_bench.save(counted, setting, output)
        return
    rows = bench.run(cases, setting, repeats, lambda work: track(list(work), "measuring"))
    bench.print_rows(rows, setting)
    if output is not None:
        bench.save(rows, setting, output)
