"""Checkpoints of a runner with right checksums and odd values: refused before anything is used, or as good as any."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from detection import checkpoints, checks
from detection import train as training
from revnets.layers.sparse_ift.sparse import SparseLinear
from revnets.mm import ResumeCheckHook, SparsityHook
from revnets.mm.loading import safe_globals
from revnets.training.errors import UserError
from tests.mm.hooks.test_resume import Noisy, Watch
from tests.odd_trees import DELETE, ODD, WITHOUT_CLOCK, changed, nested, odd_tree, write

SAVING = {"type": "WholeCheckpointHook", "interval": 1, "interim": 1, "max_keep_ckpts": 2}


class Net(BaseModel):
    """Two layers, one of them sparse, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), SparseLinear(4, 4, sparsity=0.5))

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        out = self.net(inputs).square().mean()
        return {"loss": out} if mode == "loss" else [out]


class Fresh:
    """A run that was stopped in the middle of its second epoch, brought back after each example; its files as read."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.odd = folder / "run", folder / "odd.pth"
        self.sparsity = SparsityHook("set", interval=1)
        self.average = EMAHook()
        self.runner = Runner(
            model=Net(),
            work_dir=str(self.folder),
            train_dataloader={
                "batch_size": 4,
                "num_workers": 0,
                "sampler": {"type": "DefaultSampler", "shuffle": True},
                "dataset": Noisy(),
                "collate_fn": {"type": "default_collate"},
            },
            train_cfg={"type": "ResumableTrainLoop", "max_epochs": 3},
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
            param_scheduler=[{"type": "ExponentialLR", "gamma": 0.9, "by_epoch": True}],
            default_hooks={
                "checkpoint": {"type": "WholeCheckpointHook", "interval": 1, "interim": 1, "max_keep_ckpts": 2}
            },
            custom_hooks=[self.average, self.sparsity, ResumeCheckHook(), Watch([], 4)],
            randomness={"seed": 5},
            log_level="ERROR",
            experiment_name=f"odd-{folder.name}",
        )
        with pytest.raises(KeyboardInterrupt):
            self.runner.train()
        self.files = [self.folder / "epoch_1.pth", self.folder / "interim.pth"]
        with torch.serialization.safe_globals(safe_globals()):
            self.trees = [torch.load(file, weights_only=True) for file in self.files]
        mean = {"net.1.running_mean": torch.ones(4)}  # of one process, which has it in its own state otherwise
        self.trees[1]["processes"] = [{"model": mean, "ema": mean}]

    def resume(self, path: Path) -> None:
        """As train.py does: what can be known before the runner, then the runner's hooks and what they load."""
        checkpoint = checkpoints.read(path, "--resume", resumed=True)
        checks.check_weights(self.runner.model, checkpoint, whole=True)
        self.runner._resume, self.runner._load_from = True, str(path)
        self.runner.resume(str(path))

    def go_on(self) -> None:
        """What follows on a resumption; it must not fail."""
        runner: Any = self.runner
        loop = runner.train_loop
        assert 0 <= loop.batches_done() <= len(loop.dataloader)
        for hook in (self.sparsity, runner.hooks[-2]):
            hook.before_train(runner)
        runner.optim_wrapper.initialize_count_status(runner.model, loop.iter, 10**9)
        runner.message_hub.update_scalar("train/loss", 1.0)
        runner.model.train_step(next(iter(loop.dataloader)), runner.optim_wrapper)
        self.sparsity.after_train_iter(runner, 0)
        self.average.after_train_iter(runner, 0)
        for scheduler in runner.param_schedulers:
            scheduler.step()
        assert all(bool(p.isfinite().all()) for p in runner.model.parameters())
        runner.message_hub.state_dict()

    def fingerprint(self) -> str:
        """Of all that resuming changes, and of the folder."""
        runner: Any = self.runner
        assert self.sparsity.controller is not None
        state = [
            runner.model.state_dict(),
            self.average.ema_model.state_dict(),
            runner.optim_wrapper.state_dict(),
            [{k: v for k, v in s.state_dict().items() if k != "optimizer"} for s in runner.param_schedulers],
            self.sparsity.controller.state_dict(),
            runner.message_hub.state_dict(),
            (runner.train_loop.epoch, runner.train_loop.iter, runner.seed),
        ]
        content = io.BytesIO()
        torch.save(state, content)
        digest = hashlib.sha256(content.getvalue())
        for path in sorted(self.folder.glob("*.*")):
            digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
        return digest.hexdigest()

    def try_tree(self, tree: Any) -> str:
        """The refusal of a tree, which has changed nothing; or nothing, where training went on."""
        write(tree, self.odd)
        before = self.fingerprint()
        refusal = ""
        try:
            self.resume(self.odd)
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert self.fingerprint() == before, refusal
            assert "odd.pth" in refusal
            assert len(refusal) < 1000
            return refusal
        self.go_on()
        self.resume(self.files[1])
        self.sparsity.before_train(self.runner)
        return ""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("odd"))


def test_right_ones_are_taken(fresh: Fresh) -> None:
    for tree in fresh.trees:
        assert fresh.try_tree(tree) == ""
        assert fresh.try_tree({**tree, "somebody's own": {"anything": [1, "a", None]}}) == ""


STATE = ("optimizer", "state", 0)
RUN = ("message_hub", "runtime_info")
EARLY: list[tuple[tuple[Any, ...], Any, str]] = [  # known before there is a runner
    (("meta",), DELETE, "meta is missing, a mapping was expected"),
    (("meta",), "a", "meta is 'a', a mapping"),
    (("meta", "epoch"), "a", "meta.epoch is 'a', a whole number of at least 0"),
    (("meta", "epoch"), -1, "meta.epoch is -1"),
    (("meta", "iter"), 0.5, "meta.iter is 0.5"),
    (("meta", "iter"), DELETE, "meta.iter is missing"),
    (("meta", "seed"), "a", "meta.seed is 'a', nothing or a whole number"),
    (("meta", "cfg"), ["a"], "meta.cfg is a list of 1, text"),
    (("state_dict",), DELETE, "state_dict is missing"),
    (("state_dict",), {}, "state_dict is a mapping of 0"),
    (("state_dict", "net.0.weight"), torch.tensor([[float("nan")]] * 4), "state_dict['net.0.weight'] holds NaN"),
    (("state_dict", "net.0.weight"), "a", "state_dict['net.0.weight'] is 'a', a tensor"),
    (("state_dict", "net.0.weight"), ODD["on meta"], "is a tensor without memory"),
    (("message_hub",), DELETE, "message_hub is missing"),
    (("message_hub",), [], "message_hub is a list of 0, a mapping"),
    (("message_hub", "log_scalars"), DELETE, "message_hub.log_scalars is missing"),
    ((*RUN, "iter"), "a", "message_hub.runtime_info.iter is 'a'"),
    ((*RUN, "keep_ckpt_ids"), ["a"], "keep_ckpt_ids[0] is 'a'"),
    ((*RUN, "last_ckpt"), 3, "last_ckpt is 3, nothing or text"),
    ((*RUN, "batches_of_an_epoch"), 0, "batches_of_an_epoch is 0"),
    (("optimizer",), DELETE, "holds weights alone, no optimizer"),
    (("optimizer",), 3, "optimizer is 3, a mapping"),
    (("param_schedulers",), 3, "param_schedulers is 3"),
    (("param_schedulers", 0, "last_step"), "a", "param_schedulers[0].last_step is 'a'"),
    (("processes",), 3, "processes is 3, a list"),
    (("processes", 0, "model"), DELETE, "processes[0].model is missing"),
    (("sparsity", "steps"), -1, "sparsity.steps is -1"),
    (("extra",), nested(1000), "nested more than 64 deep"),
    (("extra",), ODD["itself"], "nested more than 64 deep"),
]
LATE: list[tuple[tuple[Any, ...], Any, str]] = [  # only against the runner
    ((*STATE, "step"), DELETE, "optimizer.state[0].step is missing"),
    ((*STATE, "step"), "a", "optimizer.state[0].step is 'a'"),
    ((*STATE, "exp_avg"), torch.ones(3), "optimizer.state[0].exp_avg is a tensor of shape (3,)"),
    (STATE, DELETE, "optimizer.state[0] is missing, what a step has left for this parameter was expected"),
    (("optimizer", "without_state"), [0], "optimizer.state[0] is there, and without_state says that it is not"),
    (("optimizer", "param_groups", 0, "weight_decay"), 0.5, "it was trained with weight_decay 0.5, and optim_wrapper"),
    (("optimizer", "param_groups", 0, "betas"), (0.5, 0.9), "betas [0.5, 0.9], and optim_wrapper of the configuration"),
    (("optimizer", "param_groups", 0, "eps"), 0.5, "makes it 1e-08; set what it was trained with, or give it as load"),
    (
        ("optimizer", "param_groups", 0, "initial_lr"),
        0.5,
        "trained with lr 0.5, and optim_wrapper of the configuration",
    ),
    (("optimizer", "param_groups", 0, "lr"), float("nan"), "optimizer.param_groups[0].lr is nan"),
    (("optimizer", "param_groups", 0, "capturable"), True, "capturable is True, False, as in this run, was expected"),
    (("optimizer", "param_groups", 0, "betas"), DELETE, "are options that AdamW does not work with (KeyError 'betas')"),
    (("optimizer", "param_groups", 0, "betas"), 0.9, "param_groups[0].betas is 0.9"),
    (("optimizer", "base_param_settings"), [1], "optimizer.base_param_settings is a list of 1, nothing or a mapping"),
    (("param_schedulers", 0, "gamma"), "a", "param_schedulers[0].gamma is 'a'"),
    (("param_schedulers", 0, "param_name"), "text", "param_name is 'text', 'lr', as in this run, was expected"),
    (("param_schedulers", 0, "step"), 1, "would replace what a"),
    (("ema_state_dict", "module.net.0.weight"), torch.ones(7), "ema_state_dict['net.0.weight'] is a tensor"),
    (("processes", 0, "model", "net.1.running_mean"), torch.ones(7), "processes[0].model['net.1.running_mean'] is a"),
    (("processes", 0, "ema", "net.1.running_mean"), torch.ones(7), "processes[0].ema['net.1.running_mean'] is a"),
    (("state_dict", "net.1.num_batches_tracked"), DELETE, "is missing beside its average"),
    (("sparsity", "layers"), {"other": []}, "masks do not match"),
    (("meta", "iter"), 1_000_000, "cannot resume at iteration 1000000"),
    (("meta", "epoch"), 7, "cannot resume at iteration"),
    ((*RUN, "batches_of_an_epoch"), 9, "an epoch now has 3 batches"),
]


def ids(kinds: list[tuple[tuple[Any, ...], Any, str]]) -> list[str]:
    return [f"{number}-{path[-1]}" for number, (path, _, _) in enumerate(kinds)]


@pytest.mark.parametrize(("path", "value", "words"), EARLY, ids=ids(EARLY))
def test_refused_without_a_runner(
    fresh: Fresh, path: tuple[Any, ...], value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = fresh.try_tree(changed({**fresh.trees[1], "extra": None}, path, value))
    assert words in refusal
    assert refusal.startswith("--resume: ")
    monkeypatch.setattr(fresh.runner, "resume", None)
    with pytest.raises(UserError):
        fresh.resume(fresh.odd)


@pytest.mark.parametrize(("path", "value", "words"), LATE, ids=ids(LATE))
def test_refused_by_the_runner(fresh: Fresh, path: tuple[Any, ...], value: Any, words: str) -> None:
    parent = functools.reduce(lambda tree, key: tree[key], path[:-1], fresh.trees[1])
    there = changed(fresh.trees[1], path[:-1], {**parent, path[-1]: value})  # also where there is none of this name
    refusal = fresh.try_tree(there if value is not DELETE else changed(fresh.trees[1], path, DELETE))
    assert words in refusal
    assert refusal.startswith("--resume: ")


def test_a_config_in_a_checkpoint_is_not_run(fresh: Fresh, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    meta = {**fresh.trees[1]["meta"], "config": f"open({str(proof)!r}, 'w').close()"}
    assert fresh.try_tree({**fresh.trees[1], "meta": meta}) == ""
    assert not proof.exists()


def test_odd_histories_of_numbers(fresh: Fresh) -> None:
    for name, value in {"_log_history": "a", "_count_history": None, "max_length": "a", "update": "a"}.items():
        history = HistoryBuffer([1.0], [1.0])
        vars(history)[name] = value
        tree = changed(fresh.trees[1], ("message_hub", "log_scalars"), {"train/loss": history})
        assert "message_hub.log_scalars['train/loss'] is no history of numbers" in fresh.try_tree(tree)


def refused_or_right(fresh: Fresh, data: st.DataObject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex weights that lose a part
        fresh.try_tree(odd_tree(fresh.trees, data))


@settings(max_examples=20, **WITHOUT_CLOCK)
@given(st.data())
def test_any_odd_tree(fresh: Fresh, data: st.DataObject) -> None:
    refused_or_right(fresh, data)


@pytest.mark.slow
@settings(max_examples=2000, **WITHOUT_CLOCK)
@given(st.data())
def test_many_odd_trees(fresh: Fresh, data: st.DataObject) -> None:
    refused_or_right(fresh, data)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["auto", "by name"])
def test_the_script_leaves_the_folder_alone(
    fresh: Fresh, how: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An odd checkpoint is no damaged one, for which an older one would be taken."""
    for number, path in enumerate(("epoch_1.pth", "epoch_2.pth")):
        write(fresh.trees[0] if not number else changed(fresh.trees[0], ("meta", "epoch"), "a"), tmp_path / path)
        os.utime(tmp_path / path, (number, number))
    (tmp_path / checkpoints.LAST).write_text("epoch_2.pth")
    before = content(tmp_path)
    more = [] if how == "auto" else [str(tmp_path / "epoch_2.pth")]
    assert training.main([str(tiny), "--work-dir", str(tmp_path), "--resume", *more, "--no-check"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"error: --resume: '{tmp_path}/epoch_2.pth': meta.epoch is 'a'" in said
    assert content(tmp_path) == before
