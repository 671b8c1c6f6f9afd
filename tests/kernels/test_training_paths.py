"""Sparse layers on the kernel: which inputs, weights and masks it takes, and when a layer takes the masked path."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import revnets
from revnets.kernels import windows
from revnets.kernels.training import Structure, sparse_conv
from revnets.layers import SparseConv2d, SparseLinear, use_sparse_kernel

from .nets import assert_close, images, layer, needs_kernel, step


@needs_kernel
def test_other_numbers_of_channels_are_refused(calls: list[torch.Size]) -> None:
    linear = SparseLinear(16, 8, sparsity=0.8)
    use_sparse_kernel(linear)
    for channels in (8, 32):
        with pytest.raises(RuntimeError, match="16"):
            layer()(images(channels=channels))
        with pytest.raises(RuntimeError, match="16"):
            linear(torch.zeros(2, channels))
        with pytest.raises(ValueError, match=f"input of {channels} channels: the sparse layer expects 16"):
            sparse_conv(images(channels=channels), layer().weight, None, Structure(layer().mask))
    with pytest.raises(RuntimeError):
        linear(torch.tensor(1.0))
    assert len(calls) == 2


@needs_kernel
def test_biases_of_other_layouts_and_types(calls: list[torch.Size]) -> None:
    made, x = layer(), images()
    made.bias = nn.Parameter(torch.randn(48)[::2])
    assert made.bias.stride() == (2,)
    found = step(made, x)
    assert len(calls) == 1
    made.sparse_kernel = False
    assert_close(found, step(made, x))
    made.sparse_kernel, made.bias = True, nn.Parameter(torch.randn(24).double())
    with pytest.raises(RuntimeError, match="bias type"):
        made(x)


@needs_kernel
@pytest.mark.parametrize("change", ["set_mask", "in place", "load", "assign", "new tensor"])
def test_changed_masks_are_seen(calls: list[torch.Size], change: str) -> None:
    made, other, x = layer(), layer(), images()
    step(made, x)
    mask = made.mask.roll(1, 0)
    other.set_mask(mask)
    if change == "set_mask":
        made.set_mask(mask)
    elif change == "in place":
        made.mask.copy_(mask)
    elif change == "new tensor":
        made.mask = mask
    else:
        made.load_state_dict(other.state_dict(), assign=change == "assign")
    found = step(made, x)
    made.sparse_kernel = False
    assert_close(found, step(made, x))
    assert len(calls) == 2


@needs_kernel
@pytest.mark.parametrize("outputs", [7, 24])
def test_masks_received_from_other_processes(monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    """Torch does not count them as changes, no more than those of ``data``."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    made, x = layer(9, outputs), images(channels=9)
    made(x)
    version = made.mask._version
    made.mask.data.copy_(made.mask.roll(1, 0))
    assert made.mask._version == version
    y = made(x)
    made.sparse_kernel = False
    assert_close([y], [made(x)])


@needs_kernel
def test_another_default_device(calls: list[torch.Size]) -> None:
    made, x = layer(160, 24), images(channels=160)
    with torch.device("meta"):
        y = made(x)
    assert len(calls) == 1
    made.sparse_kernel = False
    assert_close([y], [made(x)])


@needs_kernel
def test_masks_without_versions() -> None:
    """Tensors made in inference mode have none."""
    with torch.inference_mode():
        made = layer()
        made(images())
        made.set_mask(made.mask.roll(1, 0))
        made.weight.normal_()
        y = made(images())
        made.sparse_kernel = False
        assert_close([y], [made(images())])


@needs_kernel
def test_a_mask_copied_onto_itself_is_not_compressed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(), images()
    made(x)
    monkeypatch.setattr(windows, "Structure", None)
    made.mask.copy_(made.mask.clone())
    made(x)


def _compiled(made: nn.Module, x: Tensor) -> Any:
    return torch.compile(made, backend="eager", fullgraph=True)(x)


def _autocast(made: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return made(x)


def _counted(made: nn.Module, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        y = made(x)
    assert counter.get_total_flops() == 2 * x.numel() * 24
    return y


def _gathering(made: Any, x: Tensor) -> Any:
    made.gather_dense_grad = True
    y = made(x)
    y.sum().backward()
    assert made.dense_grad is not None
    return y


def _forward_mode(made: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(made, (x,), (x,))[0]


def _dual(made: nn.Module, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(made(torch.autograd.forward_ad.make_dual(x, x))).primal


OTHER_WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "compiled": _compiled,
    "autocast": _autocast,
    "counted": _counted,
    "gathering": _gathering,
    "jvp": _forward_mode,
    "dual": _dual,
    "vmap": lambda made, x: torch.func.vmap(made)(x[:, None])[:, 0],
    "grad": lambda made, x: torch.func.grad(lambda t: made(t).sum())(x),
    "traced": lambda made, x: torch.jit.trace(made, x, check_trace=False)(x),
    "exported": lambda made, x: torch.export.export(made, (x,)).module()(x),
    "double": lambda made, x: made.double()(x.double()),
    "meta": lambda made, x: made.to("meta")(x.to("meta")),
    "unbatched": lambda made, x: made(x[0]),
    "empty": lambda made, x: made(x[:0]),
}


@needs_kernel
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_masked_path_where_the_kernel_does_not_apply(calls: list[torch.Size], way: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, which is deprecated
        y = OTHER_WAYS[way](layer(), images())
    assert not calls
    assert isinstance(y, Tensor)


@needs_kernel
def test_masked_path_for_dense_masks(calls: list[torch.Size]) -> None:
    made = layer(sparsity=0.2)
    made(images())
    assert not calls
    made.set_mask(made.mask & (torch.rand(made.mask.shape) < 0.4))
    made(images())
    assert len(calls) == 1


@needs_kernel
def test_masked_path_for_small_layers(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(), images()
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "MIN_PRODUCTS", 2 * 36 * 16 * 24 + 1)
    made(x)
    assert not calls
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "MIN_PRODUCTS", 2 * 36 * 16 * 24)
    made(x)
    assert len(calls) == 1


@needs_kernel
def test_use_sparse_kernel_takes_what_the_kernel_serves(calls: list[torch.Size]) -> None:
    shape: dict[str, Any] = {"sparsity": 0.9}
    odd = [
        SparseConv2d(16, 16, 3, padding=1, **shape),
        SparseConv2d(16, 16, 3, padding=1, groups=2, **shape),
        SparseConv2d(16, 16, 1, stride=2, **shape),
        nn.Conv2d(16, 16, 1),
    ]
    model = nn.Sequential(SparseConv2d(16, 16, 1, **shape), SparseConv2d(16, 16, 1, padding="same", **shape), *odd)
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), SparseLinear(16, 4, **shape)))
    assert revnets.use_sparse_kernel(model) == 5
    model(images())
    assert len(calls) == 5
    keys = list(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert use_sparse_kernel(model, enabled=False) == 0
    assert list(model.state_dict()) == keys
    model(images())
    assert len(calls) == 5
    for other in copies:
        assert_close(step(other, images()), step(model, images()))
    assert len(calls) == 15
