"""Mixed precision for MMEngine's runner on any device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast, whose range needs no loss scaling; on CPUs, too.

    MMEngine's ``AmpOptimWrapper`` is for GPUs only. Boxes stay float32: MMDetection makes anchors and RoIs in the type
    of the maps, and bfloat16 has steps of 8 pixels beyond 1024. So dense heads give, and RoI extractors get, float32.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> wrapper = Bf16OptimWrapper(optimizer=torch.optim.SGD([weight], lr=0.1))
        >>> with wrapper.optim_context(nn.Identity()):
        ...     (weight @ weight).dtype
        torch.bfloat16
    """

    _prepared: nn.Module | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[Any]:
        """Of the forward pass."""
        if model is not self._prepared:
            _keep_boxes_precise(model)
            self._prepared = model
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield


def _keep_boxes_precise(model: nn.Module) -> None:
    if "mmdet" not in sys.modules:  # a segmenter, say, which has neither
        return
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor

    for module in model.modules():
        if isinstance(module, BaseDenseHead):
            module.register_forward_hook(lambda head, inputs, outputs: _wide(outputs))
        elif isinstance(module, BaseRoIExtractor):
            module.register_forward_pre_hook(lambda extractor, inputs: _wide(inputs))


def _wide(value: Any) -> Any:
    """Nested sequences of tensors, with bfloat16 ones as float32."""
    if isinstance(value, (list, tuple)):
        return type(value)(_wide(each) for each in value)
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
