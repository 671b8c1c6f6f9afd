"""Deployed files of strangers run no code, and our own are opened in any thread."""

import importlib.util
import io
import json
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.deploy import ENGINES, ExportError, Untrusted, deploy, load
from revnets.deploy.runners import torch_threads
from revnets.deploy.seal import seal

INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(bool(e.missing()), reason=f"{', '.join(e.missing())} not installed: no engine")
    )
    for name, e in ENGINES.items()
]
Files = dict[str, bytes]


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6, 4)).eval()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of an engine, written once."""
    made: dict[str, Path] = {}

    def get(engine: str) -> Path:
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine)
            made[engine] = deploy(net(), torch.randn(1, 3, 12, 12), folder, engine, max_density=1.0).path
        return made[engine]

    return get


def copied(path: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in path.parent.iterdir():
        shutil.copy(file, folder / file.name)
    return folder / path.name


class Proof:
    """Code whose run leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = f"__import__('pathlib').Path({str(path)!r}).touch()"

    def __reduce__(self) -> Any:
        return exec, (self.code,)


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    return Proof(tmp_path / "ran")


# --- the seal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", INSTALLED)
def test_our_own_file_opens_wherever_it_is_moved(engine: str, deployed: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(deployed(engine), tmp_path / "moved")
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(load(path)(x)[0], net()(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", INSTALLED)
def test_a_changed_file_is_refused(engine: str, deployed: Callable[[str], Path], tmp_path: Path) -> None:
    original = deployed(engine)
    for number, file in enumerate(sorted(original.parent.iterdir())):
        path = copied(original, tmp_path / str(number))
        data = bytearray((path.parent / file.name).read_bytes())
        data[len(data) // 2] ^= 1
        (path.parent / file.name).write_bytes(data)
        with pytest.raises(Untrusted, match=r"changed after revnets deploy wrote it.*trust=True"):
            load(path)


@pytest.mark.parametrize("engine", INSTALLED)
def test_a_file_without_a_seal_needs_trust(
    engine: str, deployed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revnets.deploy.engines.seal", lambda path: None)  # as releases before it
    monkeypatch.setattr("revnets.deploy.engines.open_own", lambda *_: lambda x: [net()(x)])
    path = deploy(net(), torch.randn(1, 3, 12, 12), tmp_path, engine, max_density=1.0).path
    with pytest.raises(Untrusted, match=r"no seal of revnets deploy.*deploy the network again, or pass trust=True"):
        load(path)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(load(path, trust=True)(x)[0], net()(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_companion_that_is_gone_or_a_pipe_is_no_traceback(deployed: Callable[[str], Path], tmp_path: Path) -> None:
    if ENGINES["openvino"].missing():
        pytest.skip("openvino is not installed")
    path = copied(deployed("openvino"), tmp_path / "a")
    path.with_suffix(".bin").unlink()
    with pytest.raises(Untrusted, match=r"changed after"):
        load(path)
    path.with_suffix(".bin").mkdir()
    with pytest.raises(ExportError, match=r"cannot be read"):
        load(path)


# --- what a seal of a stranger's covers ------------------------------------------------------------------------------


def program(files: Files) -> tuple[str, Any]:
    name = next(name for name in files if name.endswith("models/model.json"))
    return name, json.loads(files[name])


def in_program(change: Callable[[Any, Proof], None]) -> Callable[[Files, Proof], None]:
    """A change of the program's description."""

    def edit(files: Files, proof: Proof) -> None:
        name, found = program(files)
        change(found, proof)
        files[name] = json.dumps(found).encode()

    return edit


def pickled(proof: Proof) -> bytes:
    buffer = io.BytesIO()
    torch.save(proof, buffer)
    return buffer.getvalue()


def rename_input(found: Any, proof: Proof) -> None:
    text = json.dumps(found).replace('"name": "input"', json.dumps("name")[:-1] + '": ' + json.dumps(INJECTED))
    found.update(json.loads(text.replace("CODE", proof.code.replace("\\", "").replace('"', "'"))))


INJECTED = "x=CODE"


def pickle_a_weight(files: Files, proof: Proof) -> None:
    name = next(name for name in files if name.endswith("_weights_config.json"))
    config = json.loads(files[name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    files[name] = json.dumps(config).encode()
    files[name.rpartition("/")[0] + "/" + first["path_name"]] = pickled(proof)


def pickle_a_constant(kind: str) -> Callable[[Files, Proof], None]:
    def edit(files: Files, proof: Proof) -> None:
        name = next(name for name in files if name.endswith("_constants_config.json"))
        entry = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        files[name] = json.dumps({"config": {"evil": entry}}).encode()
        data = pickled(proof) if kind == "tensor" else pickle.dumps(proof)
        files[name.rpartition("/")[0] + f"/{kind}_0"] = data

    return edit


def pickle_the_example(files: Files, proof: Proof) -> None:
    files[next(name for name in files if "sample_inputs" in name)] = pickled(proof)


def pickle_weights_as_before_29(files: Files, proof: Proof) -> None:
    root = next(iter(files)).split("/")[0]
    files[f"{root}/data/weights/model.pt"] = pickled(proof)


def add(name: str) -> Callable[[Files, Proof], None]:
    def edit(files: Files, proof: Proof) -> None:
        files[next(iter(files)).split("/")[0] + "/" + name] = pickled(proof)

    return edit


def tree(node: dict[str, Any]) -> Callable[[Any, Proof], None]:
    def change(found: Any, proof: Proof) -> None:
        signature = next(m["signature"] for m in found["graph_module"]["module_call_graph"] if m["signature"])
        signature["out_spec"] = json.dumps([1, node])

    return change


def set_target(target: str) -> Callable[[Any, Proof], None]:
    def change(found: Any, proof: Proof) -> None:
        node = found["graph_module"]["graph"]["nodes"][1]
        node["target"] = target
        node["inputs"] = [{"name": "x", "arg": {"as_string": proof.code[:60]}, "kind": 1}]

    return change


def set_size(found: Any, proof: Proof) -> None:
    values = found["graph_module"]["graph"]["tensor_values"]
    values["relu"]["sizes"][0] = {"as_expr": {"expr_str": proof.code, "hint": {"as_int": 2}}}


def nest(found: Any, proof: Proof) -> None:
    inner: list[Any] = []
    for _ in range(500):
        inner = [inner]
    found["verifiers"] = inner


EVIL: dict[str, Callable[[Files, Proof], None]] = {
    "a pickled weight": pickle_a_weight,
    "a pickled constant": pickle_a_constant("tensor"),
    "an opaque object": pickle_a_constant("opaque_obj"),
    "an object of torch's script": pickle_a_constant("custom_obj"),
    "a pickled example input": pickle_the_example,
    "weights in the layout of old": pickle_weights_as_before_29,
    "a compiled library": add("data/aotinductor/model/model.so"),
    "another model": add("models/other.json"),
    "a file of the user's": add("extra/notes.txt"),
    "a path out of the archive": add("data/weights/../../../weight_0"),
    "a size that is code": in_program(set_size),
    "a name that is source": in_program(rename_input),
    "a module to import": in_program(
        tree({"type": "collections.defaultdict", "context": '{"default_factory_module": "this"}', "children_spec": []})
    ),
    "an enumeration to import": in_program(
        tree({"type": "builtins.list", "context": '{"__enum__": true, "fqn": "this:x"}', "children_spec": []})
    ),
    "any function of torch": in_program(set_target("torch.hub.load")),
    "a function of a module of torch's": in_program(set_target("torch.os.system")),
    "an operator that maps files": in_program(set_target("torch.ops.aten.from_file.default")),
    "an operator of others": in_program(set_target("torch.ops.mkldnn._linear_pointwise.default")),
    "an extension": in_program(set_target("#higher:evil")),
    "lists without end": in_program(nest),
    "no program": lambda files, proof: files.update({program(files)[0]: b"[]"}),
}


def edited(path: Path, folder: Path, edit: Callable[[Files, Proof], None], proof: Proof) -> Path:
    """A copy of a ``.pt2`` with other parts, sealed as anybody can."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    edit(files, proof)
    evil = folder / "evil.pt2"
    with zipfile.ZipFile(evil, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    seal(evil)
    return evil


@pytest.mark.parametrize("kind", EVIL)
def test_code_in_a_sealed_program_is_not_run(
    kind: str, deployed: Callable[[str], Path], tmp_path: Path, proof: Proof
) -> None:
    evil = edited(deployed("torch"), tmp_path, EVIL[kind], proof)
    with pytest.raises(Untrusted, match=r"is not opened: it .*trust=True") as caught:
        load(evil)
    assert len(str(caught.value)) < 600
    assert not proof.path.exists()


def test_the_proof_would_be_there(deployed: Callable[[str], Path], tmp_path: Path, proof: Proof) -> None:
    """The weight of above does run with ``trust=True``: the test can see it."""
    evil = edited(deployed("torch"), tmp_path, pickle_a_weight, proof)
    with pytest.raises(ExportError, match=r"torch.export cannot open"):
        load(evil, trust=True)
    assert proof.path.exists()


def test_a_program_that_does_not_fit_is_no_traceback(
    deployed: Callable[[str], Path],
    tmp_path: Path,
    proof: Proof,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Sealed by somebody, plain, and wrong: torch logs a traceback of its own, which nobody is to see."""

    def change(found: Any, proof: Proof) -> None:
        found["graph_module"]["graph"]["nodes"][0]["inputs"][0]["name"] = 7

    evil = edited(deployed("torch"), tmp_path, in_program(change), proof)
    with pytest.raises(ExportError, match=r"torch.export cannot open"):
        load(evil)
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text


def test_checks_that_are_source_are_left_out(deployed: Callable[[str], Path], tmp_path: Path, proof: Proof) -> None:
    def change(found: Any, proof: Proof) -> None:
        found["guards_code"] = [proof.code, f"{proof.code} is None"]

    evil = edited(deployed("torch"), tmp_path, in_program(change), proof)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(load(evil)(x)[0], net()(x).detach())
    assert not proof.path.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_compressed_and_double_parts(deployed: Callable[[str], Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(deployed("torch")) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    root = files[0][0].split("/")[0]
    for method, more in ((zipfile.ZIP_DEFLATED, []), (zipfile.ZIP_STORED, files[:1])):
        bomb = tmp_path / f"{method}.pt2"
        padding = [(f"{root}/data/weights/weight_99", bytes(1 << 20))] if not more else []
        with zipfile.ZipFile(bomb, "w", method) as archive:
            for name, data in [*files, *padding, *more]:
                archive.writestr(name, data)
        seal(bomb)
        with pytest.raises(Untrusted):
            load(bomb)


@pytest.mark.parametrize("location", ["/etc/passwd", "../x", "weights"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_onnx_with_weights_in_other_files(
    engine: str, location: str, deployed: Callable[[str], Path], tmp_path: Path
) -> None:
    if any(importlib.util.find_spec(name) is None for name in ENGINES[engine].packages):
        pytest.skip(f"{engine} is not installed")
    import onnx

    model = onnx.load(deployed("onnxruntime"))
    weight = model.graph.initializer[0]
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.ClearField("raw_data")
    weight.external_data.add(key="location", value=location)
    (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
    seal(tmp_path / "evil.onnx")
    with pytest.raises(Untrusted, match=r"weights that lie in other files.*trust=True"):
        load(tmp_path / "evil.onnx", engine)


# --- threads ---------------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """What went wrong in so many threads that start together."""
    start, errors = threading.Barrier(count), []

    def body(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


@pytest.mark.parametrize("threads", [None, 1])
@pytest.mark.parametrize("engine", INSTALLED)
def test_every_thread_gets_its_own_answers(engine: str, threads: int | None, deployed: Callable[[str], Path]) -> None:
    """Of images of other sizes, too, which some engines compile for when they come."""
    run = load(deployed(engine), threads=threads)
    model, before = net(), torch.get_num_threads()

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for i in range(25):
            x = torch.randn(1 + (number + i) % 3, 3, 12, 12, generator=generator)
            with torch.no_grad():
                torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-4)

    assert not in_threads(4, work)
    assert torch.get_num_threads() == before


def test_outputs_stay_as_they_were(deployed: Callable[[str], Path]) -> None:
    for engine, one in ENGINES.items():
        if one.missing():
            continue
        run = load(deployed(engine))
        first = run(torch.ones(1, 3, 12, 12))[0]
        kept: Tensor = first.clone()
        run(torch.zeros(1, 3, 12, 12))
        assert torch.equal(first, kept), engine


def test_numbers_of_threads_do_not_mix() -> None:
    before = torch.get_num_threads()
    inside: list[int] = []
    wrong: list[Any] = []

    def work(number: int) -> None:
        mine = 1 + number % 2
        for _ in range(20):
            with torch_threads(mine):
                inside.append(mine)
                if torch.get_num_threads() != mine or set(inside) != {mine}:
                    wrong.append((mine, list(inside)))
                with torch_threads(3):
                    pass
                inside.remove(mine)

    assert not in_threads(4, work)
    assert not wrong
    assert torch.get_num_threads() == before
    assert not inside
