"""Trained models: registered once, found by name, and exported with a lineage that others can check."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from fate_llm.core.canonical import digest_folder
from fate_llm.core.errors import ConfigurationError, DataError, ModelError
from fate_llm.runtime.artifacts import models
from fate_llm.runtime.artifacts.card import model_card
from fate_llm.runtime.artifacts.models import DataFingerprint, ModelRecord, ModelRegistry, merge_adapter
from fate_llm.runtime.artifacts.store import ArtifactStore
from fate_llm.runtime.store.store import Store
from tests.runtime.artifacts.conftest import MakeFolder

Register = Callable[..., ModelRecord]

DATA = (DataFingerprint(name="loans-2025", digest="1" * 64, records=1200), DataFingerprint(name="b", digest="2" * 64))


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open("sqlite://", now=lambda: 1_000.0) as opened:
        yield opened


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def registry(store: Store, artifacts: ArtifactStore) -> ModelRegistry:
    return ModelRegistry(store, artifacts)


@pytest.fixture
def register(registry: ModelRegistry, make_model: MakeFolder) -> Register:
    numbers = itertools.count()

    def add(name: str = "loans", weights: str = "weights", kind: str = "adapter", **changes: Any) -> ModelRecord:
        folder = make_model(f"trained-{next(numbers)}", weights=weights, kind=kind)
        values: dict[str, Any] = {
            "job": "loans-1",
            "task": "train",
            "party": "bank-a",
            "created": 1_700_000_000.0,
            "parties": ["bank-a", "bank-b"],
            "data": DATA,
            "metrics": {"loss": 0.123456789, "rounds": 4, "best": {"loss": 0.1}, "list": [1], "nan": None, "ok": True},
            "policy": "a" * 64,
            "specification": "b" * 64,
        }
        return registry.register(folder, name=name, **{**values, **changes})

    return add


# --- registering -------------------------------------------------------------------------------------------------


def test_a_record_holds_all_that_was_known(
    registry: ModelRegistry, register: Register, artifacts: ArtifactStore
) -> None:
    record = register()
    assert record.label == "loans@1"
    assert (record.kind, record.base, record.privacy, record.watermarks) == (
        "adapter",
        {"hub": "acme/tiny"},
        "none",
        (),
    )
    assert (record.data, record.parties, record.metrics["loss"]) == (DATA, ("bank-a", "bank-b"), 0.123456789)
    assert (record.policy, record.specification, record.created) == ("a" * 64, "b" * 64, 1_700_000_000.0)
    assert registry.list() == [record] == [registry.show("loans")]
    ref = artifacts.verify(record.digest)
    assert (ref.kind, ref.files) == ("model", 3)


def test_the_same_output_again_is_the_same_version(registry: ModelRegistry, register: Register) -> None:
    # A service that was killed after it had registered does it once more.
    first = register()
    assert register(created=1_800_000_000.0) == first
    assert register(weights="other").version == 2
    assert register(job="loans-2").version == 3
    assert register(name="cards").version == 1
    assert [record.label for record in registry.list(name="loans")] == ["loans@3", "loans@2", "loans@1"]


def test_an_artifact_that_is_stored_already(registry: ModelRegistry, artifacts: ArtifactStore, make_model: Any) -> None:
    ref = artifacts.put(make_model(), kind="model")
    record = registry.register(ref, name="m", job="j", task="t", party="p", created=1.0, parties=["p"])
    assert (record.digest, record.data, record.metrics, record.policy) == (ref.digest, (), {}, "")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (None, "has no fate_model.json"),
        ("{", "of another version, or damaged"),
        ("[]", "of another version"),
        ('{"format": 2, "kind": "adapter", "base": {}}', "of another version"),
        ('{"format": 1, "kind": "shape", "base": {}}', "of another version"),
        ('{"format": 1, "kind": "adapter", "base": "x"}', "of another version"),
    ],
)
def test_a_folder_that_no_trainer_wrote(
    registry: ModelRegistry, make_folder: MakeFolder, about: str | None, said: str
) -> None:
    folder = make_folder("odd", **({} if about is None else {"fate_model.json": about}), weights="x")
    with pytest.raises(ModelError, match=said):
        registry.register(folder, name="m", job="j", task="t", party="p", created=1.0, parties=["p"])
    assert registry.list() == []


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a@1", "a" * 65, "-a"])
def test_a_name_that_is_none(registry: ModelRegistry, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be called"):
        registry.register(Path("nowhere"), name=name, job="j", task="t", party="p", created=1.0, parties=["p"])


def test_a_fact_that_is_none_registers_nothing(register: Register, registry: ModelRegistry) -> None:
    with pytest.raises(ModelError, match="metrics"):
        register(metrics={1: 2})
    with pytest.raises(ModelError, match="created"):
        register(created=float("nan"))
    assert registry.list() == []
    assert register(metrics={"loss": [float("nan"), 1.0]}).metrics == {"loss": [None, 1.0]}


# --- finding -----------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_name_version_and_digest(registry: ModelRegistry, register: Register) -> None:
    first, second, cards = register(), register(weights="2"), register(name="cards", weights="3")
    assert registry.show("loans") == second
    assert registry.show("loans@1") == first
    assert registry.show(cards.digest) == cards == registry.show(cards.digest[:6])
    register(job="again")  # the same content as the first
    assert registry.show(first.digest[:10]).label == "loans@3"


def test_a_model_that_is_not_there(registry: ModelRegistry, register: Register) -> None:
    with pytest.raises(ModelError, match="no model 'loan' at this party") as error:
        registry.show("loan")
    assert "No model is registered" in error.value.hint
    record = register()
    for which, said in {
        "loan": "did you mean 'loans'?",
        "loans@2": "It has 1.",
        "loans@0": "NAME@VERSION",
        "loans@": "NAME@VERSION",
        "loans@x": "NAME@VERSION",
        "loans@" + "9" * 30: "NAME@VERSION",
        "%": "loans",
        "a\0": "plain Unicode text",
        record.digest[:5]: "loans",
        "f" * 64: "loans",
    }.items():
        with pytest.raises(ConfigurationError) as error:
            registry.show(which)
        assert said in error.value.hint, which


def test_a_beginning_that_two_digests_have(registry: ModelRegistry, store: Store, register: Register) -> None:
    content = register().model_dump(mode="json", exclude={"name", "version", "digest", "job", "task", "created"})
    for end in "01":
        digest = "abcdef" + end * 58
        store.add_model(name=f"m{end}", digest=digest, job="j", task="t", created=1.0, content=content)
    with pytest.raises(ModelError, match="2 models have a digest that begins with abcdef"):
        registry.show("abcdef")
    assert registry.show("abcdef0").name == "m0"


def test_a_record_that_somebody_has_changed(registry: ModelRegistry, store: Store) -> None:
    store.add_model(name="m", digest="0" * 64, job="j", task="t", created=1.0, content={"kind": "adapter"})
    with pytest.raises(ModelError, match="the record of model m@1 is not valid: party"):
        registry.list()


# --- exporting ---------------------------------------------------------------------------------------------------


def test_an_export_is_the_folder_with_card_and_lineage(
    registry: ModelRegistry, register: Register, tmp_path: Path
) -> None:
    record = register()
    assert registry.export("loans", tmp_path / "to" / "out") == record
    out = tmp_path / "to" / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["README.md", "adapter_config.json", "fate_model.json", "lineage.json", "weights.safetensors"]
    )
    lineage = json.loads((out / "lineage.json").read_text())
    assert (lineage["format"], lineage["form"], lineage["files_digest"]) == (1, "adapter", record.digest)
    assert ModelRecord.model_validate(lineage["model"]) == record
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["out"]
    # The digest of the lineage is that of everything else in the folder: anybody can check it.
    for name in ("README.md", "lineage.json"):
        (out / name).unlink()
    assert digest_folder(out) == record.digest


def test_the_card_is_one_that_the_hub_reads(registry: ModelRegistry, register: Register, tmp_path: Path) -> None:
    register()
    registry.export("loans", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "acme/tiny"
    found = card.data.to_dict()
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-generation")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "federated-learning" in card.data.tags
    text = card.text
    for said in ("bank-a, bank-b", "loans-1", "1" * 64, "1200", "a" * 64, "b" * 64, "2023-11-14T22:13:20+00:00"):
        assert said in text, said
    assert "| loss | 0.123457 |" in text and "| best.loss | 0.1 |" in text and "| rounds | 4 |" in text
    assert "no differential privacy" in text and "Watermark certificates: none" in text


def test_a_base_that_is_not_on_the_hub_is_not_claimed_to_be(register: Register) -> None:
    record = register().model_dump(mode="json")
    card = model_card({**record, "base": {"path": "/models/own"}, "data": []}, form="full")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert "path: /models/own" in card and "No fingerprints" in card


def test_nothing_in_a_card_can_break_out_of_its_cell(register: Register) -> None:
    evil = "x | y\n\n# Heading <script>alert(1)</script> [link](http://evil) `code` ![i](j)"
    record = register().model_dump(mode="json")
    changed = {
        **record,
        "job": evil,
        "parties": [evil],
        "privacy": evil,
        "base": {"hub": "acme/tiny", evil: evil},
        "data": [{"name": evil, "party": evil, "digest": "1" * 64, "records": None}],
        "metrics": {evil: 1},
    }
    card = model_card(changed, form="adapter")
    body = card.split("---\n", 2)[2]
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == [
        "# loans, version 1",
        "## Lineage",
        "## Data",
        "## Privacy and ownership",
        "## Metrics",
        "## Use",
    ]
    for mark in ("<script", "](", "![", "`code", " | y"):
        assert mark not in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3, 5}


def test_nothing_is_overwritten_or_left_half(
    registry: ModelRegistry, register: Register, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    record = register()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigurationError, match="exists, and is not overwritten"):
        registry.export("loans", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        registry.export("loans", tmp_path / "file" / "out")
    with pytest.raises(ModelError):
        registry.export("loan", tmp_path / "out")
    artifacts.gc([])
    with pytest.raises(DataError, match=f"no artifact {record.digest}"):
        registry.export("loans", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


# --- merging -----------------------------------------------------------------------------------------------------


def fake_merge(adapter: Path, out: Path) -> None:
    """What the merging process does to the disk."""
    out.mkdir()
    (out / "model.safetensors").write_text("merged " + (adapter / "weights.safetensors").read_text())
    (out / "README.md").write_text("somebody else's card")


def test_a_merged_export_says_what_it_is(registry: ModelRegistry, register: Register, tmp_path: Path) -> None:
    record = register()
    registry.export("loans@1", tmp_path / "out", merged=True, merge=fake_merge)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "merged weights"
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["form"] == "merged" and lineage["files_digest"] != record.digest == lineage["model"]["digest"]
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (front["library_name"], front["base_model_relation"]) == ("transformers", "finetune")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "lineage.json", "model.safetensors"]
    for name in ("README.md", "lineage.json"):  # somebody else's card does not count either
        (tmp_path / "out" / name).unlink()
    assert digest_folder(tmp_path / "out") == lineage["files_digest"]


def test_a_whole_model_is_merged_already(registry: ModelRegistry, register: Register, tmp_path: Path) -> None:
    record = register(kind="full")

    def never(adapter: Path, out: Path) -> None:
        raise AssertionError

    registry.export("loans", tmp_path / "out", merged=True, merge=never)
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert (lineage["form"], lineage["files_digest"]) == ("full", record.digest)


def test_a_merge_that_fails_leaves_nothing(registry: ModelRegistry, register: Register, tmp_path: Path) -> None:
    register()

    def fails(adapter: Path, out: Path) -> None:
        fake_merge(adapter, out)
        raise ModelError("no base model")

    with pytest.raises(ModelError, match="no base model"):
        registry.export("loans", tmp_path / "out", merged=True, merge=fails)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_the_merging_process_is_quoted_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho noise; echo \"$@\" >&2; echo 'the base is gone' >&2; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(models.sys, "executable", str(program))
    with pytest.raises(ModelError, match=r"\(exit code 3\): -m fate_llm.components.llm.merging a b the base is gone"):
        merge_adapter(Path("a"), Path("b"))


@pytest.mark.slow
def test_exports_of_a_real_adapter_load_and_say_the_same(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fate_llm.components.llm.adapters import PeftSettings, save_model, write_about
    from fate_llm.components.llm.modelref import ModelRef
    from tests.cli.conftest import environment
    from tests.components.tiny_model import make_tiny_model

    # Given an adapter as a trainer saves it.
    base = make_tiny_model(tmp_path / "tiny")
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path / "adapter"
    save_model(model, folder, None)
    write_about(folder, base=ModelRef(path=str(base)), base_path=str(base), settings=PeftSettings(), extra={})
    facts: dict[str, Any] = {"job": "j", "task": "t", "party": "p", "created": 1.0, "parties": ["p", "q"]}
    registry.register(folder, name="tiny", **facts)
    # When it is exported both ways.
    registry.export("tiny", tmp_path / "peft")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    registry.export("tiny", tmp_path / "merged", merged=True)
    # Then both load by themselves, and answer as the trained model does.
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "peft"))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))(ids).logits
    assert torch.equal(adapted, expected)
    assert torch.allclose(merged, expected, atol=1e-4)
    AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "merged" / "lineage.json").read_text())["form"] == "merged"
