"""Checkpoints with right checksums and odd values: refused before anything is used, or as good as any."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from classification import train, validate
from classification.options import from_checkpoint_args
from revnets.pruning.checkpoint import read_weights
from revnets.training.checkpoints.reading import read_checkpoint
from revnets.training.errors import UserError
from tests.odd_trees import DELETE, ODD, WITHOUT_CLOCK, changed, nested, odd_tree, write

from .odd_checkpoints import Run
from .short_runs import TINY, Trainer
from .test_train_errors import sentence


class Fresh:
    """A run, brought back after each example; its two files as they were read."""

    def __init__(self, folder: Path) -> None:
        (folder / "run").mkdir()
        self.run = Run(folder / "run")
        self.odd = folder / "odd.pth.tar"
        self.files = [self.run.save(False), self.run.save(True)]
        self.trees = [torch.load(file, weights_only=True) for file in self.files]

    def try_tree(self, tree: Any) -> str:
        """The refusal of a tree, which has changed nothing; or nothing, where training went on."""
        write(tree, self.odd)
        before = self.run.fingerprint()
        checkpoint, refusal = None, ""
        try:
            checkpoint = self.run.resume(self.odd)
        except UserError as error:
            refusal = str(error)
        if checkpoint is None:
            assert self.run.fingerprint() == before, refusal
            assert "odd.pth.tar" in refusal or "middle of an epoch" in refusal
            assert len(refusal) < 1000
            return refusal
        self.run.go_on(checkpoint)
        self.run.resume(self.files[0])
        return ""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("odd"))


def test_right_ones_are_taken(fresh: Fresh) -> None:
    for tree in fresh.trees:
        assert fresh.try_tree(tree) == ""
        assert fresh.try_tree({**tree, "somebody's own": {"anything": [1, "a", None]}}) == ""
    old = {key: value for key, value in fresh.trees[0].items() if key not in ("guard", "processes", "history")}
    old["scheduler"] = {"best": 50.0}  # before counters were kept
    assert fresh.try_tree(old) == ""
    assert fresh.try_tree({**fresh.trees[0], "metric": float("nan")}) == ""  # a diverged validation's
    assert fresh.try_tree({**fresh.trees[0], "amp_scaler": {}}) == ""  # of one that was off


STATE = ("optimizer", "state", 0)
GROUP = ("optimizer", "param_groups", 0)
KINDS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("epoch",), "a", "epoch is 'a', a whole number of at least -1"),
    (("epoch",), True, "epoch is True"),
    (("epoch",), -1, "an epoch of at least 0 was expected"),
    (("epoch",), float("nan"), "epoch is nan"),
    (("epoch",), 2**62, "epoch is 4611686018427387904"),
    (("arch",), ["net"], "arch is a list of 1, nothing or text"),
    (("args",), [1], "args is a list of 1, a mapping of options"),
    (("metric",), "99", "metric is '99'"),
    (("state_dict",), {}, "state_dict is a mapping of 0, a mapping of names to tensors was expected"),
    (("state_dict",), {1: torch.ones(1)}, "state_dict has the key 1, text"),
    (("state_dict", "0.weight"), [1.0], "state_dict['0.weight'] is a list of 1, a tensor"),
    (("state_dict", "0.weight"), torch.full((4, 3), float("nan")), "state_dict['0.weight'] holds NaN"),
    (
        ("state_dict", "0.weight"),
        torch.full((4, 3), float("inf")),
        "'0.weight' holds 12 numbers that are NaN or infinite",
    ),
    (("state_dict", "0.weight"), ODD["on meta"], "state_dict['0.weight'] is a tensor without memory"),
    (("state_dict", "0.weight"), ODD["expanded"], "numbers in memory for 1"),
    (("optimizer", "param_groups", 0, "eps"), 0, "param_groups[0].eps is 0, a number above 0"),
    ((*STATE, "step"), DELETE, "optimizer.state[0].step is missing, a number of at least 0"),
    ((*STATE, "step"), "a", "optimizer.state[0].step is 'a'"),
    ((*STATE, "step"), [1], "optimizer.state[0].step is a list of 1"),
    ((*STATE, "step"), torch.tensor(float("nan")), "optimizer.state[0].step is nan"),
    ((*STATE, "step"), torch.tensor(-3.0), "optimizer.state[0].step is -3.0"),
    ((*STATE, "exp_avg"), torch.ones(3, 4), "optimizer.state[0].exp_avg is a tensor of shape (3, 4)"),
    ((*STATE, "exp_avg"), torch.ones(4, 3, dtype=torch.int32), "of floating point of shape (4, 3) was expected"),
    ((*STATE, "exp_avg"), torch.full((4, 3), float("nan")), "optimizer.state[0].exp_avg holds NaN"),
    ((*STATE, "exp_avg_sq"), -torch.ones(4, 3), "optimizer.state[0].exp_avg_sq holds negative numbers"),
    (STATE, DELETE, "optimizer.state[0] is missing, what a step has left for this parameter was expected"),
    (("optimizer", "without_state"), [0], "optimizer.state[0] is there, and without_state says that it is not"),
    (("optimizer", "without_state"), "a", "optimizer.without_state is 'a', a list was expected"),
    (("optimizer", "state"), {99: {}}, "optimizer.state[99] is of a parameter that is in no group"),
    (("optimizer", "state"), {"a": {}}, "optimizer.state has the key 'a'"),
    ((*GROUP, "betas"), 0.9, "optimizer.param_groups[0].betas is 0.9, a list of 2"),
    ((*GROUP, "betas"), (0.9, 1.5), "optimizer.param_groups[0].betas[1] is 1.5"),
    ((*GROUP, "lr"), torch.tensor(0.1), "optimizer.param_groups[0].lr is a tensor"),
    ((*GROUP, "lr"), "a", "optimizer.param_groups[0].lr is 'a'"),
    ((*GROUP, "lr"), float("nan"), "optimizer.param_groups[0].lr is nan, a finite number"),
    ((*GROUP, "weight_decay"), -1, "optimizer.param_groups[0].weight_decay is -1"),
    ((*GROUP, "params", 0), "a", "optimizer.param_groups[0].params[0] is 'a'"),
    ((*GROUP, "params", 0), 1, "name a parameter twice"),
    (("position",), {}, "position.epoch is missing"),
    (("position",), {"epoch": 1, "step": 9, "steps": 5}, "position is of batch 9 in an epoch of 5"),
    (("position",), {"epoch": 1, "step": -1, "steps": 5}, "position.step is -1"),
    (("position",), {"epoch": 7, "step": 1, "steps": 5}, "has epoch 0 and a position in epoch 7"),
    (("scheduler", "num_bad_epochs"), "a", "scheduler.num_bad_epochs is 'a'"),
    (("scheduler", "best"), [1], "scheduler.best is a list of 1"),
    (("history",), [], "history is a list of 0"),
    (("history", "files"), ["a"], "history.files[0] is 'a', a list of 2"),
    (("history", "files"), [[1, 2.0]], "history.files[0][0] is 1, text"),
    (("history", "files"), [["a", float("nan")]], "history.files[0][1] is nan"),
    (("history", "best_metric"), "best", "history.best_metric is 'best'"),
    (("processes",), {"a": 1}, "processes is a mapping of 1, a list"),
    (("processes", 1, "buffers", "model", "1.running_mean"), torch.ones(7), "processes[1].buffers.model['1.running_m"),
    (("processes", 0, "loss"), [1.0], "processes[0].loss is a list of 1, a list of 2"),
    (("sparsity", "schedule"), "rigl", "schedule='set': the checkpoint was trained with 'rigl'"),
    (("sparsity", "schedule"), 3, "sparsity.schedule is 3"),
    (("sparsity", "steps"), -1, "sparsity.steps is -1"),
    (("sparsity", "generator"), torch.ones(7, dtype=torch.uint8), "sparsity.generator is no state of a generator"),
    (("sparsity", "layers"), {"2": []}, "masks do not match: '2' has shape ()"),
    (("sparsity", "layers", "2", 0), 5, "masks do not match: '2' has shape (5, 4)"),
    (("sparsity", "history", "exchanged"), torch.ones(2, 9, dtype=torch.int32), "sparsity.history.exchanged has shape"),
    (("sparsity", "history", "fraction"), torch.ones(9), "another number of rows for 'fraction'"),
    (("state_dict", "2.mask"), torch.ones(4, 4, dtype=torch.bool), "masks do not match: '2' has 8 active weights"),
    (("state_dict_ema", "0.bias"), DELETE, "1 tensors are missing"),
    (("state_dict_ema", "0.bias"), "a", "state_dict_ema['0.bias'] is 'a'"),
    (("amp_scaler", "scale"), 0.0, "amp_scaler.scale is 0.0, a number above 0"),
    (("amp_scaler", "scale"), float("nan"), "amp_scaler.scale is nan"),
    (("amp_scaler", "scale"), "a", "amp_scaler.scale is 'a'"),
    (("amp_scaler", "_growth_tracker"), DELETE, "amp_scaler has no _growth_tracker"),
    (("guard", "skipped"), -1, "guard.skipped is -1"),
    (("extra",), nested(1000), "extra[0][0] is nested more than 64 deep"),
    (("extra",), ODD["itself"], "is nested more than 64 deep"),
    (("extra",), ODD["doubled"], "more than 1,000,000 entries"),
]


@pytest.mark.parametrize(("path", "value", "words"), KINDS, ids=[f"{n}-{k[0][0]}" for n, k in enumerate(KINDS)])
def test_odd_values_are_refused(fresh: Fresh, path: tuple[Any, ...], value: Any, words: str) -> None:
    tree = {**fresh.trees[0], "position": None, "extra": None}
    refusal = fresh.try_tree(changed(tree, path, value))
    assert words in refusal
    assert refusal.startswith("--resume: ")


def refused_or_right(fresh: Fresh, data: st.DataObject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex weights that lose a part
        fresh.try_tree(odd_tree(fresh.trees, data))


@settings(max_examples=30, **WITHOUT_CLOCK)
@given(st.data())
def test_any_odd_tree(fresh: Fresh, data: st.DataObject) -> None:
    refused_or_right(fresh, data)


@pytest.mark.slow
@settings(max_examples=2000, **WITHOUT_CLOCK)
@given(st.data())
def test_many_odd_trees(fresh: Fresh, data: st.DataObject) -> None:
    refused_or_right(fresh, data)


def test_state_whose_tensors_are_one(fresh: Fresh) -> None:
    """Updates in place would change both."""
    shared = torch.ones(4, 3)
    tree = changed(fresh.trees[0], (*STATE, "exp_avg"), shared)
    torch.save(changed(tree, (*STATE, "exp_avg_sq"), shared), fresh.odd)
    fresh.run.resume(fresh.odd)
    state = fresh.run.optimizer.state[fresh.run.model[0].weight]
    state["exp_avg"].zero_()
    assert state["exp_avg_sq"].eq(1).all()
    fresh.run.resume(fresh.files[0])


ARGS = {
    "img_size": "big",
    "num_classes": [1],
    "model_kwargs": 3,
    "mean": "dark",
    "crop_pct": -1.0,
    "batch_size": 0,
    "amp": "yes",
    "amp_dtype": "int8",
    "input_size": ["a", 32, 32],
    "data_dir": 5,
}


@pytest.mark.parametrize("name", ARGS)
def test_options_in_a_checkpoint_are_checked_as_those_of_a_command_line(name: str) -> None:
    args = {"model": "test_resnet", name: ARGS[name]}
    for form in (args, Namespace(**args)):
        with pytest.raises(UserError, match=rf"^--checkpoint: 'x': args.{name} is .* was expected; give another"):
            from_checkpoint_args(form, "--checkpoint: 'x'")


def test_options_of_timm_are_taken() -> None:
    args = Namespace(model="test_resnet", mean=None, interpolation="", std=(0.5,), crop_pct=1, amp=False, workers=None)
    expected = {"model": "test_resnet", "mean": None, "interpolation": "", "std": [0.5], "crop_pct": 1.0, "amp": False}
    assert from_checkpoint_args(args) == expected


def save_safetensors(tree: dict[str, Any], path: Path, args: str = "{}") -> Path:
    save_file(tree, path, {"format": "pt", "args": args})
    return path


READERS: dict[str, Callable[[Path], Any]] = {"scripts": read_checkpoint, "revnets": read_weights}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_files_of_weights(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    path, weight = tmp_path / "a.pth", {"weight": torch.ones(2)}
    for right in (weight, {"model": weight, "epoch": "any"}, {"state_dict": weight, "args": Namespace(a=[1, (2,)])}):
        torch.save(right, path)
        reader(path)
    mask = {"mask": torch.tensor([0.0, float("-inf")])}  # of attention
    torch.save({**weight, **mask}, path)
    reader(path)
    odd: list[Any] = [{}, {"state_dict": []}, {"model": "resnet18"}, {"a": {"b": torch.ones(1)}}, {3: torch.ones(1)}]
    odd += [
        {"weight": torch.tensor([float("nan")])},
        {"state_dict": weight, "state_dict_ema": 3},
        [weight],
        nested(300),
    ]
    odd += [{"state_dict": weight, "flops_of_all_phases": "many"}, {"state_dict": weight, "args": 3}]
    for tree in odd:
        write(tree, path)
        with pytest.raises(ValueError, match=r"a\.pth'.*; give another"):
            reader(path)
    for args in ("[1", "[1]", "3", "[" * 5000, '{"a": ' + "9" * 5000 + "}"):
        with pytest.raises(ValueError, match=r"b\.safetensors'.*; (it is damaged, )?give another"):
            reader(save_safetensors(weight, tmp_path / "b.safetensors", args))


@pytest.mark.parametrize("name", ["epoch", "optimizer", "state_dict"])
def test_a_refused_checkpoint_leaves_the_folder_alone(
    run_train: Trainer, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tree = torch.load(trained / "last.pth.tar", weights_only=True)
    torch.save({**tree, name: "odd"}, tmp_path / "odd.pth.tar")
    line = ["--model-kwargs", "act_layer=relu", "--model-ema", "--epochs", "3"]
    assert run_train(*line, "--resume", str(tmp_path / "odd.pth.tar")) == 2
    message = sentence(capsys)
    assert f"odd.pth.tar': {name} is 'odd'" in message
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth.tar"]


def test_odd_checkpoint_of_validation_and_start(
    run_train: Trainer, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_efficientnet", num_classes=10)
    weights = model.state_dict()
    path = tmp_path / "odd.pth.tar"
    torch.save({"state_dict": weights, "args": {"model": "test_efficientnet", "img_size": [1, 2]}}, path)
    assert validate.main([*TINY, "--data-dir", str(digits), "--checkpoint", str(path)]) == 2
    assert "args.img_size is a list of 2" in sentence(capsys)
    weights["classifier.bias"][0] = float("nan")
    torch.save({"state_dict": weights, "args": {"note": json.dumps({})}}, path)
    assert validate.main([*TINY, "--data-dir", str(digits), "--checkpoint", str(path)]) == 2
    assert "state_dict['classifier.bias'] holds NaN" in sentence(capsys)
    assert run_train("--initial-checkpoint", str(path)) == 2
    assert "--initial-checkpoint: " in sentence(capsys)
    assert not (tmp_path / "run").exists()
    assert train.main([*TINY, "--data-dir", str(digits), "--resume", str(path), "--output", str(tmp_path)]) == 2
