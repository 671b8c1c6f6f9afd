"""Faults of networks made reversible: which blocks can be, and what a stage does with them."""

from .fault import Fault

TESTS = ("tests/retrofit/test_reversible.py", "tests/retrofit/test_refusals.py")

FAULTS = (
    Fault(
        "retrofit-changed-input",
        "revnets/retrofit/probe.py",
        old='        if given._version:\n            return "changes its input in place"\n',
        new="",
        tests=TESTS,
    ),
    Fault(
        "retrofit-shape",
        "revnets/retrofit/probe.py",
        old="if output.shape != leaf.shape or output.dtype != leaf.dtype:",
        new="if output.dtype != leaf.dtype:",
        tests=TESTS,
    ),
    Fault(
        "retrofit-all-calls",
        "revnets/retrofit/probe.py",
        old="if not self.seen or reason:",
        new="if not self.seen:",
        tests=TESTS,
    ),
    Fault(
        "retrofit-children-changed",
        "revnets/retrofit/stage.py",
        old=" or list(self._modules) != known:",
        new=":",
        tests=TESTS,
    ),
    Fault(
        "retrofit-store-recomputes",
        "revnets/retrofit/stage.py",
        old='elif how == "again" and self.mode != "store":',
        new='elif how == "again":',
        tests=TESTS,
    ),
    Fault(
        "retrofit-autocast-grid",
        "revnets/retrofit/stage.py",
        old="            x = x.float()  # the streams",
        new="            pass  # the streams",
        tests=TESTS,
    ),
)
