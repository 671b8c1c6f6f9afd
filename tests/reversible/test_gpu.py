"""What only an accelerator shows: bit equality of cuDNN, device generators, autocast, the late range check."""

import copy
from collections.abc import Iterator

import pytest
import torch

from revnets.models.revbifpn import RevBiFPN
from revnets.reversible import RangeError
from tests.reversible.graphs import build, cubic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def step(model: RevBiFPN, x: torch.Tensor, mode: str, amp: bool) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    model.set_mode(mode)
    torch.manual_seed(0)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
        loss = model(x).float().square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *grads, *(b.float() for b in model.buffers()), torch.cuda.get_rng_state()]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("extra_silos", [2, 5])
def test_exact_mode_is_equal_to_the_bit(extra_silos: int, channels_last: bool, amp: bool) -> None:
    torch.manual_seed(0)
    model = RevBiFPN(extra_silos=extra_silos, drop_path_rate=0.2, num_classes=10).cuda().train()
    x = torch.randn(4, 3, 128, 128, device="cuda")
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    stored = step(model, x, "store", amp)
    again = step(model, x, "store", amp)
    # kernels without a deterministic version (bilinear upsampling) differ from run to run: those cannot be compared
    comparable = [torch.equal(a, b) for a, b in zip(stored, again, strict=True)]
    rebuilt = step(model, x, "reversible", amp)
    different = [i for i, (a, b) in enumerate(zip(rebuilt, stored, strict=True)) if not torch.equal(a, b)]
    assert not [i for i in different if comparable[i]]
    assert torch.equal(rebuilt[0], stored[0])
    assert torch.equal(rebuilt[-1], stored[-1])


def test_range_is_checked_in_the_backward_pass() -> None:
    net = build([1, 2], ["conv"], exact=True).cuda()
    net.ops[1].ops[0].f = torch.nn.Conv2d(2, 2, 1).cuda()  # type: ignore[union-attr, index]
    with torch.no_grad():
        net.ops[1].ops[0].f.weight.fill_(3000.0)  # type: ignore[union-attr, index]
    loss = cubic(net(torch.randn(2, 3, 16, 16, device="cuda")))
    with pytest.raises(RangeError, match=r"op 1 \(Parallel\).*beyond the range"):
        loss.backward()
