"""Memory-efficient vision backbones on PyTorch.

Importing this package registers the networks with timm, and nothing heavier: no mmdet, scikit-learn or matplotlib.
"""

from .version import __version__

__all__ = ["__version__"]
