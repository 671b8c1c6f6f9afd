"""FLOPs of training by schedule: 2 per multiply-add; theoretical, since a kernel may not skip the zeros."""

from .schedules import SCHEDULES, Schedule


def step_flops(schedule: str, dense: float, sparse: float, interval: int = 100) -> float:
    r"""FLOPs of a training step, on average (RigL, 1911.11134, appendix H).

    .. math:: dense: 3f \qquad static, SET: 3 f_s \qquad RigL: (3 f_s \Delta T + 2 f_s + f) / (\Delta T + 1)

    Where forward FLOPs come from is up to the caller; ``revnets.layers.count_costs`` counts them from the masks.
    Recomputation is not in it: see ``run_flops``.

    Args:
        schedule: ``dense``, ``static``, ``set`` or ``rigl``.
        dense: ``f``, FLOPs of the forward pass as if all weights were there.
        sparse: ``f_s``, with the active ones; ``f * (1 - s)`` where everything is sparse.
        interval: ``ΔT`` of RigL.

    Raises:
        ValueError: for an unknown schedule.

    Example:
        >>> step_flops("dense", 100, 25), step_flops("static", 100, 25), step_flops("rigl", 100, 25, interval=4)
        (300, 75, 90.0)
    """
    if schedule == "dense":
        return 3 * dense
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: expected one of dense, {', '.join(SCHEDULES)}")
    if schedule == "rigl":
        return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    return 3 * sparse


def run_flops(schedule: Schedule, dense: float, sparse: float, steps: int, recomputed: float = 0.0) -> float:
    """FLOPs of the first ``steps`` training steps, counted step by step rather than on average.

    A step that gathers dense gradients costs ``2 f_s + f``, every other one ``3 f_s``; after its end RigL costs what
    ``static`` costs.

    Args:
        schedule: of the masks.
        dense: ``f`` of a step, for the whole batch.
        sparse: ``f_s`` of a step.
        steps: done so far.
        recomputed: FLOPs of a step that the backward pass evaluates anew, ``f_s`` of a reversible network.

    Example:
        >>> run_flops(Schedule("rigl", total_steps=100, interval=10, end=0.5), dense=100, sparse=25, steps=100)
        7800
    """
    gathered = schedule.updates(steps) if schedule.name == "rigl" else 0
    return (3 * sparse + recomputed) * steps + (dense - sparse) * gathered
