"""What the kernel is given: tensors of every layout give what contiguous ones do, all others are refused.

Run under the sanitizer (``make test-asan``) these show that nothing is read that has been freed or was never there.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revnets import kernels
from revnets.kernels import compressed
from revnets.kernels.build import Geometry
from revnets.kernels.byte_blocks import compress_bytes
from revnets.kernels.byte_ops import LAYERS
from revnets.kernels.calls import ConvCall, MapCall, MaxPoolCall, MeanCall, SliceCall, UpsampleCall, _check_weights
from revnets.kernels.compressed import compress
from revnets.kernels.layouts import transposed
from revnets.kernels.operands import address, readable
from revnets.kernels.plan import Plan, Step
from revnets.kernels.training import Structure, sparse_conv, sparse_linear

from ..deploy.nets import pruned_weight
from .nets import needs_kernel

pytestmark = needs_kernel


def _numbers(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


WEIGHT = pruned_weight(8, 6, 3, 3, sparsity=0.6, seed=0)
MATRIX = pruned_weight(8, 6, sparsity=0.5, seed=0)
MASK = MATRIX != 0
# one call of every operator: its tensors by name, and the rest
OPERATORS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "sparse_conv2d": (
        {
            "x": _numbers(2, 6, 9, 7),
            **dict(zip(("values", "columns", "rows"), compress(WEIGHT), strict=True)),
            "bias": _numbers(8),
            "residual": _numbers(2, 8, 5, 4),
        },
        {
            "kernel_size": [3, 3],
            "stride": [2, 2],
            "padding": [1, 1],
            "dilation": [1, 1],
            "groups": 1,
            "activation": "relu",
        },
    ),
    "depthwise_conv2d": (
        {
            "x": _numbers(2, 6, 9, 7),
            "weight": _numbers(6, 1, 3, 3),
            "bias": _numbers(6),
            "residual": _numbers(2, 6, 9, 7),
        },
        {"stride": [1, 1], "padding": [1, 1], "activation": "none"},
    ),
    "sparse_linear": (
        {
            "x": _numbers(3, 5, 6),
            **dict(zip(("values", "columns", "rows"), compress(MATRIX), strict=True)),
            "bias": _numbers(8),
        },
        {},
    ),
}
_BYTES = _numbers(2, 2, 9, 7, 4).mul(50).add(100).clamp(0, 255).to(torch.uint8)
_INT8 = (WEIGHT * 40).to(torch.int8)
_FINISH = {"numbers": [100, 90, 0, 255, 80], "residual_scale": 0.5}
_SCALE, _TABLE = torch.linspace(0.001, 0.002, 8), torch.arange(256, dtype=torch.uint8).flip(0)
_WHOLE = torch.arange(8, dtype=torch.int32) * 50
OPERATORS |= {
    "int8_conv2d": (
        {
            "x": _BYTES,
            **dict(zip(("values", "columns", "rows"), compress_bytes(_INT8), strict=True)),
            "bias": _WHOLE,
            "scale": _SCALE,
            "residual": _BYTES[:, :, :5, :4],
            "table": _TABLE,
        },
        {
            "in_channels": 6,
            "kernel_size": [3, 3],
            "stride": [2, 2],
            "padding": [1, 1],
            "dilation": [1, 1],
            "to_float": False,
            **_FINISH,
        },
    ),
    "int8_depthwise_conv2d": (
        {
            "x": _BYTES,
            "weight": _INT8[:, :1].contiguous(),
            "bias": _WHOLE,
            "scale": _SCALE,
            "residual": _BYTES,
            "table": _TABLE,
        },
        {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], **_FINISH},
    ),
    "int8_linear": (
        {
            "x": _BYTES[:, :, :1, :1],
            "weight": _INT8[:, :, 0, 0].contiguous(),
            "bias": _WHOLE,
            "scale": _SCALE,
            "residual": _BYTES[:, :, 1:2, :1],
            "table": _TABLE,
        },
        {"to_float": False, **_FINISH},
    ),
    "int8_mean": ({"x": _BYTES, "table": _TABLE}, {"scale": 0.9, "numbers": _FINISH["numbers"]}),
    "int8_add": ({"x": _BYTES, "residual": _BYTES.flip(3), "table": _TABLE}, {"scale": 0.9, **_FINISH}),
    "int8_mul": (
        {"x": _BYTES, "gates": _BYTES[:, :, :1, :1], "table": _TABLE},
        {"scale": 0.01, "numbers": _FINISH["numbers"]},
    ),
    "int8_max_pool2d": ({"x": _BYTES}, {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1]}),
    "int8_quantize": ({"x": _numbers(2, 6, 9, 7)}, {"scale": 0.02, "zero": 99}),
    "int8_dequantize": ({"x": _BYTES}, {"channels": 6, "scale": 0.02, "zero": 99}),
}
TRAINING: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "sparse_conv": (
        lambda x, weight, bias: sparse_conv(x, weight, bias, Structure(MASK)),
        {"x": _numbers(2, 6, 5, 4), "weight": MATRIX.reshape(8, 6, 1, 1), "bias": _numbers(8)},
    ),
    "sparse_linear": (
        lambda x, weight, bias: sparse_linear(x, weight, bias, Structure(MASK)),
        {"x": _numbers(3, 5, 6), "weight": MATRIX, "bias": _numbers(8)},
    ),
    "convolve": (
        lambda x, values, bias: Structure(MASK).convolve(x, values, bias),
        {"x": _numbers(2, 6, 5, 4), "values": Structure(MASK).values(MATRIX), "bias": _numbers(8)},
    ),
    "grads": (
        lambda grad, x, values: torch.cat(
            [t.flatten() for t in Structure(MASK).grads(grad, x, values, MATRIX.shape, [True] * 3) if t is not None]
        ),
        {"grad": _numbers(2, 8, 5, 4), "x": _numbers(2, 6, 5, 4), "values": Structure(MASK).values(MATRIX)},
    ),
    "structure": (
        lambda mask: Structure(mask).convolve(_numbers(2, 6, 5, 4), Structure(mask).places.float()),
        {"mask": MASK},
    ),
    "transposed": (transposed, {"x": _numbers(17, 20)}),
    "conv": (
        lambda x, residual, **weights: ConvCall(Geometry(6, 8, (3, 3), (2, 2), (1, 1)), **weights)(x, residual),
        OPERATORS["sparse_conv2d"][0],
    ),
    "plan": (lambda x: Plan([Step(MeanCall(), (0,))], 1, [1])(x)[0], {"x": _numbers(2, 3, 5, 4)}),
}
ALL: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    **{
        f"ops.{name}": (
            lambda _name=name, **given: getattr(torch.ops.revnets, _name)(**given, **OPERATORS[_name][1]),
            t,
        )
        for name, (t, _) in OPERATORS.items()
    },
    **TRAINING,
}
ARGUMENTS = [pytest.param(name, argument, id=f"{name}-{argument}") for name, (_, t) in ALL.items() for argument in t]


def _interleaved(t: Tensor) -> Tensor:
    """Between other numbers, which may not be read."""
    return torch.stack([t, torch.full_like(t, 1 if t.dtype is torch.bool else 99)], -1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    axes = list(range(t.dim()))[::-1]
    return t.permute(axes).contiguous().permute(axes)


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def _backwards(t: Tensor) -> Tensor:
    """The nearest that torch has to a negative stride."""
    return t.flip(0).flip(0)


def _by_pixel(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else _transposed(t)


def _negated(t: Tensor) -> Tensor:
    """Contiguous, but for a bit that says to read it with the other sign."""
    return torch._neg_view(-t) if t.is_floating_point() else t


def _imaginary(t: Tensor) -> Tensor:
    """A view of the conjugate's imaginary part: strided, with that bit."""
    return torch.complex(t, -t).conj().imag if t.dtype is torch.float32 else _interleaved(t)


def _expanded(t: Tensor) -> Tensor:
    """One number many times; of structures, which would not be right then, one sample that is the same."""
    return t.flatten()[:1].expand(t.numel()).view(t.shape) if t.dtype is torch.float32 else t


def _requiring_grad(t: Tensor) -> Tensor:
    return t.clone().requires_grad_() if t.is_floating_point() else t


LAYOUTS = [
    _interleaved, _transposed, _offset, _backwards, _by_pixel, _negated, _imaginary, _expanded, _requiring_grad
]  # fmt: skip


def _freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _cut(t: Tensor) -> Tensor:
    t = _interleaved(t).contiguous()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "another type": lambda t: t.double() if t.is_floating_point() else t.long(),
    "half": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64).conj(),
    "no dimension": lambda t: t.flatten()[0],
    "one more": lambda t: torch.cat([t, t[:1]]),
    "one less": lambda t: t[1:],
    "nothing": lambda t: t[:0],
    "another dimension": lambda t: t[None],
    "sparse": lambda t: t.to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "freed": _freed,
    "cut": _cut,
}
# what another number of images, rows or whole dimensions means is the operator's affair
_SIZES = {"x", "mask"}
TAKEN = {
    "one more": _SIZES,
    "one less": _SIZES,
    "nothing": _SIZES,
    "another dimension": {"x", "mask", "weight", "bias", "values"},
}


def test_every_operator_is_here() -> None:
    assert {name.split("::")[1] for name in compressed.SCHEMAS._op_defs} == set(OPERATORS)
    assert {str(operator) for operator in LAYERS} == {f"revnets.{name}.default" for name in OPERATORS if "int8" in name}
    for name, (tensors, _) in OPERATORS.items():
        schema = getattr(torch.ops.revnets, name).default._schema
        assert [a.name for a in schema.arguments if "Tensor" in str(a.type)] == list(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_tensors_of_every_layout(name: str, argument: str, layout: Callable[[Tensor], Tensor]) -> None:
    function, tensors = ALL[name]
    made = layout(tensors[argument])
    plain = made.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    expected = function(**{**tensors, argument: plain})
    for _ in range(3):  # memory that was freed may still hold what was there
        found = function(**{**tensors, argument: made})
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_other_tensors_are_refused(name: str, argument: str, kind: str) -> None:
    """By an error, but for an input on meta, which asks for a shape, and for sizes that the operator can have."""
    function, tensors = ALL[name]
    made = REFUSED[kind](tensors[argument])
    try:
        found = function(**{**tensors, argument: made})
    except (ValueError, RuntimeError, TypeError, IndexError):
        return
    assert found.is_meta or argument in TAKEN.get(kind, set()), found


@pytest.mark.parametrize(
    ("name", "argument"), [p for p in ARGUMENTS if "ops" in str(p.id) and p.values[1] in ("columns", "rows")]
)
@pytest.mark.parametrize("wrong", [-1, 30000, 2**15 - 1, -(2**15)])
def test_structures_out_of_range(name: str, argument: str, wrong: int) -> None:
    """However they are laid out: what is checked is what the kernel reads."""
    function, tensors = ALL[name]
    for place in (0, -1):
        bad = tensors[argument].clone()
        bad[place] = wrong
        for layout in (_interleaved, _offset, _backwards, torch.clone):
            with pytest.raises(ValueError, match="out of range"):
                function(**{**tensors, argument: layout(bad)})


def test_what_is_checked_is_what_is_kept() -> None:
    values, columns, rows = compress(MATRIX)
    kept = _check_weights(Geometry(6, 8), _interleaved(values), _interleaved(columns), _interleaved(rows), None)
    for ours, theirs in zip(kept[:3], (values, columns, rows), strict=True):
        assert ours is not None
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)
    again = _check_weights(Geometry(6, 8), values, columns, rows, None)[1]
    assert again is not None
    assert again.data_ptr() == columns.data_ptr()  # no copy


@pytest.mark.parametrize("numbers", [
    {"stride": [0, 0]}, {"stride": [-1, 1]}, {"padding": [-1, 0]}, {"dilation": [0, 1]}, {"kernel_size": [0, 3]},
    {"groups": 0}, {"groups": -1}, {"groups": 4}, {"stride": [2**40, 1]}, {"padding": [2**40, 2**40]},
    {"activation": "tanh"},
])  # fmt: skip
def test_numbers_that_are_none_of_a_convolution(numbers: dict[str, Any]) -> None:
    tensors, rest = OPERATORS["sparse_conv2d"]
    with pytest.raises(ValueError, match="expected"):
        torch.ops.revnets.sparse_conv2d(**tensors, **{**rest, **numbers})


@pytest.mark.parametrize("wrong", [
    lambda: ConvCall(Geometry(2, 3), torch.ones(6), None, None, None),
    lambda: ConvCall(Geometry(2, 2, groups=2), torch.ones(2), torch.zeros(2, dtype=torch.int16), None, None),
    lambda: UpsampleCall((1, 2)),
    lambda: MaxPoolCall(Geometry(3, 3, (2, 2), dilation=(2, 2))),
    lambda: MapCall("tanh"),
    lambda: SliceCall(-1, 2)(torch.ones(1, 3, 2, 2)),
    lambda: Plan([Step(MeanCall(), (1,))], 1, [1]),
    lambda: Plan([Step(MeanCall(), (0,))], 1, [0]),
    lambda: Plan([Step(MeanCall(), (0,))], 1, [1])(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)),
    lambda: Structure(torch.ones(3, 2), 1),
    lambda: Structure(torch.ones(3, 2, dtype=torch.bool), 2),
])  # fmt: skip
def test_layers_that_would_read_elsewhere(wrong: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|channels -1"):
        wrong()


def test_empty_batches_of_a_linear_layer() -> None:
    tensors, _ = OPERATORS["sparse_linear"]
    for shape in ((0, 6), (2, 0, 6)):
        assert torch.ops.revnets.sparse_linear(**{**tensors, "x": torch.zeros(shape)}).shape == (*shape[:-1], 8)


def test_zeros_that_have_no_memory() -> None:
    assert torch.equal(readable("input", torch._efficientzerotensor(3, 2)), torch.zeros(3, 2))


def test_contiguous_tensors_are_not_copied() -> None:
    x = torch.ones(2, 3)
    assert readable("input", x) is x
    with pytest.raises(ValueError, match="not contiguous"):
        address(x.t())


def test_addresses_are_taken_in_one_file() -> None:
    """Where they are held, too: a new kernel has to go the same way."""
    folder = Path(kernels.__file__).parent
    assert [p.name for p in sorted(folder.glob("*.py")) if re.search(r"\bdata_ptr\b", p.read_text())] == ["operands.py"]
