"""Layers of a lowered graph bound into plans: as few calls of the kernel as there can be."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from ..kernels.compressed import conv_geometry, depthwise_geometry
from ..kernels.plan import ConvCall, MeanCall, Plan, Step
from .graph import ATEN, argument, clean, constant
from .lower import OPS


class _Bound(nn.Module):
    """A plan as a module of a graph."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self._plan(*inputs)

    __call__ = forward  # no hooks: layers take microseconds


def bind(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with the kernel's operators replaced by prepared calls, in place: less time per layer, same numbers.

    Layers that follow each other become one call.
    """
    run: dict[fx.Node, ConvCall | MeanCall] = {}
    number = 0
    for node in list(graph.graph.nodes):
        call = _prepared(graph, node)
        if call is not None:
            run[node] = call
        elif node.op in ("call_function", "call_module", "call_method", "output") and run:
            _replace_run(graph, run, f"kernel_{number}")
            run, number = {}, number + 1
    clean(graph)
    return graph


def _replace_run(graph: fx.GraphModule, run: dict[fx.Node, ConvCall | MeanCall], name: str) -> None:
    """Nodes in order, with nothing computed between them, as one."""
    read = [node for one in run for node in _operands(one)]
    inputs = [node for node in dict.fromkeys(read) if node is not None and node not in run]
    outputs = [node for node in run if any(user not in run for user in node.users)]
    numbers: dict[fx.Node | None, int | None] = {node: i for i, node in enumerate([*inputs, *run])}
    steps = [Step(call, *(numbers.get(operand) for operand in _operands(node))) for node, call in run.items()]  # type: ignore[arg-type]
    graph.add_module(name, _Bound(Plan(steps, len(inputs), [numbers[node] for node in outputs])))  # type: ignore[misc]
    with graph.graph.inserting_after(list(run)[-1]):
        new = graph.graph.call_module(name, tuple(inputs))
    with graph.graph.inserting_after(new):
        for place, node in enumerate(outputs):
            item = graph.graph.call_function(operator.getitem, (new, place))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in run)
    for node in reversed(list(run)):
        graph.graph.erase_node(node)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a layer reads: the input and the residual."""
    residual = argument(node, "residual") if node.target != ATEN.mean.dim else None
    return node.args[0], residual  # type: ignore[return-value]


def _prepared(graph: fx.GraphModule, node: fx.Node) -> ConvCall | MeanCall | None:
    """The call for a node that the kernel computes with weights that are known; None for all others."""
    if node.op != "call_function":
        return None
    if node.target == ATEN.mean.dim:
        return MeanCall() if _is_mean_of_pixels(node) else None
    if node.target not in (OPS.sparse_conv2d.default, OPS.depthwise_conv2d.default):
        return None
    bias = constant(graph, argument(node, "bias"))
    activation = argument(node, "activation")
    if node.target == OPS.depthwise_conv2d.default:
        weight = constant(graph, argument(node, "weight"))
        if weight is None:
            return None
        geometry = depthwise_geometry(weight, argument(node, "stride"), argument(node, "padding"))
        return ConvCall(geometry, weight, None, None, bias, activation)
    values, columns, rows = (constant(graph, argument(node, name)) for name in ("values", "columns", "rows"))
    source: Any = node.args[0]
    example = source.meta.get("val")
    if values is None or columns is None or rows is None or not isinstance(example, Tensor):
        return None
    settings = [argument(node, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")]
    return ConvCall(conv_geometry(example, rows, *settings), values, columns, rows, bias, activation)


def _is_mean_of_pixels(node: fx.Node) -> bool:
    example = node.args[0].meta.get("val")  # type: ignore[union-attr]
    if not isinstance(example, Tensor) or example.dim() != 4 or argument(node, "dtype") is not None:
        return False
    return sorted(d % 4 for d in argument(node, "dim")) == [2, 3] and bool(argument(node, "keepdim"))
