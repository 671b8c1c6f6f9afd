"""The MMDetection side; name it in a config's ``custom_imports``.

Importing it makes ``import mmcv.ops`` work where mmcv was installed without compiled operators; see ``operators``.
``SparsityHook`` changes the masks of sparse layers in a run.
"""

from .operators import install
from .sparsity_hook import SparsityHook

__all__ = ["SparsityHook"]

install()
