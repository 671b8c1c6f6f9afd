"""Watches every linear layer and convolution of a model in some steps of a training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from ..layers.munit.fp8 import E4M3, E5M2, check_grad_scale
from ..layers.munit.functional import gradient_scale
from ..layers.munit.layers import MunitScaled
from ..reversible import every_pass
from ..training.options.values import COUNT
from .report import Record, draw_picture, read_table, write_table
from .stats import StatsSum

LAYERS = (nn.Linear, _ConvNd)
"""What is watched."""
FORMATS = {"input": E4M3, "weight": E4M3, "output": None, "output_grad": E5M2, "weight_grad": None}
"""What is watched of a layer, and the FP8 format it has, or would have, as an operand."""


class NumericsMonitor:
    """RMS of activations, weights and gradients of every linear layer and convolution, and what FP8 loses of them.

    Inputs and weights are judged by e4m3, gradients of outputs by e5m2 after the layer's ``grad_scale``, whether or not
    the layer multiplies in FP8 (``fp8`` in the records): of plain layers it says what conversion would lose. Nothing is
    changed, and between the steps that are watched nothing is attached to the model.

    Works in all modes of reversible networks, under checkpointing, autocast, DDP and gradient accumulation: the forward
    pass counts once, its recomputation does not, and gradients are seen wherever they arise. Under a loss scaler,
    gradients are the scaled ones, as the cast sees them. Evaluation (``model.eval()``) is not counted. Of a compiled
    model, give the one inside; layers that run compiled are not seen.

    Args:
        model: any; not wrapped in DDP.
        every: watch steps 0, ``every``, 2 ``every``, ...
        grad_scale: for layers that have none of their own, such as plain ones.

    Attributes:
        records: one dictionary per layer and watched step: ``step``, ``layer``, ``kind``, ``fp8``, ``grad_scale`` and,
            for each of input, weight, output, output_grad and weight_grad, ``_rms``, with ``_flushed`` and
            ``_clipped`` where FP8 casts (shares in 0 to 1; None where a layer did not run).

    Raises:
        ValueError: for an interval below 1, a scale that is no number above 0, or a model without such layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with NumericsMonitor(net, every=10) as monitor:
        ...     for _ in range(11):
        ...         net(torch.randn(4, 8)).square().mean().backward()
        ...         watched = monitor.step()
        >>> [(r["step"], r["layer"], r["input_clipped"]) for r in monitor.records]
        [(0, '0', 0.0), (0, '2', 0.0), (10, '0', 0.0), (10, '2', 0.0)]
    """

    def __init__(self, model: nn.Module, every: int = 100, grad_scale: float = 1.0) -> None:
        COUNT.check("every", every)
        if check_grad_scale(grad_scale) is None:
            raise ValueError("grad_scale=None: expected a number greater than 0, 1 for gradients as they are")
        self.model, self.every, self.grad_scale = model, every, grad_scale
        self.records: list[Record] = []
        self._layers: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                self._layers.setdefault(module, name)
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no linear layer and no convolution to be watched")
        self._step = 0
        self._sums: dict[tuple[nn.Module, str], StatsSum] = {}
        self._scales: dict[nn.Module, float] = {}
        self._handles: list[RemovableHandle] = []
        self._attach()

    def __enter__(self) -> NumericsMonitor:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def step(self) -> bool:
        """The end of a training step, however many batches it took: call it after ``backward``.

        Returns:
            Whether the step was watched: there are new records.
        """
        watched = bool(self._handles)
        if watched:
            self._note()
            self.close()
        self._step += 1
        if self._step % self.every == 0:
            self._attach()
        return watched

    def resume(self, folder: Path, step: int) -> None:
        """Go on where an interrupted run stopped: with the records that it wrote, and its count of steps.

        Args:
            folder: where ``save`` wrote.
            step: number of the next step; later records are dropped.
        """
        self.close()
        self.records = [r for r in read_table(folder) if r["step"] < step]
        self._step = step
        if step % self.every == 0:
            self._attach()

    def close(self) -> None:
        """Take everything off the model; what was not yet noted by ``step`` is dropped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums.clear()

    def save(self, folder: Path, title: str = "") -> list[Path]:
        """Write ``numerics.csv`` and, where matplotlib is installed, ``numerics.png``.

        Args:
            folder: that exists.
            title: of the picture.

        Returns:
            The files written.
        """
        table = write_table(self.records, folder)
        drawn = draw_picture(self.records, folder, title or type(self.model).__name__)
        return [table, drawn] if drawn else [table]

    # --- watching ---------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        layers = self._layers

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if module in layers:  # not in a copy of the model, such as a moving average, that took the hook along
                self._seen(module, next(iter((*args, *kwargs.values()))), output)

        def accumulated(layer: nn.Module, weight: Tensor) -> None:
            if weight.grad is not None:
                self._add(layer, "weight_grad", weight.grad)

        for layer in layers:
            self._handles.append(layer.register_forward_hook(every_pass(after, keeps=False), with_kwargs=True))
            weight: Any = layer.weight
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                # not a tensor hook: those fire in each of the engine's inner backward passes, on parts of the gradient
                handle = weight.register_post_accumulate_grad_hook(lambda w, layer=layer: accumulated(layer, w))
                self._handles.append(handle)

    def _seen(self, layer: nn.Module, x: Any, y: Any) -> None:
        if not self.model.training or not (isinstance(x, Tensor) and isinstance(y, Tensor)) or _is_empty(x, y):
            return
        if torch._C._current_graph_task_id() == -1:  # not recomputed, which happens within a backward pass
            if (layer, "weight") not in self._sums:
                self._add(layer, "weight", _operand(layer))
            self._add(layer, "input", x)
            self._add(layer, "output", y)
        if y.requires_grad:
            y.register_hook(lambda grad: self._add(layer, "output_grad", grad))

    def _add(self, layer: nn.Module, what: str, x: Tensor) -> None:
        if not self._handles or not x.is_floating_point():
            return
        scale = self._scale(layer, x.dtype) if what == "output_grad" else 1.0
        self._sums.setdefault((layer, what), StatsSum()).add(x, FORMATS[what], scale)

    def _scale(self, layer: nn.Module, dtype: torch.dtype) -> float:
        found = gradient_scale(layer.grad_scale, dtype) if isinstance(layer, MunitScaled) else self.grad_scale
        self._scales[layer] = found
        return found

    def _note(self) -> None:
        for layer, name in self._layers.items():
            fp8 = isinstance(layer, MunitScaled) and layer.fp8
            record: Record = {"step": self._step, "layer": name, "kind": type(layer).__name__, "fp8": fp8}
            record["grad_scale"] = self._scales.get(layer)
            for what, dtype in FORMATS.items():
                found = self._sums[layer, what].result() if (layer, what) in self._sums else None
                record[f"{what}_rms"] = None if found is None else found.rms
                if dtype is not None:
                    record[f"{what}_flushed"] = None if found is None else found.flushed
                    record[f"{what}_clipped"] = None if found is None else found.clipped
            self.records.append(record)


def _is_empty(*tensors: Tensor) -> bool:
    return any(t.numel() == 0 for t in tensors)


@torch.no_grad()
def _operand(layer: Any) -> Tensor:
    """The weight as it is cast: before a munit scale, with zeros where a mask has them."""
    for name in ("unscaled_weight", "effective_weight"):
        if hasattr(layer, name):
            return getattr(layer, name)()
    return layer.weight
