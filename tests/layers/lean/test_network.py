"""``lean`` keeps less and changes nothing: outputs, gradients, statistics, random numbers, copies, files, errors."""

import copy
import gc
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import revnets
from revnets.layers import convert, fold, is_lean, make_lean
from revnets.layers.lean import keeping
from revnets.layers.lean.network import keeper_of, kept_per_image, saves
from revnets.profiling.memory import measure_training_step
from revnets.profiling.predict import predict_training_step
from tests.helpers import assert_same_step, training_step

from .networks import BLOCKS, C, images, network


def loss(y: Tensor) -> Tensor:
    return (y.float() if y.dtype is torch.bfloat16 else y).square().mean()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd is asked to hold beside parameters and buffers, each storage once: counted without our code."""
    stays = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in stays:
            found[storage._cdata] = storage.nbytes(), tensor.detach()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(nbytes for nbytes, _ in found.values())


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    with keeper_of(model, to_the_end=True).active() as keeper:
        y = model(x)
    del y
    return keeper.kept


# --- nothing changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BLOCKS)
def test_same_step(name: str, layout: torch.memory_format) -> None:
    plain, x = network("bottleneck", name, "gated", name), images().to(memory_format=layout)
    plain.to(memory_format=layout)
    lean = make_lean(copy.deepcopy(plain))
    expected = training_step(plain, (x,), loss)
    assert_same_step(training_step(lean, (x,), loss), expected, 1e-10)
    assert kept_bytes(lean, x) < 0.9 * saved_bytes(plain, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_same_bits_in_float32(name: str) -> None:
    plain = network("bottleneck", name).float()
    lean = make_lean(copy.deepcopy(plain))
    x = images(dtype=torch.float32)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 0)


@pytest.mark.parametrize("name", BLOCKS)
def test_same_step_under_autocast(name: str) -> None:
    plain = network("bottleneck", name, "bottleneck").float()
    lean = make_lean(copy.deepcopy(plain))
    x = images(dtype=torch.float32)
    expected = training_step(plain, (x,), loss, autocast=True)
    assert_same_step(training_step(lean, (x,), loss, autocast=True), expected, 0)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_row_of_blocks(names: list[str], seed: int) -> None:
    plain = network(*names, seed=seed)
    lean = make_lean(copy.deepcopy(plain))
    expected = training_step(plain, (images(2),), loss, seed=seed)
    assert_same_step(training_step(lean, (images(2),), loss, seed=seed), expected, 1e-10)


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "relu": lambda x, y: x.relu(),
    "relu_": lambda x, y: (x + 0).relu_(),
    "silu_": lambda x, y: nn.functional.silu(x * 1, inplace=True),
    "add_": lambda x, y: (x * 2).add_(y),
    "half": lambda x, y: torch.cat([x[:, : C // 2].sigmoid(), y[:, C // 2 :].clone()], 1),
    "part in place": lambda x, y: _part_in_place(x * 2),
    "norm": lambda x, y: nn.functional.layer_norm(x, x.shape[1:]),
    "turn": lambda x, y: x.transpose(2, 3).contiguous().transpose(2, 3),
    "where": lambda x, y: torch.where(x > 0, x, y * 0.1),
    "pool": lambda x, y: nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2.0),
}


def _part_in_place(x: Tensor) -> Tensor:
    x[:, 1:].mul_(0.5).tanh_()
    return x


class Random(nn.Module):
    """Operators on any two earlier results, with a convolution after each third."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 1) for _ in steps[::3])

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for place, (name, a, b) in enumerate(self.steps):
            y = OPS[name](results[a % len(results)], results[b % len(results)])
            results.append(self.convs[place // 3](y) if place % 3 == 0 else y)
        return torch.stack(results[-3:]).mean(0)


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 5), st.integers(0, 20)), min_size=2, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_flow_of_data(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    plain = Random(steps).double().train()
    lean = make_lean(copy.deepcopy(plain))
    expected = training_step(plain, (images(2),), loss)
    assert_same_step(training_step(lean, (images(2),), loss), expected, 1e-10)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_networks_of_timm(name: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10, drop_path_rate=0.1).train()
    lean = convert(copy.deepcopy(plain), "lean").model.train()
    assert list(lean.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 160, 160)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 0)


def test_networks_of_torchvision() -> None:
    from torchvision.models import mobilenet_v3_small
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    plain = mobilenet_v3_small(num_classes=10).train()
    x = torch.randn(2, 3, 64, 64)
    lean = convert(copy.deepcopy(plain), "lean", input_size=(3, 64, 64)).model.train()
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 0)
    features = create_feature_extractor(plain, ["features.3", "avgpool"]).train()
    lean = make_lean(copy.deepcopy(features))
    assert is_lean(lean)

    def of_features(ys: dict[str, Tensor]) -> Tensor:
        return torch.stack([y.square().mean() for y in ys.values()]).sum()

    assert_same_step(training_step(lean, (x,), of_features), training_step(features, (x,), of_features), 0)


# --- tensors changed in place ----------------------------------------------------------------------------------------


class Changed(nn.Module):
    """Changes a tensor after it was used."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.which = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), which

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        h = self.norm(z).relu()
        y = self.head(h)
        if self.which:
            {"z": z, "h": h}[self.which].detach().mul_(2)
        return y


def test_a_kept_tensor_that_was_changed_is_an_error() -> None:
    net = make_lean(Changed("z")).train()
    y = net(images(dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor of shape .3, 8, 16, 16"):
        y.sum().backward()


def test_a_dropped_tensor_that_was_changed_comes_back_as_it_was() -> None:
    torch.manual_seed(0)
    net = make_lean(Changed("h")).double().train()
    expected = copy.deepcopy(net)
    expected.which = ""
    assert_same_step(training_step(net, (images(),), loss), training_step(expected, (images(),), loss), 1e-10)


def test_parameters_that_change_before_the_backward_pass_are_an_error() -> None:
    net = make_lean(network("mlp"))
    y = net(images())
    with torch.no_grad():
        net[0].scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- what else autograd can do ---------------------------------------------------------------------------------------


def test_twice_backward_and_gradients_of_gradients() -> None:
    plain, x = network("bottleneck", "mlp", "scales"), images()
    lean = make_lean(copy.deepcopy(plain))
    found = []
    for net in (plain, lean):
        y = net(x).square().mean()
        y.backward(retain_graph=True)
        first = torch.autograd.grad(y, list(net.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in first]).sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))


def test_nothing_lives_longer_than_the_graph() -> None:
    net = make_lean(network("bottleneck", "gated", "mlp", "scales"))
    gc.collect()
    gc.disable()  # no cycles: what is kept goes at once, not some time
    try:
        for backward in (True, False):
            y = net(images()).sum()
            assert living_nodes() > 0
            if backward:
                y.backward()
            del y
            assert living_nodes() == 0
    finally:
        gc.enable()


def living_nodes() -> int:
    return sum(type(one) is keeping.Node for one in gc.get_objects())


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpoints_inside(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = network("bottleneck"), network("dropout"), network("scales")

        def forward(self, x: Tensor) -> Tensor:
            return self.third(checkpoint(self.second, self.first(x), use_reentrant=reentrant))

    plain = Net().train()
    lean = make_lean(copy.deepcopy(plain))
    assert_same_step(training_step(lean, (images(),), loss), training_step(plain, (images(),), loss), 1e-10)


def test_checkpoints_of_timm() -> None:
    plain = timm.create_model("test_resnet", num_classes=10).train()
    lean = make_lean(copy.deepcopy(plain))
    lean.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    got, expected = training_step(lean, (x,), loss), training_step(plain, (x,), loss)
    assert_same_step(got, training_step(_checkpointed(plain), (x,), loss), 0)
    assert all(torch.allclose(got.grads[n], g, rtol=1e-4, atol=1e-5) for n, g in expected.grads.items())


def _checkpointed(model: Any) -> nn.Module:
    fresh: Any = timm.create_model("test_resnet", num_classes=10).train()
    fresh.load_state_dict(model.state_dict())
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    fresh.set_grad_checkpointing()
    return fresh


def test_others_hooks_decide_first() -> None:
    net = make_lean(network("bottleneck"))
    assert saves(net)
    with save_on_cpu():
        assert not saves(net)
        net(images()).sum().backward()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not saves(net)


def test_not_in_evaluation() -> None:
    net = make_lean(network("bottleneck"))
    for context in (torch.no_grad(), nullcontext()):
        with context:
            net.train(isinstance(context, torch.no_grad))
            assert not saves(net)
    exported = torch.export.export(net.eval(), (images(),))
    assert torch.allclose(exported.module()(images()), net(images()))


def test_functional_transforms_and_compilers_take_the_plain_path() -> None:
    net = make_lean(network("mlp"))
    parameters = dict(net.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, (images(),)).sum())(parameters)
    net(images()).sum().backward()
    assert all(torch.allclose(grads[name], p.grad) for name, p in parameters.items())
    y = torch.compile(net, backend="aot_eager")(images())
    assert torch.allclose(y, net(images()))


# --- the same class, the same files ----------------------------------------------------------------------------------


def test_copies_pickles_and_checkpoints() -> None:
    plain = timm.create_model("test_resnet", num_classes=10)
    lean = make_lean(copy.deepcopy(plain))
    assert type(lean).__qualname__ == "ResNet"
    assert isinstance(lean, type(plain))
    assert repr(lean) == repr(plain)
    assert make_lean(lean) is lean
    file = io.BytesIO()
    torch.save(lean, file)
    file.seek(0)
    for other in (copy.deepcopy(lean), torch.load(file, weights_only=False)):
        assert is_lean(other)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True))
        plain.load_state_dict(other.state_dict())
        other.load_state_dict(plain.state_dict())
    assert not is_lean(plain)


def test_hooks_and_frozen_parts() -> None:
    plain = network("bottleneck", "gated", "mlp")
    plain[0].requires_grad_(False)
    lean = make_lean(copy.deepcopy(plain))
    seen: list[str] = []
    lean.register_forward_pre_hook(lambda module, args: seen.append("before"))
    lean[1].norm.register_forward_hook(lambda module, args, y: seen.append("norm"))
    lean[1].project.register_full_backward_hook(lambda module, before, after: seen.append("back"))
    expected = training_step(plain, (images(),), loss)
    assert_same_step(training_step(lean, (images(),), loss), expected, 1e-10)
    assert seen == ["before", "norm", "back"]


# --- conversion ------------------------------------------------------------------------------------------------------


def test_report() -> None:
    model = timm.create_model("test_resnet")
    report = convert(model, "lean")
    assert report.model is model
    assert [c.name for c in report.converted] == [""]
    assert report.converted[0].note.startswith("keeps ")
    assert not report.skipped
    assert report.after == report.before
    again = convert(model, "lean")
    assert [(s.name, s.reason) for s in again.skipped] == [("", "it is lean already")]


def test_what_cannot_keep_less_says_so() -> None:
    report = convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "lean", input_size=(8,))
    assert [s.reason for s in report.skipped] == ["nothing that it keeps is cheap to compute again from the rest"]
    assert not is_lean(report.model)
    report = convert(nn.Linear(8, 8), "lean", input_size=(8,))
    assert report.skipped
    assert not report.converted
    for wrapped in (torch.jit.script(network("mlp").float()), nn.DataParallel(network("mlp").float())):
        with pytest.raises(ValueError, match=r"lean: .* convert it before|does not run"):
            convert(wrapped, "lean", input_size=(C, 16, 16))


def test_the_filter_chooses_parts() -> None:
    model = network("bottleneck", "gated", "mlp").float()
    report = convert(model, "lean", filter=lambda layer, name: not name.startswith("1."), input_size=(C, 16, 16))
    assert [c.name for c in report.converted] == ["0", "2"]
    assert {s.name for s in report.skipped} == {"1.expand", "1.gate", "1.project"}
    assert [is_lean(module) for module in model] == [True, False, True]


@pytest.mark.parametrize("spec", ["sparse:0.5+lean", "lean+sparse:0.5", "mus+lean", "sparse_parallel:0.5+lean"])
def test_with_other_layers(spec: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10)
    model = convert(model, spec, input_size=(3, 64, 64)).model.train()
    plain = copy.deepcopy(model)
    assert is_lean(model)
    plain.__class__ = type(model)._plain_class
    x = torch.randn(2, 3, 64, 64)
    assert_same_step(training_step(model, (x,), loss), training_step(plain, (x,), loss), 1e-5)
    assert kept_bytes(model, x) < 0.6 * saved_bytes(plain, x)
    assert fold(model)(x).shape == (2, 10)


@pytest.mark.parametrize("mode", revnets.reversible.MODES)
def test_in_reversible_networks(mode: str) -> None:
    plain = timm.create_model("test_revbifpn", num_classes=10).train()
    lean = timm.create_model("test_revbifpn", num_classes=10, layers="lean").train()
    lean.load_state_dict(plain.state_dict())
    assert is_lean(lean)
    x = torch.randn(2, 3, 64, 64)
    assert_same_step(training_step(lean, (x,), loss, mode), training_step(plain, (x,), loss, mode), 1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------

SHARES = {
    "resnet50": 0.55,
    "efficientnet_b0": 0.55,
    "mobilenetv3_large_100": 0.55,
    "regnety_016": 0.55,
    "hrnet_w18": 0.55,
    "convnext_tiny": 0.7,
    "vit_small_patch16_224": 0.7,
    "swin_tiny_patch4_window7_224": 0.7,
}
QUICK = ["resnet50", "mobilenetv3_large_100", "vit_small_patch16_224"]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHARES])
def test_bytes_kept(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).train()
        x = torch.empty(2, 3, 224, 224)
    plain = saved_bytes(model, x)
    found = kept_per_image(model, (3, 224, 224))
    assert found is not None
    assert found.plain * 2 == pytest.approx(plain, rel=1e-3)
    assert found.lean <= SHARES[name] * found.plain


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SHARES)
def test_measured_peak(name: str, channels_last: bool) -> None:
    from revnets.profiling.bench.timing import make_cases, run
    from revnets.profiling.target import Setting

    setting = Setting(channels_last=channels_last, optimizer=None)
    plain, lean = run(make_cases([f"{name}@224:8"], "plain,lean", setting), setting, repeats=1)
    print(f"\n{name}: {plain.bytes_per_sample / 1e6:.1f} MB per image plain, {lean.bytes_per_sample / 1e6:.1f} lean")
    assert lean.bytes_per_sample <= SHARES[name] * plain.bytes_per_sample


@pytest.mark.parametrize("width", [64, 256])
def test_a_prediction_is_what_a_step_takes(width: int) -> None:
    """A trace's weights are fake tensors; their vectors are no small change from 256 channels on."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, width, 1)]
    net = make_lean(nn.Sequential(*layers, nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, 4, 1)))
    x = torch.randn(4, 3, 24, 24)
    before = sum(t.nbytes for t in (*net.parameters(), *net.buffers(), x))
    measured = measure_training_step(net, x).peak_bytes + before
    assert predict_training_step(net, x).peak_bytes == pytest.approx(measured, rel=0.01)
