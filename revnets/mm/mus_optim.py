"""The learning rates of munit-scaled networks in a config: ``constructor="MuSOptimWrapperConstructor"``."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..layers import mus_param_groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MuSOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups by ``revnets.mus_param_groups``: hidden layers' learning rates by the transfer rules.

    In a config, with the weight decay fully decoupled, as ``mus_param_groups`` has it::

        optim_wrapper = dict(
            constructor="MuSOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=5e-5),
            paramwise_cfg=dict(base_width=64),
        )

    Args:
        optim_wrapper_cfg: of the optimizer and its wrapper.
        paramwise_cfg: ``base_width``, and ``width`` where one serves all hidden layers.

    Raises:
        ValueError: for other keys, or values that ``mus_param_groups`` refuses.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        found = dict(paramwise_cfg or {})
        if "base_width" not in found or not set(found) <= {"base_width", "width"}:
            raise ValueError(
                f"MuSOptimWrapperConstructor: paramwise_cfg={found!r}: expected base_width, the width at which the "
                "learning rate was found, and perhaps width; such as paramwise_cfg=dict(base_width=64)"
            )
        super().__init__(optim_wrapper_cfg, found)

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append the groups of the whole model."""
        params += mus_param_groups(module, self.base_lr, self.base_wd or 0.0, **self.paramwise_cfg)
