"""2:4 weights: the pattern, and compressed layers on a GPU."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from revnets.cli import app
from revnets.deploy import ExportError
from revnets.deploy.semi_structured import compare_semi_structured, is_two_to_four, semi_structured, two_to_four

CUDA = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device with sparse tensor cores")]


def test_pattern() -> None:
    weight = torch.randn(6, 16)
    pruned = two_to_four(weight)
    assert is_two_to_four(pruned)
    assert not is_two_to_four(weight)
    assert int(pruned.count_nonzero()) == 48
    assert torch.equal(two_to_four(pruned), pruned)
    with pytest.raises(ExportError, match="inputs divisible by 4"):
        two_to_four(torch.ones(4, 6))


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_without_a_gpu() -> None:
    with pytest.raises(ExportError, match="CUDA device"):
        compare_semi_structured()
    assert semi_structured(nn.Linear(64, 64)) == []
    result = CliRunner().invoke(app, ["bench-2to4"])
    assert result.exit_code == 2
    assert "CUDA device" in result.output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("_", [pytest.param(0, marks=gpu)])
def test_compressed_layers(dtype: torch.dtype, _: int) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).to("cuda", dtype)
    model[0].weight.data = two_to_four(model[0].weight.data)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        assert semi_structured(model) == ["0"]
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    rows = compare_semi_structured((2048,), repeats=3)
    assert [row.engine for row in rows] == ["dense", "2:4"]
    assert rows[1].error < 2e-2
