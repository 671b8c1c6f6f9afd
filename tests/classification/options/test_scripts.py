"""Options: where values come from, which one wins, and what a mistake is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from classification.options import TrainOptions, ValidateOptions, as_dict
from revnets.training.errors import UserError
from revnets.training.options.parsing import options_of, parse, read_layers

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "classification"


def options(*argv: str) -> TrainOptions:
    return parse(TrainOptions, argv, "", prog="train.py")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "lr: 0.5\nbatch_size: 7\namp: true\n")
    got = options("--config", config, "--lr", "0.25", "--no-amp")
    assert (got.lr, got.batch_size, got.amp) == (0.25, 7, False)
    assert got.epochs == TrainOptions().epochs


def test_base_is_relative_to_its_file_and_mappings_are_joined(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "low.yaml", "lr: 1\nepochs: 3\nmodel_kwargs: {mode: store, stem_stride: 2}\n")
    write(tmp_path / "deep" / "mid.yaml", "base: ../low.yaml\nlr: 2\nmodel_kwargs: {mode: checkpoint}\n")
    top = write(tmp_path / "top.yaml", "base: deep/mid.yaml\nbatch_size: 4\n")
    got = options("-c", top, "--model-kwargs", "exact=true", "widths=(1, 2)", "name=abc")
    assert (got.lr, got.epochs, got.batch_size) == (2.0, 3, 4)
    assert got.model_kwargs == {"mode": "checkpoint", "stem_stride": 2, "exact": True, "widths": (1, 2), "name": "abc"}


def test_none_takes_back_an_optional_value(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "aa: rand-m9\ndrop: 0.5\nsched: none\n")
    got = options("-c", config, "--aa", "none", "--drop", "none")
    assert (got.aa, got.drop, got.sched) == (None, None, "none")


def test_no_flags_can_be_taken_back(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "no_aug: true\nno_prefetcher: true\n")
    got = options("-c", config, "--aug")
    assert (got.no_aug, got.no_prefetcher) == (False, True)


def test_number_forms(tmp_path: Path) -> None:
    got = options("-c", write(tmp_path / "a.yaml", "lr: 1e-3\nscale: [0.5, 1]\n"))  # YAML 1.1 reads 1e-3 as text
    assert got.lr == 0.001
    assert got.scale == [0.5, 1.0]
    assert isinstance(got.scale[1], float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1\n", ["learning_rate"]),
        ("batchsize: 1\n", ["batchsize", "'batch_size'"]),
        ("lr: abc\n", ["lr", "'abc'", "a number"]),
        ("lr: .nan\n", ["lr", "nan", "a number"]),
        ("epochs: 1.5\n", ["epochs", "1.5", "a whole number"]),
        ("epochs: true\n", ["epochs", "True", "a whole number"]),
        ("epochs: 0\n", ["epochs", "0", "at least 1"]),
        ("amp: 1\n", ["amp", "1", "true or false"]),
        ("model: 3\n", ["model", "3", "text"]),
        ("smoothing: 1\n", ["smoothing", "at most 0.999"]),
        ("scale: 0.5\n", ["scale", "0.5", "a list"]),
        ("eval_metric: f1\n", ["eval_metric", "'f1'", "top1"]),
        ("model_kwargs: mode=store\n", ["model_kwargs", "a mapping"]),
        ("- a\n", ["list", "key: value"]),
        ("a: [\n", ["not valid YAML"]),
        ("base: other.yaml\n", ["base", "other.yaml", "cannot be read"]),
        ("base: a.yaml\n", ["leads back to itself"]),
        ("base: 3\n", ["base", "3"]),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    config = write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError) as caught:
        options("--config", config)
    message = str(caught.value)
    assert "a.yaml" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "1"], ["--lrr", "'--lr'"]),
        (["--lr", "abc"], ["--lr", "'abc'", "a number"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--model-kwargs", "mode"], ["--model-kwargs", "key=value"]),
        (["/data"], ["/data", "--data-dir /data"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "existing"]),
        (["--lr"], ["--lr", "--help"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        options(*argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


MASKS = ["--layers", "sparse_wide:0.75"]
CHANGES = [
    ["--sparsity-interval", "7"],
    ["--sparsity-start", "0.5"],
    ["--sparsity-end", "0.5"],
    ["--sparsity-end", "0"],
    ["--sparsity-drop-fraction", "0.1"],
]


@pytest.mark.parametrize("line", CHANGES, ids=" ".join)
def test_what_changes_masks_needs_masks_that_change(line: list[str]) -> None:
    for more in ([], MASKS, [*MASKS, "--sparsity-schedule", "static"], ["--keep-zeros"]):
        with pytest.raises(UserError, match=rf"^{line[0]}: [0-9.]+ has no effect, .*leave {line[0]} out"):
            options(*more, *line)
    for schedule in ("set", "rigl"):
        got = options(*MASKS, "--sparsity-schedule", schedule, *line)
        assert getattr(got, line[0][2:].replace("-", "_")) == float(line[1])


def test_a_recipe_may_say_how_masks_change_where_a_run_changes_them(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "sparsity_interval: 7\n")
    assert options("-c", config, *MASKS).sparsity_interval == TrainOptions().sparsity_interval
    assert options("-c", config, *MASKS, "--sparsity-schedule", "rigl").sparsity_interval == 7


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--aa rand-m9 --color-jitter 0.3", "--color-jitter: 0.3 has no effect, timm leaves it out with --aa rand-m9"),
        ("--aa rand-m9 --color-jitter-prob 0.3", "--color-jitter-prob: 0.3 has no effect, timm leaves"),
        ("--no-aug --reprob 0.3", "--reprob: 0.3 has no effect, --no-aug"),
        ("--cutmix 1 --cutmix-minmax 0.2 0.8", "--cutmix: 1.0 has no effect, --cutmix-minmax wins over it"),
        ("--crop-pad 4 --train-interpolation bicubic", "--train-interpolation: 'bicubic' has no effect, --crop-pad"),
        ("--pretrained --initial-checkpoint a.pth", "--pretrained: True has no effect, --initial-checkpoint replaces"),
        ("--worker-seeding part", "--worker-seeding: 'part' has no effect, images of folders"),
        ("--opt sgd --opt-eps 0", "--opt-eps: 0.0 has no effect, --opt sgd has no eps"),
        ("--warmup-epochs 0 --warmup-lr 0", "--warmup-lr: 0.0 has no effect, --warmup-epochs is 0"),
        ("--decay-rate 0", "--decay-rate: 0.0 has no effect, --sched cosine"),
        ("--lr-k-decay 2 --sched step", "--lr-k-decay: 2.0 has no effect, --sched step"),
        ("--lr-k-decay 0", "--lr-k-decay: '0' was given where a number above 0"),  # all rates would be the lowest
        ("--lr-k-decay 0 --sched step", "--lr-k-decay: '0' was given where a number above 0"),
    ],
)
def test_no_option_without_an_effect(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        options(*line.split())
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("line", ["--aa 3a --color-jitter 0.3", "--crop-pad 4 --aa v0 --train-interpolation bicubic"])
def test_options_that_have_an_effect_after_all(line: str) -> None:
    options(*line.split())


@pytest.mark.parametrize(
    "values",
    [
        {"mixup": 0.2, "batch_size": 3},
        {"aug_splits": 1},
        {"jsd_loss": True},
        {"aug_splits": 2, "mixup": 0.1},
        {"warmup_epochs": 9, "epochs": 3},
        {"resume": "auto", "overwrite": True},
        {"scale": [1.0]},
        {"input_size": [3, 32]},
        {"data_dir": ""},
    ],
)
def test_combinations_that_cannot_work(values: dict[str, Any]) -> None:
    good = TrainOptions(data_dir="x")
    good.check()
    with pytest.raises(UserError, match="--"):
        dataclasses.replace(good, **values).check()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_starts_with_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(("# python ", "# torchrun "))
    assert path.stem == "imagenet_base" or path.name in first or path.stem == "quickstart"
    got = dataclasses.replace(options("--config", str(path)), data_dir="x")
    got.check()
    assert "mode" in got.model_kwargs
    trained_only = frozenset(set(options_of(TrainOptions)) - set(options_of(ValidateOptions)))
    read_layers(ValidateOptions, ["--config", str(path)], "", ignored=trained_only)  # validate.py reads the same files


def test_recipes_leave_it_to_the_user_where_data_are() -> None:
    named = {path.stem: options("--config", str(path)).data_dir for path in CONFIGS.rglob("*.yaml")}
    assert [name for name, data in named.items() if data] == ["quickstart"], "which makes them"


def test_imagenet_recipes_follow_the_table_of_variants() -> None:
    recipes = [options("-c", str(CONFIGS / f"imagenet_s{n}.yaml")) for n in range(7)]
    assert [r.img_size for r in recipes] == [224, 256, 256, 288, 320, 352, 352]
    assert [r.drop for r in recipes] == [0.25, 0.25, 0.3, 0.3, 0.4, 0.4, 0.6]
    assert [r.drop_path for r in recipes] == [0, 0, 0, 0.05, 0.1, 0.1, 0.3]
    assert [r.model for r in recipes] == [f"revbifpn_s{n}" for n in range(7)]
    assert all(r.model_ema and r.smoothing == 0.1 and r.sched == "cosine" for r in recipes)
    assert all(r.batch_size * r.grad_accum_steps == 128 for r in recipes)
    assert [r.mixup for r in recipes] == sorted(r.mixup for r in recipes)


def test_written_options_read_back(tmp_path: Path) -> None:
    before = options("--model-kwargs", "mode=store", "--drop", "0.1", "--input-size", "3", "32", "64", "--amp")
    path = write(tmp_path / "args.yaml", yaml.safe_dump(as_dict(before)))
    assert options("--config", path) == before


def test_every_option_has_help_and_a_default_that_fits_it() -> None:
    from revnets.training.options.parsing import convert

    for schema in (TrainOptions, ValidateOptions):
        for option in options_of(schema).values():
            assert option.metadata["help"]
            assert convert(option, option.default, option.name) == option.default
