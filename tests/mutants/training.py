"""Faults of training: what all training loops share: finite guards, drift, data that can be resumed."""

from .fault import Fault

FAULTS = (
    Fault(
        "finite-scaler-limit",
        "revnets/training/guards/finite.py",
        old="        if skipped:\n            self.failed()\n            return False",
        new="        if skipped:\n            return False",
        tests=("tests/training/guards/test_finite.py",),
    ),
    Fault(
        "finite-scale-grows",
        "revnets/training/guards/finite.py",
        old="float(self.scaler.get_scale()) < self._before",
        new="float(self.scaler.get_scale()) != self._before",
        tests=("tests/training/guards/test_finite.py",),
    ),
    Fault(
        "finite-in-a-row",
        "revnets/training/guards/finite.py",
        old="            self.in_a_row = 0\n            self._keep()",
        new="            self._keep()",
        tests=("tests/training/guards/test_finite.py",),
    ),
    Fault(
        "finite-losses-kept",
        "revnets/training/guards/finite.py",
        old="        self._losses, self._reason = [], reason\n",
        new="        self._reason = reason\n",
        tests=("tests/training/guards/test_finite.py",),
    ),
    Fault(
        "finite-accumulated",
        "revnets/training/guards/finite.py",
        old="numbers = [loss.float().sum() for loss in self._losses]",
        new="numbers = [loss.float().sum() for loss in self._losses[-1:]]",
        tests=("tests/training/guards/test_finite.py",),
    ),
    Fault(
        "drift-nan",
        "revnets/training/guards/drift.py",
        old="key=lambda op: math.inf if op.relative != op.relative else op.relative",
        new="key=lambda op: op.relative",
        tests=("tests/training/guards/test_drift.py",),
    ),
    Fault(
        "resumable-repeated",
        "revnets/training/data/resumable.py",
        old="more = (self.rank, batch, place) if self.repeated else ()",
        new="more = (self.rank, batch) if self.repeated else ()",
        tests=("tests/training/data/test_resumable.py",),
    ),
    Fault(
        "resumable-apart",
        "revnets/training/data/resumable.py",
        old="        with apart():\n            seed_all(*index[1])\n",
        new="        if True:\n            seed_all(*index[1])\n",
        tests=("tests/training/data/test_resumable.py",),
    ),
    Fault(
        "graphed-gradients-shared",
        "revnets/training/capture/graphed.py",
        old="{dtype: block.clone() for dtype, block in self._blocks.items()}",
        new="dict(self._blocks)",
        tests=("tests/training/capture/test_graphed.py",),
    ),
    Fault(
        "graphed-called-twice",
        "revnets/training/capture/graphed.py",
        old="if call is not None and not call.closed:",
        new="if False:",
        tests=("tests/training/capture/test_graphed.py",),
    ),
    Fault(
        "graphed-moved",
        "revnets/training/capture/graphed.py",
        old="if addresses != self._addresses:",
        new="if not self._addresses:",
        tests=("tests/training/capture/test_graphed.py",),
    ),
    Fault(
        "graphed-range",
        "revnets/training/capture/graphed.py",
        old="            guard.arm_replayed(outputs)\n",
        new="            pass\n",
        tests=("tests/training/capture/test_graphed.py",),
    ),
)
