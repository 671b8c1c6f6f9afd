"""Random command lines for every command there is: an answer or one sentence, never a traceback, never a file."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from revnets.cli import app
from revnets.training.options.values import Number, words

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RUNS = (
    "revnets.profiling.command.profile",
    "revnets.profiling.command.fit",
    "revnets.profiling.bench.timing.run",
    "revnets.profiling.bench.launches.run",
    "revnets.benchmarks.fp8.run",
    "revnets.benchmarks.sparse_training.run",
    "revnets.numerics.command._watch",
    "revnets.profiling.layers_command.convert",
    "revnets.pruning.command.load_model",
    "revnets.deploy.command.load_model",
    "revnets.deploy.command._networks",
    "revnets.gpu_report.runner.run_sections",
)
"""What takes long, once everything that can be refused at once was."""
ODD = [
    *("", " ", ",", "a,,b", "--", "-", "nan", "inf", "-inf", "1e400", "-1", "0", "00", "1.5", "1,2", "1,1", "0.5"),
    *(str(2**64), str(2**40), "9" * 5000, "True", "None", "a\0b", "\ud800", "é☃", "[red]", "{0}", "%s", "x" * 300),
    *("hf-hub:a/b", "@", ":", "test_resnet", "test_resnet@32:0", "test_resnet@32:1", "test_resnet.none", "a=1", "a"),
    *("meta", "cuda:77", "cpu", "cpu:9", "abacus", "int8", "bfloat16", "adahessian", "sgd", "none", "24GB", "1B"),
    *("store", "store,store", "store,nothing", "depth", "depth,depth", "batch", "linear", "eager", "sparse:nan"),
    *("mus_fp8", "wanda", "2:4", "erk", "torch", "minmax", "train", "first", "emulate"),
    *("..", "/", "/dev/null", "/dev/null/x", "/nowhere/x", "loop", "loop/x", "file", "file/x", "folder", "new"),
    *("new.safetensors", "nowhere/new.safetensors", "folder/new.json"),
]
values = st.sampled_from(ODD) | st.text(max_size=8).filter(lambda text: not text.endswith(".py"))


def lines(name: str) -> st.SearchStrategy[list[str]]:
    """Command lines of a command: required things are there mostly, and some odd options."""
    arguments, options, needed = [], [], []
    for param in COMMANDS[name].params:
        flags = [*param.opts, *param.secondary_opts]
        if param.param_type_name == "argument":
            sensible = "test_resnet@32:1" if name in ("profile", "bench", "numerics") else "test_resnet"
            arguments.append(
                st.just([sensible]) | st.just([sensible]) | st.lists(values, min_size=int(name == "bench"), max_size=2)
            )
        elif param.name != "help":
            is_flag = getattr(param, "is_flag", False) or bool(param.secondary_opts)
            one = st.sampled_from(flags).map(lambda f: [f])
            full = one if is_flag else st.tuples(st.sampled_from(flags), values).map(list)
            options.append(full)
            if param.required:
                sensible = "folder" if param.name == "data" else "new.safetensors"
                needed.append(st.just([flags[0], sensible]))
    some = st.lists(st.one_of(options), max_size=3) if options else st.just([])
    parts = st.tuples(*arguments, st.one_of(st.tuples(*needed), st.just(())), some)
    return parts.map(lambda p: [w for a in p[:-2] for w in a] + [w for part in (*p[-2], *p[-1]) for w in part])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, where nothing that takes long runs."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def ends(*_: Any, **__: Any) -> Any:
        raise typer.Exit(0)

    for run in RUNS:  # all before the first is replaced: a module that takes a name from another would keep `ends`
        importlib.import_module(run.rpartition(".")[0])
    for run in RUNS:
        monkeypatch.setattr(run, ends)
    return tmp_path


def check(line: list[str], place: Path) -> None:
    before = sorted(os.listdir(place)), sorted(os.listdir(place / "folder"))
    result = CliRunner().invoke(app, line)
    assert result.exit_code in (0, 2), (line, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), (line, result.exception)
    if result.exit_code == 2:
        assert result.stderr.startswith("revnets: "), (line, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1, (line, result.stderr)
    assert (sorted(os.listdir(place)), sorted(os.listdir(place / "folder"))) == before, line


odd = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_lines(name: str, place: Path) -> None:
    @settings(odd, max_examples=12, derandomize=True)
    @given(lines(name))
    def run(line: list[str]) -> None:
        check([name, *line], place)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_thousand_odd_lines(name: str, place: Path) -> None:
    @settings(odd, max_examples=-(-2000 // len(COMMANDS)))
    @given(lines(name))
    def run(line: list[str]) -> None:
        check([name, *line], place)

    run()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_refuses_nothing_and_nul(name: str, place: Path) -> None:
    for param in COMMANDS[name].params:
        if getattr(param, "is_flag", False) or param.secondary_opts or param.name in ("help", "exclude"):
            continue
        given_as = [] if param.param_type_name == "argument" else [param.opts[0]]
        for text in ("", "a\0b"):
            result = CliRunner().invoke(app, [name, *given_as, text])
            assert result.exit_code == 2, (param.name, text)


def test_commands_are_all_of_the_kind_that_checks() -> None:
    from revnets.arguments import Command

    assert all(isinstance(command, Command) for command in COMMANDS.values())


def test_bugs_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("revnets.profiling.layers_command.print_layers", broken)
    result = CliRunner().invoke(app, ["layers"])
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize(
    "line",
    [
        "profile test_resnet@32:1 --sweep depth --fit 1GB",
        "profile test_resnet@32:1 --fit-what image",
        "profile test_resnet@32:1 --measure --sweep resolution",
        "profile test_resnet@32:1 --no-measure --fit 1GB",
        "profile test_resnet@32 --batch-size 4 --fit 1GB",
        "profile test_resnet --img-size 32 --fit 1GB --fit-what image",
        "profile test_resnet@32:1 --img-size 64",
        "profile test_resnet@32:1 --batch-size 2",
        "profile test_resnet@32:1 --no-exact",
        "profile test_resnet@32:1 --part neck",
        "profile test_resnet@32:1 --mode store,reversible",
        "profile test_resnet@32:1 --compare test_resnet@32:1",
        "profile test_resnet@32:1 --device cpu --device cpu",
        "bench test_resnet@32:1 --ablate",
        "bench test_resnet@32:1 --compiled",
        "bench test_resnet@32:1 --exact",
        "bench test_resnet@32:1 --launches --repeats 2",
        "bench test_revbifpn@32:1 --launches --ablate",
        "layers --img-size 32",
        "layers --output new",
        "numerics test_resnet@32:1 --split train",
        "numerics test_resnet@32:1 --img-size 64",
        "numerics test_resnet@32:1 --no-exact",
        "numerics test_resnet@32:1 --mode store,checkpoint",
        "prune test_resnet --data folder --output new.safetensors --sparsity 0.5 --method wanda --damping 0.1",
        "prune test_resnet --data folder --output new.safetensors --sparsity 0.5 --method magnitude --block-size 8",
        "prune test_resnet --data folder --output new.safetensors --sparsity 0.5 --pattern 2:4",
        "deploy test_resnet --output new --data folder",
        "deploy test_resnet --output new --split train",
        "deploy test_resnet --output new --images 8",
        "deploy test_resnet --output new --calibration entropy",
        "deploy test_resnet --output new --max-density 0.5 --engine torch",
        "deploy test_resnet --output new --int8 --data folder --tolerance 0.1",
        "bench-sparse-training --no-layers",
        "bench-sparse-training --img-size 32",
    ],
)
def test_options_without_effect(line: str, place: Path) -> None:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2, result.output
    check(line.split(), place)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "1", None, 2**31, 0, 1.5])
def test_numbers_are_of_their_kind(value: Any) -> None:
    with pytest.raises(ValueError, match=r"a=.*expected a whole number of at least 1 and at most 5"):
        Number(int, 1, 5).check("a", value)


def test_lists_say_what_is_wrong_with_them() -> None:
    assert words("a", "x y,z") == ["x", "y", "z"]
    for text in ("", ",", "x,", "x,,y", "x,x", "q"):
        with pytest.raises(ValueError, match="a"):
            words("a", text, ("x", "y"))
