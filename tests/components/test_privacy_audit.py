"""The audit of one's own updates: it finds tokens where they are, none under masks, and notices masks that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fate_llm.components.llm.records import Record, write_dataset
from fate_llm.components.privacy_audit import PLUGIN, PrivacyAudit
from fate_llm.core.errors import DataError, InternalError, JobCancelled, ModelError, ProtectionError
from fate_llm.core.values import Artifact, ArtifactKind, Roster
from fate_llm.security.masks import add_masks
from tests.components.fake_context import FakeContext, make_contexts
from tests.components.real_model import REAL_MODEL, real_model_folder
from tests.components.tiny_model import make_tiny_model

torch = pytest.importorskip("torch")

MASKS = "fate_llm.components.llm.audit_updates.add_masks"
WORDS = ("zebu", "quokka", "axolotl", "okapi", "ibex", "gnu-herd")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that random rows do not span everything."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", hidden_size=128)


def context(folder: Path, model: Path | None, records: int = 12, **changes: Any) -> FakeContext:
    texts = [WORDS[i % len(WORDS)] for i in range(records)]
    made = [Record.from_instruction(f"r{i}", instruction=f"{text}?", output=f"{i}") for i, text in enumerate(texts)]
    folder.mkdir(exist_ok=True)
    write_dataset(folder / "data", made)
    settings: dict[str, Any] = {
        "model": {"path": str(model)} if model is not None else REAL_MODEL.model_dump(exclude_none=True),
        "peft": {"r": 40},
        "template": "plain",
        "parties": 3,
        "warmup_steps": 2,
        "local_steps": 2,
        "learning_rate": 1e-2,
        "chance_trials": 8,
    }
    params = PrivacyAudit.Params.model_validate({**settings, **changes})
    data = Artifact(ArtifactKind.DATASET, folder / "data", "train", "bank-a")
    return make_contexts(folder, Roster("bank-a"), params=params, task="audit", inputs={"bank-a": {"train": data}})[
        "bank-a"
    ]


def report_of(ctx: FakeContext) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ctx.folder / "outputs/bank-a/audit/report/report.json").read_text())
    return found


def audit(folder: Path, model: Path | None, **changes: Any) -> dict[str, Any]:
    ctx = context(folder, model, **changes)
    PrivacyAudit().guest(ctx)
    return report_of(ctx)


def row(report: dict[str, Any], update: str, view: str) -> dict[str, Any]:
    found = [one for one in report["views"] if (one["update"], one["view"]) == (update, view)]
    assert len(found) == 1
    one: dict[str, Any] = found[0]
    return one


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one audit that all is well with."""
    made = tmp_path_factory.mktemp("audit")
    ctx = context(made, model)
    PrivacyAudit().guest(ctx)
    (made / "events.json").write_text(json.dumps(ctx.events))
    return made


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outputs/bank-a/audit/report/report.json").read_text())
    return found


class TestWhatIsFound:
    def test_a_plain_gradient_shows_its_tokens(self, report: dict[str, Any]) -> None:
        """All but the last, which is never an input whose output counts."""
        plain = row(report, "gradient", "plain")
        assert plain["found"] == plain["named"] == plain["tokens"] - 1
        assert plain["leaks"]

    def test_the_first_round_shows_them_through_b(self, report: dict[str, Any]) -> None:
        """B = 0, so the gradient of A is zero; more rank than tokens, so that of B is not full."""
        first = row(report, "first gradient", "plain")
        assert first["found"] >= first["tokens"] - 1
        assert first["precision"] >= 0.5
        assert first["leaks"]

    def test_a_masked_one_shows_what_random_numbers_show(self, report: dict[str, Any]) -> None:
        assert report["outcome"] == "hidden"
        for update in ("first gradient", "gradient", "trained"):
            masked = row(report, update, "masked")
            assert not masked["leaks"]
            assert masked["recall"] <= 0.2

    def test_the_sum_of_few_still_shows_tokens_and_the_report_says_so(self, report: dict[str, Any]) -> None:
        """80 rows, fewer tokens: masks hide the terms, and the sum is what it is."""
        assert report["sum"]["recall"] >= 0.8
        assert "still shows" in report["verdict"]

    def test_much_noise_hides_them(self, report: dict[str, Any]) -> None:
        assert report["noised 1"]["recall"] <= 0.2
        assert not row(report, "gradient", "noised 1")["leaks"]

    def test_what_was_tested_is_said(self, report: dict[str, Any]) -> None:
        assert report["rank"] == 40
        assert report["parties"] == 3
        assert report["clipped_values"] == 0
        assert 0 < report["error_bound"] < 1e-5
        assert [name.rpartition(".")[2] for name in report["layers"]] == ["q_proj", "v_proj"]

    def test_neither_report_nor_events_hold_text_or_token_ids(self, folder: Path) -> None:
        written = folder / "outputs/bank-a/audit/report"
        assert {path.name for path in written.iterdir()} <= {"report.json", "report.md", "distances.png"}
        texts = [(written / name).read_text() for name in ("report.json", "report.md")]
        texts.append((folder / "events.json").read_text())
        for text in texts:
            assert not [word for word in WORDS if word in text]
        events = json.loads(texts[-1])
        assert [name for name, _ in events if name == "verdict"]
        for _, fields in events:
            lists = {key: value for key, value in fields.items() if isinstance(value, list) and key != "chance_auc"}
            assert lists == {}

    def test_the_manual_s_numbers_are_in_the_table(self, folder: Path, report: dict[str, Any]) -> None:
        text = (folder / "outputs/bank-a/audit/report/report.md").read_text()
        assert report["verdict"] in text
        assert text.count("\n| ") - 1 == 1 + len(report["views"])

    def test_nothing_of_the_training_stays_behind(self, folder: Path) -> None:
        assert list((folder / "scratch").rglob("*.*")) == []


class TestTheAuditCanFail:
    """A report that cannot be bad says nothing: masks are taken away, and each time the audit has to notice."""

    def test_masks_that_do_nothing(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MASKS, lambda *args, **kwargs: None)
        ctx = context(tmp_path, model)
        with pytest.raises(ProtectionError, match="Masked updates show tokens"):
            PrivacyAudit().guest(ctx)
        # The report is there all the same
        assert report_of(ctx)["outcome"] == "leak"
        assert report_of(ctx)["masked"]["recall"] >= 0.7

    def test_it_can_be_told_not_to_fail(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MASKS, lambda *args, **kwargs: None)
        assert audit(tmp_path, model, fail_on_leak=False)["outcome"] == "leak"

    def test_masks_too_small_to_hide(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bounded noise instead of the whole ring, as other frameworks have it, but smaller than the values."""

        def bounded(words: Any, wide: Any, *, plus: Any, minus: Any) -> None:
            for sign, keys in ((1, plus), (-1, minus)):
                for key in keys:
                    draws = np.random.default_rng(list(key)).integers(-8, 9, words.size)
                    words += (sign * draws).astype(np.int32).view(np.uint32)

        monkeypatch.setattr(MASKS, bounded)
        with pytest.raises(ProtectionError):
            PrivacyAudit().guest(context(tmp_path, model))

    def test_masks_that_do_not_cancel(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def one_sided(words: Any, wide: Any, *, plus: Any, minus: Any) -> None:
            add_masks(words, wide, plus=[*plus, *minus], minus=[])

        monkeypatch.setattr(MASKS, one_sided)
        with pytest.raises(InternalError, match="do not cancel"):
            PrivacyAudit().guest(context(tmp_path, model))

    def test_an_attack_without_strength_is_no_proof(self, tmp_path: Path, model: Path) -> None:
        """Rank 1 and dropout: the test finds nothing in plain updates, and must not call masks good for it."""
        report = audit(tmp_path, model, peft={"r": 1, "dropout": 0.9}, local_steps=1)
        assert report["outcome"] == "inconclusive"
        assert "nothing about masked" in report["verdict"]


class TestSettings:
    def test_tokens_are_shown_on_demand_only(self, tmp_path: Path, model: Path) -> None:
        audit(tmp_path, model, show_tokens=True)
        shown = json.loads((tmp_path / "outputs/bank-a/audit/report/tokens.json").read_text())
        assert set("zebu") <= set("".join(shown["gradient, plain"]["found"]))
        assert shown["gradient, masked"]["found"] == []

    def test_a_base_model_in_half_precision_leaks_as_much(self, tmp_path: Path, model: Path) -> None:
        report = audit(tmp_path, model, loading={"dtype": "bfloat16"})
        assert report["plain"]["recall"] >= 0.8
        assert report["outcome"] == "hidden"

    def test_batches_are_padded_and_padding_is_no_token(self, tmp_path: Path, model: Path) -> None:
        """Records of different lengths in one batch: the padding is not among what is found."""
        report = audit(tmp_path, model, batch_size=3, peft={"r": 60}, show_tokens=True)
        assert report["plain"]["recall"] >= 0.8
        shown = json.loads((tmp_path / "outputs/bank-a/audit/report/tokens.json").read_text())
        assert "<pad>" not in "".join(shown["gradient, plain"]["found"] + shown["gradient, plain"]["wrong"])

    def test_plain_updates_are_the_same_every_time(self, tmp_path: Path, model: Path, report: dict[str, Any]) -> None:
        """Masks are drawn anew, the rest is not."""
        again = audit(tmp_path, model)
        plain = [[view for view in one["views"] if view["view"] in ("plain", "noised 1")] for one in (report, again)]
        assert plain[0] == plain[1]
        assert len(plain[0]) == 4

    def test_too_few_records(self, tmp_path: Path, model: Path) -> None:
        with pytest.raises(DataError, match=r"5 of 5 records .* needs 6 \(parties 3 times batch_size 2\)"):
            PrivacyAudit().guest(context(tmp_path, model, records=5, batch_size=2))

    def test_no_records_left_for_the_warm_up(self, tmp_path: Path, model: Path) -> None:
        assert audit(tmp_path, model, records=3)["outcome"] == "hidden"

    def test_layers_behind_the_attention_are_refused(self, tmp_path: Path, model: Path) -> None:
        with pytest.raises(ModelError, match="sees mixtures of tokens"):
            PrivacyAudit().guest(context(tmp_path, model, peft={"r": 8, "target_modules": ["down_proj"]}))

    def test_a_cancelled_job_stops(self, tmp_path: Path, model: Path) -> None:
        ctx = context(tmp_path, model)
        ctx.cancelled = JobCancelled("stop")
        with pytest.raises(JobCancelled):
            PrivacyAudit().guest(ctx)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"peft": {"method": "full"}}, "peft.method"),
            ({"noise": [0.0]}, "noise"),
            ({"parties": 2}, "parties"),
            ({"warmup_steps": 0}, "warmup_steps"),
            ({"tolerance": 1.0}, "tolerance"),
            ({"rank": 3}, "rank"),
        ],
    )
    def test_what_cannot_be_tested_is_refused(self, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(ValidationError, match=named):
            PrivacyAudit.Params.model_validate({"model": {"path": "m"}, **changes})

    def test_it_needs_no_experiment_and_no_other_party(self) -> None:
        params = PrivacyAudit.Params.model_validate({"model": {"path": "m"}})
        assert PLUGIN().needs_experiment(params) is None
        assert not hasattr(PLUGIN, "arbiter")


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    """SmolLM2, one record of a demo bank: all tokens from the plain gradient, none from the masked one."""
    real_model_folder()
    report = audit(
        tmp_path, None, template="auto", peft={"r": 32}, parties=4, warmup_steps=4, learning_rate=2e-4, chance_trials=16
    )
    assert report["plain"]["recall"] >= 0.7
    assert report["plain"]["precision"] >= 0.9
    assert report["masked"]["recall"] == 0.0
    assert report["outcome"] == "hidden"
    assert os.path.getsize(tmp_path / "outputs/bank-a/audit/report/report.md") > 0
