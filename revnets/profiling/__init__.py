"""Memory, FLOPs and time of training steps: predicted on fake tensors, measured on the device at hand.

Works on any module and knows nothing of particular networks; `target.py` alone turns names into networks, and there
other rooms register how theirs are read. Kernels are timed in `revnets.benchmarks`.
"""

from .fake import ProfileError
from .memory import StepMemory, measure_training_step
from .predict import StepPrediction, predict_training_step

__all__ = ["ProfileError", "StepMemory", "StepPrediction", "measure_training_step", "predict_training_step"]
