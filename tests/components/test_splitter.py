from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fate_llm.components.llm.records import Dataset, Record, write_dataset
from fate_llm.components.splitter import (
    PartitionParams,
    Splitter,
    SplitterParams,
    partition_rows,
    split_rows,
)
from fate_llm.core.errors import DataError
from fate_llm.core.interfaces import PassThrough
from fate_llm.core.values import Artifact, ArtifactKind, Roster
from tests.components.fake_context import make_contexts, run_parties

BANKS = Roster("bank-a", ("bank-b", "bank-c"), arbiter="consortium")
PARTIES = BANKS.data_owners


def rows_of(counts: dict[str | None, int], *, keys: int = 0) -> list[Record]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [
        Record.from_instruction(str(at), f"q{at}", f"a{at}", category=label, key=str(at % keys) if keys else None)
        for at, label in enumerate(labels)
    ]


def split(
    folder: Path, rows: Sequence[Record], params: SplitterParams, *, seed: int = 7, roster: Roster = BANKS
) -> dict[str, dict[str, Any]]:
    """Every party splits the same rows. By party: the data sets written, and the manifest."""
    source = write_dataset(folder / "source", rows, template="chat", fields={"instruction": "q"}, source="f.csv")
    inputs = {
        party: {"data": Artifact(ArtifactKind.DATASET, source.path, "data.dataset", party)}
        for party in roster.data_owners
    }
    contexts = make_contexts(folder, roster, params=params, task="split", inputs=inputs, seed=seed)
    run_parties(Splitter(), contexts)
    found: dict[str, dict[str, Any]] = {}
    for party in roster.data_owners:
        outputs = folder / "outputs" / party / "split"
        parts: dict[str, Any] = {
            part: Dataset(outputs / part) for part in ("train", "validation", "test") if (outputs / part).exists()
        }
        parts["manifest"] = json.loads((outputs / "manifest/report.json").read_text())
        found[party] = parts
    return found


def ids(dataset: Dataset) -> set[str]:
    return {record.id for record in dataset}


# --- Shares -------------------------------------------------------------------------------------------------

fractions = st.floats(0, 0.9).map(lambda share: round(share, 3))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    fractions,
    fractions,
    st.none() | fractions,
    st.integers(0, 2**31 - 1),
)
def test_every_row_is_in_one_part_and_every_group_near_its_share(
    sizes: list[int], validation: float, test: float, train: float | None, seed: int
) -> None:
    try:
        params = SplitterParams(train=train, validation=validation, test=test)
    except ValidationError:
        return
    groups = [str(at) for at, size in enumerate(sizes) for _ in range(size)]
    parts = split_rows(groups, params.shares(), np.random.default_rng(seed))
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(groups)))
    for part, share in params.shares().items():
        assert parts[part] == sorted(parts[part])
        counts = Counter(groups[row] for row in parts[part])
        for at, size in enumerate(sizes):
            assert abs(counts[str(at)] - size * share) < 1 + 1e-6
            if part == "train" and size and share > 0.001:
                assert counts[str(at)] >= 1, "training knows every category"


def test_many_small_groups_do_not_lose_the_test_part() -> None:
    groups = [str(at) for at in range(20) for _ in range(2)]
    parts = split_rows(groups, SplitterParams(test=0.2).shares(), np.random.default_rng(0))
    assert len(parts["test"]) == 8
    assert len(parts["train"]) == 32


def test_shares_that_do_not_add_up_are_refused() -> None:
    for wrong in (
        {"test": 0.6, "validation": 0.5},
        {"train": 0.9, "test": 0.2},
        {"test": 1.0},
        {"test": 0.5, "validation": 0.5},
        {"test": -0.1},
        {"train": 0.0},
        {"stratify": "length"},
        {"min_rows": 0},
    ):
        with pytest.raises(ValidationError):
            SplitterParams.model_validate(wrong)
    assert SplitterParams(train=0.7, validation=0.1, test=0.2).shares()["unused"] == pytest.approx(0)
    assert SplitterParams(train=0.5, test=0.2).shares()["unused"] == pytest.approx(0.3)


# --- A party's own split ------------------------------------------------------------------------------------


def test_train_and_test_keep_the_same_mix(tmp_path: Path) -> None:
    found = split(tmp_path, rows_of({"a": 50, "b": 25, "c": 5}), SplitterParams(stratify="category"))
    for party in PARTIES:
        train, test = found[party]["train"], found[party]["test"]
        assert train.categories() == {"a": 40, "b": 20, "c": 4}
        assert test.categories() == {"a": 10, "b": 5, "c": 1}
        assert not ids(train) & ids(test)
        assert "validation" not in found[party]


def test_parties_split_differently_and_runs_alike(tmp_path: Path) -> None:
    rows = rows_of({"a": 60})
    results = []
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        (tmp_path / name).mkdir()
        results.append(split(tmp_path / name, rows, SplitterParams(), seed=seed))
    one, two, three = results
    for party in PARTIES:
        assert one[party]["train"].sha256 == two[party]["train"].sha256
        assert one[party]["manifest"] == two[party]["manifest"]
        assert ids(one[party]["test"]) != ids(three[party]["test"])
    assert ids(one["bank-a"]["test"]) != ids(one["bank-b"]["test"])


def test_three_parts_and_what_is_left_unused(tmp_path: Path) -> None:
    found = split(tmp_path, rows_of({"a": 100}), SplitterParams(train=0.5, validation=0.1, test=0.2))["bank-a"]
    assert [len(found[part]) for part in ("train", "validation", "test")] == [50, 10, 20]
    assert found["manifest"]["parts"]["unused"]["rows"] == 20


def test_the_parts_carry_on_what_the_reader_said(tmp_path: Path) -> None:
    train = split(tmp_path, rows_of({"a": 10}), SplitterParams())["bank-a"]["train"]
    assert (train.template, train.manifest["source"]) == ("chat", "f.csv")
    assert train.manifest["fields"] == {"instruction": "q"}
    assert train[0].turns[0].content.startswith("q")


def test_a_category_too_small_to_share_goes_to_training_and_is_named(tmp_path: Path) -> None:
    found = split(tmp_path, rows_of({"a": 20, "rare": 1, None: 5}), SplitterParams(stratify="category"))
    manifest = found["bank-b"]["manifest"]
    assert manifest["not_in_every_part"] == ["rare"]
    assert manifest["parts"]["train"]["categories"]["rare"] == 1
    assert manifest["parts"]["test"] == {"rows": 5, "categories": {"a": 4}, "without_category": 1}


def test_no_test_part_when_its_share_is_zero(tmp_path: Path) -> None:
    found = split(tmp_path, rows_of({"a": 5}), SplitterParams(test=0))["bank-a"]
    assert set(found) == {"train", "manifest"}
    assert len(found["train"]) == 5


@pytest.mark.parametrize(
    ("rows", "params", "message"),
    [
        (rows_of({None: 10}), SplitterParams(stratify="category"), "no row has a category"),
        (rows_of({"a": 2}), SplitterParams(test=0.1), "test = 0.1 gives 0 rows"),
        (
            rows_of({"a": 20}),
            SplitterParams(test=0.1, min_rows=3),
            "test = 0.1 gives 2 rows, fewer than min_rows = 3",
        ),
        (rows_of({}), SplitterParams(), "train = 0.8 gives 0 rows"),
    ],
)
def test_impossible_splits_are_refused_at_once(
    tmp_path: Path, rows: list[Record], params: SplitterParams, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split(tmp_path, rows, params)
    assert not list(tmp_path.glob("outputs/*/split/train"))


# --- One data set over parties ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "partition",
    [
        PartitionParams(method="iid"),
        PartitionParams(method="dirichlet", alpha=0.5),
        PartitionParams(method="category"),
        PartitionParams(method="key"),
    ],
    ids=lambda params: params.method,
)
def test_the_parties_shares_are_the_whole_and_do_not_overlap(tmp_path: Path, partition: PartitionParams) -> None:
    rows = rows_of({"a": 40, "b": 40, "c": 40, "d": 40}, keys=10)
    found = split(tmp_path, rows, SplitterParams(partition=partition, stratify="category"))
    shares = [ids(found[party]["train"]) | ids(found[party]["test"]) for party in PARTIES]
    assert sum(len(share) for share in shares) == 160
    assert set.union(*shares) == {record.id for record in rows}
    # all parties have computed the same thing, and each one's mix is the same in train and test
    assert len({json.dumps(found[party]["manifest"]["partition"]) for party in PARTIES}) == 1
    for party in PARTIES:
        counts = found[party]["manifest"]["partition"]["parties"][party]
        for category, total in counts["categories"].items():
            assert abs(found[party]["test"].categories().get(category, 0) - 0.2 * total) < 1
    text = (tmp_path / "outputs/bank-a/split/manifest/report.md").read_text()
    assert "| party | category | rows |" in text and "| bank-c | all |" in text


def test_whole_categories_and_keys_stay_together() -> None:
    labels = [str(at % 7) for at in range(100)]
    for method in ("category", "key"):
        shares = partition_rows(labels, PARTIES, PartitionParams(method=method), 3)
        seen = [{labels[row] for row in rows} for rows in shares.values()]
        assert sum(len(some) for some in seen) == 7
        assert max(len(rows) for rows in shares.values()) - min(len(rows) for rows in shares.values()) <= 15


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), max_size=80),
    st.integers(1, 6),
    st.sampled_from(["iid", "dirichlet", "category", "key"]),
    st.floats(0.01, 100),
    st.integers(0, 2**31 - 1),
)
def test_any_partition_is_complete_or_refused(
    labels: list[str], count: int, method: str, alpha: float, seed: int
) -> None:
    parties = [f"party-{at}" for at in range(count)]
    params = PartitionParams.model_validate({"method": method, "alpha": alpha if method == "dirichlet" else None})
    try:
        shares = partition_rows(labels, parties, params, seed)
    except DataError:
        return
    assert list(shares) == parties
    assert sorted(row for rows in shares.values() for row in rows) == list(range(len(labels)))
    assert all(shares.values())
    assert shares == partition_rows(labels, parties, params, seed)


def test_small_alpha_is_more_uneven_than_large() -> None:
    labels = [letter for letter in "abcdefgh" for _ in range(60)]

    def unevenness(alpha: float) -> float:
        shares = partition_rows(labels, PARTIES, PartitionParams(method="dirichlet", alpha=alpha), 1)
        tables = [Counter(labels[row] for row in rows) for rows in shares.values()]
        return float(np.mean([np.std([table[letter] for table in tables]) for letter in "abcdefgh"]))

    assert unevenness(0.1) > 2 * unevenness(1000.0)


def test_another_partition_seed_gives_another_partition() -> None:
    first, second = (partition_rows(["a"] * 50, PARTIES, PartitionParams(method="iid"), seed) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(
    ("labels", "method", "message"),
    [
        ([None] * 30, "dirichlet", "30 of 30 rows have no category"),
        ([None, *"ab"] * 5, "category", "5 of 15 rows have no category"),
        ([None] * 30, "key", "30 of 30 rows have no key"),
        (["a", "b"] * 9, "category", "2 categories are too few for 3 parties"),
        (["a", "b"] * 9, "key", "2 keys are too few for 3 parties"),
        (["a", "b"], "iid", "2 rows are too few for 3 parties"),
    ],
)
def test_impossible_partitions_are_refused(labels: list[str | None], method: str, message: str) -> None:
    params = PartitionParams.model_validate({"method": method, "alpha": 0.5 if method == "dirichlet" else None})
    with pytest.raises(DataError, match=message):
        partition_rows(labels, PARTIES, params, 7)


def test_a_dirichlet_draw_that_never_fits_ends() -> None:
    with pytest.raises(DataError, match="in 100 draws"):
        partition_rows(["a"] * 3000, PARTIES, PartitionParams(method="dirichlet", alpha=0.01), 7, min_rows=900)
    with pytest.raises(DataError, match="fewer than min_rows = 10"):
        partition_rows(list("abc") * 9 + ["a"] * 30, PARTIES, PartitionParams(method="category"), 1, min_rows=10)


def test_alpha_belongs_to_dirichlet() -> None:
    for wrong in ({"method": "dirichlet"}, {"method": "iid", "alpha": 1.0}, {"method": "lda"}):
        with pytest.raises(ValidationError):
            PartitionParams.model_validate(wrong)


def test_the_contract() -> None:
    splitter = Splitter()
    assert splitter.predict_rule == PassThrough("data")
    assert splitter.needs_experiment(SplitterParams(partition=PartitionParams(method="iid"))) is None
    assert [name for name, port in splitter.outputs.items() if port.required] == ["train", "manifest"]
    for model in (SplitterParams, PartitionParams):
        assert all(field.description for field in model.model_fields.values())
