"""Ways to make a network reversible, by depth: how far rebuilt activations and gradients are off, and what is kept.

python -m classification.tables.retrofit_errors

The blocks are those of a small ViT of timm's, freshly initialised, on random tokens; nothing is trained, and no data
is read.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from revnets.reversible import KeptUpdate, Leapfrog, RevSequential, check_reversibility, set_mode

from . import runner
from .runner import Column, Outcomes, flag, positive, same


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One way at one depth."""

    way: str
    bits: int
    depth: int
    inversion: float  # largest error of a rebuilt input, over the largest input
    gradient: float  # norm of the error of the parameters' gradients, over that with stored activations
    output: float  # norm of the distance of the output to that of the network itself, over its norm
    direction: float  # one less the cosine of the gradients to those of the network itself


def _one_stream(blocks: Sequence[nn.Module], bits: int) -> list[Any]:
    return [KeptUpdate(block, bits) for block in blocks]


def _two_streams(blocks: Sequence[nn.Module], bits: int) -> list[Any]:
    return [Leapfrog(b, bits, start=i == 0, end=i == len(blocks) - 1) for i, b in enumerate(blocks)]


WAYS = [("two streams, floats", _two_streams, bits, False) for bits in (0, 1, 4, 8)]
WAYS += [("two streams, exact", _two_streams, bits, True) for bits in (0, 1, 4, 8)]
WAYS += [("one stream, floats", _one_stream, 8, False)]
WAYS += [("one stream, exact", _one_stream, bits, True) for bits in (4, 8, 16)]


def _gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradients of one step."""
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _compared(way: str, make: Any, bits: int, exact: bool, plain: nn.Sequential, x: Tensor) -> Outcome:
    def fresh() -> RevSequential:
        return RevSequential(make(copy.deepcopy(list(plain)), bits), exact=exact)

    y, theirs = _gradients(copy.deepcopy(plain), x)
    _, rebuilt = _gradients(fresh(), x)
    output, stored = _gradients(set_mode(fresh(), "store"), x)
    return Outcome(
        way,
        bits,
        len(plain),
        max(op.relative for op in check_reversibility(fresh(), x).ops),
        float((rebuilt - stored).norm() / stored.norm()),
        float((output - y).norm() / y.norm()),
        1 - float(torch.cosine_similarity(stored.double(), theirs.double(), dim=0)),
    )


class Table(runner.Table):
    """Ways x depths."""

    folder = "retrofit_errors"
    description = "Ways to make a network reversible x depths: errors."
    options = (flag("--depths", type=positive, nargs="+", default=[6, 12, 24]),)
    columns = (
        Column("way", same("way")),
        Column("bits kept", same("bits")),
        Column("blocks", same("depth")),
        Column("error of rebuilt activations", same("inversion", ".1e")),
        Column("of gradients", same("gradient", ".1e")),
        Column("output off the network's", same("output", ".1e")),
        Column("gradients: 1 - cosine to the network's", same("direction", ".1e")),
    )

    def outcomes(self) -> Iterator[Outcome]:
        for depth in self.args.depths:
            torch.manual_seed(0)
            plain = nn.Sequential(*(Block(64, 4) for _ in range(depth))).train()
            x = torch.randn(8, 16, 64)
            for way, make, bits, exact in WAYS:
                yield _compared(way, make, bits, exact, plain, x)

    def draw(self, figure: Any, done: Outcomes) -> None:
        axes = figure.subplots()
        for way, _, bits, _ in WAYS:
            found = [each for each in done if (each.way, each.bits) == (way, bits)]
            axes.semilogy(
                [each.depth for each in found],
                [max(each.inversion, 1e-9) for each in found],
                "o-",
                label=f"{way}, {bits}",
            )
        axes.set(xlabel="blocks", ylabel="error of rebuilt activations (1e-9: none)")
        axes.legend(fontsize="x-small")


if __name__ == "__main__":
    sys.exit(Table.main())
