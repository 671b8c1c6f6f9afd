"""The OpenMMLab side, named in a config's ``custom_imports``: backbones, neck, hooks, resumable loop, ``mmcv.ops``.

Importing it registers them for MMDetection, mmsegmentation, mmpose or whichever of MMEngine's toolboxes a config is of,
makes ``import mmcv.ops`` work where mmcv was installed without compiled operators, and has MMEngine read checkpoints
without running what is in them (``loading``).
"""

import sys

from .operators import install

try:
    install()  # before anything imports mmdet.models
except ImportError as error:
    if sys.argv[:1] != ["-m"]:  # that is `python -m revnets.mm`, which imports this first
        raise
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)

from .amp import Bf16OptimWrapper
from .hooks.budget import MemoryBudgetHook
from .hooks.checkpoint import WholeCheckpointHook
from .hooks.guard import DriftHook, FiniteHook
from .hooks.memory import MemoryReportHook
from .hooks.numerics import NumericsHook
from .hooks.resume import ResumableTrainLoop
from .hooks.resume_check import ResumeCheckHook
from .hooks.sparsity import SparsityHook
from .hooks.training_flops import TrainingFlopsHook
from .loading import install as load_safely
from .mus_optim import MuSOptimWrapperConstructor
from .networks.backbone import RevBiFPN, TimmBackbone
from .networks.layers import register_conv_layers
from .networks.neck import RevBiFPNNeck
from .networks.registry import has_mmdet

register_conv_layers()
load_safely()
if has_mmdet():  # what extends its classes is missing without it, and no other toolbox asks for it
    from .coco import CheckedCocoDataset, CheckedCocoMetric
    from .networks.hrfpn import LeanHRFPN

__all__ = [
    "Bf16OptimWrapper",
    "DriftHook",
    "FiniteHook",
    "MemoryBudgetHook",
    "MemoryReportHook",
    "MuSOptimWrapperConstructor",
    "NumericsHook",
    "ResumableTrainLoop",
    "ResumeCheckHook",
    "RevBiFPN",
    "RevBiFPNNeck",
    "SparsityHook",
    "TimmBackbone",
    "TrainingFlopsHook",
    "WholeCheckpointHook",
]
if has_mmdet():
    __all__ += ["CheckedCocoDataset", "CheckedCocoMetric", "LeanHRFPN"]
