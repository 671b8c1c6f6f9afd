"""Whether rebuilt activations are still the true ones, looked at now and then while training."""

import math

from torch import Tensor, nn

from ...reversible import RangeError, RevSequential, check_reversibility

EVERY, LIMIT = 500, 1e-2
REMEDY = (
    "gradients are computed from wrong activations; turn exact mode on (exact=True), or keep the stream in float32 and "
    "only autocast the branches"
)


class DriftMonitor:
    """Undoes the reversible chains of a model on one image every so many steps, and says when that goes wrong.

    It costs an extra forward pass and inversion of one image; weights, statistics and generators stay as they are.
    Nothing happens to models without reversible chains or in another mode.

    Args:
        model: Not wrapped.
        every: Steps between two looks, the first included; 0: never.
        limit: Largest error of a rebuilt activation, relative to the largest activation, that is nothing to warn of.

    Example:
        >>> DriftMonitor(nn.Linear(1, 1)).due(0)
        False
    """

    def __init__(self, model: nn.Module, every: int = EVERY, limit: float = LIMIT) -> None:
        self.model, self.every, self.limit = model, every, limit
        self.worst = 0.0
        self._warned = limit
        self._chains = [module for module in model.modules() if isinstance(module, RevSequential)]

    def due(self, step: int) -> bool:
        """Whether to look in this step (from 0)."""
        return self.every > 0 and step % self.every == 0 and any(c.mode == "reversible" for c in self._chains)

    def check(self, images: Tensor) -> str:
        """Looks; gives the words of a warning, or nothing, as for numbers that went wrong before.

        Args:
            images: ``(N, C, H, W)``, of which two are used: batch norms take no single one where maps are of one pixel.
        """
        images = images[:2]
        if not bool(images.isfinite().all()):
            return ""
        try:
            report = check_reversibility(self.model, images)
        except RangeError:  # the step itself will say so
            return ""
        worst = max(report.ops, key=lambda op: math.inf if op.relative != op.relative else op.relative)
        self.worst = worst.relative
        if worst.relative <= self._warned or math.isnan(self._warned):
            return ""
        self._warned = 10 * worst.relative  # again only when it is much worse; never after NaN
        return (
            f"rebuilt activations are off by {worst.relative:.1e} of the largest at {worst.name} ({worst.kind}), "
            f"{self.limit:.0e} is harmless: {REMEDY}"
        )


def part(images: Tensor, size: int = 256) -> Tensor:
    """The middle of the first of some images, to look at little: ``(1, C, size, size)`` or what there is."""
    top, left = ((max(0, n - size) // 2) for n in images.shape[-2:])
    return images[:1, ..., top : top + size, left : left + size]
