"""RevBiFPN S0 to S6: reversible bidirectional feature pyramid networks (arXiv 2206.14098).

A space-to-depth stem, a reversible body that fuses four scales with RevSilos, a neck whose four maps are the features
of detectors, and a classifier on top. Only the body's outputs are kept for the backward pass.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import MBConv, norm_act
from ..reversible import (
    AdditiveCoupling,
    Parallel,
    ReversibleOp,
    RevSequential,
    RevSilo,
    SpaceToDepth,
    recompute,
    set_mode,
)
from ._revbifpn_checkpoint import checkpoint_filter_fn, pretrained_overlay, weights_cfg

__all__ = ["RevBiFPN", "checkpoint_filter_fn"]

NUM_SCALES = 4
BLOCKS_PER_STAGE = 2

# Per scale, fine to coarse, at width 1 (tables 1 and 2 of ../shared/spec/revbifpn.md).
_BODY_CHANNELS = (48, 64, 80, 160)
_NECK_CHANNELS = (48, 64, 128, 320)
_FC_FEATURES = 1280
_EXP_RATIO = (1, 1, 2, 2)
_SE_RATIO = (0.25, 0.25, 0.125, 0.0)
_BASE_KERNEL = (3, 5, 5, 3)
_EXTRA_KERNEL = (0, 0, 0, 2)
_NECK_EXP_RATIO = (1, 2, 2, 2)
_NECK_SE_RATIO = (0.25, 0.25, 0.125, 0.125)
_NECK_KERNEL = 5


def _scaled(base: int, width: float) -> int:
    """Channels at width multiplier ``width``: rounded down to a multiple of 16."""
    return int(width * base) // 16 * 16


class Neck(nn.Module):
    """One MBConv per scale from the body's channels to the neck's; recomputed in the backward pass unless stored."""

    def __init__(self, in_chs: Sequence[int], out_chs: Sequence[int], mode: str, **block_args: Any) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            MBConv(
                in_chs[k],
                out_chs[k],
                kernel_size=_NECK_KERNEL,
                exp_ratio=_NECK_EXP_RATIO[k],
                se_ratio=_NECK_SE_RATIO[k],
                **block_args,
            )
            for k in range(len(in_chs))
        )

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Args: xs: one map per scale. Returns: one map per scale, channels changed."""
        return [_run(block, self.mode, x) for block, x in zip(self.blocks, xs, strict=True)]


class Head(nn.Module):
    """Merges the pyramid from fine to coarse and widens it: the part of the classifier before pooling.

    ``o_0 = n_0; o_{k+1} = n_{k+1} + H_k(o_k)``, then a 1x1 convolution to ``out_chs``.
    """

    def __init__(self, in_chs: Sequence[int], out_chs: int, mode: str, **block_args: Any) -> None:
        super().__init__()
        self.mode = mode
        self.blocks = nn.ModuleList(
            MBConv(
                in_chs[k],
                in_chs[k + 1],
                kernel_size=_NECK_KERNEL,
                stride=2,
                exp_ratio=_NECK_EXP_RATIO[k],
                se_ratio=_NECK_SE_RATIO[k],
                **block_args,
            )
            for k in range(len(in_chs) - 1)
        )
        self.conv = nn.Conv2d(in_chs[-1], out_chs, 1, bias=False)
        self.bn = block_args["norm_layer"](out_chs)
        self.act = block_args["act_layer"]()

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """Args: xs: the neck's maps. Returns: ``(N, out_chs, H, W)`` at the coarsest scale."""
        merged = xs[0]
        for block, x in zip(self.blocks, xs[1:], strict=True):
            merged = x + _run(block, self.mode, merged)
        return _run(self._widen, self.mode, merged)

    def _widen(self, x: Tensor) -> Tensor:
        return norm_act(self.conv(x), self.bn, self.act)


def _run(module: Any, mode: str, x: Tensor) -> Any:
    return module(x) if mode == "store" else recompute(module, x)


class RevBiFPN(nn.Module):
    """Reversible bidirectional feature pyramid network, with timm's model contract.

    Args:
        num_classes: of the classifier; 0 leaves it out.
        in_chans: channels of the image. The stem repeats them up to ``C_0 / stem_stride^2`` channels; more channels
            than that are mixed by a strided convolution instead.
        width: multiplier of all channels.
        extra_silos: stages after the pyramid has grown to its four scales.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ... or ``""`` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last stage; earlier ones have proportionally less.
        stem_stride: 4, 2 or 1: side of the blocks that the stem turns into channels, so the reduction of the finest
            scale. The published networks use 4; 32-pixel images have useful pyramids with 1 or 2.
        mode: ``"reversible"``, ``"checkpoint"`` or ``"store"``; see ``set_mode``.
        exact: exact mode of the body: True, False, or k of the grid 2^-k. Rebuilt activations, and so gradients, then
            equal stored ones to the bit. Acts in training only.
        zero_init_last: start the last norm of every branch of the body at 0: every block starts as the identity.
        act_layer: activation.
        norm_layer: normalisation, given the channels.

    Raises:
        ValueError: for an unknown mode or stem stride.

    Example:
        >>> import torch
        >>> model = RevBiFPN(num_classes=10, extra_silos=0, stem_stride=2)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: float = 1.0,
        extra_silos: int = 2,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stem_stride: int = 4,
        mode: str = "reversible",
        exact: bool | int = True,
        zero_init_last: bool = False,
        act_layer: type[nn.Module] = nn.Hardswish,
        norm_layer: Any = None,
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={stem_stride}: expected 4 (as published), or 2 or 1 for small images")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem_stride = stem_stride
        self.reduction = stem_stride * 2 ** (NUM_SCALES - 1)
        block_args = {
            "act_layer": act_layer,
            "norm_layer": norm_layer or partial(nn.BatchNorm2d, eps=1e-3, momentum=0.1),
        }
        channels = [_scaled(c, width) for c in _BODY_CHANNELS]
        neck_channels = [_scaled(c, width) for c in _NECK_CHANNELS]
        self.num_features = self.head_hidden_size = _scaled(_FC_FEATURES, width)

        self.stem, unfold = _make_stem(in_chans, channels[0], stem_stride)
        stages = NUM_SCALES - 1 + extra_silos
        ops: list[ReversibleOp] = [unfold] if unfold is not None else []
        for stage in range(1, stages + 1):
            drop_path = drop_path_rate * stage / stages
            ops += _make_stage(channels, min(stage, NUM_SCALES), min(stage + 1, NUM_SCALES), drop_path, block_args)
        self.body = RevSequential(ops, mode=mode, exact=exact)
        self.neck = Neck(channels, neck_channels, mode, **block_args)
        self.head = Head(neck_channels, self.num_features, mode, **block_args)
        self.feature_info = [
            {"num_chs": chs, "reduction": stem_stride * 2**k, "module": f"neck.blocks.{k}", "stage": k}
            for k, chs in enumerate(neck_channels)
        ]
        self.global_pool, self.head_drop, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.init_weights(zero_init_last=zero_init_last)

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Kaiming normal convolutions (fan-out), norms at 1 and 0; see ``zero_init_last`` of the class."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if zero_init_last:
            for module in self.body.modules():
                if isinstance(module, MBConv) and getattr(module.bn3, "weight", None) is not None:
                    nn.init.zeros_(module.bn3.weight)  # type: ignore[arg-type]

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """How activations are handled in training; change it with ``set_mode``."""
        return self.body.mode

    def set_mode(self, mode: str) -> None:
        """Switch between ``"reversible"``, ``"checkpoint"`` and ``"store"`` on the same weights."""
        set_mode(self, mode)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch between ``"store"`` and ``"checkpoint"``; reversible mode, which needs less, stays as it is."""
        if self.mode != "reversible":
            self.set_mode("checkpoint" if enable else "store")

    @torch.jit.ignore
    def set_reversible(self, enable: bool = True) -> None:
        """Switch between ``"reversible"`` and ``"store"``, the sibling of ``set_grad_checkpointing``."""
        self.set_mode("reversible" if enable else "store")

    # --- timm -----------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Order of the parameters from input to output, for layer-wise learning rates."""
        per_stage = BLOCKS_PER_STAGE + 1
        first = 0 if self.stem is not None else 1
        stages = [
            (rf"^body\.ops\.{index}\.", ((index - first) // per_stage if coarse else index - first,))
            for index in range(first, len(self.body.ops))
        ]
        return {"stem": r"^stem", "blocks": [*stages, (r"^neck", (99998,)), (r"^head", (99999,))]}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names excluded from weight decay besides norms and biases, which timm excludes by itself: none."""
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the final linear layer; 0 classes gives pooled features, with ``global_pool=""`` unpooled ones."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        device, dtype = self.head.conv.weight.device, self.head.conv.weight.dtype  # type: ignore[union-attr]
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.classifier.to(device=device, dtype=dtype)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The neck's four maps.

        Args:
            x: image ``(N, in_chans, H, W)``, H and W divisible by ``reduction`` (32 as published).

        Returns:
            maps ``(N, C_k, H / (stem_stride * 2^k), W / (stem_stride * 2^k))``, finest first.

        Raises:
            ValueError: for a size or a number of channels that does not fit.
        """
        return self.neck(self._forward_body(x))

    def _forward_body(self, x: Tensor) -> tuple[Tensor, ...]:
        _check_input(x, self.in_chans, self.reduction)
        if self.stem is not None:
            x = self.stem(x)
        return self.body(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features ``(N, num_features, H / reduction, W / reduction)``."""
        return self.head(self.forward_pyramid(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and the linear layer (left out with ``pre_logits``): ``(N, num_classes)``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The neck's maps, in the order asked for, and the final features.

        Args:
            x: image ``(N, in_chans, H, W)``.
            indices: scales: the last n, a list (negative counts from the coarsest), or None for all four.
            norm: no effect: the maps end in a norm.
            stop_early: no effect: every map needs the whole body.
            output_fmt: only ``"NCHW"``.
            intermediates_only: leave out the final features and the work for them.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: RevBiFPN's features are maps, expected 'NCHW'")
        take, _ = feature_take_indices(NUM_SCALES, indices)
        if intermediates_only:
            streams = self._forward_body(x)
            maps = {k: _run(self.neck.blocks[k], self.neck.mode, streams[k]) for k in sorted(set(take))}
            return [maps[k] for k in take]
        pyramid = self.forward_pyramid(x)
        return self.head(pyramid), [pyramid[k] for k in take]

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop neck blocks of scales that are not asked for, and the head; returns the kept scales, in order."""
        take, _ = feature_take_indices(NUM_SCALES, indices)
        if prune_head:
            self.head = nn.Identity()
            self.reset_classifier_to_identity()
        for k in set(range(NUM_SCALES)) - set(take):
            self.neck.blocks[k] = nn.Identity()
        return take

    def reset_classifier_to_identity(self) -> None:
        """Leave out pooling and the linear layer."""
        self.num_classes = 0
        self.global_pool, self.classifier = SelectAdaptivePool2d(pool_type=""), nn.Identity()


def _make_stem(in_chans: int, out_chans: int, stride: int) -> tuple[nn.Module | None, SpaceToDepth | None]:
    """The reversible stem, or a strided convolution where the image has more channels than fit."""
    repeated = out_chans // stride**2
    if in_chans <= repeated and repeated * stride**2 == out_chans:
        return None, SpaceToDepth(in_chans, stride, repeated)
    return nn.Conv2d(in_chans, out_chans, stride, stride), None


def _make_stage(
    channels: Sequence[int], num_inputs: int, num_outputs: int, drop_path: float, block_args: dict[str, Any]
) -> list[ReversibleOp]:
    """Rounds of per-scale reversible blocks, then one RevSilo."""
    ops: list[ReversibleOp] = []
    for _ in range(BLOCKS_PER_STAGE):
        couplings = []
        for k in range(num_inputs):
            second = channels[k] // 2
            first = channels[k] - second
            block = partial(
                MBConv,
                kernel_size=_BASE_KERNEL[k] + _EXTRA_KERNEL[k],
                exp_ratio=_EXP_RATIO[k],
                se_ratio=_SE_RATIO[k],
                drop_path_rate=drop_path,
                **block_args,
            )
            couplings.append(AdditiveCoupling(block(first, second), block(second, first)))
        ops.append(Parallel(couplings))
    down = {
        (i, j): MBConv(
            channels[i],
            channels[j],
            kernel_size=2 * 2 ** (j - i) - 1 + _EXTRA_KERNEL[i],
            stride=2 ** (j - i),
            exp_ratio=_EXP_RATIO[i],
            se_ratio=_SE_RATIO[i],
            drop_path_rate=0.0 if j == num_inputs else drop_path,  # no stochastic depth into a new scale
            **block_args,
        )
        for j in range(1, num_outputs)
        for i in range(min(j, num_inputs))
    }
    up = {
        (j, i): nn.Sequential(
            MBConv(
                channels[j],
                channels[i],
                kernel_size=3 + _EXTRA_KERNEL[j],
                exp_ratio=_EXP_RATIO[i],
                se_ratio=_SE_RATIO[i],
                drop_path_rate=drop_path,
                **block_args,
            ),
            nn.Upsample(scale_factor=2 ** (j - i), mode="bilinear", align_corners=False),
        )
        for i in range(num_outputs - 1)
        for j in range(i + 1, num_outputs)
    }
    ops.append(RevSilo(down, up, num_inputs))
    return ops


def _check_input(x: Tensor, in_chans: int, divisor: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"input of shape {tuple(x.shape)}: expected (N, {in_chans}, H, W); create the model with in_chans=C for C channels"
        )
    height, width = x.shape[-2:]
    if height % divisor or width % divisor:
        fitting = [max(divisor, round(side / divisor) * divisor) for side in (height, width)]
        raise ValueError(
            f"input size {height}x{width}: height and width must be divisible by {divisor}; "
            f"resize or pad to, say, {fitting[0]}x{fitting[1]}"
        )


# --- registration ----------------------------------------------------------------------------------------------------


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RevBiFPN:
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if pretrained:
        overlay = pretrained_overlay(default_cfgs[variant].default, kwargs.get("pretrained_cfg"), overlay)
    return build_model_with_cfg(
        RevBiFPN,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {f"revbifpn_s{n}.imagenet1k": weights_cfg(n) for n in range(7)} | {"test_revbifpn.untrained": weights_cfg(None)}
)


@register_model
def revbifpn_s0(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S0: 3.4 M parameters, 0.31 GMACs at 224 pixels."""
    args = dict(width=1, extra_silos=2, drop_rate=0.25)
    return _create("revbifpn_s0", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s1(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S1: 5.1 M parameters, 0.62 GMACs at 256 pixels."""
    args = dict(width=4 / 3, extra_silos=2, drop_rate=0.25)
    return _create("revbifpn_s1", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s2(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S2: 10.6 M parameters, 1.37 GMACs at 256 pixels."""
    args = dict(width=2, extra_silos=2, drop_rate=0.3)
    return _create("revbifpn_s2", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s3(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S3: 19.6 M parameters, 3.3 GMACs at 288 pixels."""
    args = dict(width=8 / 3, extra_silos=3, drop_rate=0.3, drop_path_rate=0.05)
    return _create("revbifpn_s3", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s4(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S4: 48.7 M parameters, 10.6 GMACs at 320 pixels."""
    args = dict(width=4, extra_silos=4, drop_rate=0.4, drop_path_rate=0.1)
    return _create("revbifpn_s4", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s5(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S5: 82 M parameters, 21.8 GMACs at 352 pixels."""
    args = dict(width=16 / 3, extra_silos=4, drop_rate=0.4, drop_path_rate=0.1)
    return _create("revbifpn_s5", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s6(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S6: 142 M parameters, 38.1 GMACs at 352 pixels."""
    args = dict(width=20 / 3, extra_silos=5, drop_rate=0.6, drop_path_rate=0.3)
    return _create("revbifpn_s6", pretrained, **{**args, **kwargs})


@register_model
def test_revbifpn(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """A tiny RevBiFPN for quick tests: a third of S0's width, no extra stage, finest scale at half resolution."""
    args = dict(width=1 / 3, extra_silos=0, stem_stride=2)
    return _create("test_revbifpn", pretrained, **{**args, **kwargs})
