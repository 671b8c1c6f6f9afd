"""How networks with reversible parts switch between their memory modes, in our words and in timm's."""

from typing import Any

import torch
from timm.models._features import FeatureGetterNet

from ..reversible import set_mode


class MemoryModes:
    """A mix-in for networks whose reversible parts share one mode; they say which in ``mode``."""

    @property
    def mode(self) -> str:
        """How activations are handled in training; change it with ``set_mode``."""
        raise NotImplementedError

    def set_mode(self, mode: str) -> None:
        """Switch between ``"reversible"``, ``"checkpoint"`` and ``"store"`` on the same weights."""
        network: Any = self
        set_mode(network, mode)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch between ``"store"`` and ``"checkpoint"``; reversible mode, which needs less, stays as it is."""
        if self.mode != "reversible":
            self.set_mode("checkpoint" if enable else "store")

    @torch.jit.ignore
    def set_reversible(self, enable: bool = True) -> None:
        """Switch between ``"reversible"`` and ``"store"``, the sibling of ``set_grad_checkpointing``."""
        self.set_mode("reversible" if enable else "store")


class Features(FeatureGetterNet):
    """The maps of a network's ``forward_intermediates``, with a switch that timm's other wrappers of features have."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """That of the network inside."""
        self.model.set_grad_checkpointing(enable)
