"""Memory and time of training steps: what they are on the device at hand.

Measures any module; knows nothing of particular networks.
"""

from .memory import StepMemory, measure_training_step

__all__ = ["StepMemory", "measure_training_step"]
