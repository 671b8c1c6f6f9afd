"""What is typed for a network, and who reads it."""

import sys
from pathlib import Path

import pytest

from revnets.profiling import ProfileError
from revnets.profiling import target as targets
from revnets.profiling.target import Kind, Setting, Target, parse_targets

SETTING = Setting()
READER = """
from revnets.profiling.target import Target, register_reader

@register_reader
def read(text, setting, img_size, batch_size):
    return [Target(text.removeprefix("mine/"), img_size or 32, batch_size, "store")]
"""


def test_another_kind_is_read_by_the_module_that_registers_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "reads_mine.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(targets, "KINDS", [Kind("^mine/", "one of mine", "reads_mine", "torch", "mine")])
    assert parse_targets("mine/resnet18", SETTING, None, 3) == [Target("resnet18", 32, 3, "store")]
    assert sys.modules.pop("reads_mine")
    assert targets._READERS.pop("reads_mine")


def test_without_its_package_a_kind_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "KINDS", [Kind("^mine/", "one of mine", "reads_mine", "no_such_package", "mine")])
    with pytest.raises(ProfileError, match=r"'mine/x' is one of mine, which needs no_such_package: .*revnets\[mine\]"):
        parse_targets("mine/x", SETTING)
    assert parse_targets("resnet18@32:1", SETTING)[0].name == "resnet18"
