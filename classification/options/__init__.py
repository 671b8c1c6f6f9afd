"""Options of the scripts: declared once, with the values each takes and the others it needs.

What options are in general is in `revnets.training.options`; what their values do is in the rooms that read them.
"""

from .learning import SparsityOptions
from .scripts import (
    CONFIGS,
    DataOptions,
    DeviceOptions,
    ModelOptions,
    TrainOptions,
    ValidateOptions,
    as_dict,
    from_checkpoint_args,
    renamed,
)

__all__ = [
    "CONFIGS",
    "DataOptions",
    "DeviceOptions",
    "ModelOptions",
    "SparsityOptions",
    "TrainOptions",
    "ValidateOptions",
    "as_dict",
    "from_checkpoint_args",
    "renamed",
]
