"""``norm_cfg`` of MMDetection for networks that were not written for it."""

from collections.abc import Callable, Mapping
from typing import Any

from mmcv.cnn import build_norm_layer
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

SYNCHRONISED = ("SyncBN", "MMSyncBN")


def norm_factory(norm_cfg: Mapping[str, Any]) -> Callable[[int], nn.Module]:
    """A function from channels to the norm that ``norm_cfg`` describes.

    Example:
        >>> norm_factory({"type": "GN", "num_groups": 4})(8).num_groups
        4
    """
    check_norm_cfg(norm_cfg)
    return lambda channels: build_norm_layer(dict(norm_cfg), channels)[1]


def replace_norms(net: nn.Module, norm_cfg: Mapping[str, Any]) -> nn.Module:
    """Batch norms of ``net`` as ``norm_cfg`` wants them.

    Where they stay batch norms, they keep weights and statistics, and constants that ``norm_cfg`` does not name
    (RevBiFPN's eps is 1e-3).

    Args:
        net: changed in place.
        norm_cfg: ``dict(type="BN" | "SyncBN" | "GN" | ..., requires_grad=True, ...)``.

    Returns:
        the network.

    Raises:
        ValueError: when there is no type.
    """
    check_norm_cfg(norm_cfg)
    if norm_cfg["type"] not in ("BN", "BN2d", *SYNCHRONISED):
        for parent in list(net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm):
                    norm = build_norm_layer(dict(norm_cfg), child.num_features)[1]
                    rest = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]  # BatchNormAct2d
                    setattr(parent, name, nn.Sequential(norm, *rest) if rest else norm)
        return net
    if norm_cfg["type"] in SYNCHRONISED:
        net = convert_sync_batchnorm(net)
    options = {key: value for key, value in norm_cfg.items() if key not in ("type", "requires_grad")}
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            vars(module).update(options)
            for parameter in module.parameters():
                parameter.requires_grad = norm_cfg.get("requires_grad", True)
    return net


def check_norm_cfg(norm_cfg: Mapping[str, Any]) -> None:
    """Raise a sentence when ``norm_cfg`` is not one."""
    if not isinstance(norm_cfg, Mapping) or "type" not in norm_cfg:
        raise ValueError(f"norm_cfg={norm_cfg!r}: expected a dict with a type, such as dict(type='BN')")
