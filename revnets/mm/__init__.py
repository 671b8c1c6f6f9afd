"""The MMDetection side, named in a config's ``custom_imports``: backbones, neck, hooks, resumable loop, ``mmcv.ops``.

Importing it registers them, makes ``import mmcv.ops`` work where mmcv was installed without compiled operators, and has
MMEngine read checkpoints without running what is in them (``loading``).
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
from .backbone import RevBiFPN, TimmBackbone
from .checkpoint import WholeCheckpointHook
from .coco import CheckedCocoDataset, CheckedCocoMetric
from .guard import DriftHook, FiniteHook
from .hooks import MemoryReportHook
from .hrfpn import LeanHRFPN
from .layers import register_conv_layers
from .loading import install as load_safely
from .mus_optim import MuSOptimWrapperConstructor
from .neck import RevBiFPNNeck
from .numerics_hook import NumericsHook
from .resume import ResumableTrainLoop
from .resume_check import ResumeCheckHook
from .sparsity_hook import SparsityHook
from .training_flops import TrainingFlopsHook

register_conv_layers()
load_safely()

__all__ = [
    "Bf16OptimWrapper",
    "CheckedCocoDataset",
    "CheckedCocoMetric",
    "DriftHook",
    "FiniteHook",
    "LeanHRFPN",
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
