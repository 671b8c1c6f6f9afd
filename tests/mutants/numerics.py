"""Faults of numerics: what FP8 flushes and clips."""

from .fault import Fault

FAULTS = (
    Fault(
        "stats-flushed-tie",
        "revnets/numerics/stats.py",
        old="(size <= LEAST[dtype] / 2 / scale)",
        new="(size < LEAST[dtype] / 2 / scale)",
        tests=("tests/numerics/test_monitor.py",),
    ),
    Fault(
        "stats-clipped-tie",
        "revnets/numerics/stats.py",
        old="size > torch.finfo(dtype).max / scale",
        new="size >= torch.finfo(dtype).max / scale",
        tests=("tests/numerics/test_monitor.py",),
    ),
    Fault(
        "stats-half",
        "revnets/numerics/stats.py",
        old="        size = size.float()\n",
        new="        pass\n",
        tests=("tests/numerics/test_monitor.py",),
    ),
    Fault(
        "monitor-resumed",
        "revnets/numerics/monitor.py",
        old='if r["step"] < step]',
        new='if r["step"] <= step]',
        tests=("tests/numerics/test_monitor.py",),
    ),
    Fault(
        "monitor-grad-scale",
        "revnets/numerics/monitor.py",
        old="else self.grad_scale\n",
        new="else 1.0\n",
        tests=("tests/numerics/test_monitor.py",),
    ),
)
