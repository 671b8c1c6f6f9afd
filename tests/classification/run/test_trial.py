"""What is tried before a run makes its folder: late refused come early, and nothing is changed by looking."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

from classification.options import TrainOptions
from classification.run.start import schedule_arguments
from classification.run.trial import try_optimizer, try_schedule, try_step, try_transforms
from classification.runtime import Runtime, start_runtime
from classification.train import epoch_seed
from revnets.training.errors import UserError

CPU = Runtime(torch.device("cpu"), 0, 0, 1, None, torch.contiguous_format)
PLAIN = TrainOptions(data_dir="x", epochs=3, warmup_epochs=0, num_classes=2)


def with_(**values: Any) -> TrainOptions:
    return dataclasses.replace(PLAIN, **values)


@pytest.mark.parametrize(
    ("opt", "more"),
    [
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"betas": [2.0, 0.9]}),
        ("adamw", {"nonsense": 1}),
        ("adamw", {"eps": "small"}),
        ("adahessian", {}),
        ("sgd", {"dampening": "much"}),
    ],
)
def test_optimizers_that_fail_at_a_step(opt: str, more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--opt: {opt}"):
        try_optimizer(with_(opt=opt), CPU, {"opt": opt, "lr": 0.1, **more})


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "lion", "adafactor", "lookahead_adam", "muon"])
def test_usual_optimizers_pass(opt: str) -> None:
    try_optimizer(with_(opt=opt), CPU, {"opt": opt, "lr": 0.1, "layer_decay": 0.7})


@pytest.mark.parametrize("on_updates", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"lr_cycle_mul": 0.0, "lr_cycle_limit": 3},
        {"sched": "tanh", "lr_cycle_mul": 0.0, "lr_cycle_limit": 3},
    ],
)
def test_schedules_that_fail_after_an_epoch(values: dict[str, Any], on_updates: bool) -> None:
    options = with_(sched_on_updates=on_updates, **values)
    with pytest.raises(UserError, match="--sched"):
        try_schedule(options, 0.1, schedule_arguments(options, 5), 5)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly", "plateau", "none"])
def test_usual_schedules_pass_and_long_ones_are_sampled(sched: str) -> None:
    options = with_(sched=sched, epochs=2000, warmup_epochs=5, sched_on_updates=sched != "plateau")
    try_schedule(options, 0.1, schedule_arguments(options, 10_000), 10_000)


def fails_now_and_then(image: Any) -> Any:
    if random.random() < 0.5:
        raise ZeroDivisionError("degenerate")
    return image


@pytest.mark.parametrize("step", [fails_now_and_then, transforms.Pad(-40), transforms.Lambda(lambda image: image + 1)])
def test_transforms_that_fail(step: Callable[[Any], Any]) -> None:
    data = type("Data", (), {"transform": transforms.Compose([step, transforms.ToTensor()])})()
    with pytest.raises(UserError, match="augmentation"):
        try_transforms(data, "RGB", (32, 32))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )


def test_a_batch_norm_that_sees_one_value() -> None:
    with pytest.raises(UserError, match=r"more than 1 value.*--batch-size"):
        try_step(with_(batch_size=1), CPU, net(), nn.CrossEntropyLoss(), (3, 8, 8))


def test_a_loss_that_takes_other_targets() -> None:
    with pytest.raises(UserError, match="cannot make a training step"):
        try_step(PLAIN, CPU, net(), nn.BCELoss(), (3, 8, 8))


def test_trials_change_nothing() -> None:
    model = net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    wanted = (torch.rand(3).tolist(), np.random.rand(), random.random())
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    try_step(PLAIN, CPU, model, nn.CrossEntropyLoss(), (3, 8, 8))
    try_optimizer(PLAIN, CPU, {"opt": "adamw", "lr": 0.1})
    data = type("Data", (), {"transform": transforms.Compose([transforms.RandomCrop(16), transforms.ToTensor()])})()
    try_transforms(data, "L", (32, 32))
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == wanted
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["meta", "mps:9", "cpu:7", "cuda:99", "abacus", "xla", "privateuseone", "cpu\N{SNOWMAN}"]
)
def test_devices_that_compute_nothing_here(name: str) -> None:
    with pytest.raises(UserError, match="--device"):
        start_runtime(with_(device=name))


def test_a_group_of_processes_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="torchrun"):
        start_runtime(with_(device="cpu"))


def test_seeds_of_epochs_stay_in_32_bits() -> None:
    assert epoch_seed(42, 0) == 42 + 1000003  # as ever
    for seed in (0, 42, 2**32 - 1):
        for epoch in (0, 4294, 99_999):
            np.random.seed(epoch_seed(seed, epoch) + 0xFFFF)
