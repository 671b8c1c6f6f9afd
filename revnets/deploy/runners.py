"""Deployed files opened as functions of images. They may be called from several threads at once."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.build import kernel_problem
from ..training.errors import refused
from .bind import bind
from .checks import plain_onnx, plain_program, plain_xml
from .graph import ExportError, flat
from .seal import Content

Runner = Callable[[Tensor], list[Tensor]]


def first_call(run: Runner, x: Tensor, what: str) -> list[Tensor]:
    """Outputs of a file that never ran: engines compile then, and raise what they like.

    Raises:
        ExportError: where it fails.
    """
    with refused(f"{what} fails on images of shape {tuple(x.shape)}", kind=ExportError):
        return run(x)


def open_torch(content: Content, threads: int | None) -> Runner:
    """A program of ``torch.export``, by torch and the kernel for zeros.

    Raises:
        ExportError: where it cannot be opened, or may run code.
    """
    program = plain_program(content)
    try:
        with _without_its_traceback():
            module: Any = torch.export.load(program).module()
    except Exception as error:  # of zip files, of schemas, of unpickling
        raise _cannot_open("torch.export", content, error) from error
    if kernel_problem() is None:
        bind(module)
    return module_runner(module, threads)


@contextlib.contextmanager
def _without_its_traceback() -> Iterator[None]:
    """Within, torch.export logs no traceback of what it cannot open, which is said in a sentence afterwards."""
    log = logging.getLogger("torch.export")

    def only_others(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    log.addFilter(only_others)
    try:
        yield
    finally:
        log.removeFilter(only_others)


def open_onnxruntime(content: Content, threads: int | None) -> Runner:
    """A model by ONNX Runtime, on the CPU.

    Raises:
        ExportError: where it cannot be opened, or names other files.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    model = str(content.path) if content.trusted else plain_onnx(content)
    if not content.trusted:  # or it takes what has the mark of its own format for that
        options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise _cannot_open("ONNX Runtime", content, error) from error
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]


def openvino_core() -> Any:
    """OpenVINO's ``Core``: one for the process, and never given back.

    Its CPU plug-in gives the thread that loads it another stack for signals, and unmaps that when it goes. Of two that
    go in the order in which they came, the second puts the first one's back, which is gone: the next signal that has a
    handler, such as a SIGTERM that is to save a checkpoint, then ends the process without a word.
    """
    with _ONE_CORE:  # threads that come at once would make two
        return _core()


_ONE_CORE = threading.Lock()


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


class OpenVino:
    """A model of OpenVINO: compiled once per shape, and one infer request per call that is under way."""

    def __init__(self, core: Any, model: Any, settings: dict[str, Any]) -> None:
        self._core, self._model, self._settings = core, model, settings
        self._compiled: dict[tuple[int, ...], tuple[Any, list[Any]]] = {}  # each with its requests at rest
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> list[Tensor]:
        compiled, at_rest = self._for_shape(tuple(x.shape))
        try:
            request = at_rest.pop()
        except IndexError:
            request = compiled.create_infer_request()
        found = request.infer({0: x.numpy()})
        outputs = [torch.from_numpy(found[port].copy()) for port in request.model_outputs]
        at_rest.append(request)  # one that failed is left out
        return outputs

    def kernels(self) -> str:
        """The kernel that ran most of the layers with weights, in OpenVINO's word, such as ``jit_avx512_BF16``."""
        found: Counter[str] = Counter()
        with self._lock:
            for compiled, _ in self._compiled.values():
                for op in compiled.get_runtime_model().get_ordered_ops():
                    words = op.get_rt_info()
                    if words["layerType"].astype(str) in ("Convolution", "FullyConnected"):
                        found[words["primitiveType"].astype(str)] += 1
        return found.most_common(1)[0][0] if found else ""

    def _for_shape(self, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """For fixed shapes it plans better. The model is reshaped in place, so by one thread at a time."""
        with self._lock:
            if shape not in self._compiled:
                self._model.reshape(list(shape))
                self._compiled[shape] = self._core.compile_model(self._model, "CPU", self._settings), []
            return self._compiled[shape]


def open_openvino(content: Content, threads: int | None, precision: str | None = "") -> Runner:
    """A model by OpenVINO, on the CPU: an ``.xml`` with its ``.bin``, or an ``.onnx``.

    Args:
        content: of the file.
        threads: None: as many as torch uses.
        precision: that it computes in; None leaves it to OpenVINO, which takes bfloat16 where the machine has it; by
            default float32, unless the file was chosen for another one.

    Raises:
        ExportError: where it cannot be opened, or names other files.
    """
    if precision == "":
        precision = None if content.purpose.precision else "f32"
    settings = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    core = openvino_core()
    try:
        if content.trusted:
            model = core.read_model(str(content.path))
        elif content.path.suffix == ".onnx":
            model = core.read_model(plain_onnx(content))
        else:
            model = core.read_model(plain_xml(content), content.weights)
    except RuntimeError as error:
        raise _cannot_open("OpenVINO", content, error) from error
    return OpenVino(core, model, settings)


def _cannot_open(engine: str, content: Content, error: Exception) -> ExportError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ExportError(f"{engine} cannot open {str(content.path)!r}: {reason}")


def module_runner(module: Callable[[Tensor], Any], threads: int | None) -> Runner:
    """A module as a runner with its number of threads."""

    @torch.no_grad()
    def run(x: Tensor) -> list[Tensor]:
        with torch_threads(threads):
            return flat(module(x))

    return run


class _Threads(threading.local):
    """Of each of Python's threads: how many ``torch_threads`` it is in."""

    depth = 0


_mine = _Threads()
_turn = threading.Condition()
_inside: list[int] = []  # what each of Python's threads that is in a ``torch_threads`` wants
_outside = [0]  # torch's number before the first of them


@contextlib.contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Within this context torch has so many threads; None: as many as before.

    torch has one such number for all of Python's threads: those that want the same one run together, others wait.
    """
    if number is None:
        yield
        return
    if not _mine.depth:
        with _turn:
            _turn.wait_for(lambda: not _inside or _inside[0] == number)
            if not _inside:
                _outside[0] = torch.get_num_threads()
            _inside.append(number)
    before = torch.get_num_threads() if _mine.depth else _outside[0]
    _mine.depth += 1
    try:
        if torch.get_num_threads() != number:
            torch.set_num_threads(number)
        yield
    finally:
        _mine.depth -= 1
        if not _mine.depth:
            with _turn:
                _inside.remove(number)
                _restore(before)
                _turn.notify_all()
        else:
            _restore(before)


def _restore(number: int) -> None:
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
