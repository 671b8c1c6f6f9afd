"""``revnets bench-deploy``: what is timed, as typed; the work is in ``command``."""

from pathlib import Path
from typing import Annotated

import typer

from ..arguments import argument, number, path, text
from ..training.options.values import COUNT, SPARSITY, THREADS, words
from .command import BenchRequest, bench


def bench_deploy_command(
    models: Annotated[list[str], argument("any timm models; random weights", "MODEL")],
    sparsity: Annotated[str, text("of copies pruned by magnitude, separated by commas")] = "0,0.7,0.8,0.9",
    threads: Annotated[str, text("numbers of threads, separated by commas")] = "1",
    pattern: Annotated[
        str | None, text("4x1: zeros in blocks of four input channels, as sparse INT8 skips them")
    ] = None,
    engines: Annotated[
        str | None,
        text("torch eager, onnxruntime, onnxruntime int8, openvino default, ... (default: all that are installed)"),
    ] = None,
    img_size: Annotated[int | None, number(COUNT, "default: the published one")] = None,
    batch_size: Annotated[str, text("images per call, separated by commas, such as 1,64")] = "1",
    repeats: Annotated[int, number(COUNT, "timed calls per case; their median counts")] = 25,
    layers: Annotated[bool, typer.Option(help="also single 1x1 convolutions")] = True,
    by_layer: Annotated[bool, typer.Option(help="also what each layer takes, in our kernel and in OpenVINO")] = False,
    output: Annotated[Path | None, path("folder for JSON, tables and a picture")] = None,
) -> None:
    """Inference time of dense and pruned networks on every engine, and of single layers: interleaved, medians."""
    shares = SPARSITY.read_list("--sparsity", sparsity)
    counts = THREADS.read_list("--threads", threads)
    names = words("--engines", engines, blanks=False) if engines else []
    batches = COUNT.read_list("--batch-size", batch_size)
    size = (batches, img_size, repeats, layers, output, pattern, by_layer)
    bench(BenchRequest(models, shares, counts, names, *size))
