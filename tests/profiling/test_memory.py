"""Measured memory: closed forms on small modules, and the promise of the library on RevBiFPN."""

import pytest
import timm
import torch
from torch import nn

from revnets.profiling import measure_training_step


def test_peak_of_a_chain_of_activations() -> None:
    model = nn.Sequential(nn.Linear(1 << 8, 1 << 8), *(nn.Tanh() for _ in range(8)))
    x = torch.randn(1 << 10, 1 << 8)
    measured = measure_training_step(model, x, lambda y: y.sum())
    assert measured.gradient_bytes == ((1 << 16) + (1 << 8)) * 4
    assert 9 * x.nbytes <= measured.peak_bytes <= 12 * x.nbytes


def bytes_per_sample(mode: str, batch: int = 4, **kwargs: object) -> float:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", mode=mode, **kwargs).train()
    return measure_training_step(model, torch.randn(batch, 3, 64, 64)).activation_bytes / batch


def test_reversible_needs_a_fraction_of_storing() -> None:
    assert bytes_per_sample("reversible") < bytes_per_sample("checkpoint") < bytes_per_sample("store")


def test_memory_does_not_grow_with_depth() -> None:
    # what is kept per silo is a few numbers per channel, whatever the image: compare growth at two batch sizes
    growth = {
        (mode, batch): batch
        * (bytes_per_sample(mode, batch, extra_silos=6) - bytes_per_sample(mode, batch, extra_silos=2))
        for mode in ("reversible", "store")
        for batch in (4, 16)
    }
    assert growth["store", 16] - growth["store", 4] > 40 * abs(growth["reversible", 16] - growth["reversible", 4])


@pytest.mark.slow
def test_s0_at_224_pixels() -> None:
    """At most 6.0 MB per sample (published code: 7.45)."""
    model = timm.create_model("revbifpn_s0").train()
    x = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    measured = measure_training_step(model.to(memory_format=torch.channels_last), x)
    assert measured.activation_bytes / 8 < 6.0e6
