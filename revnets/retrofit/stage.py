"""``ReversibleStage``: a stage of a network whose blocks, in training, forget what they can rebuild."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..reversible import Lent, ReversibleOp, RevSequential
from ..reversible.mode import check_mode, recompute
from ..reversible.sequential import refuse_replicas
from ..reversible.traced import as_leaf, is_traced

HALF = (torch.bfloat16, torch.float16)


class ReversibleStage(nn.Sequential):
    """An ``nn.Sequential`` of a network, made reversible in place: same blocks, same names, same ``state_dict``.

    In eval mode, when exported, and when its blocks are called one by one, it is what it was. In training, runs of
    blocks that keep their shape go through a ``RevSequential``, whose ops are lent the blocks; those that change the
    shape are computed again from their input. Blocks may be replaced; where some are added or taken away the stage
    runs as an ``nn.Sequential`` does.

    Attributes:
        mode: see ``revnets.set_mode``; the chains have their own.
        steps: names of the blocks of each step, and whether it is a chain, computed again, or plain.
    """

    mode: str
    steps: tuple[tuple[tuple[str, ...], str], ...]
    chains: dict[str, RevSequential]

    @classmethod
    def of(
        cls,
        stage: nn.Sequential,
        steps: Sequence[tuple[tuple[str, ...], str]],
        ops: Callable[[Sequence[Lent]], Sequence[ReversibleOp]],
        exact: bool | int,
        mode: str,
    ) -> ReversibleStage:
        """Turn a stage, in place.

        Args:
            stage: of the very class ``nn.Sequential``.
            steps: see the attribute.
            ops: makes those of a chain.
            exact: see ``RevSequential``.
            mode: see ``RevSequential``.
        """
        runs = [names for names, how in steps if how == "chain"]
        made = [RevSequential(ops([Lent(stage, name) for name in names]), mode, exact) for names in runs]
        chains = {f"reversible{i}": chain for i, chain in enumerate(made)}
        vars(stage).update(mode=check_mode(mode), steps=tuple(steps), chains=chains)
        stage.__class__ = cls
        return cast(ReversibleStage, stage)

    def forward(self, input: Tensor) -> Tensor:
        """See ``nn.Sequential``."""
        known = [name for names, _ in self.steps for name in names]
        if not self.training or torch.compiler.is_exporting() or list(self._modules) != known:
            return super().forward(input)
        if is_traced(input):
            return cast(Tensor, as_leaf(self, input))
        refuse_replicas(self)
        chains = iter(self.chains.values())
        for names, how in self.steps:
            if how == "chain":
                input = self._through(next(chains), input)
            elif how == "again" and self.mode != "store":
                input = recompute(self._modules[names[0]], input)
            else:
                input = self._modules[names[0]](input)
        return input

    @staticmethod
    def _through(chain: RevSequential, x: Tensor) -> Tensor:
        if not chain.training:
            chain.train()
        if chain.grid_bits is not None and x.dtype in HALF and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # the streams have the bits of the grid; blocks run in autocast's precision all the same
        return chain(x)[0]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the stage, then its chains, which are no children, so that weights keep the names they have."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, chain in self.chains.items():
            yield from chain.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        chains = vars(self).get("chains", {})
        return chains[name] if name in chains else super().__getattr__(name)

    def __getitem__(self, index: Any) -> Any:
        """A block; of several, an ``nn.Sequential``."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)
