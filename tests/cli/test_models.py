"""`models`: what the registry of a party holds, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import ModelError
from fate_llm.runtime.artifacts import models as registry_module
from fate_llm.runtime.artifacts.home import open_stores
from fate_llm.runtime.artifacts.models import DataFingerprint, ModelRegistry
from tests.cli.conftest import Run, document, only_error, python
from tests.runtime.artifacts.homes import make_home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A party with loans@1, loans@2 and cards@1, in the environment's FATE_LLM_HOME."""
    home = make_home(tmp_path / "home")
    stores = open_stores(home, now=lambda: 1.0, create=True)
    for at, name in enumerate(("loans", "loans", "cards")):
        folder = tmp_path / f"trained-{at}"
        folder.mkdir()
        about = {"format": 1, "kind": "adapter", "base": {"hub": "acme/tiny"}}
        (folder / "fate_model.json").write_text(json.dumps(about))
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(f"weights {at}")
        stores.models.register(
            folder,
            name=name,
            job=f"job-{at}",
            task="train",
            party="bank-a",
            created=1_700_000_000.0 + at,
            parties=["bank-a", "bank-b"],
            data=[DataFingerprint(name="loans-2025", digest="1" * 64, records=7)],
            metrics={"loss": 0.25, "rounds": [{"loss": 1}]},
        )
    stores.close()
    monkeypatch.setenv("FATE_LLM_HOME", str(home))
    return home


def test_the_list_is_newest_first(run: Run, home: Path) -> None:
    lines = run("models", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "cards@1", "loans@2", "loans@1"]
    assert lines[2].split()[1:4] == ["adapter", "2023-11-14", "22:13Z"]
    assert lines[1].endswith("job-2  bank-a,bank-b")
    found = document(run("models", "list", "--json"))
    assert [(one["name"], one["version"], one["job"]) for one in found] == [
        ("cards", 1, "job-2"),
        ("loans", 2, "job-1"),
        ("loans", 1, "job-0"),
    ]


def test_the_home_is_an_option_too(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATE_LLM_HOME")
    assert len(document(run("models", "list", "--home", home, "--json"))) == 3
    monkeypatch.chdir(home)
    assert len(document(run("models", "list", "--json"))) == 3


def test_a_party_without_models(run: Run, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    open_stores(home, now=lambda: 1.0, create=True).close()
    assert "no models yet" in run("models", "list", "--home", home).stdout
    assert document(run("models", "list", "--home", home, "--json")) == []


def test_show_says_everything(run: Run, home: Path) -> None:
    text = run("models", "show", "loans").stdout
    assert text.startswith("loans@2\n")
    for said in ("acme/tiny", "job-1", "bank-a, bank-b", "loans-2025 (111111111111, 7 records)", "loss = 0.25"):
        assert said in text
    assert "privacy:       none" in text and "watermarks:    none" in text and "policy:        not known" in text
    found = document(run("models", "show", "loans@1", "--json"))
    assert (found["version"], found["metrics"]["loss"], found["data"][0]["records"]) == (1, 0.25, 7)
    assert document(run("models", "show", found["digest"][:8], "--json")) == found


def test_an_export_lies_where_it_was_asked_for(run: Run, home: Path, tmp_path: Path) -> None:
    done = run("models", "export", "loans@1", "out")
    assert done.stdout == "loans@1 (adapter) written to out\n"
    assert (tmp_path / "out" / "adapter_model.safetensors").read_text() == "weights 0"
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "lineage.json").is_file()
    found = document(run("models", "export", "cards", "out2", "--json"))
    assert (found["folder"], found["form"], found["model"]["name"]) == ("out2", "adapter", "cards")
    error = only_error(run("models", "export", "cards", "out", "--json", exit_code=2))
    assert "exists, and is not overwritten" in error["message"]


def test_merge_is_export_merged(run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(adapter: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())

    real = ModelRegistry.export

    def export(self: ModelRegistry, which: str, out: Path, *, merged: bool) -> Any:
        return real(self, which, out, merged=merged, merge=merge)

    monkeypatch.setattr(ModelRegistry, "export", export)
    assert run("models", "merge", "loans", "one").stdout == "loans@2 (merged) written to one\n"
    assert document(run("models", "export", "loans", "two", "--merged", "--json"))["form"] == "merged"
    for name in ("one", "two"):
        assert (tmp_path / name / "model.safetensors").read_text() == "weights 1"
        assert json.loads((tmp_path / name / "lineage.json").read_text())["form"] == "merged"


def test_what_is_not_there_has_the_nearest_name(run: Run, home: Path) -> None:
    error = only_error(run("models", "show", "loan", "--json", exit_code=2))
    assert (error["code"], error["hint"]) == ("model_invalid", "did you mean 'loans'?")
    assert "no model 'loan'" in run("models", "export", "loan", "out", exit_code=2).stderr
    assert ModelError.code == "model_invalid"


def test_a_folder_that_is_no_home_is_named(run: Run, tmp_path: Path) -> None:
    error = only_error(run("models", "list", "--home", tmp_path, "--json", exit_code=2))
    assert "party.yaml" in error["message"]
    error = only_error(run("models", "list", "--home", make_home(tmp_path / "home"), "--json", exit_code=2))
    assert "there is no database" in error["message"]


def test_listing_loads_no_torch(home: Path) -> None:
    script = (
        "import sys\n"
        "from fate_llm.cli.main import main\n"
        f"main(['models', 'list', '--home', {str(home)!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "loans@2" in done.stdout


def test_the_process_that_merges_is_ours() -> None:
    # The registry names a module of a layer that it must not import.
    import importlib.util

    assert registry_module.MERGING == "fate_llm.components.llm.merging"
    assert importlib.util.find_spec(registry_module.MERGING) is not None
