"""Linear and convolution layers with a mask over their weight, drop-in for torch's own."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from ...kernels.breakeven import pays
from ...kernels.build import load_kernel
from ...kernels.masks import mask_serves, masked
from ...kernels.training import (
    MAX_DENSITY,
    MIN_PRODUCTS,
    Structure,
    StructureCache,
    kernel_fits,
    kernel_serves,
    sparse_conv,
    sparse_linear,
)
from ...kernels.windows import is_pointwise, structure_of, windows_fit
from ...reversible.traced import is_traced
from ...sparsity.blocks import block_of, is_whole, shape_of_blocks
from ...sparsity.masks import check_sparsity, kept, mask_with_count
from ..fold import folded_layer, plain_layer
from ..kernel_norms import use_kernel_norms
from ..sites import MASKED, Unsuitable
from .geometry import geometry_of


def fitting_block(weight: Tensor, pattern: str | None) -> int:
    """How many input channels of an output are zero together in a weight.

    Raises:
        Unsuitable: where its input channels make no whole blocks.
        ValueError: for an unknown pattern.

    Example:
        >>> fitting_block(torch.ones(2, 8), "4x1")
        4
    """
    block = block_of(pattern)
    try:
        shape_of_blocks(weight.shape, block)
    except ValueError as error:
        raise Unsuitable(f"pattern={pattern!r}: {error}") from None
    return block


class _GatheredGrad(torch.autograd.Function):
    """``weight * mask``, whose backward pass also adds the gradient of the unmasked weight to ``dense_grad``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, layer: MaskedWeight) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.layer = layer
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        gathered, layer = grad.detach(), ctx.layer
        layer.dense_grad = gathered.clone() if layer.dense_grad is None else layer.dense_grad + gathered
        return grad * mask, None, None


@torch.compiler.disable  # a side effect of the backward pass, once in a hundred steps
def _gathering(weight: Tensor, mask: Tensor, layer: MaskedWeight) -> Tensor:
    return _GatheredGrad.apply(weight, mask, layer)


class MaskedWeight(nn.Module):
    r"""What the sparse layers share: the weight in use is :math:`\theta \odot m`, so gradients are masked as well.

    The mask is a persistent bool buffer of the weight's shape. Where it is False the weight is 0 and its gradient is 0
    in any training loop; weights set from outside (a re-initialisation, an average over other masks) have no effect
    there.

    Attributes:
        weight: the parameter, with zeros where the mask is False.
        mask: True where a weight stays.
        sparsity: share of zeros that the mask was made for.
        pattern: ``4x1`` where zeros come in blocks of four input channels, else None.
        gather_dense_grad: while True, every backward pass adds the gradient of the unmasked weight to ``dense_grad``.
        dense_grad: that gradient, or None; whoever reads it sets it back to None.
        sparse_kernel: whether the kernel that skips zeros is used where it can be, see ``use_sparse_kernel``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor
    sparsity: float
    pattern: str | None = None
    _count: int
    init_scale: bool
    gather_dense_grad: bool
    dense_grad: Tensor | None
    sparse_kernel: bool = False
    _structures: StructureCache | None = None
    _dense_for: tuple[Any, ...] | None = None  # what was seen last of input, mask and settings that stays dense
    _mask_known: bool = True

    def __init__(
        self,
        *args: Any,
        sparsity: float,
        init_scale: bool = False,
        count: int | None = None,
        pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_sparsity(sparsity)
        super().__init__(*args, **kwargs)
        block = fitting_block(self.weight, pattern)
        self.sparsity, self.pattern = sparsity, pattern
        self.init_scale = init_scale
        self.gather_dense_grad = False
        self.dense_grad = None
        if count is None:
            count = kept(self.weight.numel(), self.sparsity, block)
            count = max(block, count)  # a layer without weights would never learn
        elif count % block:
            raise ValueError(f"count={count}: zeros in blocks of {block} leave a multiple of {block} weights")
        self._count = count
        self.register_buffer("mask", self._drawn_mask())
        self._mask_known = not self.mask.is_meta
        self.reset_parameters()

    def _drawn_mask(self) -> Tensor:
        if self.weight.is_meta:
            return torch.empty(self.weight.shape, dtype=torch.bool, device="meta")
        block = block_of(self.pattern)
        return mask_with_count(self.weight.shape, self._count, block=block).to(self.weight.device)

    def _draw_missing_mask(self) -> None:
        """A mask that was made on the meta device is what happens to be in memory, until one is drawn or loaded."""
        if not (self._mask_known or self.mask.is_meta):
            self.mask.copy_(self._drawn_mask())
            self._mask_known = True

    def _apply(self, *args: Any, **kwargs: Any) -> MaskedWeight:
        super()._apply(*args, **kwargs)
        self._mask_known = self._mask_known and not self.mask.is_meta
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming normal weights by fan-out (of a group), with ``init_scale`` as wide as the density asks; biases 0."""
        if "mask" not in self._buffers:
            return  # called by torch's own constructor
        self._draw_missing_mask()
        fan_out = self.weight.shape[0] * self.weight[0, 0].numel() / getattr(self, "groups", 1)
        if self.init_scale:
            fan_out *= 1 - self.sparsity
        self.weight.normal_(0, (2 / fan_out) ** 0.5).mul_(self.mask)
        if self.bias is not None:
            self.bias.zero_()

    def effective_weight(self) -> Tensor:
        """The weight in use, of the parameter's shape, with the gradients that the class describes."""
        if self.gather_dense_grad and torch.is_grad_enabled() and self.weight.requires_grad:
            return _gathering(self.weight, self.mask, self)
        if self.sparse_kernel and mask_serves(self.weight, self.mask):
            return masked(self.weight, self.mask)
        return self.weight * self.mask

    def _may_skip(self, x: Tensor) -> bool:
        """Whether the kernel that skips zeros may be used."""
        return self.sparse_kernel and not self.gather_dense_grad and not is_traced(x)

    def _structure(self, x: Tensor, channels: int, expected: int) -> Structure | None:
        """The mask's, where the kernel is to be used for so many channels or features; else None."""
        if channels != expected:  # of which torch complains
            return None
        if x.numel() // expected * self.weight.numel() < MIN_PRODUCTS:
            return None
        if not kernel_serves(x, self.weight, self.bias):
            return None
        mask = self.mask
        version = 0 if mask.is_inference() else mask._version
        settings = self._settings()
        kind = (x.shape, torch.get_num_threads(), id(mask), version, settings)
        if kind == self._dense_for:
            return None
        structure = self._current(settings)
        if structure is not None and structure.density <= MAX_DENSITY and self._may_gain(x, structure):
            return structure
        self._dense_for = kind
        return None

    def _may_gain(self, x: Tensor, structure: Structure) -> bool:
        return pays(structure, x, linear=True)

    def _settings(self) -> tuple[Any, ...]:
        """What of the layer, apart from its mask, makes its structure: it may be changed at any time."""
        return ()

    def _current(self, settings: tuple[Any, ...]) -> Structure | None:
        """The structure of the mask and the settings as they are now; None where the kernel has no loop for them."""
        structures = self._structures
        if structures is None or structures.settings != settings:
            if not _served(self):
                return None
            structures = self._structures = StructureCache(settings)
        return structures.of(self.mask, self._make_structure)

    def _make_structure(self, mask: Tensor) -> Structure:
        return Structure(mask)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Put another mask in place: dropped weights become 0, and grown ones start at 0.

        Args:
            mask: bool, of the weight's shape.

        Raises:
            ValueError: for another shape or dtype, or one that breaks the blocks of the pattern.
        """
        if mask.shape != self.mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} and {mask.dtype}: expected a torch.bool mask of the weight's shape "
                f"{tuple(self.mask.shape)}"
            )
        if not is_whole(mask, block_of(self.pattern)):
            raise ValueError(f"the mask has single zeros, where the pattern {self.pattern} has blocks")
        mask = mask.to(self.mask.device)
        self.weight.mul_(self.mask & mask)
        self.mask.copy_(mask)
        self._mask_known = not self.mask.is_meta

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._mask_known = (self._mask_known or f"{prefix}mask" in state_dict) and not self.mask.is_meta
        if self._mask_known and not is_whole(self.mask, block_of(self.pattern)):
            args[-1].append(  # torch raises it with those of other layers
                f"{prefix}mask of the checkpoint has single zeros, where the pattern {self.pattern} of the layer has "
                "blocks: load it into layers without a pattern"
            )
        self.weight.mul_(self.mask)  # a dense checkpoint loads with strict=False

    def extra_repr(self) -> str:
        """Torch's own, with the sparsity and the count of the weights that stay."""
        count = "?" if self.mask.device.type == "meta" else int(self.mask.sum())
        pattern = "" if self.pattern is None else f", pattern={self.pattern}"
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4g}{pattern}, weights={count}/{self.mask.numel()}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dense_grad": None, "_structures": None, "_dense_for": None}


class SparseConv2d(MaskedWeight, nn.Conv2d):  # type: ignore[misc]
    """``nn.Conv2d`` of which a share of the weights is masked out.

    Args:
        args: those of ``nn.Conv2d``, in its order.
        sparsity: share of zeros, in [0, 1).
        init_scale: start with a standard deviation larger by ``1 / sqrt(1 - sparsity)``.
        count: exact number of weights that stay; by default ``round((1 - sparsity) * numel)``, at least 1.
        pattern: ``4x1``: zeros come in blocks of four input channels, so many blocks stay; None: single zeros.
        kwargs: those of ``nn.Conv2d``.

    Raises:
        ValueError: for a sparsity outside [0, 1), or input channels that make no whole blocks.

    Example:
        >>> SparseConv2d(8, 16, 3, sparsity=0.75)
        SparseConv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), sparsity=0.75, weights=288/1152)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)``. Returns: ``(N, C_out, H', W')``."""
        structure = self.structure(x)
        if structure is not None:
            return sparse_conv(x, self.weight, self.bias, structure)
        return self._conv_forward(x, self.effective_weight(), self.bias)

    def structure(self, x: Tensor) -> Structure | None:
        """What the kernel needs to compute this layer for an input; None where the masked path is to be taken."""
        if not (self._may_skip(x) and x.ndim == 4):
            return None
        return self._structure(x, x.shape[1], self.in_channels)

    def _may_gain(self, x: Tensor, structure: Structure) -> bool:
        """Images that are too small are left to torch, which says so."""
        return min(structure.geometry.output_size(*x.shape[2:])) > 0 and pays(structure, x, linear=False)

    def _settings(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode

    def _make_structure(self, mask: Tensor) -> Structure:
        return structure_of(mask, geometry_of(self))


class SparseConv2dSame(SparseConv2d):
    """Timm's ``Conv2dSame``, whose padding depends on the image as TensorFlow's does, with a mask.

    Example:
        >>> SparseConv2dSame(8, 16, 3, stride=2, sparsity=0.75)(torch.ones(1, 8, 7, 6)).shape
        torch.Size([1, 16, 4, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)``. Returns: ``(N, C_out, ceil(H / stride), ceil(W / stride))``."""
        return super().forward(pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)))

    @staticmethod
    def plain_kind(padding_mode: str = "zeros", **settings: Any) -> nn.Module:
        """Timm's own, which pads with zeros only."""
        return Conv2dSame(**settings)


class SparseLinear(MaskedWeight, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` of which a share of the weights is masked out.

    Args:
        args: those of ``nn.Linear``, in its order.
        sparsity: share of zeros, in [0, 1).
        init_scale: start with a standard deviation larger by ``1 / sqrt(1 - sparsity)``.
        count: exact number of weights that stay; by default ``round((1 - sparsity) * numel)``, at least 1.
        pattern: ``4x1``: zeros come in blocks of four input channels, so many blocks stay; None: single zeros.
        kwargs: those of ``nn.Linear``.

    Raises:
        ValueError: for a sparsity outside [0, 1), or input channels that make no whole blocks.

    Example:
        >>> SparseLinear(32, 8, sparsity=0.5)
        SparseLinear(in_features=32, out_features=8, bias=True, sparsity=0.5, weights=128/256)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(..., in_features)``. Returns: ``(..., out_features)``."""
        structure = self._structure(x, x.shape[-1], self.in_features) if self._may_skip(x) and x.ndim else None
        if structure is not None:
            return sparse_linear(x, self.weight, self.bias, structure)
        return nn.functional.linear(x, self.effective_weight(), self.bias)


MASKED.update((SparseConv2d, SparseConv2dSame, SparseLinear))


@folded_layer.register(SparseConv2d)
@folded_layer.register(SparseLinear)
def _folded(layer: Any) -> nn.Module:
    """Zeros baked in."""
    return plain_layer(layer, layer.weight * layer.mask, layer.bias)


def use_sparse_kernel(model: nn.Module, enabled: bool = True) -> int:
    """Have sparse convolutions and linear layers train on a kernel that skips zeros, on the CPU, where that pays.

    It has loops for convolutions of any window, stride and dilation, for 1x1 ones of stride 1 in groups, too.
    Gradients are those of the masked path to float32 accuracy, and are differentiable once. Other layers stay as they
    are. A layer takes the masked path by itself where the kernel does not apply: more than half of the weights there,
    less than a million products, not float32 or not on the CPU, autocast, ``torch.compile``, ``torch.func``, while
    RigL gathers dense gradients; and where it was measured, once for its kind of input, that the kernel is no faster:
    see ``revnets.kernels.breakeven``. Maps stay as they are, contiguous or channels last: the kernel reads 1x1
    convolutions in either, and transposes others. Large weights of layers that stay dense are masked by it, too, and
    batch norms in training are computed by it, with their activations where these are one with them: what is left of a
    step once zeros are skipped is norms for the most part. The choice belongs to the modules: it is copied and pickled
    with them, and is no part of ``state_dict``.

    Args:
        model: with sparse layers.
        enabled: False goes back to the masked path everywhere.

    Returns:
        How many layers may use the kernel now.

    Raises:
        KernelUnavailable: where it cannot be compiled; the message says why.

    Example:
        >>> use_sparse_kernel(nn.Sequential(SparseConv2d(8, 8, 3, sparsity=0.9), nn.Conv2d(8, 8, 3)))
        1
    """
    if enabled:
        load_kernel()
    layers = [module for module in model.modules() if type(module) in MASKED]
    for layer in layers:
        layer.sparse_kernel = enabled and _served(layer)  # type: ignore[assignment]
    served = sum(bool(layer.sparse_kernel) for layer in layers)
    use_kernel_norms(model, served > 0)
    return served


def _served(layer: Any) -> bool:
    """Whether the kernel has a loop for the layer."""
    if isinstance(layer, SparseLinear):
        return kernel_fits(layer.weight)
    geometry = geometry_of(layer)
    if is_pointwise(geometry):
        return kernel_fits(layer.weight)
    even = any(d * (k - 1) % 2 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True))
    plain = layer.padding_mode == "zeros" and not (layer.padding == "same" and even)  # which pads one side more
    return plain and windows_fit(geometry) and layer.weight.numel() < 2**31


def sparse_kind(layer: nn.Module) -> type[SparseConv2d] | type[SparseLinear]:
    """The masked class for a layer of torch's."""
    if isinstance(layer, Conv2dSame):
        return SparseConv2dSame
    return SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
