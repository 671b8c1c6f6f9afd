"""The MMDetection side; name it in a config's ``custom_imports``: backbones, the neck, hooks, ``mmcv.ops``.

Importing it registers them, and makes ``import mmcv.ops`` work where mmcv was installed without compiled operators.
"""

from .operators import install

install()  # before anything imports mmdet.models

from .backbone import RevBiFPN, TimmBackbone  # noqa: E402
from .hooks import MemoryReportHook  # noqa: E402
from .neck import RevBiFPNNeck  # noqa: E402

__all__ = ["MemoryReportHook", "RevBiFPN", "RevBiFPNNeck", "TimmBackbone"]
