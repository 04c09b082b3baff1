"""Component `splitter`: train, validation and test inside each party, or one data set over all parties."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from fate_llm.core.errors import DataError
from fate_llm.core.interfaces import Context, Estimate, Frozen, PassThrough, PlanView, Port, PredictRule
from fate_llm.core.values import Artifact, ArtifactKind

from .llm.costs import PLAIN_PROCESS
from .llm.records import Dataset, DatasetWriter

__all__ = ["PLUGIN", "PartitionParams", "Splitter", "SplitterParams", "partition_rows", "split_rows"]

PARTS = ("train", "validation", "test")
DRAWS = 100
EPSILON = 1e-9


class PartitionParams(Frozen):
    """How one data set, which every party reads, is shared out."""

    method: Literal["iid", "dirichlet", "category", "key"] = Field(
        description="`iid`: at random in equal shares; `dirichlet`: each category in random proportions; "
        "`category`, `key`: rows of one category or key stay together."
    )
    alpha: float | None = Field(
        default=None,
        ge=0.01,
        le=1e6,
        description="Only `dirichlet`: small is very uneven, large is nearly iid.",
    )
    seed: int = Field(default=0, ge=0, description="Another number gives another partition of the same job seed.")

    @model_validator(mode="after")
    def _alpha_where_it_belongs(self) -> PartitionParams:
        if (self.method == "dirichlet") != (self.alpha is not None):
            raise ValueError("alpha is needed for method dirichlet, and only there")
        return self


class SplitterParams(Frozen):
    """Which share of a party's rows goes where."""

    train: float | None = Field(
        default=None, gt=0, le=1, description="Share for training; None takes what validation and test leave."
    )
    validation: float = Field(default=0.0, ge=0, lt=1, description="Share for validation; 0 makes no such part.")
    test: float = Field(default=0.2, ge=0, lt=1, description="Share for testing; 0 makes no such part.")
    stratify: Literal["category"] | None = Field(
        default=None, description="`category` gives every part the same mix of categories."
    )
    partition: PartitionParams | None = Field(
        default=None,
        description="For experiments: all parties read the same data set and each keeps its own share.",
    )
    min_rows: int = Field(default=1, ge=1, description="A part with fewer rows than this is refused.")

    @model_validator(mode="after")
    def _shares_fit(self) -> SplitterParams:
        total = (self.train or 0.0) + self.validation + self.test
        if total > 1 + EPSILON or (self.train is None and total > 1 - EPSILON):
            raise ValueError(f"the shares add up to {total:g}; train needs something and all together at most 1")
        return self

    def shares(self) -> dict[str, float]:
        """Share by part, in the order train, validation, test, unused; they add up to 1."""
        rest = max(0.0, 1.0 - self.validation - self.test)
        train = rest if self.train is None else min(self.train, rest)
        return {"train": train, "validation": self.validation, "test": self.test, "unused": rest - train}


# --- Rows to parts ------------------------------------------------------------------------------------------


def split_rows(
    groups: Sequence[str | None], shares: Mapping[str, float], generator: np.random.Generator
) -> dict[str, list[int]]:
    """Rows of each part, ascending; every row is in exactly one part.

    groups: one label a row; each group is split for itself, with at most one row of difference to its exact
    share.
    shares: by part, adding up to 1; the first part (train) gets at least one row of every group.
    """
    members: dict[str | None, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    parts: dict[str, list[int]] = {name: [] for name in shares}
    owed = np.zeros(len(shares))
    for group in sorted(members, key=lambda label: (label is None, label or "")):
        counts, owed = _counts(len(members[group]), np.array(list(shares.values())), owed)
        rows = generator.permutation(members[group])
        for name, some in zip(parts, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            parts[name] += [int(row) for row in some]
    return {name: sorted(rows) for name, rows in parts.items()}


def _counts(size: int, shares: np.ndarray[Any, Any], owed: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Whole numbers near size x shares (largest remainder), and what rounding still owes each part.

    Carrying the debt from group to group keeps the totals near their shares too: twenty groups of two rows
    and a test share of 0.2 give eight test rows and not none.
    """
    exact = size * shares
    counts = np.floor(exact + EPSILON).astype(int)
    remainder = np.maximum(exact - counts, 0.0)
    debt = owed + exact - counts
    open_parts = remainder > EPSILON
    for _ in range(size - int(counts.sum())):
        first = open_parts[0] and counts[0] == 0
        chosen = 0 if first else int(np.argmax(np.where(open_parts, debt, -np.inf)))
        counts[chosen] += 1
        debt[chosen] -= 1
        open_parts[chosen] = False
    return counts, debt


# --- Rows to parties ----------------------------------------------------------------------------------------


def partition_rows(
    labels: Sequence[str | None],
    parties: Sequence[str],
    params: PartitionParams,
    seed: int,
    *,
    min_rows: int = 1,
) -> dict[str, list[int]]:
    """Rows of each party, ascending; every row belongs to exactly one. The same arguments give the same
    answer.

    labels: category (or key) of each row; not used for `iid`.

    Raises:
        DataError: fewer rows, categories or keys than parties, rows without a label, or no draw among DRAWS
        that
            leaves every party `min_rows` rows.
    """
    generator = np.random.default_rng(seed)
    if len(labels) < len(parties) * min_rows:
        raise DataError(f"partition: {len(labels)} rows are too few for {len(parties)} parties of {min_rows}")
    if params.method == "iid":
        return _shares(np.array_split(generator.permutation(len(labels)), len(parties)), parties)
    groups = _groups(labels, params.method)
    if params.method == "dirichlet":
        return _dirichlet(groups, parties, float(params.alpha or 1.0), generator, min_rows)
    return _whole_groups(groups, parties, params.method, generator, min_rows)


def _shares(rows: Iterable[Any], parties: Sequence[str]) -> dict[str, list[int]]:
    return {party: sorted(int(row) for row in some) for party, some in zip(parties, rows, strict=True)}


def _groups(labels: Sequence[str | None], method: str) -> list[list[int]]:
    """Rows by label, labels sorted."""
    what = "key" if method == "key" else "category"
    lacking = sum(label is None for label in labels)
    if lacking:
        raise DataError(
            f"partition by {method}: {lacking} of {len(labels)} rows have no {what}",
            hint=f"Name the field with the reader's fields.{what}, or use method: iid.",
        )
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(str(label), []).append(row)
    return [groups[label] for label in sorted(groups)]


def _dirichlet(
    groups: list[list[int]],
    parties: Sequence[str],
    alpha: float,
    generator: np.random.Generator,
    min_rows: int,
) -> dict[str, list[int]]:
    for _ in range(DRAWS):
        shares: list[list[int]] = [[] for _ in parties]
        for rows in groups:
            proportions = generator.dirichlet(np.full(len(parties), alpha))
            cuts = np.round(np.cumsum(proportions)[:-1] * len(rows)).astype(int)
            for share, some in zip(shares, np.split(generator.permutation(rows), cuts), strict=True):
                share += [int(row) for row in some]
        if min(len(share) for share in shares) >= min_rows:
            return _shares(shares, parties)
    raise DataError(
        f"partition: in {DRAWS} draws with alpha = {alpha:g} a party always had fewer than {min_rows} rows",
        hint="Raise alpha, lower min_rows, or take more data.",
    )


def _whole_groups(
    groups: list[list[int]],
    parties: Sequence[str],
    method: str,
    generator: np.random.Generator,
    min_rows: int,
) -> dict[str, list[int]]:
    """Each group to the party that has the fewest rows so far, groups in random order."""
    if len(groups) < len(parties):
        what = "keys" if method == "key" else "categories"
        raise DataError(f"partition by {method}: {len(groups)} {what} are too few for {len(parties)} parties")
    shares: list[list[int]] = [[] for _ in parties]
    for at in generator.permutation(len(groups)):
        min(shares, key=len).extend(groups[at])
    if min(len(share) for share in shares) < min_rows:
        raise DataError(f"partition by {method}: a party gets fewer than min_rows = {min_rows} rows")
    return _shares(shares, parties)


# --- The component ------------------------------------------------------------------------------------------


class Splitter:
    """Splits a party's rows into train, validation and test, at random but repeatably.

    Shares are of the party's rows. With `stratify: category` every category is split for itself, to within
    one row of its exact share, so that all parts have the same mix; a category with too few rows for all
    parts goes to training first, and the manifest names it. Rows without a category then count as one
    category more.

    `partition` is for experiments: every party reads the same data set, all of them compute the same
    partition from the job's seed, each keeps its own share and splits that. No row travels. `dirichlet`,
    `category` and `key` need rows that have a category or key; what cannot be done is refused at once.

    The manifest counts rows by part and category and, for a partition, by party.
    """

    Params: ClassVar[type[Frozen]] = SplitterParams
    inputs: ClassVar[Mapping[str, Port]] = {"data": Port(ArtifactKind.DATASET, "The records to split.")}
    outputs: ClassVar[Mapping[str, Port]] = {
        "train": Port(ArtifactKind.DATASET, "Rows for training."),
        "validation": Port(ArtifactKind.DATASET, "Rows for validation, when asked for.", required=False),
        "test": Port(ArtifactKind.DATASET, "Rows for testing, unless `test` is 0.", required=False),
        "manifest": Port(ArtifactKind.REPORT, "Counts by part, category and party; the seeds."),
    }
    predict_rule: ClassVar[PredictRule] = PassThrough("data")

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate(memory_bytes=PLAIN_PROCESS, notes=("about 16 bytes of memory a row; sends nothing",))

    def guest(self, ctx: Context) -> None:
        _split(ctx)

    def host(self, ctx: Context) -> None:
        _split(ctx)


def _split(ctx: Context) -> None:
    params: SplitterParams = ctx.params
    source = ctx.inputs["data"]
    if not isinstance(source, Artifact):
        raise DataError("splitter: `data` is one data set")
    dataset = Dataset(source.path)
    by_key = params.partition is not None and params.partition.method == "key"
    categories, keys = _labels(dataset, by_key=by_key)
    manifest: dict[str, Any] = {"source_sha256": dataset.sha256, "party": ctx.party}
    mine: Sequence[int] = range(len(dataset))
    if params.partition is not None:
        mine, manifest["partition"] = _my_share(ctx, params, categories, keys if by_key else categories)
    if params.stratify and not any(categories[row] is not None for row in mine):
        raise DataError(
            "stratify: category, but no row has a category",
            hint="Name its field with the reader's fields.category, or leave stratify out.",
        )
    seed = ctx.seed("splitter", ctx.task, "split", ctx.party)
    groups = [categories[row] if params.stratify else None for row in mine]
    places = split_rows(groups, params.shares(), np.random.default_rng(seed))
    parts = {part: [mine[place] for place in some] for part, some in places.items()}
    _require_rows(parts, params)
    manifest |= {"seed": seed, "parts": _part_counts(parts, categories)}
    manifest["not_in_every_part"] = _uneven(parts, categories) if params.stratify else []
    _write_parts(ctx, dataset, parts)
    _write_manifest(ctx.output("manifest"), manifest)
    ctx.emit("data", **{part: len(rows) for part, rows in parts.items()})


def _labels(dataset: Dataset, *, by_key: bool) -> tuple[list[str | None], list[str | None]]:
    """Category and key of every row; equal categories share one object, so a row costs a pointer."""
    seen: dict[str | None, str | None] = {}
    categories: list[str | None] = []
    keys: list[str | None] = []
    for record in dataset:
        categories.append(seen.setdefault(record.category, record.category))
        if by_key:
            keys.append(record.key)
    return categories, keys


def _my_share(
    ctx: Context, params: SplitterParams, categories: Sequence[str | None], labels: Sequence[str | None]
) -> tuple[list[int], dict[str, Any]]:
    assert params.partition is not None
    seed = ctx.seed("splitter", ctx.task, "partition", str(params.partition.seed))
    parties = ctx.cohort.contributors
    shares = partition_rows(labels, parties, params.partition, seed, min_rows=params.min_rows)
    counts = {party: _counted(rows, categories) for party, rows in shares.items()}
    return shares[ctx.party], {"method": params.partition.method, "seed": seed, "parties": counts}


def _counted(rows: Sequence[int], categories: Sequence[str | None]) -> dict[str, Any]:
    counts = Counter(categories[row] for row in rows)
    named = {name: count for name, count in counts.items() if name is not None}
    return {"rows": len(rows), "categories": dict(sorted(named.items())), "without_category": counts[None]}


def _part_counts(parts: Mapping[str, Sequence[int]], categories: Sequence[str | None]) -> dict[str, Any]:
    return {part: _counted(rows, categories) for part, rows in parts.items() if rows}


def _uneven(parts: Mapping[str, Sequence[int]], categories: Sequence[str | None]) -> list[str]:
    """Categories that are too small to be in every part."""
    present = [{str(categories[row]) for row in rows if categories[row] is not None} for rows in parts.values()]
    filled = [some for some, rows in zip(present, parts.values(), strict=True) if rows]
    return sorted({name for some in filled for name in some if not all(name in other for other in filled)})


def _require_rows(parts: Mapping[str, Sequence[int]], params: SplitterParams) -> None:
    for part, share in params.shares().items():
        if part != "unused" and share > 0 and len(parts[part]) < params.min_rows:
            raise DataError(
                f"{part} = {share:g} gives {len(parts[part])} rows, fewer than min_rows = {params.min_rows}",
                hint="Take more data, another share, or a lower min_rows.",
            )


def _write_parts(ctx: Context, dataset: Dataset, parts: Mapping[str, Sequence[int]]) -> None:
    fields = dataset.manifest["fields"]
    for part in PARTS:
        if not parts[part]:
            continue
        with DatasetWriter(
            ctx.output(part), template=dataset.template, fields=fields, source=dataset.manifest["source"]
        ) as writer:
            for row in parts[part]:
                writer.add(dataset[row])


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    folder.mkdir()
    text = json.dumps(manifest, ensure_ascii=False, indent=2)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    lines = [f"# Split of {manifest['party']}", "", "| part | category | rows |", "|---|---|---|"]
    tables = [("part", manifest["parts"]), ("party", manifest.get("partition", {}).get("parties", {}))]
    for what, table in tables:
        if what == "party" and table:
            lines += ["", "| party | category | rows |", "|---|---|---|"]
        for name, counts in table.items():
            lines += [f"| {name} | {category} | {n} |" for category, n in counts["categories"].items()]
            lines.append(f"| {name} | all | {counts['rows']} |")
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


PLUGIN = Splitter
