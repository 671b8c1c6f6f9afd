"""INT8 weights and activations on top of a pruned network, zeros stay zeros: for our kernel, or by ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.errors import refused
from ..training.files import put_in_place
from ..training.options.values import COUNT, POSITIVE
from .candidates import INT8
from .engines import get_engine, load, open_folder, write_onnx, write_torch
from .graph import INPUT_NAME, ExportError, export_graph
from .lower_int8 import lower_int8
from .runners import Runner, first_call
from .seal import Purpose, seal

CALIBRATIONS = ("minmax", "entropy", "percentile")
INT8_ENGINES = ("onnxruntime", "openvino", "sparse")
_IMAGES_AT_ONCE = 8  # all activations of a step are kept


@dataclass(frozen=True)
class Quantized:
    """An INT8 file.

    Attributes:
        path: of the file.
        error: root mean square of the difference from the float outputs, relative to theirs, on calibration images.
        agreement: share of calibration images with the same largest output; None where outputs are no classes.
        weights: how many weights are INT8.
        zeros: how many of them are 0.
    """

    path: Path
    error: float
    agreement: float | None
    weights: int
    zeros: int


def quantize(
    model: nn.Module,
    data: Iterable[Any],
    folder: str | Path,
    name: str = "model-int8",
    images: int = 256,
    calibration: str = "minmax",
    any_batch: bool = True,
    max_error: float = 0.5,
    engine: str = "onnxruntime",
    batch_size: int = 1,
) -> Quantized:
    """Write a model as a file with INT8 weights (symmetric, per channel) and activations (calibrated ranges).

    An ONNX file has the standard QuantizeLinear and DequantizeLinear operators, so ONNX Runtime and OpenVINO both run
    it; they multiply zeros. That of the engine ``sparse``, a ``.pt2``, skips blocks of four input channels that are 0,
    as ``prune(pattern="4x1")`` makes them; layers that its kernel has not in INT8 stay float.

    Args:
        model: in float32, on the CPU, such as a pruned one.
        data: images to calibrate on: a tensor ``(N, C, H, W)``, or batches, alone or first in a tuple.
        folder: made if it is missing.
        name: of the file, without its suffix.
        images: how many of the data to use.
        calibration: how ranges of activations are found: ``minmax``, ``entropy``, ``percentile``.
        any_batch: whether the file takes batches of any size.
        max_error: largest relative root mean square error on the calibration images.
        engine: ``onnxruntime`` or ``openvino``, which run the same file: it is the one that ``load`` takes; or
            ``sparse``: without ``entropy``.
        batch_size: that the file takes where it does not take any.

    Raises:
        ExportError: for images that are missing, not finite or do not fit the model, packages that are not installed,
            a model that cannot be exported, outputs that differ by more than ``max_error``.
    """
    if calibration not in CALIBRATIONS:
        raise ExportError(f"calibration={calibration!r}: expected one of {', '.join(CALIBRATIONS)}")
    if engine not in INT8_ENGINES:
        raise ExportError(f"engine {engine!r} runs no INT8: expected one of {', '.join(INT8_ENGINES)} with --int8")
    if engine == "sparse" and calibration == "entropy":
        raise ExportError("engine sparse has no calibration 'entropy': expected minmax or percentile")
    COUNT.check("images", images)
    POSITIVE.check("max_error", max_error)
    COUNT.check("batch_size", batch_size)
    get_engine(engine)
    if engine == "openvino":
        get_engine("onnxruntime")  # whose quantiser writes the file
    batches = list(calibration_images(data, images))
    if not any_batch:
        batches = _whole_batches(batches, batch_size)
    folder = open_folder(Path(folder))
    x = batches[0][:1] if any_batch else batches[0]
    expected = _outputs(model, batches)
    graph = export_graph(model, x, any_batch)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".deploy-") as temporary:
        small = Path(temporary) / f"{name}{'.pt2' if engine == 'sparse' else '.onnx'}"
        if engine == "sparse":
            made = lower_int8(graph, batches, calibration)
            if not made.layers:
                raise ExportError("the model has no convolution or linear layer that the engine sparse has in INT8")
            write_torch(graph, x, any_batch, small)
            weights, zeros = made.weights, made.zeros
        else:
            plain = Path(temporary) / "float.onnx"
            write_onnx(graph, x, any_batch, plain)
            quantize_onnx(plain, small, batches, calibration)
            weights, zeros = _count_weights(plain, small)
        seal(small, Purpose(engine, INT8))
        error, agreement = _compared(load(small), batches, expected)
        if not error <= max_error:
            raise ExportError(
                f"INT8 outputs differ by {error:.2f} of the float ones (root mean square), more than {max_error}: "
                "nothing was written; try another calibration or more images"
            )
        put_in_place([small], folder)
    return Quantized(folder / small.name, error, agreement, weights, zeros)


def calibration_images(data: Iterable[Any], images: int) -> Iterator[Tensor]:
    """Small batches of float32 images, as many as asked for.

    Raises:
        ExportError: for data that holds none, or other things.
    """
    found = 0
    for batch in [data] if isinstance(data, Tensor) else data:
        batch = batch[0] if isinstance(batch, Sequence) else batch
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            shown = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ExportError(f"calibration images: got {shown}, expected float tensors of shape (N, C, H, W)")
        if not bool(batch.isfinite().all()):
            raise ExportError("calibration images hold NaN or infinity: check how they are normalised")
        batch = batch[: images - found].float().cpu()
        found += len(batch)
        yield from batch.split(_IMAGES_AT_ONCE) if len(batch) else ()
        if found >= images:
            return
    if not found:
        raise ExportError("there are no calibration images: give some, such as 256 of the training set")


def _whole_batches(batches: Sequence[Tensor], size: int) -> list[Tensor]:
    """The images in batches of one size, the first ones again where the last is not full."""
    every = torch.cat(list(batches))
    missing = -len(every) % size
    again = every.repeat(-(-missing // len(every)), 1, 1, 1)[:missing]
    return list(torch.cat((every, again)).split(size))


@torch.no_grad()
def _outputs(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    was_training = model.training
    model.eval()
    try:
        outputs = [model(batch) for batch in batches]
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"the model refuses calibration images of shape {tuple(batches[0].shape)}: {error}"
        ) from error
    finally:
        model.train(was_training)
    if not all(isinstance(output, Tensor) for output in outputs):
        raise ExportError("the model has several outputs: INT8 needs one with a single tensor")
    return outputs


def quantize_onnx(plain: Path, small: Path, batches: Sequence[Tensor], calibration: str) -> None:
    """An ONNX file as one with QuantizeLinear and DequantizeLinear operators, by ONNX Runtime's static quantiser.

    Raises:
        ExportError: where that fails.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else {INPUT_NAME: batch.numpy()}

    methods = quantization.CalibrationMethod
    chosen = {"minmax": methods.MinMax, "entropy": methods.Entropy, "percentile": methods.Percentile}[calibration]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises its own pre-processing, which the export has done
    try:
        with refused("ONNX Runtime cannot quantise the model", kind=ExportError):
            quantization.quantize_static(
                plain,
                small,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=[
                    "Conv",
                    "Gemm",
                    "MatMul",
                    "Add",
                    "Mul",
                    "GlobalAveragePool",
                    "MaxPool",
                    "Relu",
                    "Clip",
                ],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=chosen,
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
    finally:
        root.setLevel(level)


def _count_weights(plain: Path, small: Path) -> tuple[int, int]:
    """INT8 weights and the zeros among them, once it is known that every 0 of the float model is one."""
    import numpy as np
    import onnx

    before = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(plain).graph.initializer}
    weights = zeros = 0
    for initializer in onnx.load(small).graph.initializer:
        name = initializer.name.removesuffix("_quantized")
        if initializer.data_type != onnx.TensorProto.INT8 or name == initializer.name or name not in before:
            continue
        values = onnx.numpy_helper.to_array(initializer)
        if values.ndim < 2 or values.shape != before[name].shape:
            continue
        if bool(np.any(values[before[name] == 0])):
            raise ExportError(f"quantised weights of {name} are not 0 where the pruned ones are")
        weights += values.size
        zeros += int((values == 0).sum())
    return weights, zeros


def _compared(run: Runner, batches: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float | None]:
    difference = size = same = count = 0.0
    for batch, wanted in zip(batches, expected, strict=True):
        output = first_call(run, batch, "the file in INT8")[0]
        difference += float((output - wanted).double().square().sum())
        size += float(wanted.double().square().sum())
        if wanted.dim() == 2:
            same += int((output.argmax(1) == wanted.argmax(1)).sum())
            count += len(wanted)
    return (difference / max(size, 1e-12)) ** 0.5, same / count if count else None


def accuracy(run: Runner, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 in percent of a deployed network (``load``) on batches of images and labels.

    A batch may have fewer labels than images: those beyond fill it up for a file that takes one batch size.

    Raises:
        ExportError: where there are no images.

    Example:
        >>> accuracy(lambda x: [x.mean((2, 3))], [(torch.eye(2)[:, :, None, None], torch.tensor([0, 0]))])
        50.0
    """
    return accuracies([run], batches)[0]


def accuracies(runs: Sequence[Runner], batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """The same of several networks, on the same images, which are read once.

    Raises:
        ExportError: where there are no images, or outputs that are no classes.
    """
    right, count = [0] * len(runs), 0
    for images, labels in batches:
        for i, run in enumerate(runs):
            output = run(images)[0]
            if output.dim() != 2:
                raise ExportError(f"outputs of shape {tuple(output.shape)} are no classes: top-1 cannot be measured")
            right[i] += int((output[: len(labels)].argmax(1) == labels).sum())
        count += len(labels)
    if not count:
        raise ExportError("there are no images to measure accuracy on")
    return [100.0 * each / count for each in right]
