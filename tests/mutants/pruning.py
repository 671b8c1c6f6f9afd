"""Faults of pruning: one-shot pruning: which weights go, what the others become, statistics afterwards, distillation."""

from .fault import Fault

FAULTS = (
    Fault(
        "global-empties",
        "revnets/pruning/choice.py",
        old="together.topk(min(count, total - len(scores)), largest=False)",
        new="together.topk(count, largest=False)",
        tests=(
            "tests/pruning/test_prune.py",
            "tests/pruning/test_solve.py",
        ),
    ),
    Fault(
        "solve-dead-inputs",
        "revnets/pruning/solve.py",
        old="scores.masked_fill(dead[..., start:stop][..., some], -1).masked_fill",
        new="scores.masked_fill",
        tests=("tests/pruning/test_solve.py",),
    ),
    Fault(
        "solve-pattern",
        "revnets/pruning/solve.py",
        old="[..., : target.of - target.kept]",
        new="[..., : target.kept]",
        tests=("tests/pruning/test_solve.py",),
    ),
    Fault(
        "solve-quota",
        "revnets/pruning/solve.py",
        old="self.extra = max(target - int(gone.sum()), 0)",
        new="self.extra = max(target, 0)",
        tests=("tests/pruning/test_solve.py",),
    ),
    Fault(
        "calibration-mean",
        "revnets/pruning/calibration.py",
        old="norm.running_mean += mean - old_mean",
        new="norm.running_mean.copy_(mean)",
        tests=("tests/pruning/test_prune.py",),
    ),
    Fault(
        "calibration-shared",
        "revnets/pruning/calibration.py",
        old="missing.update({name: self.calls[name] - missing[name] for name in moments})",
        new="missing.update({name: 1 - missing[name] for name in moments})",
        tests=("tests/pruning/test_prune.py",),
    ),
    Fault(
        "zeros-all",
        "revnets/pruning/zeros.py",
        old="return 0 < int((weight == 0).sum()) < weight.numel()",
        new="return 0 < int((weight == 0).sum()) <= weight.numel()",
        tests=("tests/pruning/test_densify.py",),
    ),
    Fault(
        "densify-frozen",
        "revnets/pruning/densify.py",
        old="parameter.requires_grad_(getattr(module, leaf).requires_grad)",
        new="pass",
        tests=("tests/pruning/test_densify.py",),
    ),
    Fault(
        "distil-teacher-gradient",
        "revnets/pruning/distillation.py",
        old="t = t.detach().float()",
        new="t = t.float()",
        tests=("tests/pruning/test_distillation.py",),
    ),
    Fault(
        "inputs-kernel-first",
        "revnets/pruning/inputs.py",
        old="order = (1, 0, 4, 3, 2) if self.kernel_first else (1, 0, 4, 2, 3)",
        new="order = (1, 0, 4, 2, 3)",
        tests=("tests/pruning/test_inputs.py",),
    ),
)
