"""Faults of profiling: predicted and measured memory, FLOPs, and what fits a budget."""

from .fault import Fault

FAULTS = (
    Fault(
        "fit-at-the-budget",
        "revnets/profiling/fit.py",
        old="        if value <= budget:",
        new="        if value < budget:",
        tests=("tests/profiling/test_fit.py",),
    ),
    Fault(
        "flops-frozen",
        "revnets/profiling/flops.py",
        old="* (output_mask[0] + output_mask[1])",
        new="* 2",
        tests=("tests/profiling/test_flops.py",),
    ),
    Fault(
        "predict-kernel-memory",
        "revnets/profiling/predict.py",
        old="        if event.block is None:\n            now[name] -= event.change\n",
        new="",
        tests=("tests/profiling/test_predict.py",),
    ),
    Fault(
        "predict-foreach",
        "revnets/profiling/predict.py",
        old='if group.get("foreach", True) is None and not group.get("fused"):',
        new='if group.get("foreach", True) is None and group.get("fused"):',
        tests=("tests/profiling/test_predict.py",),
    ),
    Fault(
        "tracker-rounding",
        "revnets/profiling/tracker.py",
        old="nbytes = -(-storage.nbytes() // self._granularity) * self._granularity",
        new="nbytes = storage.nbytes()",
        tests=("tests/profiling/test_predict.py",),
    ),
    Fault(
        "fake-shared",
        "revnets/profiling/fake.py",
        old="for tensor in (*model.parameters(), *model.buffers()):",
        new="for tensor in model.parameters():",
        tests=("tests/profiling/test_predict.py",),
    ),
    Fault(
        "sweep-smallest",
        "revnets/profiling/sweep.py",
        old="max(round(first[0].img_size * scale / step), 1) * step",
        new="round(first[0].img_size * scale / step) * step",
        tests=("tests/profiling/test_profile_command.py",),
    ),
)
