"""Faults of kernels: the Python side of the kernel: plans, memory between layers, layouts, structures of masks."""

from .fault import Fault

FAULTS = (
    Fault(
        "kernel-mixed-layouts",
        "revnets/kernels/training.py",
        old="x, dy = pixels(x), pixels(dy)",
        new="dy = pixels(dy)",
        tests=("tests/kernels/test_training.py",),
    ),
    Fault(
        "kernel-gradients-without-mask",
        "revnets/kernels/masks.py",
        old="return product(grad, mask) if plain else grad * mask, None",
        new="return grad if plain else grad * mask, None",
        tests=("tests/kernels/test_masks.py",),
    ),
    Fault(
        "breakeven-of-one-forward-pass",
        "revnets/kernels/breakeven.py",
        old="twice = once[0] + kernel, once[1] + dense",
        new="twice = once",
        tests=("tests/kernels/test_breakeven.py",),
    ),
    Fault(
        "kernel-mask-version",
        "revnets/kernels/training.py",
        old=" or version != self._version or version < 0",
        new=" or version < 0",
        tests=(
            "tests/kernels/test_training_paths.py",
            "tests/kernels/test_training.py",
        ),
    ),
    Fault(
        "kernel-transposed-groups",
        "revnets/kernels/training.py",
        old="turned = ranks.view(groups, -1, inputs).transpose(1, 2).reshape(groups * inputs, -1)",
        new="turned = ranks.view(-1, inputs).t().reshape(groups * inputs, -1)",
        tests=("tests/kernels/test_training.py",),
    ),
    Fault(
        "windows-shifts",
        "revnets/kernels/frames.py",
        old="tuple(most - r for r in shifts)",
        new="tuple(shifts)",
        tests=("tests/kernels/test_windows.py",),
    ),
    Fault(
        "windows-first-input",
        "revnets/kernels/frames.py",
        old="first, most = stride * q + phase - pad, max(shifts)",
        new="first, most = phase, max(shifts)",
        tests=("tests/kernels/test_windows.py",),
    ),
    Fault(
        "windows-inputs-without-weights",
        "revnets/kernels/windows.py",
        old="if len(self._phases) < math.prod(g.stride):",
        new="if not self._phases:",
        tests=("tests/kernels/test_windows.py",),
    ),
    Fault(
        "breakeven-of-others",
        "revnets/kernels/breakeven.py",
        old="seconds = kept.setdefault(repr(case), seconds)",
        new="kept[repr(case)] = seconds",
        tests=("tests/kernels/test_breakeven.py",),
    ),
    Fault(
        "breakeven-of-one-layout",
        "revnets/kernels/breakeven.py",
        old="== (1, 1) else (False, True)",
        new="== (1, 1) else (False,)",
        tests=("tests/kernels/test_breakeven.py",),
    ),
    Fault(
        "breakeven-of-others-settings",
        "revnets/layers/sparse_ift/sparse.py",
        old="if structures is None or structures.settings != settings:",
        new="if structures is None:",
        tests=("tests/kernels/test_windows.py",),
    ),
    Fault(
        "plan-memory-reused",
        "revnets/kernels/shared.py",
        old="for v in offsets if last[v] >= born[root]",
        new="for v in offsets if last[v] > born[root]",
        tests=(
            "tests/kernels/test_calls.py",
            "tests/kernels/test_kernel.py",
        ),
    ),
    Fault(
        "call-unequal-factors",
        "revnets/kernels/calls.py",
        old="width * self._factors[1])",
        new="width * self._factors[0])",
        tests=("tests/kernels/test_calls.py",),
    ),
    Fault(
        "call-unequal-strides",
        "revnets/kernels/calls.py",
        old='"stride_h", "stride_w", "pad_h", "pad_w", "dil_h"',
        new='"stride_w", "stride_h", "pad_h", "pad_w", "dil_h"',
        tests=("tests/kernels/test_kernel.py",),
    ),
    Fault(
        "call-pool-padding",
        "revnets/kernels/calls.py",
        old='names = ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w")',
        new='names = ("kh", "kw", "stride_h", "stride_w", "pad_w", "pad_h")',
        tests=("tests/kernels/test_calls.py",),
    ),
    Fault(
        "chunks-columns",
        "revnets/kernels/calls.py",
        old="(columns.long() % size)[order]",
        new="(columns.long() % size)",
        tests=(
            "tests/kernels/test_kernel.py",
            "tests/kernels/test_training.py",
        ),
    ),
)
