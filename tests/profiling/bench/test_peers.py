"""Other software's ways to save memory beside ours: same gradients, one run, reasons instead of failures."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnets.budget.table  # noqa: F401 - registers the curve, or an import within a test would
from revnets.cli import app
from revnets.profiling.bench import peers
from revnets.profiling.bench.peers import (
    CHECKPOINTING,
    COMPILED,
    OFFLOADED,
    PEERS,
    PLAIN,
    PLANNED,
    SHARES,
    Job,
    NotHereError,
    Row,
    Way,
    compare,
    read_target,
    ways,
)
from revnets.profiling.bench.peers_shown import ours_beside
from revnets.profiling.fake import ProfileError
from revnets.profiling.memory import mean_square
from revnets.profiling.target import Setting

SETTING = Setting(channels_last=False)
NAME = "test_convnext@96:2"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Puts a backend in the place of the one that takes minutes."""
    torch._dynamo.reset()

    def put(backend: Any) -> None:
        monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)

    yield put
    torch._dynamo.reset()


def eager(graph: Any, inputs: Any) -> Any:
    """A backend that changes nothing."""
    return graph.forward


@functools.cache
def planned() -> tuple[Way, ...]:
    """All ways of the small network, ours at two budgets; planning takes seconds."""
    return tuple(ways(read_target(NAME, SETTING), SETTING, 2))


def gradients(way: Way, setting: Setting) -> list[Tensor]:
    job = read_target(NAME, setting).build(setting, setting.device)
    with way.start(job)() as model:
        job.loss_fn(model(job.x)).backward()
    return [p.grad for p in job.network.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [CHECKPOINTING, COMPILED, OFFLOADED, PLANNED])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))],
)
def test_every_way_has_the_gradients_of_plain(kind: str, device: str, compiler: Callable[[Any], None]) -> None:
    if device == "cpu":
        compiler(eager)
    setting = Setting(device, channels_last=False)
    expected = gradients(PEERS[0], setting)
    for way in [w for w in planned() if w.name == kind]:
        if kind == OFFLOADED and device == "cpu":
            with pytest.raises(NotHereError, match="for accelerators"):
                gradients(way, setting)
            continue
        found = gradients(way, setting)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_all_are_measured_in_one_run_on_a_network_that_stays_plain(compiler: Callable[[Any], None]) -> None:
    compiler(eager)
    found = compare(read_target(NAME, SETTING), SETTING, planned(), repeats=1)
    assert [row.way for row in found.rows] == [PLAIN, CHECKPOINTING, *[COMPILED] * len(SHARES), PLANNED, PLANNED]
    plain, checkpointing, *_, least, most = found.rows
    assert plain.ratio == 1
    assert plain.measured_bytes == pytest.approx(plain.predicted_bytes, rel=1e-3)
    assert most.measured_bytes == pytest.approx(plain.measured_bytes, rel=1e-3)
    assert checkpointing.measured_bytes < plain.measured_bytes
    assert least.measured_bytes <= (least.budget_bytes or 0) < plain.measured_bytes
    (why,) = found.skipped.values()
    assert "for accelerators" in why


def test_each_share_is_compiled_once_under_its_own_budget(compiler: Callable[[Any], None]) -> None:
    budgets = []

    def backend(graph: Any, inputs: Any) -> Any:
        budgets.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    compiler(backend)
    before = torch._functorch.config.activation_memory_budget
    compare(read_target(NAME, SETTING), SETTING, planned(), repeats=2)
    assert budgets == list(SHARES)
    assert torch._functorch.config.activation_memory_budget == before


def test_what_does_not_compile_is_skipped_with_the_reason(compiler: Callable[[Any], None]) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("no working C++ compiler")

    compiler(backend)
    found = compare(read_target(NAME, SETTING), SETTING, PEERS, repeats=1)
    assert [row.way for row in found.rows] == [PLAIN, CHECKPOINTING]
    reasons = [why for way, why in found.skipped.items() if COMPILED in way]
    assert len(reasons) == len(SHARES)
    assert all("no working C++ compiler" in why for why in reasons)


def test_without_compiled_peers_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers._CURVES, peers.CURVE, lambda *_: (1, [Way(PLANNED, PEERS[0].start)]))
    found = ways(read_target(NAME, SETTING), SETTING, 1, compiled=False)
    assert [way.name for way in found] == [PLAIN, CHECKPOINTING, OFFLOADED, PLANNED]


def test_our_own_failures_are_no_reasons() -> None:
    def broken(job: Job) -> Any:
        raise RuntimeError("out of order")

    with pytest.raises(ProfileError, match="out of order"):
        compare(read_target(NAME, SETTING), SETTING, [PEERS[0], Way(PLANNED, broken)], repeats=1)


def test_a_network_without_checkpointing_has_a_reason() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(NotHereError, match="no checkpointing"):
        PEERS[1].start(Job(network, torch.ones(1, 2), mean_square, network))


def test_reversible_networks_take_part() -> None:
    import tests.models.registry  # noqa: F401 - registers test_revbifpn

    setting = Setting(optimizer=None)  # whose step is the peak of so small a network
    target = read_target("test_revbifpn@64:4", setting)
    plain, checkpointing = compare(target, setting, PEERS[:2], repeats=1).rows
    assert checkpointing.measured_bytes < plain.measured_bytes


def test_ours_beside_another_way() -> None:
    rows = [Row("m", PLANNED, 9, 9, peak, seconds, seconds) for peak, seconds in ((4, 3.0), (6, 2.0), (9, 1.0))]
    assert ours_beside(Row("m", COMPILED, None, None, 7, 2.5, 2.5), rows) == (2.0, 6)
    assert ours_beside(Row("m", COMPILED, None, None, 3, 0.5, 0.5), rows) == (None, None)


def test_the_command_prints_and_writes_all(
    tmp_path: Path,
    compiler: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler(eager)
    monkeypatch.setitem(peers._CURVES, peers.CURVE, lambda *_: (1, [Way(PLANNED, PEERS[0].start)]))
    monkeypatch.setattr(peers, "PEERS", [way for way in PEERS if not way.compiles or way.detail.endswith("=0.25")])
    output = tmp_path / "peers.json"
    line = f"bench test_convnext@32:2 test_resnet@32:2 --peers --budgets 1 --repeats 1 --output {output}"
    with pytest.raises(SystemExit) as end:
        app(line.split())
    assert not end.value.code
    out = capsys.readouterr().out
    assert "activation_memory_budget=0.25" in out
    assert "save_on_cpu, everything that autograd keeps is skipped: " in out
    rows = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in rows] == ["test_convnext", "test_resnet"]
    assert all({PLAIN, COMPILED, PLANNED} <= {way["way"] for way in row["ways"]} for row in rows)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--budgets 3", "--budgets has no effect without --peers"),
        ("--peers --modes plain", "--modes has no effect with --peers"),
        ("--peers --launches", "--launches has no effect with --peers"),
        ("--peers --output x.png", "the picture lies beside it"),
        ("--peers --device cuda:99", "cuda"),
    ],
)
def test_mistakes_are_one_sentence(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app(["bench", "test_convnext@32:2", *line.split()])
    assert end.value.code == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in err
    assert words in err


@pytest.mark.slow
def test_torchs_own_budget_lowers_the_peak() -> None:
    target = read_target("test_convnext@64:8", SETTING)
    found = compare(target, SETTING, [PEERS[0], *(w for w in PEERS if w.compiles)], repeats=1)
    if found.skipped:
        pytest.skip(next(iter(found.skipped.values())))
    plain, *compiled = found.rows
    peaks = [row.measured_bytes for row in compiled]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0] < plain.measured_bytes
