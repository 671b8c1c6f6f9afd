"""``reversible``: the residual stages of a trained network, made reversible in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..layers.convert import Converted, Skipped, input_size_of
from ..reversible import KeptUpdate, Leapfrog, Lent, ReversibleOp, RevSequential
from ..reversible.leapfrog import BITS
from ..reversible.mode import check_mode
from ..reversible.update import UPDATE_BITS
from .probe import Stage, probe
from .stage import ReversibleStage

Steps = list[tuple[tuple[str, ...], str]]
_BITS = {1: UPDATE_BITS, 2: BITS}  # by the number of streams


@dataclass(frozen=True)
class Report:
    """What ``reversible`` did; ``str`` of it is a list.

    Attributes:
        converted: runs of blocks that are rebuilt from their output, and single blocks computed again from their input.
        skipped: blocks that are neither, each with the reason.
    """

    converted: tuple[Converted, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"{c.name}: {c.kind}" + (f" ({c.note})" if c.note else "") for c in self.converted]
        return "\n".join([*lines, *(f"{s.name}: as it was, {s.reason}" for s in self.skipped)])


def reversible(
    model: nn.Module,
    bits: int = 8,
    streams: int = 1,
    exact: bool | int = True,
    mode: str = "reversible",
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    r"""Make the residual stages of a trained network reversible, so that training forgets their activations.

    What changes is how the blocks within an ``nn.Sequential`` are trained: residual blocks that keep their shape are
    undone from their output, and the others of their class are computed again from their input. Weights, names,
    ``state_dict`` and everything in eval mode are the network's own, so that checkpoints go both ways.

    In training, what a block adds is rounded to ``bits`` bits, with a scale for each 64 numbers, and only these bits
    are kept (``KeptUpdate``). With ``streams=2`` nothing is rounded: the block runs ahead of the network's own stream
    by ``2^-bits`` of the update before (``Leapfrog``). Either way what is rebuilt, and all gradients, equal those of
    ``mode="store"`` to the bit, at any depth. ``docs/retrofit.md`` compares.

    Args:
        model: timm's ResNet, ConvNeXt or ViT, or any with stages of residual blocks; in full precision. It is changed
            in place.
        bits: kept per number and block: 4, 8 or 16, with two streams 0, 1, 2, 4 or 8. Fewer take less memory and are
            further from what the network was trained to do.
        streams: 1, or 2, which take more memory while a block is computed again.
        exact: True, or k for a grid of ``2^-k`` (coarser, for activations beyond 512). False rebuilds activations with
            an error; with two streams it needs ``bits=0``.
        mode: of training, see ``revnets.set_mode``.
        input_size: of one example, without batch, to follow the data through the network; by default that of
            ``model.pretrained_cfg``, or ``(3, 224, 224)``.

    Returns:
        ``model``; what was done is in ``model.retrofit``, a ``Report``.

    Raises:
        ValueError: for a network without such stages, one that is wrapped, compiled or reversible already, and for
            options out of range; the model is then as it was.

    Example:
        >>> import timm, torch, revnets
        >>> model = revnets.reversible(timm.create_model("test_vit", depth=4), input_size=(3, 160, 160))
        >>> print(model.retrofit)
        blocks.0 to blocks.3: reversible (4 blocks)
        >>> model(torch.zeros(2, 3, 160, 160)).sum().backward()
    """
    _check_options(bits, streams, exact, mode)
    _check_model(model)
    stages = [stage for stage in probe(model, input_size_of(model, input_size)) if "" in stage.blocks.values()]
    converted: list[Converted] = []
    skipped = _in_lists(model)
    planned: dict[str, Steps] = {}
    for stage in stages:
        if any(name and stage.name.startswith(f"{name}.") for name in _blocks(planned)):
            continue  # within a block that is made reversible as one
        if not stage.calls:
            skipped.append(Skipped(stage.name, "the network calls its blocks one by one"))
            continue
        planned[stage.name] = _plan(
            model.get_submodule(stage.name), stage, 1 if streams == 1 else 2, converted, skipped
        )
    if not converted:
        raise ValueError(_nothing(model, skipped))
    for name, steps in planned.items():
        ReversibleStage.of(
            cast(nn.Sequential, model.get_submodule(name)), steps, partial(_ops, streams, bits), exact, mode
        )
    vars(model)["retrofit"] = Report(tuple(converted), tuple(skipped))
    return model


def _ops(streams: int, bits: int, blocks: Sequence[Lent]) -> list[ReversibleOp]:
    if streams == 1:
        return [KeptUpdate(block, bits) for block in blocks]
    last = len(blocks) - 1
    return [Leapfrog(block, bits, start=i == 0, end=i == last) for i, block in enumerate(blocks)]


def _check_options(bits: int, streams: int, exact: bool | int, mode: str) -> None:
    check_mode(mode)
    if streams not in _BITS or isinstance(streams, bool):
        raise ValueError(f"reversible: streams={streams!r}: expected 1 or 2")
    if bits not in _BITS[streams] or isinstance(bits, bool):
        allowed = ", ".join(map(str, _BITS[streams]))
        raise ValueError(f"reversible: bits={bits!r}: expected one of {allowed} with streams={streams}")
    if exact is False and streams == 2 and bits:
        raise ValueError(
            f"reversible: exact=False with streams=2 and bits={bits} would lose {bits} bits of every number in every "
            "block: keep exact=True, or take bits=0"
        )
    RevSequential([], exact=exact)


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"reversible: expected a model, got {kind}: give an nn.Module")
    if isinstance(model, (DataParallel, DistributedDataParallel)) or kind == "FullyShardedDataParallel":
        raise ValueError(f"reversible: the model is wrapped in {kind}: make it reversible first, and wrap the result")
    if isinstance(model, OptimizedModule) or any(vars(m).get("_compiled_call_impl") for m in model.modules()):
        raise ValueError(
            "reversible: the model is compiled: make it reversible first, then compile its branches with "
            "revnets.compile_branches"
        )
    if any(isinstance(m, (ReversibleOp, RevSequential)) for m in model.modules()):
        raise ValueError(f"reversible: {kind} has reversible parts already: use revnets.set_mode to switch them")
    if any(getattr(m, "grad_checkpointing", False) is True for m in model.modules()):
        raise ValueError(
            "reversible: timm's checkpointing is on, which calls the blocks one by one: call "
            "model.set_grad_checkpointing(False) first"
        )


def _blocks(planned: dict[str, Steps]) -> list[str]:
    return [
        f"{stage}.{name}" if stage else name for stage, steps in planned.items() for names, _ in steps for name in names
    ]


def _in_lists(model: nn.Module) -> list[Skipped]:
    """Rows of blocks that no ``nn.Sequential`` runs."""
    found = []
    for name, module in model.named_modules():
        blocks = list(module) if isinstance(module, nn.ModuleList) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if alike and type(blocks[0]) is not nn.Sequential and any(True for _ in blocks[0].children()):
            found.append(Skipped(name, "a ModuleList, whose blocks the network calls one by one"))
    return found


def _plan(module: nn.Module, stage: Stage, shortest: int, converted: list[Converted], skipped: list[Skipped]) -> Steps:
    """The steps of a stage; what is done, and what not, goes to the two lists."""
    children = dict(module.named_children())
    kinds = {type(children[name]) for name, reason in stage.blocks.items() if not reason}
    steps: Steps = []
    for names in _runs(stage):
        shown = [f"{stage.name}.{name}" if stage.name else name for name in names]
        reason = stage.blocks[names[0]]
        if not reason and len(names) >= shortest:
            steps.append((names, "chain"))
            where = shown[0] if len(names) == 1 else f"{shown[0]} to {shown[-1]}"
            converted.append(Converted(where, "reversible", f"{len(names)} blocks" if len(names) > 1 else ""))
            continue
        if type(children[names[0]]) in kinds:
            steps.append((names, "again"))
            why = reason or "alone, where two streams take more room than its input"
            converted.append(Converted(shown[0], "computed again from its input", why))
        else:
            steps.append((names, "plain"))
            skipped.append(Skipped(shown[0], reason))
    return steps


def _runs(stage: Stage) -> list[tuple[str, ...]]:
    """Neighbours that can be reversible together; all others by themselves."""
    runs: list[tuple[str, ...]] = []
    for name, reason in stage.blocks.items():
        if runs and not reason and not stage.blocks[runs[-1][-1]]:
            runs[-1] += (name,)
        else:
            runs.append((name,))
    return runs


def _nothing(model: nn.Module, skipped: list[Skipped]) -> str:
    reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3])
    return (
        f"reversible: {type(model).__name__} runs no residual blocks that keep their shape in an nn.Sequential"
        + (f" ({reasons})" if reasons else "")
        + ": its activations can only be recomputed, as by its set_grad_checkpointing()"
    )
