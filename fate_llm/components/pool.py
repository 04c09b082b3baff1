"""Component `pool`: for experiments, the guest gets all parties' records in one data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fate_llm.core.errors import DataError, PeerViolation
from fate_llm.core.interfaces import (
    Context,
    Drop,
    Estimate,
    Frozen,
    PlanView,
    Port,
    PredictRule,
    Traffic,
)
from fate_llm.core.values import Artifact, ArtifactKind, Payload, Role

from .llm.costs import PLAIN_PROCESS
from .llm.records import Dataset, DatasetWriter, Record

__all__ = ["PLUGIN", "Pool", "PoolParams"]

MIB = 2**20


class PoolParams(Frozen):
    """How much may travel."""

    chunk_mib: int = Field(default=4, ge=1, le=64, description="Largest piece that is sent at once, in MiB.")
    max_mib: int = Field(default=1024, ge=1, description="A party with more data than this is refused, in MiB.")


class Pool:
    """Collects the records of all parties at the guest, so that a model trained on pooled data can be
    compared.

    This is what federated training is there to avoid: every row of every host travels to the guest. The
    component therefore runs in pipelines that say `experiment: true` only, and those only in the local
    runtime. The union keeps the order guest, hosts as listed; a row's id is `party/row`.
    """

    Params: ClassVar[type[Frozen]] = PoolParams
    inputs: ClassVar[Mapping[str, Port]] = {"data": Port(ArtifactKind.DATASET, "The party's records.")}
    outputs: ClassVar[Mapping[str, Port]] = {
        "dataset": Port(ArtifactKind.DATASET, "All parties' records.", roles=frozenset({Role.GUEST}))
    }
    predict_rule: ClassVar[PredictRule] = Drop()

    def needs_experiment(self, params: Any) -> str | None:
        return "pool sends every host's records to the guest"

    def estimate(self, view: PlanView) -> Estimate:
        guest = view.roster.guest
        hosts = [party for party in view.cohort.contributors if party != guest]
        traffic = tuple(Traffic(host, guest, "records", 1, None) for host in hosts)
        return Estimate(
            traffic=traffic,
            memory_bytes=PLAIN_PROCESS,
            notes=("bytes are the size of each host's records, known when it has them",),
        )

    def guest(self, ctx: Context) -> None:
        first = _dataset(ctx)
        about: dict[str, Any] = {"template": first.template, "fields": first.manifest["fields"]}
        with DatasetWriter(ctx.output("dataset"), source="pool", **about) as writer:
            for party in ctx.cohort.contributors:
                records = iter(first) if party == ctx.party else _received(ctx, party)
                for record in records:
                    writer.add(replace(record, id=f"{party}/{record.id}"))
                ctx.emit("data", source=party, rows=writer.rows)

    def host(self, ctx: Context) -> None:
        dataset = _dataset(ctx)
        size = (dataset.path / "records.jsonl").stat().st_size
        params: PoolParams = ctx.params
        if size > params.max_mib * MIB:
            raise DataError(f"pool: {size} bytes of records, more than max_mib = {params.max_mib}")
        about = {"rows": len(dataset), "bytes": size, "sha256": dataset.sha256}
        ctx.channel.send(ctx.roster.guest, "pool-header", Payload(about))
        with (dataset.path / "records.jsonl").open("rb") as stream:
            number = 0
            while block := stream.read(params.chunk_mib * MIB):
                ctx.check_cancelled()
                chunk = {"records": np.frombuffer(block, dtype=np.uint8)}
                ctx.channel.send(ctx.roster.guest, f"pool-{number}", Payload({}, chunk))
                number += 1


def _dataset(ctx: Context) -> Dataset:
    source = ctx.inputs["data"]
    if not isinstance(source, Artifact):
        raise DataError("pool: `data` is one data set")
    return Dataset(source.path)


def _received(ctx: Context, party: str) -> Iterator[Record]:
    """A host's records. They are spooled to disk and their digest is checked before the first is used."""
    params: PoolParams = ctx.params
    header = ctx.channel.receive(party, "pool-header").fields
    size, rows = header.get("bytes"), header.get("rows")
    if type(size) is not int or type(rows) is not int or not 0 <= size <= params.max_mib * MIB:
        raise PeerViolation(f"pool: {party} announces {size!r} bytes and {rows!r} rows")
    spool = ctx.scratch() / f"pool-{party}.jsonl"
    try:
        _spool(ctx, party, spool, size, header.get("sha256"))
        count = 0
        for record in _parsed(party, spool):
            count += 1
            yield record
        if count != rows:
            raise PeerViolation(f"pool: {party} announced {rows} rows and sent {count}")
    finally:
        spool.unlink(missing_ok=True)


def _spool(ctx: Context, party: str, spool: Path, size: int, sha256: Any) -> None:
    params: PoolParams = ctx.params
    digest, received, number = hashlib.sha256(), 0, 0
    with spool.open("wb") as stream:
        while received < size:
            ctx.check_cancelled()
            chunk = ctx.channel.receive(party, f"pool-{number}").tensors.get("records")
            most = min(params.chunk_mib * MIB, size - received)
            if chunk is None or chunk.dtype != np.uint8 or chunk.ndim != 1 or not 0 < chunk.size <= most:
                raise PeerViolation(f"pool: piece {number} of {party} is not 1 to {most} bytes of records")
            block = chunk.tobytes()
            stream.write(block)
            digest.update(block)
            received, number = received + len(block), number + 1
    if digest.hexdigest() != sha256:
        raise PeerViolation(f"pool: what {party} sent does not have the digest it announced")


def _parsed(party: str, spool: Path) -> Iterator[Record]:
    with spool.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield Record.from_dict(json.loads(line))
            except (ValueError, DataError, RecursionError) as error:
                raise PeerViolation(f"pool: row {number} of {party} is no record") from error


PLUGIN = Pool
