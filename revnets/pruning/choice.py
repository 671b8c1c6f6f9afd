"""Which layers of a network are pruned, how sparse each becomes, and in which blocks they are taken."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from ..layers.convert import Skipped
from ..layers.geometry import described
from ..layers.registry import SparseConfig
from ..layers.sites import Surroundings
from ..sparsity.masks import DISTRIBUTIONS, densities, kept
from .inputs import shape
from .solve import Blocked, Blocks, Pattern

RULES: Mapping[str, str] = {
    "first": "the first layer, where it reads the image's own channels",
    "classifier": "the last linear layer",
    "depthwise": "convolutions that filter every channel by itself",
    "squeeze_excite": "layers of squeeze-and-excite",
}
"""Which layers a word of ``exclude`` leaves out."""

DEFAULT_EXCLUDE = tuple(RULES)
"""What ``prune`` leaves out where nothing else is said."""

Layers = dict[str, nn.Module]


def choose(around: Surroundings, exclude: Sequence[str]) -> tuple[Layers, list[Skipped]]:
    """The layers to prune, in the order in which they run, and all others with the reason.

    Args:
        around: the network and its trace.
        exclude: rules of ``RULES``, or patterns of names such as ``"head.*"``.

    Raises:
        ValueError: for a word that is no rule and fits no layer, or when nothing is left to prune.
    """
    patterns = [word for word in exclude if word not in RULES]
    names = [name for name, module in around.modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for word in patterns:
        if not fnmatch.filter(names, word):
            raise ValueError(
                f"exclude={word!r}: it is none of the rules {', '.join(RULES)} and fits the name of no layer; "
                f"names are such as {names[-1]!r}"
                if names
                else f"exclude={word!r}: the model has no nn.Conv2d or nn.Linear"
            )
    skipped = []
    for name in names:
        reason = _reason(around, name, exclude, patterns)
        if reason is not None:
            skipped.append(Skipped(name, reason))
    left = set(names) - {s.name for s in skipped}
    order = dict.fromkeys(call.module for call in around.trace.calls if call.module in left)
    if not order:
        why = f"; {skipped[0].name or 'the model'}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"no layer of the model can be pruned{why}")
    return {name: around.modules[name] for name in order}, skipped


def _reason(around: Surroundings, name: str, exclude: Sequence[str], patterns: Sequence[str]) -> str | None:
    """Why a layer is not pruned."""
    layer: Any = around.modules[name]
    if "StdConv2d" in type(layer).__name__:  # timm's
        return "its weights are standardised in every forward pass: zeros would not stay zeros"
    reason = around.reason_to_keep(name, None, everywhere=True, also=(Conv2dSame,))
    if reason is not None:
        return reason
    if layer.weight.device.type == "meta":
        return "its weight has no memory (device meta)"
    role = around.role(name)
    if role == "input" and "first" in exclude:
        return "the first layer is left out (rule first)"
    if role == "output" and "classifier" in exclude:
        return "the classifier is left out (rule classifier)"
    rules = SparseConfig(0.0, depthwise="depthwise" not in exclude, squeeze_excite="squeeze_excite" not in exclude)
    if around.reason_by_config(name, rules) is not None:
        word = "depthwise convolutions are" if shape(layer)[0] > 1 else "squeeze-and-excite is"
        return f"{word} left out (rule {'depthwise' if shape(layer)[0] > 1 else 'squeeze_excite'})"
    fitting = [word for word in patterns if fnmatch.fnmatch(name, word)]
    return f"left out by {fitting[0]!r}" if fitting else None


def targets(layers: Layers, goal: float | Pattern | Blocked, distribution: str) -> dict[str, int | Pattern | Blocks]:
    """How many weights of each layer become 0, or N:M.

    Args:
        layers: by name.
        goal: sparsity of all of them together, or N:M.
        distribution: ``uniform``, ``er``, ``erk`` (``revnets.sparsity``) or ``global``.

    Raises:
        ValueError: for an unknown distribution, or layers that N:M does not fit.
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    if isinstance(goal, Pattern):
        if distribution != "uniform":
            raise ValueError(f"distribution={distribution!r}: every layer has the sparsity of {goal}; expected uniform")
        _check_fits(layers, goal)
        return dict.fromkeys(layers, goal)
    if isinstance(goal, Blocked):
        _check_fits(layers, goal)
        zeros = targets(layers, goal.sparsity, distribution)
        return {name: Blocks(round(int(count) / goal.of), goal.of) for name, count in zeros.items()}  # type: ignore
    if distribution == "global":
        return {**global_zeros(weights, goal)}
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution={distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}, global (one for all weights)"
        )
    shares = densities([weight.shape for weight in weights.values()], goal, distribution)
    return {
        name: weight.numel() - round(share * weight.numel())
        for (name, weight), share in zip(weights.items(), shares, strict=True)
    }


def _check_fits(layers: Layers, pattern: Pattern | Blocked) -> None:
    odd = {name: layer for name, layer in layers.items() if int(layer.weight.shape[1]) % pattern.of}  # type: ignore
    if odd:
        name, layer = next(iter(odd.items()))
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise ValueError(
            f"pattern='{pattern}': {name or 'the model'}, {described(layer)},{more} has {layer.weight.shape[1]} input "  # type: ignore
            f"channels per group, expected a multiple of {pattern.of}; leave out such layers with exclude, or give "
            "sparsity without a pattern"
        )


@torch.no_grad()
def global_zeros(weights: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, int]:
    r"""How many weights each layer loses to one threshold for all, by magnitudes that are comparable among layers.

    The threshold is on :math:`w_u^2 / \sum_{|w_v| \ge |w_u|} w_v^2` within the layer (LAMP, 2010.07611); the largest
    weight of a layer always stays. Which weights go is up to the method.

    Example:
        >>> global_zeros({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([9.0, 1e-3])}, 0.5)
        {'a': 1, 'b': 1}
    """
    scores = []
    for weight in weights.values():
        squares = weight.detach().double().flatten().square().sort().values
        above = squares.flip(0).cumsum(0).flip(0)
        scores.append((squares / above.clamp(min=torch.finfo(torch.float64).tiny)).cpu())
    total = sum(score.numel() for score in scores)
    count = total - kept(total, sparsity)
    together = torch.cat(scores)
    gone = torch.zeros_like(together, dtype=torch.bool)
    gone[together.topk(min(count, total - len(scores)), largest=False).indices] = True
    parts = gone.split([score.numel() for score in scores])
    return {name: int(part.sum()) for name, part in zip(weights, parts, strict=True)}


def blocks(model: nn.Module, layers: Layers, most: int) -> list[list[str]]:
    """Layers that are pruned together, on inputs that come from what was pruned before, in running order.

    A block is the innermost module around a layer that has siblings of its class, such as a residual block of a
    ResNet, a transformer's block, a branch of a RevSilo. Where that makes more than ``most``, neighbours are joined,
    those with the smallest Hessians first.

    Args:
        model: the network.
        layers: by name, in running order.
        most: how many blocks there may be; each is a pass over the calibration images.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)))
        >>> layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
        >>> blocks(net, layers, most=2)
        [['0.0', '0.2', '1.0', '1.2'], ['2.0', '2.2']]
    """
    modules = dict(model.named_modules())
    inside = _cached_block_name(modules)
    found = [list(names) for _, names in groupby(layers, key=inside)]
    sizes = [sum(_hessian_numbers(layers[name]) for name in names) for names in found]
    while len(found) > max(most, 1):
        i = min(range(len(found) - 1), key=lambda i: sizes[i] + sizes[i + 1])
        found[i : i + 2] = [found[i] + found[i + 1]]
        sizes[i : i + 2] = [sizes[i] + sizes[i + 1]]
    return found


def _hessian_numbers(layer: nn.Module) -> int:
    groups, columns = shape(layer)
    return groups * columns**2


def _cached_block_name(modules: Mapping[str, nn.Module]) -> Callable[[str], str]:
    def block_name(layer: str) -> str:
        name = layer
        while "." in name:
            name = name.rpartition(".")[0]
            parent = modules[name.rpartition(".")[0]] if "." in name else modules[""]
            alike = sum(type(child) is type(modules[name]) for child in parent.children())
            if alike > 1:
                return name
        return layer.partition(".")[0] if "." in layer else layer

    return block_name
