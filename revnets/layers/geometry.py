"""What layers made of several layers share: the attributes and the constructor arguments of the one they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import nn

NormLayer = Callable[[int], nn.Module]
ActLayer = Callable[[], nn.Module]
Usual = Literal["usual"]

_ATTRIBUTES = {
    nn.Conv2d: (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        *("padding_mode", "transposed", "output_padding"),
    ),
    nn.Linear: ("in_features", "out_features"),
}


class Compound(nn.Module):
    """A layer made of several, with the attributes that code around convolutions and linear layers reads."""

    kind: ClassVar[type[nn.Module]]
    """Torch's layer that it stands for."""
    note = ""
    sparsity: float

    def _stand_for(self, args: tuple[Any, ...], kwargs: dict[str, Any], sparsity: float) -> tuple[Any, dict[str, Any]]:
        """Take over the attributes of torch's layer with these arguments.

        Returns:
            That layer, without memory, and the device and dtype that were asked for.
        """
        layer = self.kind(*args, **{**kwargs, "device": "meta"})
        for name in _ATTRIBUTES[self.kind]:
            setattr(self, name, getattr(layer, name))
        self.sparsity = sparsity
        return layer, placed(kwargs.get("device"), kwargs.get("dtype"))

    def extra_repr(self) -> str:
        """Channels, and the sparsity asked for."""
        if hasattr(self, "in_features"):
            return f"{self.in_features}, {self.out_features}, sparsity={self.sparsity:g}"
        return f"{self.in_channels}, {self.out_channels}, sparsity={self.sparsity:g}"


class WithNorms(Compound):
    """A compound with norms and activations, those usual for its kind where none are given."""

    usual_norm: ClassVar[type[nn.Module]]
    usual_act: ClassVar[type[nn.Module]]

    def _norm(self, norm_layer: NormLayer | Usual | None, width: int, factory: dict[str, Any]) -> nn.Module | None:
        made = type(self).usual_norm if norm_layer == "usual" else norm_layer
        return None if made is None else made(width).to(**factory)

    def _act(self, act_layer: ActLayer | Usual | None) -> nn.Module | None:
        made = type(self).usual_act if act_layer == "usual" else act_layer
        return None if made is None else made()


def placed(device: Any = None, dtype: Any = None) -> dict[str, Any]:
    """Where torch's layers are to be made, of what was said about it: factories that know neither are left in peace.

    Example:
        >>> placed("meta"), placed()
        ({'device': 'meta'}, {})
    """
    return {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}


def arguments(layer: Any, **changes: Any) -> dict[str, Any]:
    """Keyword arguments that make a layer like this one, with some changed."""
    common = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        own = {"in_features": layer.in_features, "out_features": layer.out_features}
    else:
        own = {name: getattr(layer, name) for name in _ATTRIBUTES[nn.Conv2d][:8]}
    return {**own, **common, **changes}


def children_first(model: nn.Module) -> list[nn.Module]:
    """All modules inside, those around others behind them: they know better what the others are for.

    Example:
        >>> [type(module).__name__ for module in children_first(nn.Sequential(nn.Sequential(nn.Linear(1, 1))))]
        ['Linear', 'Sequential']
    """
    return list(model.modules())[:0:-1]


def reset_parameters(module: nn.Module) -> None:
    """Have a module initialise its own parameters and buffers, if it knows how, as timm's ``init_weights`` does.

    Example:
        >>> layer = nn.Linear(4, 4, device="meta").to_empty(device="cpu")
        >>> reset_parameters(layer)
        >>> bool(layer.weight.abs().max() <= 0.5)
        True
    """
    own: Any = getattr(module, "reset_parameters", None)
    if own is not None:
        own()


def described(layer: Any) -> str:
    """Kind and sizes of a layer.

    Example:
        >>> described(nn.Conv2d(8, 16, 3, groups=2)), described(nn.Linear(8, 16))
        ('Conv2d(8, 16, kernel_size=(3, 3), groups=2)', 'Linear(8, 16)')
    """
    if isinstance(layer, nn.Linear):
        return f"Linear({layer.in_features}, {layer.out_features})"
    groups = "" if layer.groups == 1 else f", groups={layer.groups}"
    return f"Conv2d({layer.in_channels}, {layer.out_channels}, kernel_size={tuple(layer.kernel_size)}{groups})"


def fans(layer: Any) -> tuple[int, int]:
    """Weights per inner channel of the two factors of a layer, within a group: ``(k*k*C_in, C_out)``.

    Example:
        >>> fans(nn.Conv2d(8, 16, 3, groups=2)), fans(nn.Linear(8, 16))
        ((36, 8), (8, 16))
    """
    groups = getattr(layer, "groups", 1)
    return layer.weight[0].numel(), layer.weight.shape[0] // groups


def factors(layer: Any, inner: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of two layers in a row that have the shape of one: kernel and stride first, the bias last.

    Args:
        layer: ``nn.Conv2d`` or ``nn.Linear``.
        inner: channels between them, per group.
    """
    if isinstance(layer, nn.Linear):
        return arguments(layer, out_features=inner, bias=False), arguments(layer, in_features=inner)
    width = inner * layer.groups
    pointwise = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}
    return arguments(layer, out_channels=width, bias=False), arguments(layer, in_channels=width, **pointwise)
