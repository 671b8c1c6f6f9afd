"""``revnets bench-sparse-training``: every way in every layout, tables, files, mistakes."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from revnets.benchmarks import sparse_training as sparse_bench
from revnets.cli import app
from revnets.kernels import kernel_problem

needs_kernel = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench-sparse-training", *map(str, arguments)])


@needs_kernel
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_bench, "LAYERS", [(16, 32, 8)])
    monkeypatch.setattr(sparse_bench, "WINDOWS", [(16, 24, 3, 2, 8)])
    monkeypatch.setattr(sparse_bench, "_WARM_SECONDS", 0)
    small = ("--img-size", 64, "--batch-size", 2, "--repeats", 1)
    result = bench("test_efficientnet", *small, "--sparsity", "0.8,0.9", "--threads", "1,2", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "sparse_training.json").read_text())
    with (tmp_path / "sparse_training.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(data["layers"]) + len(data["networks"])
    for rows in (data["layers"], data["networks"]):
        cases = {(r["sparsity"], r["threads"], r["way"], r["layout"]) for r in rows}
        assert len(cases) == 2 * 2 * 3 * 2
        assert len(rows) == len(cases) * (1 + (rows is data["layers"]))
    assert "16 -> 32 @ 8x8" in result.output
    assert "16 -> 24 @ 8x8, 3x3, stride 2" in result.output
    assert "test_efficientnet @ 64" in result.output


@needs_kernel
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1"], "sparsity"),
        (["--sparsity", "much"], "--sparsity 'much': 'much': expected a number"),
        (["--threads", "0"], "--threads '0': '0': expected a whole number of at least 1"),
        (["nonsense"], "unknown model 'nonsense'"),
    ],
)
def test_mistakes(arguments: list[str], words: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert words in result.output


@needs_kernel
def test_networks_without_layers_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_bench, "use_sparse_kernel", lambda model: 0)
    result = bench("test_efficientnet", "--img-size", "64", "--no-layers")
    assert result.exit_code == 2
    assert "test_efficientnet has no layers that can be sparse" in result.output
