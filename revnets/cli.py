"""The ``revnets`` command."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
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
) -> None:
    """The layers that specs can name, or what one of them makes of a network: layer by layer, with FLOPs."""
    import revnets  # noqa: F401 - registers the models

    from .layers import command

    try:
        if model is None:
            command.print_layers()
        else:
            command.print_conversion(model, spec, img_size)
    except ValueError as error:
        _fail(error)


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
    split: Annotated[str, typer.Option(help="folder or .tar file inside --data (default: train if there is one)")] = "",
    img_size: Annotated[int | None, typer.Option(help="default: that of the training, or the published", min=1)] = None,
    model_kwargs: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for timm.create_model")] = None,
    batch_size: Annotated[int, typer.Option(help="images per step", min=1)] = 64,
    damping: Annotated[float, typer.Option(help="of SparseGPT's Hessian, relative to its diagonal")] = 0.01,
    block_size: Annotated[int, typer.Option(help="columns that SparseGPT takes at once")] = 128,
    recalibrate: Annotated[bool, typer.Option(help="correct statistics of batch norms afterwards")] = True,
    max_passes: Annotated[int, typer.Option(help="most passes over the images", min=1)] = 64,
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


def _fail(error: Exception) -> Any:
    typer.echo(f"revnets: {error}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
