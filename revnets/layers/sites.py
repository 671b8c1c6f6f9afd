"""Where a layer could be converted: what it is, what follows it, and why some layers stay as they are."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .registry import SparseConfig
from .trace import Call, Trace

LEFT_OUT = "left out by the filter"
Filter = Callable[[nn.Module, str], bool]
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MASKED: set[type[nn.Module]] = set()
"""Torch's own layers under a mask, added where they are defined: conversions that go everywhere take them, too."""


class Unsuitable(ValueError):
    """A layer that a conversion cannot take; the message says which constraint it breaks."""


@dataclass
class Site:
    """A layer and its surroundings in the data flow.

    Attributes:
        name: of the layer in the model.
        layer: an ``nn.Conv2d`` or ``nn.Linear``.
        norm: norm that directly follows and alone reads the layer's output, or None. It may include its activation, as
            timm's ``BatchNormAct2d`` does.
        act: activation that directly follows the norm (or the layer) and alone reads its output, or None.
        role: ``"input"`` for the first layer, ``"output"`` for the classifier, ``"hidden"`` for all others.
        usual_norm: the norm that is most frequent in the network, or None.
        usual_act: the activation that is most frequent in the network, or None.
        replaced: modules that conversion puts elsewhere in the network, by name; see ``take_norm``.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None = None
    act: nn.Module | None = None
    role: str = "hidden"
    usual_norm: nn.Module | None = None
    usual_act: nn.Module | None = None
    norm_name: str = ""
    act_name: str = ""
    replaced: dict[str, nn.Module] = field(default_factory=dict)

    def take_norm(self) -> nn.Module | None:
        """The norm without its activation, which an identity (or that activation) replaces in the network."""
        if self.norm is None:
            return None
        bare = copy.deepcopy(self.norm)
        if fused_act(self.norm) is None:
            self.replaced[self.norm_name] = nn.Identity()
        else:
            self.replaced[self.norm_name] = self.norm.act  # type: ignore[assignment]
            bare.act = nn.Identity()
        return bare

    def take_act(self) -> nn.Module | None:
        """The activation that follows, which an identity replaces in the network; after ``take_norm`` only."""
        fused = None if self.norm is None else fused_act(self.norm)
        if fused is not None:
            self.replaced[self.norm_name] = nn.Identity()
            return copy.deepcopy(fused)
        if self.act is not None:
            self.replaced[self.act_name] = nn.Identity()
        return copy.deepcopy(self.act)

    @property
    def inner_act(self) -> nn.Module:
        """An activation for the inside of a converted layer: that which follows, or the network's usual one."""
        fused = None if self.norm is None else fused_act(self.norm)
        return copy.deepcopy(fused or self.act or self.usual_act or nn.ReLU())

    def inner_norm(self, width: int) -> nn.Module:
        """A new norm of ``width`` channels for the inside of a layer, of the kind that follows it or is usual."""
        like: Any = self.norm or self.usual_norm
        eps: dict[str, Any] = {"eps": like.eps} if isinstance(getattr(like, "eps", None), float) else {}
        if not isinstance(self.layer, nn.Conv2d):
            return nn.LayerNorm(width, **(eps if isinstance(like, nn.LayerNorm) else {}))
        if isinstance(like, nn.LayerNorm):
            from timm.layers import LayerNorm2d

            return LayerNorm2d(width, **eps)
        if isinstance(like, nn.GroupNorm):
            return nn.GroupNorm(_divisor(width, like.num_groups), width, **eps)
        momentum: dict[str, Any] = {"momentum": like.momentum} if isinstance(like, _NormBase) else {}
        return nn.BatchNorm2d(width, **eps, **momentum)


def _divisor(width: int, groups: int) -> int:
    return max(g for g in range(1, groups + 1) if width % g == 0)


def fused_act(norm: nn.Module) -> nn.Module | None:
    """The activation inside a norm such as timm's ``BatchNormAct2d``, if it has one."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None


def is_act(module: nn.Module) -> bool:
    """Whether the module is an elementwise activation of torch or timm."""
    home, kind = type(module).__module__, type(module).__name__
    known = home == "torch.nn.modules.activation" or home.startswith("timm.layers.activations")
    return known and not any(word in kind for word in ("Softmax", "Softmin", "Multihead", "GLU"))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether every channel of the convolution is filtered by itself."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


class Surroundings:
    """The data flow around the layers of a model.

    Args:
        model: the real one.
        recorded: a trace of it.
    """

    def __init__(self, model: nn.Module, recorded: Trace) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.trace = recorded
        self._consumers: dict[int, list[int]] = {}
        for index, op in enumerate(recorded.ops):
            for value in op.inputs:
                self._consumers.setdefault(value.number, []).append(index)
        self._calls: dict[str, list[Call]] = {}
        self._readers: dict[int, list[Call]] = {}
        for call in recorded.calls:
            self._calls.setdefault(call.module, []).append(call)
            for value in call.inputs:
                self._readers.setdefault(value.number, []).append(call)
        self._outputs = {value.number for value in recorded.outputs}
        self._owners = Counter(
            id(module._parameters["weight"]) for module in self.modules.values() if "weight" in module._parameters
        )
        self._first = next((c.module for c in recorded.calls if _is_weighted(self.modules[c.module])), None)
        self.usual_norm = self._usual(lambda module: isinstance(module, NORMS))
        self.usual_act = self._usual(is_act)
        self._classifiers = self._find_classifiers()

    def _usual(self, wanted: Callable[[nn.Module], bool]) -> nn.Module | None:
        found = [module for module in self.modules.values() if wanted(module)]
        if not found:
            return None
        kind, _ = Counter(type(module) for module in found).most_common(1)[0]
        return next(module for module in found if type(module) is kind)

    def site(self, name: str) -> Site:
        """The layer called ``name`` with what follows it."""
        site = Site(name, self.modules[name], usual_norm=self.usual_norm, usual_act=self.usual_act)
        site.role = self.role(name)
        calls = self._calls.get(name, [])
        if len(calls) != 1:
            return site
        call = self._only_reader(calls[0], lambda module: isinstance(module, NORMS))
        if call is not None:
            site.norm, site.norm_name = self.modules[call.module], call.module
        if site.norm is None or fused_act(site.norm) is None:
            call = self._only_reader(call or calls[0], is_act)
            if call is not None:
                site.act, site.act_name = self.modules[call.module], call.module
        return site

    def _only_reader(self, call: Call, wanted: Callable[[nn.Module], bool]) -> Call | None:
        """The call of a wanted module that alone reads the output of ``call``; the module runs nowhere else."""
        if len(call.outputs) != 1 or call.outputs[0].number in self._outputs:
            return None
        number = call.outputs[0].number
        for reader in self._readers.get(number, []):
            inside = range(reader.first_op, reader.last_op)
            if (
                wanted(self.modules[reader.module])
                and len(self._calls[reader.module]) == 1
                and all(index in inside for index in self._consumers.get(number, []))
            ):
                return reader
        return None

    # --- layers that stay ---------------------------------------------------------------------------------------

    def reason_to_keep(
        self, name: str, filter: Filter | None, everywhere: bool = False, also: tuple[type[nn.Module], ...] = ()
    ) -> str | None:
        """Why the layer called ``name`` stays as it is; None where it may be converted.

        Args:
            name: of the layer.
            filter: the user's.
            everywhere: whether the conversion takes the first layer, the classifier and sparse layers, too.
            also: further classes of layers that it takes.
        """
        layer = self.modules[name]
        masked = everywhere and type(layer) in MASKED
        if not masked and type(layer) not in (nn.Conv2d, nn.Linear, *also):
            return f"{type(layer).__name__} is neither nn.Conv2d nor nn.Linear itself"
        if filter is not None and not filter(layer, name):
            return LEFT_OUT
        calls = len(self._calls.get(name, []))
        if calls == 0:
            return "it is not called in the forward pass"
        if self._owners[id(layer.weight)] > 1:
            return "it shares its weight with another layer"
        if everywhere:
            return None
        return {"output": "the classifier stays dense", "input": "the first layer stays dense"}.get(self.role(name))

    def role(self, name: str) -> str:
        """``"input"`` for a first layer that takes the image, ``"output"`` for the classifier, else ``"hidden"``."""
        if name in self._classifiers:
            return "output"
        return "input" if self._reads_image(name) else "hidden"

    def reason_by_config(self, name: str, config: Any) -> str | None:
        """Why sparse members leave a layer that may be converted: options of ``SparseConfig``."""
        if not isinstance(config, SparseConfig):
            return None
        if is_depthwise(self.modules[name]) and not config.depthwise:
            return "depthwise convolutions stay dense (option depthwise)"
        if self._in_squeeze_excite(name) and not config.squeeze_excite:
            return "squeeze-and-excite stays dense (option squeeze_excite)"
        return None

    def _in_squeeze_excite(self, name: str) -> bool:
        """By the class around it: SEModule, SqueezeExcite, SqueezeExcitation, SELayer, ..."""
        kind = type(self.modules[name.rpartition(".")[0]]).__name__
        return "Squeeze" in kind or kind.startswith(("SEModule", "SELayer", "EffectiveSE"))

    def _reads_image(self, name: str) -> bool:
        """Whether the layer is the first to run and takes the image's own channels."""
        (image,) = self.trace.inputs
        layer = self.modules[name]
        return name == self._first and isinstance(layer, nn.Conv2d) and layer.in_channels == image.shape[1]

    def _find_classifiers(self) -> set[str]:
        """What the model calls its classifier, or a layer whose output is the model's only one."""
        heads: list[Any] = []
        if hasattr(self.model, "get_classifier"):
            found = self.model.get_classifier()  # type: ignore[operator]
            heads = list(found) if isinstance(found, (tuple, list)) else [found]
        inside = {id(m) for head in heads if isinstance(head, nn.Module) for m in head.modules()}
        alone = self._outputs if len(self._outputs) == 1 else set()  # several outputs are features
        ends = {c.module for c in self.trace.calls if c.outputs and c.outputs[0].number in alone}
        return {name for name, module in self.modules.items() if id(module) in inside} | {
            name for name in ends if _is_weighted(self.modules[name]) and name
        }


def _is_weighted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))
