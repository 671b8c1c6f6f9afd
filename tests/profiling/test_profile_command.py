"""``revnets profile``: tables, files, pictures and sweeps of a tiny network, and one sentence for what cannot be."""

import csv
import json
import struct
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from revnets.cli import app
from revnets.profiling import sweep, target
from revnets.profiling.target import Setting, parse_targets

TINY = "test_revbifpn@32:2"


def profile(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", *arguments])


def assert_png(path: Path) -> None:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    assert min(width, height) > 300


def test_profile_writes_table_files_and_timeline(tmp_path: Path) -> None:
    result = profile(TINY, "--mode", "reversible,store", "--compare", "resnet18@32:2", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert [(r["model"], r["mode"]) for r in rows] == [
        ("test_revbifpn", "reversible"),
        ("test_revbifpn", "store"),
        ("resnet18", "store"),
    ]
    assert all(abs(r["error"]) < 0.05 for r in rows)  # small: fixed costs of a few kB show
    with (tmp_path / "profile.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == [r["model"] for r in rows]
    pictures = sorted(tmp_path.glob("timeline_*.png"))
    assert len(pictures) == len(rows)
    for picture in pictures:
        assert_png(picture)
    assert not list(tmp_path.glob(".*"))


def test_all_but_the_pictures_where_there_is_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = profile(TINY, "--mode", "store", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json"]
    assert ".png" not in result.stdout


@pytest.mark.parametrize("kind", ["depth", "resolution"])
def test_sweeps(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "EXTRA_SILOS", (0, 2))
    monkeypatch.setattr(sweep, "SCALES", (1.0, 2.0))
    result = profile(TINY, "--mode", "reversible,store", "--sweep", kind, "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / f"{kind}.json").read_text())["rows"]
    assert {r["mode"] for r in rows} == {"reversible", "store"}
    assert len(rows) == 4
    assert_png(tmp_path / f"{kind}.png")


@pytest.mark.parametrize("side", [16, 32, 48, 224])
def test_images_of_a_sweep_can_be_run(side: int) -> None:
    """Multiples of what the network needs, each once, and none of no pixels."""
    setting = Setting()
    given = parse_targets(f"test_revbifpn@{side}:1", setting)
    step = given[0].divisor(setting)
    for mode in {t.mode for t in given}:
        sides = [t.img_size for t in sweep.targets("resolution", given, setting) if t.mode == mode]
        assert sides == sorted(set(sides))
        assert sides[0] >= step
        assert all(s % step == 0 for s in sides)
        assert side in sides


def test_sweep_over_families_takes_what_is_named(tmp_path: Path) -> None:
    result = profile(
        TINY, "--compare", "resnet18@32:2", "--mode", "store", "--sweep", "families", "--output", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    assert len(json.loads((tmp_path / "families.json").read_text())["rows"]) == 2
    assert_png(tmp_path / "families.png")


def test_families_by_default() -> None:
    targets = sweep.targets("families", parse_targets("revbifpn_s0", Setting()), Setting())
    assert {t.name for t in targets} == set(sweep.FAMILIES)


def test_fit_names_those_that_do_not_fit(tmp_path: Path) -> None:
    arguments = (TINY, "--mode", "reversible", "--compare", "vgg11@32:2", "--optimizer", "none")
    result = profile(*arguments, "--fit", "20MB", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "vgg11 (plain) @32: not even batch 1 fits" in " ".join(result.output.split())
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["test_revbifpn"]
    assert rows[0]["predicted_peak_bytes"] <= 20_000_000 < rows[0]["next_larger_bytes"]


WRONG = {
    "a model that nobody knows": (["no_such_net"], "unknown model 'no_such_net'"),
    "a size that does not divide": (["test_revbifpn@33:2"], "must be divisible by 16"),
    "a mode that nobody knows": ([TINY, "--mode", "magic"], "unknown mode 'magic': expected some of"),
    "a mode that this one has not": (["resnet18@32:2", "--mode", "reversible"], "has no mode 'reversible'"),
    "a budget without unit": ([TINY, "--fit", "24"], "budget '24': expected a size such as 24GB"),
    "a budget too small": ([TINY, "--fit", "1kB"], "not even batch 1 fits"),
    "a fit of nothing": ([TINY, "--fit", "1GB", "--fit-what", "depth"], "expected one of batch, image"),
    "an optimizer that nobody knows": ([TINY, "--optimizer", "magic"], "unknown optimizer 'magic'"),
    "a device that nobody knows": ([TINY, "--device", "magic"], "magic"),
    "a dtype that nobody knows": ([TINY, "--amp-dtype", "int3"], "int3"),
    "a sweep that nobody knows": ([TINY, "--sweep", "width"], "width"),
    "a sweep that makes no sense": (["resnet18@32:2", "--sweep", "depth"], "expected a revbifpn"),
    "a folder that is a file": ([TINY, "--output", "/dev/null/x"], "cannot be used"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence(case: str) -> None:
    arguments, expected = WRONG[case]
    result = profile(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.output
    assert result.output.strip().startswith("revnets: ")
    assert "\n" not in result.output.strip()
