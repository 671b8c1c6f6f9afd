"""Networks built on the reversible engine, registered with timm under the names of their entry points.

Importing a module here registers its models; checkpoint conversion lives beside the network it serves.
"""

from . import mus_vit, revbifpn

__all__ = ["mus_vit", "revbifpn"]
