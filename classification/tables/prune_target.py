"""What the table of pruned networks prunes to: a share of zeros, of single weights or in blocks, or N:M."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from revnets.pruning import BLOCKED, Pattern

_EXPECTED = f"a sparsity between 0 and 1, {BLOCKED}:SPARSITY, or N:M, was expected"


@dataclasses.dataclass(frozen=True)
class Target:
    """A goal of ``revnets.pruning.prune``, as the command line spells it.

    Attributes:
        sparsity: the share of zeros; None where the pattern says it.
        pattern: ``4x1`` or N:M; None where single weights go.
    """

    sparsity: float | None
    pattern: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """From a text such as ``0.7``, ``4x1:0.7`` or ``2:4``.

        Raises:
            argparse.ArgumentTypeError: for anything else.

        Example:
            >>> Target.parse("4x1:0.7"), Target.parse("2:4").pattern
            (Target(sparsity=0.7, pattern='4x1'), '2:4')
        """
        blocked = text.startswith(f"{BLOCKED}:")
        try:
            if ":" in text and not blocked:
                return cls(None, str(Pattern.parse(text)))
            sparsity = float(text.rpartition(":")[2])
        except ValueError:
            sparsity = 0.0
        if not 0 < sparsity < 1:
            raise argparse.ArgumentTypeError(f"{text!r} was given where {_EXPECTED}")
        return cls(sparsity, BLOCKED if blocked else None)

    def goal(self) -> dict[str, Any]:
        """The arguments of ``prune``."""
        return {"sparsity": self.sparsity, "pattern": self.pattern}

    def after(self, steps: Sequence[float]) -> list[Target]:
        """The targets that are pruned to one after the other, this one last; N:M at once.

        Args:
            steps: sparsities on the way to larger ones.

        Example:
            >>> [str(step) for step in Target.parse("4x1:0.7").after([0.8, 0.5])]
            ['4x1:0.5', '4x1:0.7']
        """
        goal = self.sparsity or 0.0
        return [*(Target(step, self.pattern) for step in sorted(steps) if 0 < step < goal), self]

    @property
    def word(self) -> str:
        """For names of files."""
        return str(self).replace(f"{BLOCKED}:", f"{BLOCKED}-").replace(":", "of")

    def __str__(self) -> str:
        return ":".join(
            word for word in (self.pattern, None if self.sparsity is None else f"{self.sparsity:g}") if word
        )
