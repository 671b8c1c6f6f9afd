"""The C++ kernel (``sparse_conv.cpp``, its headers): compiled at its first use where a compiler is, then kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

SOURCE = Path(__file__).with_name("sparse_conv.cpp")
HEADERS = [
    SOURCE.with_name(f"{name}.h")
    for name in ("vectors", "call", "convolution", "depthwise", "planes", "transpose", "weight_grad")
]
COMPILER_VARIABLE = "REVNETS_CXX"
FLAGS_VARIABLE = "REVNETS_CXXFLAGS"
CACHE_VARIABLE = "REVNETS_CACHE"
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid")

_OPTIONS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast"]
# Flags to compile and to link with, the best first. torch has loaded an OpenMP runtime: a second pool of threads would
# compete with it, so its symbols are left to be found there; where they are not, the kernel brings its own runtime.
_ATTEMPTS: list[tuple[list[str], list[str]]] = [
    (["-march=native", "-fopenmp"], []),
    (["-march=native", "-fopenmp"], ["-fopenmp"]),
    (["-mcpu=native", "-fopenmp"], ["-fopenmp"]),
    (["-march=native"], []),
    ([], []),
]


class KernelUnavailable(RuntimeError):
    """The kernel cannot be built here; the message says why."""


class CallStruct(ctypes.Structure):
    """``Call`` of ``call.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "columns", "rows", "bias", "residual", "y")),
        *((name, ctypes.c_int64) for name in ("n", "c_in", "h", "w", "c_out", "h_out", "w_out")),
        *((name, ctypes.c_int64) for name in ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w")),
        *((name, ctypes.c_int64) for name in ("groups", "activation", "kind", "chunk")),
        *((name, ctypes.c_int64) for name in ("first_in", "first_out", "count")),
    ]


class GradStruct(ctypes.Structure):
    """``GradCall`` of ``weight_grad.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "columns", "rows", "places", "gradient")),
        *((name, ctypes.c_int64) for name in ("n", "c_in", "c_out", "plane", "groups", "chunk")),
    ]


@functools.cache
def load_kernel() -> ctypes.CDLL:
    """The compiled kernel; the first call on a machine compiles it, in seconds, into ``cache_folder()``.

    The environment variable ``REVNETS_CXX`` names the compiler (``none``: do without), ``REVNETS_CXXFLAGS`` more flags
    to compile and to link with (after the library's own, so that they win), ``REVNETS_CACHE`` the folder.

    Raises:
        KernelUnavailable: where there is no compiler, or none that can compile it.
    """
    compiler = _compiler()
    source = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    build = [*compiler, *_OPTIONS, *_more_flags(), str(_ATTEMPTS), _machine()]
    key = hashlib.sha256(source + "\n".join(build).encode())
    name = f"sparse_conv-{key.hexdigest()[:16]}.so"
    folder = cache_folder()
    path = folder / name
    if not path.exists():
        with FileLock(folder / f"{name}.lock"):  # several processes: one compiles, the others wait
            if not path.exists():
                _build(compiler, path)
    return _checked(path)


@functools.cache
def kernel_problem() -> str | None:
    """Why there is no kernel, in words; None where it works."""
    try:
        load_kernel()
    except KernelUnavailable as error:
        return str(error)
    return None


def kernel_target() -> str:
    """What the kernel was compiled for: ``AVX-512``, ``AVX2``, ``NEON`` or ``portable``."""
    return load_kernel().revnets_target().decode()


def warn_of_dense_path() -> None:
    """Say, once, that sparse layers run dense and why."""
    problem = kernel_problem()
    if problem is not None:
        warnings.warn(
            f"sparse layers run on torch's dense kernels, not faster for their zeros: {problem}", stacklevel=3
        )


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$REVNETS_CACHE``, or ``revnets`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "revnets")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # read-only home: keep it for this boot
        folder = Path(tempfile.gettempdir()) / f"revnets-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise KernelUnavailable(f"{folder} belongs to somebody else: set {CACHE_VARIABLE} to a folder") from None
        return folder


def _compiler() -> list[str]:
    wanted = os.environ.get(COMPILER_VARIABLE) or os.environ.get("CXX")
    if wanted == "none":
        raise KernelUnavailable(f"{COMPILER_VARIABLE}=none")
    candidates = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    names = ", ".join(candidate[0] for candidate in candidates)
    raise KernelUnavailable(f"no C++ compiler found ({names}): install one, or name it in {COMPILER_VARIABLE}")


def _more_flags() -> list[str]:
    return shlex.split(os.environ.get(FLAGS_VARIABLE, ""))


def _machine() -> str:
    """What ``-march=native`` means here: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags} {platform.libc_ver()}"


def _build(compiler: Sequence[str], path: Path) -> None:
    """Compile into a folder of its own, try it, move it."""
    problem = ""
    for flags, link_flags in _ATTEMPTS:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            part, whole = f"{folder}/kernel.o", Path(folder) / "kernel.so"
            try:
                _run([*compiler, *_OPTIONS, *flags, *_more_flags(), "-c", str(SOURCE), "-o", part])
                _run([*compiler, "-shared", part, "-o", str(whole), *link_flags, *_more_flags()])
                _checked(whole)
                whole.replace(path)
                return
            except KernelUnavailable as error:
                problem = problem or str(error)
    raise KernelUnavailable(f"{shlex.join(compiler)} cannot compile {SOURCE.name}: {problem}")


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KernelUnavailable(next((line for line in lines if "error" in line), lines[0]))


def _checked(path: Path) -> ctypes.CDLL:
    """The library, once it is known to load and to agree about the layout of a call."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(str(error)) from error
    library.revnets_target.restype = ctypes.c_char_p
    library.revnets_call_size.restype = ctypes.c_int64
    library.revnets_fits.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    library.revnets_fits.restype = ctypes.c_int64
    library.revnets_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.revnets_run.restype = None
    library.revnets_weight_grad.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.revnets_weight_grad.restype = None
    library.revnets_transpose.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int64]
    library.revnets_transpose.restype = None
    library.revnets_grad_call_size.restype = ctypes.c_int64
    sizes = library.revnets_call_size(), library.revnets_grad_call_size()
    if sizes != (ctypes.sizeof(CallStruct), ctypes.sizeof(GradStruct)):
        raise KernelUnavailable(f"{path} was compiled from another version of {SOURCE.name}: delete it")
    return library


@dataclass(frozen=True)
class Geometry:
    """A convolution's numbers, as ``torch.nn.Conv2d`` names them."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output.

        Example:
            >>> Geometry(8, 8, (3, 3), (2, 2), (1, 1)).output_size(224, 225)
            (112, 113)
        """
        pairs = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        out = [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in pairs]
        return out[0], out[1]

    @property
    def is_depthwise(self) -> bool:
        """Whether the kernel has loops of its own for it: one channel per group, no dilation."""
        return self.groups == self.in_channels == self.out_channels and self.dilation == (1, 1)
