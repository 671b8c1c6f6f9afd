"""How ops couple the widths of what goes in and what comes out: one function per op, which ``couple`` applies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..trace import Op, Trace, Value
from .coupling import Coupling, Rule
from .widths import Form, is_number, number

RULES: dict[str, Rule] = {}
SAME = {"clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "as_strided_", "dropout", "cumsum", "flip"}
SAME |= {"_softmax", "_safe_softmax", "_log_softmax", "roll", "bernoulli_", "copy_"}
SAME |= {"hardswish", "hardswish_", "mish_", "_prelu_kernel"}  # elementwise, though torch does not tag them so
POOLS = (
    "max_pool",
    "avg_pool",
    "adaptive_",
    "_adaptive_",
    "upsample_",
    "_upsample_",
    "reflection_pad",
    "replication_pad",
)


def couple(model: nn.Module, recorded: Trace) -> Coupling:
    """Every dimension of a trace in terms of free widths, by the rules of its ops; one without a rule fixes them.

    Args:
        model: the traced one.
        recorded: its trace.
    """
    return Coupling(model, recorded, _rule_of)


def _rule_of(op: Op) -> Rule:
    if not op.inputs:
        return lambda c, op: c.numbers(op.outputs)
    if op.name in RULES:
        return RULES[op.name]
    if "scaled_dot_product" in op.name:
        return attention
    if op.name.startswith(POOLS):
        return pool
    if torch.Tag.pointwise in op.func.tags or op.name in SAME:
        return pointwise
    return Coupling.unknown


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops by their names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _dims(dims: Any, rank: int) -> list[int]:
    chosen = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted(d % rank for d in chosen)


def _argument(op: Op, name: str, default: Any = None) -> Any:
    """An argument of the op by its name in the schema."""
    for index, argument in enumerate(op.func._schema.arguments):
        if argument.name == name:
            given = op.args[index] if index < len(op.args) else op.kwargs.get(name, argument.default_value)
            return default if given is None else given
    return default


@rule("convolution")
def convolution(c: Coupling, op: Op) -> list[list[Form]]:
    """Output channels are the weight's, input channels too; depthwise, the groups follow the channels."""
    x, weight, bias = op.args[:3]
    transposed, groups = op.args[6], op.args[8]
    xs, ws = c.forms(x), c.forms(weight)
    for form in ws[2:]:
        c.fix(form, "kernel size", op)
    out, inner = (ws[1], ws[0]) if transposed else (ws[0], ws[1])
    if groups == 1:
        c.unify(xs[1], inner, op)
    elif transposed:
        for form in (xs[1], out, inner):
            c.fix(form, "grouped transposed convolution", op)
    elif groups == x.shape[1]:
        c.unify(out, c.widths.times(xs[1], weight.shape[0] // groups), op)
    else:
        c.unify(xs[1], c.widths.times(inner, groups), op)
        c.widths.divided(out, groups, c.place(op))
    width = c.widths.times(out, groups) if transposed and groups > 1 else out
    if isinstance(bias, Value):
        c.unify(c.forms(bias)[0], width, op)
    return [[xs[0], width, *(number(n) for n in op.outputs[0].shape[2:])]]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_native_batch_norm_legit")
def batch_norm(c: Coupling, op: Op) -> list[list[Form]]:
    """Statistics and parameters are as wide as the channels."""
    x, *others = op.args[:5]
    xs = c.forms(x)
    for value in others:
        if isinstance(value, Value):
            c.unify(c.forms(value)[0], xs[1], op)
    return [xs, *([xs[1]] if value.shape == (x.shape[1],) else c.numbers([value])[0] for value in op.outputs[1:])]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(c: Coupling, op: Op) -> list[list[Form]]:
    """Parameters have the shape of the last dimensions."""
    x, shape = op.args[:2]
    xs = c.forms(x)
    for value in op.inputs[1:]:
        for form, last in zip(c.forms(value), xs[-len(shape) :], strict=True):
            c.unify(form, last, op)
    kept = [[*xs[: -len(shape)], *(number(1) for _ in shape)] for _ in op.outputs[1:]]
    return [xs, *kept]


@rule("native_group_norm")
def group_norm(c: Coupling, op: Op) -> list[list[Form]]:
    """Channels stay a multiple of the groups."""
    xs, groups = c.forms(op.args[0]), op.args[6]
    for value in op.inputs[1:]:
        c.unify(c.forms(value)[0], xs[1], op)
    c.widths.divided(xs[1], groups, c.place(op))
    return [xs, *c.numbers(op.outputs[1:])]


@rule("mm", "bmm", "addmm", "baddbmm")
def product(c: Coupling, op: Op) -> list[list[Form]]:
    """``(..., m, k) @ (..., k, n)``."""
    *bias, a, b = op.inputs[:3]
    rows, columns = c.forms(a), c.forms(b)
    c.unify(rows[-1], columns[-2], op)
    c.note_scale(op, rows[-1])
    if len(rows) == 3:
        c.unify(rows[0], columns[0], op)
    out = [*rows[:-1], columns[-1]]
    if bias:
        c.broadcast([c.forms(bias[0]), out], op.outputs[0].shape, op)
    return [out]


def attention(c: Coupling, op: Op) -> list[list[Form]]:
    """Fused attention: ``(B, H, N, D)``."""
    q, k, v = (c.forms(value) for value in op.args[:3])
    for left, right in ((q[1], k[1]), (q[1], v[1]), (q[3], k[3])):
        c.unify(left, right, op)
    c.note_scale(op, q[3])
    for form in (q[0], q[2], k[2], v[2]):
        c.fix(form, "tokens", op)
    return [[*q[:3], v[3]], *c.numbers(op.outputs[1:])]


def pointwise(c: Coupling, op: Op) -> list[list[Form]]:
    """Element by element, with broadcasting."""
    out = c.broadcast([c.forms(value) for value in op.inputs], op.outputs[0].shape, op)
    return [out for _ in op.outputs]


def pool(c: Coupling, op: Op) -> list[list[Form]]:
    """Channels stay, the picture's sides are numbers."""
    xs = c.forms(op.inputs[0])
    return [[*xs[:2], *(number(n) for n in value.shape[2:])] for value in op.outputs]


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "linalg_vector_norm",
    "var",
    "std",
    "var_mean",
    "norm",
    "argmax",
    "prod",
    "max",
    "min",
)
def reduction(c: Coupling, op: Op) -> list[list[Form]]:
    """Reduced dimensions become 1, or go."""
    xs = c.forms(op.inputs[0])
    dims = _dims(_argument(op, "dim"), len(xs))
    keep = bool(_argument(op, "keepdim", False))
    out = [number(1) if d in dims else form for d, form in enumerate(xs) if keep or d not in dims]
    return [out for _ in op.outputs]


@rule("permute")
def permute(c: Coupling, op: Op) -> list[list[Form]]:
    """Dimensions in another order."""
    xs = c.forms(op.args[0])
    return [[xs[d] for d in op.args[1]]]


@rule("transpose", "t")
def transpose(c: Coupling, op: Op) -> list[list[Form]]:
    """Two dimensions exchanged."""
    xs = list(c.forms(op.args[0]))
    first, second = op.args[1:] if op.name == "transpose" else (0, -1)
    xs[first], xs[second] = xs[second], xs[first]
    return [xs]


@rule("unsqueeze")
def unsqueeze(c: Coupling, op: Op) -> list[list[Form]]:
    """A dimension of 1 more."""
    xs = list(c.forms(op.args[0]))
    xs.insert(op.args[1] % (len(xs) + 1), number(1))
    return [xs]


@rule("squeeze")
def squeeze(c: Coupling, op: Op) -> list[list[Form]]:
    """Dimensions of 1 less."""
    xs = c.forms(op.args[0])
    dims = _dims(_argument(op, "dim"), len(xs))
    return [[f for d, f in enumerate(xs) if not (d in dims and op.args[0].shape[d] == 1)]]


@rule("expand")
def expand(c: Coupling, op: Op) -> list[list[Form]]:
    """Dimensions of 1 repeated: a number of times, so those do not change."""
    xs, shape = c.forms(op.args[0]), op.outputs[0].shape
    xs = [number(1)] * (len(shape) - len(xs)) + list(xs)
    old = (1,) * (len(shape) - len(op.args[0].shape)) + op.args[0].shape
    return [[number(n) if before != n else form for form, before, n in zip(xs, old, shape, strict=True)]]


@rule("select")
def select(c: Coupling, op: Op) -> list[list[Form]]:
    """One of a dimension, which must be no width."""
    xs = list(c.forms(op.args[0]))
    c.fix(xs.pop(op.args[1] % len(xs)), "one channel is selected", op)
    return [xs]


@rule("unbind")
def unbind(c: Coupling, op: Op) -> list[list[Form]]:
    """All of a dimension apart, which must be no width."""
    xs = list(c.forms(op.args[0]))
    c.fix(xs.pop(_argument(op, "dim", 0) % len(xs)), "channels are taken apart", op)
    return [xs for _ in op.outputs]


@rule("slice", "split", "split_with_sizes", "chunk", "narrow")
def split(c: Coupling, op: Op) -> list[list[Form]]:
    """Parts of a dimension: even parts of a width stay even; uneven ones are numbers in the program and stay."""
    value = op.args[0]
    xs = list(c.forms(value))
    dim = _argument(op, "dim", 0) % len(xs)
    size, parts = value.shape[dim], {out.shape[dim] for out in op.outputs}
    if parts == {size}:
        return [list(xs) for _ in op.outputs]
    if op.name in ("slice", "narrow") or len(parts) > 1 or is_number(c.widths.resolved(xs[dim])):
        c.fix(xs[dim], "channels are cut at fixed places", op)
        return [[*xs[:dim], number(out.shape[dim]), *xs[dim + 1 :]] for out in op.outputs]
    part = c.widths.divided(xs[dim], len(op.outputs), c.place(op))
    c.note_attributes(op, [part, xs[dim]])
    return [[*xs[:dim], part, *xs[dim + 1 :]] for _ in op.outputs]


@rule("cat")
def cat(c: Coupling, op: Op) -> list[list[Form]]:
    """One dimension adds up, the others agree."""
    parts = [list(c.forms(value)) for value in op.inputs if value.shape != (0,)]
    dim = _argument(op, "dim", 0) % len(parts[0])
    for d in range(len(parts[0])):
        for other in parts[1:]:
            if d != dim:
                c.unify(parts[0][d], other[d], op)
    out = parts[0][:]
    out[dim] = c.joined([xs[dim] for xs in parts])
    return [out]


@rule("stack")
def stack(c: Coupling, op: Op) -> list[list[Form]]:
    """A new dimension; the others agree."""
    parts = [c.forms(value) for value in op.inputs]
    for other in parts[1:]:
        for a, b in zip(parts[0], other, strict=True):
            c.unify(a, b, op)
    out = list(parts[0])
    out.insert(_argument(op, "dim", 0) % (len(out) + 1), number(len(parts)))
    return [out]


@rule("constant_pad_nd")
def pad(c: Coupling, op: Op) -> list[list[Form]]:
    """Padded dimensions are numbers."""
    value, out = op.args[0], op.outputs[0]
    pairs = zip(c.forms(value), value.shape, out.shape, strict=True)
    return [[form if a == b else c.padded(form, b, op) for form, a, b in pairs]]


@rule("index")
def index(c: Coupling, op: Op) -> list[list[Form]]:
    """Rows by number: as a table of relative positions is read."""
    value, indices = op.args[0], [i for i in op.args[1] if i is not None]
    xs = c.forms(value)
    if len(indices) != len(op.args[1]):
        return c.unknown(op)
    for form in xs[: len(indices)]:
        c.fix(form, "its rows are numbered", op)
    rest = xs[len(indices) :]
    shape = op.outputs[0].shape
    return [[*(number(n) for n in shape[: len(shape) - len(rest)]), *rest]]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(c: Coupling, op: Op) -> list[list[Form]]:
    """Dimensions are merged and split; see ``_block``."""
    value, out = op.args[0], op.outputs[0].shape
    xs = c.forms(value)
    found: list[Form] = [number(1)] * len(out)
    for olds, news in _blocks(value.shape, out):
        for position, form in zip(news, _block(c, op, [xs[i] for i in olds], [out[j] for j in news]), strict=True):
            found[position] = form
    c.note_attributes(op, found)
    return [found]


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of neighbouring dimensions with equal products; dimensions of 1 are left out."""
    a, b = ([i for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    blocks, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        olds, news = a[i : i + 1], b[j : j + 1]
        i, j = i + 1, j + 1
        while (left := math.prod(old[k] for k in olds)) != (right := math.prod(new[k] for k in news)):
            if left < right:
                olds.append(a[i])
                i += 1
            else:
                news.append(b[j])
                j += 1
        blocks.append((olds, news))
    return blocks


def _block(c: Coupling, op: Op, olds: list[Form], news: list[int]) -> list[Form]:
    """Of a product of dimensions one may be a width: it goes on as the whole, or as the factor that can grow."""
    olds = [c.widths.resolved(form) for form in olds]
    wide = [i for i, form in enumerate(olds) if not is_number(form)]
    if not wide:
        return [number(n) for n in news]
    if len(wide) > 1:
        for form in olds:
            c.fix(form, "several widths are merged", op)
        return [number(n) for n in news]
    form, sizes = olds[wide[0]], [c.widths.now(old) for old in olds]
    if len(news) == 1:
        merged = c.widths.times(form, math.prod(sizes) // sizes[wide[0]])
        c.tie_attention(op, merged)
        return [merged]
    before = math.prod(sizes[: wide[0]])
    for q in range(len(news)):
        if math.prod(news[:q]) == before and news[q] == sizes[wide[0]]:
            return [form if i == q else number(n) for i, n in enumerate(news)]
    if len(olds) > 1:
        c.fix(form, "a width is merged and split at once", op)
        return [number(n) for n in news]
    q = _growing(c.module(op), news)
    part = c.widths.divided(form, math.prod(news) // news[q], c.place(op))
    return [part if i == q else number(n) for i, n in enumerate(news)]


def _growing(module: nn.Module, sizes: list[int]) -> int:
    """Which factor of a split width grows: the number of heads, if the module has one; else the last."""
    heads = {v for k, v in vars(module).items() if "head" in k and "dim" not in k and isinstance(v, int)}
    found = [q for q, n in enumerate(sizes) if n in heads] or [len(sizes) - 1]
    if len(found) > 1 and found[-1] == len(sizes) - 1:
        found.pop()  # as many heads as channels of a head: those come last
    return found[-1]  # three heads: queries, keys and values come before
