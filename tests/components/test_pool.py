from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.llm.records import Dataset, Record, write_dataset
from fate_llm.components.pool import MIB, Pool, PoolParams
from fate_llm.core.errors import DataError, PeerViolation
from fate_llm.core.interfaces import Drop, PlanView
from fate_llm.core.values import Artifact, ArtifactKind, Payload, Role, Roster
from tests.components.fake_context import FakeContext, make_contexts, run_parties

BANKS = Roster("bank-a", ("bank-b", "bank-c"), arbiter="consortium")


def contexts_with(
    folder: Path, rows: dict[str, list[Record]], params: PoolParams | None = None
) -> dict[str, FakeContext]:
    inputs = {}
    for party, records in rows.items():
        dataset = write_dataset(folder / party, records, template="plain", fields={"instruction": party})
        inputs[party] = {"data": Artifact(ArtifactKind.DATASET, dataset.path, "split.train", party)}
    return make_contexts(folder, BANKS, params=params or PoolParams(), task="pool", inputs=inputs)


def rows_of(party: str, count: int, size: int = 5) -> list[Record]:
    return [
        Record.from_instruction(str(at), f"{party} é中 " + "x" * size, str(at), input="i", category=party)
        for at in range(count)
    ]


ROWS = {party: rows_of(party, count) for party, count in zip(BANKS.data_owners, (3, 4, 0), strict=True)}


def test_the_guest_gets_everyones_rows_in_roster_order(tmp_path: Path) -> None:
    run_parties(Pool(), contexts_with(tmp_path, ROWS))
    pooled = Dataset(tmp_path / "outputs/bank-a/pool/dataset")
    assert [record.id for record in pooled] == [
        *(f"bank-a/{at}" for at in range(3)),
        *(f"bank-b/{at}" for at in range(4)),
    ]
    assert pooled.categories() == {"bank-a": 3, "bank-b": 4}
    assert pooled.template == "plain"
    assert pooled[5].turns == ROWS["bank-b"][2].turns
    assert not list((tmp_path / "scratch").rglob("*.jsonl"))
    assert not (tmp_path / "outputs/bank-b/pool").exists()


def test_pieces_are_bounded_and_cut_anywhere(tmp_path: Path) -> None:
    rows = {"bank-a": [], "bank-b": rows_of("bank-b", 3, MIB), "bank-c": rows_of("bank-c", 1)}
    contexts = contexts_with(tmp_path, rows, PoolParams(chunk_mib=1))
    run_parties(Pool(), contexts)
    sent = [payload.tensors["records"] for _, name, payload in contexts["bank-b"].channel.sent if name != "pool-header"]
    assert len(sent) == 4
    assert all(chunk.dtype == np.uint8 and chunk.size <= MIB for chunk in sent)
    assert {receiver for receiver, _, _ in contexts["bank-b"].channel.sent} == {"bank-a"}
    assert [record.turns for record in Dataset(tmp_path / "outputs/bank-a/pool/dataset")][:3] == [
        record.turns for record in rows["bank-b"]
    ]


def test_too_much_data_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    rows = {**ROWS, "bank-b": rows_of("bank-b", 2, MIB)}
    contexts = contexts_with(tmp_path, rows, PoolParams(max_mib=1))
    with pytest.raises(DataError, match="more than max_mib = 1"):
        Pool().host(contexts["bank-b"])
    assert contexts["bank-b"].channel.sent == []


def honest(rows: list[Record], folder: Path) -> tuple[dict[str, Any], bytes]:
    dataset = write_dataset(folder / "honest", rows)
    content = (dataset.path / "records.jsonl").read_bytes()
    return {"rows": len(rows), "bytes": len(content), "sha256": dataset.sha256}, content


@pytest.mark.parametrize(
    ("header", "chunk", "message"),
    [
        ({"bytes": -1}, None, "announces -1 bytes"),
        ({"bytes": 2**40}, None, "announces"),
        ({"bytes": "many"}, None, "announces 'many' bytes"),
        ({"rows": None}, None, "None rows"),
        ({"rows": 3}, None, "announced 3 rows and sent 2"),
        ({"sha256": "0" * 64}, None, "digest"),
        ({}, {}, "piece 0 of bank-b"),
        ({}, {"records": np.zeros(0, np.uint8)}, "piece 0"),
        ({}, {"records": np.zeros(9, np.float32)}, "piece 0"),
        ({}, {"records": np.zeros((3, 3), np.uint8)}, "piece 0"),
        ({}, {"records": np.zeros(10_000, np.uint8)}, "piece 0"),
    ],
)
def test_a_host_that_says_something_else_than_it_sends_is_named(
    tmp_path: Path, header: dict[str, Any], chunk: dict[str, Any] | None, message: str
) -> None:
    contexts = contexts_with(tmp_path, ROWS)
    about, content = honest(rows_of("bank-b", 2), tmp_path)
    host = contexts["bank-b"].channel
    host.send("bank-a", "pool-header", Payload({**about, **header}))
    host.send(
        "bank-a",
        "pool-0",
        Payload({}, {"records": np.frombuffer(content, np.uint8)} if chunk is None else chunk),
    )
    with pytest.raises(PeerViolation, match=message):
        Pool().guest(contexts["bank-a"])
    assert not (tmp_path / "outputs/bank-a/pool/dataset").exists()
    assert not list((tmp_path / "scratch").rglob("*.jsonl"))


@pytest.mark.parametrize("content", [b"no json\n", b'{"id": "1"}\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    import hashlib

    contexts = contexts_with(tmp_path, ROWS)
    about = {"rows": 1, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    host = contexts["bank-b"].channel
    host.send("bank-a", "pool-header", Payload(about))
    host.send("bank-a", "pool-0", Payload({}, {"records": np.frombuffer(content, np.uint8)}))
    with pytest.raises(PeerViolation, match="row 1 of bank-b is no record"):
        Pool().guest(contexts["bank-a"])


def test_it_is_for_experiments_only_and_says_what_travels() -> None:
    pool = Pool()
    assert pool.needs_experiment(PoolParams()) == "pool sends every host's records to the guest"
    assert isinstance(pool.predict_rule, Drop)
    assert pool.outputs["dataset"].roles == frozenset({Role.GUEST})
    assert not hasattr(pool, "arbiter")
    context = make_contexts(Path(), BANKS, params=PoolParams())["bank-a"]
    estimate = pool.estimate(PlanView("pool", BANKS, context.cohort, {}))
    assert [(move.sender, move.receiver, move.bytes_each) for move in estimate.traffic] == [
        ("bank-b", "bank-a", None),
        ("bank-c", "bank-a", None),
    ]
    assert all(field.description for field in PoolParams.model_fields.values())
