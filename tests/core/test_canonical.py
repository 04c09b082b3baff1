"""One byte form, one digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fate_llm.core.canonical import canonical_json, digest, digest_file, digest_folder


def test_the_order_of_keys_and_spaces_does_not_matter() -> None:
    assert canonical_json({"b": [1, 2], "a": "ä"}) == '{"a":"ä","b":[1,2]}'.encode()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest([]) == hashlib.sha256(b"[]").hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": -float("inf")}, "\ud800"])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_json(value)


def test_a_file_and_a_folder_of_one(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert digest_file(file) == hashlib.sha256(b"abc").hexdigest() == digest_folder(file)


def test_the_digest_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return digest_folder(tmp_path / name)

    base = made("one", {"a": "1", "sub/b": "2"})
    assert made("same", {"sub/b": "2", "a": "1"}) == base
    assert made("renamed", {"a": "1", "sub/c": "2"}) != base
    assert made("swapped", {"a": "2", "sub/b": "1"}) != base
    assert made("flat", {"a": "1", "b": "2"}) != base
