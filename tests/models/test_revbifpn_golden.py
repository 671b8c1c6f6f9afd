"""RevBiFPN against the published implementation: layout, outputs, gradients and running statistics."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import revnets  # noqa: F401 - registers the models
from revnets.models.revbifpn import RevBiFPN, checkpoint_filter_fn
from tests.models.published import (
    SEEDS_AND_SIZES,
    VARIANTS,
    golden,
    golden_input,
    golden_weights,
    published_names,
    published_shapes,
)

PARAMETERS = dict(
    zip(VARIANTS, (3_419_196, 5_112_300, 10_576_528, 19_574_184, 48_687_336, 81_998_976, 142_307_972), strict=True)
)
MODES = ("store", "reversible", "checkpoint")


def golden_model(variant: str, **kwargs: Any) -> RevBiFPN:
    model = timm.create_model(variant, drop_rate=0.0, drop_path_rate=0.0, exact=False, **kwargs)
    model.load_state_dict(checkpoint_filter_fn(golden_weights(variant), model))
    return model


def relative_error(value: Tensor, expected: Any) -> float:
    """Largest difference relative to the largest expected value; difference alone where a zero is expected."""
    difference = np.abs(value.detach().numpy() - expected).max()
    largest = np.abs(expected).max()
    return float(difference / largest if largest > 1e-12 else difference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(variant)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_layout_converts_completely(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(variant)
        published = {key: torch.empty(shape) for key, shape in published_shapes(variant).items()}
    converted = checkpoint_filter_fn(published, model)
    own = model.state_dict()
    assert set(converted) == set(own)
    assert len(converted) == len(published)
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in own.items()}


@pytest.mark.parametrize("variant", SEEDS_AND_SIZES)
def test_eval_outputs(variant: str) -> None:
    model, expected, x = golden_model(variant).eval(), golden(variant), golden_input(variant)
    with torch.no_grad():
        logits, pyramid = model.forward_intermediates(x)
        logits = model.forward_head(logits)
        again = model(x)
    assert torch.equal(logits, again)
    assert relative_error(logits, expected["eval_logits"]) < 5e-6
    for k, features in enumerate(pyramid):
        assert tuple(features.shape) == tuple(expected[f"eval_feat{k}_shape"])
        assert relative_error(features.mean((2, 3)), expected[f"eval_feat{k}_mean_hw"]) < 5e-6


def assert_training_step(model: RevBiFPN, variant: str, tolerance: float, flips: float = 0.0) -> None:
    """One step must give the published loss, logits, gradient norms and running statistics, updated exactly once.

    `flips` of the norms may be off by up to 5e-3: a value that is rebuilt in plain float32 can land on the other side
    of Hardswish's kink, which visibly changes the gradients of that branch and of what comes before it. Whether one
    does depends on the number of threads. (Exact mode has no such flips.)
    """
    expected = golden(variant)
    x = golden_input(variant).to(model.classifier.weight.dtype)
    logits = model.train()(x)
    loss = F.cross_entropy(logits, torch.arange(len(x)) * 37 % 1000)
    loss.backward()
    stored_logits = max(tolerance, 1e-7)  # the golden logits are float32
    errors = {
        "loss": relative_error(loss, expected["train_loss"]) / tolerance,
        "logits": relative_error(logits, expected["train_logits"]) / stored_logits,
    }
    published = published_names(golden_weights(variant), model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        norm = expected[f"gradnorm/{published[name]}"]
        errors[f"gradient of {name}"] = relative_error(parameter.grad.double().norm(), norm) / tolerance
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1, name
        else:
            errors[name] = relative_error(buffer.double().norm(), expected[f"bufnorm/{published[name]}"]) / tolerance
    number = sum(key.startswith(("gradnorm/", "bufnorm/")) for key in expected)
    assert len(errors) == number + 2, "golden norms that were compared"
    outside = {name: error * tolerance for name, error in errors.items() if error >= 1}
    assert len(outside) <= flips * len(errors), outside
    assert all(error < 5e-3 for error in outside.values()), outside


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", SEEDS_AND_SIZES)
def test_training_step_in_float64(variant: str, mode: str) -> None:
    tolerance = 1e-9 if mode == "store" else 1e-6
    assert_training_step(golden_model(variant, mode=mode).double(), variant, tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", SEEDS_AND_SIZES)
def test_training_step_in_float32(variant: str, mode: str) -> None:
    flips = 0.2 if mode == "reversible" else 0.0
    assert_training_step(golden_model(variant, mode=mode), variant, 2e-5, flips)


@pytest.mark.parametrize("variant", ["revbifpn_s0"])
def test_exact_mode_stays_close_to_the_published_network(variant: str) -> None:
    """The grid rounds: one gradient norm moves by 2%, logits and most gradients by far less."""
    model = golden_model(variant)
    model.body.set_exact(True)
    assert_training_step(model, variant, 5e-2)
