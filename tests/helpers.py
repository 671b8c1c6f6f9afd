"""What several tests need: one training step as plain data, and comparisons of such steps."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import revnets

guards_work = pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0) and torch.__version__ < "2.10",
    reason="torch 2.9's guards do not see attributes that change under Python 3.13.0",
)


@dataclass
class StepResult:
    """Everything that a training step leaves behind."""

    loss: Tensor
    input_grads: list[Tensor | None]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    rng: Tensor


def training_step(
    model: nn.Module,
    xs: tuple[Tensor, ...],
    loss_fn: Callable[..., Tensor],
    mode: str | None = None,
    seed: int = 0,
    autocast: bool | torch.dtype | None = None,
) -> StepResult:
    """One forward and backward pass from the same generator state, gradients of inputs included.

    ``autocast`` to a type, or to bfloat16 where it is True.
    """
    device = xs[0].device
    dtype = autocast if isinstance(autocast, torch.dtype) else torch.bfloat16
    if mode is not None:
        revnets.set_mode(model, mode)
    model.zero_grad(set_to_none=True)
    inputs = tuple(x.clone().requires_grad_() for x in xs)
    torch.manual_seed(seed)
    with torch.autocast(device.type, dtype=dtype, enabled=bool(autocast)):
        outputs = model(*inputs)
    loss = loss_fn(outputs)
    loss.backward()
    return StepResult(
        loss.detach(),
        [x.grad for x in inputs],
        {name: p.grad for name, p in model.named_parameters()},
        {name: b.clone() for name, b in model.named_buffers()},
        generator_state(device),
    )


def generator_state(device: torch.device) -> Tensor:
    """Of the device's generator."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def assert_same_step(got: StepResult, expected: StepResult, relative: float) -> None:
    """Loss and gradients within ``relative`` (0: to the bit); statistics and generator state likewise.

    Errors are relative to the largest value of the tensor, or, for tensors whose true gradient is zero (a bias before
    a batch norm), to the largest gradient of the step.
    """
    grads = [g for g in expected.grads.values() if g is not None]
    scale = max((g.abs().max().item() for g in grads), default=1.0)
    pairs = {"loss": (got.loss, expected.loss)}
    pairs |= {f"grad of {n}": (got.grads[n], expected.grads[n]) for n in expected.grads}
    pairs |= {f"grad of input {i}": p for i, p in enumerate(zip(got.input_grads, expected.input_grads, strict=True))}
    pairs |= {f"buffer {n}": (got.buffers[n], expected.buffers[n]) for n in expected.buffers}
    for what, (a, b) in pairs.items():
        if a is None or b is None:
            assert a is b, f"{what}: only one side has it"
        elif relative == 0:
            assert torch.equal(a, b), f"{what} differs by {(a.double() - b.double()).abs().max()}"
        else:
            error = (a.double() - b.double()).abs().max().item()
            floor = 1e-6 * scale if what.startswith("grad") else 0.0
            assert error <= relative * max(b.double().abs().max().item(), floor), f"{what} differs by {error}"
    assert torch.equal(got.rng, expected.rng), "the generator state after the step differs"
