"""``mus_fp8:auto``: only layers past break-even, by the default table or a measured one; the others with the reason."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from revnets.layers import MuSConv2d, MuSLinear, convert
from revnets.layers.munit.break_even import KINDS, VARIABLE, break_even, device_kind

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 96, 1),
        nn.Conv2d(96, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 96),
        nn.Linear(96, 4),
    )


def table(folder: Path, device: str = "cuda sm90", **least: Any) -> str:
    points = {"linear": [[32, 16]], "1x1 conv": [[1024, 64]], **least}
    path = folder / "table.json"
    path.write_text(json.dumps({"device": device, "break_even": points, "rows": []}))
    return str(path)


def auto(spec: dict[str, Any], net: nn.Module | None = None) -> Any:
    return convert(net or network(), {"type": "mus_fp8", "auto": True, **spec}, input_size=(3, 34, 34))


def test_only_what_is_past_break_even(tmp_path: Path) -> None:
    net = network()
    plain = copy.deepcopy(net)
    report = auto({"device": "cuda sm90", "table": table(tmp_path)}, net)
    assert [c.name for c in report.converted] == ["3", "7"]
    assert isinstance(net[3], MuSConv2d)
    assert net[3].fp8
    assert isinstance(net[7], MuSLinear)
    assert {s.name: s.reason for s in report.skipped} == {
        "0": "role input, which is never quantised",
        "1": "no 3x3 conv is known to be faster in FP8 on cuda sm90",
        "2": "grouped convolutions are not quantised",
        "4": "96 to 16 is below break-even 64x64 on cuda sm90",
        "8": "role output, which is never quantised",
    }
    assert "auto: 2 of 7 layers are faster in FP8 on cuda sm90 at batch size 32, by " in str(report)
    assert torch.equal(net[4].weight, plain[4].weight)
    assert type(net[1]) is nn.Conv2d


def test_rows_count(tmp_path: Path) -> None:
    path = table(tmp_path)
    report = auto({"device": "cuda sm90", "table": path, "batch_size": 2})  # 2 x 16 x 16 = 512 rows
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons["3"] == "512 rows are below break-even 1024 on cuda sm90"
    assert reasons["7"] == "2 rows are below break-even 32 on cuda sm90"
    path = table(tmp_path, linear=[[1, 256], [32, 16]])
    reasons = {s.name: s.reason for s in auto({"device": "cuda sm90", "table": path, "batch_size": 8}).skipped}
    assert reasons["7"] == "16 to 96 is below break-even 256x256 on cuda sm90"
    path = table(tmp_path, linear=[[1, None], [32, 16]])
    reasons = {s.name: s.reason for s in auto({"device": "cuda sm90", "table": path, "batch_size": 8}).skipped}
    assert reasons["7"] == "no linear of 8 rows is known to be faster in FP8 on cuda sm90"


def test_measured_kernels_and_what_computes_1x1(tmp_path: Path) -> None:
    measured = {"3x3 conv": [[1024, 64]], "1x1 conv, triton": [[1024, 64]]}
    path = table(tmp_path, **measured)
    report = auto({"device": "cuda sm90", "table": path})
    assert [c.name for c in report.converted] == ["1", "3", "7"]
    assert (report.model[1].pointwise, report.model[3].pointwise) == ("scaled_mm", "triton")
    assert "FP8 layers have channels" not in str(report)  # all are multiples of 16
    path = table(tmp_path, **measured | {"1x1 conv, triton": [[1024, 128]], "3x3 conv": [[1024, None]]})
    report = auto({"device": "cuda sm90", "table": path})
    assert report.model[3].pointwise == "scaled_mm"
    assert {s.name: s.reason for s in report.skipped}["1"] == "no 3x3 conv is known to be faster in FP8 on cuda sm90"


def test_padded_channels_are_counted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 40, 3), nn.Conv2d(40, 48, 1), nn.Conv2d(48, 64, 1))
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)])
    report = convert(net, "mus_fp8:backend:emulate", input_size=(3, 12, 12))
    assert report.notes == ["2 of 3 FP8 layers have channels that are no multiple of 16: padded with zeros on GPUs"]
    notes = {c.name: c.note for c in report.converted}
    assert notes["1"].endswith("e4m3/e5m2, channels 24 to 40 padded to 32 to 48, emulated: asked for")
    assert notes["3"].endswith("e4m3/e5m2, emulated: asked for")
    assert notes["0"].endswith("not quantised")


def test_with_new_weights_all_layers_are_munit_scaled(tmp_path: Path) -> None:
    report = auto({"device": "cuda sm90", "table": table(tmp_path), "init": True})
    assert not report.skipped
    found = {c.name: c for c in report.converted}
    assert found["3"].kind == "mus_fp8"
    assert found["4"].kind == "mus"
    assert found["4"].note.endswith("not quantised: 96 to 16 is below break-even 64x64 on cuda sm90")
    assert [report.model[i].fp8 for i in (0, 1, 2, 3, 4, 7, 8)] == [False, False, False, True, False, True, False]
    assert report.model[4].weight.std().item() == pytest.approx(1, abs=0.1)


def test_nothing_is_faster_on_cpus_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    report = convert(network(), "mus_fp8:auto:device:cpu", input_size=(3, 34, 34))
    assert not report.converted
    assert len(report.skipped) == 7
    assert {s.reason for s in report.skipped if s.name in "347"} == {
        "no 1x1 conv is known to be faster in FP8 on cpu",
        "no linear is known to be faster in FP8 on cpu",
    }
    assert "auto: 0 of 7 layers are faster in FP8 on cpu" in report.notes[0]
    report.model(torch.randn(2, 3, 34, 34)).sum().backward()


def test_a_table_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, table(tmp_path, device="cpu"))
    report = auto({"device": "cpu"})
    assert [c.name for c in report.converted] == ["3", "7"]
    assert str(tmp_path) in report.notes[0]


def test_default_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    known = break_even("cuda sm90")
    assert known.reason_to_keep(nn.Linear(2048, 4096), 4096) is None
    assert known.reason_to_keep(nn.Conv2d(4096, 2048, 1), 4096) is None
    assert known.reason_to_keep(nn.Linear(2048, 4096), 512) == "512 rows are below break-even 2048 on cuda sm90"
    assert break_even("cuda sm80").reason_to_keep(nn.Linear(8192, 8192), 8192) == (
        "no linear is known to be faster in FP8 on cuda sm80"
    )
    assert set(known.least) == set(KINDS) - {"3x3 conv"}  # of which nothing was measured


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='abacus': expected a device that is here"):
        device_kind("abacus")
    with pytest.raises(ValueError, match="was measured on 'cpu', not on 'cuda sm90': measure there"):
        auto({"device": "cuda sm90", "table": table(tmp_path, device="cpu")})
    with pytest.raises(ValueError, match=r"none.json' cannot be read \(FileNotFoundError: .*expected what 'revnets"):
        auto({"device": "cpu", "table": str(tmp_path / "none.json")})
    (tmp_path / "wrong.json").write_text('{"device": "cpu"}')
    with pytest.raises(ValueError, match=r"wrong.json' cannot be read \(KeyError: 'break_even'\)"):
        auto({"device": "cpu", "table": str(tmp_path / "wrong.json")})
    with pytest.raises(ValueError, match="batch_size=0: expected a number of images, 1 at least"):
        auto({"batch_size": 0})
