"""Planted secrets, looked for in every file that a party leaves: prompts, keys, gradients, however they are spelled.

A canary is found whole or in part (31 bytes of it in a row are enough, a whole one when it is shorter), as it is, in
hexadecimal, base64, JSON, Python, HTML or URL spelling, as UTF-16, in lists of numbers, as tensors of another float
type, and inside zstd, gzip and zip. What is encrypted, hashed or rounded to few digits is not found, nor meant.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import ml_dtypes
import numpy as np
import numpy.typing as npt
import zstandard

__all__ = ["Found", "find_canaries", "floats"]

PIECE = 16  # bytes or letters in a row
_NUMBERS = 64  # values of a tensor that are looked for as text
_ZSTD, _GZIP, _ZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"PK\x03\x04"
_LARGEST = 64 * 1024 * 1024  # bytes of what is unpacked


@dataclass(frozen=True, slots=True)
class Found:
    """A canary where it should not be. path: relative. spelling: how it was written there."""

    path: str
    canary: str
    spelling: str


def floats(array: npt.NDArray[np.float32]) -> bytes:
    """A tensor as a canary: little-endian float32."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes()


def find_canaries(folder: Path, canaries: Mapping[str, bytes], *, skip: Collection[str] = ()) -> list[Found]:
    """Every canary in every file below `folder`, once for each file and spelling.

    skip: patterns of relative paths that may hold them, such as a task's outputs ("parties/*/train/**").
    """
    assert canaries, "no canaries: the test looks for nothing"
    wanted = {name: spellings(secret) for name, secret in canaries.items()}
    found: list[Found] = []
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    assert files, f"no files in {folder}: the test looks at the wrong place"
    for path in files:
        place = path.relative_to(folder)
        if _skipped(place, skip):
            continue
        contents = [("", place.as_posix().encode()), *_contents(path.read_bytes() if path.is_file() else b"")]
        for name, spelled in wanted.items():
            kinds = {
                f"{inside}{kind}"
                for inside, content in contents
                for kind, pieces in spelled.items()
                if any(piece in content for piece in pieces)
            }
            found += [Found(place.as_posix(), name, kind) for kind in sorted(kinds)]
    return found


def _skipped(place: Path, skip: Collection[str]) -> bool:
    """Whether a pattern covers the path; `**` at its end covers everything below."""
    for pattern in skip:
        if pattern.endswith("/**"):
            depth = len(Path(pattern).parts) - 1
            if len(place.parts) > depth and Path(*place.parts[:depth]).match(pattern.removesuffix("/**")):
                return True
        elif place.match(pattern):
            return True
    return False


def _contents(content: bytes, depth: int = 3) -> Iterator[tuple[str, bytes]]:
    """The bytes of a file, and of what is packed in it."""
    yield "", content
    if depth == 0:
        return
    for name, magic, unpack in (("zstd", _ZSTD, _unzstd), ("gzip", _GZIP, _gunzip), ("zip", _ZIP, _unzip)):
        start = content.find(magic)
        while start >= 0:
            for inner in unpack(content[start:]):
                for inside, each in _contents(inner, depth - 1):
                    yield f"{name}/{inside}", each
            start = -1 if name == "zip" else content.find(magic, start + 1)


def _unzstd(content: bytes) -> Iterator[bytes]:
    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as stream:
            yield stream.read(_LARGEST)
    except zstandard.ZstdError:
        return


def _gunzip(content: bytes) -> Iterator[bytes]:
    try:
        yield zlib.decompressobj(31).decompress(content, _LARGEST)
    except zlib.error:
        return


def _unzip(content: bytes) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield name.encode()
                with archive.open(name) as stream:
                    yield stream.read(_LARGEST)
    except (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError, RuntimeError):
        return


def spellings(secret: bytes) -> dict[str, set[bytes]]:
    """By spelling: what to look for. Each run of 31 bytes of the secret has one of them whole."""
    assert len(secret) >= 8, "a canary of fewer than 8 bytes is found anywhere"
    pieces = [secret[at : at + PIECE] for at in range(0, max(1, len(secret) - PIECE + 1), PIECE)]
    found: dict[str, set[bytes]] = {"raw": set(pieces)}
    found["hex"] = {spelled for piece in pieces for spelled in (piece.hex().encode(), piece.hex().upper().encode())}
    found["base64"] = {spelled for piece in pieces for spelled in _base64(piece)}
    found["numbers"] = {sep.join(map(str, piece)).encode() for piece in pieces for sep in (", ", ",", " ", "\n")}
    found["repr"] = {repr(piece)[2:-1].encode() for piece in pieces}
    try:
        text = secret.decode("utf-8")
    except UnicodeDecodeError:
        found.update(_tensors(secret))
    else:
        found.update(_texts(text))
    # A spelling that is the same as an earlier one is none of its own.
    known: set[bytes] = set()
    for kind in list(found):
        found[kind] -= known
        known |= found[kind]
    return {kind: pieces for kind, pieces in found.items() if pieces}


def _base64(piece: bytes) -> Iterator[bytes]:
    """The letters that this piece decides, wherever in groups of three it begins."""
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + piece)
        inner = whole[(8 * shift + 5) // 6 : 8 * (shift + len(piece)) // 6]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")


def _texts(text: str) -> dict[str, set[bytes]]:
    pieces = [text[at : at + PIECE] for at in range(0, max(1, len(text) - PIECE + 1), PIECE)]
    return {
        "text": {piece.encode() for piece in pieces},
        "json": {spelled.encode() for piece in pieces for spelled in _json(piece)},
        "repr": {repr(piece)[1:-1].encode() for piece in pieces} | {ascii(piece)[1:-1].encode() for piece in pieces},
        "html": {html.escape(piece).encode() for piece in pieces},
        "url": {quote(piece, safe=safe).encode() for piece in pieces for safe in ("", "/")},
        "utf-16": {piece.encode(code) for piece in pieces for code in ("utf-16-le", "utf-16-be")},
    }


def _json(piece: str) -> Iterator[str]:
    """In a text of JSON, and in a text of JSON that is a text in JSON itself."""
    for as_ascii in (True, False):
        once = json.dumps(piece, ensure_ascii=as_ascii)[1:-1]
        yield once
        yield from (json.dumps(once, ensure_ascii=outer)[1:-1] for outer in (True, False))


def _tensors(secret: bytes) -> dict[str, set[bytes]]:
    """A tensor of float32 in other types, and its values as text."""
    if len(secret) % 4 or len(secret) < PIECE:
        return {}
    values = np.frombuffer(secret, "<f4")
    if not np.isfinite(values).all() or np.abs(values).max() > 6e4:
        return {}
    found: dict[str, set[bytes]] = {}
    types = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float64": np.dtype("<f8")}
    for name, dtype in types.items():
        step = PIECE // min(dtype.itemsize, 4)
        runs = [values[at : at + step] for at in range(0, max(1, len(values) - step + 1), step)]
        found[name] = {run.astype(dtype).tobytes() for run in runs}
    some = [value for value in values[:_NUMBERS] if value != 0 and math.isfinite(value)]
    precise = [value for value in some if len(f"{value:.9e}".partition("e")[0].strip("-0.").replace(".", "")) >= 7]
    spelled = {text for value in precise for text in (repr(float(value)), str(np.float32(value)), f"{value:.8g}")}
    found["decimal"] = {text.encode() for text in spelled if sum(sign.isdigit() for sign in text) >= 8}
    return found
