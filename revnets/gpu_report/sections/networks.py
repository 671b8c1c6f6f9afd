"""Section c: memory, time, launches and energy of networks, and the largest batch that trains."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import revnets

from ...profiling.memory import StepMemory, measure_training_step
from ...profiling.profile import free_bytes, resident_bytes
from ...profiling.target import Job, Setting, Target, is_reversible
from ...profiling.turns import milliseconds
from ...reversible import compile_branches
from ...training.errors import reason
from ..predictions import Predictions, predicting
from ..registry import REPORT, Column, Context, Row, first
from ..registry import Target as Promise
from ..rows import failure
from ..timing import Energy, kernels, release

_SIZES = {"revbifpn_s0": 224, "revbifpn_s1": 256, "revbifpn_s2": 256, "revbifpn_s3": 288, "revbifpn_s4": 320,
          "revbifpn_s6": 352, "efficientnet_b0": 224, "hrnet_w18": 224, "resnet50": 224}  # fmt: skip
_ORDER = ("revbifpn_s1", "efficientnet_b0", "resnet50", "revbifpn_s2", "revbifpn_s3", "hrnet_w18", "revbifpn_s0",
          "revbifpn_s4", "revbifpn_s6")  # fmt: skip
_WITHOUT_CHECKPOINTING = ("hrnet_w18",)  # timm has none for it
_TINY = {"test_revbifpn": 32, "test_resnet": 32}
_MODES = ("reversible", "store", "checkpoint")
_BATCH = 128  # at which modes are compared, where it fits
_COMPILED, _CAPTURED = ", compiled branches", ", CUDA graph"
_COMPILED_NETWORKS = ("revbifpn_s1", "revbifpn_s2", "revbifpn_s3")
_CAPTURED_NETWORKS = ("revbifpn_s0", "revbifpn_s1", "revbifpn_s2", "revbifpn_s3", "efficientnet_b0")
_FILL = 0.92  # of the free memory: what predictions leave to the allocator's gaps and libraries
_ROUNDS = 5
_ROUNDS_SECONDS = 6.0
_LONGEST_STEP = 8.0  # seconds: larger batches are predicted only
Before = Mapping[tuple[str, str, str], Row]
_LEAST_SECONDS = 6.0  # with fewer left nothing new is begun


def _modes(network: str) -> tuple[str, ...]:
    if is_reversible(network):
        return _MODES
    return _MODES[1:2] if network in _WITHOUT_CHECKPOINTING else _MODES[1:]


def _command(network: str, size: int, precision: str, mode: str, batch: int = _BATCH) -> str:
    base, comma, extra = mode.partition(",")
    what, amp = f"{network}@{size}:{batch}", " --amp-dtype bfloat16" if precision == "bfloat16" else ""
    if comma + extra == _CAPTURED:
        return "revnets gpu-report --sections c --output DIR"
    if comma + extra == _COMPILED:
        return f"revnets bench {what} --device cuda --modes {base}{amp} --compiled"
    return f"revnets profile {what} --device cuda --mode {base}{amp} --measure --optimizer adamw"


def _row(network: str, size: int, precision: str, mode: str) -> Row:
    names = {"network": f"{network} @{size}", "precision": precision, "mode": mode}
    return {**names, "command": _command(network, size, precision, mode)}


def _plan(tiny: bool) -> list[Row]:
    if tiny:
        rows = [_row(n, s, "float32", mode) for n, s in _TINY.items() for mode in _modes(n)]
        return [*rows, _row("test_revbifpn", _TINY["test_revbifpn"], "float32", _MODES[0] + _CAPTURED)]
    rows = [_row(n, _SIZES[n], "bfloat16", mode) for n in _ORDER for mode in _modes(n)]
    rows += [_row(n, _SIZES[n], "bfloat16", _modes(n)[0] + _CAPTURED) for n in _CAPTURED_NETWORKS]
    rows += [_row(n, _SIZES[n], "float32", mode) for n in _ORDER for mode in _modes(n)]
    return rows + [_row(n, _SIZES[n], "bfloat16", m + _COMPILED) for n in _COMPILED_NETWORKS for m in _MODES[:2]]


def _over_store(network: str) -> Callable[[Sequence[Row]], float | None]:
    name = f"{network} @{_SIZES[network]}"

    def ratio(rows: Sequence[Row]) -> float | None:
        ours, theirs = (
            first(rows, "step_ms", network=name, precision="bfloat16", mode=mode + _COMPILED) for mode in _MODES[:2]
        )
        return ours / theirs if ours and theirs else None

    return ratio


def _words(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.get("step_ms")]
    return f"{len(measured)} rows measured, {sum(1 for row in rows if row.get('failed'))} failed"


@REPORT.section(
    "c",
    "networks",
    "Memory, time and launches of a training step, AdamW; the largest batch that trains",
    share=40,
    names=(Column("network", "network"), Column("precision", "precision"), Column("mode", "mode")),
    figures=(
        Column("batch", "batch"),
        Column("step_ms", "step, ms", "{:.1f}"),
        Column("images_per_s", "images/s", "{:.0f}"),
        Column("over_store", "x store", "{:.2f}"),
        Column("launches", "kernels"),
        Column("allocated_mb", "allocated, MB", "{:.0f}"),
        Column("reserved_mb", "reserved, MB", "{:.0f}"),
        Column("joules", "J/image", "{:.3f}"),
        Column("largest_predicted", "largest batch, predicted"),
        Column("largest", "that trains"),
        Column("largest_images_per_s", "images/s there", "{:.0f}"),
        Column("note", "note"),
    ),
    plan=_plan,
    targets=tuple(
        Promise(f"{n}, compiled branches: reversible over store, time", _over_store(n), most=1.35)
        for n in _COMPILED_NETWORKS
    ),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Group by group: the modes of a network in one precision take turns on the same weights."""
    before = {(row["network"], row["precision"], row["mode"]): row for row in context.before}
    with predicting(context.device, context.tiny) as predictions:
        groups = _groups(context, predictions)
        for group in groups:
            group.want()
        for stage, share in _STAGES:
            for group in (g for g in groups if stage in ("largest", g.stage)):
                if context.left < max(_LEAST_SECONDS, (1 - share) * context.seconds):
                    break
                try:
                    yield from group.largest(before) if stage == "largest" else group.measure(before)
                except Exception as error:  # one network does not take the others with it
                    traceback.print_exc()
                    yield from group.failed(error, before)
                release(torch.device(context.device))


_STAGES = (
    ("bfloat16", 1.0),
    (_CAPTURED, 1.0),
    ("largest", 0.6),
    (_COMPILED, 1.0),
    ("float32", 1.0),
    ("largest", 1.0),
)
"""In order of value, and up to which share of the time each may begin something."""


def _groups(context: Context, predictions: Predictions) -> list[_Group]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in _plan(context.tiny):
        _, comma, extra = row["mode"].partition(",")
        found.setdefault((row["network"], row["precision"], comma + extra), []).append(row["mode"])
    return [_Group(context, predictions, *names, modes) for names, modes in found.items()]


@dataclass
class _Group:
    """Some modes of a network in one precision and one kind (as it is, compiled, captured)."""

    context: Context
    predictions: Predictions
    network: str
    precision: str
    kind: str
    modes: list[str]
    ms_per_image: dict[str, float] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.device = torch.device(self.context.device)
        amp = "bfloat16" if self.precision == "bfloat16" else None
        self.setting = Setting(self.context.device, True, amp, True, "adamw")
        self.name, size = self.network.split(" @")
        self.size = int(size)
        self.stage = self.kind or self.precision

    def target(self, mode: str, batch: int = 1) -> Target:
        return Target(self.name, self.size, batch, mode.split(",")[0])

    def want(self) -> None:
        """Have predicted what will be asked for."""
        for mode in {*self.modes, "store"}:
            self.predictions.want_line(self.target(mode), self.setting)

    def todo(self, before: Before) -> list[str]:
        """Modes that were not measured before."""
        return [mode for mode in self.modes if (self.network, self.precision, mode) not in before]

    def failed(self, error: Exception, before: Before) -> Iterator[Row]:
        """Rows that say why they are blank."""
        for mode in self.todo(before):
            if mode not in self.ms_per_image:
                yield self.row(mode, **failure(error))

    def row(self, mode: str, **figures: Any) -> Row:
        return {"network": self.network, "precision": self.precision, "mode": mode, **figures}

    def measure(self, before: Before) -> Iterator[Row]:
        """Time and memory at one batch for all modes."""
        modes = self.todo(before)
        if modes and self.kind == _CAPTURED:
            yield self.captured(modes[0], self.batch())
        elif modes:
            yield from self.compared(modes, self.batch())

    def batch(self) -> int:
        """One that all modes can train with."""
        if self.context.tiny:
            return 2
        fits = self.predictions.largest(self.target("store"), self.setting, _FILL * free_bytes(self.device))
        return max(1, min(_BATCH, 8 * (fits // 8) or fits))

    def compared(self, modes: list[str], batch: int) -> Iterator[Row]:
        job = self.target("store", batch).build(self.setting, self.device)
        optimizer = self.setting.make_optimizer(job.model)
        if self.kind == _COMPILED:
            compile_branches(job.network)
        memory: dict[str, StepMemory] = {}
        for mode in modes:
            switch(job.network, mode)
            memory[mode] = measure_training_step(job.model, job.x, job.loss_fn, optimizer)
        resident = resident_bytes(job, optimizer)
        steps = {mode: _step(job, optimizer, mode) for mode in modes}
        round_seconds = sum(step.seconds for step in memory.values())
        rounds = 1 if self.context.tiny else max(1, min(_ROUNDS, int(_ROUNDS_SECONDS / round_seconds)))
        taken = milliseconds(steps, self.device, rounds, warmup=1)
        store = next((taken[mode] for mode in taken if mode.startswith("store")), None)
        energy = Energy(self.device)
        for mode, step in steps.items():
            self.ms_per_image[mode] = taken[mode] / batch
            joules = energy.joules(step, self.device, max(1, round(400 / taken[mode])))
            reserved = memory[mode].reserved_bytes
            yield self.row(
                mode,
                command=_command(self.name, self.size, self.precision, mode, batch),
                batch=batch,
                step_ms=taken[mode],
                images_per_s=1e3 * batch / taken[mode],
                over_store=taken[mode] / store if store else None,
                launches=kernels(step, self.device),
                allocated_mb=(memory[mode].peak_bytes + resident) / 1e6,
                reserved_mb=None if reserved is None else reserved / 1e6,
                joules=None if joules is None else joules / batch,
                note=energy.reason or None if mode == modes[0] else None,
            )

    def captured(self, mode: str, batch: int) -> Row:
        """A whole step as one CUDA graph."""
        job = self.target(mode, batch).build(self.setting, self.device)
        optimizer, nothing = self.setting.make_optimizer(job.model), torch.zeros(batch, device=self.device)
        captured = revnets.capture_step(job.model, lambda y, _: job.loss_fn(y), optimizer, job.x, nothing)
        taken = milliseconds({mode: lambda: captured(job.x, nothing)}, self.device, _ROUNDS)[mode]
        self.ms_per_image[mode] = taken / batch
        note = None if self.device.type == "cuda" else "no graphs on this device: the same step, eagerly"
        return self.row(mode, batch=batch, step_ms=taken, images_per_s=1e3 * batch / taken, note=note)

    def largest(self, before: Before) -> Iterator[Row]:
        """Each mode's largest batch, where a step of it takes seconds: as predicted, then less until it trains."""
        for mode in self.modes[: 2 if self.context.tiny else None]:
            if mode not in self.ms_per_image or mode in self.tried or self.kind:
                continue
            self.tried.add(mode)
            release(self.device)
            budget = 2**26 if self.context.tiny else _FILL * free_bytes(self.device)
            predicted = self.predictions.largest(self.target(mode), self.setting, budget)
            yield self.row(mode, largest_predicted=predicted)
            seconds = self.ms_per_image[mode] * predicted / 1e3
            if seconds > min(_LONGEST_STEP, self.context.left / 2) and not self.context.tiny:
                yield self.row(mode, note=f"the largest batch was not tried: {seconds:.0f} s a step")
            else:
                yield self.row(mode, **self.trained(mode, min(predicted, 2) if self.context.tiny else predicted))

    def trained(self, mode: str, batch: int) -> Row:
        """The largest batch of which a step ran."""
        problem: str | None = None
        for _ in range(4):
            if batch < 1:
                break
            taken, trouble = self.once(mode, batch)
            if taken is not None:
                found = {"largest": batch, "largest_images_per_s": 1e3 * batch / taken}
                return {**found, "note": problem} if problem else found
            problem, batch = trouble, int(0.9 * batch)
            release(self.device)
        return {"note": problem or "not even one image fits"}

    def once(self, mode: str, batch: int) -> tuple[float | None, str]:
        """Milliseconds of a step of this batch; or why there is none."""
        try:
            job = self.target(mode, batch).build(self.setting, self.device)
            step = _step(job, self.setting.make_optimizer(job.model), mode)
            return milliseconds({"": step}, self.device, 1, warmup=0)[""], ""
        except Exception as error:  # out of memory, or a kernel that cannot count that far
            return None, f"batch {batch}: {reason(error)}"


def switch(network: Any, mode: str) -> None:
    """Put a network into a memory mode, and timm's own out of theirs, too."""
    base = mode.split(",")[0]
    if hasattr(network, "set_mode"):
        network.set_mode(base)
    elif base == "checkpoint" or getattr(network, "grad_checkpointing", False):
        network.set_grad_checkpointing(base == "checkpoint")


def _step(job: Job, optimizer: torch.optim.Optimizer, mode: str) -> Callable[[], None]:
    def step() -> None:
        switch(job.network, mode)
        job.model.zero_grad(set_to_none=True)
        job.loss_fn(job.model(job.x)).backward()
        optimizer.step()

    return step
