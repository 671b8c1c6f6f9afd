r"""Munit-scaled vision transformers (arXiv 2502.05967), and their reversible siblings; both train in FP8 on request.

Every weight starts with variance 1, and so do the activations at every depth: layers have static scales, each branch of
a block ends in its norm (res-post-norm), and residuals are weighted sums,

.. math:: x' = \sqrt{1-t} \, x + \sqrt{t} \, \mathrm{LN}(f(x))

The rest is timm's ``VisionTransformer``, with its options. ``layers="mus_fp8"`` multiplies in FP8, in training, too;
``revnets.mus_param_groups(model, lr, weight_decay, base_width, width=model.embed_dim)`` has the transfer rules.

Attention logits are divided by sqrt(d) of the head, not by d: heads here have a fixed width (64) and wider networks
have more of them, so both scale alike with the width, and sqrt(d) gives logits of variance 1 at the start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..layers.convert import replace_module
from ..layers.geometry import children_first, reset_parameters
from ..layers.munit.convert import munit_options, munit_scaled
from ..layers.munit.layers import MuSLinear
from ..layers.registry import Spec
from ..reversible import AdditiveCoupling, RevSequential
from ._memory_modes import Features, MemoryModes
from ._mus_vit_parts import MuSBlock, MuSPatchEmbed, StreamBranch, residual_weight

__all__ = ["MuSVisionTransformer", "RevMuSVisionTransformer", "checkpoint_filter_fn"]


class MuSVisionTransformer(VisionTransformer):
    """Munit-scaled vision transformer, with timm's model contract.

    Args:
        args: those of timm's ``VisionTransformer``, in its order.
        layers: ``"mus"``, or ``"mus_fp8"`` for FP8 products in all hidden layers, with the options of the registry:
            ``"mus_fp8:backend:emulate"``, ``dict(type="mus_fp8", grad_scale=256)``.
        residual: ``"fixed"``, ``"mean"``, or the share t of every branch; see ``residual_weight``.
        output_mult: factor of the logits, a hyper-parameter that needs no change with width.
        act_layer: of the MLPs. SiLU by default: of GELU's outputs up to 30% become zero in e4m3, of SiLU's 7%.
        kwargs: those of timm's ``VisionTransformer``: ``img_size``, ``patch_size``, ``embed_dim``, ``depth``,
            ``num_heads``, ``global_pool``, ``class_token``, ``drop_path_rate``, ...

    Raises:
        ValueError: for layers that are not munit-scaled, or an unknown residual.

    Example:
        >>> model = MuSVisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    head: Any

    def __init__(
        self,
        *args: Any,
        layers: Spec = "mus",
        residual: str | float = "fixed",
        output_mult: float = 1.0,
        act_layer: Any = nn.SiLU,
        **kwargs: Any,
    ) -> None:
        self._options, self._roles = munit_options(layers)
        parts = {"embed_layer": MuSPatchEmbed, "block_fn": MuSBlock, "act_layer": act_layer, **kwargs}
        super().__init__(*args, **parts)
        self.output_mult = output_mult
        depth = len(self.blocks)
        for index, block in enumerate(self.blocks):
            block.residual = tuple(residual_weight(2 * index + k, depth, residual) for k in (1, 2))
        for name, module in list(self.named_modules()):
            if type(module) in (nn.Linear, nn.Conv2d):
                replace_module(self, name, self._munit_scaled(name, module))
        names = {name for name, module in self.named_modules() if isinstance(module, MuSLinear)}
        if unknown := sorted(set(self._roles) - names):
            raise ValueError(
                f"roles names {unknown[0]!r}: expected a linear layer, such as {', '.join(sorted(names)[:3])}"
            )

    def _munit_scaled(self, name: str, layer: nn.Module) -> nn.Module:
        role = self._roles.get(name, "output" if name == "head" else "hidden")
        return munit_scaled(layer, role, init=True, **self._options).to(layer.weight)  # type: ignore[arg-type]

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Embeddings of variance 1; the layers see to themselves."""
        for embedding in (self.pos_embed, self.cls_token, self.reg_token):
            if embedding is not None:
                nn.init.normal_(embedding)
        if needs_reset:
            for module in children_first(self):
                reset_parameters(module)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes gives pooled features, with ``global_pool=""`` all tokens."""
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.head, nn.Linear):
            self.head = self._munit_scaled("head", self.head).train(self.training)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Two terms of variance 1, weighted so that the sum has it, too."""
        x = super()._pos_embed(x)
        return x if self.pos_embed is None else x * 2**-0.5

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and the classifier (left out with ``pre_logits``): ``(N, num_classes)``."""
        if self.output_mult != 1 and not pre_logits:
            return self.head(super().forward_head(x, pre_logits=True) * self.output_mult)
        return super().forward_head(x, pre_logits)


# --- reversible ------------------------------------------------------------------------------------------------------


class RevMuSVisionTransformer(MemoryModes, MuSVisionTransformer):
    r"""Reversible munit-scaled vision transformer: two streams, of which blocks keep nothing for the backward pass.

    .. math:: y_2 = \sqrt{1-t} \, x_2 + \sqrt{t} \, F(x_1), \qquad y_1 = \sqrt{1-t} \, x_1 + \sqrt{t} \, G(y_2)

    with F attention and G the MLP, each with its norm. A multiplication by sqrt(1-t) would lose bits, so the streams
    are kept as :math:`S = x / \prod \sqrt{1-t}`: they are pure sums, :math:`S' = S + f \sqrt{t} / \prod \sqrt{1-t}`,
    which are undone to the bit on the grid of exact mode, and the factor is applied where a branch reads them. Both
    streams start as the embedded image; their sum, weighted to have variance 1, goes to the last norm.

    Args:
        args: those of ``MuSVisionTransformer``, in its order.
        mode: ``"reversible"``, ``"checkpoint"`` or ``"store"``; see ``set_mode``.
        exact: exact mode of the blocks: True, False, or k of the grid 2^-k. Acts in training only.
        residual: as in ``MuSVisionTransformer``; ``"mean"`` counts the branches of one stream.
        kwargs: those of ``MuSVisionTransformer``.

    Raises:
        ValueError: as ``MuSVisionTransformer`` does, or for an unknown mode.

    Example:
        >>> size = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=10)
        >>> model = RevMuSVisionTransformer(**size, layers="mus_fp8:backend:emulate")
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    blocks: Any

    def __init__(
        self,
        *args: Any,
        mode: str = "reversible",
        exact: bool | int = True,
        residual: str | float = "fixed",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, residual=residual, **kwargs)
        depth, factor, couplings = len(self.blocks), 1.0, []
        self._gains = [factor]  # of a stream after so many blocks
        for index, block in enumerate(self.blocks):
            t = residual_weight(index + 1, depth, residual)
            after = factor * (1 - t) ** 0.5
            f = StreamBranch(block.attn, block.norm1, block.drop_path1, factor, t**0.5 / after)
            g = StreamBranch(block.mlp, block.norm2, block.drop_path2, after, t**0.5 / after)
            couplings.append(AdditiveCoupling(f, g))
            factor = after
            self._gains.append(factor)
        self.blocks = RevSequential(couplings, mode=mode, exact=exact)
        for index, info in enumerate(self.feature_info):
            info["module"] = f"blocks.ops.{index}"

    @property
    def mode(self) -> str:
        """How activations are handled in training; change it with ``set_mode``."""
        return self.blocks.mode

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Order of the parameters from input to output, for layer-wise learning rates."""
        return {**super().group_matcher(coarse), "blocks": [(r"^blocks\.ops\.(\d+)", None), (r"^norm", (99999,))]}

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        x = x.to(self.patch_embed.proj.weight.dtype)  # autocast must not make the streams half precision
        return x, x

    def _merged(self, streams: tuple[Tensor, Tensor], blocks: int) -> Tensor:
        """Both streams after so many blocks as one of variance 1: the embedded image is in both, the rest is not."""
        gain = self._gains[blocks]
        return (streams[0] + streams[1]) * (gain / (2 * (1 + gain**2)) ** 0.5)

    def _chain(self, start: int, stop: int) -> RevSequential:
        """Some of the blocks as a chain of their own."""
        chain = RevSequential(self.blocks.ops[start:stop], self.mode, self.blocks.grid_bits or False)
        chain.training = self.blocks.training
        return chain

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All tokens after the last norm, ``(N, tokens, embed_dim)``; masks are not taken."""
        _check_unmasked(attn_mask, is_causal)
        return self.norm(self._merged(self.blocks(*self._embed(x)), len(self.blocks.ops)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Tokens after some of the blocks, and the final ones; arguments and results are those of timm's.

        In reversible mode the streams at each of these blocks are kept, those between are not.
        """
        _check_unmasked(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'")
        depth = len(self.blocks.ops)
        take, _ = feature_take_indices(depth, indices)
        streams, done, found = self._embed(x), 0, {}
        for index in sorted(set(take)):
            streams, done = self._chain(done, index + 1)(*streams), index + 1
            found[index] = self._merged(streams, done)
        tokens = [self.norm(found[index]) if norm else found[index] for index in sorted(set(take))]
        prefix = [y[:, : self.num_prefix_tokens] for y in tokens]
        maps = [y[:, self.num_prefix_tokens :] for y in tokens]
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[2:])
            maps = [y.transpose(1, 2).reshape(len(y), -1, height, width) for y in maps]
        final = None
        if not intermediates_only:
            stop = done if stop_early else depth
            streams = streams if done >= stop else self._chain(done, stop)(*streams)
            final = self.norm(self._merged(streams, stop))
        return _as_asked(final, maps, prefix if return_prefix_tokens and self.num_prefix_tokens else None, output_dict)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last that is asked for, the norm and the head; returns the kept indices."""
        take, last = feature_take_indices(len(self.blocks.ops), indices)
        self.blocks = self._chain(0, last + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take


@torch.fx.wrap
def _check_unmasked(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("RevMuSVisionTransformer takes no attention mask: use MuSVisionTransformer, which does")


def _as_asked(final: Tensor | None, maps: list[Tensor], prefix: list[Tensor] | None, output_dict: bool) -> Any:
    """Results in the forms of timm's ``forward_intermediates``."""
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": maps}
        result |= {} if prefix is None else {"image_intermediates_prefix": prefix}
        return result if final is None else {**result, "image_features": final}
    taken: Any = maps if prefix is None else list(zip(maps, prefix, strict=True))
    return taken if final is None else (final, taken)


# --- registration ----------------------------------------------------------------------------------------------------


def _create(cls: type[MuSVisionTransformer], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    out_indices = kwargs.pop("out_indices", 3)
    patch = kwargs.get("patch_size", 16)
    if (stride := kwargs.pop("output_stride", patch)) != patch:
        raise ValueError(
            f"output_stride={stride}: all maps of {variant} have the stride of its patches, {patch}: "
            f"pass patch_size={stride}, or take revbifpn_s0 or another network of several scales"
        )
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": Features},
        **kwargs,
    )


def _cfg(size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "μnit Scaling: Simple and Scalable FP8 LLM Training",
        "paper_ids": "arXiv:2502.05967",
    }


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
_TEST: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2}

default_cfgs = generate_default_cfgs(
    {f"{prefix}mus_vit_{size}_patch16_224.untrained": _cfg() for prefix in ("", "rev_") for size in _SIZES}
    | {f"test_{prefix}mus_vit.untrained": _cfg(64) for prefix in ("", "rev_")}
)


@register_model
def mus_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MuSVisionTransformer:
    """Munit-scaled ViT-Ti/16: 5.7 M parameters, heads of width 64."""
    return _create(MuSVisionTransformer, "mus_vit_tiny_patch16_224", pretrained, **{**_SIZES["tiny"], **kwargs})


@register_model
def mus_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MuSVisionTransformer:
    """Munit-scaled ViT-S/16: 22 M parameters, heads of width 64."""
    return _create(MuSVisionTransformer, "mus_vit_small_patch16_224", pretrained, **{**_SIZES["small"], **kwargs})


@register_model
def mus_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MuSVisionTransformer:
    """Munit-scaled ViT-B/16: 87 M parameters, heads of width 64."""
    return _create(MuSVisionTransformer, "mus_vit_base_patch16_224", pretrained, **{**_SIZES["base"], **kwargs})


@register_model
def rev_mus_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> RevMuSVisionTransformer:
    """Reversible munit-scaled ViT-Ti/16: 5.7 M parameters, two streams."""
    return _create(RevMuSVisionTransformer, "rev_mus_vit_tiny_patch16_224", pretrained, **{**_SIZES["tiny"], **kwargs})


@register_model
def rev_mus_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> RevMuSVisionTransformer:
    """Reversible munit-scaled ViT-S/16: 22 M parameters, two streams."""
    name = "rev_mus_vit_small_patch16_224"
    return _create(RevMuSVisionTransformer, name, pretrained, **{**_SIZES["small"], **kwargs})


@register_model
def rev_mus_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> RevMuSVisionTransformer:
    """Reversible munit-scaled ViT-B/16: 87 M parameters, two streams."""
    return _create(RevMuSVisionTransformer, "rev_mus_vit_base_patch16_224", pretrained, **{**_SIZES["base"], **kwargs})


@register_model
def test_mus_vit(pretrained: bool = False, **kwargs: Any) -> MuSVisionTransformer:  # noqa: PT028 - no test
    """A tiny munit-scaled transformer for quick tests: 4 blocks of width 64, 64-pixel images."""
    return _create(MuSVisionTransformer, "test_mus_vit", pretrained, **{**_TEST, **kwargs})


@register_model
def test_rev_mus_vit(pretrained: bool = False, **kwargs: Any) -> RevMuSVisionTransformer:  # noqa: PT028 - no test
    """A tiny reversible munit-scaled transformer for quick tests: 4 blocks of width 64, 64-pixel images."""
    return _create(RevMuSVisionTransformer, "test_rev_mus_vit", pretrained, **{**_TEST, **kwargs})
