"""The ``revnets`` command."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Command, Commands, argument, excludes, needs, number, path, sized, text, without_effect
from .training.options.values import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, SPARSITY, THREADS, words
from .training.places import check_file, check_folder

app = typer.Typer(
    cls=Commands,
    help="Memory-efficient vision backbones: measure what they need.",
    epilog="An option that has no effect is an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_command = partial(app.command, cls=Command)


_SIZED = "where every MODEL has its own: take it out of one"
_PLAIN = "on networks without reversible parts: name one that has some"


def _names(compare: list[str] | None) -> list[str]:
    return " ".join(compare or []).replace(",", " ").split()


def _reversible(names: Sequence[str | None]) -> bool:
    """Whether some of the networks may have reversible parts: ours, and whatever a config or a sweep names."""
    return any(word in name for name in names if name for word in ("revbifpn", ".py", "families"))


@app.callback()
def _main() -> None:
    """Memory-efficient vision backbones: measure what they need."""


@_command()
@excludes("repeats", "launches")
@excludes("ablate", "launches")
@without_effect("exact", _PLAIN, lambda v: not _reversible(v["models"] or ["revbifpn"]))
def bench(
    models: Annotated[list[str] | None, argument("NAME@SIZE:BATCH, any timm model", "MODEL")] = None,
    repeats: Annotated[int, number(COUNT, "timed steps per row; their median counts")] = 5,
    device: Annotated[str, text("cpu, cuda, ...")] = "cpu",
    amp_dtype: Annotated[str | None, text("autocast to bfloat16 or float16")] = None,
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    modes: Annotated[str | None, text("of these modes only, separated by commas")] = None,
    ablate: Annotated[bool, typer.Option(help="also each part of our work left out, in reversible mode")] = False,
    compiled: Annotated[bool, typer.Option(help="also with compiled branches; compiling takes minutes")] = False,
    launches: Annotated[bool, typer.Option(help="instead: count operator calls, and kernels of what is compiled")] = (
        False
    ),
    output: Annotated[Path | None, path("also write the figures as JSON")] = None,
) -> None:
    """Step time and activation memory of networks in their memory modes, in one interleaved run."""
    import revnets  # noqa: F401 - registers the models

    from .profiling import bench as benchmark
    from .profiling import launch_bench
    from .profiling.command import Setting, track

    setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
    if output is not None:
        check_file(output)
    names = models or ["revbifpn_s0@224:8", "revbifpn_s1@256:8", "efficientnet_b0@224:8"]
    cases = benchmark.make_cases(names, modes or "", setting, ablate, compiled)
    if launches:
        counted = launch_bench.run(cases, setting, lambda work: track(list(work), "counting"))
        launch_bench.print_rows(counted, setting)
        if output is not None:
            launch_bench.save(counted, setting, output)
        return
    rows = benchmark.run(cases, setting, repeats, lambda work: track(list(work), "measuring"))
    benchmark.print_rows(rows, setting)
    if output is not None:
        benchmark.save(rows, setting, output)


@_command()
@excludes("sweep", "fit")
@excludes("measure", "sweep", "fit")
@needs("fit_what", "fit")
@without_effect(
    "batch_size",
    "with --fit, which looks for the batch: give one of them",
    lambda v: v["fit"] and v["fit_what"] == "batch",
)
@without_effect(
    "img_size",
    "with --fit, which looks for the image: give one of them",
    lambda v: v["fit"] and v["fit_what"] == "image",
)
@without_effect("img_size", _SIZED, lambda v: sized([v["model"], *_names(v["compare"])], "@"))
@without_effect("batch_size", _SIZED, lambda v: sized([v["model"], *_names(v["compare"])], ":"))
@without_effect("exact", _PLAIN, lambda v: not _reversible([v["model"], *_names(v["compare"]), v["sweep"]]))
def profile(
    model: Annotated[
        str,
        argument("NAME@SIZE:BATCH of timm, or an MMDetection CONFIG.py@800x1333:1", "MODEL"),
    ],
    img_size: Annotated[int | None, number(COUNT, "where MODEL has none (default: the published one)")] = None,
    batch_size: Annotated[int, number(COUNT, "where MODEL has none")] = 8,
    mode: Annotated[str | None, text("of these modes only, separated by commas")] = None,
    amp_dtype: Annotated[str | None, text("autocast to bfloat16 or float16")] = None,
    optimizer: Annotated[str, text("any of timm's, or none")] = "sgd",
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, text("cpu, cuda, ...; to predict, it need not be here")] = "cpu",
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    measure: Annotated[bool | None, typer.Option(help="run the step, too (default: where it takes seconds)")] = None,
    compare: Annotated[list[str] | None, text('more networks: "resnet50 efficientnet_b7@600"')] = None,
    fit: Annotated[str | None, text("what is the largest that fits 24GB (10^9 bytes) or 24GiB?")] = None,
    fit_what: Annotated[str, text("the largest batch or image")] = "batch",
    part: Annotated[str | None, text("of detectors only: backbone, neck (with backbone), detector")] = None,
    sweep: Annotated[str | None, text("instead: some of families, depth, resolution; predicted only")] = None,
    output: Annotated[Path | None, path("folder for JSON, CSV and pictures")] = None,
) -> None:
    """Memory, FLOPs and time of a training step: predicted without running it, measured beside it."""
    from .profiling import command

    names = [model, *(name for text in compare or [] for name in words("--compare", text))]
    chosen = None if optimizer == "none" else optimizer
    setting = command.Setting(device, channels_last, amp_dtype, exact, chosen)
    wanted = (mode or "", measure, fit, fit_what, output, sweep or "", part or "")
    command.run(command.Request(names, img_size, batch_size, *wanted), setting)


@_command()
@needs("img_size", "model")
@needs("output", "model")
def layers(
    model: Annotated[str | None, argument("convert this one, any timm model", "[MODEL")] = None,
    spec: Annotated[str | None, argument("such as sparse_wide:0.75", "SPEC]")] = None,
    img_size: Annotated[int | None, number(COUNT, "to count FLOPs at (default: the published one)")] = None,
    output: Annotated[Path | None, path("folder for FLOPs as CSV, JSON and a picture")] = None,
) -> None:
    """The layers that specs can name, or what one of them makes of a network: layer by layer, with FLOPs."""
    import revnets  # noqa: F401 - registers the models

    from .profiling import layers_command as command

    if model is None:
        command.print_layers()
    else:
        command.print_conversion(model, spec or "", img_size, output)


@_command()
@needs("split", "data")
@without_effect("img_size", _SIZED, lambda v: sized([v["model"]], "@"))
@without_effect("batch_size", _SIZED, lambda v: sized([v["model"]], ":"))
@without_effect("exact", _PLAIN, lambda v: not _reversible([v["model"]]))
def numerics(
    model: Annotated[str, argument("NAME@SIZE:BATCH, any timm model", "MODEL")],
    data: Annotated[
        Path | None, path("folder or .tar file of class folders of images (default: random numbers)")
    ] = None,
    split: Annotated[str, text("folder or .tar file inside --data")] = "train",
    layers: Annotated[str | None, text("convert first, such as mus_fp8")] = None,
    batches: Annotated[int, number(COUNT, "batches to watch")] = 4,
    img_size: Annotated[int | None, number(COUNT, "where MODEL has none")] = None,
    batch_size: Annotated[int, number(COUNT, "where MODEL has none")] = 32,
    mode: Annotated[str | None, text("memory mode (default: reversible where there is one)")] = None,
    amp_dtype: Annotated[str | None, text("autocast to bfloat16 or float16")] = None,
    grad_scale: Annotated[float, number(POSITIVE, "before the cast of gradients, for layers that have none")] = 1.0,
    channels_last: Annotated[bool, typer.Option(help="memory layout of weights and images")] = True,
    device: Annotated[str, text("cpu, cuda, ...")] = "cpu",
    exact: Annotated[bool, typer.Option(help="exact mode of reversible networks")] = True,
    output: Annotated[Path | None, path("folder for JSON, CSV and a picture")] = None,
) -> None:
    """Sizes of activations, weights and gradients layer by layer, and what a cast to FP8 flushes and clips of them."""
    import revnets  # noqa: F401 - registers the models

    from .numerics import command
    from .profiling.command import Setting

    setting = Setting(device, channels_last, amp_dtype, exact, optimizer=None)
    sizes = (img_size, batch_size, batches, grad_scale, output)
    command.run(command.Request(model, data, split, layers or "", mode or "", *sizes), setting)


@_command()
def bench_fp8(
    device: Annotated[str | None, text("cpu, cuda, ... (default: cuda where there is one)")] = None,
    widths: Annotated[str | None, text("inputs and outputs of the layers (default: by device)")] = None,
    rows: Annotated[str | None, text("of the products: images times pixels, or tokens")] = None,
    kinds: Annotated[str, text("of layers: linear, 1x1 conv, 3x3 conv")] = "linear,1x1 conv,3x3 conv",
    modes: Annotated[str, text("eager, compiled")] = "eager,compiled",
    repeats: Annotated[int, number(COUNT, "timed rounds; their median counts")] = 7,
    backend: Annotated[str | None, text("scaled_mm or emulate (default: the best)")] = None,
    output: Annotated[Path | None, path("also write JSON, which mus_fp8:auto reads")] = None,
) -> None:
    """From which sizes on FP8 layers are faster than bfloat16 here: linear layers and convolutions, interleaved."""
    from .benchmarks import fp8 as fp8_bench
    from .profiling.command import track

    if output is not None:
        check_file(output)
    request = fp8_bench.parse(device or "", widths or "", rows or "", kinds, modes, repeats, backend)
    typer.echo(f"measuring on {fp8_bench.describe(request.device)}", err=True)
    found = fp8_bench.run(
        request, lambda work: track(list(work), "measuring"), lambda sentence: typer.echo(sentence, err=True)
    )
    fp8_bench.print_rows(found, request.device, request.repeats)
    if output is not None:
        fp8_bench.write_table(found, request.device, output)


@_command()
@without_effect("damping", "with --method {method}: choose sparsegpt", lambda v: v["method"] != "sparsegpt")
@without_effect("block_size", "with --method {method}: choose sparsegpt", lambda v: v["method"] != "sparsegpt")
def prune(
    model: Annotated[str, argument("any timm model", "MODEL")],
    data: Annotated[Path, path("folder or .tar file of images in class folders, to calibrate on")],
    output: Annotated[Path, path("pruned weights; beside them .json, .csv and .png tell what was done")],
    checkpoint: Annotated[
        Path | None, path("trained weights, also of train.py or pruned; else the published ones")
    ] = None,
    sparsity: Annotated[float | None, number(FINITE, "share of zeros, such as 0.7")] = None,
    pattern: Annotated[str | None, text("instead of --sparsity: N:M, such as 2:4")] = None,
    method: Annotated[str, text("sparsegpt, wanda or magnitude")] = "sparsegpt",
    distribution: Annotated[str, text("of the sparsity: uniform, er, erk, global")] = "uniform",
    exclude: Annotated[
        str, text("layers to leave out: these rules, and patterns of names, separated by commas")
    ] = "first,classifier,depthwise,squeeze_excite",
    images: Annotated[int, number(COUNT, "to calibrate on")] = 1024,
    split: Annotated[str | None, text("folder or .tar file inside --data (default: train, train.tar)")] = None,
    img_size: Annotated[int | None, number(COUNT, "default: that of the training, or the published")] = None,
    model_kwargs: Annotated[list[str] | None, text("KEY=VALUE for timm.create_model")] = None,
    batch_size: Annotated[int, number(COUNT, "images per step")] = 64,
    damping: Annotated[float, number(NOT_NEGATIVE, "of SparseGPT's Hessian, relative to its diagonal")] = 0.01,
    block_size: Annotated[int, number(COUNT, "columns that SparseGPT takes at once")] = 128,
    recalibrate: Annotated[bool, typer.Option(help="correct statistics of batch norms afterwards")] = True,
    max_passes: Annotated[int, number(COUNT, "most passes over the images")] = 12,
    seed: Annotated[int, number(SEED, "which images are drawn")] = 0,
    device: Annotated[str, text("cpu, cuda, ...")] = "cpu",
) -> None:
    """Prune a trained network in one shot; what comes out loads into timm.create_model as before."""
    import revnets  # noqa: F401 - registers the models

    from .pruning import command

    sizes = (img_size, tuple(model_kwargs or ()), batch_size, seed, device)
    command.run(
        command.Source(model, data, output, checkpoint, split or "", *sizes),
        images,
        sparsity=sparsity,
        pattern=pattern,
        method=method,
        distribution=distribution,
        exclude=words("--exclude", exclude, blanks=False) if exclude else (),
        damping=damping,
        block_size=block_size,
        recalibrate=recalibrate,
        max_passes=max_passes,
    )


@_command()
@needs("data", "int8", "eval_split")
@needs("split", "int8")
@needs("images", "int8")
@needs("calibration", "int8")
@excludes("tolerance", "int8")
@excludes("max_density", "int8")
@without_effect("max_density", "with --engine {engine}: choose sparse", lambda v: v["engine"] not in ("sparse", "auto"))
def deploy(
    model: Annotated[str, argument("any timm model", "MODEL")],
    output: Annotated[Path, path("folder for the file")],
    checkpoint: Annotated[Path | None, path("trained weights, such as pruned ones; else the published ones")] = None,
    engine: Annotated[
        str, text("torch, onnxruntime, openvino, sparse, or auto: the fastest of those installed")
    ] = "auto",
    int8: Annotated[bool, typer.Option(help="INT8 weights and activations, calibrated on --data")] = False,
    data: Annotated[Path | None, path("folder or .tar file of images in class folders")] = None,
    split: Annotated[str, text("folder or .tar file inside --data to calibrate on")] = "train",
    images: Annotated[int, number(COUNT, "to calibrate on")] = 256,
    calibration: Annotated[str, text("of INT8 activations: minmax, entropy, percentile")] = "minmax",
    eval_split: Annotated[str | None, text("also measure top-1 on this one, such as validation")] = None,
    img_size: Annotated[int | None, number(COUNT, "default: that of the training, or the published")] = None,
    batch_size: Annotated[int | None, number(COUNT, "the only one that will be used (default: any)")] = None,
    model_kwargs: Annotated[list[str] | None, text("KEY=VALUE for timm.create_model")] = None,
    tolerance: Annotated[float, number(POSITIVE, "largest difference of outputs, relative to the largest")] = 1e-3,
    max_density: Annotated[
        float | None, number(SHARE, "of layers that engine sparse takes (default: those that are faster, measured)")
    ] = None,
    seed: Annotated[int, number(SEED, "which images are drawn")] = 0,
) -> None:
    """Write a trained network as a file for a fast engine, zeros exploited where that pays; verified against torch."""
    import revnets  # noqa: F401 - registers the models

    from .deploy import command
    from .pruning.command import Source

    kwargs = tuple(model_kwargs or ())
    source = Source(model, data or Path(), output, checkpoint, split, img_size, kwargs, seed=seed)
    checks = (eval_split or "", tolerance, max_density)
    request = command.Request(engine, batch_size, int8, images, calibration, *checks)
    command.run(source, request, with_data=data is not None)


@_command()
def bench_deploy(
    models: Annotated[list[str], argument("any timm models; random weights", "MODEL")],
    sparsity: Annotated[str, text("of copies pruned by magnitude, separated by commas")] = "0,0.7,0.8,0.9",
    threads: Annotated[str, text("numbers of threads, separated by commas")] = "1",
    engines: Annotated[
        str | None, text("torch eager, torch compiled, onnxruntime, ... (default: all that are installed)")
    ] = None,
    img_size: Annotated[int | None, number(COUNT, "default: the published one")] = None,
    batch_size: Annotated[int, number(COUNT, "images per call")] = 1,
    repeats: Annotated[int, number(COUNT, "timed calls per case; their median counts")] = 25,
    layers: Annotated[bool, typer.Option(help="also single 1x1 convolutions")] = True,
    output: Annotated[Path | None, path("folder for JSON and a picture")] = None,
) -> None:
    """Inference time of dense and pruned networks on every engine, and of single layers: interleaved, medians."""
    import revnets  # noqa: F401 - registers the models

    from .deploy import command

    shares = SPARSITY.read_list("--sparsity", sparsity)
    counts = THREADS.read_list("--threads", threads)
    names = words("--engines", engines, blanks=False) if engines else []
    size = (batch_size, img_size, repeats, layers, output)
    command.bench(command.BenchRequest(models, shares, counts, names, *size))


@_command()
@needs("img_size", "models")
def bench_sparse_training(
    models: Annotated[list[str] | None, argument("any timm models; random weights", "MODEL")] = None,
    sparsity: Annotated[str, text("of the masks, separated by commas")] = "0.7,0.8,0.9",
    threads: Annotated[str, text("numbers of threads, separated by commas")] = "1",
    img_size: Annotated[int, number(COUNT, "of the networks' images")] = 224,
    batch_size: Annotated[int, number(COUNT, "images per step")] = 8,
    repeats: Annotated[int, number(COUNT, "timed steps per case; their median counts")] = 15,
    layers: Annotated[bool, typer.Option(help="single 1x1 convolutions as well")] = True,
    output: Annotated[Path | None, path("folder for CSV and JSON")] = None,
) -> None:
    """Training steps on the CPU, dense, masked and on the kernel that skips zeros: interleaved, medians."""
    import revnets  # noqa: F401 - registers the models

    from .benchmarks import sparse_training as sparse_bench
    from .profiling.command import track

    shares = SPARSITY.read_list("--sparsity", sparsity)
    counts = THREADS.read_list("--threads", threads)
    request = sparse_bench.Request(models or (), shares, counts, batch_size, img_size, repeats, layers)
    if output is not None:
        check_folder(output, sparse_bench.FILES)
    of_layers, of_networks = sparse_bench.run(request, lambda work: track(list(work), "measuring"))
    for title, rows in (("1x1 convolutions", of_layers), ("Whole networks", of_networks)):
        if rows:
            sparse_bench.print_rows(title, rows)
    if output is not None:
        for path in sparse_bench.save(of_layers, of_networks, output):
            typer.echo(f"wrote {path}")


@_command(name="bench-2to4")
def bench_two_to_four(
    widths: Annotated[str, text("inputs and outputs of the layers")] = "1024,2048,4096,8192",
    rows: Annotated[int, number(COUNT, "of the input: images times pixels, or tokens")] = 4096,
    repeats: Annotated[int, number(COUNT, "timed calls per case; their median counts")] = 25,
) -> None:
    """Inference time of linear layers, dense and 2:4, on a GPU: interleaved, medians."""
    from .deploy import command
    from .deploy.semi_structured import compare_semi_structured

    sizes = COUNT.read_list("--widths", widths)
    command.print_measurements("2:4 on the GPU, float16", compare_semi_structured(sizes, rows, repeats=repeats))


@_command()
def gpu_report(
    output: Annotated[Path, path("folder for report.json, summary.md, pictures and the log")],
    minutes: Annotated[float, number(POSITIVE, "for everything")] = 8.0,
    sections: Annotated[str | None, text("some of a (machine) to h (detector), separated by commas")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on: only what is missing or failed")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="small networks, few steps: a rehearsal")] = False,
    device: Annotated[str | None, text("cpu or cuda (default: cuda)")] = None,
) -> None:
    """Everything that only a GPU shows, section by section, each in a process of its own; see docs/gpu.md."""
    from .gpu_report import command

    command.run(output, minutes, sections or "", resume, tiny, device or "", typer.echo)


if __name__ == "__main__":
    app()
