"""The largest batch or image whose training step fits a memory budget, from few predictions."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..training.options.values import Number, check_choice
from .fake import ProfileError
from .predict import StepPrediction
from .profile import predict
from .target import Setting, Target, with_size

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
          "TIB": 2**40}  # fmt: skip


BYTES = Number(int, 1, 2**63 - 1)


def parse_budget(text: str) -> int:
    """Bytes of a size such as ``24GB`` (10^9 bytes each) or ``24GiB`` (2^30 each).

    Raises:
        ProfileError: for anything else.

    Example:
        >>> parse_budget("24GB"), parse_budget("1.5 GiB")
        (24000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or not 1 <= float(match[1]) * factor < 2**63:
        raise ProfileError(
            f"budget {text[:100]!r}: expected a size such as 24GB (10^9 bytes), 24GiB (2^30) or 16000MB, at least a "
            "byte and below 2^63 of them"
        )
    return int(float(match[1]) * factor)


WHAT = ("batch", "image")
"""What may be looked for."""


class DoesNotFitError(ProfileError):
    """Not even one sample, or the smallest image, fits the budget."""


@dataclass(frozen=True)
class Fit:
    """The largest target that fits.

    Attributes:
        target: with its batch or image.
        predicted: its step; the next larger one would need ``next_bytes``.
        next_bytes: peak of the next larger batch or image.
        probes: predictions it took.
    """

    target: Target
    predicted: StepPrediction
    next_bytes: int
    probes: int


def largest(need: Callable[[int], int], budget: int, power: int = 1) -> int:
    """The largest n >= 1 with ``need(n) <= budget``, or 0; ``need`` grows, and nearly in proportion to n^power.

    Two probes nearly say it: the line through the last two points gives the next probe, halving takes over if it lies.

    Example:
        >>> largest(lambda n: 10 + 3 * n, 100)
        30
    """
    low, low_need, high = 1, need(1), 0  # low fits; high, once there is one, does not
    if low_need > budget:
        return 0
    probe = 4
    for count in itertools.count():
        value = need(probe)
        slope = max((value - low_need) / (probe**power - low**power), 1.0)
        guess = int((low**power + (budget - low_need) / slope) ** (1 / power))
        if value <= budget:
            low, low_need = probe, value
        else:
            high = probe
        if high == low + 1:
            return low
        probe = max(guess, low + 1)
        if high:
            probe = min(probe, high - 1) if count < 6 else (low + high) // 2
    raise AssertionError("unreachable")


def fit(target: Target, setting: Setting, budget: int, what: str = "batch") -> Fit:
    """The largest batch (or image side) of ``target`` whose predicted peak is at most ``budget`` bytes.

    Args:
        target: its batch, or its image side, is what is looked for.
        setting: of the step; parameters, gradients and optimizer state count.
        budget: bytes that tensors may take. An allocator's reserve and the device's context come on top.
        what: ``"batch"`` or ``"image"``.

    Raises:
        DoesNotFitError: when not even one sample (or the smallest image) fits; says what it needs.
        ValueError: for a budget that is no number of bytes, or another ``what``.
    """
    BYTES.check("budget", budget)
    check_choice("what", what, WHAT)
    step = 1 if what == "batch" else target.divisor(setting)
    known: dict[int, StepPrediction] = {}

    def sized(n: int) -> Target:
        return with_size(target, batch_size=n) if what == "batch" else with_size(target, img_size=n * step)

    def peak(n: int) -> int:
        if n not in known:
            known[n] = predict(sized(n), setting)
        return known[n].peak_bytes

    n = largest(peak, budget, 1 if what == "batch" else 2)
    if n == 0:
        raise DoesNotFitError(
            f"{target.name} ({target.mode_name}) @{sized(1).img_size}: not even batch {sized(1).batch_size} fits "
            f"{budget / 1e9:.3g} GB, it needs {peak(1) / 1e9:.3g} GB (1 GB = 10^9 bytes)"
        )
    return Fit(sized(n), known[n], peak(n + 1), len(known))
