"""Bad input to every command: one clear sentence, exit code 2, no traceback, nothing half-written.

More of the same are in tests/classification/test_train_errors.py and tests/detection/test_errors.py, with the words.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from classification import train, validate
from classification.digits import make_digits
from revnets.cli import app
from tests.classification.short_runs import SHORT, TINY

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[[Path], list[str]]


def file(name: str, content: bytes | str, *before: str) -> Make:
    """A command line that ends with a file of this content."""

    def make(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [*before, str(path)]

    return make


def saved(content: Any, *before: str) -> Make:
    """A command line that ends with a file of torch.save."""

    def make(folder: Path) -> list[str]:
        torch.save(content, folder / "given.pth.tar")
        return [*before, str(folder / "given.pth.tar")]

    return make


class Evil:
    """Its pickle runs code."""

    def __reduce__(self) -> Any:
        return print, ("this should not be printed",)


def spoiled(*before: str) -> Make:
    """A checkpoint with one wrong byte."""

    def make(folder: Path) -> list[str]:
        path = folder / "given.pth.tar"
        torch.save({"state_dict": {"a": torch.zeros(1000)}, "epoch": 1, "optimizer": {}}, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        return [*before, str(path)]

    return make


def tar(*, broken: bool) -> Make:
    """A tar file as data."""

    def make(folder: Path) -> list[str]:
        with tarfile.open(folder / "train.tar", "w") as archive:
            archive.add(__file__, "a/readme.txt")
        if broken:
            (folder / "train.tar").write_bytes(b"no tar" * 100)
        return ["--data-dir", str(folder), "--train-split", "train.tar"]

    return make


def folder_of(*names: str) -> Make:
    """A folder with these files in its class folders."""

    def make(folder: Path) -> list[str]:
        for split in ("train", "validation"):
            for name in names:
                path = folder / "data" / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("no image")
        (folder / "data").mkdir(exist_ok=True)
        return ["--data-dir", str(folder / "data")]

    return make


def loop(*before: str) -> Make:
    """A command line that ends with a link to itself."""

    def make(folder: Path) -> list[str]:
        (folder / "loop").symlink_to(folder / "loop")
        return [*before, str(folder / "loop")]

    return make


def given(*line: str) -> Make:
    """A command line as it is."""
    return lambda folder: list(line)


Case = tuple[str, Make, str]
LAYERS = ("--layers",)
LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
TRAIN: list[Case] = [
    # options
    ("unknown option", given("--learning-rate", "1"), "--learning-rate"),
    ("text for a number", given("--lr", "fast"), "'fast'"),
    ("number without end", given("--lr", "inf"), "--lr"),
    ("negative", given("--epochs", "-1"), "--epochs"),
    ("not one of the choices", given("--clip-mode", "hard"), "'hard'"),
    ("option without value", given("--opt"), "--opt"),
    ("stray word", given("imagenet"), "imagenet"),
    ("no such model", given("--model", "revbifpn_s7"), "revbifpn_s6"),
    ("no such model argument", given("--model-kwargs", "depthh=3"), "depthh"),
    ("a model argument of the wrong kind", given("--model", "test_revbifpn", "--model-kwargs", "exact=99"), "exact"),
    ("size that does not fit", given("--model", "test_revbifpn", "--img-size", "50"), "50"),
    ("no such schedule", given("--sched", "cosin"), "--sched"),
    ("no such loss scale", given("--amp", "--amp-dtype", "int8"), "int8"),
    ("odd batch with mixup", given("--mixup", "0.1", "--batch-size", "7"), "--batch-size"),
    ("range upside down", given("--scale", "1", "0.5"), "--scale"),
    ("no such interpolation", given("--aa", "rand-x9"), "--aa"),
    ("channels", given("--in-chans", "7", "--mean", "0.5", "0.5"), "--mean"),
    ("resume and overwrite", given("--resume", "auto", "--overwrite"), "--overwrite"),
    ("output that is a file", file("taken", "x", "--output"), "--output"),
    ("number of 70 bits", given("--seed", str(2**70)), "--seed"),
    ("number in other digits", given("--epochs", "\N{ARABIC-INDIC DIGIT TWO}"), "--epochs"),
    ("number of 5,000 digits", given("--warmup-epochs", "1" * 5000), "--warmup-epochs"),
    ("range of one number", given("--scale", "0.5"), "--scale"),
    ("range of zeros", given("--ratio", "0", "0"), "--ratio"),
    ("one beta", given("--opt-betas", "0.8"), "--opt-betas"),
    ("zero byte in a path", given("--output", "a\0b"), "--output"),
    ("path too long", given("--resume", "x" * 5000), "--resume"),
    ("link that leads to itself", loop("--initial-checkpoint"), "--initial-checkpoint"),
    ("run outside of the output", given("--experiment", "../other"), "--experiment"),
    ("colours of two channels", given("--in-chans", "2"), "--in-chans"),
    ("no such resampling", given("--train-interpolation", "cubic"), "bicubic"),
    ("device without values", given("--device", "meta"), "--device"),
    ("model of features", given("--model-kwargs", "features_only=true"), "features_only"),
    ("model argument twice", given("--model-kwargs", "a=1", "a=2"), "--model-kwargs"),
    ("optimizer of second order", given("--opt", "adahessian"), "adahessian"),
    ("optimizer that is not installed", given("--opt", "bnbadam"), "bnbadam"),
    ("cycles of no length", given("--lr-cycle-mul", "0", "--lr-cycle-limit", "2"), "--lr-cycle-mul"),
    # options without effect
    ("part of mixup without mixup", given("--mixup-switch-prob", "0.1"), "--mixup"),
    ("distillation without teacher", given("--distill-logits", "3"), "teacher"),
    ("two rates", given("--lr-base", "0.3"), "--lr"),
    ("warm-up rate without warm-up", given("--warmup-lr", "0.1"), "--warmup-epochs"),
    ("decay of another schedule", given("--patience-epochs", "3"), "--sched cosine"),
    ("erasing of nothing", given("--recount", "3"), "--reprob"),
    ("decay of no mean", given("--model-ema-decay", "0.9"), "--model-ema"),
    ("precision without amp", given("--amp-dtype", "bfloat16"), "--amp"),
    ("distribution without sparse layers", given("--sparsity-distribution", "erk"), "no sparse layers"),
    ("effect that a file lacks", file("a.yaml", "cutmix: 0.0\nmixup_mode: elem\n", "--config"), "mixup_mode"),
    # configurations
    ("configuration that is missing", given("--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ("configuration that is no YAML", file("a.yaml", "a: [", "--config"), "not valid YAML"),
    ("configuration that is a picture", file("a.yaml", b"\x89PNG\xff\xfe", "--config"), "a.yaml"),
    ("configuration that is empty of keys", file("a.yaml", "- 1\n", "--config"), "key: value"),
    ("unknown key", file("a.yaml", "lrr: 1\n", "--config"), "lrr"),
    ("key of another kind", file("a.yaml", "epochs: many\n", "--config"), "'many'"),
    ("configuration that runs code", file("a.yaml", "lr: !!python/object/apply:os.getcwd []\n", "--config"), "a.yaml"),
    ("key that is there twice", file("a.yaml", "epochs: 1\nepochs: 2\n", "--config"), "line 2"),
    ("key that is a number", file("a.yaml", "3: 1\n", "--config"), "the key 3"),
    ("configuration that is nested", file("a.yaml", "mean: " + "[" * 1200 + "]" * 1200, "--config"), "nested"),
    ("configuration that doubles itself", file("a.yaml", LAUGHS, "--config"), "aliases"),
    ("configuration that is a folder", given("--config", "/tmp"), "/tmp"),
    ("configuration that is a device", given("--config", "/dev/zero"), "/dev/zero"),
    ("configuration that leads to itself", loop("--config"), "--config"),
    ("base that leads back", file("a.yaml", "base: a.yaml\n", "--config"), "back to itself"),
    # data
    ("no data folder", given("--data-dir", "/nowhere"), "/nowhere"),
    ("empty data folder", folder_of(), "--data-dir"),
    ("no images in the folder", folder_of("a/readme.txt"), "--data-dir"),
    ("nothing but broken images", folder_of(*(f"a/{n}.png" for n in range(16))), "cannot be read"),
    ("tar file that is missing", given("--train-split", "other.tar"), "other.tar"),
    ("tar file that is none", tar(broken=True), "train.tar"),
    ("tar file without images", tar(broken=False), "--data-dir"),
    ("more classes than outputs", given("--num-classes", "3"), "--num-classes"),
    ("batch larger than the data", given("--batch-size", "4096"), "--batch-size"),
    ("recovery of nothing", given("--recovery-interval", "-1"), "--recovery-interval"),
    # checkpoints
    ("checkpoint that is missing", given("--resume", "/nowhere.pth"), "/nowhere.pth"),
    ("checkpoint that is empty", file("given.pth", b"", "--resume"), "given.pth"),
    ("checkpoint that is text", file("given.pth", "weights", "--resume"), "given.pth"),
    ("checkpoint of zeros", file("given.pth", bytes(4096), "--resume"), "given.pth"),
    ("half a checkpoint", file("given.pth", b"PK\x03\x04" + bytes(999), "--resume"), "given.pth"),
    ("checkpoint with a wrong byte", spoiled("--resume"), "checksum"),
    ("checkpoint that runs code", saved({"state_dict": Evil()}, "--resume"), "print"),
    ("weights that run code", saved({"state_dict": Evil()}, "--initial-checkpoint"), "print"),
    ("published weights that run code", saved({"state_dict": Evil()}, "--pretrained-path"), "--pretrained"),
    ("checkpoint that is a list", saved([1], "--resume"), "list"),
    ("checkpoint of weights alone", saved({"a": torch.zeros(1)}, "--resume"), "--initial-checkpoint"),
    ("checkpoint without weights", saved({"epoch": 1, "optimizer": {}}, "--resume"), "given.pth.tar"),
    ("weights of another model", saved({"state_dict": {"a": torch.zeros(1)}}, "--initial-checkpoint"), "another model"),
    ("weights that are no tensors", saved({"state_dict": {"a": "b"}}, "--initial-checkpoint"), "given.pth.tar"),
    ("safetensors that are none", file("a.safetensors", b"x" * 64, "--initial-checkpoint"), "a.safetensors"),
    ("checkpoint that is a folder", given("--resume", "/tmp"), "/tmp"),
    # layer specs
    ("no such layer", given(*LAYERS, "sparse_wid:0.75"), "did you mean sparse_wide"),
    ("no layer", given(*LAYERS, "+"), "unknown layer"),
    ("sparsity of one", given(*LAYERS, "sparse_wide:1"), "sparsity"),
    ("negative sparsity", given(*LAYERS, "sparse_wide:-0.5"), "sparsity"),
    ("sparsity that is text", given(*LAYERS, "sparse_wide:much"), "'much'"),
    ("sparsity that is no number", given(*LAYERS, "sparse_wide:nan"), "sparsity"),
    ("no sparsity", given(*LAYERS, "sparse_wide"), "sparse_wide:VALUE"),
    ("unknown option of a layer", given(*LAYERS, "sparse_wide:0.5:wider"), "'wider'"),
    ("option twice", given(*LAYERS, "sparse_wide:0.5:0.5"), "0.5"),
    ("second part wrong", given(*LAYERS, "sparse_wide:0.5+mus_fp9"), "mus_fp9"),
    ("schedule without sparse layers", given("--sparsity-schedule", "rigl"), "--layers"),
    ("schedule upside down",
     given(*LAYERS, "sparse:0.5", "--sparsity-start", "0.9", "--sparsity-end", "0.1"), "--sparsity"),
]  # fmt: skip
VALIDATE: list[Case] = [
    ("results of no kind", given("--results-file", "a.doc"), "a.doc"),
    ("images of no size", given("--img-size", "0"), "--img-size"),
    ("two sizes", given("--input-size", "3", "32", "32"), "--input-size"),
    ("validation on no device", given("--device", "cpu:3"), "--device"),
    ("results in a path that cannot be", given("--results-file", "x" * 300 + ".csv"), "--results-file"),
    ("EMA without checkpoint", given("--use-ema"), "--use-ema"),
    ("validated checkpoint that runs code", saved({"state_dict": Evil()}, "--checkpoint"), "print"),
    ("validated checkpoint with a wrong byte", spoiled("--checkpoint"), "checksum"),
]
PRUNE = ("prune", "test_resnet", "--data", "/tmp", "--output", "/tmp/never.safetensors", "--sparsity", "0.5")
DEPLOY = ("deploy", "test_resnet", "--output", "/tmp/never")
COMMAND: list[Case] = [
    ("bench: no such model", given("bench", "revbifpn_s9@64:1"), "revbifpn_s9"),
    ("bench: no batch", given("bench", "test_revbifpn@64:none"), "none"),
    ("bench: no such mode", given("bench", "test_revbifpn@64:1", "--modes", "backwards"), "backwards"),
    ("bench: no folder", given("bench", "test_revbifpn@64:1", "--output", "/nowhere/a.json"), "/nowhere"),
    ("profile: no such model", given("profile", "resnet5000"), "resnet5000"),
    ("profile: size of zero", given("profile", "test_revbifpn@0:1"), "0"),
    ("profile: no such optimizer", given("profile", "test_revbifpn@64:1", "--optimizer", "sdg"), "sdg"),
    ("profile: fit in words", given("profile", "test_revbifpn@64:1", "--fit", "much"), "much"),
    ("profile: no such sweep", given("profile", "test_revbifpn@64:1", "--sweep", "colour"), "colour"),
    ("profile: no such configuration", given("profile", "nowhere.py@64:1"), "nowhere.py"),
    ("layers: no such model", given("layers", "resnet5000", "sparse:0.5"), "resnet5000"),
    ("bench: size of zeros", given("bench", "test_revbifpn@00:1"), "whole number"),
    ("bench: over a device", given("bench", "test_resnet@32:1", "--output", "/dev/null"), "is no file"),
    ("bench: twice the same", given("bench", "test_resnet@32:1", "test_resnet@32:1"), "twice"),
    ("profile: two tables", given("profile", "test_resnet@32:1", "--sweep", "depth", "--fit", "1GB"), "--fit"),
    ("profile: fit of nothing", given("profile", "test_resnet@32:1", "--fit-what", "image"), "without --fit"),
    ("profile: fit without end", given("profile", "test_resnet@32:1", "--fit", "9" * 400 + "GB"), "below 2^63"),
    ("profile: part of no detector", given("profile", "test_resnet@32:1", "--part", "neck"), "no detector"),
    ("profile: closure", given("profile", "test_resnet@32:1", "--optimizer", "adahessian"), "cannot run"),
    ("profile: device without data", given("profile", "test_resnet@32:1", "--device", "meta"), "'meta'"),
    ("profile: ninth CPU", given("profile", "test_resnet@32:1", "--device", "cpu:9"), "'cpu:9'"),
    ("profile: one mode twice", given("profile", "test_resnet@32:1", "--mode", "store,store"), "twice"),
    ("profile: a hub", given("profile", "hf-hub:nobody/nothing"), "hf-hub"),
    ("profile: option twice", given("profile", "test_resnet@32:1", "--device", "cpu", "--device", "cpu"), "--device"),
    ("profile: nothing", given("profile", ""), "MODEL"),
    ("numerics: scale of zero", given("numerics", "test_resnet@32:1", "--grad-scale", "0"), "above 0"),
    ("numerics: scale that is none", given("numerics", "test_resnet@32:1", "--grad-scale", "nan"), "'nan'"),
    ("numerics: split of nothing", given("numerics", "test_resnet@32:1", "--split", "train"), "without --data"),
    ("prune: seed of 65 bits", given(*PRUNE, "--seed", str(2**64)), "18446744073709551615"),
    ("prune: damping without end", given(*PRUNE, "--damping", "inf"), "--damping"),
    ("prune: damping of nothing", given(*PRUNE, "--method", "wanda", "--damping", "1"), "--method wanda"),
    ("deploy: density that is none", given(*DEPLOY, "--max-density", "nan"), "of at least 0 and at most 1"),
    ("deploy: tolerance without end", given(*DEPLOY, "--tolerance", "inf"), "--tolerance"),
    ("deploy: data for nothing", given(*DEPLOY, "--data", "/tmp"), "--int8"),
    ("bench-deploy: threads without end", given("bench-deploy", "test_resnet", "--threads", str(2**40)), "1024"),
    ("bench-fp8: no width", given("bench-fp8", "--widths", ","), "--widths"),
    ("bench-sparse-training: nothing", given("bench-sparse-training", "--no-layers"), "nothing to measure"),
    ("bench-2to4: rows without end", given("bench-2to4", "--rows", "9" * 5000), "--rows"),
    ("layers: size of nothing", given("layers", "--img-size", "32"), "--img-size"),
    ("no such command", given("bake"), "bake"),
    ("layers: no such spec", given("layers", "test_revbifpn", "spars:0.5"), "spars"),
]


def one_sentence(code: int, said: str, word: str) -> None:
    """Exit code 2 and one sentence that holds the word."""
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "revnets: "))]
    assert code == 2, said
    assert len(errors) == 1, said
    assert word in errors[0], errors[0]
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return make_digits(tmp_path_factory.mktemp("data") / "digits", size=32, limit=64)


@pytest.mark.parametrize(("what", "make", "word"), TRAIN, ids=[case[0] for case in TRAIN])
def test_train(what: str, make: Make, word: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "given").mkdir()
    line = ["--data-dir", str(data), "--output", str(tmp_path / "output"), *make(tmp_path / "given")]
    code = train.main([*SHORT, *line])
    out, err = capfd.readouterr()
    one_sentence(code, err, word)
    assert "should not be printed" not in out
    if what != "nothing but broken images":  # found when the first batch is read
        assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("what", "make", "word"), VALIDATE, ids=[case[0] for case in VALIDATE])
def test_validate(
    what: str, make: Make, word: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = validate.main([*TINY, "--data-dir", str(data), *make(tmp_path)])
    out, err = capfd.readouterr()
    one_sentence(code, err, word)
    assert "should not be printed" not in out


@pytest.mark.parametrize(("what", "make", "word"), COMMAND, ids=[case[0] for case in COMMAND])
def test_revnets(what: str, make: Make, word: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, make(tmp_path))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    one_sentence(result.exit_code, result.stderr, word)


def test_there_are_at_least_sixty() -> None:
    assert len(TRAIN) + len(VALIDATE) + len(COMMAND) >= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        ["-m", "revnets.cli", "layers", "resnet5000", "sparse:0.5"],
        ["classification/validate.py", "--model", "revbifpn_s7", "--data-dir", "/tmp"],
        ["detection/train.py", "nowhere.py"],
        ["detection/test.py", "nowhere.py", "nowhere.pth"],
    ],
    ids=lambda line: " ".join(line[:3]),
)
def test_as_commands(line: list[str]) -> None:
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=180)
    one_sentence(done.returncode, done.stderr, "resnet5000" if "-m" in line else "")
