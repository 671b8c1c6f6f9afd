"""``fit``: the fastest way to train a network within so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..profiling.fake import ProfileError
from ..profiling.fit import BYTES, parse_budget
from ..training.errors import shown
from ..training.options.values import check_choice
from .choices import BudgetError
from .compiled import measured_compiled
from .measure import measured_seconds
from .plan import Plan
from .planner import Planner
from .step import Step, make_inputs

TIMES = ("flops", "measure")


def fit(
    model: nn.Module,
    input_size: Sequence[int] | None,
    batch_size: int | None,
    budget: str | int,
    amp_dtype: torch.dtype | str | None = None,
    optimizer: Any = None,
    *,
    loss_fn: Callable[[Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    time: str = "flops",
    compile: bool = False,
    apply: bool = True,
    inputs: Any = None,
) -> Plan:
    """Let a network train within a budget of bytes, as fast as that allows, with the gradients it has anyway.

    The budget is for everything that tensors take at any moment of a training step: weights, buffers, gradients,
    optimizer state, input, activations, and what kernels need for a moment. An accelerator's context and what its
    allocator holds back come on top.

    Args:
        model: any network, neither wrapped (``DistributedDataParallel``) nor compiled yet.
        input_size: of one example, such as ``(3, 224, 224)``.
        batch_size: of a step.
        budget: ``"8GB"`` (10^9 bytes each), ``"8GiB"``, or a number of bytes.
        amp_dtype: that training autocasts to: ``torch.bfloat16``, ``"bf16"``; None for none.
        optimizer: a name of timm's (``"adamw"``), an optimizer of the model, or a function from a model to one; its
            state counts. None for none.
        loss_fn: from the model's output to a scalar; by default cross entropy of logits, else a mean of squares.
        device: to plan for; by default the model's. It need not be at hand.
        time: where seconds come from: ``"flops"`` and bytes of each operator, or ``"measure"``, a forward pass of the
            model on its device.
        compile: have plans by ``torch.compile`` beside the others: the network as a whole, with the share of its
            activations by which a measured step fits. Each share is compiled and run here, which takes minutes;
            compiled steps may be faster than plain ones, and round elsewhere.
        apply: change the model now; else ``plan.apply(model)`` does.
        inputs: what the model takes in place of ``input_size`` and ``batch_size``: a tensor, a tuple, a mapping.

    Raises:
        DoesNotFitError: when the least possible is more than the budget; says what it is and what would help.
        BudgetError: for a network that no plan can be made for.
        ProfileError: for a budget or a setting that means nothing.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)))
        >>> plan = fit(model, (64,), batch_size=512, budget="1.4MB")
        >>> plan.peak_bytes <= plan.budget < plan.plain_bytes
        True
    """
    allowed = as_bytes(budget)
    if inputs is None:
        if input_size is None or batch_size is None:
            raise BudgetError("input_size and batch_size: give both, or inputs")
        inputs = make_inputs(model, input_size, batch_size) if isinstance(model, nn.Module) else None
    else:
        batch_size = None
    planner = Planner(Step(model, inputs, amp_dtype, optimizer, loss_fn, device), batch_size)
    if check_choice("time", time, TIMES) == "measure":
        planner.measured = measured_seconds(model, planner.step)
    if compile:
        planner.compiled = measured_compiled(model, planner.step)
    plan = planner.plan(allowed)
    return plan if not apply else _applied(plan, model)


def _applied(plan: Plan, model: nn.Module) -> Plan:
    plan.apply(model)
    return plan


def as_bytes(budget: str | int) -> int:
    """A budget as a number of bytes.

    Raises:
        ProfileError: for what is none.
    """
    if isinstance(budget, str):
        return parse_budget(budget)
    try:
        return BYTES.check("budget", budget)
    except ValueError:
        raise ProfileError(
            f"budget={shown(budget)}: expected a size such as '8GB', or a whole number of bytes above 0"
        ) from None
