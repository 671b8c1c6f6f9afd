"""Loops and adapters of others: Lightning, accelerate, peft."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.clients.steps import assert_same_weights, client, images, mean_square, network

NAME = "test_revbifpn"
BATCHES = [images(32) + k for k in range(4)]
pytestmark = pytest.mark.filterwarnings("ignore")


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_lightning_fits_saves_and_goes_on(tmp_path: Path) -> None:
    lightning = client("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, mode: str = "reversible") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = network(NAME, mode=mode)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return mean_square(self.net(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(BATCHES)), batch_size=4)
    results = []
    for mode in ("reversible", "store"):
        options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        options |= {"enable_checkpointing": False, "enable_model_summary": False}
        first, path = Module(mode), str(tmp_path / f"{mode}.ckpt")
        trainer = lightning.Trainer(max_epochs=1, **options)
        trainer.fit(first, data)
        trainer.save_checkpoint(path)
        assert_same_weights(Module.load_from_checkpoint(path, weights_only=False), first)
        second = Module(mode)
        lightning.Trainer(max_epochs=2, **options).fit(second, data, ckpt_path=path)
        results.append({key: x.clone() for key, x in second.state_dict().items()})
    assert_equal(*results)


def test_accelerate_prepares_accumulates_saves_and_loads(tmp_path: Path) -> None:
    accelerate = client("accelerate")
    results = []
    for mode in ("reversible", "store"):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network(NAME, mode=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        for batch in BATCHES:
            with accelerator.accumulate(model):
                accelerator.backward(mean_square(model(batch)))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(str(tmp_path / mode))
        results.append({key: x.clone() for key, x in model.state_dict().items()})
        for p in model.parameters():
            nn.init.zeros_(p)
        accelerator.load_state(str(tmp_path / mode))
        assert_equal(dict(model.state_dict()), results[-1])
    assert_equal(*results)


def test_peft_trains_low_rank_adapters(tmp_path: Path) -> None:
    peft = client("peft")
    config = peft.LoraConfig(
        r=2, target_modules=r".*body.*(conv_pw|conv_pwl|fc1)", lora_dropout=0.1, modules_to_save=["classifier"]
    )
    grads = []
    for mode in ("reversible", "store"):
        torch.manual_seed(1)
        model = peft.get_peft_model(network(NAME, mode=mode), config).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)  # which starts at 0
        torch.manual_seed(2)
        mean_square(model(BATCHES[0])).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("lora_A" in name for name in grads[0])
    assert_equal(*grads)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(network(NAME), tmp_path)  # statistics of norms are not in an adapter's file
    assert_equal(dict(loaded.named_parameters()), dict(model.named_parameters()))
