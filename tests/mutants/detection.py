"""Faults of detection: scenes in COCO's format, figures of a run."""

from .fault import Fault

FAULTS = (
    Fault(
        "scenes-run-lengths",
        "detection/digits.py",
        old="return [0, *lengths] if flat[0] else lengths",
        new="return lengths",
        tests=("tests/detection/test_scenes.py",),
    ),
    Fault(
        "scenes-overlap",
        "detection/digits.py",
        old="/ min(a[2] * a[3], b[2] * b[3])",
        new="/ max(a[2] * a[3], b[2] * b[3])",
        tests=("tests/detection/test_scenes.py",),
    ),
    Fault(
        "report-infinite",
        "revnets/training/files.py",
        old="isinstance(value, float) and not math.isfinite(value)",
        new="isinstance(value, float) and value != value",
        tests=("tests/detection/test_figures.py",),
    ),
    Fault(
        "progress-resumed",
        "detection/progress.py",
        old="self.validations = list(runner.message_hub.runtime_info.get(VALIDATIONS, []))",
        new="self.validations = []",
        tests=("tests/detection/test_figures.py",),
    ),
    Fault(
        "progress-metrics",
        "detection/report.py",
        old='key.endswith(("_mAP", "_mAP_50"))',
        new='key.endswith("_mAP")',
        tests=("tests/detection/test_figures.py",),
    ),
)
