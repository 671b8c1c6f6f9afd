"""What several processes of a detector's training decide before MMEngine's runner connects them."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("mmengine", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from mmengine.config import Config

from detection import checkpoints, train
from detection.config import connect
from revnets.training.errors import UserError


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    runs, cfg = Path(folder, "run"), SimpleNamespace(launcher="pytorch", load_from=None, resume=False)
    if rank == 1:  # sees the newest one only partly
        checkpoints.newest_whole = lambda folder: folder / "epoch_1.pth"
    found = [train._resume(cfg, argparse.Namespace(resume="auto"), runs), cfg.load_from]
    if rank == 0:
        for path in runs.glob("*.pth"):
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        train._resume(cfg, argparse.Namespace(resume="auto"), runs)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_first_chooses_what_all_go_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("epoch_1.pth", "epoch_2.pth"):
        torch.save({"weight": torch.randn(9)}, run / name)
    (run / checkpoints.LAST).write_text(str(run / "epoch_2.pth"))
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert found == [[True, str(run / "epoch_2.pth")]] * 2


def test_processes_are_connected_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config({"launcher": "none"})
    connect(cfg)
    assert not dist.is_initialized()
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**where, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)  # MMEngine sets it, whatever the backend
    cfg = Config({"launcher": "pytorch", "env_cfg": {"dist_cfg": {"backend": "gloo"}}})
    try:
        connect(cfg)
        assert dist.get_backend() == "gloo"
        connect(cfg)  # once is enough
    finally:
        dist.destroy_process_group()
