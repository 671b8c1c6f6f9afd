"""Published weights that are cached already are compared with their SHA-256, each time."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg

from revnets.models import _cached
from revnets.models._cached import drop_wrong_cache
from revnets.models._revbifpn_checkpoint import fetch

RIGHT = b"weights as they were published"
SHA256 = hashlib.sha256(RIGHT).hexdigest()
URL = "https://example.invalid/a/net.pth"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        found.append(hash_prefix)
        Path(path).write_bytes(RIGHT)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return found


@pytest.mark.parametrize("wrong", [b"", RIGHT[:-1], RIGHT + b"x", b"W" + RIGHT[1:]])
def test_a_wrong_file_is_downloaded_again(
    wrong: bytes, tmp_path: Path, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(URL, SHA256, tmp_path)
    assert path.read_bytes() == RIGHT
    path.write_bytes(wrong)
    assert fetch(URL, SHA256, tmp_path).read_bytes() == RIGHT
    assert "another SHA-256" in caplog.text
    assert fetch(URL, SHA256, tmp_path) == path
    assert asked == [SHA256] * 2


def test_without_a_network_a_wrong_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    wrong = tmp_path / f"{SHA256[:8]}-net.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=rf"no network \('{wrong}' is there, but has another SHA-256\)"):
        fetch(URL, SHA256, tmp_path)
    assert wrong.read_bytes() == b"something else"


@pytest.mark.parametrize("cache", ["torch", "hugging face"])
@pytest.mark.parametrize("right", [True, False])
def test_caches_of_others(cache: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = RIGHT if right else b"something else"
    if cache == "torch":
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        cfg = PretrainedCfg(url=f"https://example.invalid/net-{SHA256[:8]}.pth")
        file = tmp_path / "checkpoints" / f"net-{SHA256[:8]}.pth"
    else:
        hub = pytest.importorskip("huggingface_hub")
        file, link = tmp_path / "blobs" / SHA256, tmp_path / "snapshots" / "model.safetensors"
        link.parent.mkdir()
        link.symlink_to(file)
        known = {("timm/net", "model.safetensors"): str(link)}
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, each, revision=None: known.get((name, each)))
        cfg = PretrainedCfg(hf_hub_id="timm/net")
    file.parent.mkdir()
    file.write_bytes(content)
    monkeypatch.setattr(_cached.timm, "get_pretrained_cfg", lambda name: cfg)
    assert drop_wrong_cache("resnet18") == ([] if right else [file])
    assert file.exists() == right


def test_models_without_files() -> None:
    assert drop_wrong_cache("no_such_model") == drop_wrong_cache("test_revbifpn") == []
    assert timm.is_model("test_revbifpn")
