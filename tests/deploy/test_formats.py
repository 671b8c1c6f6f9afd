"""A deployed file is opened as what its name says, or not at all, whatever its bytes look like to an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from revnets.deploy import ENGINES, ExportError, Untrusted, deploy, load
from revnets.deploy.checks import plain_onnx, plain_xml
from revnets.deploy.runners import open_onnxruntime, open_openvino
from revnets.deploy.seal import SUFFIXES, Content, Purpose, read, seal

from .nets import Net, images

onnxruntime = pytest.mark.skipif(bool(ENGINES["onnxruntime"].missing()), reason="the engine is not installed")
openvino = pytest.mark.skipif(bool(ENGINES["openvino"].missing()), reason="the engine is not installed")


def model(location: str = "") -> bytes:
    """An ONNX model that adds four numbers: its own, or those of another file."""
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    if location:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("image", "output")]
    graph = helper.make_graph([helper.make_node("Add", ["image", "w"], ["output"])], "g", ends[:1], ends[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def content(name: str, data: bytes, trusted: bool = False) -> Content:
    return Content(Path(name), data, b"", trusted)


def long_text(text: bytes) -> bytes:
    """A field of ModelProto (``doc_string``) with so many bytes."""
    assert len(text) < 128
    return b"\x32" + bytes([len(text)]) + text


# --- OpenVINO --------------------------------------------------------------------------------------------------------


@openvino
def test_a_model_of_onnx_under_the_name_of_an_xml_reads_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINO looks for names of such models there
    torch.arange(4.0).numpy().tofile(tmp_path / "secret.bin")
    evil = tmp_path / "evil.xml"
    evil.write_bytes(model("secret.bin"))
    seal(evil)
    with pytest.raises(Untrusted, match=r"is not opened: it is no XML .*trust=True"):
        load(evil)


@pytest.mark.parametrize("start", [b"", b"\n", b" \n", b"\xef\xbb\xbf", b"<", b"<net"])
def test_only_what_no_other_format_begins_with_is_xml(start: bytes) -> None:
    """White space is the key of a field in ONNX's format."""
    for data in (start, start + b"\x08\x08", b"\n" + start + b"<?xml "):
        with pytest.raises(Untrusted, match="no XML"):
            plain_xml(content("a.xml", data))
        assert plain_xml(content("a.xml", data, trusted=True)) == data


@openvino
def test_our_own_file_of_openvino_begins_as_xml(tmp_path: Path) -> None:
    made = deploy(Net(), images(1), tmp_path, "openvino")
    assert plain_xml(read(made.path)) == made.path.read_bytes()
    with pytest.raises(Untrusted, match="no XML"):
        open_openvino(content("a.pt2", b"\x08\x08"), 1)


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


@onnxruntime
def test_a_model_of_onnx_is_not_taken_for_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own one has its mark where this model has the name of its producer."""
    from onnxruntime.capi import onnxruntime_pybind11_state as engine

    found: list[str] = []
    add = engine.SessionOptions.add_session_config_entry

    def noted(self: Any, key: str, value: str) -> None:
        found.append(f"{key}={value}")
        add(self, key, value)

    monkeypatch.setattr(engine.SessionOptions, "add_session_config_entry", noted)
    both = b"\x12\x06\x00\x00ORTM" + model()
    x = torch.zeros(1, 4)
    run = open_onnxruntime(content("a.onnx", both), 1)
    assert found == ["session.load_model_format=ONNX"]
    assert run(x)[0].tolist() == [[1.0, 2.0, 3.0, 4.0]]


@onnxruntime
def test_fields_that_the_check_does_not_know_reach_no_engine() -> None:
    """They may be those of another format, or of a later release that has new ways to name a file."""
    plain = plain_onnx(content("a.onnx", model()))
    for unknown in (b"\x0a\x06\x0a\x04evil", b"\xfa\x3f\x04evil"):  # field 1 as a text, which is a number; field 1023
        for data in (unknown + model(), model() + unknown):
            assert b"evil" in data
            assert plain_onnx(content("a.onnx", data)) == plain


@onnxruntime
def test_what_is_known_stays() -> None:
    from onnx import ModelProto

    data = model() + long_text(b"a note")
    assert ModelProto.FromString(plain_onnx(content("a.onnx", data))) == ModelProto.FromString(data)
    assert plain_onnx(content("a.onnx", b"rubbish", trusted=True)) == b"rubbish"


# --- the engine that is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".xml"])
def test_an_engine_opens_only_files_of_its_own_kind(
    engine: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("revnets.deploy.engines.get_engine", lambda name: Named(name, opened))
    monkeypatch.setattr("revnets.deploy.engines.read", lambda path, trust: content(str(path), b"", trust))
    path = tmp_path / f"file{suffix}"
    path.touch()
    runs = {".pt2": ("torch", "sparse"), ".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}[suffix]
    if engine in runs:
        load(path, engine)
    else:
        with pytest.raises(ExportError, match=f"engine='{engine}' does not run .*{suffix}.*: expected {runs[0]}"):
            load(path, engine)
    load(path, engine, trust=True)
    assert opened == [engine] * (1 + (engine in runs))


class Named:
    """Stands for an engine; notes that it opened something."""

    def __init__(self, name: str, opened: list[str]) -> None:
        self.name, self._opened = name, opened

    def open(self, content: Content, threads: int | None) -> None:
        self._opened.append(self.name)


# --- notes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SUFFIXES)
def anything(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with room for a seal."""
    path = tmp_path / f"file{request.param}"
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    return path


@pytest.mark.parametrize("purpose", [Purpose(), Purpose("sparse", "int8"), Purpose("e" * 20, "p" * 11), Purpose("a")])
def test_notes_that_fit_are_read_again(purpose: Purpose, anything: Path) -> None:
    seal(anything, purpose)
    assert read(anything).purpose == purpose


@pytest.mark.parametrize(
    "purpose", [Purpose("e" * 20, "p" * 12), Purpose("e", "ö"), Purpose("an engine", "int8"), Purpose("e", "int8 ")]
)
def test_notes_that_could_not_be_read_again_are_not_written(purpose: Purpose, anything: Path) -> None:
    before = anything.read_bytes()
    with pytest.raises(ExportError, match=r"a note of engine '.*' and precision '.*' does not fit: expected .* 31 "):
        seal(anything, purpose)
    assert anything.read_bytes() == before


def test_of_a_trusted_file_a_note_that_nothing_can_follow_does_not_count(tmp_path: Path) -> None:
    path = deploy(Net(), images(1), tmp_path, "torch").path
    seal(path, Purpose("tensorrt", "int8"))
    with pytest.raises(Untrusted, match=r"its note names 'tensorrt'.*trust=True"):
        load(path)
    assert load(path, trust=True)(images(2))[0].shape == (2, 4)


def test_neither_does_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    class Noting:
        def open(self, content: Content, threads: int | None) -> None:
            opened.append(content.purpose)

    def get_engine(name: str) -> Noting:
        opened.append(name)
        return Noting()

    monkeypatch.setattr("revnets.deploy.engines.get_engine", get_engine)
    path = tmp_path / "file.xml"
    path.touch()
    for noted in (Purpose("tensorrt", "int8"), Purpose("openvino", "bfloat16")):
        seal(path, noted)
        load(path, trust=True)
    assert opened == ["openvino", Purpose(), "openvino", Purpose("openvino", "bfloat16")]
