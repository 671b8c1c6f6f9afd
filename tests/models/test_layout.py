"""RevBiFPN's memory layout in training: channels-last inside on a CPU, as the weights are outside."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.profiling.profile import predict
from revnets.profiling.target import Setting, Target

ASKED_FOR = {
    "pyramid": lambda model, x: model.forward_pyramid(x),
    "features": lambda model, x: [model.forward_features(x)],
    "intermediates": lambda model, x: all_of(*model.forward_intermediates(x)),
    "intermediates only": lambda model, x: model.forward_intermediates(x, indices=[0, 3], intermediates_only=True),
}


def all_of(final: Tensor, maps: list[Tensor]) -> list[Tensor]:
    return [final, *maps]


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_revbifpn", num_classes=10, **options).train()


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def streams(model: Any, x: Tensor) -> list[Tensor]:
    """What the body's ops make in a training step."""
    found: list[Tensor] = []
    handles = [op.register_forward_hook(lambda op, xs, ys: found.extend(ys)) for op in model.body.ops]
    model(x).sum().backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For which torch chooses the kernels that copy contiguous maps."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def activations(name: str, size: int, batch_size: int, channels_last: bool) -> float:
    """MB per image of a reversible step in float32."""
    setting = Setting(channels_last=channels_last, optimizer=None)
    predicted = predict(Target(name, size, batch_size, "reversible"), setting)
    return (predicted.step_bytes - predicted.gradient_bytes) / batch_size / 1e6


@pytest.mark.usefixtures("two_threads")
def test_activations_of_a_contiguous_s0() -> None:
    assert activations("revbifpn_s0", 224, 8, channels_last=False) <= 3.4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "batch_size", "megabytes"),
    [("revbifpn_s1", 256, 8, 5.8), ("revbifpn_s2", 256, 4, 8.8), ("revbifpn_s3", 288, 2, 14.9)],
)
@pytest.mark.usefixtures("two_threads")
def test_contiguous_networks_need_no_more_than_channels_last_ones(
    name: str, size: int, batch_size: int, megabytes: float
) -> None:
    found = [activations(name, size, batch_size, channels_last) for channels_last in (False, True)]
    assert found[0] <= megabytes
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("channels", [3, 64], ids=["space to depth", "strided convolution"])
@pytest.mark.parametrize("mode", revnets.reversible.MODES)
def test_inside_maps_are_channels_last_in_training(mode: str, channels: int) -> None:
    found = streams(tiny(mode=mode, in_chans=channels), images(channels))
    assert found
    assert all(is_channels_last(y) for y in found)


@pytest.mark.parametrize("asked", ASKED_FOR)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_are_handed_out_in_the_layout_of_the_weights(asked: str, channels_last: bool) -> None:
    model = tiny()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    for x in (images(), images().to(memory_format=torch.channels_last)):
        for y in ASKED_FOR[asked](model, x):
            assert is_channels_last(y) if channels_last else y.is_contiguous(), y.stride()
            assert not (is_channels_last(y) and y.is_contiguous()), "a map of one pixel or channel shows nothing"


@pytest.mark.parametrize("mode", revnets.reversible.MODES)
def test_feature_networks_give_maps_that_can_be_viewed(mode: str) -> None:
    """As heads of detectors do with maps of a contiguous network."""
    backbone = tiny_features(mode)
    loss = sum(y.view(y.shape[0], -1).square().mean() for y in backbone(images()))
    loss.backward()
    assert all(p.grad is not None for p in backbone.parameters())


def tiny_features(mode: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_revbifpn", features_only=True, mode=mode).train()


def test_feature_networks_gradients_are_the_same_to_the_bit_in_all_modes() -> None:
    found = []
    for mode in revnets.reversible.MODES:
        backbone = tiny_features(mode)
        sum(y.square().mean() for y in backbone(images())).backward()
        found.append([p.grad for p in backbone.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_enter_the_network_channels_last() -> None:
    """And not in the layout that whoever got the maps works in: kernels would copy them, each one anew."""
    model, seen = tiny(mode="store"), []
    model.neck.blocks[0].register_forward_hook(lambda block, xs, y: y.register_hook(seen.append) and None)
    (model.forward_pyramid(images())[0] * 2).square().sum().backward()
    assert [is_channels_last(grad) for grad in seen] == [True]


@pytest.mark.parametrize("prepare", [nn.Module.double, nn.Module.eval], ids=["float64", "eval"])
def test_elsewhere_maps_stay_as_they_are(prepare: Callable[[Any], Any]) -> None:
    """float64 has no kernels that would copy, and evaluation is left to whoever exports it."""
    model = prepare(tiny())
    x = images().to(next(model.parameters()).dtype)
    assert all(y.is_contiguous() for y in streams(model, x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_parameter_gradients_lie_as_in_the_layout_before(channels_last: bool) -> None:
    """DDP's buckets have the parameters' strides: contiguous ones get contiguous gradients."""
    model = tiny()
    model(images().to(memory_format=torch.channels_last) if channels_last else images()).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad.stride() != p.stride()] == []
