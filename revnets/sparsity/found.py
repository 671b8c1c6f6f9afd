"""Finding the sparse layers of a network: whatever has a ``weight`` and a bool buffer ``mask`` of its shape."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import block_of

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


@dataclass(frozen=True)
class SparseLayer:
    """One sparse weight and the modules that use it: one, or several where weights are tied.

    Attributes:
        name: dotted, of the first module, without the prefixes that wrappers add.
        modules: with ``weight``, ``mask`` and ``set_mask``.
    """

    name: str
    modules: tuple[nn.Module, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The weight that all its modules share."""
        weight: nn.Parameter = self.modules[0].weight  # type: ignore[assignment]
        return weight

    @property
    def mask(self) -> Tensor:
        """True where a weight is active; of the weight's shape."""
        mask: Tensor = self.modules[0].mask  # type: ignore[assignment]
        return mask

    @property
    def block(self) -> int:
        """How many input channels of an output are zero together."""
        return block_of(getattr(self.modules[0], "pattern", None))

    @property
    def dense_grads(self) -> list[Tensor]:
        """What its modules have gathered."""
        gathered = (module.dense_grad for module in self.modules)
        return [grad for grad in gathered if isinstance(grad, Tensor)]

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Give every module the mask; dropped weights become 0."""
        for module in self.modules:
            module.set_mask(mask.to(self.weight.device))  # type: ignore[operator]


def is_sparse(module: nn.Module) -> bool:
    """Whether a module has a ``weight`` and a bool buffer ``mask`` of its shape.

    Example:
        >>> is_sparse(nn.Linear(2, 2))
        False
    """
    weight, mask = module._parameters.get("weight"), module._buffers.get("mask")
    if weight is None or mask is None:
        return False
    return mask.dtype == torch.bool and mask.shape == weight.shape


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    """Every sparse layer of a network, each tied weight once, in the order of ``named_modules``.

    Example:
        >>> sparse_layers(nn.Linear(2, 2))
        []
    """
    found: dict[int, tuple[str, list[nn.Module]]] = {}
    for name, module in model.named_modules():
        if is_sparse(module):
            found.setdefault(id(module.weight), (_plain(name), []))[1].append(module)
    return [SparseLayer(name, tuple(modules)) for name, modules in found.values()]


def _plain(name: str) -> str:
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix) if name.startswith(prefix) else name
    return name.replace("._orig_mod", "")


@torch.no_grad()
def apply_masks(model: nn.Module, like: nn.Module | None = None) -> None:
    """Set the weights that a network's masks leave out to 0.

    Call it on an averaged copy after its update, with the model as ``like``: averages make dropped weights fade instead
    of being gone, and those of torch and MMEngine, told to average buffers, leave a mask that is none of the model's.

    Args:
        model: Such as the copy.
        like: A network of the same layers whose masks it takes first; None keeps its own.

    Example:
        >>> apply_masks(nn.Linear(2, 2))  # nothing sparse in it, nothing to do
    """
    layers = sparse_layers(model)
    for layer, source in zip(layers, layers if like is None else sparse_layers(like), strict=True):
        for module in layer.modules:
            module.mask.copy_(source.mask)  # type: ignore[operator]
        layer.weight.mul_(layer.mask)


def counts(layers: Iterable[SparseLayer]) -> list[int]:
    """How many weights of each layer are active; one transfer from the device for all."""
    active = [layer.mask.sum() for layer in layers]
    return torch.stack(active).tolist() if active else []
