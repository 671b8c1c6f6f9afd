"""The MMDetection side; name it in a config's ``custom_imports``.

Importing it makes ``import mmcv.ops`` work where mmcv was installed without compiled operators; see ``operators``.
"""

from .layers import register_conv_layers
from .operators import install

install()
register_conv_layers()
