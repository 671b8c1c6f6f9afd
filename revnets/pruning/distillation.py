"""Distillation from a dense teacher: SquareHead on features and divergence of the outputs, as a training task of timm.

Not imported by ``revnets.pruning``: it needs a timm that has ``timm.task``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model
from torch import Tensor, nn


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-6) -> Tensor:
    r"""SquareHead (2310.06927), summed over layers: :math:`\sum_l mse(s_l, t_l) / (mean(t_l^2) + \epsilon)`.

    Args:
        student: features, any shapes.
        teacher: features of the same shapes; they get no gradient.
        eps: keeps features that are 0 from dividing by 0.

    Raises:
        ValueError: when numbers or shapes differ.

    Example:
        >>> round(float(square_head([torch.zeros(2, 3)], [torch.full((2, 3), 5.0)])), 4)
        1.0
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} features of the student and {len(teacher)} of the teacher: expected as many")
    losses = []
    for s, t in zip(student, teacher, strict=True):
        if s.shape != t.shape:
            raise ValueError(
                f"features of shapes {tuple(s.shape)} (student) and {tuple(t.shape)} (teacher): expected equal ones; "
                "choose other layers or a teacher of the student's widths"
            )
        t = t.detach().float()
        losses.append((s.float() - t).square().mean() / (t.square().mean() + eps))
    return torch.stack(losses).sum() if losses else torch.zeros(())


def feature_layers(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the modules whose outputs are compared.

    Args:
        model: of timm, or any with ``patterns``.
        patterns: such as ``"blocks.*"``, where ``*`` stops at a dot; none: the modules that ``feature_info`` names.

    Raises:
        ValueError: for a pattern that fits no module, or a model that names no features.

    Example:
        >>> import timm
        >>> feature_layers(timm.create_model("test_resnet"))
        ['act1', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    names = [name for name, _ in model.named_modules() if name]
    if not patterns:
        info: Any = getattr(model, "feature_info", None) or []
        found = [one["module"] for one in info if isinstance(one, Mapping) and one.get("module") in names]
        if not found:
            raise ValueError(
                f"{type(model).__name__} names no features: give the layers to compare, such as 'blocks.*'"
            )
        return found
    found = []
    for pattern in patterns:
        fitting = [n for n in names if fnmatch.fnmatch(n, pattern) and n.count(".") == pattern.count(".")]
        if not fitting:
            raise ValueError(f"layers {pattern!r}: no module of {type(model).__name__} has such a name")
        found += [name for name in fitting if name not in found]
    return found


class SquareHeadTask(LogitDistillationTask):
    """timm's task of distilling outputs, plus SquareHead on features: for students that are pruned copies (2405.03594).

    ``loss = task_weight * criterion + logit_weight * T^2 KL + feature_weight * square_head``. Features are taken by
    hooks, so that wrapping the student for several processes changes nothing.

    Args:
        student: to train.
        teacher: whose features have the student's shapes.
        criterion: of the student's outputs and the targets.
        layers: names or patterns of modules; none: those of ``feature_info``.
        task_weight: of ``criterion``.
        logit_weight: of the divergence of the outputs.
        feature_weight: of SquareHead; 0 compares no features.
        temperature: of both outputs.
        device: of both networks.

    Raises:
        ValueError: for layers that are not there.

    Example:
        >>> import timm
        >>> student, teacher = (timm.create_model("test_resnet", num_classes=2) for _ in range(2))
        >>> task = SquareHeadTask(student, teacher, nn.CrossEntropyLoss())
        >>> sorted(task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])))
        ['feature_loss', 'kd_loss', 'loss', 'output', 'task_loss']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: nn.Module,
        *,
        layers: Sequence[str] = (),
        task_weight: float = 1.0,
        logit_weight: float = 1.0,
        feature_weight: float = 1.0,
        temperature: float = 2.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            student,
            DistillationTeacher(teacher.requires_grad_(False), device=device),
            criterion,
            task_loss_weight=task_weight,
            distill_loss_weight=logit_weight,
            temperature=temperature,
            device=device,
            verbose=False,
        )
        self.feature_weight = feature_weight
        self.layers = feature_layers(unwrap_model(student), layers) if feature_weight else []
        known = dict(teacher.named_modules())
        missing = [name for name in self.layers if name not in known]
        if missing:
            raise ValueError(f"the teacher, {type(teacher).__name__}, has no module {missing[0]!r}: give other layers")

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Args: input: ``(N, C, H, W)``; target: of the criterion. Returns: ``loss`` and its parts."""
        networks = (unwrap_model(self.trainable_module), self.teacher.model)
        with _recorded(networks, self.layers) as (student, teacher):
            result: dict[str, Tensor] = super().forward(input, target)
        if self.layers:
            self._check(student)
            features = square_head([student[n] for n in self.layers], [teacher[n] for n in self.layers])
            result["feature_loss"] = features
            result["loss"] = result["loss"] + self.feature_weight * features
        return result

    def normalize(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
        """Say how images were normalised for each network, where it is not as ``pretrained_cfg`` says.

        Args:
            student: with ``mean`` and ``std`` by channel, as of ``timm.data.resolve_data_config``.
            teacher: likewise.
        """
        for owner, names, config in (
            (self, ("student_mean", "student_std"), student),
            (self.teacher, ("mean_kd", "std_kd"), teacher),
        ):
            for name, values in zip(names, (config["mean"], config["std"]), strict=True):
                like = getattr(owner, name)
                setattr(owner, name, torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1))

    @torch.no_grad()
    def compare(self, images: Tensor) -> Tensor:
        """SquareHead on some images, in the modes that both networks are in.

        Raises:
            ValueError: when features have no or different shapes.
        """
        networks = (unwrap_model(self.trainable_module), self.teacher.model)
        with _recorded(networks, self.layers) as (student, teacher):
            for network in networks:
                network(images)
        self._check(student)
        return square_head([student[n] for n in self.layers], [teacher[n] for n in self.layers])

    def _check(self, features: Mapping[str, Tensor]) -> None:
        for name in self.layers:
            if name not in features:
                raise ValueError(f"layer {name!r} gives no single tensor, or did not run: choose other layers")
            if torch.is_grad_enabled() and not features[name].requires_grad:
                raise ValueError(
                    f"layer {name!r} is inside of the reversible part, whose activations are not kept: choose layers "
                    "outside of it, or mode='store'"
                )


@contextmanager
def _recorded(networks: Sequence[nn.Module], layers: Sequence[str]) -> Iterator[list[dict[str, Tensor]]]:
    """Outputs of the layers of each network, by name, of what runs within."""
    found: list[dict[str, Tensor]] = [{} for _ in networks]
    handles = [
        network.get_submodule(name).register_forward_hook(_keeper(one, name))
        for network, one in zip(networks, found, strict=True)
        for name in layers
    ]
    try:
        yield found
    finally:  # before the backward pass, which may run modules again
        for handle in handles:
            handle.remove()


def _keeper(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = output

    return keep
