"""The FP8 convolution kernels compiled without a GPU: FP8 matrix instructions, no spills, operands in whole vectors."""

import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from revnets.layers.munit import compile_report, fp8_conv_triton
from revnets.layers.munit.compile_report import Row, report, table, variants

needs_reader = pytest.mark.skipif(compile_report.reader() is None, reason="Triton comes without cuobjdump")
PRODUCTS = {
    "output": "e4m3 x e4m3",
    "input gradient": "e5m2 x e4m3",
    "weight gradient": "e5m2 x e4m3",
}


def assert_good(row: Row, instruction: str) -> None:
    kind = next((kind for kind in PRODUCTS if row.words.startswith(kind)), None)
    assert set(row.instructions) == (set() if kind is None else {f"{instruction} {PRODUCTS[kind]}"}), row
    assert 0 < row.registers <= 255
    if kind is not None:
        assert row.copies == ((8,) if "loads of 8 bytes" in row.words else (16,)), row
        assert 0 < row.shared <= 227 * 1024


@needs_reader
def test_one_tile_of_each_product_on_hopper() -> None:
    chosen = [next(v for v in variants() if v.words.startswith(kind) and ", 64x64" in v.words) for kind in PRODUCTS]
    rows = report(90, iter(chosen))
    for row in rows:
        assert_good(row, "wgmma")
        assert row.spilled == 0
    assert table(rows).count("wgmma") == 3


@needs_reader
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "instruction", "spilled"), [(90, "wgmma", 0), (89, "mma", 16)])
def test_all(capability: int, instruction: str, spilled: int) -> None:
    rows = report(capability)
    assert len(rows) == len(list(variants()))
    for row in rows:
        assert_good(row, instruction)
        assert row.spilled <= spilled, row


@needs_reader
@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 64])
def test_few_channels(block: int) -> None:
    """Steps of a sum are shorter where channels are few."""
    first = [next(v for v in variants() if v.words.startswith(kind)) for kind in PRODUCTS]
    chosen = [replace(v, constants={**v.constants, "BLOCK_K": block}) for v in first]
    for row in report(90, iter(chosen)):
        assert_good(row, "wgmma")


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fp8_conv_triton, "interpreted", lambda: True)
    monkeypatch.setattr(sys, "argv", ["compile_report"])
    with pytest.raises(SystemExit) as ended:
        compile_report.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "compile_report: TRITON_INTERPRET is set: expected Triton's compiler; unset it for this report\n"
    )
