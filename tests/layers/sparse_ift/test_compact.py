"""Sparse checkpoints: they come back exactly, or are refused with the reason."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from revnets.layers import SparseConv2d, convert, load_sparse, save_sparse
from revnets.layers.sparse_ift.compact import FORMAT, pack_bits, unpack_bits


def test_compact_files_come_back_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (convert(timm.create_model("test_resnet"), "sparse_doped:0.9").model for _ in range(2))
    active = next(m for m in first.modules() if isinstance(m, SparseConv2d))
    with torch.no_grad():
        active.weight[active.mask.nonzero()[0].unbind()] = 0  # a grown weight: active, and zero
    path = save_sparse(first, tmp_path / "net.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    load_sparse(second, path)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    torch.save(first.state_dict(), tmp_path / "net.pth")
    sizes = [sum(b.numel() * b.element_size() for b in first.state_dict().values()), path.stat().st_size]
    masked = [m for m in first.modules() if isinstance(m, SparseConv2d)]
    saved = sum((m.mask.numel() - int(m.mask.sum())) * 4 + m.mask.numel() * 7 // 8 for m in masked)
    assert sizes[1] < sizes[0] - saved + 100_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_compact_files_keep_the_type(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [nn.Sequential(SparseConv2d(8, 8, 3, sparsity=0.75), nn.BatchNorm2d(8)).to(dtype) for _ in range(2)]
    load_sparse(layers[1], save_sparse(layers[0], tmp_path / "net.safetensors"))
    for name, tensor in layers[0].state_dict().items():
        other = layers[1].state_dict()[name]
        assert other.dtype == tensor.dtype
        assert torch.equal(tensor, other), name


def test_bits() -> None:
    for n in (1, 8, 13):
        mask = torch.rand(n) < 0.5
        assert torch.equal(unpack_bits(pack_bits(mask), (n,)), mask)
    assert unpack_bits(torch.zeros(2, dtype=torch.uint8), (7,)) is None


def test_files_that_do_not_match(tmp_path: Path) -> None:
    net = nn.Sequential(SparseConv2d(4, 8, 3, sparsity=0.5), nn.Linear(2, 2))
    path = save_sparse(net, tmp_path / "net.safetensors")
    cases = [
        (nn.Sequential(SparseConv2d(4, 16, 3, sparsity=0.5), nn.Linear(2, 2)), "mask of 0 does not match the model's"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(2, 2)), "'0.weight' is sparse in the file but not in the model"),
        (nn.Sequential(SparseConv2d(4, 8, 3, sparsity=0.5)), "the model has no '1."),
        (nn.Sequential(SparseConv2d(4, 8, 3, sparsity=0.5), nn.Linear(2, 3)), r"1.weight is \(2, 2\), the model's"),
        (nn.Sequential(SparseConv2d(4, 8, 3, sparsity=0.5), SparseConv2d(2, 2, 1, sparsity=0)), "but not in the file"),
    ]
    for model, message in cases:
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_sparse(model, path)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="there is no file"):
        load_sparse(net, tmp_path / "other.safetensors")
    for name, change, message in [
        ("0.weight.places", None, "0 is sparse in the model but not in the file"),
        ("0.weight.places", torch.int32, "mask of 0 does not match the model's"),
        ("1.weight", torch.int8, "'1.weight' holds int8, the model's float32"),
        ("0.weight.values", torch.complex64, "'0.weight' holds complex64, the model's float32"),
        ("1.bias", torch.int64, "'1.bias' holds int64, the model's float32"),
    ]:
        tensors = load_file(path)
        value = tensors.pop(name)
        odd = tensors if change is None else {**tensors, name: value.to(change)}
        save_file(odd, tmp_path / "odd.safetensors", metadata={"format": FORMAT})
        before = {key: t.clone() for key, t in net.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_sparse(net, tmp_path / "odd.safetensors")
        assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no valid safetensors file"):
        load_sparse(net, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="the folder does not exist"):
        save_sparse(net, tmp_path / "missing" / "net.safetensors")
