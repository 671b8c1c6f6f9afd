"""Published weights: loaded in their layout, verified when they are fetched, refused when they do not fit."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import Tensor

from revnets.models import _revbifpn_checkpoint
from revnets.models.revbifpn import RevBiFPN, checkpoint_filter_fn
from tests.models.published import published_weights
from tests.models.registry import TINY, images, make

NAME = "revbifpn_s0"


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published: nested, with what a training script saves beside the weights."""
    path = tmp_path_factory.mktemp("published") / f"{NAME}.pth.tar"
    torch.save({"epoch": 350, "arch": NAME, "state_dict": published_weights(NAME)}, path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of torch's hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Makes a local file the published one, with the given digest."""

    def install(path: Path, sha256: str) -> None:
        from revnets.models.revbifpn import default_cfgs

        cfg = default_cfgs[NAME].default
        monkeypatch.setattr(cfg, "url", path.as_uri())
        monkeypatch.setattr(cfg, "sha256", sha256)

    return install


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path, name: str = NAME, **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


def assert_loaded(state: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """`state` must hold the published values, but for the parts named."""
    expected = checkpoint_filter_fn(published_weights(NAME), make(NAME))
    for key, value in expected.items():
        if not key.startswith(but):
            assert torch.equal(state[key], value), key


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nested", "prefix"),
    [(None, ""), (None, "module."), ("state_dict", "module."), ("model", ""), ("state_dict_ema", "")],
)
def test_layouts(tmp_path: Path, nested: str | None, prefix: str) -> None:
    state: dict[str, Any] = {prefix + key: value for key, value in published_weights(NAME).items()}
    torch.save(state if nested is None else {nested: state, "epoch": 7}, tmp_path / "file.pth")
    assert_loaded(load(tmp_path / "file.pth").state_dict())


def test_filter_unwraps_by_itself() -> None:
    model = make(NAME)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in published_weights(NAME).items()}}
    model.load_state_dict(checkpoint_filter_fn(wrapped, model))
    assert_loaded(model.state_dict())


def test_filter_leaves_our_own_layout_alone() -> None:
    model = make(TINY)
    state = model.state_dict()
    converted = checkpoint_filter_fn(state, model)
    assert list(converted) == list(state)
    assert all(converted[key] is state[key] for key in state)


def test_state_dict_in_the_overlay() -> None:
    model = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(published_weights(NAME))}
    )
    assert_loaded(model.state_dict())


def test_file_in_pretrained_cfg(published_file: Path) -> None:
    cfg = dict(timm.create_model(NAME).pretrained_cfg, file=str(published_file))
    assert_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg=cfg).state_dict())


@pytest.mark.parametrize("pretrained", [False, True])
def test_round_trip_through_a_local_folder(tmp_path: Path, pretrained: bool) -> None:
    """As timm writes and reads models of the hub."""
    model = make(TINY, num_classes=10, in_chans=1)
    save_for_hf(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=pretrained)
    assert (other.num_classes, other.in_chans) == (10, 1)
    state = model.state_dict()
    assert other.state_dict().keys() == state.keys()
    if pretrained:
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


# --- adapted models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [0, 10])
def test_other_num_classes(published_file: Path, num_classes: int) -> None:
    model = load(published_file, num_classes=num_classes)
    assert_loaded(model.state_dict(), but=("classifier",))
    assert model.eval()(images()).shape[1] == (num_classes or model.num_features)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3)])
def test_features_only(published_file: Path, out_indices: tuple[int, ...]) -> None:
    backbone = load(published_file, features_only=True, out_indices=out_indices).eval()
    whole = load(published_file).eval()
    with torch.no_grad():
        maps, pyramid = backbone(images()), whole.forward_pyramid(images())
    assert all(torch.equal(m, pyramid[k]) for m, k in zip(maps, out_indices, strict=True))


@pytest.mark.parametrize("in_chans", [1, 2])
def test_fewer_channels_need_no_conversion(published_file: Path, in_chans: int) -> None:
    """The stem has no weights."""
    assert_loaded(load(published_file, in_chans=in_chans).state_dict())


def test_modes_and_stem_stride_share_the_weights(published_file: Path) -> None:
    assert_loaded(load(published_file, mode="store", exact=False, stem_stride=2).state_dict())


# --- fetching --------------------------------------------------------------------------------------------------------


def test_fetches_verifies_and_keeps(
    published_file: Path, hub: Path, serve: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = sha256_of(published_file)
    serve(published_file, sha256)
    assert_loaded(timm.create_model(NAME, pretrained=True).state_dict())
    assert [path.name for path in hub.iterdir()] == [f"{sha256[:8]}-{NAME}.pth.tar"]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # a second download would fail
    assert_loaded(timm.create_model(NAME, pretrained=True).state_dict())


def test_cache_dir(published_file: Path, hub: Path, serve: Callable[[Path, str], None], tmp_path: Path) -> None:
    serve(published_file, sha256_of(published_file))
    timm.create_model(NAME, pretrained=True, cache_dir=str(tmp_path / "mine"))
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert not hub.exists()


def test_wrong_digest_leaves_nothing_behind(
    published_file: Path, hub: Path, serve: Callable[[Path, str], None]
) -> None:
    serve(published_file, "0" * 64)
    with pytest.raises(RuntimeError, match=r"could not be fetched from file.*0{64}.*invalid hash.*by hand") as caught:
        timm.create_model(NAME, pretrained=True)
    assert "\n" not in str(caught.value)
    assert list(hub.iterdir()) == []


def test_no_network_leaves_nothing_behind(tmp_path: Path, hub: Path, serve: Callable[[Path, str], None]) -> None:
    serve(tmp_path / "missing.pth.tar", "0" * 64)
    with pytest.raises(RuntimeError, match=r"could not be fetched.*pretrained_cfg_overlay=dict\(file=PATH\)"):
        timm.create_model(NAME, pretrained=True)
    assert list(hub.iterdir()) == []


def test_published_addresses_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Path) -> None:
    asked: list[tuple[str, str]] = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        asked.append((url, hash_prefix))
        torch.save(published_weights(NAME), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    timm.create_model(NAME, pretrained=True)
    assert asked == [
        (
            "https://cerebras-public.s3.us-west-2.amazonaws.com/revbifpn/revbifpn_s0.pth.tar",
            "a9ee012a2670003ea18deca1afaed7c1323ffaafc83b0a30874d262bf2403cfa",
        )
    ]


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"No pretrained weights exist for test_revbifpn.*pretrained=False"):
        timm.create_model(TINY, pretrained=True)


# --- files that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [1000, 10])
@pytest.mark.parametrize("name", ["revbifpn_s1", "revbifpn_s3"])
def test_another_variant(published_file: Path, name: str, num_classes: int) -> None:
    with pytest.raises(ValueError, match=r"not of this RevBiFPN variant.*body\..*create the variant") as caught:
        load(published_file, name, num_classes=num_classes)
    assert len(str(caught.value)) < 400


def test_more_silos_than_the_model(tmp_path: Path) -> None:
    torch.save(make(TINY, extra_silos=1).state_dict(), tmp_path / "longer.pth")
    with pytest.raises(ValueError, match=r"0 of its tensors are missing and \d+ are left over"):
        load(tmp_path / "longer.pth", TINY)


def test_filter_for_a_pruned_model() -> None:
    model = make(NAME)
    model.prune_intermediate_layers((1,))
    result = model.load_state_dict(checkpoint_filter_fn(published_weights(NAME), model), strict=False)
    assert result.missing_keys == []


def test_another_network(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"not of this RevBiFPN variant: \d+ of its tensors are missing"):
        load(tmp_path / "resnet.pth", TINY)


@pytest.mark.parametrize(
    "part", ["rev_stack.recomp_op.recomp_transform_1.", "head.pyramid_heads.2.", "head.final_conv."]
)
@pytest.mark.parametrize("num_classes", [1000, 10])
def test_missing_part(tmp_path: Path, part: str, num_classes: int) -> None:
    """Also where timm loads loosely, because of another number of classes."""
    torch.save(
        {key: value for key, value in published_weights(NAME).items() if not key.startswith(part)},
        tmp_path / "partial.pth",
    )
    with pytest.raises(ValueError, match="missing"):
        load(tmp_path / "partial.pth", num_classes=num_classes)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_file(published_file: Path, tmp_path: Path, kept: float) -> None:
    content = published_file.read_bytes()
    path = tmp_path / "truncated.pth.tar"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{path} is truncated.* again"):
        load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth is not there"):
        load(tmp_path / "nowhere.pth")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))])
@pytest.mark.parametrize("fetched", [False, True])
def test_malicious_pickle_is_refused(
    tmp_path: Path, hub: Path, serve: Callable[[Path, str], None], save: Any, fetched: bool
) -> None:
    path, witness = tmp_path / "evil.pth", tmp_path / "executed"
    save({"state_dict": Malicious(witness)}, path)
    if fetched:
        serve(path, sha256_of(path))
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model(NAME, pretrained=True) if fetched else load(path)
    assert not witness.exists()


def test_fetch_takes_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    path = _revbifpn_checkpoint.fetch(source.as_uri(), sha256_of(source), tmp_path / "folder")
    assert path.read_bytes() == b"weights"
    assert path.parent == tmp_path / "folder"


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 64), (64, 40)])
def test_indivisible_size(size: tuple[int, int]) -> None:
    model = make(NAME).eval()
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*divisible by 32.*(32|64)x(32|64)"):
        model(torch.zeros(1, 3, *size))


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 64, 64\).*expected \(N, 3, H, W\).*in_chans"):
        make(TINY).eval()(torch.zeros(1, 4, 64, 64))


def test_not_a_batch() -> None:
    with pytest.raises(ValueError, match=r"\(3, 64, 64\).*expected \(N, 3, H, W\)"):
        make(TINY).eval()(torch.zeros(3, 64, 64))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mode": "fast"}, ValueError, "'fast'.*reversible, checkpoint, store"),
        ({"stem_stride": 3}, ValueError, "stem_stride=3.*expected 4 .*2 or 1"),
        ({"exact": 99}, ValueError, "exact=99.*between 1 and"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timm.create_model(TINY, **kwargs)


def test_unknown_mode_later() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*reversible, checkpoint, store"):
        make(TINY).set_mode("fast")


@pytest.mark.parametrize("output_fmt", ["NHWC", "NLC"])
def test_other_output_formats(output_fmt: str) -> None:
    model: RevBiFPN = make(TINY).eval()
    with pytest.raises(ValueError, match=f"{output_fmt}.*expected 'NCHW'"):
        model.forward_intermediates(images(), output_fmt=output_fmt)
