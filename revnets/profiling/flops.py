"""Floating-point operations of the ops that run: 2 per multiply-add (MAC), recomputation included because it runs."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _conv_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Each of the two gradients costs what the forward pass costs.

    torch's own formula (2.15 included) forgets the groups in the weight's gradient: depthwise, a factor of channels.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = rest
    return conv_flop_count(x, weight, grad, transposed) * (output_mask[0] + output_mask[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_OURS = {
    aten.convolution_backward: _conv_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch 2.11 has no formula for them
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# FlopCounterMode is not entered: its module hooks would keep tensors alive while memory is being followed.
_FORMULAS = FlopCounterMode(display=False, custom_mapping=_OURS).flop_registry


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one call of an aten op; 0 for ops that are no products of matrices.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
        >>> count_flops(torch.ops.aten.mm.default, (a, b), {}, a @ b)
        60
    """
    formula = _FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)
