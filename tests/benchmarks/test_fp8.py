"""``revnets bench-fp8``: rows that say what multiplied, the break-even table, a file that ``mus_fp8:auto`` reads."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from revnets.benchmarks import fp8 as fp8_bench
from revnets.benchmarks.fp8_rows import OURS, PLAIN, TRITON, Row
from revnets.cli import app
from revnets.layers.munit.break_even import KINDS, POINTWISE, break_even

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


def bench(*arguments: str) -> Result:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return CliRunner().invoke(app, ["bench-fp8", *device, *arguments])


def rows(kind: str, count: int, **speedups: float) -> list[Row]:
    """``w256_eager=1.2``"""
    words = {name: name.removeprefix("w").split("_") for name in speedups}
    return [Row(kind, count, int(w), mode, OURS, "", 1.0, speedups[name]) for name, (w, mode) in words.items()]


def test_break_even_needs_every_mode_and_every_larger_width() -> None:
    found = fp8_bench.break_even(
        [
            *rows("linear", 64, w256_eager=1.5, w512_eager=0.9, w1024_eager=1.1, w2048_eager=1.3),
            *rows("linear", 256, w256_eager=1.5, w512_eager=1.2, w256_compiled=0.8, w512_compiled=1.1),
            *rows("1x1 conv", 64, w256_eager=2.0, w512_eager=1.0),
            Row("linear", 64, 4096, "eager", PLAIN, "", 1.0, 1.0),
        ]
    )
    assert found == {"linear": [(64, 1024), (256, 512)], "1x1 conv": [(64, None)], "3x3 conv": []}


def test_triton_against_matrices() -> None:
    def row(kind: str, width: int, layer: str, seconds: float) -> Row:
        return Row(kind, 64, width, "eager", layer, "", seconds, 1.1)

    matrices = [row("1x1 conv", width, OURS, 2.0) for width in (256, 512, 1024)]
    triton = [row("1x1 conv", width, TRITON, seconds) for width, seconds in ((256, 1.5), (512, 2.5), (1024, 1.5))]
    found = fp8_bench.break_even([*matrices, *triton, row("3x3 conv", 256, OURS, 1.0)])
    assert found["1x1 conv"] == [(64, 256)]
    assert found["3x3 conv"] == [(64, 256)]
    assert found[POINTWISE] == [(64, 1024)]
    assert POINTWISE not in fp8_bench.break_even(matrices)


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    small = ("--widths", "16,32", "--rows", "64", "--modes", "eager", "--repeats", "2")
    result = bench(*small, "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "FP8 is EMULATED here" in result.output
    assert "Break-even on cpu" in result.output
    data = json.loads(path.read_text())
    assert {(r["kind"], r["width"], r["layer"]) for r in data["rows"]} >= {
        (kind, width, layer)
        for kind in ("linear", "1x1 conv", "3x3 conv")
        for width in (16, 32)
        for layer in (PLAIN, OURS)
    }
    assert {r["backend"] for r in data["rows"] if r["layer"] == OURS} == {"emulate", "emulate, convolution"}
    known = break_even("cpu", path)
    assert known.least["linear"] == ((64, data["break_even"]["linear"][0][1]),)
    known.reason_to_keep(nn.Linear(16, 16), 64)


def test_what_the_report_of_a_gpu_calls(tmp_path: Path) -> None:
    found = fp8_bench.run(fp8_bench.Request(torch.device("cpu"), [32], [64], modes=("eager",), repeats=1))
    assert {(r.kind, r.layer, r.mode) for r in found} >= {(k, name, "eager") for k in KINDS for name in (PLAIN, OURS)}
    assert all(r.width == 32 for r in found)
    assert all(r.emulated == (r.layer == OURS) for r in found)
    assert all(r.forward_seconds and r.forward_speedup for r in found)
    fp8_bench.write_table(found, "cpu", tmp_path / "table.json")
    assert set(break_even("cpu", tmp_path / "table.json").least) == set(KINDS)


def test_images_of_a_convolution() -> None:
    x, grad = fp8_bench._inputs("3x3 conv", 56 * 56, 8, torch.device("cpu"))
    assert x.shape == grad.shape == (1, 8, 56, 56)


def test_real_products_are_named() -> None:
    request = fp8_bench.parse("cpu", "16", "32", "linear,1x1 conv", "eager", 1, "scaled_mm")
    found = fp8_bench.run(request)
    assert {r.backend for r in found if r.layer == OURS} == {"scaled_mm"}


@pytest.mark.slow
def test_compiled() -> None:
    request = fp8_bench.parse("cpu", "32", "64", "linear", "eager,compiled", 1, None)
    found = fp8_bench.run(request)
    assert {(r.mode, r.layer, r.backend) for r in found} >= {
        ("eager", OURS, "emulate"),
        ("compiled", OURS, "emulate"),
        ("compiled", PLAIN, "bfloat16"),
    }


WRONG = {
    "a device that nobody knows": (["--device", "abacus"], "abacus"),
    "a kind that nobody knows": (["--kinds", "rnn"], "unknown kind 'rnn': expected some of linear, 1x1 conv, 3x3 conv"),
    "a mode that nobody knows": (["--modes", "fast"], "unknown mode 'fast'"),
    "a width that is none": (["--widths", "0"], "expected a whole number of at least 1"),
    "a width in words": (["--widths", "big"], "'big': expected a whole number"),
    "a backend that nobody knows": (["--backend", "cublas"], "backend='cublas': expected one of"),
    "a folder that is not there": (["--output", "/no/where.json"], "create it first"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence(case: str) -> None:
    arguments, expected = WRONG[case]
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.output
    assert result.output.strip().startswith("revnets: ")
    assert "\n" not in result.output.strip()
