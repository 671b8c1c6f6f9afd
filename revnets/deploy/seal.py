"""What ``deploy`` writes into a file so that ``load`` knows it again: the SHA-256 of all that comes before, at its end.

Every format leaves room at the end: the comment of a zip archive (``.pt2``), a further property of the model
(``.onnx``), an XML comment (``.xml``, which also covers its ``.bin``). So the seal moves with the file, and needs none
beside it. It shows that a file was written by ``revnets deploy`` and is as it was; it does not show by whom: what could
run code is looked for besides (``checks``).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .graph import ExportError

_DIGITS = 64
_ZIP_END, _ZIP_END_SIZE = b"PK\x05\x06", 22  # of its last record, without a comment


class Untrusted(ExportError):
    """A file that ``revnets deploy`` did not write, or that was changed since."""


@dataclass(frozen=True)
class Content:
    """A deployed file, read once: what is checked is what is opened.

    Attributes:
        path: of the file, for messages.
        data: its bytes.
        weights: of OpenVINO's ``.bin`` beside an ``.xml``; empty for other kinds, and where there is none.
        trusted: the caller vouches for it: nothing was checked.
    """

    path: Path
    data: bytes
    weights: bytes
    trusted: bool


@dataclass(frozen=True)
class _Envelope:
    """How a kind of file holds the seal: fixed words around the digest, the last thing in the file."""

    before: bytes
    after: bytes = b""
    prepare: Callable[[bytes], bytes] = bytes  # the content, so that something may follow it

    @property
    def size(self) -> int:
        return len(self.before) + _DIGITS + len(self.after)


def _announce_comment(data: bytes) -> bytes:
    """A zip archive whose last record says that a comment of the seal's size follows."""
    if data[-_ZIP_END_SIZE:-18] != _ZIP_END:
        raise ExportError("torch.export wrote no plain zip archive, which cannot be sealed")
    return data[:-2] + _ENVELOPES[".pt2"].size.to_bytes(2, "little")


def _property(name: bytes) -> bytes:
    """What comes before the digest in a ``metadata_props`` entry (field 14) of ONNX's ModelProto."""
    entry = b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([_DIGITS])
    return b"\x72" + bytes([len(entry) + _DIGITS]) + entry


_ENVELOPES: Mapping[str, _Envelope] = {
    ".pt2": _Envelope(b"revnets deploy, sha256 of the above: ", prepare=_announce_comment),
    ".onnx": _Envelope(_property(b"revnets_deploy_sha256")),
    ".xml": _Envelope(b"\n<!-- revnets deploy, sha256 of the above and the .bin: ", b" -->\n"),
}
SUFFIXES = tuple(_ENVELOPES)
"""Of deployed files."""


def seal(path: Path) -> None:
    """Add the digest to a file that was just written.

    Raises:
        ExportError: for a file that cannot take it.
    """
    envelope = _ENVELOPES[path.suffix]
    data = envelope.prepare(path.read_bytes())
    mark = envelope.before + _digest(data, _weights(path)).encode() + envelope.after
    path.write_bytes(data + mark)


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
    return Content(path, data, weights, trust)


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
    body, mark = data[: -envelope.size], data[-envelope.size :]
    if not (mark.startswith(envelope.before) and mark.endswith(envelope.after)):
        return "it has no seal of revnets deploy (a SHA-256 at its end; releases before it wrote none)"
    found = mark[len(envelope.before) : len(envelope.before) + _DIGITS]
    if found != _digest(body, weights).encode():
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
