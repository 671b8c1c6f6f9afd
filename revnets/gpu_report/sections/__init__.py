"""The sections of the report, one file each. A new one is a decorated function in a file that is imported here."""

from ..registry import REPORT
from . import detector, digits, fp8, machine, networks, prediction, semi_structured, tests

__all__ = ["REPORT", "detector", "digits", "fp8", "machine", "networks", "prediction", "semi_structured", "tests"]
