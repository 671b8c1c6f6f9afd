"""Engines at the precisions that a user would pick anyway: their default, float32, INT8."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from ..kernels.build import byte_target, kernel_problem, kernel_target
from .candidates import FLOAT32, INT8
from .engines import ENGINES, get_engine, write_onnx, write_torch
from .graph import ExportError
from .lower_int8 import lower_int8
from .quantize import quantize_onnx
from .runners import OpenVino, Runner, open_onnxruntime, open_openvino, open_torch, openvino_core
from .seal import read

DEFAULT = "default"


@dataclass(frozen=True)
class Peer:
    """An engine of ``ENGINES`` at a precision that is not float32 by our choice.

    Attributes:
        engine: its name.
        precision: ``int8`` (weights and activations, ranges from the example input), or ``default``: its own choice.
    """

    engine: str
    precision: str

    @property
    def name(self) -> str:
        """As ``bench-deploy --engines`` spells it."""
        return f"{self.engine} {self.precision}"

    def used(self) -> str:
        """What it computes in on this machine."""
        return default_precision() if self.precision == DEFAULT else self.precision

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        more = ENGINES["onnxruntime"].missing() if self.precision == INT8 and self.engine != "sparse" else []
        return [*ENGINES[self.engine].missing(), *more]

    def open(self, graph: fx.GraphModule, x: Tensor, folder: Path, key: str, threads: int) -> Runner:
        """The graph as a function of images.

        Args:
            graph: of ``export_graph``, for the batch size of ``x`` alone; it is left as it is.
            x: an example of the input; INT8 ranges are found on it.
            folder: for the files.
            key: of this graph among those of the folder.
            threads: of the engine.
        """
        if self.engine == "sparse":
            path = folder / f"{self.name}-{key}.pt2"
            if not path.exists():
                own = copy.deepcopy(graph)
                lower_int8(own, [x])
                write_torch(own, x, False, path)
            return open_torch(read(path, trust=True), threads)
        path = folder / f"plain-{key}.onnx"
        if not path.exists():
            write_onnx(graph, x, False, path)
        if self.precision == INT8:
            plain, path = path, folder / f"int8-{key}.onnx"
            if not path.exists():
                quantize_onnx(plain, path, [x], "minmax")
        opened = open_onnxruntime if self.engine == "onnxruntime" else partial(open_openvino, precision=None)
        return opened(read(path, trust=True), threads)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("openvino", DEFAULT),
        Peer("onnxruntime", INT8),
        Peer("openvino", INT8),
        Peer("sparse", INT8),
    )
}
"""By name; ONNX Runtime's default is float32."""


def check_engine(name: str) -> None:
    """Make sure that an engine, or one of ``PEERS``, can be used.

    Raises:
        ExportError: where it is unknown or not installed.
    """
    if name not in PEERS:
        if name.partition(" ")[0] in ENGINES and " " in name:
            raise ExportError(f"unknown engine {name!r}: expected one of {', '.join((*ENGINES, *PEERS))}")
        get_engine(name)
        return
    missing = PEERS[name].missing()
    if missing:
        raise ExportError(f"engine {name}: {', '.join(missing)} not installed: pip install 'revnets[deploy]'")


def default_precision() -> str:
    """What OpenVINO computes float networks in on this machine where nobody tells it: ``float32`` or ``bfloat16``."""
    hint = str(openvino_core().get_property("CPU", "INFERENCE_PRECISION_HINT"))
    return "bfloat16" if "bf" in hint else "float16" if "16" in hint else FLOAT32


def kernels_of(engine: str, run: Runner | None = None) -> str:
    """What ran an engine's layers, as far as it tells: kernels of OpenVINO, or the instructions of torch and of ours.

    Args:
        engine: a name of ``ENGINES`` or ``PEERS``, or one that begins with ``torch``.
        run: the engine, after a call.
    """
    if isinstance(run, OpenVino):
        return run.kernels()
    if engine.startswith("torch"):
        return torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    if engine.startswith("sparse"):
        if kernel_problem() is not None:
            return "none: torch's dense ones"
        return byte_target() if engine == f"sparse {INT8}" else kernel_target()
    return ""


def instructions() -> list[str]:
    """Which of the instructions that decide about INT8 and bfloat16 the machine has."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    names = {
        "AVX2": "avx2",
        "AVX-512": "avx512f",
        "VNNI": "avx512_vnni",
        "AVX-VNNI": "avx_vnni",
        "BF16": "avx512_bf16",
        "AMX": "amx_int8",
        "NEON": "asimd",
        "DOTPROD": "asimddp",
    }
    return [name for name, flag in names.items() if flag in words]
