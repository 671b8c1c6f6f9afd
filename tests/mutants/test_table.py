"""The table of faults stays true: each can be put in, compiles, and names tests that are there."""

import ast

import pytest

from .fault import AREAS, ROOT, Fault, TableError, table

EVERY = [(area, fault) for area, faults in table().items() for fault in faults]


@pytest.mark.parametrize(("area", "fault"), EVERY, ids=[fault.name for _, fault in EVERY])
def test_a_fault_can_be_put_in(area: str, fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    changed = fault.applied(text)
    assert changed != text
    ast.parse(changed)  # a fault is seen by what it computes, not by a syntax error
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists(), file
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_names_are_unique_and_every_area_has_some() -> None:
    names = [fault.name for _, fault in EVERY]
    assert len(set(names)) == len(names)
    assert {area for area, _ in EVERY} == set(AREAS)
    assert not set(names) & set(AREAS)


def test_only_some_are_chosen() -> None:
    assert set(table(["mm"])) == {"mm"}
    ((only,),) = table(["masks-empty-layer"]).values()
    assert only.name == "masks-empty-layer"
    assert {fault.name for faults in table(["mm-soft*"]).values() for fault in faults} == {
        "mm-softnms-threshold",
        "mm-softnms-score",
    }
    with pytest.raises(TableError, match="'mask-empty' is none of the areas reversible"):
        table(["mask-empty"])


@pytest.mark.parametrize(("text", "count"), [("x = 1\n", 0), ("x = 2\nx = 2\n", 2)])
def test_an_old_text_that_has_gone_is_named(text: str, count: int) -> None:
    fault = Fault("some-fault", "a.py", "x = 2", "x = 3", ("tests",))
    with pytest.raises(TableError, match=f"fault 'some-fault': its old text occurs {count} times in a.py"):
        fault.applied(text)
