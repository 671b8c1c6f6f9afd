"""What ``deploy`` writes into a file so that ``load`` knows it again: the SHA-256 of all that comes before, at its end.

A file whose name does not say what runs it, and in what precision (OpenVINO in bfloat16, or an ``.onnx`` in INT8 that
OpenVINO runs faster), also has a note of that before the SHA-256, which covers it.

Every format leaves room at the end: the comment of a zip archive (``.pt2``), a further property of the model
(``.onnx``), an XML comment (``.xml``, which also covers its ``.bin``). So the seal moves with the file, and needs none
beside it. It shows that a file was written by ``revnets deploy`` and is as it was; it does not show by whom: what could
run code is looked for besides (``checks``).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..training.errors import shown
from .graph import ExportError

_DIGITS, _LETTERS = 64, 32
_ZIP_END, _ZIP_END_SIZE = b"PK\x05\x06", 22  # of its last record, without a comment


class Untrusted(ExportError):
    """A file that ``revnets deploy`` did not write, or that was changed since."""


@dataclass(frozen=True)
class Purpose:
    """What a file was chosen for; empty words where the end of its name says it.

    Attributes:
        engine: that runs it.
        precision: that it computes in: ``int8``, or what the engine takes by default, such as ``bfloat16``.
    """

    engine: str = ""
    precision: str = ""


@dataclass(frozen=True)
class Content:
    """A deployed file, read once: what is checked is what is opened.

    Attributes:
        path: of the file, for messages.
        data: its bytes.
        weights: of OpenVINO's ``.bin`` beside an ``.xml``; empty for other kinds, and where there is none.
        trusted: the caller vouches for it: nothing was checked.
        purpose: that its note says.
    """

    path: Path
    data: bytes
    weights: bytes
    trusted: bool
    purpose: Purpose = Purpose()


@dataclass(frozen=True)
class _Envelope:
    """How a kind of file holds the seal, or the note before it: fixed words around so many letters, at its end."""

    before: bytes
    after: bytes = b""
    length: int = _DIGITS

    @property
    def size(self) -> int:
        return len(self.before) + self.length + len(self.after)

    def around(self, text: str) -> bytes:
        """The words with the letters."""
        return self.before + text.ljust(self.length).encode() + self.after

    def inside(self, data: bytes) -> str | None:
        """The letters at the end of a file; None where the words are not there."""
        mark = data[-self.size :]
        if len(mark) < self.size or not (mark.startswith(self.before) and mark.endswith(self.after)):
            return None
        return mark[len(self.before) : len(self.before) + self.length].decode("ascii", "replace").rstrip()


def _announce_comment(data: bytes, size: int) -> bytes:
    """A zip archive whose last record says that a comment of this size follows."""
    if data[-_ZIP_END_SIZE:-18] != _ZIP_END:
        raise ExportError("torch.export wrote no plain zip archive, which cannot be sealed")
    return data[:-2] + size.to_bytes(2, "little")


def _property(name: bytes, length: int) -> bytes:
    """What comes before the letters in a ``metadata_props`` entry (field 14) of ONNX's ModelProto."""
    entry = b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([length])
    return b"\x72" + bytes([len(entry) + length]) + entry


_ENVELOPES: Mapping[str, _Envelope] = {
    ".pt2": _Envelope(b"revnets deploy, sha256 of the above: "),
    ".onnx": _Envelope(_property(b"revnets_deploy_sha256", _DIGITS)),
    ".xml": _Envelope(b"\n<!-- revnets deploy, sha256 of the above and the .bin: ", b" -->\n"),
}
_NOTES: Mapping[str, _Envelope] = {
    ".pt2": _Envelope(b"revnets deploy, chosen for: ", b"; ", _LETTERS),
    ".onnx": _Envelope(_property(b"revnets_deploy_chosen_for", _LETTERS), length=_LETTERS),
    ".xml": _Envelope(b"\n<!-- revnets deploy, chosen for: ", b" -->", _LETTERS),
}
SUFFIXES = tuple(_ENVELOPES)
"""Of deployed files."""


def seal(path: Path, purpose: Purpose | None = None) -> None:
    """Add the digest to a file that was just written.

    Args:
        path: of the file; one that is sealed already gets the new note.
        purpose: a note of it; None where the end of the name says it.

    Raises:
        ExportError: for a file that cannot take it, or a note that could not be read again.
    """
    envelope, data = _ENVELOPES[path.suffix], _unsealed(path.suffix, path.read_bytes())
    note = _note(path.suffix, purpose) if purpose is not None else b""
    if path.suffix == ".pt2":
        data = _announce_comment(data, len(note) + envelope.size)
    data += note
    path.write_bytes(data + envelope.around(_digest(data, _weights(path))))


def _note(suffix: str, purpose: Purpose) -> bytes:
    """The note in the words of a kind of file.

    Raises:
        ExportError: for one that could not be read again.
    """
    envelope = _NOTES[suffix]
    text = f"{purpose.engine} {purpose.precision}"
    note = envelope.around(text) if text.isascii() else b""
    if _words(envelope.inside(note)) != purpose:
        raise ExportError(
            f"a note of engine {shown(purpose.engine)} and precision {shown(purpose.precision)} does not fit: expected "
            f"a plain word each, of {_LETTERS - 1} letters together"
        )
    return note


def _words(note: str | None) -> Purpose:
    engine, _, precision = (note or "").partition(" ")
    return Purpose(engine, precision)


def _unsealed(suffix: str, data: bytes) -> bytes:
    for envelope in (_ENVELOPES[suffix], _NOTES[suffix]):
        data = data if envelope.inside(data) is None else data[: -envelope.size]
    return data


def _purpose(suffix: str, data: bytes) -> Purpose:
    """Of a sealed file."""
    envelope = _ENVELOPES.get(suffix)
    return _words(None if envelope is None else _NOTES[suffix].inside(data[: -envelope.size]))


def read(path: Path, trust: bool = False) -> Content:
    """A deployed file's bytes, all of them read once.

    Args:
        path: of the file.
        trust: take it as it is.

    Raises:
        Untrusted: without ``trust``, for a file that is not as ``deploy`` wrote it.
        ExportError: for one that cannot be read.
    """
    try:
        data, weights = _bytes(path), _weights(path)
    except OSError as error:
        raise ExportError(f"{str(path)!r} cannot be read ({error.strerror or error}): give another file") from error
    if not trust:
        problem = _problem(path.suffix, data, weights)
        if problem:
            raise Untrusted(refusal(path, problem))
    return Content(path, data, weights, trust, _purpose(path.suffix, data))


def refusal(path: Path, problem: str) -> str:
    """The sentence for a file that is not opened."""
    return (
        f"{str(path)!r} is not opened: {problem}, and such a file can run code; deploy the network again, or pass "
        "trust=True if you trust whoever made it"
    )


def _problem(suffix: str, data: bytes, weights: bytes) -> str:
    """Why a file is not as ``deploy`` wrote it; empty where it is."""
    envelope = _ENVELOPES.get(suffix)
    if envelope is None:
        return f"names of deployed files end in {', '.join(SUFFIXES)}"
    found = envelope.inside(data)
    if found is None:
        return "it has no seal of revnets deploy (a SHA-256 at its end; releases before it wrote none)"
    if found != _digest(data[: -envelope.size], weights):
        return "it was changed after revnets deploy wrote it (its SHA-256 is another)"
    return ""


def _digest(data: bytes, weights: bytes) -> str:
    found = hashlib.sha256(len(data).to_bytes(8, "little"))
    found.update(data)
    found.update(weights)
    return found.hexdigest()


def _weights(path: Path) -> bytes:
    """What lies beside an ``.xml``; nothing else is ever read besides the file itself."""
    beside = path.with_suffix(".bin")
    return _bytes(beside) if path.suffix == ".xml" and beside.exists() else b""


def _bytes(path: Path) -> bytes:
    """A plain file's bytes: a pipe or a device would block, or never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{str(path)!r} is no plain file")
        return file.read()
