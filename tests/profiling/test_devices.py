"""Predicted memory against measured, with autocast and an optimizer, on every device there is."""

from __future__ import annotations

import pytest
import torch

from revnets.profiling.profile import profile
from revnets.profiling.target import Setting, Target


@pytest.mark.parametrize(("mode", "amp"), [("reversible", "bfloat16"), ("store", None)])
def test_predicted_is_measured(device: torch.device, mode: str, amp: str | None) -> None:
    target = Target("test_revbifpn", 64, 4, mode)
    if device.type == "cuda":  # whose blocks of 512 bytes and workspaces count in small networks
        target = Target("revbifpn_s0", 224, 16, mode)
    setting = Setting(device.type, amp_dtype=amp, optimizer="adamw")
    row = profile(target, setting, measure=True)
    assert row.error is not None
    assert abs(row.error) < (0.05 if device.type == "cuda" else 0.01)
    if device.type == "cuda":
        assert row.measured is not None
        assert row.measured.reserved_bytes is not None
        assert row.measured.reserved_bytes >= 0.95 * row.predicted.peak_bytes
