"""Deployment: in eval mode the network is plain module code for torch.export, ONNX and torch.compile."""

import copy
import logging
import operator
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.registry import TINY, images, make, relative, with_statistics

SLOW = pytest.mark.slow
NAMES = [TINY, pytest.param("revbifpn_s0", marks=SLOW)]
COMPILED = [  # inductor needs minutes for s0
    (TINY, "aot_eager"),
    pytest.param("revbifpn_s0", "aot_eager", marks=SLOW),
    pytest.param(TINY, "inductor", marks=SLOW),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        yield
    torch.compiler.reset()


class Pyramid(nn.Module):
    """The maps as outputs of one call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_pyramid(x)


def eval_model(name: str, **kwargs: Any) -> Any:
    return with_statistics(make(name, **kwargs))


def assert_outputs(values: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Each map or the logits, relative to the largest value."""
    values = [values] if isinstance(values, Tensor) else values
    expected = [expected] if isinstance(expected, Tensor) else expected
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        assert value.shape == wanted.shape
        assert relative(value, wanted) < tolerance


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [pytest.param(True, marks=SLOW), False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("name", NAMES)
def test_export(name: str, strict: bool) -> None:
    model, x = eval_model(name, num_classes=10), images()
    program = torch.export.export(model, (x,), strict=strict)
    with torch.no_grad():
        assert_outputs(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_export_sees_nothing_custom(mode: str) -> None:
    """Every mode exports to the same standard operators."""
    program = torch.export.export(eval_model(TINY, mode=mode, num_classes=10), (images(),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {str(target).split(".")[0] for target in targets if target is not operator.getitem} == {"aten"}
    reference = torch.export.export(eval_model(TINY, mode="store", num_classes=10), (images(),))
    assert targets == [node.target for node in reference.graph.nodes if node.op == "call_function"]


def free_sizes() -> dict[str, dict[int, Any]]:
    """Any batch, and any side that the smallest network takes."""
    batch, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "rows", "columns"))
    return {"x": {0: batch, 2: 16 * rows, 3: 16 * columns}}


def classifier_or_features(features: bool) -> Any:
    return eval_model(TINY, **({"features_only": True} if features else {"num_classes": 10}))


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_export_with_free_batch_and_sides(features: bool) -> None:
    model, x = classifier_or_features(features), torch.randn(3, 3, 48, 96)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 80),), dynamic_shapes=free_sizes())
    with torch.no_grad():
        assert_outputs(program.module()(x), model(x))


@pytest.mark.parametrize("out_indices", [(1, 3), pytest.param((0, 1, 2, 3), marks=SLOW)])
def test_export_of_features(out_indices: tuple[int, ...]) -> None:
    backbone, x = with_statistics(make(TINY, features_only=True, out_indices=out_indices)), images()
    program = torch.export.export(backbone, (x,))
    with torch.no_grad():
        assert_outputs(program.module()(x), backbone(x))


@pytest.mark.slow
def test_exported_file(tmp_path: Path) -> None:
    model, x = eval_model(TINY, num_classes=10), images()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    with torch.no_grad():
        assert_outputs(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


# --- ONNX ------------------------------------------------------------------------------------------------------------


def run_onnx(model: nn.Module, x: Tensor, path: Path, example: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
    """Outputs that onnxruntime computes from the exported file, which was made with ``x`` or another example."""
    pytest.importorskip("onnxscript", reason="torch.onnx needs it: pip install 'revnets[dev]'")
    runtime = pytest.importorskip("onnxruntime", reason="to check the exported file: pip install 'revnets[dev]'")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model, (x if example is None else example,), path, dynamo=True, input_names=["image"], verbose=False, **kwargs
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"image": x.numpy()})]


@pytest.mark.parametrize("name", NAMES)
def test_onnx(name: str, tmp_path: Path) -> None:
    model, x = eval_model(name, num_classes=10), images()
    outputs = run_onnx(model, x, tmp_path / "model.onnx")
    with torch.no_grad():
        assert_outputs(outputs, model(x), 1e-4)


@pytest.mark.slow
def test_onnx_of_features(tmp_path: Path) -> None:
    model, x = Pyramid(eval_model(TINY)), images()
    outputs = run_onnx(model, x, tmp_path / "pyramid.onnx")
    with torch.no_grad():
        assert_outputs(outputs, model(x), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_onnx_with_free_batch_and_sides(features: bool, tmp_path: Path) -> None:
    model, x, example = classifier_or_features(features), torch.randn(3, 3, 48, 96), torch.randn(2, 3, 64, 80)
    outputs = run_onnx(model, x, tmp_path / "model.onnx", example, dynamic_shapes=free_sizes())
    with torch.no_grad():
        assert_outputs(outputs, list(model(x)) if features else model(x), 1e-4)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), COMPILED)
@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=SLOW)], ids=["grad", "no_grad"])
def test_compile_in_eval(name: str, backend: str, grad: bool) -> None:
    model, x = eval_model(name, num_classes=10), images()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        assert_outputs(compiled(x).detach(), model(x).detach())


@pytest.mark.slow
def test_compile_of_features_in_eval() -> None:
    backbone, x = with_statistics(make(TINY, features_only=True, out_indices=(1, 3))), images()
    with torch.no_grad():
        assert_outputs(torch.compile(backbone, backend="aot_eager", fullgraph=True)(x), backbone(x))


@pytest.mark.parametrize(
    ("mode", "exact", "backend"),
    [
        ("reversible", True, "aot_eager"),
        ("reversible", False, "aot_eager"),
        pytest.param("checkpoint", False, "aot_eager", marks=SLOW),
        pytest.param("store", False, "aot_eager", marks=SLOW),
        pytest.param("reversible", True, "inductor", marks=SLOW),
    ],
)
def test_compile_in_training(mode: str, exact: bool, backend: str) -> None:
    """Loss, gradients and running statistics of a compiled step are those of an eager one."""
    model = make(TINY, num_classes=10, mode=mode, exact=exact).train()
    other = copy.deepcopy(model)
    losses = [module(images()).square().mean() for module in (model, torch.compile(other, backend=backend))]
    for loss in losses:
        loss.backward()
    # the grid turns differences in the last bit into steps of 2^-k
    tolerance = 1e-3 if not exact else 5e-2
    assert relative(losses[1].detach(), losses[0].detach()) < tolerance
    grads = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        expected = grads[name].grad
        assert parameter.grad is not None, name
        assert expected is not None, name
        floor = 1e-4 * expected.numel() ** 0.5
        assert float((parameter.grad - expected).norm()) < tolerance * max(float(expected.norm()), floor), name
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=tolerance, atol=tolerance)
