"""Whatever a spec or a checkpoint's keys are, the answer is a result or one sentence."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import revnets  # noqa: F401  (registers the models)
from revnets.layers import list_layers
from revnets.layers.registry import parse_layers
from revnets.models.revbifpn import checkpoint_filter_fn

WORDS = [*list_layers(), "0.75", "1", "-1", "nan", "inf", "1e400", "true", "False", "depthwise", "init_scale", "", " "]
NEAR = st.lists(st.sampled_from([*WORDS, ":", "+", ":", "+"]), max_size=9).map("".join)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
DICTS = st.dictionaries(st.sampled_from(["type", "sparsity", "depthwise", "blocks", "x"]), PLAIN, max_size=4)
SPECS: Any = NEAR | st.text(max_size=30) | DICTS | st.lists(NEAR | DICTS, max_size=3) | PLAIN


def sentence(error: ValueError) -> None:
    assert str(error).strip()
    assert len(str(error)) < 1500


@settings(max_examples=300, deadline=None)
@given(SPECS)
def test_specs(spec: Any) -> None:
    try:
        parts = parse_layers(spec)
    except ValueError as error:
        sentence(error)
    else:
        assert parts
        assert parse_layers(spec) == parts or "nan" in repr(parts)


@pytest.fixture(scope="module")
def model() -> Any:
    return timm.create_model("test_revbifpn")


PIECES = [
    "rev_stack.", "recomp_op.recomp_transform_", "rev_transform_", "head.", "pyramid_heads.", "fc", "body.ops.",
    "f.", "g.", "xform_", "0_1", "1_0", "0.", "3.", "99.", "exp_conv.conv", "weight", "module.", ".", "", "é", "stem.",
]  # fmt: skip
KEYS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join) | st.text(max_size=12)
VALUES: Any = st.sampled_from([torch.zeros(()), torch.zeros(3, 3), torch.zeros(16, 3, 1, 1)])
ODD: Any = VALUES | st.none() | st.text(max_size=3) | st.integers()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(KEYS, ODD, max_size=6), wrapped=st.booleans())
def test_checkpoint_keys(model: Any, state: dict[str, Any], wrapped: bool) -> None:
    try:
        checkpoint_filter_fn({"state_dict": state} if wrapped else state, model)
    except ValueError as error:
        sentence(error)
    else:
        raise AssertionError("no such keys fit")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_checkpoint_with_a_key_changed(model: Any, data: st.DataObject) -> None:
    state = dict(model.state_dict())
    assert checkpoint_filter_fn(state, model).keys() == state.keys()
    key = data.draw(st.sampled_from([k for k in state if k.startswith("body.")]))
    value = state.pop(key)
    state[key + data.draw(st.text(min_size=1, max_size=3))] = value
    with pytest.raises(ValueError, match="not of this"):
        checkpoint_filter_fn(state, model)
