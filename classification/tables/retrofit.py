"""Fine-tuning retrofitted against fine-tuning as usual: accuracy on a new task, and the memory of a step, over seeds.

python -m classification.tables.retrofit --data-dir CIFAR10 --output output/retrofit_table

The first half of a data set's classes is the task of the pre-training, the other half the new task. Each network is
pre-trained once, as it is; then it is fine-tuned twice for each seed, plain and by `revnets.reversible`, from the same
weights, with the same new classifier and the same images in the same order. Everything runs in this process, on one
thread; what is finished is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor

import revnets
from revnets.profiling.memory import measure_training_step
from revnets.training.data.splits import start_no_programs
from revnets.training.errors import UserError
from revnets.training.files import write, write_json
from revnets.training.options.parsing import argument

from . import runner
from .runner import Column, Outcomes, average, flag, mean, positive, same
from .series import read_stored

_logger = logging.getLogger("classification")
PLAIN, REVERSIBLE = "plain", "reversible"
SIDE = 32  # of the images
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Network:
    """One of timm's classes in a small size, and how it is trained."""

    make: Callable[[int], nn.Module]
    pretrain_lr: float
    finetune_lr: float
    epochs: int  # of the pre-training
    finetune_epochs: int


def _convnext(classes: int) -> nn.Module:
    sizes: dict[str, Any] = {"depths": (3, 3, 9, 3), "dims": (24, 48, 96, 192), "patch_size": 2}
    return timm.create_model("convnext_atto", num_classes=classes, drop_path_rate=0.05, conv_mlp=False, **sizes)


def _vit(classes: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    how: dict[str, Any] = {"class_token": False, "global_pool": "avg", "drop_path_rate": 0.05}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes, **how)


NETWORKS = {"vit": Network(_vit, 2e-3, 5e-4, 8, 4), "convnext": Network(_convnext, 4e-3, 1e-3, 2, 3)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A fine-tuning and what it came from."""

    network: str
    training: str
    seed: int
    pretrain_top1: float
    top1: float
    activation_mb: float  # of one step, at the batch size of the training
    seconds: float  # of the fine-tuning


@dataclasses.dataclass(frozen=True)
class Data:
    """Images of 8 bits, and their classes from 0 on."""

    images: Tensor
    labels: Tensor

    def part(self, each: int, classes: int) -> Data:
        """The first so many of every class."""
        found = [torch.nonzero(self.labels == label).flatten()[:each] for label in range(classes)]
        indices = torch.cat(found)
        return Data(self.images[indices], self.labels[indices])


def read(path: Path, second_half: bool) -> tuple[Data, int]:
    """One half of the classes of a .tar file of class folders, and how many there are.

    Raises:
        UserError: There is no such file.
    """
    if not path.is_file():
        raise UserError(f"--data-dir: there is no '{path}'; give the folder with train.tar and validation.tar.")
    start_no_programs()
    dataset = create_dataset("", root=str(path))
    classes = len(dataset.reader.class_name_to_idx)
    first, last = (classes // 2, classes) if second_half else (0, classes // 2)
    found = [(pil_to_tensor(image.convert("RGB")), label - first) for image, label in dataset if first <= label < last]
    images, labels = zip(*found, strict=True)
    return Data(torch.stack(images), torch.tensor(labels)), last - first


def _batch(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normalised, and for training mirrored and shifted by up to four pixels."""
    x = (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    if generator is None:
        return x
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
    side, shifts = x.shape[-1], torch.randint(0, 9, (2, len(x), 1), generator=generator)
    x = functional.pad(x, (4, 4, 4, 4))
    rows, columns = (torch.arange(side) + shift for shift in shifts)
    return x[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(model: nn.Module, data: Data, lr: float, epochs: int, batch_size: int, seed: int) -> None:
    """AdamW on a cosine, with a short warm-up."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    steps = epochs * (len(data.labels) // batch_size)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    model.train()
    for epoch in range(epochs):
        order, total = torch.randperm(len(data.labels), generator=generator), 0.0
        for indices in order.split(batch_size)[: len(order) // batch_size]:
            loss = functional.cross_entropy(
                model(_batch(data.images[indices], generator)), data.labels[indices], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        _logger.info(f"  epoch {epoch + 1} of {epochs}: loss {total / (len(order) // batch_size):.4f}")


@torch.no_grad()
def validate(model: nn.Module, data: Data) -> float:
    """Top-1 in percent."""
    model.eval()
    right = sum(
        int((model(_batch(images, None)).argmax(1) == labels).sum())
        for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True)
    )
    return 100 * right / len(data.labels)


def _less(found: Outcomes, lines: runner.Lines) -> str:
    plain = lines.get((found[0].network, PLAIN), ())
    return runner.number(average(found, "top1") - average(plain, "top1"), "+.2f")


def _share(found: Outcomes, lines: runner.Lines) -> str:
    plain = average(lines.get((found[0].network, PLAIN), ()), "activation_mb")
    return runner.number(average(found, "activation_mb") / plain)


class Table(runner.Table):
    """Networks x seeds, plain and retrofitted."""

    folder = "retrofit_table"
    description = "Networks x seeds, fine-tuned plain and by revnets.reversible."
    options = (
        flag("--data-dir", type=argument(str, path=True), required=True, help="of the .tar files"),
        flag("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS)),
        runner.SEEDS,
        flag("--images", type=positive, default=20000, help="of the pre-training, of each class as many"),
        flag("--finetune-images", type=positive, default=5000, help="of the new task"),
        flag("--epochs", type=positive, help="of the pre-training; by default the network's own"),
        flag("--finetune-epochs", type=positive, help="by default the network's own"),
        flag("--batch-size", type=positive, default=100),
        flag("--only-pretrain", action="store_true", help="stop after it"),
    )
    columns = (
        Column("network", same("network")),
        Column("fine-tuned", same("training")),
        Column("seeds", runner.count),
        Column("pre-trained to, %", mean("pretrain_top1")),
        Column("top-1 of the new task, %", mean("top1")),
        Column("± std", runner.spread),
        Column("against plain", _less),
        Column("activation MB", mean("activation_mb")),
        Column("of plain", _share),
        Column("seconds", mean("seconds", ".0f")),
    )

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self._read: dict[tuple[str, bool], tuple[Data, int]] = {}
        self._memory: dict[tuple[str, str], float] = {}

    def line(self, outcome: Any) -> tuple[str, str]:
        return outcome.network, outcome.training

    def data(self, split: str, second_half: bool) -> tuple[Data, int]:
        """Read once."""
        key = split, second_half
        if key not in self._read:
            self._read[key] = read(Path(self.args.data_dir) / split, second_half)
        return self._read[key]

    def pretrained(self, name: str) -> tuple[dict[str, Tensor], float]:
        """Weights and top-1 of the pre-training, made where they are missing."""
        args, network = self.args, NETWORKS[name]
        epochs = args.epochs or network.epochs
        path = self.output / f"{name}-{args.images}-{epochs}.pth"
        if path.exists():
            stored = torch.load(path, weights_only=True)
            return stored["weights"], stored["top1"]
        data, classes = self.data("train.tar", False)
        torch.manual_seed(0)
        model = network.make(classes)
        _logger.info(f"{name}: pre-training of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
        train(model, data.part(args.images // classes, classes), network.pretrain_lr, epochs, args.batch_size, 0)
        top1 = validate(model, self.data("validation.tar", False)[0])
        _logger.info(f"{name}: pre-trained to {top1:.2f}%")
        write(path, lambda temporary: torch.save({"weights": model.state_dict(), "top1": top1}, temporary))
        return model.state_dict(), top1

    def outcomes(self) -> Iterator[Outcome]:
        torch.set_num_threads(1)
        for name in self.args.networks:
            weights, pretrain_top1 = self.pretrained(name)
            for seed in () if self.args.only_pretrain else self.args.seeds:
                for training in (PLAIN, REVERSIBLE):
                    yield self._outcome(name, weights, pretrain_top1, seed, training)

    def _outcome(
        self, name: str, weights: dict[str, Tensor], pretrain_top1: float, seed: int, training: str
    ) -> Outcome:
        args, network = self.args, NETWORKS[name]
        epochs, finetune_epochs = args.epochs or network.epochs, args.finetune_epochs or network.finetune_epochs
        words = (name, training, seed, args.images, epochs, args.finetune_images, finetune_epochs)
        path = self.output / f"{'-'.join(map(str, words))}.json"
        stored = read_stored(path, lambda found: Outcome(**found))
        if stored is not None:
            return dataclasses.replace(stored, activation_mb=self.memory(name, training))
        (data, classes), (held_out, _) = self.data("train.tar", True), self.data("validation.tar", True)
        torch.manual_seed(seed)
        model = self.made(name, training, classes, weights)
        part, start = data.part(args.finetune_images // classes, classes), time.perf_counter()
        train(model, part, network.finetune_lr, finetune_epochs, args.batch_size, seed)
        seconds = time.perf_counter() - start
        top1 = validate(model, held_out)
        outcome = Outcome(name, training, seed, pretrain_top1, top1, self.memory(name, training), seconds)
        _logger.info(f"{name}, {training}, seed {seed}: top-1 {top1:.2f}%")
        write_json(path, dataclasses.asdict(outcome))
        return outcome

    @staticmethod
    def made(name: str, training: str, classes: int, weights: dict[str, Tensor] | None = None) -> Any:
        """A network with a new classifier, reversible or not."""
        model: Any = NETWORKS[name].make(classes)
        if weights is not None:
            model.load_state_dict(weights)
        model.reset_classifier(classes)
        if training == REVERSIBLE:
            model = revnets.reversible(model, input_size=(3, SIDE, SIDE))  # type: ignore[operator]
        return model

    def memory(self, name: str, training: str) -> float:
        """Activation MB of a step, measured."""
        if (name, training) not in self._memory:
            x, state = torch.zeros(self.args.batch_size, 3, SIDE, SIDE), torch.get_rng_state()
            step = measure_training_step(self.made(name, training, 2).train(), x)
            torch.set_rng_state(state)
            self._memory[name, training] = step.activation_bytes / 1e6
        return self._memory[name, training]

    def draw(self, figure: Any, done: Outcomes) -> None:
        axes = figure.subplots()
        for (network, training), found in self.lines(done).items():
            memory = [each.activation_mb for each in found]
            axes.plot(memory, [each.top1 for each in found], "o", label=f"{network}, {training}")
        axes.set(xlabel="activation MB of a step", ylabel="top-1 of the new task, %")
        axes.legend()


if __name__ == "__main__":
    sys.exit(Table.main())
