"""Recipes from autograd's graph: the same steps as by the recorder, without its eye on every operator."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from revnets.layers import convert, make_lean
from revnets.layers.lean import nodes, recipes
from revnets.layers.lean.keeper import Keeper
from revnets.layers.lean.keeping import Recorder
from revnets.layers.lean.network import keeper_of, kept_per_image
from revnets.layers.lean.reading import AVAILABLE, Reader, Writes
from revnets.layers.lean.share import Plan
from revnets.layers.lean.witness import ComputedOtherwise
from revnets.profiling.memory import measure_training_step
from revnets.profiling.predict import predict_training_step
from tests.helpers import assert_same_step, training_step

from .networks import BLOCKS, C, images, network
from .test_network import STEPS, Random, kept_bytes, loss, saved_bytes

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch does not show what its graph keeps")

SIZE = (C, 16, 16)


def read(plain: nn.Module) -> nn.Module:
    """A copy that reads the graph, whatever it may keep."""
    lean = make_lean(copy.deepcopy(plain), Plan(reading=Plan())).train()
    for p in lean.parameters():
        p.requires_grad_(True)
    return lean


def is_read(net: nn.Module) -> bool:
    return type(keeper_of(net)) is Reader


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "frozen norm"])
def test_same_step(name: str, layout: torch.memory_format) -> None:
    plain, x = network("bottleneck", name, "gated", name), images().to(memory_format=layout)
    plain.to(memory_format=layout)
    lean = read(plain)
    assert is_read(lean)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)
    assert kept_bytes(lean, x) < 0.9 * saved_bytes(plain, x)


@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "frozen norm"])
def test_same_bits_in_float32(name: str) -> None:
    plain = network("gated by hardswish", name, "bottleneck").float()
    x = images(dtype=torch.float32)
    assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 0)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_flow_of_data(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    plain = Random(steps).double().train()
    assert_same_step(training_step(read(plain), (images(2),), loss), training_step(plain, (images(2),), loss), 1e-10)


ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Mish, nn.LeakyReLU),
    *(nn.ELU, nn.Softplus, lambda inplace: nn.GELU("tanh")),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: Any, inplace: bool) -> None:
    try:
        layer = activation(inplace=inplace)
    except TypeError:
        layer = activation()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), layer, nn.Conv2d(C, C, 3)).train()
    x = images(dtype=torch.float32)
    assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 0)


@pytest.mark.parametrize("name", ["bottleneck", "gated", "gated by hardswish", "mlp"])
def test_it_keeps_what_the_recorder_keeps(name: str) -> None:
    plain, x = nn.Sequential(nn.Conv2d(C, C, 1).double(), network(name, name, name)), images()
    assert kept_bytes(read(plain), x) == kept_bytes(make_lean(copy.deepcopy(plain)), x)


@pytest.mark.parametrize(
    "model",
    ["mobilenetv3_small_050", "test_efficientnet", "test_resnet", "test_vit", "test_convnext"],
)
def test_conversion_chooses_it_where_it_keeps_as_little(model: str) -> None:
    plain = timm.create_model(model, num_classes=10).train()
    size = timm.data.resolve_data_config(model=plain)["input_size"]
    lean = convert(copy.deepcopy(plain), "lean", input_size=size).model.train()
    assert is_read(lean)
    x = torch.randn(2, *size)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 0)


def test_no_operator_is_looked_at() -> None:
    class Looking(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(_get_current_dispatch_mode_stack())
            return x

    seen: list[Any] = []
    net = read(nn.Sequential(Looking(), network("bottleneck", "gated")))
    training_step(net, (images(),), loss)
    assert seen == [[]]


def test_elsewhere_the_recorder_sees_to_it() -> None:
    net = read(network("bottleneck").float())
    with torch.autocast("cpu", torch.bfloat16):
        assert type(keeper_of(net)) is Recorder
    next(net.parameters()).requires_grad_(False)
    assert type(keeper_of(net)) is Recorder
    net = read(network("bottleneck"))
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    assert type(keeper_of(net)) is Recorder
    net = read(network("bottleneck"))
    next(net.children()).register_forward_pre_hook(lambda *_: None)
    assert type(keeper_of(net)) is Recorder


@pytest.mark.parametrize("share", [0.6, 0.75])
def test_shares(share: float) -> None:
    plain, x = network(*["gated by hardswish"] * 3), images(2)
    lean = convert(copy.deepcopy(plain), f"lean:{share}", input_size=SIZE).model.train()
    assert is_read(lean)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)
    assert 0.4 * saved_bytes(plain, x) < kept_bytes(lean, x) <= share * saved_bytes(plain, x)


# --- norms of rows and views -----------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A norm of rows whose epsilon is not that of the module that has its weight."""

    def __init__(self, kind: str, affine: str) -> None:
        super().__init__()
        self.stem, self.head, self.kind, self.eps = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1), kind, 1e-6
        self.weight = nn.Parameter(torch.rand(C) + 0.5) if "weight" in affine else None
        self.bias = nn.Parameter(torch.rand(C)) if "bias" in affine else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.kind == "group":
            return self.head(F.group_norm(h, 2, self.weight, self.bias, 0.1))
        h = F.layer_norm(h.permute(0, 2, 3, 1), (C,), self.weight, self.bias, 0.1)
        return self.head(h.permute(0, 3, 1, 2))


@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("kind", ["group", "layer"])
def test_norms_of_rows_with_an_epsilon_of_their_own(kind: str, affine: str) -> None:
    torch.manual_seed(0)
    plain = Rows(kind, affine).double().train()
    lean, x = read(plain), images()
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)
    assert kept_bytes(lean, x) < 0.8 * saved_bytes(plain, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "seen",
    [
        lambda h: h.permute(0, 2, 3, 1).flatten(1, 2),
        lambda h: h.transpose(1, -1).reshape(len(h), -1, C),
        lambda h: h.flatten(2).transpose(1, 2).contiguous().view(len(h), -1, 2 * C),
        lambda h: h[:, ::2, 1:-1].flatten(1),
        lambda h: h[1:, 2:, :, 3:],
        lambda h: h[..., ::2].transpose(0, 1),
        lambda h: h.unfold(2, 4, 2)[..., 0],
        lambda h: torch.cat([part.squeeze(1) for part in h.unsqueeze(1).unbind(0)]),
        lambda h: F.pad(h.roll((3, -2), (2, 3)), (0, 0, 0, 0)).transpose(2, 3),
        lambda h: F.pad(h, (1, 2), value=0.5),
        lambda h: h.expand(2, *h.shape)[1],
        lambda h: torch.add(h.permute(0, 2, 3, 1), 1).reshape(len(h), -1),
    ],
)
def test_views(seen: Callable[[Tensor], Tensor], layout: torch.memory_format) -> None:
    """What is asked for is a view of a norm's activation, and of what follows from that."""

    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.norm(self.conv(x)))
            return seen(h).square() * seen(F.gelu(h))

    torch.manual_seed(0)
    plain, x = Net("").double().train(), images().to(memory_format=layout)
    assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 1e-10)


@pytest.mark.parametrize(
    "write",
    [
        lambda h, view: h[:, :2].mul_(2),
        lambda h, view: view.mul_(2),
        lambda h, view: h.mul_(2),
        lambda h, view: view[1:].relu_(),
        lambda h, view: h.copy_(h.flip(0)),
    ],
)
def test_writes_through_views_that_autograd_sees(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(x)) + x
            view = h.permute(0, 2, 3, 1)
            write(h, view)
            return F.gelu(view).square() * h.permute(0, 2, 3, 1).sigmoid()

    torch.manual_seed(0)
    plain = Net("").double().train()
    assert_same_step(training_step(read(plain), (images(),), loss), training_step(plain, (images(),), loss), 1e-10)


def test_blank_images_and_shared_weights_of_group_norms() -> None:
    """Where all is one number, the last bits of another order of sums are all there is."""

    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(F.group_norm(self.conv(x), C, self.own, None, 1e-6))
            return self.head(F.silu(self.other(self.stem(self.norm(h)))))

    torch.manual_seed(0)
    plain = Net("").train()
    plain.norm, plain.other = nn.GroupNorm(C, C, eps=1e-6), nn.GroupNorm(2, C, eps=1e-3)
    plain.other.weight, plain.own = plain.norm.weight, nn.Parameter(torch.ones(C))
    for x in (torch.zeros(2, C, 16, 16), torch.randn(2, C, 16, 16)):
        assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 0)


def test_a_whole_number_is_an_epsilon() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(1, C, eps=1), nn.SiLU(), nn.Conv2d(C, C, 1)).train()
    x = images(dtype=torch.float32)
    assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 0)


@pytest.mark.parametrize("share", [False, True])
def test_places_that_are_expanded_stay_as_they_are(share: bool) -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.norm(self.conv(x)))
            place = h.argmax(3, keepdim=True)
            return self.head(h.gather(3, place.expand_as(h) if share else place))

    torch.manual_seed(0)
    plain, x = Net("").double().train(), images()
    lean = read(plain)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)
    assert kept_bytes(lean, x) <= saved_bytes(plain, x)


@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("write", ["mul_", "add_"])
def test_what_is_written_in_place_keeps_its_type(narrow: torch.dtype, wide: torch.dtype, write: str) -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(x))
            return self.head(getattr(h, write)(self.scale))

    torch.manual_seed(0)
    plain = Net("").to(narrow).train()
    plain.scale = nn.Parameter(torch.rand(C, 1, 1, dtype=wide))
    x = images(dtype=narrow)
    assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 0)


def test_views_of_what_was_written_in_place_come_back() -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).relu_().permute(0, 2, 3, 1).square()

    torch.manual_seed(0)
    plain, x = Net("").double().train(), images()
    lean = read(plain)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)
    assert kept_bytes(lean, x) < 0.7 * saved_bytes(plain, x)


# --- what the graph does not show ------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Writes to a result before it is used, unseen by autograd."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (nn.Conv2d(C, C, 1) for _ in range(3))
        self.norm, self.place = nn.BatchNorm2d(C), place

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.conv(x))
        if self.place == "norm":
            h.detach().mul_(2)
        h = h + x
        if self.place == "sum":
            with torch.no_grad():
                h.clamp_(-1, 1)
        if self.place == "data":
            h.data.mul_(0.5)
        return self.head(h)


@pytest.mark.parametrize("place", ["norm", "sum", "data"])
def test_networks_with_hidden_writes_are_left_to_the_recorder(place: str) -> None:
    torch.manual_seed(0)
    plain = Hidden(place).double().train()
    lean = convert(copy.deepcopy(plain), "lean:0", input_size=SIZE).model.train()
    assert not is_read(lean)
    assert_same_step(training_step(lean, (images(),), loss), training_step(plain, (images(),), loss), 1e-10)
    found = kept_per_image(Hidden("").double(), SIZE, share=0)
    assert found is not None
    assert found.plan is not None
    assert found.plan.reading is not None


@pytest.mark.parametrize("place", ["norm", "sum", "data"])
def test_hidden_writes_that_begin_after_the_conversion_end_the_step(place: str) -> None:
    """Nothing in the graph tells of them: what is computed again is not what there was."""
    torch.manual_seed(0)
    lean = convert(Hidden("").double(), "lean:0", input_size=SIZE).model.train()
    training_step(lean, (images(),), loss)
    lean.place = place
    assert is_read(lean)
    with pytest.raises(ComputedOtherwise, match=r"make_lean\(model\) on the plain network"):
        training_step(lean, (images(),), loss)


def test_writes_that_no_operator_shows_end_the_step() -> None:
    """The recorder sees what torch does; ``numpy``, and kernels that do not tell, write without it."""

    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.norm(self.conv(x)))
            h.detach().numpy()[:, 1:] *= 2
            return self.head(h)

    lean = make_lean(Net("").double().train())
    assert not is_read(lean)
    with pytest.raises(ComputedOtherwise):
        training_step(lean, (images(),), loss)


def test_a_write_between_two_that_ask_ends_the_step() -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.norm(self.conv(x)))
            y = self.stem(h)
            if self.place:
                h.data.mul_(2)
            return self.last(y + self.head(h))

    torch.manual_seed(0)
    plain = Net("")
    plain.last = nn.Sequential(nn.BatchNorm2d(C), nn.SiLU(), nn.Conv2d(C, C, 1))
    lean = convert(plain.double(), "lean:0", input_size=SIZE).model.train()
    training_step(lean, (images(),), loss)
    lean.place = "between"
    with pytest.raises(ComputedOtherwise):
        training_step(lean, (images(),), loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_with_weights_of_16_bits_are_no_false_alarm(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).to(dtype)
    nn.init.constant_(net[1].bias, -2)
    lean = make_lean(net, Plan(reading=Plan())).train()
    for _ in range(60):
        lean(torch.randn(2, 3, 8, 8, dtype=dtype)).float().square().mean().backward()


def test_versions_tell_of_a_write_to_a_norm() -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(x))
            h.detach().mul_(2)
            return self.head(h)

    torch.manual_seed(0)
    plain = Net("").double().train()
    assert_same_step(training_step(read(plain), (images(),), loss), training_step(plain, (images(),), loss), 1e-10)


def _clamp(output: Tensor) -> None:
    output.detach().clamp_(-0.2, 0.2)


def test_a_hook_that_writes_unseen_after_the_conversion() -> None:
    """Nothing says that it will: modules with hooks are left to the recorder."""
    plain = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.SiLU(), nn.Conv2d(C, C, 3)).double()
    lean = read(plain)
    assert is_read(lean)
    for net in (plain, lean):
        net[2].register_forward_hook(lambda module, args, output: _clamp(output))
    assert not is_read(lean)
    x = images()
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)


def test_writes_that_autograd_sees_are_not_hidden() -> None:
    with Writes() as writes:
        network("gated", "dropout", "bottleneck", "scales")(images())
    assert not writes.hidden


@pytest.mark.parametrize(
    "made",
    [
        *(lambda h, dim=dim: torch.cat([h, h.relu()], dim) for dim in (-1, -2, -3, -4, 0, 1)),
        lambda h: F.hardtanh(h, -2, -1),
        lambda h: F.leaky_relu(h, -1),
        lambda h: torch.add(h, h.relu(), alpha=-1),
    ],
)
def test_negative_numbers(made: Callable[[Tensor], Tensor]) -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return made(self.norm(self.conv(x))).square()

    torch.manual_seed(0)
    plain = Net("").double().train()
    assert_same_step(training_step(read(plain), (images(),), loss), training_step(plain, (images(),), loss), 1e-10)


class Named(torch.autograd.Function):
    """A user's function, with the name of an operator and another value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


Named.__name__ = "Relu"


def test_functions_of_users_are_not_read() -> None:
    class Net(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(Named.apply(self.norm(self.conv(x))))

    torch.manual_seed(0)
    plain = Net("").double().train()
    assert_same_step(training_step(read(plain), (images(),), loss), training_step(plain, (images(),), loss), 1e-10)


# --- lives, checkpoints, predictions ---------------------------------------------------------------------------------


def test_nothing_lives_longer_than_the_graph() -> None:
    net = read(network("bottleneck", "gated", "mlp", "scales"))
    gc.collect()
    gc.disable()  # no cycles: what is kept goes at once, not some time
    try:
        for backward in (True, False):
            y = net(images()).sum()
            assert _living(nodes.Node) > 0
            if backward:
                y.backward()
            del y
            assert _living(nodes.Node) == _living(Keeper) == 0
    finally:
        gc.enable()


def _living(kind: type) -> int:
    return sum(issubclass(type(one), kind) for one in gc.get_objects())


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpoints_inside(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = network("bottleneck"), network("gated"), network("scales")

        def forward(self, x: Tensor) -> Tensor:
            return self.third(checkpoint(self.second, self.first(x), use_reentrant=reentrant))

    plain = Net().train()
    assert_same_step(training_step(read(plain), (images(),), loss), training_step(plain, (images(),), loss), 1e-10)


def test_twice_backward_and_gradients_of_gradients() -> None:
    plain, x = network("bottleneck", "mlp"), images()
    found = []
    for net in (plain, read(plain)):
        y = net(x).square().mean()
        y.backward(retain_graph=True)
        first = torch.autograd.grad(y, list(net.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in first]).sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("width", [64, 256])
def test_a_prediction_is_what_a_step_takes(width: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, width, 1)]
    net = read(nn.Sequential(*layers, nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, 4, 1)))
    x = torch.randn(4, 3, 24, 24)
    before = sum(t.nbytes for t in (*net.parameters(), *net.buffers(), x))
    measured = measure_training_step(net, x).peak_bytes + before
    assert predict_training_step(net, x).peak_bytes == pytest.approx(measured, rel=0.01)


# --- how often something is computed again ----------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "least"), [(True, False), (False, True)], ids=["beside large maps", "alone"])
def test_small_sums_in_a_row_are_computed_once(large: bool, least: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them leads to the ones before; where they are much of what is kept, only some may stay meanwhile."""
    wide = nn.Sequential(*(nn.Conv2d(C, 4 * C, 1), nn.SiLU(), nn.Conv2d(4 * C, C, 1)) * (8 if large else 0))
    plain = nn.Sequential(wide, nn.AvgPool2d(2), network(*("bottleneck",) * 4)).float().train()
    again: list[int] = []
    of_batch = recipes.batch_norm
    monkeypatch.setattr(recipes, "batch_norm", lambda x, *rest: (again.append(x.nbytes), of_batch(x, *rest))[1])
    x = torch.randn(4, C, 64, 64)
    assert_same_step(training_step(read(plain), (x,), loss), training_step(plain, (x,), loss), 0)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert (len(again) > norms) is least
