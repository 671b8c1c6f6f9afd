"""Tools that look into networks: counters, Grad-CAM, a quantiser."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.clients.steps import client, images, network

NAME = "test_revbifpn"
pytestmark = pytest.mark.filterwarnings("ignore")


def _torchinfo(model: Any, training: bool) -> float:
    summary = client("torchinfo").summary(model, (1, 3, 64, 64), mode="train" if training else "eval", verbose=0)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    return float(summary.total_mult_adds)


def _fvcore(model: Any, training: bool) -> float:
    analysis = client("fvcore.nn").FlopCountAnalysis(model.train(training), images(64, 1))
    analysis.unsupported_ops_warnings(False)
    return float(analysis.total())


def _ptflops(model: Any, training: bool) -> float:
    count = client("ptflops").get_model_complexity_info
    macs, parameters = count(
        model.train(training), (3, 64, 64), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )
    assert parameters == sum(p.numel() for p in model.parameters())
    return float(macs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [_torchinfo, _fvcore, _ptflops])
def test_counters_count_what_store_has(count: Callable[[Any, bool], float], training: bool) -> None:
    counts = [count(network(NAME, mode=mode), training) for mode in ("reversible", "store")]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("training", [False, True])
def test_grad_cam_looks_into_neck_and_body(training: bool) -> None:
    """It hooks a layer and the gradient of its output; in the body, in training, the graph is made for the gradient."""
    cam = client("pytorch_grad_cam")
    target = client("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(1)
    pictures = []
    for mode in ("reversible", "store"):
        model = network(NAME, mode=mode).train(training)
        layers = [model.neck.blocks[3]] if training else [model.neck.blocks[3], model.body.ops[4].ops[0].f.conv_pwl]
        for layer in layers:
            with cam.GradCAM(model, [layer]) as extractor:
                pictures.append(torch.from_numpy(extractor(images(), [target] * 2)))
    half = len(pictures) // 2
    assert all(torch.equal(a, b) for a, b in zip(pictures[:half], pictures[half:], strict=True))


def test_torchao_quantises_in_evaluation() -> None:
    quantization = client("torchao.quantization")
    model = network(NAME).eval()
    expected = model(images())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "Int8" in type(model.classifier.weight.data).__name__ or "Affine" in type(model.classifier.weight).__name__
    torch.testing.assert_close(model(images()), expected, rtol=0.05, atol=0.05)
