"""A model as a graph of torch's operators, with its batch norms folded into the convolutions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers.fold import fold
from ..training.options.values import POSITIVE, SHARE

ATEN = torch.ops.aten
INPUT_NAME, OUTPUT_NAME = "image", "output"


class ExportError(ValueError):
    """A model that cannot be exported, or whose exported form computes something else."""


def check_limits(tolerance: float, max_density: float | None) -> None:
    """Make sure that the limits of ``deploy`` are numbers that can be.

    Raises:
        ExportError: they are not.
    """
    try:
        POSITIVE.check("tolerance", tolerance)
        if max_density is not None:
            SHARE.check("max_density", max_density)
    except ValueError as error:
        raise ExportError(str(error)) from None


def export_graph(model: nn.Module, x: Tensor, any_batch: bool = True) -> fx.GraphModule:
    """The model in eval mode as a graph: sparse layers of this library become torch's own, batch norms disappear.

    Args:
        model: any that ``torch.export`` takes; it is left as it is.
        x: an example of the input, ``(N, C, H, W)``.
        any_batch: whether other batch sizes will come.

    Raises:
        ExportError: when ``torch.export`` refuses the model.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> graph, x = export_graph(net, torch.zeros(2, 3, 8, 8)), torch.randn(5, 3, 8, 8)
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.conv2d.default', 'aten.relu.default']
        >>> torch.allclose(graph(x), net(x), atol=1e-6)
        True
    """
    graph = trace(fold(model), x, any_batch)
    fold_norms(graph)
    drop_identities(graph)
    return graph


def trace(model: nn.Module, x: Tensor, any_batch: bool = True) -> fx.GraphModule:
    """The module's graph as ``torch.export`` sees it, checks of the input's shape left out."""
    program = export_program(model, x, any_batch)
    graph: Any = program.module()
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph


def export_program(model: nn.Module, x: Tensor, any_batch: bool = True) -> torch.export.ExportedProgram:
    """``torch.export.export``, for any batch size or for that of ``x`` alone.

    Raises:
        ExportError: when it refuses.
    """
    if any_batch and len(x) == 1:  # a size of 1 would be taken for a constant
        x = torch.cat([x, x])
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    try:
        with torch.no_grad():
            return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code does
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hint = "; a fixed batch size may do: --batch-size 1" if any_batch else ""
        raise ExportError(
            f"torch.export refuses the model: {lines[0] if lines else type(error).__name__}{hint}"
        ) from error


def calls(graph: fx.GraphModule, *targets: Callable[..., Any]) -> Iterator[fx.Node]:
    """Nodes that call one of these operators, in order."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a node reads; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(graph)
    return value if isinstance(value, Tensor) else None


def is_known(graph: fx.GraphModule, node: Any) -> bool:
    """Whether a node is a parameter or buffer, or no argument was given at all."""
    return node is None or constant(graph, node) is not None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator's call by the name in its schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, declared in enumerate(schema.arguments):
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value if declared.has_default_value() else default)
    return default


def is_in_place(node: fx.Node) -> bool:
    """Whether an operator changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def sole_name(node: Any, user: fx.Node) -> bool:
    """Whether what a node computes is read by that user alone, by no other name either: it may be lost.

    False for inputs and weights.
    """
    if not isinstance(node, fx.Node) or not node.op.startswith("call") or list(node.users) != [user]:
        return False
    return all(sole_name(source, node) for source in _shared(node))


def is_changed(node: fx.Node, after: fx.Node, before: fx.Node | None = None) -> bool:
    """Whether an operator between the two changes, in place, the memory that a node reads, by whatever name."""
    names, new = {node}, [node]
    while new:
        name = new.pop()
        near = [*_shared(name), *(user for user in name.users if name in _shared(user))]
        new += [other for other in near if other not in names]
        names.update(near)
    return any(is_in_place(name) and after < name and (before is None or name < before) for name in names)


def _shared(node: fx.Node) -> list[fx.Node]:
    """Arguments whose memory an operator's result is, or changes: those of views and of operators in place."""
    if node.target is operator.getitem:
        found = [node.args[0]]
    else:
        schema = getattr(node.target, "_schema", None)
        declared = [] if schema is None else [a.name for a in schema.arguments if a.alias_info is not None]
        found = [argument(node, name) for name in declared]
    return [source for source in found if isinstance(source, fx.Node)]


def add_constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Register a buffer and make a node that reads it, where the graph's insertion point is."""
    unique, number = name, 0
    while hasattr(graph, unique):
        number += 1
        unique = f"{name}_{number}"
    graph.register_buffer(unique, value)
    return graph.graph.get_attr(unique)


@torch.no_grad()
def fold_norms(graph: fx.GraphModule) -> int:
    """Multiply batch norms that follow a convolution into its weights; returns how many."""
    folded = 0
    for norm in calls(graph, ATEN.batch_norm.default):
        conv: Any = norm.args[0]
        if not _only_conv(conv, norm) or argument(norm, "training"):
            continue
        weight, bias = (constant(graph, argument(conv, name)) for name in ("weight", "bias"))
        mean, var = (constant(graph, argument(norm, name)) for name in ("running_mean", "running_var"))
        scale, shift = (constant(graph, argument(norm, name)) for name in ("weight", "bias"))
        optional = (argument(conv, "bias"), argument(norm, "weight"), argument(norm, "bias"))
        if weight is None or mean is None or var is None or not all(is_known(graph, value) for value in optional):
            continue
        new_weight, new_bias = fuse_conv_bn_weights(weight, bias, mean, var, argument(norm, "eps"), scale, shift)
        with graph.graph.inserting_before(conv):
            stem = conv.name.replace(".", "_")
            nodes = [
                add_constant(graph, f"{stem}_weight", new_weight.detach().contiguous()),
                add_constant(graph, f"{stem}_bias", new_bias.detach().contiguous()),
            ]
        conv.args = (conv.args[0], *nodes, *conv.args[3:])
        conv.kwargs = {name: value for name, value in conv.kwargs.items() if name != "bias"}
        norm.replace_all_uses_with(conv)
        graph.graph.erase_node(norm)
        folded += 1
    clean(graph)
    return folded


def _only_conv(conv: Any, user: fx.Node) -> bool:
    return isinstance(conv, fx.Node) and conv.target == ATEN.conv2d.default and list(conv.users) == [user]


def drop_identities(graph: fx.GraphModule) -> None:
    """Remove what does nothing in eval mode: dropout, export's assertions, conversions to the same, whole slices."""
    for node in calls(graph, ATEN._assert_tensor_metadata.default):
        graph.graph.erase_node(node)
    for node in calls(graph, *_IDENTITIES):
        if _IDENTITIES[node.target](node):
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    clean(graph)


def _is_same_type(node: fx.Node) -> bool:
    example = node.args[0].meta.get("val")  # type: ignore[union-attr]
    same = isinstance(example, Tensor) and example.dtype == argument(node, "dtype")
    return same and not argument(node, "copy")


def _is_whole(node: fx.Node) -> bool:
    return not argument(node, "start") and argument(node, "end") in (None, 2**63 - 1) and argument(node, "step") == 1


_IDENTITIES: dict[Any, Callable[[fx.Node], bool]] = {
    ATEN.dropout.default: lambda node: not argument(node, "train"),
    ATEN.feature_dropout.default: lambda node: not argument(node, "train"),
    ATEN.to.dtype: _is_same_type,
    ATEN.slice.Tensor: _is_whole,
}


def clean(graph: fx.GraphModule) -> None:
    """Remove what is no longer read, weights included."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.graph.lint()
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
    graph.recompile()


def worst_error(output: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value; several outputs: the worst of them.

    Example:
        >>> worst_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.5
    """
    outputs, wanted = flat(output), flat(expected)
    if [t.shape for t in outputs] != [t.shape for t in wanted]:
        raise ExportError(
            f"outputs of shapes {[tuple(t.shape) for t in outputs]}: expected {[tuple(t.shape) for t in wanted]}"
        )
    errors = [
        float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-12)
        for a, b in zip(outputs, wanted, strict=True)
        if b.numel()
    ]
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def flat(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [torch.as_tensor(leaf) for leaf in leaves]
