"""SquareHead by hand, and the training task around student and teacher."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("timm.task", reason="this timm has no timm.task")

from revnets.pruning.distillation import SquareHeadTask, feature_layers, square_head


def test_square_head_by_hand() -> None:
    student = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])]
    teacher = [torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0]])]
    expected = (1 + 4) / 2 / ((4 + 0) / 2) + 4 / 1
    assert float(square_head(student, teacher, eps=0.0)) == pytest.approx(expected)
    assert float(square_head([torch.ones(3)], [torch.zeros(3)], eps=0.5)) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"shapes \(2,\) \(student\) and \(3,\)"):
        square_head([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(ValueError, match="expected as many"):
        square_head([], [torch.ones(3)])


def test_the_teachers_features_get_no_gradient() -> None:
    student, teacher = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    square_head([2 * student], [3 * teacher]).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_resnet", {}, 64),
        ("test_vit", {}, 160),
        ("test_revbifpn", {"mode": "reversible"}, 32),
        ("test_revbifpn", {"mode": "store"}, 32),
    ],
)
def test_task_is_the_sum_of_its_parts(name: str, options: dict[str, str], size: int) -> None:
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=4, **options)
    teacher = copy.deepcopy(student)
    task = SquareHeadTask(
        student, teacher, nn.CrossEntropyLoss(), task_weight=0.5, logit_weight=2.0, feature_weight=3.0
    )
    task.train()
    assert not teacher.training
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 3])
    found = task(x, y)
    parts = 0.5 * found["task_loss"] + 2.0 * found["kd_loss"] + 3.0 * found["feature_loss"]
    torch.testing.assert_close(found["loss"], parts)
    found["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for m in task.modules())


def test_copies_have_the_same_features() -> None:
    student = timm.create_model("test_resnet")
    task = SquareHeadTask(student, copy.deepcopy(student), nn.CrossEntropyLoss()).eval()
    x = torch.randn(2, 3, 32, 32)
    assert float(task.compare(x)) == 0
    with torch.no_grad():
        next(student.parameters()).mul_(1.5)
    assert float(task.compare(x)) > 0


@pytest.mark.slow
def test_gradient_is_that_of_the_formula_in_every_mode() -> None:
    grads = []
    for mode in ("store", "checkpoint", "reversible"):
        torch.manual_seed(0)
        student = timm.create_model("test_revbifpn", num_classes=4, mode=mode, exact=False, drop_rate=0.0).double()
        teacher = timm.create_model("test_revbifpn", num_classes=4, exact=False).double()
        task = SquareHeadTask(student, teacher, nn.CrossEntropyLoss()).double().train()
        task(torch.randn(2, 3, 32, 32).double(), torch.tensor([0, 3]))["loss"].backward()
        grads.append({n: p.grad for n, p in student.named_parameters()})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-6, atol=1e-9)


def test_which_layers() -> None:
    vit = timm.create_model("test_vit")
    assert feature_layers(vit) == [f"blocks.{i}" for i in range(6)]
    assert feature_layers(vit, ["blocks.[01]", "blocks.*.mlp"])[:3] == ["blocks.0", "blocks.1", "blocks.0.mlp"]
    with pytest.raises(ValueError, match="layers 'stages'"):
        feature_layers(vit, ["stages"])
    with pytest.raises(ValueError, match="names no features"):
        feature_layers(nn.Linear(2, 2))
    student, teacher = timm.create_model("test_vit"), timm.create_model("test_resnet")
    with pytest.raises(ValueError, match=r"the teacher, ResNet, has no module 'blocks\.0'"):
        SquareHeadTask(student, teacher, nn.CrossEntropyLoss())


def test_layers_without_a_gradient_are_refused() -> None:
    student = timm.create_model("test_revbifpn", mode="reversible")
    task = SquareHeadTask(student, copy.deepcopy(student), nn.CrossEntropyLoss(), layers=["body.ops.2.ops.0.f"])
    with pytest.raises(ValueError, match="inside of the reversible part"):
        task.train()(torch.randn(2, 3, 32, 32), torch.tensor([0, 3]))


def test_each_network_sees_images_in_its_own_normalisation() -> None:
    student, teacher = (timm.create_model("test_resnet", num_classes=2).eval() for _ in range(2))
    task = SquareHeadTask(student, teacher, nn.CrossEntropyLoss(), layers=["conv1"]).eval()
    task.normalize({"mean": (0.5,) * 3, "std": (0.5,) * 3}, {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task(torch.ones(1, 3, 32, 32), torch.tensor([0]))
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 32, 32))  # 1 is white, for both
