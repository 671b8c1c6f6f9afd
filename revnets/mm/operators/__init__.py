"""A stand-in for mmcv's compiled operators: what detectors need, by torchvision's kernels and plain torch.

``mmcv.ops`` calls functions of an extension module ``mmcv._ext`` that write into tensors they are given. Where a
compiled one is installed it is used; otherwise ``install`` puts the functions below, with mmcv's signatures, in its
place, in this process. ``plug_in`` does it for all that start later.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch

from .attention import psamask_backward, psamask_forward
from .boxes import nms, nms_match, softnms
from .common import MissingOperatorError, get_compiler_version, get_compiling_cuda_version
from .deformable import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from .losses import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .plug_in import NAME, is_ours
from .regions import (
    roi_align_backward,
    roi_align_forward,
)
from .upsampling import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    masked_col2im_forward,
    masked_im2col_forward,
)


def install() -> bool:
    """Put the stand-in where ``mmcv.ops`` looks, unless a compiled extension is there.

    Returns:
        whether the stand-in is in use.

    Raises:
        ImportError: when mmcv is not installed.
    """
    if NAME in sys.modules:
        module = sys.modules[NAME]
        return isinstance(module, _StandIn) or is_ours(getattr(module, "__file__", None))
    found = importlib.util.find_spec("mmcv")
    if found is None or found.origin is None:  # a folder with nothing but our file, left by an uninstalled mmcv
        raise ImportError("revnets.mm needs MMDetection: pip install 'revnets[detection]'")
    spec = importlib.util.find_spec(NAME)
    if spec is not None and not is_ours(spec.origin):
        return False
    sys.modules[NAME] = _StandIn(NAME)
    return True


class _StandIn(ModuleType):
    """Has every name; those without an implementation raise when they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__)
        self.__file__ = __file__
        self.__dict__.update(OPERATORS)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return operator(name)


def operator(name: str) -> Callable[..., Any]:
    """The stand-in of an operator; one that raises where there is none."""

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(
            f"mmcv operator {name!r} needs mmcv's compiled extension, which is not installed: install an mmcv "
            f"built with operators for torch {torch.__version__}; without one, there are {', '.join(OPERATORS)}"
        )

    return OPERATORS.get(name, missing)


OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        get_compiler_version,
        get_compiling_cuda_version,
        nms,
        softnms,
        nms_match,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        softmax_focal_loss_forward,
        softmax_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        carafe_naive_forward,
        carafe_naive_backward,
        carafe_forward,
        carafe_backward,
        masked_im2col_forward,
        masked_col2im_forward,
        psamask_forward,
        psamask_backward,
    )
}
"""By mmcv's names."""
