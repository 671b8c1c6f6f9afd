"""Hooks against numbers that go wrong: updates that are not finite, rebuilt activations that are not the true ones."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...training.guards.drift import EVERY, DriftMonitor, part
from ...training.guards.drift import LIMIT as HARMLESS
from ...training.guards.finite import LIMIT, FiniteGuard, SkippedByScaler
from ...training.guards.ranges import AgreedRangeError, ranges_agreed

COUNTERS = "updates_left_out"  # in the message hub, and so in checkpoints
PATCHED = ("backward", "step", "optim_context")  # of the optimizer's wrapper, in training


@HOOKS.register_module()
class FiniteHook(Hook):
    """Leaves out updates whose loss or gradients are not finite, and ends the run after too many in a row.

    The error names the first layer whose output is not finite. Where there is a loss scaler, it looks at the gradients
    and leaves out updates itself; they are counted, too, unless its scale is a constant.

    Args:
        limit: updates in a row that may be left out; 0: do not look.

    Raises:
        NonFinite: after the last of them.

    Example:
        >>> FiniteHook(limit=5).limit  # in a config: custom_hooks=[dict(type="FiniteHook", limit=5)]
        5
    """

    priority = "VERY_HIGH"  # sees the batch before anything that may fail

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.guard: FiniteGuard | None = None
        self._batch: Any = None

    def before_train(self, runner: Any) -> None:
        """Put the guard between backward pass and update."""
        wrapper = runner.optim_wrapper
        if self.limit <= 0 or not hasattr(wrapper, "optimizer"):  # several optimizers: each would want its own
            return
        guard = self.guard = FiniteGuard(getattr(runner.model, "module", runner.model), self.limit)
        guard.start()
        guard.load_state_dict(runner.message_hub.runtime_info.get(COUNTERS, {}))
        scaled = hasattr(wrapper, "loss_scaler")
        backward, step, context = (getattr(type(wrapper), name) for name in PATCHED)

        @contextmanager
        def together(model: Any) -> Iterator[None]:
            if model is not runner.model:  # somebody else's look at the network, in one process
                with context(wrapper, model):
                    yield
                return
            with ranges_agreed(), context(wrapper, model):
                yield

        @functools.wraps(backward)
        def noted(loss: torch.Tensor, **more: Any) -> None:
            guard.note(loss / wrapper.loss_scaler.get_scale() if scaled else loss)
            backward(wrapper, loss, **more)

        @functools.wraps(step)
        def guarded(**more: Any) -> None:
            if scaled:
                with SkippedByScaler(wrapper.loss_scaler) as scaler:
                    step(wrapper, **more)
                good = guard.good(gradients=False, skipped=scaler.skipped)
            else:
                good = guard.good()
                if good:
                    step(wrapper, **more)
            if not good:
                runner.logger.warning(f"iteration {runner.iter}: loss or gradients are not finite, no update")

        wrapper.backward, wrapper.step, wrapper.optim_context = noted, guarded, together

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Remember the batch, to find out what is wrong with it."""
        self._batch = data_batch

    def after_failed_iter(self, runner: Any, error: Exception) -> None:
        """Count an iteration that the range guard of exact mode ended.

        Raises:
            RangeError: in one of several processes, where the others wait for this one's gradients.
        """
        agreed = isinstance(error, AgreedRangeError)
        if self.guard is None or (runner.world_size > 1 and not agreed):
            raise error
        runner.logger.warning(f"iteration {runner.iter}: {error}: no update")
        self.guard.failed(str(error) if agreed else "")
        runner.optim_wrapper.zero_grad()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Give up, if it is time; else note the counters, before checkpoints are saved."""
        if self.guard is not None and self.guard.exhausted:
            raise self.guard.give_up(functools.partial(_losses, runner, self._batch))
        if self.guard is not None and self.guard.skipped:
            runner.message_hub.update_info(COUNTERS, self.guard.state_dict())
        self._batch = None

    def after_train(self, runner: Any) -> None:
        """Say how many there were, and take the guard away."""
        if self.guard is None:
            return
        if self.guard.skipped:
            runner.logger.warning(f"{self.guard.skipped} updates were left out, as loss or gradients were not finite")
        for name in PATCHED:
            vars(runner.optim_wrapper).pop(name, None)


@HOOKS.register_module()
class DriftHook(Hook):
    """Looks now and then at how well the reversible backbone rebuilds its activations, and warns with the remedy.

    Args:
        every: iterations between two looks, at the middle 256 x 256 pixels of one image.
        limit: relative error that is harmless.

    Example:
        >>> DriftHook(every=1000).every  # in a config: custom_hooks=[dict(type="DriftHook", every=1000)]
        1000
    """

    def __init__(self, every: int = EVERY, limit: float = HARMLESS) -> None:
        self.every, self.limit = every, limit
        self.monitor: DriftMonitor | None = None

    def before_train(self, runner: Any) -> None:
        """Find the backbone."""
        model = getattr(runner.model, "module", runner.model)
        backbone = getattr(model, "backbone", None)
        self.monitor = None if backbone is None else DriftMonitor(backbone, self.every, self.limit)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Look, if it is time."""
        if self.monitor is None or not self.monitor.due(runner.iter) or runner.rank != 0:
            return
        model = getattr(runner.model, "module", runner.model)
        images = (data_batch or {}).get("inputs")
        if not isinstance(images, (list, tuple)) or not images:
            return
        image = part(images[0][None].to(next(model.parameters()).device))
        with runner.optim_wrapper.optim_context(model), torch.no_grad():
            warning = self.monitor.check(self._normalised(model, image))
        if warning:
            runner.logger.warning(f"iteration {runner.iter}: {warning}")

    def _normalised(self, model: Any, image: torch.Tensor) -> torch.Tensor:
        """As the data preprocessor does it, padded to whole cells."""
        preprocessor = model.data_preprocessor
        image = image.float()
        if getattr(preprocessor, "_channel_conversion", False):
            image = image[:, [2, 1, 0]]
        if getattr(preprocessor, "_enable_normalize", False):
            image = (image - preprocessor.mean) / preprocessor.std
        height, width = (-n % 32 for n in image.shape[-2:])
        return torch.nn.functional.pad(image, (0, width, 0, height))


def _losses(runner: Any, batch: Any) -> Any:
    model = getattr(runner.model, "module", runner.model)
    with runner.optim_wrapper.optim_context(model):
        data = model.data_preprocessor(batch, True)
        return model(**data, mode="loss") if isinstance(data, dict) else model(*data, mode="loss")
