"""`--aa`: what timm reads is taken, what it would pass over is refused, and the part is named."""

from __future__ import annotations

import pytest
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from classification.options import TrainOptions
from classification.options.policy import AUGMIX, POLICIES, RAND, check_policy
from revnets.training.errors import UserError

MAKERS = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_taken_timm_takes_too(name: str) -> None:
    """Every part that the table has, alone and all together."""
    parts = [f"{key}1" for key in POLICIES[name]] + (["tweights", "t3a"] if name == "rand" else [])
    for words in (name, *(f"{name}-{part}" for part in parts), "-".join([name, *parts[:-1]])):
        check_policy(words)
        MAKERS.get(name, auto_augment_transform)(words, {"img_mean": (128, 128, 128)})


@pytest.mark.parametrize(("words", "part"), [("rand", RAND), ("augmix", AUGMIX)])
def test_every_number_of_the_table_means_something_to_timm(words: str, part: dict[str, object]) -> None:
    """A key that timm does not know ends in an error of its own."""
    for key in (*part, "q"):
        if key == "q":
            with pytest.raises(AssertionError):
                MAKERS[words](f"{words}-{key}1", {})
        else:
            MAKERS[words](f"{words}-{key}1", {})


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("rand-mX", "'mX'"),
        ("rand-m9-foo", "'foo'"),
        ("rand-m9-mstd0.5-", "''"),
        ("rand--m9", "''"),
        ("rand-m", "'m'"),
        ("rand-m-9", "'m'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-q9", "'q9'"),
        ("rand-twice", "'twice'"),
        ("rand-p5", "'p5'"),
        ("rand-inc2", "'inc2'"),
        ("rand-M9", "'M9'"),
        ("rand-mstd1e999", "'mstd1e999'"),
        ("rand-m9-m5", "m twice"),
        ("rand-tweights-t3a", "t twice"),
        ("augmix-foo", "'foo'"),
        ("augmix-d-1", "'d'"),
        ("original-m9", "'m9'"),
        ("v0-x", "'x'"),
        ("v1", "'v1'"),
        ("randm9", "'randm9' (did you mean 'rand'?)"),
        ("-rand", "''"),
    ],
)
def test_the_part_that_timm_does_not_read_is_named(words: str, part: str) -> None:
    with pytest.raises(UserError, match=r"^--aa: ") as caught:
        TrainOptions(data_dir="x", aa=words).check()
    assert part in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("words", [None, "", "rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5-w4-d2", "3a"])
def test_policies_of_recipes_are_taken(words: str | None) -> None:
    TrainOptions(data_dir="x", aa=words).check()
