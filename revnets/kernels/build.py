"""The C++ kernel (``sparse_conv.cpp``, its headers): compiled at its first use where a compiler is, then kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import CACHE_VARIABLE as CACHE_VARIABLE
from .cache import folders, open_kept, seal
from .compiler import CompilerHangs, KernelUnavailable, compile_library, try_compiler, try_room, turn

SOURCE = Path(__file__).with_name("sparse_conv.cpp")
HEADERS = [
    SOURCE.with_name(f"{name}.h")
    for name in (
        *("vectors", "call", "quads", "convolution", "depthwise", "linear", "planes", "transpose", "weight_grad"),
        *("windows", "pixels", "turns", "norms", "norm_parts", "norms_by_pixel", "norms_of_planes"),
        *("byte_vectors", "bytes", "byte_convolution", "byte_depthwise", "byte_linear", "byte_planes"),
    )
]
COMPILER_VARIABLE = "REVNETS_CXX"
FLAGS_VARIABLE = "REVNETS_CXXFLAGS"
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


_log = logging.getLogger(__name__)


class _NoCompiler(KernelUnavailable):
    """There is none; a kernel that is compiled already will do."""


CONVOLUTION, DEPTHWISE, MEAN, SCALE, MAP, COPY, UPSAMPLE, MAX_POOL, LINEAR = range(9)
"""``Kind`` of ``call.h``, of floats: those whose operands and outputs may be some channels of larger ones."""


class CallStruct(ctypes.Structure):
    """``Call`` of ``call.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "columns", "rows", "bias", "residual", "y")),
        *((name, ctypes.c_void_p) for name in ("scales", "table")),
        *((name, ctypes.c_int64) for name in ("n", "c_in", "h", "w", "c_out", "h_out", "w_out")),
        *((name, ctypes.c_int64) for name in ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w")),
        *((name, ctypes.c_int64) for name in ("groups", "activation", "kind", "chunk")),
        *((name, ctypes.c_int64) for name in ("first_in", "first_out", "count")),
        *((name, ctypes.c_int64) for name in ("zero_in", "zero_out", "zero_residual", "low", "high", "to_float")),
        *((name, ctypes.c_void_p) for name in ("gates", "means")),
        *((f"{name}_image", ctypes.c_int64) for name in ("x", "residual", "y", "gates", "means")),
        *((name, ctypes.c_float) for name in ("scale", "residual_scale")),
        ("counts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_row", "end_row", "x_plane", "y_plane", "ring", "ring_first")),
    ]


class GradStruct(ctypes.Structure):
    """``GradCall`` of ``weight_grad.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "columns", "rows", "places", "gradient")),
        *((name, ctypes.c_int64) for name in ("n", "c_in", "c_out", "plane", "groups", "chunk", "by_pixel")),
    ]


class PixelStruct(ctypes.Structure):
    """``PixelCall`` of ``pixels.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "columns", "rows", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("pixels", "c_in", "c_out", "groups", "chunk")),
    ]


class WindowStruct(ctypes.Structure):
    """``WindowCall`` of ``windows.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "columns", "rows", "bias", "taps", "y")),
        *((name, ctypes.c_void_p) for name in ("places", "gradient")),
        *((name, ctypes.c_int64) for name in ("n", "c_in", "h", "w", "x_image", "x_channel")),
        *((name, ctypes.c_int64) for name in ("c_out", "h_out", "w_out", "y_image", "y_channel", "y_row", "y_column")),
        *((name, ctypes.c_int64) for name in ("tap_count", "stride_h", "stride_w", "pad_top", "pad_left")),
        *((name, ctypes.c_int64) for name in ("frame_h", "frame_w", "chunk")),
    ]


class NormStruct(ctypes.Structure):
    """``NormCall`` of ``norms.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "weight", "bias", "gates", "more")),
        *((name, ctypes.c_void_p) for name in ("mean", "var", "of_weight", "of_bias", "planes", "y")),
        *((name, ctypes.c_int64) for name in ("n", "channels", "plane", "by_pixel", "activation")),
        ("eps", ctypes.c_float),
    ]


@functools.cache
def load_kernel() -> ctypes.CDLL:
    """The compiled kernel; the first call on a machine compiles it, in seconds, and keeps it (see ``cache.folders``).

    The environment variable ``REVNETS_CXX`` names the compiler (``none``: do without), ``REVNETS_CXXFLAGS`` more flags
    to compile and to link with (after the library's own, so that they win), ``REVNETS_CACHE`` the folder. A kernel that
    is there is used where there is no compiler, too, and where the folder is read-only.

    Raises:
        KernelUnavailable: where there is no compiler, or none that can compile it, and no compiled kernel.
    """
    compiler, missing = None, None
    try:
        compiler = _compiler()
    except _NoCompiler as error:
        missing = error
    key = kernel_key()
    problems: list[str] = []
    for folder in folders(problems):
        try:
            library = _kept(folder, key, compiler)
            if library is None and compiler is not None:
                library = _built(folder, key, compiler)
            if library is None and os.access(folder, os.W_OK):
                break  # the next folder is for what cannot be written to this one
        except OSError as error:  # a folder that is read-only or full: perhaps the next one
            problems.append(str(error))
            continue
        if library is not None:
            if problems:
                _log.warning("the compiled kernel is in %s: %s", folder, "; ".join(problems))
            return library
    if missing is not None:
        raise missing
    raise KernelUnavailable(f"there is no folder for the compiled kernel: {'; '.join(problems)}")


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


def byte_target() -> str:
    """What layers of bytes were compiled for: ``AVX-512 VNNI``, ``AVX-512``, ``AVX2`` or ``portable``."""
    return load_kernel().revnets_byte_target().decode()


def warn_of_dense_path() -> None:
    """Say, once, that sparse layers run dense and why."""
    problem = kernel_problem()
    if problem is not None:
        warnings.warn(
            f"sparse layers run on torch's dense kernels, not faster for their zeros: {problem}", stacklevel=3
        )


# --- what it is compiled by and from ---------------------------------------------------------------------------------


def _wanted() -> tuple[str, str]:
    """The compiler that the user names, and the variable in which; both empty where none is named."""
    for variable in (COMPILER_VARIABLE, "CXX"):
        if os.environ.get(variable, "").strip():
            return os.environ[variable].strip(), variable
    return "", ""


def _compiler() -> list[str]:
    wanted, variable = _wanted()
    if wanted == "none":
        raise KernelUnavailable(f"{variable}=none")
    candidates = [_split(wanted, variable, _NoCompiler)] if wanted else [["g++"], ["clang++"], ["c++"]]
    for candidate in candidates:
        if candidate and shutil.which(candidate[0]):
            return candidate
    names = ", ".join(candidate[0] for candidate in candidates if candidate)
    raise _NoCompiler(f"no C++ compiler found ({names}): install one, or name it in {COMPILER_VARIABLE}")


def _more_flags() -> list[str]:
    return _split(os.environ.get(FLAGS_VARIABLE, ""), FLAGS_VARIABLE, KernelUnavailable)


def _split(words: str, variable: str, problem: type[KernelUnavailable]) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise problem(f"{variable}={words!r} cannot be read ({error}): quote it as in a shell") from error


def kernel_key() -> str:
    """What a kernel is compiled from and for, as a checksum. The compiler is no part: it may not be there."""
    source = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    build = [*_OPTIONS, *_more_flags(), str(_ATTEMPTS), _machine()]
    return hashlib.sha256(source + os.fsencode("\n".join(build))).hexdigest()


def _machine() -> str:
    """What ``-march=native`` means here: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags} {platform.libc_ver()}"


# --- kept ------------------------------------------------------------------------------------------------------------


def _name(key: str, compiler: Sequence[str]) -> str:
    by = hashlib.sha256(os.fsencode("\n".join(compiler))).hexdigest()
    return f"sparse_conv-{key[:16]}-{by[:8]}.so"


def _kept(folder: Path, key: str, compiler: Sequence[str] | None) -> ctypes.CDLL | None:
    """The kernel in a folder: of this compiler, or of any where there is none or none is named."""
    paths = [] if compiler is None else [folder / _name(key, compiler)]
    if compiler is None or not _wanted()[0]:
        paths += sorted(set(folder.glob(f"sparse_conv-{key[:16]}-*.so")) - set(paths))
    for path in paths:
        try:
            return _opened(path, key)
        except FileNotFoundError:
            pass
        except (OSError, KernelUnavailable) as error:
            _log.warning("a kernel is %s: %s", "not used" if compiler is None else "compiled again", error)
    return None


def _opened(path: Path, key: str) -> ctypes.CDLL:
    """The library of a file, which is checked and loaded by one descriptor: nobody can exchange it in between.

    The descriptor stays open. The loader knows a library by the name by which it was loaded, so that the number must
    not come to mean another file.
    """
    handle = open_kept(path, key)
    name = Path(f"/proc/self/fd/{handle}")
    return _checked(name if name.exists() else path)  # without /proc by name: others cannot write the folder


# --- made ------------------------------------------------------------------------------------------------------------


def _built(folder: Path, key: str, compiler: Sequence[str]) -> ctypes.CDLL:
    """Compiled; of several processes one compiles, the others wait.

    Raises:
        KernelUnavailable: by this compiler it cannot be.
        OSError: there is no room in the folder, or it is read-only.
    """
    path = folder / _name(key, compiler)
    with turn(path.with_name(f"{path.name}.lock")) as waited:
        kept = _kept(folder, key, compiler) if waited else None
        return kept or _build(compiler, path, key)


def _build(compiler: Sequence[str], path: Path, key: str) -> ctypes.CDLL:
    """Compile into a folder of its own, try it, move it."""
    problem = ""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try_room(folder / "room")
        try:
            try_compiler(compiler, folder, _OPTIONS, _more_flags())
        except KernelUnavailable as error:
            raise KernelUnavailable(f"{shlex.join(compiler)} cannot compile: {error}") from error
        for number, (flags, link_flags) in enumerate(_ATTEMPTS):
            whole, sealed = folder / f"kernel-{number}.so", folder / f"sealed-{number}.so"
            try:
                compile_library(
                    compiler, SOURCE, whole, [*_OPTIONS, *flags, *_more_flags()], [*link_flags, *_more_flags()]
                )
                seal(whole, sealed, key)
                library = _opened(sealed, key)
            except CompilerHangs:
                raise
            except KernelUnavailable as error:
                problem = problem or str(error)
                continue
            try:
                sealed.replace(path)
            except OSError as error:
                _log.warning("the compiled kernel is used, but not kept: %s", error)
            return library
    raise KernelUnavailable(f"{shlex.join(compiler)} cannot compile {SOURCE.name}: {problem}")


_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p
SIZES = {
    "revnets_call_size": CallStruct,
    "revnets_grad_call_size": GradStruct,
    "revnets_pixel_call_size": PixelStruct,
    "revnets_window_call_size": WindowStruct,
    "revnets_norm_call_size": NormStruct,
}
"""Functions that say how large the library takes a structure to be."""

FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "revnets_target": (ctypes.c_char_p, []),
    "revnets_byte_target": (ctypes.c_char_p, []),
    "revnets_byte_pairs": (_INTEGER, []),
    "revnets_quads": (_INTEGER, []),
    "revnets_fits": (_INTEGER, [_POINTER, _POINTER, _INTEGER, _INTEGER, _INTEGER]),
    "revnets_run": (None, [_POINTER, _INTEGER, _INTEGER, _POINTER]),
    "revnets_weight_grad": (None, [_POINTER, _POINTER, _INTEGER]),
    "revnets_windows": (None, [_POINTER, _INTEGER]),
    "revnets_windows_grad": (None, [_POINTER, _POINTER, _INTEGER]),
    "revnets_pixels": (None, [_POINTER, _INTEGER]),
    "revnets_norm": (None, [_POINTER, _INTEGER, _INTEGER]),
    "revnets_mask": (None, [_POINTER, _POINTER, _INTEGER, _POINTER, _INTEGER]),
    "revnets_gather": (None, [_POINTER, _POINTER, _INTEGER, _POINTER, _INTEGER]),
    "revnets_transpose": (None, [_POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER]),
    **dict.fromkeys(SIZES, (_INTEGER, [])),
}
"""What the library has to have: of each function its result and its arguments."""


def _checked(path: Path) -> ctypes.CDLL:
    """The library, once it is known to load and to agree about the layout of a call."""
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:  # AttributeError: a library without these functions
        raise KernelUnavailable(f"{path} is not the library of {SOURCE.name}: {error}") from error
    if any(getattr(library, name)() != ctypes.sizeof(kind) for name, kind in SIZES.items()):
        raise KernelUnavailable(f"{path} was compiled from another version of {SOURCE.name}: delete it")
    return library


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


# --- what it is told -------------------------------------------------------------------------------------------------


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
