"""The ``revnets`` command."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from .training.files import NotWritten

Number = TypeVar("Number", int, float)


class _Commands(TyperGroup):
    """Commands that say in one sentence which file could not be written."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NotWritten as error:
            _fail(error)


app = typer.Typer(
    cls=_Commands,
    help="Memory-efficient vision backbones: measure what they need.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    """Memory-efficient vision backbones: measure what they need."""


@app.command()
def bench(
    models: Annotated[list[str] | None, typer.Argument(help="NAME@SIZE:BATCH, any timm model", metavar="MODEL")] = None,
    repeats: Annotated[int, typer.Option(help="timed steps per row; their median counts", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    amp_dtype: Annotated[str | None, typer.Option(help="autocast to bfloat16 or float16")] = None,
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    modes: Annotated[str, typer.Option(help="of these modes only, separated by commas")] = "",
    ablate: Annotated[bool, typer.Option(help="also each part of our work left out, in reversible mode")] = False,
    compiled: Annotated[bool, typer.Option(help="also with compiled branches; compiling takes minutes")] = False,
    output: Annotated[Path | None, typer.Option(help="also write the figures as JSON")] = None,
) -> None:
    """Step time and activation memory of networks in their memory modes, in one interleaved run."""
    import revnets  # noqa: F401 - registers the models

    from .profiling import bench as benchmark
    from .profiling.command import Setting, track

    try:
        setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"the folder {str(output.parent)!r} for the output does not exist: create it first")
        names = models or ["revbifpn_s0@224:8", "revbifpn_s1@256:8", "efficientnet_b0@224:8"]
        cases = benchmark.make_cases(names, modes, setting, ablate, compiled)
        rows = benchmark.run(cases, setting, repeats, lambda work: track(list(work), "measuring"))
    except (ValueError, RuntimeError) as error:
        _fail(error)
    benchmark.print_rows(rows, setting)
    if output is not None:
        benchmark.save(rows, setting, output)


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(help="NAME@SIZE:BATCH of timm, or an MMDetection CONFIG.py@800x1333:1", metavar="MODEL"),
    ],
    img_size: Annotated[
        int | None, typer.Option(help="where MODEL has none (default: the published one)", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="where MODEL has none", min=1)] = 8,
    mode: Annotated[str, typer.Option(help="of these modes only, separated by commas")] = "",
    amp_dtype: Annotated[str | None, typer.Option(help="autocast to bfloat16 or float16")] = None,
    optimizer: Annotated[str, typer.Option(help="any of timm's, or none")] = "sgd",
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; to predict, it need not be here")] = "cpu",
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    measure: Annotated[bool | None, typer.Option(help="run the step, too (default: where it takes seconds)")] = None,
    compare: Annotated[list[str] | None, typer.Option(help='more networks: "resnet50 efficientnet_b7@600"')] = None,
    fit: Annotated[str | None, typer.Option(help="what is the largest that fits 24GB (10^9 bytes) or 24GiB?")] = None,
    fit_what: Annotated[str, typer.Option(help="the largest batch or image")] = "batch",
    part: Annotated[str, typer.Option(help="of detectors only: backbone, neck (with backbone), detector")] = "",
    sweep: Annotated[str, typer.Option(help="instead: some of families, depth, resolution; predicted only")] = "",
    output: Annotated[Path | None, typer.Option(help="folder for JSON, CSV and pictures")] = None,
) -> None:
    """Memory, FLOPs and time of a training step: predicted without running it, measured beside it."""
    from .profiling import command

    names = [model, *(name for text in compare or [] for name in text.replace(",", " ").split())]
    try:
        chosen = None if optimizer == "none" else optimizer
        setting = command.Setting(device, channels_last, amp_dtype, exact, chosen)
        request = command.Request(names, img_size, batch_size, mode, measure, fit, fit_what, output, sweep, part)
        command.run(request, setting)
    except ValueError as error:
        _fail(error)


@app.command()
def layers(
    model: Annotated[str | None, typer.Argument(help="convert this one, any timm model", metavar="[MODEL")] = None,
    spec: Annotated[str, typer.Argument(help="such as sparse_wide:0.75", metavar="SPEC]")] = "",
    img_size: Annotated[int | None, typer.Option(help="to count FLOPs at (default: the published one)", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="folder for FLOPs as CSV, JSON and a picture")] = None,
) -> None:
    """The layers that specs can name, or what one of them makes of a network: layer by layer, with FLOPs."""
    import revnets  # noqa: F401 - registers the models

    from .layers import command

    try:
        if model is None:
            command.print_layers()
        else:
            command.print_conversion(model, spec, img_size, output)
    except ValueError as error:
        _fail(error)


@app.command()
def numerics(
    model: Annotated[str, typer.Argument(help="NAME@SIZE:BATCH, any timm model", metavar="MODEL")],
    data: Annotated[
        Path | None, typer.Option(help="folder or .tar file of class folders of images (default: random numbers)")
    ] = None,
    split: Annotated[str, typer.Option(help="folder or .tar file inside --data")] = "train",
    layers: Annotated[str, typer.Option(help="convert first, such as mus_fp8")] = "",
    batches: Annotated[int, typer.Option(help="batches to watch", min=1)] = 4,
    img_size: Annotated[int | None, typer.Option(help="where MODEL has none", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="where MODEL has none", min=1)] = 32,
    mode: Annotated[str, typer.Option(help="memory mode (default: reversible where there is one)")] = "",
    amp_dtype: Annotated[str | None, typer.Option(help="autocast to bfloat16 or float16")] = None,
    grad_scale: Annotated[float, typer.Option(help="before the cast of gradients, for layers that have none")] = 1.0,
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    output: Annotated[Path | None, typer.Option(help="folder for JSON, CSV and a picture")] = None,
) -> None:
    """Sizes of activations, weights and gradients layer by layer, and what a cast to FP8 flushes and clips of them."""
    import revnets  # noqa: F401 - registers the models

    from .numerics import command
    from .profiling.command import Setting

    try:
        setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
        request = command.Request(model, data, split, layers, mode, img_size, batch_size, batches, grad_scale, output)
        command.run(request, setting)
    except ValueError as error:
        _fail(error)


@app.command()
def bench_fp8(
    device: Annotated[str, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = "",
    widths: Annotated[str, typer.Option(help="inputs and outputs of the layers (default: by device)")] = "",
    rows: Annotated[str, typer.Option(help="of the products: images times pixels, or tokens")] = "",
    kinds: Annotated[str, typer.Option(help="of layers: linear, 1x1 conv")] = "linear,1x1 conv",
    modes: Annotated[str, typer.Option(help="eager, compiled")] = "eager,compiled",
    repeats: Annotated[int, typer.Option(help="timed rounds; their median counts", min=1)] = 7,
    backend: Annotated[str | None, typer.Option(help="scaled_mm or emulate (default: the best)")] = None,
    output: Annotated[Path | None, typer.Option(help="also write JSON, which mus_fp8:auto reads")] = None,
) -> None:
    """From which sizes on FP8 layers are faster than bfloat16 here: linear layers and 1x1 convolutions, interleaved."""
    from .profiling import fp8_bench
    from .profiling.command import track

    try:
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"the folder {str(output.parent)!r} for the output does not exist: create it first")
        request = fp8_bench.parse(device, widths, rows, kinds, modes, repeats, backend)
        typer.echo(f"measuring on {fp8_bench.describe(request)}", err=True)
        found = fp8_bench.run(
            request, lambda work: track(list(work), "measuring"), lambda sentence: typer.echo(sentence, err=True)
        )
    except (ValueError, RuntimeError) as error:
        _fail(error)
    fp8_bench.print_rows(found, request)
    if output is not None:
        fp8_bench.save(found, request, output)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="any timm model", metavar="MODEL")],
    data: Annotated[Path, typer.Option(help="folder or .tar file of images in class folders, to calibrate on")],
    output: Annotated[Path, typer.Option(help="pruned weights; beside them .json, .csv and .png tell what was done")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="trained weights, also of train.py or pruned; else the published ones")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="share of zeros, such as 0.7")] = None,
    pattern: Annotated[str | None, typer.Option(help="instead of --sparsity: N:M, such as 2:4")] = None,
    method: Annotated[str, typer.Option(help="sparsegpt, wanda or magnitude")] = "sparsegpt",
    distribution: Annotated[str, typer.Option(help="of the sparsity: uniform, er, erk, global")] = "uniform",
    exclude: Annotated[
        str, typer.Option(help="layers to leave out: these rules, and patterns of names, separated by commas")
    ] = "first,classifier,depthwise,squeeze_excite",
    images: Annotated[int, typer.Option(help="to calibrate on", min=1)] = 1024,
    split: Annotated[str, typer.Option(help="folder or .tar file inside --data (default: train, train.tar)")] = "",
    img_size: Annotated[int | None, typer.Option(help="default: that of the training, or the published", min=1)] = None,
    model_kwargs: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for timm.create_model")] = None,
    batch_size: Annotated[int, typer.Option(help="images per step", min=1)] = 64,
    damping: Annotated[float, typer.Option(help="of SparseGPT's Hessian, relative to its diagonal")] = 0.01,
    block_size: Annotated[int, typer.Option(help="columns that SparseGPT takes at once")] = 128,
    recalibrate: Annotated[bool, typer.Option(help="correct statistics of batch norms afterwards")] = True,
    max_passes: Annotated[int, typer.Option(help="most passes over the images", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="which images are drawn")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Prune a trained network in one shot; what comes out loads into timm.create_model as before."""
    import revnets  # noqa: F401 - registers the models

    from .pruning import command

    kwargs = tuple(model_kwargs or ())
    try:
        source = command.Source(model, data, output, checkpoint, split, img_size, kwargs, batch_size, seed, device)
        command.run(
            source,
            images,
            sparsity=sparsity,
            pattern=pattern,
            method=method,
            distribution=distribution,
            exclude=tuple(word.strip() for word in exclude.split(",") if word.strip()),
            damping=damping,
            block_size=block_size,
            recalibrate=recalibrate,
            max_passes=max_passes,
        )
    except ValueError as error:
        _fail(error)


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="any timm model", metavar="MODEL")],
    output: Annotated[Path, typer.Option(help="folder for the file")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="trained weights, such as pruned ones; else the published ones")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="torch, onnxruntime, openvino, sparse, or auto: the fastest of those installed")
    ] = "auto",
    int8: Annotated[bool, typer.Option(help="INT8 weights and activations, calibrated on --data")] = False,
    data: Annotated[Path | None, typer.Option(help="folder or .tar file of images in class folders")] = None,
    split: Annotated[str, typer.Option(help="folder or .tar file inside --data to calibrate on")] = "train",
    images: Annotated[int, typer.Option(help="to calibrate on", min=1)] = 256,
    calibration: Annotated[str, typer.Option(help="of INT8 activations: minmax, entropy, percentile")] = "minmax",
    eval_split: Annotated[str, typer.Option(help="also measure top-1 on this one, such as validation")] = "",
    img_size: Annotated[int | None, typer.Option(help="default: that of the training, or the published", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="the only one that will be used (default: any)", min=1)] = None,
    model_kwargs: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for timm.create_model")] = None,
    tolerance: Annotated[float, typer.Option(help="largest difference of outputs, relative to the largest")] = 1e-3,
    max_density: Annotated[
        float | None, typer.Option(help="of layers that engine sparse takes (default: those that are faster, measured)")
    ] = None,
    seed: Annotated[int, typer.Option(help="which images are drawn")] = 0,
) -> None:
    """Write a trained network as a file for a fast engine, zeros exploited where that pays; verified against torch."""
    import revnets  # noqa: F401 - registers the models

    from .deploy import command
    from .pruning.command import Source

    kwargs = tuple(model_kwargs or ())
    try:
        source = Source(model, data or Path(), output, checkpoint, split, img_size, kwargs, seed=seed)
        request = command.Request(engine, batch_size, int8, images, calibration, eval_split, tolerance, max_density)
        command.run(source, request, with_data=data is not None)
    except ValueError as error:
        _fail(error)


@app.command()
def bench_deploy(
    models: Annotated[list[str], typer.Argument(help="any timm models; random weights", metavar="MODEL")],
    sparsity: Annotated[str, typer.Option(help="of copies pruned by magnitude, separated by commas")] = "0,0.7,0.8,0.9",
    threads: Annotated[str, typer.Option(help="numbers of threads, separated by commas")] = "1",
    engines: Annotated[
        str, typer.Option(help="torch eager, torch compiled, onnxruntime, ... (default: all that are installed)")
    ] = "",
    img_size: Annotated[int | None, typer.Option(help="default: the published one", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="images per call", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="timed calls per case; their median counts", min=1)] = 25,
    layers: Annotated[bool, typer.Option(help="also single 1x1 convolutions")] = True,
    output: Annotated[Path | None, typer.Option(help="folder for JSON and a picture")] = None,
) -> None:
    """Inference time of dense and pruned networks on every engine, and of single layers: interleaved, medians."""
    import revnets  # noqa: F401 - registers the models

    from .deploy import command

    try:
        shares = _numbers("--sparsity", sparsity, float, "0,0.7,0.9")
        counts = _numbers("--threads", threads, int, "1,2")
        if min(counts) < 1:
            raise ValueError(f"--threads {threads!r}: expected numbers from 1 on, separated by commas, such as 1,2")
        names = [word.strip() for word in engines.split(",") if word.strip()]
        size = (batch_size, img_size, repeats, layers, output)
        command.bench(command.BenchRequest(models, shares, counts, names, *size))
    except ValueError as error:
        _fail(error)


@app.command()
def bench_sparse_training(
    models: Annotated[list[str] | None, typer.Argument(help="any timm models; random weights", metavar="MODEL")] = None,
    sparsity: Annotated[str, typer.Option(help="of the masks, separated by commas")] = "0.7,0.8,0.9",
    threads: Annotated[str, typer.Option(help="numbers of threads, separated by commas")] = "1",
    img_size: Annotated[int, typer.Option(help="of the networks' images", min=1)] = 224,
    batch_size: Annotated[int, typer.Option(help="images per step", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="timed steps per case; their median counts", min=1)] = 15,
    layers: Annotated[bool, typer.Option(help="single 1x1 convolutions as well")] = True,
    output: Annotated[Path | None, typer.Option(help="folder for CSV and JSON")] = None,
) -> None:
    """Training steps on the CPU, dense, masked and on the kernel that skips zeros: interleaved, medians."""
    import revnets  # noqa: F401 - registers the models

    from .deploy.engines import open_folder
    from .kernels import KernelUnavailable
    from .profiling import sparse_bench
    from .profiling.command import track
    from .pruning.command import check_known

    try:
        shares = _numbers("--sparsity", sparsity, float, "0.7,0.9")
        counts = _numbers("--threads", threads, int, "1,2")
        for name in models or ():
            check_known(name)
        request = sparse_bench.Request(models or (), shares, counts, batch_size, img_size, repeats, layers)
        folder = None if output is None else open_folder(output)
        of_layers, of_networks = sparse_bench.run(request, lambda work: track(list(work), "measuring"))
    except (ValueError, KernelUnavailable) as error:
        _fail(error)
    for title, rows in (("1x1 convolutions", of_layers), ("Whole networks", of_networks)):
        if rows:
            sparse_bench.print_rows(title, rows)
    if folder is not None:
        for path in sparse_bench.save(of_layers, of_networks, folder):
            typer.echo(f"wrote {path}")


@app.command(name="bench-2to4")
def bench_two_to_four(
    widths: Annotated[str, typer.Option(help="inputs and outputs of the layers")] = "1024,2048,4096,8192",
    rows: Annotated[int, typer.Option(help="of the input: images times pixels, or tokens", min=1)] = 4096,
    repeats: Annotated[int, typer.Option(help="timed calls per case; their median counts", min=1)] = 25,
) -> None:
    """Inference time of linear layers, dense and 2:4, on a GPU: interleaved, medians."""
    from .deploy import command
    from .deploy.semi_structured import compare_semi_structured

    try:
        sizes = _numbers("--widths", widths, int, "1024,2048")
        command.print_measurements("2:4 on the GPU, float16", compare_semi_structured(sizes, rows, repeats=repeats))
    except ValueError as error:
        _fail(error)


def _numbers(option: str, text: str, kind: Callable[[str], Number], example: str) -> list[Number]:
    """The numbers of an option, of which there is at least one."""
    words = text.replace(",", " ").split()
    try:
        if words:
            return [kind(word) for word in words]
    except ValueError:
        pass
    what = "whole numbers" if kind is int else "numbers"
    raise ValueError(f"{option} {text!r}: expected {what} separated by commas, such as {example}")


def _fail(error: Exception) -> Any:
    typer.echo(f"revnets: {error}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
