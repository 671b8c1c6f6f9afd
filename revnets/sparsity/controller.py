"""One object that keeps weights sparse and changes their masks; any training loop calls its ``step()``."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ranks
from .blocks import is_whole, norms, of_blocks, shape_of_blocks, spread
from .found import SparseLayer, counts, sparse_layers
from .masks import densities, mask_with_count
from .schedules import Schedule, drop, exchanged, grow

_logger = logging.getLogger(__name__)
_WATCHED, _WATCH_INTERVAL = frozenset((1, 2, 3, 5, 10, 20, 50)), 100


@dataclass(frozen=True)
class MaskUpdate:
    """One change of all masks; the lists have one entry per layer.

    Attributes:
        step: optimizer step after which it happened.
        fraction: share of the active weights that was exchanged.
        exchanged: how many weights were dropped, and as many grown.
        changed: how many of the grown were not active before.
        active: how many are active, before and after.
    """

    step: int
    fraction: float
    exchanged: list[int]
    changed: list[int]
    active: list[int]

    def __str__(self) -> str:
        """One line for a log."""
        new, active = sum(self.changed), sum(self.active)
        return (
            f"masks after step {self.step}: {new:,} of {active:,} active weights are new ({new / max(active, 1):.1%})"
        )


class SparsityController:
    """Keeps masked weights, their gradients and optimizer state at 0, and changes the masks by a schedule.

    ``static`` keeps the masks; ``set`` (1707.04780) drops the weights of smallest magnitude and grows at random;
    ``rigl`` (1911.11134) grows where the dense gradient is largest, which layers gather in that one step only, summed
    over accumulated batches and over processes. Layers of the pattern ``4x1`` drop and grow blocks of four input
    channels, by their norms. Each layer's density stays exact. Masks are the same in all processes:
    they follow from reduced gradients and from one generator.

    Layers keep gradients at 0 outside their masks, and an optimizer that works number by number then moves nothing
    there: such a step costs nothing. Whether one does is watched in some of the first 50 steps, in every 100th, and
    before masks change; from the first number outside a mask on (Muon mixes rows, say), all is masked after every step.

    Call ``step()`` after every step of the optimizer, before the gradients are cleared. Steps that a loss scaler
    skipped are noticed and do not count. An averaged copy of the model is masked by ``apply_masks(copy, like=model)``
    after its own update. Frozen weights, and weights that the optimizer does not hold, keep their masks.

    Args:
        model: with sparse layers (a ``weight`` and a bool buffer ``mask``); wrapped or not.
        optimizer: of its parameters; any of torch's or timm's.
        schedule: ``static``, ``set`` or ``rigl``.
        total_steps: steps of the optimizer in the whole training.
        interval: steps between two changes.
        start: of the changes, as a fraction of the training.
        end: of the changes, as a fraction of the training.
        drop_fraction: share of the active weights exchanged at the start; it decays by a cosine.
        distribution: ``uniform``, ``er`` or ``erk``: how the sparsity is shared out among the layers.
        sparsity: of all sparse layers together; None keeps that of the masks. Where neither this nor the
            distribution asks for other masks, those of the layers stay; new ones take values that the layer has.
        seed: of the generator for new masks and for ``set``.

    Raises:
        ValueError: for a model without sparse layers, or arguments that make no schedule.

    Example:
        >>> from revnets.sparsity import SparsityController
        >>> layer = nn.Linear(8, 8)
        >>> SparsityController(layer, torch.optim.SGD(layer.parameters()), "static")
        Traceback (most recent call last):
        ValueError: the model has no sparse layers: convert it first, such as with layers="sparse_parallel:0.75"
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: str = "rigl",
        *,
        total_steps: int | None = None,
        interval: int = 100,
        start: float = 0.0,
        end: float = 0.75,
        drop_fraction: float = 0.3,
        distribution: str = "uniform",
        sparsity: float | None = None,
        seed: int = 0,
    ) -> None:
        self.schedule = Schedule(schedule, total_steps, interval, start, end, drop_fraction)
        self.layers = sparse_layers(model)
        if not self.layers:
            raise ValueError(
                'the model has no sparse layers: convert it first, such as with layers="sparse_parallel:0.75"'
            )
        if schedule != "static" and not self.schedule.updates(total_steps or 0):
            _logger.warning(
                f"{schedule}: no mask changes in {total_steps} steps with an interval of {interval}; lower it"
            )
        # timm's Lookahead keeps the state, and the hooks, of the optimizer inside
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
        self._optimizer.register_step_post_hook(self._note_step)
        self._generator = torch.Generator().manual_seed(seed)
        self._stepped = self._gathering = False
        self.steps = 0
        self.history: list[MaskUpdate] = []
        if sparsity is not None or distribution != "uniform":
            self._draw(distribution, sparsity)
        for layer in self.layers:
            layer.set_mask(ranks.from_first(layer.mask))
            if not is_whole(layer.mask, layer.block):
                raise ValueError(
                    f"the mask of {layer.name or 'the model'} has single zeros, where its pattern has blocks of "
                    f"{layer.block}: make it by the pattern, or convert without one"
                )
        self._generator.set_state(ranks.from_first(self._generator.get_state(), self.layers[0].mask.device))
        self._counts = counts(self.layers)
        self._leaky = False
        self._mask_all()
        self._gather(self._gathers(1))

    @torch.no_grad()
    def step(self) -> MaskUpdate | None:
        """Mask weights, gradients and optimizer state; change the masks where it is time.

        Returns:
            What changed, or None.
        """
        if not self._stepped:  # a loss scaler found inf or NaN, and what was gathered may hold them too
            self._forget_gradients()
            return None
        self._stepped = False
        self.steps += 1
        if self._watched(self.steps) and not self._leaky:
            self._leaky = self._leaks()
        if self._leaky:
            self._mask_all()
        update = self._update() if self.schedule.due(self.steps) else None
        if update is not None:
            self._mask_all()
        self._gather(self._gathers(self.steps + 1))
        return update

    @property
    def density(self) -> dict[str, float]:
        """Share of active weights by layer, counted."""
        active = counts(self.layers)
        return {layer.name: n / layer.mask.numel() for layer, n in zip(self.layers, active, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the states of model (with its masks) and optimizer."""
        active, blocks = counts(self.layers), self._blocks()
        return {
            **({"blocks": blocks} if blocks else {}),
            "schedule": self.schedule.name,
            "steps": self.steps,
            "leaky": self._leaky,
            "generator": self._generator.get_state(),
            "layers": {layer.name: [*layer.mask.shape, n] for layer, n in zip(self.layers, active, strict=True)},
            "history": {
                "step": torch.tensor([u.step for u in self.history], dtype=torch.int64),
                "fraction": torch.tensor([u.fraction for u in self.history], dtype=torch.float64),
                **{
                    name: torch.tensor([getattr(u, name) for u in self.history], dtype=torch.int32)
                    for name in ("exchanged", "changed", "active")
                },
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; load the model, with its masks, before.

        Raises:
            ValueError: when the layers or their masks are not those of the model, or the schedule is another one.
        """
        self.check_state_dict(state)
        self._generator.set_state(state["generator"].cpu())
        self.steps, self._leaky = int(state["steps"]), bool(state["leaky"])
        columns = {name: values.tolist() for name, values in state["history"].items()}
        self.history = [
            MaskUpdate(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        ]
        self._stepped = False
        self._forget_gradients()
        self._gather(self._gathers(self.steps + 1))

    def check_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
        """Refuse a state that is not of these layers and this schedule; nothing changes.

        Args:
            state: Of ``state_dict``.
            weights: The model's state that is to be loaded with it; None: the model has it already.

        Raises:
            ValueError: when the layers or their masks are not those of the model, or the schedule is another one.
        """
        active = counts(self.layers)
        for index, layer in enumerate(self.layers):
            mask = None if weights is None else weights.get(f"{layer.name}.mask" if layer.name else "mask")
            active[index] = active[index] if mask is None else int(mask.sum())
        self._check_layers(state["layers"], active)
        theirs, ours = state.get("blocks", {}), self._blocks()
        odd = next((name for name in {**ours, **theirs} if ours.get(name, 1) != theirs.get(name, 1)), None)
        if odd is not None:
            raise ValueError(
                f"masks do not match: '{odd}' has zeros in blocks of {theirs.get(odd, 1)} in the checkpoint, "
                f"{ours.get(odd, 1)} in the model; give the same layers="
            )
        if state["schedule"] != self.schedule.name:
            raise ValueError(
                f"schedule={self.schedule.name!r}: the checkpoint was trained with {state['schedule']!r}; give that one"
            )

    def _blocks(self) -> dict[str, int]:
        """Of the layers whose zeros come in blocks, how many input channels make one."""
        return {layer.name: layer.block for layer in self.layers if layer.block > 1}

    def _check_layers(self, theirs: Mapping[str, list[int]], held: list[int]) -> None:
        ours = {layer.name: layer for layer in self.layers}
        odd = sorted(set(ours) ^ set(theirs))
        if odd:
            where = "the model, not in the checkpoint" if odd[0] in ours else "the checkpoint, not in the model"
            raise ValueError(f"masks do not match: sparse layer '{odd[0]}' is in {where}; give the same layers=")
        for name, made, active in zip(ours, self._counts, held, strict=True):
            *shape, count = theirs[name] or [0]
            if tuple(shape) != ours[name].mask.shape:
                raise ValueError(
                    f"masks do not match: '{name}' has shape {tuple(shape)} in the checkpoint, "
                    f"{tuple(ours[name].mask.shape)} in the model; give the same layers="
                )
            if count != made:
                raise ValueError(
                    f"masks do not match: '{name}' has {count} active weights in the checkpoint, {made} were asked "
                    "for; give the same layers= and distribution"
                )
            if count != active:
                raise ValueError(
                    f"masks do not match: '{name}' has {count} active weights in the checkpoint, {active} in the "
                    "model; load the model's state of the same checkpoint first"
                )

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # fused optimizers skip by themselves: GradScaler lends them what it found
        found_inf = getattr(optimizer, "found_inf", None)
        self._stepped = found_inf is None or not bool(found_inf)

    def _gathers(self, step: int) -> bool:
        return self.schedule.name == "rigl" and self.schedule.due(step)

    def _gather(self, wanted: bool) -> None:
        """Have the layers gather dense gradients in the next step, or no longer."""
        if wanted != self._gathering:
            for module in self._modules():
                module.gather_dense_grad = wanted  # type: ignore[assignment]
            self._gathering = wanted
        if not wanted:
            return
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        if self._gathering:
            for module in self._modules():
                module.dense_grad = None  # type: ignore[assignment]

    def _modules(self) -> Iterator[nn.Module]:
        return (module for layer in self.layers for module in layer.modules)

    @torch.no_grad()
    def _draw(self, distribution: str, sparsity: float | None) -> None:
        """New random masks where their counts change; weights that were 0 take values of the layer: its scale stays."""
        shapes = [layer.mask.shape for layer in self.layers]
        active, sizes = counts(self.layers), [layer.mask.numel() for layer in self.layers]
        wanted = 1 - sum(active) / sum(sizes) if sparsity is None else sparsity
        shares = densities(shapes, wanted, distribution, blocks=[layer.block for layer in self.layers])
        kept = [round(share * size) for share, size in zip(shares, sizes, strict=True)]
        if kept == active:
            return
        for layer, size, n, count in zip(self.layers, sizes, active, kept, strict=True):
            mask = mask_with_count(layer.mask.shape, count, self._generator, layer.block).to(layer.mask.device)
            picks = torch.randint(max(n, 1), (size,), generator=self._generator).to(layer.mask.device)
            values = layer.weight[layer.mask] if n else layer.weight.new_zeros(1)
            weight = torch.where(layer.mask, layer.weight, values[picks].view(layer.mask.shape))
            layer.set_mask(mask)
            layer.weight.copy_(weight * mask)

    def _update(self) -> MaskUpdate:
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        fraction, active = self.schedule.fraction(self.steps), counts(self.layers)
        swapped, changed = [], []
        for layer, n in zip(self.layers, active, strict=True):
            free = layer.weight.requires_grad and id(layer.weight) in trained
            of = layer.block
            count = of * exchanged(n // of, layer.mask.numel() // of, fraction) if free else 0
            scores = self._scores(layer) if count else None
            before = layer.mask.clone()
            if scores is not None:
                self._exchange(layer, scores, count)
            swapped.append(count if scores is not None else 0)
            changed.append((layer.mask & ~before).sum())
        numbers = torch.stack(changed).tolist()
        update = MaskUpdate(self.steps, fraction, swapped, numbers, active)
        self.history.append(update)
        self._forget_gradients()
        return update

    def _scores(self, layer: SparseLayer) -> Tensor | None:
        """What decides where blocks of weights grow; None where no gradient arrived."""
        if self.schedule.name == "set":
            shape = shape_of_blocks(layer.mask.shape, layer.block)
            return torch.rand(shape, generator=self._generator).to(layer.mask.device)
        grads = layer.dense_grads
        if not grads and not ranks.several():
            return None
        total = torch.stack(grads).sum(0) if grads else torch.zeros_like(layer.weight)
        return norms(ranks.summed(total), layer.block)

    def _exchange(self, layer: SparseLayer, scores: Tensor, count: int) -> None:
        of = layer.block
        few = drop(norms(layer.weight, of), of_blocks(layer.mask, of), count // of)
        kept = spread(few, of)
        self._mask(layer, kept)  # what is dropped and grown at once starts at 0 as well
        layer.set_mask(spread(grow(few, scores, count // of), of))

    def _mask_all(self) -> None:
        for layer in self.layers:
            self._mask(layer, layer.mask)

    @torch.no_grad()
    def _mask(self, layer: SparseLayer, mask: Tensor) -> None:
        """Zero outside the mask."""
        for tensor in self._tensors(layer):
            tensor.mul_(mask.to(tensor.device))

    def _tensors(self, layer: SparseLayer) -> Iterator[Tensor]:
        """Weight, gradient, and every tensor of the weight's shape in the optimizer's state."""
        weight = layer.weight
        for tensor in (weight, weight.grad, *self._optimizer.state.get(weight, {}).values()):
            if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                yield tensor

    def _watched(self, step: int) -> bool:
        return step in _WATCHED or step % _WATCH_INTERVAL == 0 or self.schedule.due(step)

    def _leaks(self) -> bool:
        """Whether the optimizer's step left anything outside the masks."""
        outside = [
            (tensor * ~layer.mask.to(tensor.device)).any() for layer in self.layers for tensor in self._tensors(layer)
        ]
        return any(flag.item() for flag in outside)
