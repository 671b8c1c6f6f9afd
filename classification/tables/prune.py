"""The life of pruned networks in one table: dense, one-shot, retrained in steps, distilled from dense, INT8.

python -m classification.tables.prune --data-dir CIFAR10 --output output/prune_table
python -m classification.tables.prune --data-dir CIFAR10 --methods sparsegpt --targets 0.7 4x1:0.7 --recover 4x1:0.7

Trainings are processes of train.py with one thread; what is finished is skipped, broken runs go on where they stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revnets.deploy import ENGINES, ExportError, accuracy, load, quantize
from revnets.pruning import METHODS, prune
from revnets.pruning.checkpoint import read_weights, save_weights
from revnets.pruning.command import draw_batches
from revnets.training.errors import UserError, one_line
from revnets.training.files import write_json
from revnets.training.options.parsing import argument

from ..images.data import class_names, open_dataset, validation_loader
from ..networks.models import build_model, data_config, load_weights
from ..options import CONFIGS, TrainOptions
from ..run.loop import validate
from ..runtime import start_runtime
from . import runner
from .prune_target import Target
from .runner import Column, Outcomes, flag, positive, same
from .series import Stage, digest_of, parts, read_recipe, read_stored

_logger = logging.getLogger("classification")
RECIPES = [str(CONFIGS / "prune" / f"cifar10_small_{name}.yaml") for name in ("resnet18", "revbifpn")]
DENSE, TRAINED_ON, ONE_SHOT, AGAIN = "dense", "dense, trained on", "one-shot", "pruned again"
RETRAINED, DISTILLED = "retrained", "distilled"
INT8 = {"onnxruntime": "INT8", "sparse": "INT8, sparse"}
"""Stages by the engine that quantised weights and activations are validated by."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A network at a stage of its life, and what it came to."""

    network: str
    method: str
    target: str
    stage: str
    top1: float
    sparsity: float = 0.0  # of the pruned layers
    sparse_share: float = 1.0  # FLOPs without multiplications by zeros, of the dense ones
    error: float = 0.0  # of pruning: of the layers' outputs, mean; of INT8: of the network's, root mean square
    seconds: float = 0.0  # of pruning
    train_flops: float = 0.0  # of the stage


def _against_dense(found: Outcomes, lines: runner.Lines) -> str:
    every = (line for (line,) in lines.values())
    dense = next(line.top1 for line in every if line.stage == DENSE and line.network == found[0].network)
    return f"{found[0].top1 - dense:+.2f}"


class Table(runner.Table):
    """Every network at every stage of its life."""

    folder = "prune_table"
    description = "Targets x methods x stages."
    title = "Pruned networks (FLOPs: theoretical, without multiplications by zeros)"
    options = (
        runner.DATA,
        flag("--configs", nargs="+", default=RECIPES, help="recipes of the dense networks"),
        flag("--dense", nargs="+", default=[], help="their checkpoints, where they are trained already"),
        flag("--methods", nargs="+", choices=METHODS, default=list(METHODS)),
        flag(
            "--targets",
            nargs="+",
            type=Target.parse,
            default=[*map(Target.parse, ("0.5", "0.6", "0.7", "0.8", "2:4"))],
            help="shares of zeros, 4x1:SHARE for zeros in blocks of four input channels, N:M",
        ),
        flag("--recover", nargs="*", type=Target.parse, default=[Target(0.7)], help="targets to train to"),
        flag(
            "--steps",
            nargs="*",
            type=runner.share_of_zeros,
            default=[0.5],
            help="sparsities to train at on the way to a larger one",
        ),
        flag("--images", type=positive, default=20000, help="training images, equally many of each class"),
        flag("--val-images", type=positive, help="validation images; all where not given"),
        flag("--int8", nargs="*", choices=INT8, default=list(INT8), help="engines to validate the ends in INT8 on"),
        flag("--int8-one-shot", action="store_true", help="on these also what was pruned and not trained on"),
        flag("--no-trained-on", action="store_true", help="without the dense network that is trained on as long"),
        flag("--calibration", type=positive, default=256, help="images to prune and quantise on"),
        flag("--epochs", type=positive, help="of the dense networks; those of the recipes where not given"),
        flag("--recover-epochs", type=positive, help="of each stage; a third of the dense where not given"),
        flag("--recover-lr", type=argument(float, low=0), default=0.3, help="of the dense network's learning rate"),
        flag("--seed", type=runner.seed, default=0),
    )
    columns = (
        Column("network", same("network")),
        Column("method", same("method")),
        Column("target", same("target")),
        Column("stage", same("stage")),
        Column("top-1, %", same("top1", ".2f")),
        Column("against dense", _against_dense),
        Column("sparsity", same("sparsity", ".3f")),
        Column("FLOPs", same("sparse_share", ".3f")),
        Column("error", same("error", ".3g")),
        Column("s", same("seconds", ".1f")),
    )

    def check(self) -> None:
        """Reads the recipes, and refuses checkpoints that are not one for each.

        Raises:
            UserError: Naming both numbers.
        """
        seed = str(self.args.seed)
        self.recipes = [read_recipe(config, self.args.data_dir, "--seed", seed) for config in self.args.configs]
        dense, configs = self.args.dense, self.args.configs
        if dense and len(dense) != len(configs):
            raise UserError(f"--dense: {len(dense)} checkpoints for {len(configs)} recipes; give one for each.")
        torch.set_num_threads(1)  # as the trainings

    def outcomes(self) -> Iterator[Line]:
        """One network after the other."""
        for index, config in enumerate(self.args.configs):
            dense = self.args.dense[index] if self.args.dense else None
            yield from Network(self.args, config, self.recipes[index], self.output, dense).lines()

    def draw(self, figure: Any, done: Outcomes) -> None:
        """Accuracy over sparsity for each network."""
        networks = list(dict.fromkeys(line.network for line in done))
        figure.set_size_inches(6 * len(networks), 4.5)
        for axis, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
            _draw_network(axis, [line for line in done if line.network == network])
            axis.set(title=network.rpartition("-")[0], xlabel="sparsity of the pruned layers", ylabel="top-1, %")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small", loc="lower left")


class Network:
    """One recipe with all its stages."""

    def __init__(
        self, args: argparse.Namespace, config: str, options: TrainOptions, output: Path, dense: str | None
    ) -> None:
        self.args, self.config, self.output = args, config, output
        made = parts(options, output, args.images, args.val_images)
        epochs = args.epochs or options.epochs
        self.more = ("--data-dir", str(made), "--seed", str(args.seed))
        self.options = dataclasses.replace(options, data_dir=str(made), epochs=epochs, log_interval=1 << 30)
        self.name = f"{Path(config).stem}-{digest_of(self.options, made)}"
        self.given = Path(dense) if dense else None
        self.runtime = start_runtime(self.options)
        val_set = open_dataset(self.options, options.val_split, training=False)
        self.options = dataclasses.replace(self.options, num_classes=len(class_names(val_set) or []) or None)
        self.data = data_config(self.options, self.model(None))
        self.loader = validation_loader(self.options, self.runtime, val_set, self.data)
        self.recover_epochs = args.recover_epochs or max(1, round(epochs / 3))

    def model(self, weights: Path | None) -> nn.Module:
        """The plain network, with weights of a file."""
        model = build_model(self.options)
        if weights is not None:
            load_weights(model, read_weights(weights), f"'{weights}'", self.options.model)
        return model

    def lines(self) -> Iterator[Line]:
        """Every line of the table for this network, once."""
        seen: set[Line] = set()
        for line in self._lines():
            if line not in seen:
                seen.add(line)
                yield line

    def _lines(self) -> Iterator[Line]:
        dense, line = self._dense()
        yield line
        ends = [(f"{self.name}-{DENSE}", dense, line)]
        for target in self.args.targets:
            for method in self.args.methods:
                path, pruned = self._pruned(dense, f"{self.name}-{method}", method, target)
                yield pruned
                if self.args.int8_one_shot:
                    ends.append((path.stem, path, pruned))
        for target in self.args.recover:
            for last in self._recovered(dense, target):
                yield last[-1]
            ends.append(last)
        if self.args.recover and not self.args.no_trained_on:
            stages = max(len(target.after(self.args.steps)) for target in self.args.recover) + 1
            stage = self._stage(f"{self.name}-on", dense, stages * self.recover_epochs)  # as long as all of them
            yield self._trained(stage, line, TRAINED_ON)
        for engine in self.args.int8:
            if missing := ENGINES[engine].missing():
                _logger.info(f"no {INT8[engine]}: {', '.join(missing)} not installed (pip install 'revnets[deploy]')")
                continue
            for end in ends:
                yield self._quantized(*end, engine)

    def _dense(self) -> tuple[Path, Line]:
        line = Line(self.name, "-", "-", DENSE, 0.0)
        if self.given is not None:
            return self.given, dataclasses.replace(line, top1=self.accuracy(self.model(self.given)))
        stage = Stage(f"{self.name}-dense", self.config, self.output, self.options.epochs, self.more)
        return stage.weights, self._trained(stage, line, DENSE)

    def _pruned(self, start: Path, stem: str, method: str, target: Target, stage: str = ONE_SHOT) -> tuple[Path, Line]:
        """Prunes and validates: the weights, which later names go on from, and the line."""
        path = self.output / f"{stem}-{target.word}-{self.args.calibration}.safetensors"

        def make() -> Line:
            model, images = self.model(start), self.args.calibration
            try:
                report = prune(model, self._images(), method=method, images=images, **target.goal())
            except ValueError as error:
                raise UserError(f"--targets: {self.name}, {method}, {target}: {one_line(error)}.") from error
            save_weights(report.model, path, {})
            report.save(path)
            figures = report.sparsity, report.sparse_flops / report.dense_flops, report.error, report.seconds
            return Line(self.name, method, str(target), stage, self.accuracy(report.model), *figures)

        return path, _stored(path, make)

    def _recovered(self, dense: Path, target: Target) -> Iterator[tuple[str, Path, Line]]:
        """Pruned in steps, trained with the zeros fixed after each, in the end with the dense network as the teacher.

        Each pruning takes a part of what the training before it left: zeros stay zeros.
        """
        method = self.args.methods[0]
        start, stem = dense, f"{self.name}-{method}"
        for step in target.after(self.args.steps):
            path, line = self._pruned(start, stem, method, step, ONE_SHOT if start is dense else AGAIN)
            if start is not dense or step not in self.args.targets:
                yield path.stem, path, line
            stage = self._stage(f"{path.stem}-{RETRAINED}", path, self.recover_epochs, "--keep-zeros")
            yield stage.name, stage.weights, self._trained(stage, line, RETRAINED)
            start, stem = stage.weights, stage.name
        more = ("--keep-zeros", "--teacher-checkpoint", str(dense))
        stage = self._stage(f"{stem}-{DISTILLED}", start, self.recover_epochs, *more)
        yield stage.name, stage.weights, self._trained(stage, line, DISTILLED)

    def _quantized(self, stem: str, weights: Path, line: Line, engine: str) -> Line:
        """INT8 weights and activations, validated by an engine."""
        ours, suffix = ("-sparse", ".pt2") if engine == "sparse" else ("", ".onnx")
        stage = f"{ONE_SHOT}, {INT8[engine]}" if line.stage == ONE_SHOT else INT8[engine]
        path = self.output / f"{stem}-int8{ours}-{self.args.calibration}{suffix}"

        def make() -> Line:
            model, images = self.model(weights), self.args.calibration
            anyhow: dict[str, Any] = {"max_error": 1e9, "engine": engine}  # the table says how large the error is
            try:
                made = quantize(model, self._images(), path.parent, path.stem, images, **anyhow)
                top1 = accuracy(load(made.path), self.loader)
            except ExportError as error:
                raise UserError(f"{INT8[engine]}: {stem}: {one_line(error)}.") from error
            return dataclasses.replace(line, stage=stage, top1=top1, error=made.error, seconds=0.0, train_flops=0.0)

        return _stored(path, make)

    def _images(self) -> Iterable[tuple[torch.Tensor, ...]]:
        """Training images, as in validation, drawn by the seed."""
        train = open_dataset(self.options, self.options.train_split, training=False)
        return draw_batches(train, self.data, self.args.calibration, seed=self.args.seed)

    def _trained(self, stage: Stage, line: Line, word: str) -> Line:
        row = stage.run()
        flops = row.get("train_flops", 0.0)
        return dataclasses.replace(line, stage=word, top1=row["eval_top1"], error=0.0, seconds=0.0, train_flops=flops)

    def _stage(self, name: str, start: Path, epochs: int, *more: str) -> Stage:
        lr = str(self.args.recover_lr * (self.options.lr or 0.1))
        options = (*self.more, "--initial-checkpoint", str(start), "--lr", lr, "--warmup-epochs", "0", *more)
        return Stage(f"{name}-{epochs}x{self.args.recover_lr:g}", self.config, self.output, epochs, options)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Top-1 on the validation images."""
        model.to(memory_format=self.runtime.memory_format)
        return validate(model, self.loader, self.runtime, "validate", 1 << 30)["top1"]


def _stored(path: Path, make: Callable[[], Line]) -> Line:
    """The line that is stored beside a file, or a new one where either is missing."""
    beside = path.with_suffix(".line.json")
    if path.exists() and (found := read_stored(beside, _read)):
        return found
    line = make()
    write_json(beside, dataclasses.asdict(line))
    _logger.info(f"{path.stem}: top-1 {line.top1:.2f}%")
    return line


def _read(content: Any) -> Line:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in dict(content).items()}
    return Line(**values)


def _draw_network(axis: Any, lines: Sequence[Line]) -> None:
    styles = {DENSE: "-", TRAINED_ON: ":"}
    for line in lines:
        if line.stage in styles and line.target == "-":
            axis.axhline(line.top1, color="k", linestyle=styles[line.stage], linewidth=0.8, label=line.stage)
    pruned = [line for line in lines if line.target != "-"]
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in pruned:
        what = line.stage.replace(ONE_SHOT, line.method)
        pattern = Target.parse(line.target).pattern
        curves.setdefault((line.stage, f"{what}, {pattern}" if pattern else what), []).append(
            (line.sparsity, line.top1)
        )
    for i, ((stage, label), points) in enumerate(curves.items()):
        mark = "o" if stage.startswith(ONE_SHOT) else "^v<>*sPX"[i % 8]
        axis.plot(*zip(*sorted(points), strict=True), f"{mark}-", color=f"C{i}", linewidth=0.8, label=label)


if __name__ == "__main__":
    sys.exit(Table.main())
