"""What series of runs keep between two calls: data that moved, and results that are damaged."""

import dataclasses
import json
import math
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from classification.options import TrainOptions
from classification.tables import lr_transfer, mus, series, sparse, spdf
from classification.tables import prune as prune_table
from classification.tables.series import part_of
from revnets.training.errors import UserError


def names_of(path: Path) -> list[str]:
    with tarfile.open(path) as file:
        return file.getnames()


def archive(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name))


def test_data_are_taken_once_and_again_where_they_changed(tmp_path: Path) -> None:
    options = TrainOptions(data_dir=str(tmp_path), train_split="train.tar", val_split="val.tar")
    for split in ("train.tar", "val.tar"):
        archive(tmp_path / split, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    made = series.parts(options, tmp_path, 2)
    assert names_of(made / "train.tar") == ["a/1.png", "b/1.png"]
    assert len(names_of(made / "val.tar")) == 4
    stamps = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert series.parts(options, tmp_path, 2) == made
    assert stamps == {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert series.parts(options, tmp_path, 4) != made
    archive(tmp_path / "train.tar", "c/1.png", "d/1.png")
    other = series.parts(options, tmp_path, 2)
    assert names_of(other / "train.tar") == ["c/1.png", "d/1.png"]
    assert series.digest_of(options, made) != series.digest_of(options, other), "nor are the runs the same"
    (tmp_path / "val.tar").unlink()
    with pytest.raises(UserError, match=r"--data-dir: there is no \.tar file '.*val\.tar'"):
        series.parts(options, tmp_path, 2)


@pytest.mark.parametrize("table", [mus, prune_table, sparse, spdf], ids=lambda table: table.Table.folder)
def test_recipes_of_the_tables_name_no_data(
    table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.Table.main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --data-dir: not given")
    assert table.Table.main(["--output", str(tmp_path / "out"), "--data-dir", str(tmp_path / "none")]) == 2
    assert f"no .tar file '{tmp_path / 'none' / 'train.tar'}'" in capsys.readouterr().err


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert sparse.Table.main(["--output", str(tmp_path / "file"), "--data-dir", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --output: the output folder '")


def test_parts_of_a_data_set(tars: Path, tmp_path: Path) -> None:
    def named(path: Path) -> set[str]:
        with tarfile.open(path) as file:
            return {str(Path(name).parent.name) for name in file.getnames()}

    half = part_of(tars / "train.tar", tmp_path / "half.tar", None, lambda names: names[:5])
    assert named(half) == set("01234")
    few = part_of(tars / "train.tar", tmp_path / "few.tar", 20)
    assert named(few) == set("0123456789")
    with pytest.raises(UserError, match="--images: 5 was given"):
        part_of(tars / "train.tar", tmp_path / "none.tar", 5)
    with pytest.raises(UserError, match=r"no \.tar file"):
        part_of(tars / "other.tar", tmp_path / "none.tar", 20)


DAMAGED = ["", "[1, ", "{", "3", "null", '{"a": 1}', "[[1]]", '["a"]', "[" * 10_000, "\ud800"]


@pytest.mark.parametrize("text", DAMAGED)
def test_stored_results_that_are_damaged_are_repeated(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "net.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert lr_transfer._stored(path) is None
    (tmp_path / "net.line.json").write_bytes(path.read_bytes())
    (tmp_path / "net.pth").touch()
    line = prune_table.Line(**{field.name: 0 for field in dataclasses.fields(prune_table.Line)})
    assert prune_table._stored(tmp_path / "net.pth", lambda: line) == line
    assert prune_table.Line(**json.loads((tmp_path / "net.line.json").read_text())) == line
    assert "cannot be used" in caplog.text


def test_stored_results_are_used(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    assert lr_transfer._stored(path) is None
    path.write_text("[1, null, 0.5]")
    found = lr_transfer._stored(path)
    assert found is not None
    assert (found[0], math.isnan(found[1]), found[2]) == (1, True, 0.5)
