"""Catalogues: names for files, faults with lines, fingerprints that are read once and never stale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fate_llm.core.canonical import digest_file, digest_folder
from fate_llm.core.errors import ConfigurationError, DataError
from fate_llm.runtime.trust import catalog as module
from fate_llm.runtime.trust.catalog import EMPTY_CATALOG, FingerprintCache, load_catalog, local_catalog
from fate_llm.runtime.trust.templates import CATALOG_TEMPLATE

TEXT = """\
version: 1
entries:
  loans: {path: data/loans.jsonl, kind: dataset, description: Loans., records: 2, format: jsonl}
  folder: {path: data, kind: dataset}
  base: {path: /models/base, kind: model}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "loans.jsonl").write_text("{}\n{}\n")
    (tmp_path / "catalog.yaml").write_text(TEXT)
    return tmp_path


def test_relative_paths_start_at_the_catalogue(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    found = load_catalog(home / "catalog.yaml")
    loans = str(home / "data" / "loans.jsonl")
    assert found.paths() == {"loans": loans, "folder": str(home / "data"), "base": "/models/base"}
    assert found.path("catalog:loans") == Path(loans)
    assert (found.entry("loans").records, found.entry("loans").format) == (2, "jsonl")


def test_a_name_that_is_not_there_is_answered_with_the_nearest(home: Path) -> None:
    found = load_catalog(home / "catalog.yaml")
    with pytest.raises(DataError, match=r"catalog.yaml has no 'loan'") as caught:
        found.path("loan")
    assert caught.value.hint == "did you mean 'loans'?"
    with pytest.raises(DataError) as caught:
        EMPTY_CATALOG.entry("loans")
    assert "empty" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("version: 1\nentries:\n  Loans: {path: x, kind: dataset}\n", 3, "not a valid id"),
        ("version: 1\nentries:\n  a: {path: x}\n", 3, "'kind' is required"),
        ("version: 1\nentries:\n  a: {path: '', kind: dataset}\n", 3, "path"),
        ("version: 1\nentries:\n  a: {path: x, kind: data}\n", 3, "dataset"),
        ("version: 1\nentries:\n  a: {path: x, kind: model, record: 5}\n", 3, "did you mean 'records'"),
        ("version: 1\nentries:\n  a: {path: x, kind: model}\n  a: {path: y, kind: model}\n", 4, "duplicate_key"),
        ("entries: {}\n", 1, "'version' is required"),
        ("version: 1\nloans: {path: x, kind: model}\n", 2, "unknown key"),
    ],
)
def test_a_fault_is_named_with_its_line(text: str, line: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "catalog.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_catalog(path)
    assert f"catalog.yaml:{line}: " in caught.value.message and said in caught.value.message


def test_the_template_is_an_empty_catalogue_and_its_examples_work(tmp_path: Path) -> None:
    path = tmp_path / "catalog.yaml"
    path.write_text(CATALOG_TEMPLATE)
    assert load_catalog(path).entries == {}
    examples = [line[1:] for line in CATALOG_TEMPLATE.splitlines() if line.startswith("#  ") and "{" in line]
    path.write_text("version: 1\nentries:\n" + "\n".join(examples))
    assert set(load_catalog(path).entries) == {"loans-2025", "base-model"}


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_what_lies_there_now(home: Path) -> None:
    found = load_catalog(home / "catalog.yaml")
    file = home / "data" / "loans.jsonl"
    one = found.fingerprint("catalog:loans")
    assert (one.name, one.digest, one.files, one.size, one.records) == ("loans", digest_file(file), 1, 6, 2)
    assert one.as_dict()["records"] == 2 and "records" not in found.fingerprint("folder").as_dict()
    assert found.fingerprint("folder").digest == digest_folder(home / "data")
    file.write_text("{}\n{} \n")
    assert found.fingerprint("loans").digest == digest_file(file) != one.digest


def test_what_has_not_changed_is_read_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cache_file = load_catalog(home / "catalog.yaml"), home / "cache.json"
    reads: list[Path] = []

    def counted(path: Path) -> str:
        reads.append(path)
        return digest_folder(path)

    monkeypatch.setattr(module, "digest_folder", counted)
    # Given a fingerprint that was taken, When another process asks again, Then nothing is read
    one = found.fingerprint("folder", FingerprintCache(cache_file))
    assert found.fingerprint("folder", FingerprintCache(cache_file)) == one and len(reads) == 1
    # When a file has another content of the same size, or there is one more, Then it is read again
    file = home / "data" / "loans.jsonl"
    file.write_text("[]\n[]\n")
    os.utime(file, ns=(0, 1))
    assert (
        found.fingerprint("folder", FingerprintCache(cache_file)).digest == digest_folder(home / "data") != one.digest
    )
    (home / "data" / "more").write_text("")
    assert found.fingerprint("folder", FingerprintCache(cache_file)).files == 2
    assert len(reads) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 5}', '{"a": ["x"]}', '{"a": [1, 2]}', "\udcff"])
def test_a_damaged_cache_only_costs_reading(content: str, home: Path) -> None:
    path = home / "cache.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    cache = FingerprintCache(path)
    assert load_catalog(home / "catalog.yaml").fingerprint("loans", cache).files == 1
    assert cache.get(home / "data" / "loans.jsonl", "another stamp") is None


def test_data_that_changes_while_it_is_read_has_no_fingerprint(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "data" / "loans.jsonl"

    def slow(path: Path) -> str:
        with file.open("a") as stream:
            stream.write("{}\n")
        return digest_folder(path)

    monkeypatch.setattr(module, "digest_folder", slow)
    cache = FingerprintCache(home / "cache.json")
    with pytest.raises(DataError, match="catalog:loans changes"):
        load_catalog(home / "catalog.yaml").fingerprint("loans", cache)
    assert not (home / "cache.json").exists()


def test_an_error_names_the_entry_and_not_its_place(home: Path) -> None:
    found = load_catalog(home / "catalog.yaml")
    with pytest.raises(DataError) as caught:
        found.fingerprint("base")
    assert "catalog:base" in caught.value.message and "/models" not in caught.value.message
    (home / "data" / "loans.jsonl").unlink()
    with pytest.raises(DataError, match="catalog:folder cannot be read: there is no file"):
        found.fingerprint("folder")


# --- local runs ----------------------------------------------------------------------------------------------------


def test_parties_on_one_machine_have_their_own_or_a_common_one(home: Path) -> None:
    (home / "catalog.bank-b.yaml").write_text("version: 1\nentries: {loans: {path: b.jsonl, kind: dataset}}\n")
    assert local_catalog(home, "bank-a").paths()["loans"].endswith("data/loans.jsonl")
    assert local_catalog(home, "bank-b").paths() == {"loans": str(home / "b.jsonl")}
    assert local_catalog(home / "data", "bank-a").paths() == {}
