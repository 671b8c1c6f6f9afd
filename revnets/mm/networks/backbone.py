"""Backbones for MMDetection: RevBiFPN, and any network of timm, with the arguments that its users know."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import convert
from ...reversible import MODES, set_mode
from ...training.capture.graphed import GraphedPart
from ...training.errors import did_you_mean
from .norms import SYNCHRONISED, replace_norms
from .pretrained import inner, load_pretrained
from .registry import register_network

ARCHS = {**{f"s{n}": f"revbifpn_s{n}" for n in range(7)}, "test": "test_revbifpn"}
"""``arch`` of ``RevBiFPN`` to timm's name; ``test`` is tiny and has strides 2, 4, 8, 16."""


@register_network()
class TimmBackbone(BaseModule):
    """A network of timm as a backbone of MMDetection, with what a detector wants to set.

    Args:
        model_name: timm's; ours are known, too.
        out_indices: feature levels, as timm counts them; finest first. Levels that are left out cost nothing.
        frozen_stages: as of mmdet's ResNet: -1 freezes nothing, 0 the stem, k also stages 1 to k (the stages of timm's
            ``group_matcher``). Frozen parts are in eval mode and need no gradient.
        norm_eval: keep batch norms in eval mode: running statistics are used and left alone.
        norm_cfg: replaces the network's batch norms: ``dict(type="SyncBN")``, ``dict(type="GN", num_groups=32)``,
            ``dict(type="BN", requires_grad=False)``. None leaves them as they are.
        with_cp: recompute activations (mode ``"checkpoint"``) where nothing better is chosen by ``mode``.
        mode: memory mode: ``"store"``, ``"checkpoint"`` (timm's own), and for reversible networks ``"reversible"``,
            their default, see ``revnets.set_mode``.
        layers: a spec of the layer registry, e.g. ``dict(type="sparse_parallel", sparsity=0.75)``.
        cuda_graph: replay training passes on a GPU from CUDA graphs, a pair (forward, backward) for each shape of the
            padded images: ``dict(max_graphs=4)`` (or True) shapes, others run eagerly. So pad to few shapes,
            ``data_preprocessor=dict(pad_size_divisor=128)``. See ``revnets.training.capture.graphed``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``; see ``revnets.mm.networks.pretrained``. None: timm's own
            initialisation.
        **model_args: for the network's constructor, e.g. ``drop_path_rate=0.1``.

    Raises:
        ValueError: for unknown names, levels or stages; says what there is.

    Example:
        >>> backbone = TimmBackbone("resnet18", out_indices=(1, 2, 3, 4), norm_eval=True)
        >>> for y in backbone(torch.ones(1, 3, 64, 64)):
        ...     print(tuple(y.shape))
        (1, 64, 16, 16)
        (1, 128, 8, 8)
        (1, 256, 4, 4)
        (1, 512, 2, 2)
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        mode: str | None = None,
        layers: str | Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
        cuda_graph: bool | Mapping[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
        if not timm.is_model(model_name):
            raise ValueError(f"unknown model {model_name!r}: expected a name that timm.list_models() has")
        self.model_name, self.norm_eval, self.frozen_stages = model_name, norm_eval, frozen_stages
        self.is_init: bool = False
        self.flops_before = 0.0  # of the trainings that its weights come from
        self.net = _features(model_name, tuple(out_indices), layers, model_args)
        self.out_channels: list[int] = self.net.feature_info.channels()
        self.strides: list[int] = self.net.feature_info.reduction()
        self.mode = _choose_mode(self.net, model_name, mode, with_cp)
        max_graphs = _max_graphs(cuda_graph, model_name, self.net, self.mode)
        if norm_cfg is not None:
            self.net = replace_norms(self.net, norm_cfg)
            if norm_eval and norm_cfg["type"] in SYNCHRONISED:
                print_log(
                    "norm_cfg=dict(type='SyncBN') has no effect with norm_eval=True: running statistics are used and "
                    "never updated; set norm_eval=False to train them",
                    "current",
                    logging.WARNING,
                )
        self._stages = _stages(self.net, model_name, model_args) if frozen_stages >= 0 else []
        if frozen_stages >= len(self._stages) > 0 or frozen_stages < -1:
            raise ValueError(
                f"frozen_stages={frozen_stages}: {model_name} has a stem (0) and stages 1 to {len(self._stages) - 1}; "
                "-1 freezes nothing"
            )
        self.graphs = GraphedPart(self.net, max_graphs, _warn) if max_graphs else None
        self.train()

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; without it the network's own initialisation, made at construction, stays."""
        if self.is_init:
            return
        for cfg in [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []:
            if cfg.get("type") != "Pretrained":
                raise ValueError(
                    f"init_cfg={cfg}: {type(self).__name__} initialises itself, expected "
                    "dict(type='Pretrained', checkpoint=...) or None"
                )
            self.flops_before = load_pretrained(self.net, self.model_name, cfg["checkpoint"], cfg.get("prefix"))
        self.is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Args: x: images ``(N, 3, H, W)``. Returns: one map ``(N, C, H / stride, W / stride)`` per level."""
        return tuple(self.net(x)) if self.graphs is None else self.graphs(x)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Training or eval mode; frozen stages, and with ``norm_eval`` all batch norms, stay in eval mode."""
        super().train(mode)
        frozen = {id(p) for stage in self._stages[: self.frozen_stages + 1] for p in stage}
        for module in self.net.modules():
            own = list(module.parameters()) if frozen else []
            if (own and all(id(p) in frozen for p in own)) or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
            for parameter in own:
                if id(parameter) in frozen:
                    parameter.requires_grad = False
        return self


@register_network()
class RevBiFPN(TimmBackbone):
    """RevBiFPN (arXiv 2206.14098) as a backbone: the neck's four maps, of strides 4, 8, 16 and 32.

    Images are padded to multiples of 32 (``DetDataPreprocessor(pad_size_divisor=32)``). Channels are those of
    ``timm.create_model("revbifpn_s0", features_only=True).feature_info.channels()``.

    Args:
        arch: ``"s0"`` to ``"s6"``.
        out_indices: of the four maps.
        frozen_stages: -1 nothing, 0 the stem (which has no weights for RGB images), k also stages 1 to k of the body
            (5 for S0 to S2, 6 for S3, 7 for S4 and S5, 8 for S6); one more freezes the output blocks, and so all.
        norm_eval: see ``TimmBackbone``.
        norm_cfg: see ``TimmBackbone``.
        with_cp: as for any backbone; reversible mode, which needs less, stays.
        mode: ``"reversible"`` (default), ``"checkpoint"`` or ``"store"``.
        exact: exact mode, see ``revnets.models.revbifpn.RevBiFPN``.
        layers: see ``TimmBackbone``.
        cuda_graph: see ``TimmBackbone``.
        init_cfg: see ``TimmBackbone``.
        **model_args: see ``TimmBackbone``.

    Raises:
        ValueError: for an unknown arch, level, mode or stage.

    Example:
        >>> backbone = RevBiFPN("s0", out_indices=(1, 3))
        >>> for y in backbone(torch.ones(1, 3, 64, 64)):
        ...     print(tuple(y.shape))
        (1, 64, 8, 8)
        (1, 320, 2, 2)
    """

    def __init__(
        self,
        arch: str = "s0",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        mode: str = "reversible",
        exact: bool | int = True,
        layers: str | Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
        cuda_graph: bool | Mapping[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        if arch not in ARCHS:
            raise ValueError(f"unknown arch {arch!r}: expected one of {', '.join(ARCHS)}")
        self.arch = arch
        args = (out_indices, frozen_stages, norm_eval, norm_cfg, with_cp, mode, layers, init_cfg)
        super().__init__(ARCHS[arch], *args, cuda_graph, exact=exact, **model_args)


def _features(
    name: str, out_indices: tuple[int, ...], layers: str | Mapping[str, Any] | None, model_args: dict[str, Any]
) -> Any:
    """timm's feature network, by a wrapper that looks modules up or by ``forward_intermediates`` (transformers)."""
    ours = name in ARCHS.values()
    if layers is not None and ours:
        model_args = {**model_args, "layers": layers}
    try:
        net = timm.create_model(name, features_only=True, out_indices=out_indices, **model_args)
    except (AssertionError, IndexError) as error:
        count = len(timm.create_model(name, features_only=True, **model_args).feature_info.out_indices)
        raise ValueError(f"out_indices={out_indices}: {name} has feature levels 0 to {count - 1}") from error
    if layers is None or ours:
        return net
    # the widths of the outputs stay: they are what the neck takes
    return convert(net, layers, input_size=(model_args.get("in_chans", 3), 224, 224)).model


def _choose_mode(net: nn.Module, name: str, mode: str | None, with_cp: bool) -> str:
    """Set the memory mode and return it."""
    reversible = any(vars(m).get("mode") in MODES for m in net.modules())
    if mode is None:
        mode = "reversible" if reversible else "store"
    if with_cp and mode == "store":
        mode = "checkpoint"
    if reversible:
        set_mode(net, mode)
        return mode
    if mode not in ("store", "checkpoint"):
        raise ValueError(f"mode={mode!r}: {name} is not reversible, expected 'store' or 'checkpoint'")
    if mode == "checkpoint":
        target: Any = net if hasattr(net, "set_grad_checkpointing") else inner(net)
        try:
            target.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"{name} has no checkpointing: use with_cp=False, mode='store'") from error
    return mode


def _max_graphs(cuda_graph: bool | Mapping[str, Any] | None, name: str, net: nn.Module, mode: str) -> int:
    """How many shapes are captured; 0: none.

    Raises:
        ValueError: for what is no such number, and for what no graph can hold.
    """
    if cuda_graph is None or cuda_graph is False:
        return 0
    settings = {"max_graphs": 4} | ({} if cuda_graph is True else dict(cuda_graph))
    unknown = [key for key in settings if key != "max_graphs"]
    if unknown:
        raise ValueError(
            f"cuda_graph: {unknown[0]!r} is no setting of it{did_you_mean(unknown[0], ['max_graphs'])}: expected "
            "dict(max_graphs=4); shapes are the data preprocessor's, pad_size_divisor"
        )
    count = settings["max_graphs"]
    if type(count) is not int or count < 1:
        raise ValueError(f"cuda_graph: max_graphs={count!r}: expected a whole number from 1 on, or cuda_graph=None")
    if mode == "checkpoint" and not any(vars(m).get("mode") in MODES for m in net.modules()):
        raise ValueError(
            f"cuda_graph: {name} recomputes by torch's checkpoint, which asks generators for their state, and no graph "
            'can hold that: use mode="store" and with_cp=False, or leave cuda_graph out'
        )
    return count


def _warn(text: str) -> None:
    print_log(text, "current", logging.WARNING)


def _stages(net: nn.Module, name: str, model_args: dict[str, Any]) -> list[list[nn.Parameter]]:
    """Parameters of the stem, of stage 1, of stage 2, ..., in the order of timm's ``group_matcher``."""
    with torch.device("meta"):
        whole: Any = timm.create_model(name, **{k: v for k, v in model_args.items() if k != "layers"})
    if not hasattr(whole, "group_matcher"):
        raise ValueError(f"frozen_stages: {name} does not say what its stages are (no group_matcher), use -1")
    matcher = whole.group_matcher(coarse=True)
    # wrappers of timm turn dots of a module's name into underscores, and converted layers have further modules inside
    modules = {n.replace(".", "_"): n for n, _ in whole.named_modules() if n}
    ordered = [(_original(n.removeprefix("model."), modules), None) for n, _ in net.named_parameters()]
    stage_of = group_with_matcher(iter(ordered), matcher, reverse=True)
    first = 0 if any(_is_stem(n, matcher) for n, _ in whole.named_parameters()) else 1
    stages: list[list[nn.Parameter]] = [[] for _ in range(max(stage_of.values()) + 1 + first)]
    for (known, _), parameter in zip(ordered, net.parameters(), strict=True):
        stages[stage_of[known] + first].append(parameter)
    return stages


def _original(name: str, modules: Mapping[str, str]) -> str:
    """The name of a parameter in the network without wrapper, from its longest prefix that is a module there."""
    parts = name.split(".")
    for k in range(len(parts) - 1, 0, -1):
        if found := modules.get("_".join(parts[:k])):
            return ".".join([found, *parts[k:]])
    return name


def _is_stem(name: str, matcher: Any) -> bool:
    spec = matcher.get("stem") if isinstance(matcher, Mapping) else "^"
    patterns = [spec] if isinstance(spec, str) else [part[0] for part in spec or ()]
    return any(re.match(pattern, name) for pattern in patterns)
