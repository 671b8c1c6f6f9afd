r"""Does the best learning rate stay where it is when the network gets wider? Short trainings of mus_vit on a grid.

python -m classification.tables.lr_transfer --data CIFAR10/train.tar
python -m classification.tables.lr_transfer --data CIFAR10/train.tar --widths 64 128 --steps 50 --layers mus_fp8

With the transfer rules of munit scaling, hidden layers of width d get lr * sqrt(base / d); without them all layers get
lr. Every proxy trains for the same number of steps on the same images in the same order, each seen once, so the mean
training loss of the last steps compares them. Finished proxies are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import pil_to_tensor

import revnets
from revnets.training.data.splits import check_split
from revnets.training.errors import UserError, one_line
from revnets.training.files import write_csv, write_json
from revnets.training.options.parsing import argument
from revnets.training.progress import clock

from . import runner
from .runner import Column, Outcomes, flag, positive, same
from .series import read_stored

_logger = logging.getLogger("classification")
RULES = ("with", "without")
MODEL = "mus_vit_tiny_patch16_224"
IMAGE_SIZE = 32
_POWER = argument(int, low=-60, high=60)
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A short training: with or without the rules, its width, and the learning rate of the grid."""

    rules: str
    width: int
    lr: float


@dataclasses.dataclass(frozen=True)
class Best:
    """The best learning rate of a width: on the grid, and as the vertex of the parabola through its neighbours."""

    rules: str
    width: int
    lr: float
    loss: float
    vertex: float


def _power(name: str, digits: str) -> Column:
    headings = {"lr": "best lr", "vertex": "vertex of the parabola"}
    return Column(headings[name], lambda found, _: f"2^{math.log2(getattr(found[0], name)):{digits}}")


class Table(runner.Table):
    """The best learning rate of every width, with and without the rules."""

    folder = "lr_transfer"
    description = "Learning rates across widths."
    picture = "lr_transfer.png"
    options = (
        flag("--data", type=argument(str, path=True), required=True, help="class folders, or a .tar of them"),
        flag("--widths", type=positive, nargs="+", default=[64, 128, 256, 512]),
        flag("--head-width", type=positive, default=32, help="of attention; wider networks have more heads"),
        flag("--highest", type=_POWER, default=-4, help="binary logarithm of the highest learning rate"),
        flag("--lowest", type=_POWER, default=-10, help="binary logarithm of the lowest learning rate"),
        flag("--steps", type=positive, default=150),
        flag("--average", type=positive, default=20, help="last steps whose mean loss counts"),
        flag("--batch-size", type=positive, default=64),
        flag("--depth", type=positive, default=2),
        flag("--patch-size", type=positive, default=8),
        flag("--layers", default="mus", help="mus or mus_fp8"),
        flag("--opt", default="lion", help="any Adam-like optimizer of timm"),
        flag("--weight-decay", type=argument(float, low=0), default=0.0, help="share of a weight per step"),
        flag("--base-width", type=positive, default=64, help="width at which both ways are the same"),
        flag("--seed", type=runner.seed, default=0),
    )
    columns = (
        Column("rules", same("rules")),
        Column("width", same("width")),
        _power("lr", ".4g"),
        Column("loss", same("loss", ".4f")),
        _power("vertex", ".4g"),
    )
    curves: dict[Proxy, list[float]]
    losses: dict[Proxy, float]

    def check(self) -> None:
        """Refuses widths and rates that cannot be.

        Raises:
            UserError: Naming the option.
        """
        args = self.args
        if args.highest - args.lowest < 2:
            raise UserError(f"--lowest: {args.lowest} to {args.highest} are fewer than three learning rates; lower it.")
        if bad := [width for width in args.widths if width % args.head_width]:
            raise UserError(
                f"--widths: {bad[0]} is no multiple of --head-width {args.head_width}; correct one of them."
            )

    def outcomes(self) -> Iterator[Best]:
        """Trains all proxies first."""
        args, widths = self.args, sorted(self.args.widths)
        rates = [2.0**power for power in range(args.lowest, args.highest + 1)]
        proxies = [Proxy(rules, width, lr) for width in widths for lr in rates for rules in RULES]
        self.curves = self._trained(proxies)
        self.losses = {proxy: _final(curve, args) for proxy, curve in self.curves.items()}
        yield from [best(rules, width, self.losses) for rules in RULES for width in widths]

    def _trained(self, proxies: Sequence[Proxy]) -> dict[Proxy, list[float]]:
        """The training losses of all proxies, from files where they are there."""
        args, folder = self.args, self.output / "proxies"
        folder.mkdir(exist_ok=True)
        paths = {proxy: folder / f"{_name(args, proxy)}.json" for proxy in proxies}
        known = {path: curve for path in paths.values() if (curve := _stored(path)) is not None}
        missing = {path: proxy for proxy, path in paths.items() if path not in known}  # one where no rule changes it
        data = _images(args) if missing else None
        start, done, total = time.perf_counter(), 0, sum(map(_cost, missing.values()))
        for number, (path, proxy) in enumerate(missing.items(), start=1):
            assert data is not None
            known[path] = train_proxy(args, proxy, data)
            write_json(path, known[path])
            done += _cost(proxy)
            rest = (time.perf_counter() - start) / done * (total - done)
            loss = _final(known[path], args)
            words = f"{proxy.rules} rules, width {proxy.width}, lr 2^{math.log2(proxy.lr):g}: {loss:.4f}"
            _logger.info(f"{number}/{len(missing)} ({100 * done / total:.0f}% of the work, ETA {clock(rest)}) {words}")
        return {proxy: known[path] for proxy, path in paths.items()}

    def write(self, done: Outcomes) -> None:
        """Writes `lr_transfer.csv` and `lr_transfer.json`, of all proxies; losses that are not finite become null."""
        rows = [{**dataclasses.asdict(proxy), "loss": loss} for proxy, loss in self.losses.items()]
        finite = [{**row, "loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in rows]
        write_csv(self.output / "lr_transfer.csv", finite)
        content = {
            "settings": {**vars(self.args), "model": MODEL},
            "best": [dataclasses.asdict(each) for each in done],
            "moved": {r: dict(zip(("grid", "vertex"), moved(done, r), strict=True)) for r in {b.rules for b in done}},
            "proxies": [{**row, "curve": curve} for row, curve in zip(rows, self.curves.values(), strict=True)],
        }
        write_json(self.output / "lr_transfer.json", content)

    def draw(self, figure: Any, done: Outcomes) -> None:
        """Loss over learning rate, a curve per width, with the rules on the left and without them on the right."""
        args = self.args
        figure.set_size_inches(10, 4.4)
        for axis, rules in zip(figure.subplots(1, 2, sharey=True), RULES, strict=True):
            for number, width in enumerate(sorted(args.widths)):
                points = [(p.lr, loss) for p, loss in self.losses.items() if (p.rules, p.width) == (rules, width)]
                axis.plot(*zip(*points, strict=True), ".-", color=f"C{number}", label=f"width {width}")
                (top,) = [each for each in done if (each.rules, each.width) == (rules, width)]
                axis.plot([top.lr], [top.loss], "*", color=f"C{number}", markersize=13)
            grid, vertex = moved(done, rules)
            title = f"{rules} the transfer rules: best moves by {grid:+.0f} grid steps ({vertex:+.1f})"
            axis.set_title(title, fontsize="medium")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("learning rate")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
        figure.axes[0].set_ylabel(f"training loss, mean of steps {args.steps - args.average + 1} to {args.steps}")
        figure.suptitle(f"mus_vit, {args.depth} blocks, {args.layers}, {args.opt}, {args.steps} steps on CIFAR-10")

    def words(self, done: Outcomes) -> list[str]:
        """How far the best rate moves."""
        moves = {rules: moved(done, rules) for rules in RULES}
        return [
            f"{rules} the rules, the best rate moves by {grid:+.0f} grid steps ({vertex:+.2f} by vertex)"
            for rules, (grid, vertex) in moves.items()
        ]


def _stored(path: Path) -> list[float] | None:
    """The losses in a file that an earlier series wrote, if it is one."""
    values = read_stored(path, lambda content: all(v is None or type(v) in (int, float) for v in content) and content)
    return [math.nan if v is None else float(v) for v in values] if values else None


def _cost(proxy: Proxy) -> int:
    """Work in some unit: products of matrices, and what goes with the width."""
    return proxy.width**2 + 100 * proxy.width


def _name(args: argparse.Namespace, proxy: Proxy) -> str:
    """Of everything that changes the result."""
    hidden = proxy.lr * _factor(args, proxy)
    words = [f"{MODEL}-w{proxy.width}-lr{proxy.lr:g}-hidden{hidden:.6g}-{args.layers.replace(':', '_')}-{args.opt}"]
    words += [f"d{args.depth}", f"p{args.patch_size}", f"h{args.head_width}", f"{args.steps}x{args.batch_size}"]
    return "-".join([*words, f"wd{args.weight_decay:g}", f"seed{args.seed}"])


def _factor(args: argparse.Namespace, proxy: Proxy) -> float:
    return (args.base_width / proxy.width) ** 0.5 if proxy.rules == "with" else 1.0


def _final(curve: Sequence[float], args: argparse.Namespace) -> float:
    last = curve[-args.average :]
    return sum(last) / len(last)


def _images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """As many images and labels as are needed, in an order that depends on the seed alone."""
    wanted = args.steps * args.batch_size
    try:
        check_split(args.data)
        dataset: Any = create_dataset("", root=args.data, search_split=False)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"--data: '{args.data}' cannot be read ({one_line(error)}); give class folders.") from error
    if len(dataset) < wanted:
        raise UserError(
            f"--data: '{args.data}' has {len(dataset)} images where {wanted} are needed, each is seen once; "
            "lower --steps or --batch-size."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))[:wanted].tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    images, labels = torch.empty(wanted, 3, IMAGE_SIZE, IMAGE_SIZE), torch.empty(wanted, dtype=torch.long)
    for number, index in enumerate(order):
        image, label = dataset[index]
        images[number] = (pil_to_tensor(image.resize((IMAGE_SIZE, IMAGE_SIZE))) / 255 - mean) / std
        labels[number] = label
    return images, labels


def train_proxy(args: argparse.Namespace, proxy: Proxy, data: tuple[Tensor, Tensor]) -> list[float]:
    """The training losses of a proxy, step by step; NaN from where they stopped being finite.

    A tenth of the steps warms up, then the rate falls to 0 by a cosine.
    """
    torch.manual_seed(args.seed)
    size = {"img_size": IMAGE_SIZE, "patch_size": args.patch_size, "embed_dim": proxy.width, "depth": args.depth}
    classes = int(data[1].max()) + 1
    try:
        model: Any = timm.create_model(
            MODEL, num_classes=classes, num_heads=proxy.width // args.head_width, layers=args.layers, **size
        ).train()
        base = args.base_width if proxy.rules == "with" else proxy.width
        groups = revnets.mus_param_groups(model, proxy.lr, args.weight_decay, base, proxy.width)
        optimizer = create_optimizer_v2(groups, opt=args.opt, lr=proxy.lr)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{one_line(error)}; correct --layers, --patch-size, --opt or --weight-decay.") from error
    scheduler: Any = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.steps,
        warmup_epochs=max(1, args.steps // 10),
        warmup_lr=0.0,
        min_lr=0.0,
        step_on_epochs=True,
    )[0]
    losses: list[float] = []
    for step, (images, labels) in enumerate(_batches(data, args.batch_size), start=1):
        scheduler.step(step)
        loss = cross_entropy(model(images), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses + [math.nan] * (args.steps - step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def _batches(data: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(data[0].split(size), data[1].split(size), strict=True)


def best(rules: str, width: int, losses: dict[Proxy, float]) -> Best:
    """The best learning rate of a width.

    Raises:
        UserError: No proxy of this width ended with a finite loss.
    """
    found = {p.lr: loss for p, loss in losses.items() if (p.rules, p.width) == (rules, width) and math.isfinite(loss)}
    if not found:
        raise UserError(f"width {width} {rules} rules: no loss stayed finite; lower --lowest and --highest.")
    lr = min(found, key=lambda rate: found[rate])
    left, middle, right = (found.get(rate) for rate in (lr / 2, lr, lr * 2))
    shift = 0.0
    if left is not None and middle is not None and right is not None and left + right > 2 * middle:
        shift = (left - right) / (2 * (left + right - 2 * middle))
    return Best(rules, width, lr, found[lr], lr * 2**shift)


def moved(found: Sequence[Best], rules: str) -> tuple[float, float]:
    """Largest move of the best learning rate from that of the least width, in grid steps (factors of 2).

    Returns:
        the move on the grid, and that of the vertices.
    """
    first, *others = [each for each in found if each.rules == rules]
    grid = [math.log2(each.lr / first.lr) for each in others]
    vertices = [math.log2(each.vertex / first.vertex) for each in others]
    return max(grid, key=abs, default=0.0), max(vertices, key=abs, default=0.0)


if __name__ == "__main__":
    sys.exit(Table.main())
