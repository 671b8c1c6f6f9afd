"""What the blocks of a network do to their input, seen in one forward pass on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..profiling.fake import ProfileError, explain, fake_twin, new_fake_mode

# Nodes of autograd that hand on their input as it is, or number by number: a way past the layers of a block.
_PASSIVE = {
    *("Add", "Alias", "AsStrided", "Clone", "Expand", "Permute", "ReshapeAlias", "Slice", "Split", "SplitWithSizes"),
    *("Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View", "ConstantPadNd", "Roll"),
    *("Relu", "LeakyRelu", "Silu", "Gelu", "Hardswish", "Hardtanh", "Elu", "Mish", "Prelu"),
}


@dataclass
class Stage:
    """An ``nn.Sequential`` and what was seen of it.

    Attributes:
        name: in the network.
        calls: how often it was called as a whole.
        blocks: by name, why each cannot be reversible; an empty word where it can.
    """

    name: str
    calls: int = 0
    blocks: dict[str, str] = field(default_factory=dict)


def probe(model: nn.Module, input_size: tuple[int, ...]) -> list[Stage]:
    """Look at all that is of the class ``nn.Sequential`` and holds blocks: modules with parameters and parts.

    Args:
        model: on any device, in any mode; it is left as it is.
        input_size: of one example.

    Raises:
        ValueError: when the model does not take such an input, or cannot run without memory.
    """
    stages: list[Stage] = []
    with new_fake_mode():
        twin = fake_twin(model, torch.device("cpu")).eval()
        dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        x = torch.empty(2, *input_size, dtype=dtype)
        for name, module in twin.named_modules():
            if type(module) is nn.Sequential and any(_is_block(child) for child in module):
                stages.append(_watched(name, module))
        try:
            with torch.enable_grad():
                twin(x)
        except Exception as error:  # whatever a model may raise
            said = error if isinstance(error, ProfileError) else explain(error, type(model).__name__)
            raise ValueError(
                f"reversible: {type(model).__name__} does not run on an input of shape {tuple(x.shape)} ({said}): "
                "give the right input_size"
            ) from error
    return stages


def _is_block(module: nn.Module) -> bool:
    """Whether it is made of layers and no mere row of them."""
    return type(module) is not nn.Sequential and any(True for _ in module.children()) and _has_parameters(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _watched(name: str, module: nn.Sequential) -> Stage:
    stage = Stage(name)

    def called(*_: Any) -> None:
        stage.calls += 1

    module.register_forward_pre_hook(called)
    for child, block in module.named_children():
        stage.blocks[child] = "is not called" if _is_block(block) else "is a single layer"
        if _is_block(block):
            _Watch(stage, child, block)
    return stage


class _Watch:
    """Hooks on a block: they give it a marked input, and look for the mark in its output."""

    def __init__(self, stage: Stage, name: str, block: nn.Module) -> None:
        self.stage, self.name, self.seen = stage, name, False
        self.marks: list[tuple[Tensor, Tensor] | None] = []
        block.register_forward_pre_hook(self.before, with_kwargs=True)
        block.register_forward_hook(self.after)

    def before(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            self.marks.append(None)
            return None
        leaf = args[0].detach().requires_grad_()
        given = leaf.clone()
        self.marks.append((leaf, given))
        return (given,), {}

    def after(self, block: nn.Module, args: Any, output: Any) -> None:
        reason = self._reason(self.marks.pop(), output)
        if not self.seen or reason:
            self.stage.blocks[self.name] = reason
        self.seen = True

    @staticmethod
    def _reason(mark: tuple[Tensor, Tensor] | None, output: Any) -> str:
        if mark is None or not isinstance(output, Tensor):
            return "takes or gives more than one tensor"
        leaf, given = mark
        if output.shape != leaf.shape or output.dtype != leaf.dtype:
            return f"changes the shape {_shown(leaf)} to {_shown(output)}"
        if given._version:
            return "changes its input in place"
        return "" if _passes(output, leaf) else "adds nothing to its input: it is no residual block"


def _shown(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))


def _passes(output: Tensor, leaf: Tensor) -> bool:
    """Whether the input comes to the output past all layers."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        if node.name().partition("Backward")[0].lstrip("_") in _PASSIVE:
            nodes += [following for following, _ in node.next_functions]
    return False
