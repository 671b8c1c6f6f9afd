"""Plans: the network computes what it computed, within the bytes that were asked for."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.budget import BudgetError, Plan
from revnets.budget.plan import BlockPlan
from revnets.budget.planner import Planner
from revnets.budget.step import Step, make_inputs
from revnets.layers.lean.network import keeper_of, plan_in
from revnets.layers.lean.reading import Reader
from revnets.profiling.fit import DoesNotFitError
from revnets.profiling.memory import measure_training_step
from revnets.profiling.predict import summarize
from revnets.profiling.target import training_loss
from tests.budget.networks import NETWORKS, make

ALL = [name if name != "test_revbifpn" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


def one_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step, and where the generator stands."""
    torch.manual_seed(3)
    y = model(x)
    training_loss(y).backward()
    found = {"output": y.detach(), "generator": torch.rand(3)}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


@functools.cache
def known(name: str) -> Planner:
    """What is known of the steps of a network: it takes seconds to find out."""
    model, size = make(name)
    return Planner(Step(model, make_inputs(model, size, 4)), 4)


def planner(name: str) -> tuple[nn.Module, Tensor, Planner]:
    """A network in training, images, and its planner."""
    model, size = make(name)
    return model, torch.randn(4, *size), known(name)


def budgets(planned: Planner, *shares: float) -> list[int]:
    """From the least possible (0) to what needs no plan (1)."""
    least, most = planned.needed(planned.least()), planned.needed(planned.plain)
    return [int(least + share * (most - least)) for share in shares]


@pytest.mark.parametrize("name", ALL)
def test_a_step_within_a_budget_is_the_plain_step(name: str) -> None:
    plain = None
    for budget in budgets(known(name), 0.0, 0.4):
        model, x, planned = planner(name)
        model, x = model.double(), torch.linspace(-1, 1, x.numel(), dtype=torch.float64).sin().view_as(x)
        plain = plain or one_step(copy.deepcopy(model), x)
        plan = planned.plan(budget)
        assert any(block.choice != "store" for block in plan.blocks) or plan.mode != "store"
        found = one_step(plan.apply(model), x)
        assert found.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ALL)
def test_the_measured_peak_is_the_plans_and_below_the_budget(name: str) -> None:
    model, x, planned = planner(name)
    peaks = []
    for budget in budgets(planned, 0.0, 0.3, 0.7, 1.0):
        plan = planned.plan(budget)
        plan.apply(model)
        peak = measure_training_step(model, x, training_loss).peak_bytes + planned.plain.predicted.resident_bytes
        assert peak <= budget
        assert peak == pytest.approx(plan.peak_bytes, rel=0.05)
        peaks.append(peak)
    assert peaks == sorted(peaks)
    with pytest.raises(DoesNotFitError):
        planned.plan(budgets(planned, 0.0)[0] - 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_watched_is_the_step_itself(name: str) -> None:
    """Layers of ours that fuse what nobody looks at took another way under the eyes of the planner."""
    model, size = make(name)
    step = Step(model, make_inputs(model, size, 4))
    mode = "store" if step.has_modes else None
    assert summarize(step.watched({}, mode).trace, 0).peak_bytes == step.predicted({}, mode).peak_bytes


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet"])
def test_lean_blocks_read_autograds_graph_where_it_shows_enough(name: str, tmp_path: Path) -> None:
    """To look at every operator takes longer."""
    model, _, planned = planner(name)
    plan = planned.plan(planned.needed(planned._try(planned._all("lean"))))
    assert plan.reads
    assert "lean" in plan.choices.values()
    Plan.load(plan.save(tmp_path / "plan.json")).apply(model)
    lean = [module for module in model.modules() if plan_in(module) is not None]
    assert lean
    assert all(type(keeper_of(module)) is Reader for module in lean)
    with pytest.raises(BudgetError):
        dataclasses.replace(plan, blocks=(*plan.blocks, BlockPlan("nowhere", "lean", 0, 0, 0.0))).apply(model)
    assert [module for module in model.modules() if plan_in(module) is not None] == lean
    plan.undo(model)
    assert not any(plan_in(module) for module in model.modules())
    amp = Step(model, make_inputs(model, (3, 64, 64), 4), "bf16")
    assert not amp.reads


class Writes(nn.Module):
    """A block that writes to a result behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        h = torch.nn.functional.gelu(self.blocks(x))
        h.detach().mul_(2)
        return h * h.sigmoid()


def test_where_something_is_written_unseen_every_operator_is_looked_at() -> None:
    model = Writes()
    step = Step(model, torch.randn(512, 64))
    assert not step.reads
    assert not Planner(step).plan(10**9).reads


def test_fit_in_three_lines() -> None:
    model, size = make("test_resnet")
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    plan = revnets.fit(model, size, batch_size=8, budget="12MB", optimizer="adamw")
    assert plan.peak_bytes <= 12_000_000 < plan.plain_bytes
    assert plan.batch_size == 8
    assert list(model.state_dict()) == keys
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    text = str(plan)
    assert all((block.name or "all the rest") in text and block.choice in text for block in plan.blocks)
    assert plan.undo(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_what_fits_anyway_is_left_alone() -> None:
    model, size = make("test_resnet")
    kinds = [type(m) for m in model.modules()]
    plan = revnets.fit(model, size, 2, 10**9)
    assert plan.choices == {}
    assert plan.peak_bytes == plan.plain_bytes
    assert [type(m) for m in model.modules()] == kinds


def test_a_planned_network_evaluates_as_before() -> None:
    model, x, planned = planner("test_resnet")
    before = model.eval()(x)
    planned.plan(*budgets(planned, 0.0)).apply(model)
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
    with torch.no_grad():
        model.train()(x)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_keep_the_plan(twin_of: Callable[[Any], Any]) -> None:
    model, x, planned = planner("test_resnet")
    plan = planned.plan(*budgets(planned, 0.0))
    plan.apply(model)
    twin = twin_of(model)
    peak = measure_training_step(twin, x, training_loss).peak_bytes
    assert peak + planned.plain.predicted.resident_bytes <= plan.budget


def test_another_plan_takes_the_place_of_the_first() -> None:
    model, size = make("test_vit")
    first = revnets.fit(model, size, 4, "5.4MB")
    second = revnets.fit(model, size, 4, 10**9)
    assert first.choices
    assert not second.choices
    assert second.plain_bytes == first.plain_bytes
    assert type(model) is type(make("test_vit")[0])


def test_a_plan_on_a_disk_is_the_same_plan(tmp_path: Any) -> None:
    model, size = make("test_efficientnet")
    plan = revnets.fit(model, size, 4, "12MB", apply=False)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.draw(tmp_path / "plan.png").stat().st_size > 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "blocks": [{"name": "a"}]}'], ids=lambda t: t or "empty"
)
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(BudgetError, match=r"holds no plan"):
        Plan.load(path)


def test_autocast_and_optimizer_state_count() -> None:
    model, size = make("test_resnet")
    plain = revnets.fit(model, size, 8, 10**9, apply=False)
    amp = revnets.fit(model, size, 8, 10**9, amp_dtype="bf16", apply=False)
    adam = revnets.fit(model, size, 8, 10**9, optimizer=torch.optim.Adam(model.parameters()), apply=False)
    parameters = sum(p.nbytes for p in model.parameters())
    assert amp.peak_bytes < plain.peak_bytes
    assert adam.peak_bytes >= plain.peak_bytes + 2 * parameters - 100


def test_time_may_be_measured() -> None:
    model, size = make("test_resnet")
    before = {name: b.clone() for name, b in model.named_buffers()}
    generator = torch.get_rng_state()
    plan = revnets.fit(model, size, 8, "11MB", time="measure", apply=False)
    assert plan.plain_seconds > 0
    assert torch.equal(torch.get_rng_state(), generator)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]), name


def test_what_cannot_fit_says_by_how_much_and_what_would() -> None:
    model, size = make("test_resnet")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(DoesNotFitError) as caught:
        revnets.fit(model, size, 32, "4MB")
    message = str(caught.value)
    assert "needs at least" in message
    batch = int(message.split("batch ")[-1].split()[0])
    assert 1 <= batch < 32
    assert "steps of accumulation" in message
    assert [type(m) for m in model.modules()] == kinds
    assert revnets.fit(model, size, batch, "4MB").peak_bytes <= 4_000_000
    with pytest.raises(DoesNotFitError, match="a batch of 1 needs"):
        revnets.fit(model, size, 32, "100KB")


class Values(nn.Module):
    """Its shapes depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[x > 0].repeat(8).view(-1, 8))


def lean() -> nn.Module:
    model = make("test_resnet")[0]
    revnets.convert(model, "lean")
    return model


def checkpointed() -> nn.Module:
    model = make("test_resnet")[0]
    model.set_grad_checkpointing(True)
    return model


@pytest.mark.parametrize(
    ("model", "budget", "said"),
    [
        (lambda: make("test_resnet")[0], "8 bananas", "budget '8 bananas'"),
        (lambda: make("test_resnet")[0], -5, "budget=-5"),
        (lambda: make("test_resnet")[0], 8.5, r"budget=8.5"),
        (lambda: torch.compile(make("test_resnet")[0]), "1GB", "compiled: fit the network before torch.compile"),
        (lambda: nn.DataParallel(make("test_resnet")[0]), "1GB", "wraps the network: fit model.module"),
        (Values, "1GB", "cannot be traced, so no plan can be made"),
        (lean, "1GB", "is lean already"),
        (checkpointed, "1GB", r"set_grad_checkpointing\(False\)"),
        (lambda: "resnet50", "1GB", "expected an nn.Module"),
        (lambda: nn.Linear(7, 7), "1GB", "cannot be traced"),
    ],
    ids=["unit", "negative", "fraction", "compiled", "wrapped", "values", "lean", "checkpointed", "text", "shape"],
)
def test_what_cannot_be_planned_is_named_in_one_sentence(model: Any, budget: Any, said: str) -> None:
    given = model()
    kinds = [type(m) for m in given.modules()] if isinstance(given, nn.Module) else []
    with pytest.raises(ValueError, match=said) as caught:
        revnets.fit(given, (3, 32, 32), 4, budget)
    assert "\n" not in str(caught.value)
    assert kinds == ([type(m) for m in given.modules()] if kinds else [])


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [((3, 0, 32), 4), ((), 4), ((3, 32, 32), 0), (None, 4)],
    ids=["zero", "none", "batch", "missing"],
)
def test_sizes_that_are_none_are_refused(sizes: Any, batch: Any) -> None:
    with pytest.raises(BudgetError, match="input_size"):
        revnets.fit(make("test_resnet")[0], sizes, batch, "1GB")


def test_a_plan_for_another_network_changes_nothing() -> None:
    model, size = make("test_resnet")
    plan = revnets.fit(model, size, 8, "11MB", apply=False)
    other = make("test_vit")[0]
    mine = revnets.fit(other, make("test_vit")[1], 4, "5.4MB")
    kinds = [type(m) for m in other.modules()]
    with pytest.raises(BudgetError, match="the plan is for another network"):
        plan.apply(other)
    assert [type(m) for m in other.modules()] == kinds
    assert mine.choices


def test_an_exception_in_the_middle_leaves_nothing_behind() -> None:
    model, x, planned = planner("test_resnet")
    planned.plan(*budgets(planned, 0.0)).apply(model)
    handle = model.layer3.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    plain = make("test_resnet")[0]
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(one_step(model, x)["output"], one_step(plain, x)["output"])


def test_it_trains(tmp_path: Any) -> None:
    model, size = make("test_resnet")
    revnets.fit(model, size, 8, "11MB", optimizer="sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(8, *size), torch.arange(8) % 10
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_timm_makes_the_network_and_knows_it_again() -> None:
    model, size = make("test_resnet")
    revnets.fit(model, size, 8, "11MB")
    other = timm.create_model("test_resnet", num_classes=10)
    other.load_state_dict(model.state_dict())
