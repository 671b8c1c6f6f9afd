"""The MMDetection side, named in a config's ``custom_imports``: backbones, neck, hooks, resumable loop, ``mmcv.ops``.

Importing it registers them, and makes ``import mmcv.ops`` work where mmcv was installed without compiled operators.
"""

from .operators import install

install()  # before anything imports mmdet.models

from .amp import Bf16OptimWrapper  # noqa: E402
from .backbone import RevBiFPN, TimmBackbone  # noqa: E402
from .checkpoint import WholeCheckpointHook  # noqa: E402
from .hooks import MemoryReportHook  # noqa: E402
from .hrfpn import LeanHRFPN  # noqa: E402
from .layers import register_conv_layers  # noqa: E402
from .mus_optim import MuSOptimWrapperConstructor  # noqa: E402
from .neck import RevBiFPNNeck  # noqa: E402
from .resume import ResumableTrainLoop  # noqa: E402
from .sparsity_hook import SparsityHook  # noqa: E402

register_conv_layers()

__all__ = [
    "Bf16OptimWrapper",
    "LeanHRFPN",
    "MemoryReportHook",
    "MuSOptimWrapperConstructor",
    "ResumableTrainLoop",
    "RevBiFPN",
    "RevBiFPNNeck",
    "SparsityHook",
    "TimmBackbone",
    "WholeCheckpointHook",
]
