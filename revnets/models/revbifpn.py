"""RevBiFPN S0 to S6: reversible bidirectional feature pyramid networks (arXiv 2206.14098).

A space-to-depth stem, a reversible body that fuses four scales with RevSilos, a neck whose four maps are the features
of detectors, and a classifier on top. Only the body's outputs are kept for the backward pass.

``create_model(..., layers="sparse_wide:0.75")`` puts layers of the registry in; iso-FLOP ones meet the FLOPs of the
variant's default input size. For another size, give ``revnets.convert`` the plain network and that ``input_size``.
"""

from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import MBConv, convert
from ..layers.geometry import children_first, placed, reset_parameters
from ..reversible import ReversibleOp, RevSequential, compile_branches
from ..reversible.stem import wants_channels_last
from ._memory_modes import Features, MemoryModes
from ._revbifpn_checkpoint import HashedCfg, checkpoint_filter_fn, pretrained_overlay, weights_cfg
from ._revbifpn_parts import (
    BLOCKS_PER_STAGE,
    BODY_CHANNELS,
    FC_FEATURES,
    NECK_CHANNELS,
    NUM_SCALES,
    Coarsest,
    Head,
    Neck,
    Strides,
    check_input,
    handed_out,
    make_stage,
    make_stem,
    run_end,
    scaled,
)

__all__ = ["RevBiFPN", "checkpoint_filter_fn"]

torch.fx.wrap("check_input")  # a node of a traced graph: it looks at the image's size


class RevBiFPN(MemoryModes, nn.Module):
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
        norm_layer: normalisation, given the channels, and device and dtype where they are given here.
        output_stride: 32, or 16 or 8 for finer coarse scales: their convolutions dilate instead. Weights are the same.
        device: of parameters and buffers; ``"meta"`` defers them, see ``init_weights``.
        dtype: of parameters and buffers.

    Raises:
        ValueError: for an unknown mode, stem stride or output stride.

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
        output_stride: int = 32,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        elsewhere = ("self", "__class__", "device", "dtype")
        options = {name: value for name, value in locals().items() if name not in (*elsewhere, "elsewhere")}
        super().__init__()
        self._options = options
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem_stride = stem_stride
        strides = Strides(stem_stride, output_stride)
        self.reduction = strides.of(NUM_SCALES - 1)
        dd = placed(device, dtype)
        block_args = {
            "act_layer": act_layer,
            "norm_layer": norm_layer or partial(nn.BatchNorm2d, eps=1e-3, momentum=0.1),
            **dd,
        }
        channels = [scaled(c, width) for c in BODY_CHANNELS]
        neck_channels = [scaled(c, width) for c in NECK_CHANNELS]
        self.num_features = scaled(FC_FEATURES, width)

        self.stem, unfold = make_stem(in_chans, channels[0], stem_stride, **dd)
        stages = NUM_SCALES - 1 + extra_silos
        ops: list[ReversibleOp] = [unfold] if unfold is not None else []
        for stage in range(1, stages + 1):
            drop_path = drop_path_rate * stage / stages
            ops += make_stage(
                channels, min(stage, NUM_SCALES), min(stage + 1, NUM_SCALES), drop_path, strides, block_args
            )
        self.body = RevSequential(ops, mode=mode, exact=exact)
        self.neck = Neck(channels, neck_channels, mode, strides, **block_args)
        self.head: nn.Module = Head(neck_channels, self.num_features, mode, strides, **block_args)
        self.feature_info = [
            {"num_chs": chs, "reduction": strides.of(k), "module": f"neck.blocks.{k}", "stage": k}
            for k, chs in enumerate(neck_channels)
        ]
        self.global_pool, self.head_drop, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Kaiming normal convolutions (fan-out), norms at 1 and 0; see ``zero_init_last`` of the class.

        After ``create_model(..., device="meta")`` and ``to_empty(device=...)``, this gives a network to be trained.

        Args:
            needs_reset: initialise all else, too, by its own ``reset_parameters``; layers of the registry, which see to
                themselves, are. False where modules were just made.
        """
        for module in children_first(self):
            if isinstance(module, nn.Conv2d) and type(module).reset_parameters is nn.Conv2d.reset_parameters:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset:
                reset_parameters(module)
        if self._options["zero_init_last"]:
            for module in self.body.modules():
                if isinstance(module, MBConv) and getattr(module.bn3, "weight", None) is not None:
                    nn.init.zeros_(module.bn3.weight)  # type: ignore[arg-type]

    def widened(self, factor: float) -> "RevBiFPN":
        """The same network with all widths times ``factor`` (then rounded as published), newly initialised.

        Before ``prune_intermediate_layers``, which is to be repeated on the wider network.
        """
        like = next(self.body.parameters())
        now = {"num_classes": self.num_classes, "global_pool": self.global_pool.pool_type, "mode": self.mode}
        with torch.device(like.device):
            wide = type(self)(**{**self._options, **now, "width": self._options["width"] * factor})
        return wide.to(like.dtype).train(self.training)

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """How activations are handled in training; change it with ``set_mode``."""
        return self.body.mode

    def compile_branches(self, **options: Any) -> None:
        """Run the branches of the body through ``torch.compile``; see ``revnets.reversible.compile_branches``."""
        compile_branches(self, **options)

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
        like = next(self.body.parameters())
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.global_pool.train(self.training)
        self.classifier.to(device=like.device, dtype=like.dtype).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The neck's four maps.

        Args:
            x: image ``(N, in_chans, H, W)``, H and W divisible by ``reduction`` (32 as published).

        Returns:
            maps ``(N, C_k, H / (stem_stride * 2^k), W / (stem_stride * 2^k))``, finest first.

        Raises:
            ValueError: for a size or a number of channels that does not fit.
        """
        return [handed_out(y, self) for y in self.neck(self._forward_body(x))]

    def _forward_body(self, x: Tensor) -> tuple[Tensor, ...]:
        check_input(x, self.in_chans, self.reduction)
        if self.stem is not None:
            x = self.stem(x).to(next(self.stem.parameters()).dtype)  # autocast must not make the stream half precision
            if self.training and wants_channels_last(x):
                x = x.contiguous(memory_format=torch.channels_last)
        return self.body(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features ``(N, num_features, H / reduction, W / reduction)``; once pruned, the coarsest map left."""
        return handed_out(self._widened(x), self)

    def _widened(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self._forward_body(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and the linear layer (left out with ``pre_logits``): ``(N, num_classes)``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_chans, H, W)``."""
        return self.forward_head(self._widened(x))

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
            maps = {k: run_end(self.neck, self.neck.blocks[k], streams[k]) for k in sorted(set(take))}
            maps = {k: handed_out(y, self) for k, y in maps.items()}
            return [maps[k] for k in take]
        pyramid = self.neck(self._forward_body(x))
        return handed_out(self.head(pyramid), self), [handed_out(pyramid[k], self) for k in take]

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop whatever serves only scales that are not asked for, and the head; returns the kept scales, in order.

        Every parameter that is left takes part in the backward pass. The coarsest map that is kept takes the place of
        the head's features: ``reset_classifier(10, "avg")`` puts a classifier on it. The head reads all scales, so
        nothing is dropped where it stays (``prune_head=False``).
        """
        take, _ = feature_take_indices(NUM_SCALES, indices)
        if not prune_head:
            return take
        self.head = Coarsest(max(take))
        self.num_features = self.head_hidden_size = self.feature_info[max(take)]["num_chs"]
        self.num_classes = 0
        self.global_pool, self.classifier = SelectAdaptivePool2d(pool_type=""), nn.Identity()
        for k in set(range(NUM_SCALES)) - set(take):
            self.neck.blocks[k] = nn.Identity()
        # An output of the last silo reads its own scale after the down pass and all coarser ones.
        silo: Any = self.body.ops[-1]
        for branches, needed in ((silo.down, set(range(min(take), NUM_SCALES))), (silo.up, set(take))):
            for key in list(branches):
                if int(key.split("_")[1]) not in needed:
                    del branches[key]
        return take


# --- registration ----------------------------------------------------------------------------------------------------


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RevBiFPN:
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    layers = kwargs.pop("layers", None)
    if layers is not None and pretrained:
        raise ValueError(
            f"layers={layers!r} with pretrained=True: the published weights are those of torch's own layers; "
            "revnets.convert of the plain network keeps them under layers='sparse:0.75' only, other layers start anew"
        )
    if isinstance(kwargs.get("pretrained_cfg"), dict):  # as a model's own: timm's class knows no sha256
        kwargs["pretrained_cfg"] = HashedCfg(**kwargs["pretrained_cfg"])
    if pretrained:
        overlay = pretrained_overlay(
            default_cfgs[variant].default, kwargs.get("pretrained_cfg"), overlay, kwargs.get("cache_dir")
        )
    return build_model_with_cfg(
        RevBiFPN if layers is None else partial(_converted, layers, default_cfgs[variant].default.input_size),
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": Features},
        **kwargs,
    )


def _converted(layers: Any, input_size: tuple[int, int, int], **kwargs: Any) -> nn.Module:
    """A network of other layers, whose FLOPs are met at the variant's default input size."""
    model = RevBiFPN(**kwargs)
    return convert(model, layers, input_size=(model.in_chans, *input_size[1:])).model


default_cfgs = generate_default_cfgs(
    {f"revbifpn_s{n}.imagenet1k": weights_cfg(n) for n in range(7)} | {"test_revbifpn.untrained": weights_cfg(None)}
)


@register_model
def revbifpn_s0(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S0: 3.4 M parameters, 0.31 GMACs at 224 pixels."""
    args = {"width": 1, "extra_silos": 2, "drop_rate": 0.25}
    return _create("revbifpn_s0", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s1(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S1: 5.1 M parameters, 0.62 GMACs at 256 pixels."""
    args = {"width": 4 / 3, "extra_silos": 2, "drop_rate": 0.25}
    return _create("revbifpn_s1", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s2(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S2: 10.6 M parameters, 1.37 GMACs at 256 pixels."""
    args = {"width": 2, "extra_silos": 2, "drop_rate": 0.3}
    return _create("revbifpn_s2", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s3(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S3: 19.6 M parameters, 3.3 GMACs at 288 pixels."""
    args = {"width": 8 / 3, "extra_silos": 3, "drop_rate": 0.3, "drop_path_rate": 0.05}
    return _create("revbifpn_s3", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s4(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S4: 48.7 M parameters, 10.6 GMACs at 320 pixels."""
    args = {"width": 4, "extra_silos": 4, "drop_rate": 0.4, "drop_path_rate": 0.1}
    return _create("revbifpn_s4", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s5(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S5: 82 M parameters, 21.8 GMACs at 352 pixels."""
    args = {"width": 16 / 3, "extra_silos": 4, "drop_rate": 0.4, "drop_path_rate": 0.1}
    return _create("revbifpn_s5", pretrained, **{**args, **kwargs})


@register_model
def revbifpn_s6(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:
    """RevBiFPN-S6: 142 M parameters, 38.1 GMACs at 352 pixels."""
    args = {"width": 20 / 3, "extra_silos": 5, "drop_rate": 0.6, "drop_path_rate": 0.3}
    return _create("revbifpn_s6", pretrained, **{**args, **kwargs})


@register_model
def test_revbifpn(pretrained: bool = False, **kwargs: Any) -> RevBiFPN:  # noqa: PT028 - a model, not a test
    """A tiny RevBiFPN for quick tests: a third of S0's width, no extra stage, finest scale at half resolution."""
    args = {"width": 1 / 3, "extra_silos": 0, "stem_stride": 2}
    return _create("test_revbifpn", pretrained, **{**args, **kwargs})
