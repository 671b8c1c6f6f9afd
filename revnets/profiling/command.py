"""What ``revnets profile`` does, from names to tables and files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..arguments import PLAIN, SIZED, argument, excludes, needs, number, path, reversible, sized, text, without_effect
from ..reversible import MODES
from ..training.options.values import COUNT, check_choice, check_once, find_device, words
from ..training.places import check_folder, make_folder
from . import sweep
from .fake import ProfileError
from .fit import WHAT, DoesNotFitError, Fit, fit, parse_budget
from .profile import profile
from .report import plots
from .report import tables as report
from .target import LEAN, Setting, Target, parse_targets

__all__ = ["Request", "Setting", "profile_command", "run"]

T = TypeVar("T")
_SAME = {"plain": "store"}


@dataclass(frozen=True)
class Request:
    """What was asked for; see ``revnets profile --help``."""

    names: Sequence[str]
    img_size: int | None = None
    batch_size: int = 8
    modes: str = ""
    measure: bool | None = None
    fit: str | None = None
    fit_what: str = "batch"
    output: Path | None = None
    sweeps: str = ""
    parts: str = ""


def run(request: Request, setting: Setting) -> None:
    """Predict, measure, print and save.

    Raises:
        ProfileError: one sentence, before long work where that can be.
    """
    budget = None if request.fit is None else parse_budget(request.fit)
    if budget is not None and request.sweeps:
        raise ProfileError("--sweep and --fit: each prints a table of its own, give one of them")
    check_choice("--fit-what", request.fit_what, WHAT)
    kinds = words("sweep", request.sweeps, sweep.KINDS) if request.sweeps else []
    parts = words("--part", request.parts) if request.parts else []
    if request.output is not None:
        check_folder(request.output)
    targets = choose_targets(request.names, request.modes, setting, request.img_size, request.batch_size)
    targets = _of_parts(targets, parts)
    sweeps = {kind: sweep.targets(kind, targets, setting) for kind in kinds}
    if request.measure:
        find_device(setting.device, here=True)
    if budget is not None:
        fits = _fit_all(targets, setting, budget, request.fit_what)
        report.print_fits(fits, budget, request.fit_what)
        if (folder := _folder(request)) is not None:
            _wrote(report.save_records(report.fit_records(fits, budget), setting, folder, "fit"))
        return
    for kind, swept in sweeps.items():
        rows = [profile(t, setting, measure=False) for t in track(swept, f"predicting {kind}")]
        report.print_sweep(kind, rows, setting)
        if (folder := _folder(request)) is not None:
            _wrote([*report.save_records(report.records(rows), setting, folder, kind), plots.sweep(kind, rows, folder)])
    if sweeps:
        return
    rows = [profile(t, setting, request.measure) for t in track(targets, "profiling")]
    report.print_rows(rows, setting)
    if (folder := _folder(request)) is not None:
        _wrote(report.save_records(report.records(rows), setting, folder, "profile"))
        _wrote([plots.timeline(row, folder) for row in rows])


def _folder(request: Request) -> Path | None:
    return None if request.output is None else make_folder(request.output)


def choose_targets(
    names: Sequence[str], modes: str, setting: Setting, img_size: int | None = None, batch_size: int = 8
) -> list[Target]:
    """The targets of all names, in the modes asked for.

    Args:
        names: ``NAME[@SIZE][:BATCH]``.
        modes: separated by commas or blanks; none for all but ``lean``. ``plain`` is another word for ``store``.
        setting: of the networks.
        img_size: where a name has none; by default the published size.
        batch_size: where a name has none.

    Raises:
        ProfileError: for what does not exist.
    """
    wanted = [_SAME.get(mode, mode) for mode in words("mode", modes, (*MODES, LEAN, *_SAME))] if modes else []
    check_once("networks", names)
    COUNT.check("batch_size", batch_size)
    if img_size is not None:
        COUNT.check("img_size", img_size)
    targets = []
    everywhere: set[str] = set()
    for name in names:
        found = parse_targets(name, setting, img_size, batch_size)
        if LEAN in wanted:
            found += [replace(t, mode=LEAN) for t in found if t.mode == "store" and type(t) is Target]
        everywhere.update(t.mode for t in found)
        # a peer without any of these modes is still worth comparing: plain
        chosen = [t for t in found if not wanted or t.mode in wanted]
        if not chosen and name == names[0]:
            raise ProfileError(f"{name} has no mode {wanted[0]!r}, only {', '.join(t.mode for t in found)}")
        targets += chosen or [t for t in found if t.mode == "store"]
    idle = [mode for mode in wanted if mode not in everywhere]
    if idle:
        raise ProfileError(f"{', '.join(names)}: no network here has the mode {idle[0]!r}: leave it out")
    return targets


def _of_parts(targets: Sequence[Target], parts: Sequence[str]) -> list[Target]:
    """Of detectors these parts only, by the last word of their names; of other networks all."""
    known = sorted({t.part.split()[-1] for t in targets if t.part})
    unknown = [part for part in parts if part not in known]
    if unknown:
        hint = f"expected some of {', '.join(known)}" if known else "there is no detector among the networks"
        raise ProfileError(f"unknown --part {unknown[0]!r}: {hint}")
    return [t for t in targets if not parts or not t.part or t.part.split()[-1] in parts]


def _fit_all(targets: Sequence[Target], setting: Setting, budget: int, what: str) -> list[Fit]:
    """What fits, for all targets of which at least one sample does; the others are named on the way."""
    fits, refused = [], []
    for target in track(targets, "fitting"):
        try:
            fits.append(fit(target, setting, budget, what))
        except DoesNotFitError as error:
            refused.append(error)
    if not fits:
        raise refused[0]
    for refusal in refused:
        _say([str(refusal)])
    return fits


def track(work: Iterable[T], what: str) -> Iterable[T]:
    """The pieces of work, with a progress bar and an estimate on the terminal."""
    from rich.console import Console
    from rich.progress import track as bar

    return bar(work, what, console=Console(stderr=True), transient=True)


def _wrote(paths: Sequence[Path | None]) -> None:
    _say([f"wrote {path}" for path in paths if path])


def _say(lines: Sequence[str]) -> None:
    from rich.console import Console

    for line in lines:
        Console(soft_wrap=True, highlight=False).print(line, markup=False)


def _names(compare: list[str] | None) -> list[str]:
    return " ".join(compare or []).replace(",", " ").split()


@excludes("sweep", "fit")
@excludes("measure", "sweep", "fit")
@needs("fit_what", "fit")
@without_effect(
    "batch_size",
    "with --fit, which looks for the batch: give one of them",
    lambda v: v["fit"] and v["fit_what"] == "batch",
)
@without_effect(
    "img_size",
    "with --fit, which looks for the image: give one of them",
    lambda v: v["fit"] and v["fit_what"] == "image",
)
@without_effect("img_size", SIZED, lambda v: sized([v["model"], *_names(v["compare"])], "@"))
@without_effect("batch_size", SIZED, lambda v: sized([v["model"], *_names(v["compare"])], ":"))
@without_effect("exact", PLAIN, lambda v: not reversible([v["model"], *_names(v["compare"]), v["sweep"]]))
def profile_command(
    model: Annotated[
        str,
        argument("NAME@SIZE:BATCH of timm, or an MMDetection CONFIG.py@800x1333:1", "MODEL"),
    ],
    img_size: Annotated[int | None, number(COUNT, "where MODEL has none (default: the published one)")] = None,
    batch_size: Annotated[int, number(COUNT, "where MODEL has none")] = 8,
    mode: Annotated[str | None, text("of these modes only, separated by commas")] = None,
    amp_dtype: Annotated[str | None, text("autocast to bfloat16 or float16")] = None,
    optimizer: Annotated[str, text("any of timm's, or none")] = "sgd",
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, text("cpu, cuda, ...; to predict, it need not be here")] = "cpu",
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    measure: Annotated[bool | None, typer.Option(help="run the step, too (default: where it takes seconds)")] = None,
    compare: Annotated[list[str] | None, text('more networks: "resnet50 efficientnet_b7@600"')] = None,
    fit: Annotated[str | None, text("what is the largest that fits 24GB (10^9 bytes) or 24GiB?")] = None,
    fit_what: Annotated[str, text("the largest batch or image")] = "batch",
    part: Annotated[str | None, text("of detectors only: backbone, neck (with backbone), detector")] = None,
    sweep: Annotated[str | None, text("instead: some of families, depth, resolution; predicted only")] = None,
    output: Annotated[Path | None, path("folder for JSON, CSV and pictures")] = None,
) -> None:
    """Memory, FLOPs and time of a training step: predicted without running it, measured beside it."""
    names = [model, *(name for text in compare or [] for name in words("--compare", text))]
    chosen = None if optimizer == "none" else optimizer
    setting = Setting(device, channels_last, amp_dtype, exact, chosen)
    wanted = (mode or "", measure, fit, fit_what, output, sweep or "", part or "")
    run(Request(names, img_size, batch_size, *wanted), setting)
