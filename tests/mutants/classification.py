"""Faults of classification: the loop on timm's parts: accumulation, ranking of checkpoints, averages, data."""

from .fault import Fault

FAULTS = (
    Fault(
        "ckpt-nonfinite",
        "classification/run/checkpoints.py",
        old="        if metric is not None and not math.isfinite(metric):\n            metric = None\n",
        new="",
        tests=("tests/classification/run/test_checkpoints.py",),
    ),
    Fault(
        "ckpt-ties",
        "classification/run/checkpoints.py",
        old="ranked = [file for file in [*files, mine] if file[1] is not None]",
        new="ranked = [file for file in [mine, *files] if file[1] is not None]",
        tests=("tests/classification/run/test_checkpoints.py",),
    ),
    Fault(
        "ckpt-direction",
        "classification/run/checkpoints.py",
        old="ranked.sort(key=lambda file: file[1] or 0.0, reverse=not self.decreasing)",
        new="ranked.sort(key=lambda file: file[1] or 0.0, reverse=True)",
        tests=("tests/classification/run/test_checkpoints.py",),
    ),
    Fault(
        "ckpt-unranked-first",
        "classification/run/checkpoints.py",
        old="files = [*ranked, *(file for file in [mine, *files] if file[1] is None)]",
        new="files = [*(file for file in [mine, *files] if file[1] is None), *ranked]",
        tests=("tests/classification/run/test_checkpoints.py",),
    ),
    Fault(
        "loop-last-group",
        "classification/run/loop.py",
        old="last_group = total % every or every",
        new="last_group = every",
        tests=("tests/classification/run/test_loop.py",),
    ),
    Fault(
        "loop-updates-before",
        "classification/run/training.py",
        old="+ -(-position.step // self.options.grad_accum_steps)",
        new="+ position.step // self.options.grad_accum_steps",
        tests=("tests/classification/run/test_loop.py",),
    ),
    Fault(
        "loop-updates-per-epoch",
        "classification/run/training.py",
        old="return -(-len(self.data.loader) // self.options.grad_accum_steps)",
        new="return len(self.data.loader) // self.options.grad_accum_steps",
        tests=("tests/classification/run/test_loop.py",),
    ),
    Fault(
        "loop-mean-of-losses",
        "classification/run/loop.py",
        old="            if math.isfinite(value):\n",
        new="            if True:\n",
        tests=("tests/classification/run/test_loop.py",),
    ),
    Fault(
        "loop-average-skipped",
        "classification/run/loop.py",
        old="if run.ema is not None and updated:",
        new="if run.ema is not None:",
        tests=("tests/classification/run/test_loop.py",),
    ),
    Fault(
        "data-mixup-off",
        "classification/images/data.py",
        old="if off_epoch and epoch >= off_epoch:",
        new="if off_epoch and epoch > off_epoch:",
        tests=("tests/classification/run/test_loop.py",),
    ),
    Fault(
        "validate-last-batch",
        "classification/run/loop.py",
        old='result = {"loss": loss_sum / count,',
        new='result = {"loss": loss_sum / max(len(loader), 1),',
        tests=("tests/classification/run/test_loop.py",),
    ),
)
