"""Two models in two threads, two forward passes before their backward passes, and other processes."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from revnets.reversible import MODES, RevSequential, set_mode

from .graphs import build, cubic


def network(mode: str, seed: int = 0) -> RevSequential:
    net = build([1, 2, 3], ["batch_norm", "mbconv_plain"], exact=True, seed=seed)
    set_mode(net, mode)
    return net


def train(net: RevSequential, x: Tensor, steps: int = 6) -> None:
    for _ in range(steps):
        net.zero_grad()
        cubic(net(x)).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(1e-2 * parameter.grad)  # type: ignore[operator]


def same(a: RevSequential, b: RevSequential) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("modes", [("reversible", "reversible"), ("reversible", "checkpoint"), ("store", "reversible")])
def test_two_threads_train_as_one_after_the_other(modes: tuple[str, str]) -> None:
    nets = [network(mode, seed) for seed, mode in enumerate(modes)]
    alone = [copy.deepcopy(net) for net in nets]
    xs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for net, x in zip(alone, xs, strict=True):
        train(net, x)
    failed: list[BaseException] = []

    def caught(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=caught, args=(lambda net=net, x=x: train(net, x),))
        for net, x in zip(nets, xs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(same(a, b) for a, b in zip(nets, alone, strict=True))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_before_their_backwards(mode: str, order: tuple[int, int]) -> None:
    xs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = network("store")
    for x in xs:
        cubic(expected(x)).backward()
    net = network(mode)
    losses = [cubic(net(x)) for x in xs]
    for index in order:
        losses[index].backward()
    for (name, a), b in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), expected.buffers(), strict=True))


def test_images_travel_to_other_processes(tmp_path: Path) -> None:
    from PIL import Image
    from timm.data import create_dataset

    from classification.images.reading import Images
    from revnets.training.data.resumable import SeededDataset

    (tmp_path / "class").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "class" / "a.png")
    images = SeededDataset(Images(create_dataset("", root=str(tmp_path)), "RGB"))
    again = pickle.loads(pickle.dumps(images))
    assert again[(0, (1, 2))][0].size == (4, 4)
