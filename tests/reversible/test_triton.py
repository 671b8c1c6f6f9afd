"""The stream's kernel in Triton's interpreter: to the bit what torch computes in a row."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


def check() -> None:
    from revnets.reversible import cuda, grid

    constant = grid.rounding_constant(12, torch.float32)
    for n, c, h, w in ((2, 6, 5, 7), (1, 70, 1, 3), (3, 4, 24, 23)):
        for kind in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.bfloat16):
                whole = torch.randn(n, 2 * c, h, w).mul(3).contiguous(memory_format=kind)
                value = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=kind)
                for x in (whole[:, :c].contiguous(memory_format=kind), whole[:, c:]):
                    expected = grid.add_rounded_in_a_row(x, value, constant)
                    added = cuda.add_rounded(x, value, constant)
                    assert torch.equal(added, expected)
                    cuda.sub_rounded_(added, value, constant)
                    rounded = grid.round_to_grid(x, 12)
                    on_grid = cuda.add_rounded(rounded, value, constant)
                    cuda.sub_rounded_(on_grid, value, constant)
                    assert torch.equal(on_grid, rounded), "what was added is not undone to the bit"
                before = whole.clone()
                cuda.sub_rounded_(whole[:, c:], value, constant)
                grid.sub_rounded_in_a_row(before[:, c:], value, constant)
                assert torch.equal(whole, before), "one half of the channels is changed, the other is not"


def check_largest() -> None:
    from revnets.reversible import cuda, grid

    maps = [
        torch.randn(2, 3, 20, 30) - 5,
        torch.randn(1, 3, 2, 2),
        torch.randn(2, 8, 70, 9) * 7,
        torch.ones(1, 1, 1, 1),
    ]
    maps = [*maps, maps[0].contiguous(memory_format=torch.channels_last) * 2, torch.zeros(2, 3, 1, 4)]
    for xs in (maps, maps[:1], [maps[0][:, 1:], maps[1]]):
        found = cuda.max_abs(xs)
        assert torch.equal(found.amax(1), grid.max_abs(*xs).amax(1))
    assert found.shape[1] == 1, "maps with gaps are torch's own"
    for x, odd in zip(maps[:4], (torch.nan, -torch.nan, torch.inf, -torch.inf), strict=True):
        x[0, -1, -1, -1] = odd
    found = cuda.max_abs(maps).amax(1).tolist()
    assert found[0] != found[0]
    assert found[1] != found[1]
    assert found[2:4] == [torch.inf, torch.inf]
    assert 0 < found[4] < torch.inf
    assert found[5] == 0


@pytest.mark.parametrize("what", ["check", "check_largest"])
def test_interpreted(what: str) -> None:
    code = f"from tests.reversible.test_triton import {what}; {what}()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_largest_magnitude() -> None:
    from revnets.reversible import cuda, grid

    for x in (torch.randn(2, 3, 4) - 5, torch.zeros(0, 3), torch.tensor([1.0, torch.nan])):
        assert torch.equal(cuda.max_abs([x]), grid.max_abs(x)) or (
            grid.max_abs(x).isnan() and cuda.max_abs([x]).isnan()
        )
