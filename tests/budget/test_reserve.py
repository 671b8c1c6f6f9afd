"""What plans leave unused is enough for what threads take beyond the prediction."""

import pytest
import timm
import torch

from revnets.budget.step import CPU_RESERVE, MOST_RESERVE, OTHER_RESERVE, reserve
from revnets.profiling.memory import measure_training_step
from revnets.profiling.predict import predict_training_step
from revnets.profiling.target import training_loss


def test_it_grows_with_threads_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 2, 8, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(reserve(torch.device("cpu")))
    assert found == pytest.approx([CPU_RESERVE, 0.009, 0.027, MOST_RESERVE])
    assert reserve(torch.device("cuda")) == OTHER_RESERVE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "mobilenetv3_large_100"])
def test_measured_on_threads(name: str) -> None:
    """`pytest -m slow -k measured_on_threads -s` prints measured over predicted: docs/budget.md."""
    model, x, before = timm.create_model(name), torch.randn(4, 3, 128, 128), torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            predicted = predict_training_step(model, x, training_loss)
            resident = predicted.resident_bytes
            measured = measure_training_step(model, x, training_loss).peak_bytes + resident
            print(f"{name}, {threads} threads: {(measured - resident) / (predicted.peak_bytes - resident):.3f}")
            assert measured <= predicted.peak_bytes / (1 - reserve(x.device))
    finally:
        torch.set_num_threads(before)
