"""Training steps on every device there is: GPUs have other kernels, generators and streams, and the same promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnets.models.revbifpn import RevBiFPN
from revnets.reversible import MODES, RangeError
from tests.helpers import StepResult, assert_same_step, generator_state, training_step
from tests.reversible.graphs import build, cubic


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Whatever has a deterministic version is run by it; bilinear upsampling on GPUs has one in this way only."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def network(device: torch.device, **kwargs: object) -> RevBiFPN:
    torch.manual_seed(0)
    options = {"width": 1 / 3, "num_classes": 5, "stem_stride": 2, "extra_silos": 1, **kwargs}
    return RevBiFPN(**options).to(device).train()  # type: ignore[arg-type]


def images(device: torch.device, channels_last: bool = False) -> Tensor:
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def mean_square(y: Tensor) -> Tensor:
    return y.float().square().mean()


def distance(found: StepResult, expected: StepResult) -> float:
    """Of all gradients and statistics together, relative."""
    ours, theirs = (
        torch.cat([t.double().flatten() for t in (*r.grads.values(), *r.buffers.values()) if t is not None])
        for r in (found, expected)
    )
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_exact_mode_is_equal_to_the_bit(
    device: torch.device, channels_last: bool, autocast: torch.dtype | None
) -> None:
    model, x = network(device, drop_path_rate=0.2, drop_rate=0.2), images(device, channels_last)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    before = {name: b.clone() for name, b in model.named_buffers()}
    found: dict[str, StepResult] = {}
    for mode in ("store", "store", "reversible", "checkpoint"):  # twice: else the kernels differ, not the modes
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        result = training_step(model, (x,), mean_square, mode, autocast=autocast)
        if found:
            assert_same_step(result, found["store"], 0)
        found[mode] = result


@pytest.mark.parametrize("kind", ["dropout", "drop_path"])
def test_generators_are_replayed(device: torch.device, kind: str) -> None:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    found = {mode: training_step(build([1, 2, 2], [kind], exact=True).to(device), (x,), cubic, mode) for mode in MODES}
    torch.manual_seed(0)
    assert not torch.equal(generator_state(device), found["store"].rng), "nothing was drawn"
    for result in found.values():
        assert_same_step(result, found["store"], 0)


@pytest.mark.parametrize("mode", MODES)
def test_the_range_is_checked(device: torch.device, mode: str) -> None:
    chain = build([1, 2], ["conv"], exact=True).to(device)
    chain.mode = mode
    chain.ops[1].ops[0].f = nn.Conv2d(2, 2, 1).to(device)  # type: ignore[union-attr, index]
    nn.init.constant_(chain.ops[1].ops[0].f.weight, 3000.0)  # type: ignore[union-attr, index, arg-type]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    sentence = pytest.raises(RangeError, match=r"op 1.*\|output\| reaches .* beyond the range ±512 .*: pass exact=")
    if device.type == "cpu":
        with sentence:
            chain(x)
    else:  # the forward pass does not wait for the device
        loss = cubic(chain(x))
        with sentence:
            loss.backward()


def test_layouts_give_the_same(device: torch.device) -> None:
    model = network(device)
    expected = training_step(model, (images(device),), mean_square, "store")
    model = network(device).to(memory_format=torch.channels_last)
    x = images(device, channels_last=True)
    found = training_step(model, (x,), mean_square, "reversible")
    assert distance(found, expected) < 1e-2
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in model.forward_pyramid(x))


def test_float16_with_a_gradient_scaler(device: torch.device) -> None:
    """A step that counts and one whose gradients overflow and which is left out: the same in all modes."""
    found = {}
    for mode in MODES:
        model, x = network(device), images(device)
        model.set_mode(mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        start = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**120)
        scales = [scaler.get_scale()]
        after = []
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.float16):
                loss = mean_square(model(x))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(new_scale=2.0**10 if len(scales) == 1 else None)
            scales.append(scaler.get_scale())
            after.append([p.detach().clone() for p in model.parameters()])
        assert all(map(torch.equal, after[0], start)), "the step that overflowed counted"
        assert not all(map(torch.equal, after[1], start)), "the other did not"
        found[mode] = after[1]
    for mode in MODES:
        assert all(map(torch.equal, found[mode], found["store"])), mode


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream beside the one that everything runs on by default."""
    if device.type == "cpu":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["both", "forward", "backward"])
def test_passes_on_a_side_stream(device: torch.device, mode: str, where: str) -> None:
    """Memory that one stream gives back must not be taken by another too early: many steps, one result."""
    grads = []
    for aside in (False, True):
        model, x = network(device), images(device)
        model.set_mode(mode)
        for _ in range(3 if device.type == "cuda" else 1):
            model.zero_grad(set_to_none=True)
            with side_stream(device) if aside and where != "backward" else nullcontext():
                loss = mean_square(model(x))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            with side_stream(device) if aside and where != "forward" else nullcontext():
                loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


@pytest.fixture
def one_process(device: torch.device, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("norm", ["own", "synchronised"])
@pytest.mark.usefixtures("one_process")
def test_one_process_of_ddp(device: torch.device, norm: str) -> None:
    if norm == "synchronised" and device.type == "cpu":
        pytest.skip("torch's SyncBatchNorm needs a GPU")
    alone = {mode: training_step(network(device), (images(device),), mean_square, mode) for mode in MODES}
    for mode in MODES:
        model: nn.Module = network(device)
        if norm == "synchronised":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.set_mode(mode)  # type: ignore[operator]
        found = training_step(DistributedDataParallel(model), (images(device),), mean_square)
        found.grads = {name.removeprefix("module."): grad for name, grad in found.grads.items()}
        found.buffers = {name.removeprefix("module."): buffer for name, buffer in found.buffers.items()}
        if norm == "own":
            assert_same_step(found, alone[mode], 0)
        else:
            assert distance(found, alone[mode]) < 1e-2
