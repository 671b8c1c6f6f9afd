"""``revnets bench``: steps timed, or what they start counted."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...arguments import PLAIN, argument, excludes, needs, number, path, reversible, text, without_effect
from ...training.options.values import COUNT, check_once, find_device
from ...training.places import check_file
from ..command import Setting, track
from ..fake import ProfileError
from . import launches as launch_bench
from . import peers as peer_bench
from . import timing as bench
from .peers_shown import print_comparison
from .peers_shown import save as save_comparisons

NAMES = ("revbifpn_s0@224:8", "revbifpn_s1@256:8", "efficientnet_b0@224:8")
"""Where none is given."""


@excludes("repeats", "launches")
@excludes("ablate", "launches")
@excludes("ablate", "peers")
@excludes("launches", "peers")
@excludes("modes", "peers")
@needs("budgets", "peers")
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
    compiled: Annotated[bool, typer.Option(help="also compiled branches, of --peers plans; takes minutes")] = False,
    launches: Annotated[
        bool, typer.Option(help="instead: count operator calls, and kernels, also of what is compiled")
    ] = (False),
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="instead: peak against time beside what else saves memory; compiling takes minutes"
        ),
    ] = False,
    budgets: Annotated[int, number(COUNT, "of --peers: points of our curve, from the least possible to plain")] = 10,
    output: Annotated[Path | None, path("also write the figures as JSON, and of --peers a picture beside it")] = None,
) -> None:
    """Step time and activation memory of networks in their memory modes, in one interleaved run."""
    setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
    if output is not None:
        check_file(output)
    names = models or list(NAMES)
    if peers:
        _compare_peers(names, replace(setting, optimizer="sgd"), budgets, repeats, compiled, output)
        return
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


def _compare_peers(
    names: Sequence[str], setting: Setting, budgets: int, repeats: int, compiled: bool, output: Path | None
) -> None:
    """All ways to train each network, a whole training step as ``revnets fit --sweep`` measures it."""
    check_once("networks", names)
    find_device(setting.device, here=True)
    if output is not None and output.suffix == ".png":
        raise ProfileError(f"--output {output}: it is for JSON, the picture lies beside it: give a name such as x.json")
    comparisons = []
    for target in [peer_bench.read_target(name, setting) for name in names]:
        ways = peer_bench.ways(target, setting, budgets, compiled_plans=compiled)
        found = peer_bench.compare(target, setting, ways, repeats, lambda work: track(list(work), "measuring"))
        print_comparison(found, setting)
        comparisons.append(found)
    if output is not None:
        for written in save_comparisons(comparisons, setting, output):
            typer.echo(f"wrote {written}")
