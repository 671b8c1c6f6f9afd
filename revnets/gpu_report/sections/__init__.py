"""The sections of the report, one file each, in order of value. A new one is a decorated function in a file named here."""

from ..registry import REPORT
from . import machine, tests, networks, prediction, fp8, semi_structured, digits, detector  # noqa: I001 - their order

__all__ = ["REPORT", "detector", "digits", "fp8", "machine", "networks", "prediction", "semi_structured", "tests"]
