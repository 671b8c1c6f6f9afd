"""MMEngine reads checkpoints as data once revnets.mm is there, whichever of its loaders is asked."""

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.fileio import load as load_file
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as loaders
from torch import nn

from revnets.mm.loading import TRUST, RefusedCheckpoint, read_checkpoint


class Proof:
    """Code whose run leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    return Proof(tmp_path / "ran")


def saved(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def evil(path: Path, proof: Proof) -> str:
    return saved({"state_dict": {"weight": torch.zeros(2, 2), "bias": proof}}, path)


def from_file(path: str, folder: Path) -> Any:
    return loaders.CheckpointLoader.load_checkpoint(path)


def into_a_model(path: str, folder: Path) -> Any:
    return loaders.load_checkpoint(nn.Linear(2, 2), path)


def through_init_cfg(path: str, folder: Path) -> Any:
    from mmengine.model import BaseModule, Sequential

    class Net(BaseModule):
        def __init__(self) -> None:
            super().__init__(init_cfg={"type": "Pretrained", "checkpoint": path})
            self.weight = nn.Parameter(torch.zeros(2, 2))

    Sequential(Net()).init_weights()


def from_the_net(path: str, folder: Path) -> Any:
    cache = folder / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "net.pth").write_bytes(Path(path).read_bytes())
    return loaders.CheckpointLoader.load_checkpoint("https://example.invalid/net.pth")


def from_a_zoo(path: str, folder: Path) -> Any:
    (folder / "home").mkdir()
    (folder / "home" / "open_mmlab.json").write_text('{"ours": "net.pth"}')
    (folder / "home" / "net.pth").write_bytes(Path(path).read_bytes())
    return loaders.CheckpointLoader.load_checkpoint("open-mmlab://ours")


def from_bytes(path: str, folder: Path) -> Any:
    return loaders._safe_torch_load(io.BytesIO(Path(path).read_bytes()), map_location="cpu")


LOADERS = [from_file, into_a_model, through_init_cfg, from_the_net, from_a_zoo, from_bytes]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("load", LOADERS)
def test_code_is_not_run(load: Callable[[str, Path], Any], tmp_path: Path, proof: Proof) -> None:
    with pytest.raises(RefusedCheckpoint, match=rf"holds more than weights .*'exec'.*{TRUST}=1") as caught:
        load(evil(tmp_path / "evil.pth", proof), tmp_path)
    assert len(str(caught.value)) < 400
    assert not proof.path.exists()


def test_an_old_file_can_be_trusted(tmp_path: Path, proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST, "1")
    loaders.CheckpointLoader.load_checkpoint(evil(tmp_path / "old.pth", proof))
    assert proof.path.exists()


def attributes_of_attributes(path: Path, proof: Proof) -> str:
    """No function but ``getattr`` is needed: exec is put where MMEngine's own history of numbers expects NumPy."""

    def word(text: str) -> bytes:
        return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()

    def named(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    def attribute(owner: bytes, name: str) -> bytes:
        return named("builtins", "getattr") + owner + word(name) + b"\x86R"

    history = named("mmengine.logging.history_buffer", "HistoryBuffer")
    run = attribute(attribute(named("builtins", "getattr"), "__self__"), "exec")
    numpy = history + b")\x81}" + word("array") + run + b"sb"
    module = attribute(attribute(history, "__init__"), "__globals__")
    code = f"open({str(proof.path)!r}, 'w').close()"
    pickle = (
        b"\x80\x02" + module + word("np") + numpy + b"s" + history + word(code) + word("x" * len(code)) + b"\x86R\x86."
    )
    saved({"state_dict": {"weight": torch.zeros(1)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickle if name.endswith("data.pkl") else data)
    return str(path)


def test_looking_up_attributes_is_no_way_in(tmp_path: Path, proof: Proof) -> None:
    path = attributes_of_attributes(tmp_path / "evil.pth", proof)
    with pytest.raises(RefusedCheckpoint, match=r"holds more than weights \(it looks up '__\w+__'"):
        loaders.CheckpointLoader.load_checkpoint(path)
    assert not proof.path.exists()


def test_what_mmengine_writes_is_read(tmp_path: Path) -> None:
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = {
        "state_dict": {"x": torch.ones(2)},
        "h": history,
        "f": np.float32(3),
        "a": np.arange(3),
        "b": np.bool_(1),
    }
    found = loaders.CheckpointLoader.load_checkpoint(saved(content, tmp_path / "own.pth"))
    assert (found["h"].mean(), found["f"], found["a"].tolist(), found["b"]) == (1.5, 3.0, [0, 1, 2], True)
    assert read_checkpoint(tmp_path / "own.pth", mmap=True)["state_dict"]["x"].tolist() == [1, 1]


def test_damage_is_found(tmp_path: Path) -> None:
    path = Path(saved({"state_dict": {"x": torch.ones(64)}}, tmp_path / "net.pth"))
    data = bytearray(path.read_bytes())
    data[data.find(torch.ones(2).numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(RefusedCheckpoint, match=r"is damaged"):
        loaders.CheckpointLoader.load_checkpoint(str(path))


def test_the_hash_in_a_name_is_compared_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Path(saved({"state_dict": {"x": torch.ones(1)}}, tmp_path / "right.pth")).read_bytes()
    name = f"net-{hashlib.sha256(right).hexdigest()[:8]}.pth"
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / name).write_bytes(Path(saved({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "wrong.pth")).read_bytes())
    asked = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append(hash_prefix)
        Path(path).write_bytes(right)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        found = loaders.CheckpointLoader.load_checkpoint(f"https://example.invalid/a/{name}")
        assert found["state_dict"]["x"].tolist() == [1.0]
    assert asked == [name[4:12]], "once, as the second time the file is right"


def test_yaml_files_are_data(tmp_path: Path, proof: Proof) -> None:
    import yaml

    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:os.mkdir ['{proof.path}']")
    with pytest.raises(yaml.YAMLError):
        load_file(tmp_path / "x.yaml")
    assert not proof.path.exists()
    (tmp_path / "y.yaml").write_text("a: [1, 2]")
    assert load_file(tmp_path / "y.yaml") == {"a": [1, 2]}


@pytest.mark.slow
def test_scripts_of_mmdetection_end_with_a_sentence(tmp_path: Path, proof: Proof) -> None:
    script = tmp_path / "read.py"
    script.write_text("import sys\nfrom mmengine.runner import CheckpointLoader as C\nC.load_checkpoint(sys.argv[1])\n")
    line = [sys.executable, "-m", "revnets.mm", str(script), evil(tmp_path / "evil.pth", proof)]
    ended = subprocess.run(line, capture_output=True, text=True, env={**os.environ, TRUST: ""}, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: checkpoint '")
    assert "Traceback" not in ended.stderr
    assert not proof.path.exists()


@pytest.mark.slow
def test_mmengine_is_left_alone_without_revnets_mm() -> None:
    code = "import revnets; from mmengine.runner import checkpoint as c; print(c._safe_torch_load.__module__)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split()[-1] == "mmengine.runner.checkpoint"
