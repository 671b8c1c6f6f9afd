"""Plans by ``torch.compile``: by bytes that were measured, on a network that stays as it was."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import revnets
from revnets.budget import BudgetError, Plan, choices
from revnets.budget.choices import is_planned
from revnets.budget.compiled import SHARES, Compiled, measured_compiled
from revnets.budget.plan import Timeline
from revnets.budget.planner import Planner
from revnets.budget.step import Step, make_inputs
from revnets.budget.table import curve
from revnets.cli import app
from revnets.profiling.bench.peers import COMPILED_PLAN, PLANNED, read_target
from revnets.profiling.fit import DoesNotFitError
from revnets.profiling.memory import measure_training_step
from revnets.profiling.target import Setting, training_loss
from tests.budget.networks import make
from tests.budget.test_fit import one_step


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Puts a backend in place that changes nothing; the shares under which it was called."""
    shares: list[float] = []

    def eager(graph: Any, inputs: Any) -> Any:
        shares.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
    return shares


def measured() -> Callable[[Any], list[Compiled]]:
    """Peaks that are shares of plain's, and times that are shares of plain's, as if they had been measured."""

    def measure(figures: Any, mode: str | None) -> list[Compiled]:
        made = []
        for share, (peak, ratio) in zip(SHARES, ((0.9, 0.8), (0.8, 0.85), (0.7, 0.9), (0.65, 1.1)), strict=True):
            resident, extra = figures.resident, figures.peak - figures.resident
            highest = int(resident + peak * extra)
            made.append(
                Compiled(share, resident, highest, int(extra / 2), ratio, Timeline((resident, highest, resident), 1, 3))
            )
        return made

    return measure


def planner(name: str = "flat") -> Planner:
    model, size = make(name)
    found = Planner(Step(model, make_inputs(model, size, 4)), 4)
    found.compiled = measured()
    return found


def test_the_fastest_that_fits_is_taken_and_a_lower_budget_has_no_higher_peak() -> None:
    planned = planner()
    least, most = planned.needed(planned.least()), planned.needed(planned.plain)
    plans = [planned.plan(int(least + k / 12 * (most - least))) for k in range(13)]
    assert [plan.peak_bytes for plan in plans] == sorted(plan.peak_bytes for plan in plans)
    assert all(plan.peak_bytes <= plan.budget for plan in plans)
    assert plans[-1].choices == {"": "compile:1"}
    assert plans[-1].seconds < 0
    assert not plans[0].is_compiled  # none fits
    assert [plan.seconds for plan in plans] == sorted((plan.seconds for plan in plans), reverse=True)
    assert not any(planned.plan(plan.budget, compiled=False).is_compiled for plan in plans)
    with pytest.raises(DoesNotFitError):
        planned.plan(least // 2)


@pytest.mark.parametrize("name", ["flat", "test_convnext"])
def test_a_compiled_plan_computes_the_same_and_goes_away(name: str, compiler: list[float], tmp_path: Path) -> None:
    model, size = make(name)
    model, x = model.double(), torch.randn(4, *size, dtype=torch.float64)
    plain = one_step(copy.deepcopy(model), x)
    plan = planner(name).plan(10**9)
    plan = Plan.load(plan.save(tmp_path / "plan.json")) if name == "flat" else plan
    for key, value in one_step(plan.apply(model), x).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-10, atol=1e-12, msg=key)
    assert compiler == [1.0]
    assert "compile:1" in str(plan)
    assert "the network" in str(plan)
    model.eval()(x)  # the compiler takes part in training only
    assert compiler == [1.0]
    plan.undo(model)
    model.train()(x).sum().backward()
    assert compiler == [1.0]
    assert not is_planned(model)


def test_what_is_measured_leaves_the_model_alone(compiler: list[float]) -> None:
    model, size = make("flat")
    model.eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = copy.deepcopy(model)
    torch.manual_seed(0)
    planned = Planner(Step(model, make_inputs(model, size, 4)), 4)
    found = measured_compiled(model, planned.step, (1.0, 0.5))(planned.figures["store"], None)
    assert [one.share for one in found] == sorted(compiler, reverse=True) == [1.0, 0.5]
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(0)))
    for one, other in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert not any(module.training or is_planned(module) for module in model.modules())
    for one in found:  # of a compiler that changes nothing: plain's
        assert one.peak_bytes == pytest.approx(planned.plain.predicted.peak_bytes, rel=0.01)
        assert one.resident_bytes < one.resident_bytes + one.kept_bytes < one.peak_bytes
        assert max(one.timeline.nbytes) == pytest.approx(one.peak_bytes, rel=0.01)
        assert 0 < one.timeline.backward < len(one.timeline.nbytes) == one.timeline.optimizer


def test_what_cannot_be_compiled_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("no working C++ compiler")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    model, size = make("flat")
    with pytest.raises(BudgetError, match="no working C\\+\\+ compiler"):
        revnets.fit(model, size, 4, "1GB", compile=True)
    assert not any(is_planned(module) for module in model.modules())
    with torch.device("meta"):
        sketch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(BudgetError, match="compile=True runs the model"):
        revnets.fit(sketch, (8,), 4, "1GB", compile=True)


def test_the_curve_has_each_share_once(monkeypatch: pytest.MonkeyPatch, compiler: list[float]) -> None:
    monkeypatch.setattr("revnets.budget.table.measured_compiled", lambda *_, **__: measured())
    setting = Setting(channels_last=False)
    _, found = curve(read_target("test_convnext@96:2", setting), setting, 3, compiled=True)
    assert [way.name for way in found[:3]] == [PLANNED] * 3
    details = [way.detail for way in found[3:]]
    assert details
    assert len(set(details)) == len(details)
    assert all(way.name == COMPILED_PLAN and way.compiles and "compile:" in way.detail for way in found[3:])


def test_the_command(compiler: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app(["fit", "test_convnext@64:2", "--budget", "1GB", "--compile"])
    assert not end.value.code
    assert sorted(compiler, reverse=True) == list(SHARES)
    assert "peak" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_step_takes_what_the_plan_says() -> None:
    model, size = make("test_efficientnet")
    x = torch.randn(8, *size)
    planned = Planner(Step(model, make_inputs(model, size, 8)), 8)
    planned.compiled = measured_compiled(model, planned.step, (0.5,))
    (found,) = planned.by_compiler
    plan = planned.plan(planned.needed(found))
    plan.apply(model)
    peak = measure_training_step(model, x, training_loss).peak_bytes + planned.plain.predicted.resident_bytes
    assert peak <= plan.budget
    assert peak == pytest.approx(found.predicted.peak_bytes, rel=0.02)


def test_the_optimizers_step_may_be_the_peak(compiler: list[float]) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    step = Step(model, make_inputs(model, (512,), 2), optimizer="adamw")
    figures = Planner(step).figures["store"]
    (found,) = measured_compiled(model, step, (1.0,))(figures, None)
    assert max(found.timeline.nbytes) < found.peak_bytes == figures.optimizer


@pytest.mark.parametrize("name", ["test_revbifpn", "lists"])
def test_what_is_measured_is_what_is_applied(name: str, compiler: list[float]) -> None:
    """Reversible parts in the mode of the plan, and none of an earlier plan's choices."""
    model, size = make(name)
    planned = Planner(Step(model, make_inputs(model, size, 4)), 4)
    least = planned.plan(planned.needed(planned.least()))
    least.apply(model)
    before = [(type(m), vars(m).get("_budget"), vars(m).get("mode")) for m in model.modules()]
    planned.compiled = measured_compiled(model, planned.step, (1.0,))
    (found,) = planned.by_compiler
    assert [(type(m), vars(m).get("_budget"), vars(m).get("mode")) for m in model.modules()] == before
    least.undo(model)
    planned._plan(found, 10**9).apply(model)
    x = torch.randn(4, *size)
    peak = measure_training_step(model, x, training_loss).peak_bytes + planned.plain.predicted.resident_bytes
    assert peak == pytest.approx(found.predicted.peak_bytes, rel=0.02)


def test_networks_of_one_class_are_each_compiled(compiler: list[float]) -> None:
    """Beyond its limit, dynamo would run them plain without a word."""
    for width in range(8, 8 + 6):
        model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))
        compiler.clear()
        planned = Planner(Step(model, make_inputs(model, (16,), 4)))
        planned.compiled = measured_compiled(model, planned.step, (1.0, 0.5))
        assert len(planned.by_compiler) == 2
        assert len(compiler) == 2


def test_more_sizes_than_are_compiled_end_with_a_sentence(
    compiler: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(choices._COMPILING, "recompile_limit", 2)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    choices.apply_choices(model, {"": "compile:0.5"})
    for n in (2, 3):
        model(torch.randn(n, 16)).sum().backward()
    with pytest.raises(BudgetError, match="compiled 2 times"):
        model(torch.randn(4, 16))


class Words(nn.Module):
    """Takes places in a table, counts its calls in a buffer that it replaces, and has one that nobody can write to."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("ones", torch.ones(1).expand(16))

    def forward(self, index: Any) -> Any:
        self.calls = self.calls + 1
        return self.head(self.table(index).mean(1) * self.ones)


@pytest.mark.parametrize("memory", [True, False])
def test_places_in_tables_and_replaced_buffers(memory: bool, compiler: list[float]) -> None:
    model = Words().eval()
    calls = model.calls
    index = torch.randint(10, (4, 8)) if memory else torch.empty(4, 8, dtype=torch.int64, device="meta")
    plan = revnets.fit(model, None, None, "1GB", inputs=index, compile=True)
    assert plan.peak_bytes > 0
    assert compiler
    assert model.calls is calls
    assert not calls
    assert not model.training


def test_weights_that_change_by_hooks_are_refused(compiler: list[float]) -> None:
    model, size = make("flat")
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(BudgetError, match="hooks would change weights"):
        revnets.fit(model, size, 4, "1GB", compile=True)


def test_what_does_not_fit_the_machine_is_left_out(compiler: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = make("flat")
    planned = Planner(Step(model, make_inputs(model, size, 4)), 4)
    monkeypatch.setattr("revnets.budget.compiled.free_bytes", lambda device: 1000)
    found = measured_compiled(model, planned.step)(planned.figures["store"], None)
    assert [one.share for one in found] == [share for share in SHARES if share < 1]
    assert min(one.ratio for one in found) == 1


def test_measured_seconds_are_those_of_all_plans() -> None:
    planned = planner()
    planned.measured = lambda names: [1.0] * (2 * len(names) + 1)
    added = [tried.solution.seconds for tried in planned.by_compiler]
    total = planned.figures["store"].total_seconds
    assert total > 1
    assert added == pytest.approx([(ratio - 1) * total for ratio in (0.8, 0.85, 0.9, 1.1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_compiled_gradients(name: str) -> None:
    """How far they are from plain ones, beside how far those are from double precision."""
    torch.manual_seed(0)
    model, x = timm.create_model(name).train(), torch.randn(2, 3, 224, 224)

    def gradients(network: nn.Module, x: Any) -> list[Any]:
        torch.manual_seed(1)
        training_loss(network(x)).backward()
        return [p.grad.double() for p in network.parameters() if p.grad is not None]

    def apart(found: list[Any], expected: list[Any]) -> float:
        norms = [q.norm() for q in expected]
        largest = 1e-6 * max(norms)  # smaller ones are rounding alone
        return max(float((p - q).norm() / n) for p, q, n in zip(found, expected, norms, strict=True) if n > largest)

    plain, double = gradients(copy.deepcopy(model), x), gradients(copy.deepcopy(model).double(), x.double())
    choices.apply_choices(model, {"": "compile:0.5"})
    off, rounding = apart(gradients(model, x), plain), apart(plain, double)
    print(f"\n{name}: compiled gradients {off:.1e} of their norm from plain ones, those {rounding:.1e} from double")
    assert 0 < off < 10 * rounding
