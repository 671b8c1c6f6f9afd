"""Faults of reversible: gradients of shared and strided branches, statistics, randomness, the grid."""

from .fault import Fault

FAULTS = (
    Fault(
        "op-shared-param",
        "revnets/reversible/op.py",
        old="grad if former is None else former + grad",
        new="grad",
        tests=("tests/reversible/test_gradients.py",),
    ),
    Fault(
        "op-added-parameter",
        "revnets/reversible/op.py",
        old="if former is None and _memory(grad) in given:",
        new="if False:",
        tests=("tests/reversible/test_gradients.py",),
    ),
    Fault(
        "op-dense-grad",
        "revnets/reversible/op.py",
        old="return grad if torch.ops.aten.is_non_overlapping_and_dense(grad) else grad.clone()",
        new="return grad",
        tests=("tests/reversible/test_gradients.py",),
    ),
    Fault(
        "op-hooked-owner",
        "revnets/reversible/op.py",
        old='owner = id(getattr(p, "_stands_for", p))',
        new="owner = id(p)",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_autograd.py",
        ),
    ),
    Fault(
        "op-inverse-statistics",
        "revnets/reversible/op.py",
        old="activated(runner=active.runner or FrozenRunner())",
        new="activated(runner=active.runner)",
        tests=("tests/reversible/test_ops.py",),
    ),
    Fault(
        "op-views-exclusive",
        "revnets/reversible/op.py",
        old='step.shared["exclusive"] = False',
        new='step.shared["exclusive"] = True',
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_ops.py",
        ),
    ),
    Fault(
        "op-value-in-disguise",
        "revnets/reversible/op.py",
        old="if value.is_leaf or value._is_view():",
        new="if value.is_leaf:",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_ops.py",
        ),
    ),
    Fault(
        "node-in-stack",
        "revnets/reversible/node.py",
        old="activated(in_stack=True, runner=None, record=None, playback=None)",
        new="activated(runner=None, record=None, playback=None)",
        tests=("tests/reversible/test_gradients.py",),
    ),
    Fault(
        "coupling-dense",
        "revnets/reversible/coupling.py",
        old=", dense_grad=True)",
        new=")",
        tests=("tests/reversible/test_gradients.py",),
    ),
    Fault(
        "coupling-needs-grad",
        "revnets/reversible/coupling.py",
        old="needs_grad=step.needs_input_grad[0], dense_grad",
        new="needs_grad=step.needs_input_grad[-1], dense_grad",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_autograd.py",
        ),
    ),
    Fault(
        "parallel-narrowed",
        "revnets/reversible/parallel.py",
        old="rewound(op, step.narrowed(k), ",
        new="rewound(op, step, ",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_autograd.py",
        ),
    ),
    Fault(
        "silo-needs-grad",
        "revnets/reversible/silo.py",
        old='needs_grad = direction == "up" or step.needs_input_grad[source]',
        new="needs_grad = step.needs_input_grad[min(source, len(step.needs_input_grad) - 1)]",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_autograd.py",
        ),
    ),
    Fault(
        "sequential-first-input",
        "revnets/reversible/sequential.py",
        old="if any(x.requires_grad for x in xs):",
        new="if xs[0].requires_grad:",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_autograd.py",
        ),
    ),
    Fault(
        "grid-max-abs",
        "revnets/reversible/grid.py",
        old="return torch.maximum(high, -low)",
        new="return high",
        tests=(
            "tests/reversible/test_grid.py",
            "tests/reversible/test_range_checks.py",
        ),
    ),
    Fault(
        "grid-head-room",
        "revnets/reversible/grid.py",
        old="return 2.0 ** (_MANTISSA_BITS[dtype] - 2 - grid_bits)",
        new="return 2.0 ** (_MANTISSA_BITS[dtype] - grid_bits)",
        tests=("tests/reversible/test_grid.py",),
    ),
    Fault(
        "replay-rng-left",
        "revnets/reversible/replay.py",
        old="    finally:\n        _set_rng_state(now)",
        new="    finally:\n        pass",
        tests=("tests/reversible/test_modes.py",),
    ),
    Fault(
        "mode-in-stack",
        "revnets/reversible/mode.py",
        old="return recording(record, tree(owner), *xs), _again(record, owner, in_stack)",
        new="return recording(record, tree(owner), *xs), _again(record, owner, False)",
        tests=(
            "tests/reversible/test_gradients.py",
            "tests/reversible/test_modes.py",
        ),
    ),
    Fault(
        "check-nan",
        "revnets/reversible/check.py",
        old='return float("nan") if any(e != e for e in errors) else max(errors)',
        new="return max(errors)",
        tests=("tests/reversible/test_check.py",),
    ),
)
