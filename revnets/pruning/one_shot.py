"""One-shot pruning of a trained network: block by block, each on inputs from the pruned part before it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.geometry import described
from ..layers.sites import Surroundings
from ..layers.trace import Trace, TraceError, trace
from ..sparsity.blocks import BLOCKED
from ..sparsity.masks import DISTRIBUTIONS, check_sparsity
from ..training.options.values import COUNT, NOT_NEGATIVE, check_choice
from .calibration import Passes, collect, full_precision
from .choice import DEFAULT_EXCLUDE, Layers, blocks, choose, targets
from .densify import densify
from .inputs import Moments, as_matrices, like_weight
from .report import PrunedLayer, PruningReport
from .solve import METHODS, Blocked, Blocks, Pattern, error, solve

Progress = Callable[[float, str], None]


def prune(
    model: nn.Module,
    data: Iterable[Any],
    sparsity: float | None = None,
    pattern: str | None = None,
    method: str = "sparsegpt",
    *,
    distribution: str = "uniform",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    images: int = 1024,
    damping: float = 0.01,
    block_size: int = 128,
    recalibrate: bool = True,
    max_passes: int = 12,
    progress: Progress | None = None,
) -> PruningReport:
    """Prune the convolutions and linear layers of a trained network without training.

    The network is taken block by block in the order in which it runs: a pass of the images, up to the end of the block,
    adds up the Hessians of its layers' inputs, then its weights are pruned, and the next block sees what the pruned
    ones give. Images and the Hessians of one block are in memory, activations are not kept. Weights that are 0 already
    stay so, which lets one prune in steps. The same images give the same result.

    Args:
        model: any network of images; stays as it is. Sparse layers of this library become plain ones with zeros.
        data: images to calibrate on: a tensor ``(N, C, H, W)``, or batches, such as a loader that draws by a seed.
        sparsity: share of zeros of all pruned layers together, in [0, 1).
        pattern: instead of it, N:M such as ``"2:4"``: N of every M input channels stay; or with it, ``"4x1"``: zeros
            come in blocks of four input channels, which the INT8 kernel of ``revnets deploy`` skips.
        method: ``sparsegpt`` (2301.00774); ``wanda`` (2306.11695) and ``magnitude``, which leave the other weights as
            they are.
        distribution: of the sparsity over layers: ``uniform``, ``er``, ``erk``, or ``global``, one threshold for all.
        exclude: layers to leave out: rules (``first``, ``classifier``, ``depthwise``, ``squeeze_excite``: the default)
            and patterns of names, such as ``"head.*"``.
        images: how many of the data to use.
        damping: of the Hessian, relative to the mean of its diagonal; raised by itself where it is singular.
        block_size: columns whose mask SparseGPT chooses at once.
        recalibrate: correct running statistics of batch norms afterwards (2208.11580 does so) by what pruning changed
            of them on the images.
        max_passes: most blocks, and passes of the images. More of them are no gain for networks with batch norms, whose
            statistics are corrected after the last block only.
        progress: called with the share that is done and what is being done.

    Returns:
        A report with the pruned network as ``.model``: plain layers of torch, so its state dict loads into what
        ``timm.create_model`` makes.

    Raises:
        ValueError: for options out of range, unusable images, or layers that the pattern does not fit; the model is
            as before.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2))
        >>> report = prune(net, torch.randn(16, 3, 8, 8), sparsity=0.75)
        >>> [(layer.name, layer.zeros) for layer in report.layers]
        [('2', 432)]
    """
    start = time.perf_counter()
    numbers = {"images": images, "damping": damping, "block_size": block_size, "max_passes": max_passes}
    goal = check_options(sparsity, pattern, method, distribution, exclude, **numbers)
    batches = collect(data, images)
    network = densify(model)
    recorded = _traced(network, batches[0])
    around = Surroundings(network, recorded)
    layers, skipped = choose(around, exclude)
    aims = targets(layers, goal, distribution)
    words = " ".join(word for word in (pattern, None if sparsity is None else f"{sparsity:g}") if word)
    report = PruningReport(network, method, words, distribution, sum(map(len, batches)))
    report.skipped, report.flops = skipped, {name: n for name, n in recorded.flops_by_module().items() if n}
    passes = Passes(network, batches, Counter(call.module for call in recorded.calls))
    modes = [module.training for module in network.modules()]
    network.eval()
    with full_precision():
        before = passes.statistics() if recalibrate else {}
        _prune_blocks(report, layers, aims, passes, max_passes, (method, damping, block_size), progress)
        if recalibrate:
            report.recalibrated = passes.recalibrate(before)
    for module, mode in zip(network.modules(), modes, strict=True):
        module.training = mode
    report.seconds = time.perf_counter() - start
    return report


def check_options(
    sparsity: float | None = None,
    pattern: str | None = None,
    method: str = "sparsegpt",
    distribution: str = "uniform",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    **numbers: Any,
) -> float | Pattern | Blocked:
    """What is to be reached, once all options of ``prune`` are known to be possible.

    Raises:
        ValueError: for one that is not; names it.
    """
    check_choice("method", method, METHODS)
    check_choice("distribution", distribution, (*DISTRIBUTIONS, "global"))
    if isinstance(exclude, str) or not all(isinstance(word, str) for word in exclude):
        raise ValueError(f"exclude={exclude!r}: expected a list of rules and patterns, such as ['first', 'head.*']")
    for name, value in numbers.items():
        if name in ("images", "block_size", "max_passes"):
            COUNT.check(name, value)
    NOT_NEGATIVE.check("damping", numbers.get("damping", 0.0))
    if pattern == BLOCKED:
        if sparsity is None:
            raise ValueError(f"pattern={pattern!r}: expected a sparsity besides, such as sparsity=0.7")
        return Blocked(check_sparsity(sparsity))
    if (sparsity is None) == (pattern is None):
        raise ValueError(f"sparsity={sparsity}, pattern={pattern!r}: expected one of the two, such as sparsity=0.7")
    return check_sparsity(sparsity) if pattern is None else Pattern.parse(pattern)  # type: ignore[arg-type]


def _traced(model: nn.Module, images: Tensor) -> Trace:
    try:
        return trace(model, images.shape[1:])
    except TraceError as error:
        raise ValueError(f"data: {error.reason}; give images that the model takes") from error


def _prune_blocks(
    report: PruningReport,
    layers: Layers,
    aims: dict[str, int | Pattern | Blocks],
    passes: Passes,
    max_passes: int,
    options: tuple[str, float, int],
    progress: Progress | None,
) -> None:
    every = blocks(report.model, layers, max_passes)
    for number, names in enumerate(every):

        def tell(share: float, word: str = names[0], number: int = number) -> None:
            if progress is not None:
                progress((number + share) / len(every), word or "the model")

        tell(0.0)
        start = time.perf_counter()
        by_channel = isinstance(aims[names[0]], Pattern | Blocks)
        moments = {name: Moments(layers[name], by_channel) for name in names}
        passes.watch(moments, lambda share: tell(0.9 * share))
        watching = (time.perf_counter() - start) / len(names)
        for done, name in enumerate(names, start=1):
            row = _prune_layer(name, layers[name], moments.pop(name), aims[name], options)
            row.seconds += watching
            report.layers.append(row)
            tell(0.9 + 0.1 * done / len(names))


@torch.no_grad()
def _prune_layer(
    name: str, layer: Any, moments: Moments, aim: int | Pattern | Blocks, options: tuple[str, float, int]
) -> PrunedLayer:
    start = time.perf_counter()
    method, damping, block_size = options
    hessian = moments.hessian()
    weight = as_matrices(layer, moments.kernel_first).to(hessian.device)
    if not weight.isfinite().all():
        raise ValueError(f"the weight of {name or 'the model'} is not finite: the network cannot be pruned")
    try:
        found = solve(weight, hessian, aim, method, damping, block_size)
    except ValueError as failure:
        raise ValueError(f"{name or 'the model'}, {described(layer)}: {failure}") from None
    off = error(weight, found.weight, hessian)
    layer.weight.copy_(like_weight(found.weight, layer, moments.kernel_first))
    zeros = int((layer.weight == 0).sum())
    row = PrunedLayer(name, described(layer), layer.weight.numel(), zeros, off, found.damping, note=found.note)
    row.seconds = time.perf_counter() - start
    return row
