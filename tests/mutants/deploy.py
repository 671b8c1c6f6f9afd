"""Faults of deploy: graphs swapped for the kernel, INT8."""

from .fault import Fault

FAULTS = (
    Fault(
        "lower-alpha",
        "revnets/deploy/lower.py",
        old='if user is not None and user.target in _ADDS and argument(user, "alpha") == 1:',
        new="if user is not None and user.target in _ADDS:",
        tests=("tests/deploy/test_lower.py",),
    ),
    Fault(
        "lower-hardtanh",
        "revnets/deploy/lower.py",
        old='(argument(node, "min_val"), argument(node, "max_val")) == (0, 6)',
        new='argument(node, "max_val") == 6',
        tests=("tests/deploy/test_lower.py",),
    ),
    Fault(
        "lower-residual-changed",
        "revnets/deploy/lower.py",
        old="if residual is not None and is_changed(residual, last, user):",
        new="if False:",
        tests=("tests/deploy/test_lower.py",),
    ),
    Fault(
        "graph-norm-in-training",
        "revnets/deploy/graph.py",
        old=' or argument(norm, "training"):',
        new=":",
        tests=(
            "tests/deploy/test_lower.py",
            "tests/deploy/test_programs.py",
        ),
    ),
    Fault(
        "graph-shared-conv",
        "revnets/deploy/graph.py",
        old="and list(conv.users) == [user]",
        new="",
        tests=(
            "tests/deploy/test_lower.py",
            "tests/deploy/test_programs.py",
        ),
    ),
    Fault(
        "bind-align-corners",
        "revnets/deploy/bind.py",
        old='if not _is_image(source) or argument(node, "align_corners"):',
        new="if not _is_image(source):",
        tests=(
            "tests/deploy/test_lower.py",
            "tests/deploy/test_programs.py",
        ),
    ),
    Fault(
        "quantize-images",
        "revnets/deploy/quantize.py",
        old="batch = batch[: images - found].float().cpu()",
        new="batch = batch[:images].float().cpu()",
        tests=("tests/deploy/test_engines.py",),
    ),
    Fault(
        "graph-nan-error",
        "revnets/deploy/graph.py",
        old='return max((error if error == error else float("inf") for error in errors), default=0.0)',
        new="return max(errors, default=0.0)",
        tests=(
            "tests/deploy/test_engines.py",
            "tests/deploy/test_lower.py",
        ),
    ),
    Fault(
        "choice-refused",
        "revnets/deploy/candidates.py",
        old="(one for one in made if not one.refused)",
        new="(one for one in made)",
        tests=("tests/deploy/test_choice.py",),
    ),
    Fault(
        "choice-ties",
        "revnets/deploy/candidates.py",
        old="return one.seconds, not one.dense",
        new="return one.seconds, one.dense",
        tests=("tests/deploy/test_choice.py",),
    ),
    Fault(
        "choice-drop",
        "revnets/deploy/precisions.py",
        old="if base - top1 > self.drop + 1e-9:",
        new="if base - top1 >= self.drop:",
        tests=("tests/deploy/test_choice.py",),
    ),
    Fault(
        "seal-note",
        "revnets/deploy/seal.py",
        old="for envelope in (_ENVELOPES[suffix], _NOTES[suffix]):",
        new="for envelope in (_ENVELOPES[suffix],):",
        tests=("tests/deploy/test_choice.py",),
    ),
)
