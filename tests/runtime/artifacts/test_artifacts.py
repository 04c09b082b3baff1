"""Artifacts by content: what is put comes back bit for bit, or not at all and with a name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.canonical import canonical_json, digest, digest_file, digest_folder
from fate_llm.core.errors import ConfigurationError, DataError, MissingExtra, StoreLost
from fate_llm.core.values import ArtifactKind
from fate_llm.runtime.artifacts import files, store
from fate_llm.runtime.artifacts.store import ArtifactRef, ArtifactStore, Freed, StoredFile
from tests.runtime.artifacts.conftest import MakeFolder, everything_in

FILES = {"a.txt": "same", "b/c.txt": "same", "b/d e.bin": "other", "é.json": "", "b/.hidden": "x"}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def overwrite(place: str, name: str, content: bytes) -> None:
    """Change a file behind the store's back."""
    system, root = fsspec.url_to_fs(place)
    assert system.exists(f"{root}/{name}")
    system.pipe_file(f"{root}/{name}", content)


def object_of(text: str) -> str:
    name = hashlib.sha256(text.encode()).hexdigest()
    return f"objects/{name[:2]}/{name}"


# --- in and out --------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(**FILES)
    (folder / "empty").mkdir()  # is no content
    ref = ArtifactStore(place).put(folder, kind=ArtifactKind.REPORT)
    assert ref == ArtifactRef(digest_folder(folder), "report", 14, 5)
    again = ArtifactStore(place)
    assert again.ref(ref.digest) == ref == again.verify(ref.digest)
    assert again.digests() == [ref.digest]
    assert again.get(ref.digest, tmp_path / "deep" / "copy") == ref
    assert contents(tmp_path / "deep" / "copy") == contents(folder)
    assert digest_folder(tmp_path / "deep" / "copy") == ref.digest
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["copy"]


def test_a_single_file_comes_back_as_a_file(artifacts: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_bytes(b'{"loss": 1}')
    ref = artifacts.put(tmp_path / "metrics.json", kind="metrics")
    assert ref == ArtifactRef(digest_file(tmp_path / "metrics.json"), "metrics", 11, 1)
    artifacts.get(ref.digest, tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == b'{"loss": 1}'
    assert artifacts.read(ref.digest) == b'{"loss": 1}'
    assert artifacts.contents(ref.digest) == {"": StoredFile(ref.digest, 11)}


@pytest.mark.parametrize("size", [0, 1, files.BLOCK - 1, files.BLOCK, files.BLOCK + 1, 2 * files.BLOCK])
def test_sizes_around_a_block(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    artifacts = ArtifactStore(tmp_path / "artifacts")
    ref = artifacts.put(tmp_path / "f", kind="metrics")
    assert b"".join(artifacts.open(ref.digest)) == content
    artifacts.get(ref.digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.dictionaries(st.text("ab%?#*[ é'\\\n", min_size=1, max_size=4), st.binary(max_size=9), max_size=5))
def test_any_names_and_contents(found: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("any")
    (base / "out").mkdir()
    for name, content in found.items():
        (base / "out" / name).write_bytes(content)
    artifacts = ArtifactStore(base / "artifacts")
    ref = artifacts.put(base / "out", kind="report")
    assert ref.digest == digest_folder(base / "out")
    artifacts.get(ref.digest, base / "copy")
    assert contents(base / "copy") == found
    assert {name: artifacts.read(ref.digest, name) for name in found} == found


def test_contents_are_stored_once(place: str, make_folder: MakeFolder) -> None:
    artifacts = ArtifactStore(place)
    first = artifacts.put(make_folder("one", **FILES), kind="report")
    before = everything_in(place)
    assert len([name for name in before if "/objects/" in name]) == 4  # two of the five files are the same
    assert artifacts.put(make_folder("two", **FILES), kind="report") == first
    assert everything_in(place) == before
    artifacts.put(make_folder("three", new="same"), kind="report")
    assert len(everything_in(place)) == len(before) + 1  # a manifest
    assert not [name for name in everything_in(place) if "/partial/" in name]


def test_one_file_of_many_can_be_read(artifacts: ArtifactStore, make_folder: MakeFolder) -> None:
    ref = artifacts.put(make_folder(**FILES), kind="report")
    assert artifacts.read(ref.digest, "b/c.txt") == b"same"
    with pytest.raises(DataError, match=r"has no file 'b/c\.tx'") as error:
        artifacts.read(ref.digest, "b/c.tx")
    assert "b/c.txt" in error.value.hint
    with pytest.raises(DataError, match="has 5 bytes, at most 4"):
        artifacts.read(ref.digest, "b/d e.bin", most=4)


@pytest.mark.parametrize("name", ["", "x", "../" * 20 + "etc", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n"])
def test_what_is_no_digest_is_never_a_path(artifacts: ArtifactStore, tmp_path: Path, name: str) -> None:
    for ask in (artifacts.ref, artifacts.verify, artifacts.contents, lambda n: artifacts.get(n, tmp_path / "copy")):
        with pytest.raises(DataError, match="is no digest"):
            ask(name)


def test_an_artifact_that_is_not_there(artifacts: ArtifactStore, tmp_path: Path) -> None:
    assert artifacts.ref("0" * 64) is None
    assert artifacts.digests() == []
    with pytest.raises(DataError, match=f"no artifact {'0' * 64}"):
        artifacts.get("0" * 64, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# --- what cannot be put ------------------------------------------------------------------------------------------


def test_links_and_pipes_are_no_content(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    artifacts = ArtifactStore(place)
    (tmp_path / "secret").write_text("secret")
    for at, make in enumerate(
        (
            lambda p: p.symlink_to(tmp_path / "secret"),
            lambda p: p.symlink_to(tmp_path),
            lambda p: p.symlink_to("nowhere"),
            os.mkfifo,
        )
    ):
        folder = make_folder(f"f{at}", fine="fine")
        make(folder / "odd")
        with pytest.raises(DataError, match="odd is a link or no file"):
            artifacts.put(folder, kind="report")
    (tmp_path / "link").symlink_to(tmp_path / "f0")
    with pytest.raises(DataError, match="link is a link"):
        artifacts.put(tmp_path / "link", kind="report")
    with pytest.raises(DataError, match="does not exist"):
        artifacts.put(tmp_path / "nothing", kind="report")
    assert not any("secret" in str(content) for content in everything_in(place).values())
    assert artifacts.digests() == []


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"\xff")).write_text("x")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(DataError, match="not UTF-8"):
        ArtifactStore(tmp_path / "artifacts").put(folder, kind="report")


def test_a_file_that_changes_meanwhile(place: str, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(**FILES)
    artifacts = ArtifactStore(place)
    monkeypatch.setattr(store, "digest_file", lambda path: "0" * 64)
    with pytest.raises(DataError, match="changed while it was being stored"):
        artifacts.put(folder, kind="report")
    assert everything_in(place) == {}


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"sam", b"samf", b"same+", b"", b"x" * 3_000_000])
def test_a_damaged_object_is_named_and_nothing_of_it_is_used(
    place: str, make_folder: MakeFolder, tmp_path: Path, content: bytes
) -> None:
    artifacts, folder = ArtifactStore(place), make_folder(**FILES)
    ref = artifacts.put(folder, kind="report")
    overwrite(place, object_of("same"), content)
    with pytest.raises(DataError, match=r"object [0-9a-f]{64} \(a\.txt of artifact .* is damaged"):
        artifacts.get(ref.digest, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("artifacts", "out")) == []
    with pytest.raises(DataError) as error:
        artifacts.verify(ref.digest)
    assert error.value.message.count("is damaged") == 2  # both files that have it
    with pytest.raises(DataError):
        artifacts.read(ref.digest, "a.txt")
    assert artifacts.read(ref.digest, "b/d e.bin") == b"other"
    # Putting it again mends it.
    assert artifacts.put(folder, kind="report") == ref == artifacts.verify(ref.digest)


def test_the_last_block_of_a_damaged_file_is_never_given(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a" * files.BLOCK + b"b" * files.BLOCK)
    artifacts = ArtifactStore(tmp_path / "artifacts")
    ref = artifacts.put(tmp_path / "f", kind="report")
    (path,) = (tmp_path / "artifacts" / "objects").rglob(ref.digest)
    path.write_bytes(b"a" * files.BLOCK + b"c" * files.BLOCK)
    given_out = []
    with pytest.raises(DataError, match="damaged"):
        given_out.extend(artifacts.open(ref.digest))
    assert given_out == [b"a" * files.BLOCK]


def test_a_missing_object_is_named(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    artifacts = ArtifactStore(place)
    ref = artifacts.put(make_folder(**FILES), kind="report")
    system, root = fsspec.url_to_fs(place)
    system.rm_file(f"{root}/{object_of('other')}")
    with pytest.raises(DataError, match=r"\(b/d e\.bin of artifact .* is missing"):
        artifacts.get(ref.digest, tmp_path / "copy")
    with pytest.raises(DataError, match="is missing"):
        artifacts.verify(ref.digest)


# --- hostile manifests -------------------------------------------------------------------------------------------


def plant(place: str, **manifest: Any) -> str:
    """A manifest whose digest is right, as somebody who can write to the bucket would make it."""
    there = ArtifactStore(place)
    content = manifest["files"]
    entries = {name: file["digest"] for name, file in content.items()} if isinstance(content, dict) else {}
    name = digest(entries) if manifest.get("folder") is True else next(iter(entries.values()), "0" * 64)
    system, root = fsspec.url_to_fs(place)
    system.makedirs(f"{root}/manifests", exist_ok=True)
    system.pipe_file(f"{root}/manifests/{name}.json", canonical_json({"format": 1, "kind": "model", **manifest}))
    assert there.digests()
    return name


EVIL = [
    "../evil",
    "a/../../evil",
    "a/..",
    "..",
    ".",
    "",
    "a//b",
    "a/",
    "./a",
    "a/./b",
    "nul\0",
]


def test_no_manifest_writes_outside_its_target(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    ref = ArtifactStore(place).put(make_folder(good="evil content"), kind="model")
    file = ArtifactStore(place).contents(ref.digest)["good"]
    for name in (*EVIL, f"{tmp_path}/evil"):
        evil = plant(place, folder=True, files={name: {"digest": file.digest, "bytes": file.bytes}})
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(DataError, match=r"manifest of artifact .* is damaged"):
            ArtifactStore(place).get(evil, tmp_path / "copy")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert not (tmp_path / "copy").exists()
    fine = plant(place, folder=True, files={"..fine": {"digest": file.digest, "bytes": file.bytes}})
    ArtifactStore(place).get(fine, tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"..fine": b"evil content"}


def test_a_manifest_that_lies_about_a_size(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    ref = ArtifactStore(place).put(make_folder(good="content"), kind="model")
    file = ArtifactStore(place).contents(ref.digest)["good"]
    for size in (0, 6, 8, 2**62):
        lie = plant(place, folder=True, files={"good": {"digest": file.digest, "bytes": size}})
        with pytest.raises(DataError, match="is damaged"):
            ArtifactStore(place).get(lie, tmp_path / "copy")


def test_a_file_that_is_a_folder_too(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    ref = ArtifactStore(place).put(make_folder(good="content"), kind="model")
    file = ArtifactStore(place).contents(ref.digest)["good"]
    entry = {"digest": file.digest, "bytes": file.bytes}
    both = plant(place, folder=True, files={"a": entry, "a/b": entry})
    with pytest.raises(ConfigurationError, match="cannot be written"):
        ArtifactStore(place).get(both, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("artifacts", "out")) == []


NO_MANIFESTS: list[dict[str, Any]] = [
    {"folder": True, "files": {"a": {"digest": "../../x", "bytes": 1}}},
    {"folder": True, "files": {"a": {"digest": "0" * 64, "bytes": -1}}},
    {"folder": True, "files": {"a": {"digest": "0" * 64, "bytes": True}}},
    {"folder": True, "files": {"a": {"digest": "0" * 64, "bytes": 1.5}}},
    {"folder": "yes", "files": {"": {"digest": "0" * 64, "bytes": 1}}},
    {"folder": False, "files": {"a": {"digest": "0" * 64, "bytes": 1}}},
    {"folder": True, "files": {"a": {"digest": "0" * 64, "bytes": 1}}, "format": 2},
    {"folder": True, "files": {}, "kind": 3},
]


def test_a_manifest_that_is_none(place: str, tmp_path: Path) -> None:
    for manifest in NO_MANIFESTS:
        name = plant(place, **manifest)
        with pytest.raises(DataError, match="manifest of artifact"):
            ArtifactStore(place).get(name, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_bytes_that_are_no_manifest(place: str, make_folder: MakeFolder) -> None:
    artifacts, folder = ArtifactStore(place), make_folder(**FILES)
    ref = artifacts.put(folder, kind="model")
    for content in (b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"files": []}'):
        overwrite(place, f"manifests/{ref.digest}.json", content)
        with pytest.raises(DataError, match=f"the manifest of artifact {ref.digest}"):
            artifacts.ref(ref.digest)
        with pytest.raises(DataError):
            artifacts.gc([ref.digest])  # which objects it needs is not known: nothing goes
    assert artifacts.put(folder, kind="model") == ref == artifacts.verify(ref.digest)


def test_a_changed_manifest_is_not_the_artifact(place: str, make_folder: MakeFolder) -> None:
    artifacts = ArtifactStore(place)
    ref = artifacts.put(make_folder(**FILES), kind="model")
    manifest = json.loads(everything_in(place)[f"/manifests/{ref.digest}.json"])
    del manifest["files"]["a.txt"]
    overwrite(place, f"manifests/{ref.digest}.json", canonical_json(manifest))
    with pytest.raises(DataError, match="damaged"):
        artifacts.contents(ref.digest)


# --- targets -----------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(artifacts: ArtifactStore, make_folder: MakeFolder, tmp_path: Path) -> None:
    ref = artifacts.put(make_folder(**FILES), kind="report")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "full", "link"):
        with pytest.raises(ConfigurationError, match="exists, and is not overwritten"):
            artifacts.get(ref.digest, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "empty").mkdir()
    artifacts.get(ref.digest, tmp_path / "empty")
    assert len(contents(tmp_path / "empty")) == 5
    with pytest.raises(ConfigurationError, match="cannot be written"):
        artifacts.get(ref.digest, tmp_path / "file" / "below")


def test_a_target_may_be_given_in_any_way(
    artifacts: ArtifactStore, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = artifacts.put(make_folder(**FILES), kind="report")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    artifacts.get(ref.digest, Path("../there/../there"))
    assert len(contents(tmp_path / "there")) == 5
    artifacts.get(ref.digest, Path())  # the empty folder we are in
    assert len(contents(tmp_path / "here")) == 5


# --- crashes and garbage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(6))
def test_a_crash_at_any_write_leaves_no_half_artifact(
    step: int, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, folder = ArtifactStore(tmp_path / "artifacts"), make_folder(**FILES)
    done = 0
    real = os.replace

    def dies(source: Any, target: Any) -> None:
        nonlocal done
        if done == step:
            raise OSError(errno.EIO, "power cut")
        done += 1
        real(source, target)

    monkeypatch.setattr(os, "replace", dies)
    if step < 5:  # four objects and a manifest
        with pytest.raises(StoreLost, match="power cut"):
            artifacts.put(folder, kind="report")
        assert artifacts.digests() == []
    else:
        artifacts.put(folder, kind="report")
    monkeypatch.setattr(os, "replace", real)
    again = ArtifactStore(tmp_path / "artifacts")
    assert again.verify(again.put(folder, kind="report").digest).files == 5
    assert not list((tmp_path / "artifacts" / "partial").iterdir())


def test_a_full_disk(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = ArtifactStore(tmp_path / "artifacts")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreLost, match="No space left") as error:
        artifacts.put(make_folder(**FILES), kind="report")
    assert "artifacts in" in error.value.message
    assert everything_in(str(tmp_path / "artifacts")) == {}


def test_what_nobody_needs_is_removed_and_all_else_stays(place: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    artifacts = ArtifactStore(place)
    kept = artifacts.put(make_folder("kept", a="shared", b="kept"), kind="model")
    gone = artifacts.put(make_folder("gone", a="shared", b="gone!"), kind="model")
    system, root = fsspec.url_to_fs(place)
    system.makedirs(f"{root}/partial", exist_ok=True)
    system.pipe_file(f"{root}/partial/left-by-a-crash", b"x")
    assert artifacts.gc([kept.digest, "0" * 64]) == Freed(1, 1, 5)
    assert artifacts.digests() == [kept.digest]
    assert artifacts.ref(gone.digest) is None
    assert artifacts.verify(kept.digest) == kept
    assert len(everything_in(place)) == 3
    assert artifacts.gc([kept.digest]) == Freed(0, 0, 0)
    assert artifacts.gc([]) == Freed(1, 2, 10)
    assert everything_in(place) == {}


def test_collecting_and_storing_at_once(tmp_path: Path, make_folder: MakeFolder, together: Any) -> None:
    artifacts = ArtifactStore(tmp_path / "artifacts")
    folders = [make_folder(f"f{at}", a="shared by all", b=f"own {at}") for at in range(8)]
    keep = {digest_folder(folder) for folder in folders}

    def collect() -> None:
        for _ in range(20):
            artifacts.gc(keep)

    calls = {f"p{at}": lambda at=at: artifacts.put(folders[at], kind="model") for at in range(8)}
    ends = together({**calls, "gc": collect})
    assert not [end for end in ends.values() if isinstance(end, Exception)]
    assert {artifacts.verify(name).digest for name in artifacts.digests()} == keep


# --- places ------------------------------------------------------------------------------------------------------


def test_a_place_on_disk_is_for_its_owner_only(tmp_path: Path) -> None:
    ArtifactStore(tmp_path / "state" / "artifacts")
    assert stat.S_IMODE((tmp_path / "state" / "artifacts").stat().st_mode) == 0o700


def test_a_place_that_needs_a_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(files, "url_to_fs", without)
    with pytest.raises(MissingExtra, match=r"artifacts in s3:// need .*s3fs"):
        ArtifactStore("s3://bucket/folder")


def test_a_place_that_nobody_knows() -> None:
    with pytest.raises(ConfigurationError, match="cannot be in nosuch://") as error:
        ArtifactStore("nosuch://x")
    assert "file" in error.value.hint and "memory" in error.value.hint
    with pytest.raises(ConfigurationError, match=r"holds one of \* \? \["):
        ArtifactStore("memory://odd[1]")


def test_a_place_that_cannot_be_made_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "artifacts", tmp_path / "file"):
        with pytest.raises(StoreLost, match="cannot be used"):
            ArtifactStore(place)


def test_a_password_in_a_url_is_not_shown() -> None:
    assert files._without_password("sftp://me:secret@host/x") == "sftp://***@host/x"
    assert files._without_password("/a@b/c") == "/a@b/c"
