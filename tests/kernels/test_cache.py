"""Which compiled kernels are loaded, where they are kept, and what odd compilers and folders come to.

The kernel here is a few functions, which compile in a moment; what is planted by others is a working library with the
right checksum, so that only who may write it speaks against it, and it leaves a trace where it is loaded.
"""

import ctypes
import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from revnets.kernels import build, cache, compiler
from revnets.kernels.build import KernelUnavailable
from revnets.kernels.compiler import compile_library
from revnets.kernels.compressed import compress

from .nets import needs_kernel

pytestmark = needs_kernel
NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")
SMALL = {name: str(ctypes.sizeof(kind)) for name, kind in build.SIZES.items()}
SMALL |= dict.fromkeys(("revnets_target", "revnets_byte_target"), '(long long)"small"')
SOURCE = "".join(f'extern "C" long long {name}() {{ return {SMALL.get(name, "0")}; }}\n' for name in build.FUNCTIONS)
EVIL = """#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void go() { if (FILE* f = std::fopen(std::getenv("TRACE"), "w")) std::fclose(f); }
"""
Load = Callable[[], ctypes.CDLL]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A planted one, and one that is of something else."""
    folder, made = tmp_path_factory.mktemp("libraries"), {}
    for name, source in (("evil", EVIL + SOURCE), ("other", 'extern "C" int other() { return 1; }')):
        (folder / f"{name}.cpp").write_text(source)
        made[name] = folder / f"{name}.so"
        compile_library(build._compiler(), folder / f"{name}.cpp", made[name], ["-fPIC"], [])
    return made


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """Loads the small kernel, kept in folders of this test."""
    monkeypatch.setattr(build, "SOURCE", tmp_path / "sparse_conv.cpp")
    monkeypatch.setattr(build, "HEADERS", [])
    monkeypatch.setattr(build, "_ATTEMPTS", [([], [])])
    build.SOURCE.write_text(SOURCE)
    (tmp_path / "temporary").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("REVNETS_CACHE", str(tmp_path / "cache"))
    for name in ("REVNETS_CXX", "CXX", "REVNETS_CXXFLAGS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return build.load_kernel.__wrapped__


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What has been compiled, trials of the compiler not counted."""
    seen: list[Path] = []

    def counting(*args: object, **kwargs: object) -> None:
        seen.append(args[2])  # type: ignore[arg-type]
        compile_library(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "compile_library", counting)
    return seen


@pytest.fixture
def _any_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def kept(folder: Path) -> Path:
    """The library there."""
    (found,) = folder.glob("*.so")
    return found


def unloaded(path: Path) -> Path:
    """The same file anew: the one before is in this process's memory, which would change with it."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def plant(folder: Path, library: Path) -> Path:
    """A library, with its checksum, under the name that will be looked for."""
    folder.mkdir(exist_ok=True)
    path = folder / build._name(build.kernel_key(), build._compiler())
    path.unlink(missing_ok=True)
    cache.seal(library, path, build.kernel_key())
    return path


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# --- who may write ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_any_umask")
def test_what_is_made_is_private(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders above it, too, and whatever the umask."""
    monkeypatch.delenv("REVNETS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    assert load().revnets_target() == b"small"
    folder = tmp_path / "a" / "b" / "revnets"
    for path, mode in ((tmp_path / "a", 0o700), (folder.parent, 0o700), (folder, 0o700), (kept(folder), 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert all(not path.stat().st_mode & 0o077 for path in folder.iterdir())
    assert not list(folder.glob(".build-*"))


def _folder_for_all(folder: Path, path: Path) -> None:
    folder.chmod(0o777)


def _folder_for_the_group(folder: Path, path: Path) -> None:
    folder.chmod(0o775)


def _sticky_folder_for_all(folder: Path, path: Path) -> None:
    folder.chmod(0o1777)


def _folder_of_another(folder: Path, path: Path) -> None:
    os.chown(folder, NOBODY, NOBODY)


def _file_for_all(folder: Path, path: Path) -> None:
    path.chmod(0o666)


def _file_for_the_group(folder: Path, path: Path) -> None:
    path.chmod(0o660)


def _file_of_another(folder: Path, path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def _link(folder: Path, path: Path) -> None:
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def _folder_that_can_be_exchanged(folder: Path, path: Path) -> None:
    folder.parent.chmod(0o777)


UNTRUSTED = [
    *(_folder_for_all, _folder_for_the_group, _sticky_folder_for_all, _file_for_all, _file_for_the_group, _link),
    *(pytest.param(one, marks=as_root) for one in (_folder_of_another, _file_of_another)),
]


@pytest.mark.parametrize("spoil", [*UNTRUSTED, _folder_that_can_be_exchanged])
def test_what_others_may_write_is_not_loaded(
    spoil: Callable[[Path, Path], None],
    load: Load,
    libraries: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel is there all the same: made again, or made elsewhere; one sentence says why."""
    (tmp_path / "above").mkdir(mode=0o700)
    folder = tmp_path / "above" / "cache"
    monkeypatch.setenv("REVNETS_CACHE", str(folder))
    folder.mkdir(mode=0o700)
    spoil(folder, plant(folder, libraries["evil"]))
    assert load().revnets_target() == b"small"
    assert not (tmp_path / "trace").exists()
    (sentence,) = said(caplog)
    assert str(folder.parent) in sentence


def test_the_planted_library_works(load: Load, libraries: dict[str, Path], tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    (tmp_path / "cache").mkdir(mode=0o700)
    plant(tmp_path / "cache", libraries["evil"])
    load()
    assert (tmp_path / "trace").exists()


def _no_folder(folder: Path, path: Path) -> None:
    path.unlink()
    folder.rmdir()
    folder.write_text("")


def _folder_by_link(folder: Path, path: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


SPOILT_FALLBACKS = [
    *(_folder_for_all, _folder_for_the_group, _no_folder, _folder_by_link, _folder_that_can_be_exchanged),
    pytest.param(_folder_of_another, marks=as_root),
]


@pytest.mark.parametrize("spoil", SPOILT_FALLBACKS)
def test_the_folder_for_temporary_files(
    spoil: Callable[[Path, Path], None],
    load: Load,
    libraries: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Where anybody may have made the folder first: there is no kernel then."""
    monkeypatch.setenv("REVNETS_CACHE", "/proc/nowhere")
    folder = tmp_path / "temporary" / f"revnets-{os.getuid()}"
    folder.mkdir(mode=0o700)
    spoil(folder, plant(folder, libraries["evil"]))
    with pytest.raises(KernelUnavailable, match=r"no folder for the compiled kernel.*temporary") as error:
        load()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


def test_what_is_loaded_is_what_was_checked(
    load: Load, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another file under the name, in the moment between."""
    load()
    plain = build._checked

    def exchanging(path: Path) -> ctypes.CDLL:
        plant(tmp_path / "cache", libraries["evil"])
        return plain(path)

    monkeypatch.setattr(build, "_checked", exchanging)
    load()
    assert not (tmp_path / "trace").exists()


@as_root
def test_what_root_has_prepared_is_used(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By other users: for them it is read-only."""
    load()
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    monkeypatch.setenv("PATH", "")
    assert load().revnets_target() == b"small"


# --- damaged ones ----------------------------------------------------------------------------------------------------


def _truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _halved(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _only_its_head(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:64])


def _changed(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path, other: Path) -> None:
    path.write_text("no library" * 100)


def _foreign(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def _of_something_else(path: Path, other: Path) -> None:
    path.unlink()
    cache.seal(other, path, build.kernel_key())


def _of_another_key(path: Path, other: Path) -> None:
    path.unlink()
    cache.seal(other, path, "another")


def _sealed_text(path: Path, other: Path) -> None:
    path.write_text("of another processor, say")
    path.rename(path.with_suffix(".txt"))
    cache.seal(path.with_suffix(".txt"), path, build.kernel_key())


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    *(_truncated, _halved, _only_its_head, _changed, _empty, _text, _foreign, _of_something_else, _of_another_key),
    *(_sealed_text, _folder, _pipe),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_libraries_are_made_again(
    damage: Callable[[Path, Path], None],
    load: Load,
    libraries: dict[str, Path],
    compiled: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load()
    damage(unloaded(kept(tmp_path / "cache")), libraries["other"])
    assert load().revnets_target() == b"small"
    assert len(compiled) == 2
    assert any("is compiled again" in words and "\n" not in words for words in said(caplog))
    if damage is not _folder:  # in the place of which nothing can be put
        load()
        assert len(compiled) == 2
        assert len(said(caplog)) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_that_cannot_be_made_again(
    damage: Callable[[Path, Path], None],
    load: Load,
    libraries: dict[str, Path],
    compiled: list[Path],
    tmp_path: Path,
) -> None:
    load()
    damage(unloaded(kept(tmp_path / "cache")), libraries["other"])
    key = build.kernel_key()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "kernel_key", lambda: key)
        build.SOURCE.write_text("no program")
        with pytest.raises(KernelUnavailable, match="cannot compile") as error:
            load()
    assert len(compiled) == 2
    assert "\n" not in str(error.value)


# --- without a compiler, or without room -----------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["PATH", "REVNETS_CXX", "CXX"])
def test_without_a_compiler_what_is_there_is_used(
    variable: str, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is written, so that the folder may be read-only."""
    load()
    before = {path: path.stat().st_mtime_ns for path in [tmp_path / "cache", *(tmp_path / "cache").iterdir()]}
    monkeypatch.setenv(variable, "/no/such/place")
    assert load().revnets_target() == b"small"
    assert before == {path: path.stat().st_mtime_ns for path in [tmp_path / "cache", *(tmp_path / "cache").iterdir()]}
    monkeypatch.setenv("REVNETS_CXX", "none")
    with pytest.raises(KernelUnavailable, match="REVNETS_CXX=none"):
        load()


def test_another_compiler_by_name_compiles_its_own(
    load: Load, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    monkeypatch.setenv("REVNETS_CXX", f"{build._compiler()[0]} -DOTHER")
    load()
    assert len(compiled) == 2
    monkeypatch.delenv("REVNETS_CXX")
    load()
    assert len(compiled) == 2


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_folders_without_room(
    code: int, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = build.try_room

    def full(path: Path) -> None:
        if (tmp_path / "cache") in path.parents:
            raise OSError(code, os.strerror(code), str(path))
        plain(path)

    monkeypatch.setattr(build, "try_room", full)
    assert load().revnets_target() == b"small"
    (sentence,) = said(caplog)
    assert os.strerror(code) in sentence
    assert kept(tmp_path / "temporary" / f"revnets-{os.getuid()}")
    assert not list((tmp_path / "cache").glob(".build-*"))


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("", 0),
        ("relative/folder", 0),
        ("~/cache", 0),
        ("~no-such-user/cache", "no-such-user|home"),
        ("a-file", "Not a directory|not a folder"),
        ("a-file/below", "not a folder"),
        ("/proc/nowhere", "No such file"),
        ("/dev/null", "Not a directory"),
        ("x" * 5000, "too long"),
        ("itself", "symbolic|not a folder|Not a directory"),
    ],
)
def test_odd_folders(
    folder: str,
    words: str | int,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("a-file").touch()
    Path("itself").symlink_to("itself")
    monkeypatch.setenv("REVNETS_CACHE", folder)
    assert load().revnets_target() == b"small"
    if not words:
        assert not caplog.records
        return
    (sentence,) = said(caplog)
    assert any(word in sentence for word in str(words).split("|")), sentence
    assert kept(tmp_path / "temporary" / f"revnets-{os.getuid()}")


# --- odd compilers ---------------------------------------------------------------------------------------------------

SCRIPTS = {
    "prints nothing": "exit 0",
    "fails without a word": "exit 3",
    "hangs": "sleep 60",
    "leaves somebody who waits": "sleep 60 & exit 1",
    "prints for ever": "while true; do echo error; done",
    "complains for ever": "yes error >&2",
    "complains in bytes": r"printf '\377\376 error \000' >&2; exit 1",
    "writes text": 'for last in "$@"; do case "$previous" in -o) echo text > "$last";; esac; previous=$last; done',
    "reads": "cat > /dev/null; exit 1",
    "dies": "kill -9 $$",
}


def test_a_busy_machine_gives_the_compiler_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.os, "cpu_count", lambda: 4)
    for load, times in ((0.5, 1), (12.0, 3), (400.0, 10)):
        monkeypatch.setattr(compiler.os, "getloadavg", lambda load=load: (load, load, load))
        assert compiler._patience() == times * compiler._PATIENCE


ENDLESS = {"hangs", "prints for ever", "complains for ever"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_odd_compilers(script: str, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{SCRIPTS[script]}\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setattr(compiler, "_MOMENT", 0.5)
    monkeypatch.setenv("REVNETS_CXX", str(tmp_path / "c++"))
    words = "has not ended within 0.5 seconds" if script in ENDLESS else "cannot compile"
    with pytest.raises(KernelUnavailable, match=words) as error:
        load()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*.so")) + list((tmp_path / "cache").glob(".build-*"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(
            ("REVNETS_CXX", value)
            for value in ("/tmp", "/etc/passwd", "g++ 'unbalanced", "''", "no-such", "-v", "\udcff")
        ),
        *(("REVNETS_CXXFLAGS", value) for value in ("'unbalanced", "--no-such-flag", "\udcff", "-o /dev/full")),
    ],
)
def test_odd_words(variable: str, value: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel yet: one sentence, and layers are dense, not broken."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(KernelUnavailable) as error:
        load()
    assert "\n" not in str(error.value)
    build.kernel_problem.cache_clear()
    build.load_kernel.cache_clear()
    try:
        weight = torch.eye(3)
        with pytest.warns(UserWarning, match="dense kernels"):
            y = torch.ops.revnets.sparse_linear(torch.ones(2, 3), *compress(weight), None)
        assert torch.equal(y, torch.ones(2, 3))
    finally:
        build.kernel_problem.cache_clear()
        build.load_kernel.cache_clear()


# --- several at once -------------------------------------------------------------------------------------------------


def test_several_at_once_compile_once(load: Load, compiled: list[Path], tmp_path: Path) -> None:
    start, found = threading.Barrier(4), []

    def one() -> None:
        start.wait()
        found.append(load().revnets_target())

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"small"] * 4
    assert kept(tmp_path / "cache")
    assert len(compiled) == 1


def test_somebody_who_was_killed_while_compiling(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it has left stands in nobody's way, and is never taken for the kernel."""
    process = os.fork()
    if process == 0:
        try:
            monkeypatch.setattr(build, "seal", lambda *_: os.kill(os.getpid(), 9))
            load()
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == 9
    assert list((tmp_path / "cache").glob(".build-*"))
    assert not list((tmp_path / "cache").glob("*.so"))
    assert load().revnets_target() == b"small"
    assert kept(tmp_path / "cache")


def test_somebody_who_never_ends(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lock saves work, nothing more."""
    monkeypatch.setattr(compiler, "_PATIENCE", 0.05)
    (tmp_path / "cache").mkdir(mode=0o700)
    lock = tmp_path / "cache" / f"{build._name(build.kernel_key(), build._compiler())}.lock"
    with compiler.turn(lock) as waited:
        assert not waited
        assert load().revnets_target() == b"small"


def test_links_in_the_place_of_the_lock(load: Load, tmp_path: Path) -> None:
    """The user's own file survives."""
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "cache" / f"{build._name(build.kernel_key(), build._compiler())}.lock").symlink_to(tmp_path / "mine")
    assert load().revnets_target() == b"small"
    assert (tmp_path / "mine").read_text() == "mine"
