"""Blocks are found by what calls what and by bytes: those that people would name."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from revnets.budget.blocks import Blocks, Run, find_blocks
from revnets.budget.program import Program
from revnets.budget.watch import Figures, Watch, figures_of
from revnets.profiling.predict import predict_training_step, trace_training_step
from revnets.profiling.target import training_loss
from tests.budget.networks import make


def watched(model: nn.Module, *size: int) -> tuple[Watch, Blocks]:
    """A traced step, and the blocks in it."""
    watch = trace_training_step(model, torch.empty(2, *size, device="meta"), training_loss, None, "cpu", Watch)
    return watch, find_blocks(model, watch)


@pytest.mark.parametrize(
    ("name", "size", "count", "some"),
    [
        ("resnet26", 64, 8, {"layer1.0", "layer4.1"}),
        ("efficientnet_b0", 64, 16, {"blocks.1.1", "blocks.5.3"}),
        ("convnext_atto", 64, 12, {"stages.0.blocks.0", "stages.3.blocks.1"}),
        ("vit_tiny_patch16_224", 224, 12, {"blocks.0", "blocks.11"}),
        ("vgg11", 32, 14, {"features.0", "features.20"}),
    ],
)
def test_blocks_of_timms_networks(name: str, size: int, count: int, some: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    _, found = watched(model, 3, size, size)
    assert len(found.blocks) == count
    assert some <= set(found.names)
    assert [block.position for block in found.blocks] == list(range(1, 2 * count, 2))


def test_runs_are_blocks_in_a_row() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet26")
    _, found = watched(model, 3, 64, 64)
    assert {(run.name, run.first, run.last) for run in found.runs} == {
        (f"layer{k + 1}", 4 * k + 1, 4 * k + 3) for k in range(4)
    }


def test_what_changes_its_input_is_no_start_of_a_checkpoint() -> None:
    model, size = make("flat")
    _, found = watched(model, *size)
    writing = {block.name for block in found.blocks if block.writes}
    assert not any(int(run.name[1 : run.name.index(":")]) % 3 == 2 for run in found.runs)  # the activations, in place
    assert all(isinstance(model.get_submodule(name), nn.ReLU) for name in writing)


def test_figures_sum_to_the_prediction() -> None:
    model, size = make("test_resnet")
    watch, found = watched(model, *size)
    figures = figures_of(watch, found.names)
    predicted = predict_training_step(model, torch.empty(2, *size, device="meta"), training_loss)
    assert figures.peak == predicted.peak_bytes
    assert figures.resident == predicted.resident_bytes
    assert len(figures.kept) == 2 * len(found.blocks) + 1
    assert min(figures.seconds[1::2]) > 0


def test_the_optimizers_step_counts_at_its_worst() -> None:
    def optimizer(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters())

    model, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3))).to("meta"), torch.empty(2, 512, device="meta")
    watch = trace_training_step(model, x, training_loss, optimizer, "cpu", Watch)
    figures = figures_of(watch, find_blocks(model, watch).names)
    assert figures.optimizer == figures.peak == predict_training_step(model, x, training_loss, optimizer).peak_bytes


def test_a_run_that_is_computed_again_needs_what_its_forward_pass_did() -> None:
    """Its blocks take little in the backward pass, and much on the way of the forward pass."""
    place = [0] * 5
    stored = Figures(
        0, [0, 1, 0, 1, 0], place, [0, 90, 0, 5, 0], [0, 9, 0, 8, 0], [0, 2, 0, 3, 0], 0, [1.0] * 5, [1.0] * 5
    )
    program = Program.__new__(Program)
    program.store = stored
    run = program._of_run(Run("a:b", 1, 3), replace(stored, kept=place))
    assert run.needs[3, "backward"] == 90 + 1  # and the gradient that arrives
    assert run.needs[1, "backward"] == 9


def test_modules_that_are_called_twice_are_no_blocks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.other = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.same(self.same(x)))

    _, found = watched(Twice(), 8)
    assert found.names == ["other"]
