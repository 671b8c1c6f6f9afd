"""Which of several files ``deploy`` takes: times, accuracy, what a file says that it was chosen for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from revnets.cli import app
from revnets.deploy import (
    ENGINES,
    Candidate,
    Engine,
    ExportError,
    Precisions,
    Untrusted,
    accuracy,
    deploy,
    engines,
    load,
    quantize,
)
from revnets.deploy import candidates as choice
from revnets.deploy.candidates import FLOAT32, INT8, fastest
from revnets.deploy.peers import PEERS
from revnets.deploy.quantize import accuracies
from revnets.deploy.runners import open_openvino
from revnets.deploy.seal import Purpose, read, seal

from .nets import Net, images

SLOW = pytest.mark.slow
openvino = pytest.mark.skipif(
    bool(ENGINES["openvino"].missing() or ENGINES["onnxruntime"].missing()), reason="the engines are not installed"
)


def candidate(engine: str, seconds: float, precision: str = FLOAT32, refused: str = "") -> Candidate:
    return Candidate(engine, precision, Path(engine), lambda x: [x], seconds=seconds, refused=refused)


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing but torch were installed."""
    monkeypatch.setattr(Engine, "missing", lambda engine: list(engine.packages))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Has candidates take so many seconds, by the order in which they are timed; gives how often each round ran."""

    def take(*found_in_rounds: Sequence[float]) -> list[int]:
        left, counted = [list(one) for one in found_in_rounds], []

        def rounds(steps: Sequence[Any], repeats: int, *_: Any) -> list[list[tuple[float, float]]]:
            counted.append(repeats)
            found = left.pop(0)
            assert len(found) == len(steps)
            return [[(9 * seconds, 9 * seconds), (seconds, seconds)] for seconds in found]

        monkeypatch.setattr(choice, "rounds", rounds)
        return counted

    return take


# --- times -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(list(ENGINES)), st.sampled_from([1, 2, 3]), st.booleans()), min_size=1))
def test_nothing_that_may_be_taken_is_faster_and_no_dense_one_as_fast(made: list[tuple[str, int, bool]]) -> None:
    ready = [candidate(engine, seconds, refused="wrong" if bad else "") for engine, seconds, bad in made]
    ready.append(candidate("torch", 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "timed", lambda *_: None)  # the second time is as the first
        best = fastest(ready, torch.zeros(1), 1)
    allowed = [one for one in ready if not one.refused]
    assert best in allowed
    assert best.seconds == min(one.seconds for one in allowed)
    assert best.dense or not any(one.dense and one.seconds == best.seconds for one in allowed)


def test_close_times_are_taken_again(times: Callable[..., list[int]]) -> None:
    ready = [candidate("sparse", 1.0), candidate("openvino", 1.01), candidate("torch", 3.0)]
    counted = times((1.2, 1.1))
    assert fastest(ready, torch.zeros(1), 5).engine == "openvino"
    assert counted == [15]
    clear = [candidate("sparse", 1.0), candidate("openvino", 2.0)]
    assert fastest(clear, torch.zeros(1), 5).engine == "sparse"
    assert counted == [15], "a clear difference needs no second look"


@pytest.mark.parametrize(("threads", "wanted"), [(1, [1.0, 4.0]), (2, [5.0, 2.0])])
def test_the_least_of_all_rounds_counts(threads: int, wanted: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one thread by the processor's time: other programs do not count."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(choice, "rounds", lambda *_: [[(9.0, 1.0), (5.0, 8.0)], [(2.0, 4.0), (3.0, 6.0)]])
    assert choice.least([lambda x: [x]] * 2, torch.zeros(1), 2) == wanted


def test_a_slower_sparse_file_is_never_handed_out(
    ours_alone: None, times: Callable[..., list[int]], tmp_path: Path
) -> None:
    for number, (torch_s, sparse_s, wanted) in enumerate([(1.0, 2.0, "torch"), (2.0, 1.0, "sparse")]):
        times((torch_s, sparse_s))
        made = deploy(Net(), images(1), tmp_path / str(number), max_density=0.5)
        assert (made.engine, made.seconds) == (wanted, {"torch": torch_s, "sparse": sparse_s})


# --- accuracy --------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """The class of an image is the channel that is brightest."""

    def forward(self, x: Tensor) -> Tensor:
        """Means."""
        return x.mean((2, 3))


def labelled(count: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.eye(4)[torch.arange(count) % 4][:, :, None, None].expand(-1, -1, 2, 2)
    return [(part, part.mean((2, 3)).argmax(1)) for part in x.split(3)]


@pytest.mark.parametrize(("drop", "wrong", "taken"), [(0, 0, True), (0, 1, False), (5, 1, True), (4.9, 1, False)])
def test_a_precision_is_refused_by_points_of_top1(drop: float, wrong: int, taken: bool) -> None:
    """One of 20 images is 5 points."""
    left = [wrong]

    def run(x: Tensor) -> list[Tensor]:
        y = x.mean((2, 3))
        if left[0]:
            left[0], y = left[0] - 1, torch.cat((y[:1].roll(1, 1), y[1:]))
        return [y]

    both = [candidate("torch", 2.0), Candidate("sparse", INT8, None, run, seconds=1.0)]
    Precisions(drop, [], labelled(20)).judge(Head(), both, choice.plainly)
    assert [one.accuracy for one in both] == [100, 100 - 5 * wrong]
    assert not both[0].refused
    assert bool(both[1].refused) is not taken
    if not taken:
        assert f"5.00 points of top-1, more than {drop:g}" in both[1].refused


def test_images_that_fill_up_a_batch_do_not_count() -> None:
    x, labels = labelled(3)[0]
    filled = torch.cat((x, x))
    assert accuracies([lambda x: [x.mean((2, 3))], lambda x: [-x.mean((2, 3))]], [(filled, labels)]) == [100.0, 0.0]
    assert accuracy(lambda x: [x.mean((2, 3))], [(filled, labels)]) == 100.0


@pytest.mark.parametrize("drop", [-0.5, math.nan, math.inf])
def test_drops_that_are_none(drop: float) -> None:
    with pytest.raises(ValueError, match=r"accuracy_drop=.*expected"):
        Precisions(drop, [], [])


@pytest.mark.parametrize(("batch", "method"), [(None, "minmax"), (3, "entropy")])
def test_int8_is_a_candidate(
    batch: int | None, method: str, ours_alone: None, times: Callable[..., list[int]], tmp_path: Path
) -> None:
    times((2.0, 3.0, 1.0))
    x, data = images(batch or 1), images(20)
    labels = [(part, torch.zeros(len(part), dtype=torch.long)) for part in data.split(batch or 20) if len(part) != 2]
    tried = Precisions(100, data, labels, images=20, method=method)
    made = deploy(Net(nn.ReLU), x, tmp_path, any_batch=batch is None, max_density=0.5, precisions=tried)
    assert (made.engine, made.precision, made.path.name) == ("sparse", "int8", "model-int8.pt2")
    assert [one.name for one in made.candidates] == ["torch", "sparse", "sparse int8"]
    assert [path.name for path in tmp_path.iterdir()] == ["model-int8.pt2"]
    assert load(made.path)(x)[0].shape == (len(x), 4)
    assert read(made.path).purpose == Purpose("sparse", "int8")


def test_a_candidate_that_fails_is_left_out_with_the_reason(ours_alone: None, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)).softmax(1)

    made = deploy(
        Odd(), torch.rand(1, 4, 2, 2), tmp_path, precisions=Precisions(50, torch.rand(4, 4, 2, 2), labelled(4))
    )
    assert made.precision == FLOAT32
    assert [one.refused != "" for one in made.candidates] == [False, False, True]
    assert "no convolution or linear layer" in made.candidates[-1].refused


def test_an_engine_that_cannot_run_the_network_leaves_it_to_the_others(
    ours_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ExportError("it has no such operator")

    monkeypatch.setattr(engines, "sparse_graph", fail)
    made = deploy(Net(), images(1), tmp_path / "a")
    assert made.engine == "torch"
    assert {one.name: one.refused for one in made.candidates} == {"torch": "", "sparse": "it has no such operator"}
    monkeypatch.setattr(engines, "verify", fail)
    with pytest.raises(ExportError, match=r"^it has no such operator$"):
        deploy(Net(), images(1), tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


@SLOW
@openvino
def test_every_engine_at_every_precision(times: Callable[..., list[int]], tmp_path: Path) -> None:
    data = images(16)
    names = [*ENGINES, *(name for name, peer in PEERS.items() if peer.used() != FLOAT32)]
    net = Net(nn.ReLU)
    for number in range(len(ENGINES), len(names)):
        times([1.0 if i == number else 2.0 for i in range(len(names))])
        labels = [(data, net.eval()(data).argmax(1))]
        made = deploy(net, images(1), tmp_path / str(number), precisions=Precisions(100, data, labels, images=16))
        best = made.candidates[number]
        assert (made.engine, made.precision) == (best.engine, best.precision)
        assert read(made.path).purpose == Purpose(best.engine, best.precision)
        output = load(made.path)(images(2))[0]
        assert float((output - net(images(2)).detach()).square().mean().sqrt()) < 0.3


# --- what a file says ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in ENGINES if name != "torch"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if ENGINES[request.param].missing():
        pytest.skip("not installed")
    return deploy(Net(), images(1), tmp_path, request.param, max_density=0.5).path


@SLOW
def test_a_note_is_under_the_seal(written: Path) -> None:
    before = load(written)(images(2))[0]
    noted = Purpose({".pt2": "sparse", ".xml": "openvino", ".onnx": "onnxruntime"}[written.suffix], "int8")
    assert read(written).purpose == Purpose()
    seal(written, noted)
    size = written.stat().st_size
    for _ in range(2):
        seal(written, noted)
        assert read(written).purpose == noted
    assert written.stat().st_size == size, "a new note takes the place of the former"
    torch.testing.assert_close(load(written)(images(2))[0], before, rtol=3e-2, atol=3e-2)
    data = written.read_bytes()
    assert data.count(b"int8 ") == 1
    written.write_bytes(data.replace(b"int8 ", b"int4 "))
    with pytest.raises(Untrusted, match="changed after"):
        load(written)
    seal(written, Purpose("tensorrt", "int8"))
    with pytest.raises(Untrusted, match=r"its note names 'tensorrt', where .* runs such files"):
        load(written)


def test_a_note_is_in_the_comment_of_the_archive(ours_alone: None, tmp_path: Path) -> None:
    path = deploy(Net(), images(1), tmp_path, "torch").path
    seal(path, Purpose("sparse", "int8"))
    assert read(path).purpose == Purpose("sparse", "int8")
    assert load(path)(images(2))[0].shape == (2, 4)
    seal(path, Purpose("openvino", "int8"))
    with pytest.raises(Untrusted, match="its note names 'openvino', where torch or sparse runs such files"):
        load(path)


@SLOW
@openvino
def test_int8_for_openvino_is_opened_by_it(tmp_path: Path) -> None:
    made = quantize(Net(nn.ReLU), images(8), tmp_path, images=8, engine="openvino", any_batch=False, batch_size=3)
    content = read(made.path)
    assert content.purpose == Purpose("openvino", "int8")
    torch.testing.assert_close(load(made.path)(images(3)), open_openvino(content, None, None)(images(3)))
    assert load(made.path, engine="onnxruntime")(images(3))[0].shape == (3, 4)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network, a data set with splits, and one without."""
    import timm

    root = tmp_path_factory.mktemp("choice")
    save_file(timm.create_model("test_efficientnet", num_classes=2).state_dict(), root / "weights.safetensors")
    for split in ("data/train", "data/validation", "flat"):
        for number, label in enumerate("ab"):
            (root / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), (40 * i, 200 * number, 30)).save(root / split / label / f"{i}.png")
    (root / "empty" / "train").mkdir(parents=True)
    return root


def command(folder: Path, output: Path, *more: Any) -> Any:
    line = ["deploy", "test_efficientnet", "--checkpoint", folder / "weights.safetensors", "--output", output]
    line += ["--model-kwargs", "num_classes=2", "--img-size", 32, *more]
    return CliRunner().invoke(app, [str(word) for word in line])


@pytest.mark.parametrize(("data", "batch"), [("data", 4), ("flat", None)])
def test_command(data: str, batch: int | None, folder: Path, ours_alone: None, tmp_path: Path) -> None:
    size = () if batch is None else ("--batch-size", batch)
    result = command(folder, tmp_path / "out", "--accuracy-drop", 100, "--data", folder / data, "--images", 6, *size)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "chose " in words
    assert "times as fast as the next, " in words
    assert "top-1, %" in words
    assert "in float32" in words
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_sparse_on_demand_is_compared_with_dense(folder: Path, ours_alone: None, tmp_path: Path) -> None:
    result = command(folder, tmp_path, "--engine", "sparse", "--max-density", 0)
    assert result.exit_code == 0, result.output
    assert "torch in float32" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["test_efficientnet.pt2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--accuracy-drop", "0.5"), "need images: give --data"),
        (("--accuracy-drop", "-1", "--data", "data"), "expected a number of at least 0"),
        (("--accuracy-drop", "nan", "--data", "data"), "--accuracy-drop"),
        (("--accuracy-drop", "1", "--data", "data", "--engine", "torch"), "with --engine torch: leave out --engine"),
        (("--accuracy-drop", "1", "--data", "data", "--int8"), "with --int8: give one of them"),
        (("--accuracy-drop", "1", "--data", "nowhere"), "nowhere"),
        (("--accuracy-drop", "1", "--data", "empty"), "there is no 'validation'"),
        (("--accuracy-drop", "1", "--data", "empty", "--eval-split", "train"), "no images"),
        (("--accuracy-drop", "1", "--data", "data", "--eval-split", "test"), "--eval-split: there is no 'test'"),
        (("--accuracy-drop", "1", "--data", "data", "--output", "/proc/nothing"), "cannot be used"),
        (("--engine", "tensorrt"), "unknown engine 'tensorrt'"),
        (("--engine", "openvino"), "not installed"),
        (("--calibration", "entropy"), "without --int8 or --accuracy-drop"),
    ],
)
def test_errors_are_one_sentence(
    arguments: tuple[str, ...], message: str, folder: Path, ours_alone: None, tmp_path: Path
) -> None:
    words = [str(folder / word) if word in ("data", "empty", "nowhere") else word for word in arguments]
    output = [words.pop(words.index("--output") + 1)] if "--output" in words else [str(tmp_path / "out")]
    words = [word for word in words if word != "--output"]
    result = command(folder, Path(output[0]), *words)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
