"""Precisions below float32 as candidates of ``deploy``: what each engine has, and how much accuracy each may cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.options.values import NOT_NEGATIVE
from .candidates import CLOSE, FLOAT32, INT8, Candidate, Progress, attempt
from .engines import get_engine, verify
from .graph import ExportError
from .peers import PEERS
from .quantize import accuracies, calibration_images, quantize
from .runners import first_call
from .seal import Purpose, read, seal

_ROUGHLY = 0.5  # of the largest output: what bfloat16 may differ by; accuracy decides


@dataclass(frozen=True)
class Precisions:
    """Other precisions than float32 for ``deploy``: INT8, and bfloat16 where OpenVINO takes it by default.

    A candidate is refused where its top-1 is below that of the float32 network by more than ``drop``.

    Args:
        drop: points of top-1 (in percent) that may be lost.
        calibration: images, as ``quantize`` takes them.
        validation: images and labels, as ``accuracy`` takes them; read once.
        images: how many to calibrate on.
        method: how ranges are found, see ``quantize``.

    Raises:
        ValueError: for a drop below 0.

    Example:
        >>> Precisions(-1.0, [], [])
        Traceback (most recent call last):
        ValueError: accuracy_drop=-1.0: expected a number of at least 0
    """

    drop: float
    calibration: Iterable[Any]
    validation: Iterable[tuple[Tensor, Tensor]]
    images: int = 256
    method: str = "minmax"

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check("accuracy_drop", self.drop)

    def works(
        self, model: nn.Module, x: Tensor, any_batch: bool, folder: Path, name: str, made: Sequence[Candidate]
    ) -> list[Callable[[], Candidate]]:
        """What makes the candidates, of the engines that are installed; one that fails is refused with the reason.

        Args:
            model: in float32.
            x: an example of the input.
            any_batch: whether files take other batch sizes than that of ``x``.
            folder: for the files.
            name: of the files, without precision and suffix.
            made: candidates so far, those in float32 first.
        """
        images = list(calibration_images(self.calibration, self.images))
        trial = _Trial(model, x, any_batch, folder, name, made, images, self.method)
        found: list[Callable[[], Candidate]] = []
        for peer in PEERS.values():
            if not peer.missing() and peer.used() != FLOAT32:
                make = trial.quantised if peer.precision == INT8 else trial.by_default
                names = (peer.engine, peer.used())
                found.append(partial(attempt, partial(make, *names), *names))
        return found

    @torch.no_grad()
    def judge(self, model: nn.Module, made: Sequence[Candidate], progress: Progress) -> None:
        """Measures top-1 of every precision on the same images, and refuses what loses more than ``drop``.

        Files in float32 have the model's: their outputs are verified to be. What is slower than the fastest of them is
        not measured: it would not be taken, whatever its top-1.
        """
        best = min((one for one in made if one.precision == FLOAT32), key=lambda one: one.seconds)
        others = []
        for one in made:
            if one.precision != FLOAT32 and one.seconds > CLOSE * best.seconds:
                one.refused = f"it is slower than {best.name} in float32"
            elif one.precision != FLOAT32:
                others.append(one)
        runs: list[Any] = [lambda x: [model(x)], *(one.run for one in others)]
        was_training = model.training
        model.eval()
        try:
            base, *found = accuracies(runs, progress(self.validation, "measuring top-1"))
        finally:
            model.train(was_training)
        for one in made:
            one.accuracy = base if one.precision == FLOAT32 else None
        for one, top1 in zip(others, found, strict=True):
            one.accuracy = top1
            if base - top1 > self.drop + 1e-9:
                one.refused = f"it loses {base - top1:.2f} points of top-1, more than {self.drop:g}"


@dataclass(frozen=True)
class _Trial:
    """The files of one network."""

    model: nn.Module
    x: Tensor
    any_batch: bool
    folder: Path
    name: str
    made: Sequence[Candidate]
    images: Sequence[Tensor]
    method: str

    def by_default(self, engine: str, precision: str) -> Candidate:
        """The engine's file in float32, with a note that it is to take the precision that it likes."""
        files = (one.path for one in self.made if (one.engine, one.precision) == (engine, FLOAT32))
        source = next(files, None)
        if source is None:
            raise ExportError(f"{engine} has no file in float32")
        path = self._copied(source, engine, precision)
        run = get_engine(engine).open(read(path), None)
        return Candidate(
            engine, precision, path, run, verify(run, self.model, self.x, _ROUGHLY, f"{engine} {precision}")
        )

    def quantised(self, engine: str, precision: str) -> Candidate:
        """INT8; ONNX Runtime and OpenVINO run the same file."""
        twins = (one for one in self.made if one.precision == INT8 and one.engine != "sparse")
        twin = None if engine == "sparse" else next(twins, None)
        if twin is not None:
            if twin.path is None:  # making it again would end as it did
                raise ExportError(f"as {twin.name}: {twin.refused}")
            path = self._copied(twin.path, engine, precision)
            run = get_engine(engine).open(read(path), None)
            first_call(run, self.x, f"{engine} {precision}")
            return Candidate(engine, precision, path, run, twin.error)
        method = "minmax" if engine == "sparse" and self.method == "entropy" else self.method
        folder, name = self.folder / f"{engine}-{precision}", f"{self.name}-{precision}"
        sizes: dict[str, Any] = {"any_batch": self.any_batch, "engine": engine, "batch_size": len(self.x)}
        small = quantize(self.model, self.images, folder, name, sum(map(len, self.images)), method, **sizes)
        return Candidate(engine, precision, small.path, get_engine(engine).open(read(small.path), None), small.error)

    def _copied(self, source: Path, engine: str, precision: str) -> Path:
        """A candidate's files under the name of another precision, with its note."""
        folder = self.folder / f"{engine}-{precision}"
        folder.mkdir()
        for file in source.parent.iterdir():
            shutil.copyfile(file, folder / f"{self.name}-{precision}{file.suffix}")
        path = folder / f"{self.name}-{precision}{source.suffix}"
        seal(path, Purpose(engine, precision))
        return path
