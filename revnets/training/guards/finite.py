"""Numbers that go wrong: updates that are left out, and the layer where it began."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 10
REMEDY = "lower the learning rate, clip gradients, use bfloat16 instead of float16, or look at these images"


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or gradients that are not finite; the message says where it began."""


class FiniteGuard:
    """Leaves out updates whose loss or gradients are not finite, and ends the run after too many in a row.

    A forward pass with NaN also ruins running statistics: they are put back as they were after the last good update.
    Looking at the numbers makes an accelerator wait once per update. In several processes, all leave an update out.

    Args:
        model: That is trained; wrapped or not.
        limit: Updates in a row that may be left out; 0: never look.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> guard = FiniteGuard(layer)
        >>> loss = layer(torch.tensor([1.0, float("inf")])).sum()
        >>> loss.backward()
        >>> guard.note(loss)
        >>> guard.good(), guard.skipped
        (False, 1)
    """

    def __init__(self, model: nn.Module, limit: int = LIMIT) -> None:
        self.model, self.limit = model, limit
        self.skipped, self.in_a_row = 0, 0
        self._reason = ""
        self._losses: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    def note(self, loss: Tensor) -> None:
        """Takes a loss into account for the next update."""
        if self.limit:
            self._losses.append(loss.detach())

    def good(self, gradients: bool = True, skipped: bool = False) -> bool:
        """Whether the update can be made; counts it where not, and puts running statistics back.

        Args:
            gradients: Look at them, too; a loss scaler does that itself.
            skipped: The scaler has left the update out, see ``SkippedByScaler``.
        """
        if skipped:
            self.failed()
            return False
        if not self.limit:
            return True
        numbers = [loss.float().sum() for loss in self._losses]
        if gradients:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            numbers += torch._foreach_norm(grads, 2, dtype=torch.float32) if grads else []
        self._losses = []
        finite = not numbers or bool(self._everywhere(torch.stack(numbers).isfinite().all()).item())
        self.told(finite)
        return finite

    def told(self, finite: bool) -> None:
        """Takes an update into account at which the device has looked already, and which it left out if it was bad."""
        if not finite:
            self.failed()
        elif self.limit:
            self.in_a_row = 0
            self._keep()

    def failed(self, reason: str = "") -> None:
        """Counts an update that could not be made, and puts running statistics back.

        Args:
            reason: If it is known and another process's, where this one would look in vain.
        """
        self._losses, self._reason = [], reason
        self.skipped += 1
        self.in_a_row += 1
        if self._kept:
            torch._foreach_copy_(self._buffers, self._kept)

    @property
    def exhausted(self) -> bool:
        """Whether it is time to give up."""
        return self.limit > 0 and self.in_a_row >= self.limit

    def give_up(self, forward: Callable[[], Any]) -> NonFinite:
        """What to raise, after a look at where it began.

        Args:
            forward: Computes the loss of the last batch again.
        """
        return NonFinite(
            f"{self.in_a_row} updates in a row were left out, as loss or gradients are not finite: "
            f"{self._reason or diagnose(self.model, forward)}; {REMEDY}"
        )

    def state_dict(self) -> dict[str, int]:
        """How many updates were left out, and how many since the last good one."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Counts on from there; older checkpoints have nothing, which starts at 0."""
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)

    def start(self) -> None:
        """Keeps the running statistics as they are now."""
        self._buffers = [b for b in self.model.buffers() if b.is_floating_point()] if self.limit else []
        self._kept = [b.detach().clone() for b in self._buffers]

    def _keep(self) -> None:
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)

    def _everywhere(self, finite: Tensor) -> Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            votes = finite.float()
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
            return votes
        return finite


class SkippedByScaler:
    """Whether a loss scaler left out the update that is made within the ``with`` block: it then lowers its scale.

    Args:
        scaler: ``torch.amp.GradScaler``, or what has its ``get_scale()``.

    Example:
        >>> with SkippedByScaler(torch.amp.GradScaler("cpu")) as scaler:
        ...     pass
        >>> scaler.skipped
        False
    """

    def __init__(self, scaler: Any) -> None:
        self.scaler, self.skipped = scaler, False
        self._before = 0.0

    def __enter__(self) -> "SkippedByScaler":
        self._before = float(self.scaler.get_scale())
        return self

    def __exit__(self, *error: object) -> None:
        self.skipped = float(self.scaler.get_scale()) < self._before


def diagnose(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Where numbers stop being finite: a weight, or the first layer whose output is not, or a gradient.

    Args:
        model: Whose layers ``forward`` calls. Running statistics stay as they are.
        forward: Computes the loss from the inputs that were trouble.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Flatten(0))
        >>> diagnose(net, lambda: net(torch.tensor([[float("nan")]])))
        "the input of layer '0' (Linear), the first, is not finite"
    """
    weights = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if weights:
        return f"weight '{weights[0]}' and {len(weights) - 1} others are not finite"
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _finite(output):
            kind = f"layer '{name}' ({type(module).__name__})"
            if _finite(inputs):
                largest = max((float(x.abs().max()) for x in _tensors(inputs) if x.numel()), default=0.0)
                found.append(f"the first output that is not finite is that of {kind}, from inputs up to {largest:.3g}")
            else:
                found.append(f"the input of {kind}, the first, is not finite")

    handles = [
        module.register_forward_hook(lambda m, xs, y, name=name: look(name, m, xs, y))
        for name, module in model.named_modules()
        if name
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    loss: Any = None
    try:
        with torch.no_grad():
            loss = forward()
    except RuntimeError as error:  # exact mode's guard, which names the op
        if not found:
            found.append(" ".join(str(error).split()))
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if found:
        return found[0]
    if not _finite(loss):
        return "all layers' outputs are finite, the loss of them is not"
    if gradients:
        return f"loss and outputs are finite, the gradient of '{gradients[0]}' and {len(gradients) - 1} others are not"
    return "the last batch gives a finite loss again, so what is random in the model matters"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _finite(value: Any) -> bool:
    return all(bool(each.isfinite().all()) for each in _tensors(value))
