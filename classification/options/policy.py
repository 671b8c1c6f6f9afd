"""The words of `--aa`: timm passes over the parts of a policy that it does not understand, without a word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from revnets.training.errors import UserError, did_you_mean, shown
from revnets.training.options.values import Number

WHOLE, NUMBER, SHARE, FLAG = Number(int, 0), Number(float, 0), Number(float, 0, 1), Number(int, 0, 1)
NOISE = {"mstd": NUMBER}
RAND: Mapping[str, Number] = {"m": WHOLE, "n": WHOLE, "p": SHARE, "mmax": WHOLE, "inc": FLAG, **NOISE}
AUGMIX: Mapping[str, Number] = {"m": WHOLE, "w": WHOLE, "d": WHOLE, "a": NUMBER, "b": FLAG, **NOISE}
POLICIES: dict[str, Mapping[str, Number]] = {
    "rand": RAND,
    "augmix": AUGMIX,
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), NOISE),
}
TRANSFORMS = ("weights", "3a", "3aw")  # sets of RandAugment's, as `tweights`


def check_policy(words: str | None) -> None:
    """Refuses a policy with a part that timm would leave out, or read in another way than it is meant.

    Args:
        words: Of `--aa`, such as `rand-m9-mstd0.5`; None or nothing: no policy.

    Raises:
        UserError: Naming the part.

    Example:
        >>> check_policy("rand-m9-mstd0.5")
        >>> check_policy("rand-m9-foo")
        Traceback (most recent call last):
        revnets.training.errors.UserError: --aa: 'rand-m9-foo': timm does not read the part 'foo', rand takes m, n, p, \
mmax, inc, mstd with a number each, and t with one of weights, 3a, 3aw; correct it.
    """
    if not words:
        return
    name, *parts = words.split("-")
    if name not in POLICIES:
        raise UserError(
            f"--aa: {shown(words)}: timm has no policy {shown(name)}{did_you_mean(name, POLICIES)}; "
            f"give one of {', '.join(POLICIES)}."
        )
    seen: set[str] = set()
    for part in parts:
        key = _key(part, name)
        if key is None:
            kinds = f"{', '.join(POLICIES[name])} with a number each"
            kinds += f", and t with one of {', '.join(TRANSFORMS)}" if name == "rand" else ""
            raise UserError(
                f"--aa: {shown(words)}: timm does not read the part {shown(part)}, {name} takes {kinds}; correct it."
            )
        if key in seen:
            raise UserError(f"--aa: {shown(words)} has {key} twice, of which one would be left out; give it once.")
        seen.add(key)


def _key(part: str, name: str) -> str | None:
    """What a part sets, or None where it is none."""
    if name == "rand" and part.startswith("t"):
        return "t" if part[1:] in TRANSFORMS else None
    found = re.fullmatch(r"([a-z]+)(\d.*)", part, re.ASCII)  # as timm takes them apart
    if found is None or found[1] not in POLICIES[name]:
        return None
    number: Any = POLICIES[name][found[1]]
    try:
        number.read(found[2])
    except (ValueError, OverflowError):
        return None
    return found[1]
