"""Many predictions at once: whole families of networks, growing depth, growing images."""

import re
from collections.abc import Sequence
from dataclasses import replace

from .fake import ProfileError
from .target import Setting, Target, is_reversible, parse_targets

KINDS = ("families", "depth", "resolution")

FAMILIES = (
    *(f"revbifpn_s{i}" for i in range(7)),
    *(f"efficientnet_b{i}" for i in range(8)),
    *(f"hrnet_w{i}" for i in (18, 32, 48)),
    *(f"resnet{i}" for i in (18, 50, 101)),
)
"""Compared by default, at their published image sizes."""

SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)


def family(name: str) -> str:
    """What the sizes of a network have in common in their names.

    Example:
        >>> [family(n) for n in ("revbifpn_s0", "efficientnet_b7", "hrnet_w18_small", "resnet50")]
        ['revbifpn', 'efficientnet', 'hrnet', 'resnet']
    """
    return re.sub(r"(_[a-z])?\d.*$", "", name) or name


def targets(kind: str, given: Sequence[Target], setting: Setting) -> list[Target]:
    """The targets of a sweep.

    Args:
        kind: one of ``KINDS``.
        given: what was named on the command line: the first network is swept (by depth: all); more than one
            replace ``FAMILIES``.
        setting: of all of them.

    Raises:
        ProfileError: for an unknown kind, or a network that cannot be made deeper.
    """
    if not given:
        raise ProfileError("a sweep needs a network: give one")
    first = [t for t in given if t.title == given[0].title]
    if kind == "families":
        if len({t.name for t in given}) > 1:
            return list(given)
        batch, modes = given[0].batch_size, {t.mode for t in given}
        found = [t for name in FAMILIES for t in parse_targets(name, setting, batch_size=batch)]
        return [t for t in found if t.mode in modes or not is_reversible(t.name)]
    if kind == "depth":
        swept = [deeper for t in given for deeper in t.deeper()]
        if not any(t.options for t in swept):
            raise ProfileError(f"--sweep depth adds silos, and {first[0].name} has none: expected a revbifpn")
        return swept
    if kind == "resolution":
        step = first[0].divisor(setting)
        sides = sorted({max(round(first[0].img_size * scale / step), 1) * step for scale in SCALES})
        return [replace(t, img_size=side) for t in first for side in sides]
    raise ProfileError(f"unknown sweep {kind!r}: expected some of {', '.join(KINDS)}")
