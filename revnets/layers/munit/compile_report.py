"""What a compiler makes of the FP8 convolution kernels, without a GPU.

``python -m revnets.layers.munit.compile_report`` prints a table for Hopper, with ``89`` one for Ada. Registers and
spills are read from the binaries, shared memory from Triton's notes, instructions from the PTX.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

E4M3, E5M2, CODE = "fp8e4nv", "fp8e5", "u8"  # as Triton names them
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], 0x([0-9a-f]+)")
_FP8 = re.compile(r"\.(e[45]m[23])\b")


@dataclass(frozen=True)
class Variant:
    """One kernel with its types and tile: its words, and what the compiler needs to know."""

    words: str
    kernel: str
    pointers: tuple[str, ...]
    constants: Mapping[str, Any]
    ones: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Row:
    """What became of a variant.

    Attributes:
        words: kernel, types and tile.
        registers: of a thread.
        spilled: bytes of a thread's registers that are kept in memory.
        shared: bytes of shared memory of a program.
        instructions: matrix instructions by name, such as ``wgmma e5m2 x e4m3``, with their number.
        copies: bytes of the asynchronous loads into shared memory, by which operands arrive.
    """

    words: str
    registers: int
    spilled: int
    shared: int
    instructions: Mapping[str, int]
    copies: tuple[int, ...]


def variants() -> Iterator[Variant]:
    """Every kernel, in the types of training in bfloat16 and every tile of the list."""
    from .fp8_conv_triton import _CHANNELS, _ROWS, _SUM_BLOCK, TILES

    block = {"BLOCK_ROWS": _ROWS, "BLOCK_CHANNELS": _CHANNELS}
    for name, exponent, mantissa in (("e4m3", 4, 3), ("e5m2", 5, 2)):
        for layout, one in (("channels last", "stride_c"), ("contiguous", "stride_x")):
            constants = {"EXPONENT": exponent, "MANTISSA": mantissa, "FLAT": True, **block}
            yield Variant(f"cast to {name}, {layout}", "cast_maps", ("bf16", CODE), constants, (one,))
    yield Variant("pixels contiguous", "columns", (CODE, CODE), {"ALIGN": 16, **block})
    for m, n, warps, stages in TILES:
        words = f"{m}x{n}x128, {warps} warps, {stages} stages"
        blocks = {"DECODED": False, "BLOCK_K": 128, "BLOCK_M": m, "BLOCK_N": n}
        for name, kind in (("output", E4M3), ("input gradient", E5M2)):
            constants = {"X_E4M3": kind == E4M3, **blocks}
            yield Variant(
                *(f"{name}, {words}", "product", (kind, E4M3, "bf16"), constants, ("stride_c",), warps, stages)
            )
        for align in (16, 8):
            constants = {"ALIGN": align, **blocks}
            name = f"weight gradient, loads of {align} bytes, {words}"
            yield Variant(name, "weight_partials", (E5M2, E4M3, "fp32"), constants, (), warps, stages)
    yield Variant("sum of a weight's parts", "sum_partials", ("fp32", "bf16"), {"BLOCK": _SUM_BLOCK})


def compile_variant(variant: Variant, capability: int = 90) -> Any:
    """Triton's compiled kernel, for a GPU that need not be here.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import fp8_conv_kernels_triton, fp8_conv_triton

    if fp8_conv_triton.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: expected Triton's compiler; unset it for this report")
    kernel = getattr(fp8_conv_kernels_triton, variant.kernel)
    constants: dict[str, Any] = {**variant.constants, **dict.fromkeys(variant.ones, 1)}
    pointers = iter(variant.pointers)
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = f"*{next(pointers)}" if pointer else ("fp32" if name in ("top", "scale") else "i32")
        if pointer or not parameter.do_not_specialize:  # channels padded, strides of whole vectors
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(capability: int = 90, chosen: Iterator[Variant] | None = None) -> list[Row]:
    """Compile variants, all by default, and read what the compiler says of them.

    Args:
        capability: such as 90 for Hopper, 89 for Ada.
        chosen: some of ``variants()``.

    Raises:
        RuntimeError: where Triton comes without NVIDIA's ``cuobjdump``, or interprets.
    """
    rows = []
    for variant in variants() if chosen is None else chosen:
        compiled = compile_variant(variant, capability)
        resources = *_resources(compiled.asm["cubin"]), compiled.metadata.shared
        ptx = compiled.asm["ptx"]
        copies = tuple(sorted({int(size, 16) for size in _COPY.findall(ptx)}))
        rows.append(Row(variant.words, *resources, _instructions(ptx), copies))
    return rows


def _instructions(ptx: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for match in _MATRIX.finditer(ptx):
        kinds = _FP8.findall(match.group())
        found[f"{match.group(1).split('.')[0]} {' x '.join(kinds) or 'not in FP8'}"] += 1
    return dict(found)


def reader() -> Path | None:
    """NVIDIA's ``cuobjdump``, as it comes with Triton; None where it does not."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() and os.access(path, os.X_OK) else None


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: the kernels have no arrays, so what is there was spilled."""
    program = reader()
    if program is None:
        raise RuntimeError("this Triton comes without cuobjdump: expected it in triton/backends/nvidia/bin")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        words = subprocess.run([program, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", words)
    if found is None:
        raise RuntimeError(f"cuobjdump said {words[:80]!r}: expected a line with REG and STACK")
    return int(found[1]), int(found[2])


def table(rows: list[Row]) -> str:
    """The report in Markdown."""
    head = "| kernel, tile | registers | spilled bytes | shared KiB | asynchronous loads | matrix instructions |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in rows:
        words = ", ".join(f"{count} {name}" for name, count in row.instructions.items()) or "none"
        copies = ", ".join(f"{size} bytes" for size in row.copies) or "none"
        numbers = f"{row.registers} | {row.spilled} | {row.shared / 1024:.0f}"
        lines.append(f"| {row.words} | {numbers} | {copies} | {words} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, for Hopper or the compute capability given, such as 89."""
    try:
        capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
        rows = report(capability)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"compile_report: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(rows))


if __name__ == "__main__":
    main()
