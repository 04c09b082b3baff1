"""The models that this party has trained with others: which there are, where they come from, and copies to use.

A model is an artifact (a PEFT folder or a Hugging Face model folder) with a name, a version and its lineage. What is
exported is that folder with a model card and the lineage beside it; an adapter can be merged into its base model, which
gives a folder that `transformers` and serving engines load directly.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fate_llm.core.canonical import digest_folder
from fate_llm.core.errors import ConfigurationError, InternalError, ModelError
from fate_llm.core.interfaces import Frozen
from fate_llm.core.names import NAME_PATTERN, is_name, nearest
from fate_llm.core.values import ArtifactKind
from fate_llm.security.randomness import random_id

from ..jobfolder import write_json
from ..store.rows import ModelRow
from ..store.store import Store
from .card import model_card
from .store import ArtifactRef, ArtifactStore

__all__ = ["MERGING", "DataFingerprint", "ModelRecord", "ModelRegistry", "merge_adapter"]

MERGING = "fate_llm.components.llm.merging"
"""Run as a process: `python -m MERGING ADAPTER OUT`. It has torch, and this layer has not."""

_ABOUT = "fate_model.json"
_MOST_ABOUT = 1024 * 1024  # bytes
_LEAST_PREFIX = 6  # hex digits of a digest that stand for it
_CARD, _LINEAGE = "README.md", "lineage.json"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DataFingerprint(Frozen):
    """A data set that a model was trained on: what can be told of it without showing it. party: whose it is."""

    name: str
    party: str = ""
    digest: Digest
    records: int | None = Field(None, ge=0)


class ModelRecord(Frozen):
    """A registered model and its lineage.

    digest: of its folder, `core.canonical.digest_folder`. party: who registered it. parties: all of the job. created:
    seconds since the epoch. base: the base model as the pipeline names it. data: the data sets of this party, and of
    others as far as they told. privacy: spent on the training. policy: digest of this party's, that let the job run.
    specification: digest of the signed job.
    """

    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    digest: Digest
    kind: Literal["adapter", "full"]
    job: str
    task: str
    party: str
    created: float
    base: dict[str, Any]
    parties: tuple[str, ...]
    data: tuple[DataFingerprint, ...] = ()
    privacy: str = "none"
    watermarks: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, Any] = Field(default_factory=dict)
    policy: str = ""
    specification: str = ""

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"


def merge_adapter(adapter: Path, out: Path) -> None:
    """Merge an adapter into its base model, in a process of its own: this one has no torch.

    Raises:
        ModelError: the process ended with an error; the message has its last words.
    """
    command = [sys.executable, "-m", MERGING, str(adapter), str(out)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()][-3:]
        raise ModelError(
            f"the adapter cannot be merged (exit code {done.returncode}): {' '.join(said) or 'it said nothing'}",
            hint="The base model must be where the adapter's fate_model.json says, and fate_llm[train] installed.",
        )


class ModelRegistry:
    """Names, versions and lineage in the store, folders among the artifacts."""

    def __init__(self, store: Store, artifacts: ArtifactStore, *, unique: Callable[[], str] = random_id) -> None:
        self._store, self._artifacts, self._unique = store, artifacts, unique

    def register(
        self,
        source: Path | ArtifactRef,
        *,
        name: str,
        job: str,
        task: str,
        party: str,
        created: float,
        parties: Sequence[str],
        data: Sequence[DataFingerprint] = (),
        privacy: str = "none",
        watermarks: Sequence[Mapping[str, Any]] = (),
        metrics: Mapping[str, Any] | None = None,
        policy: str = "",
        specification: str = "",
    ) -> ModelRecord:
        """Register what a task put out as a model; again (after a crash) it is the version that it has already.

        source: the folder, or the artifact it has become.

        Raises:
            ModelError: it is no model that a trainer of ours wrote. ConfigurationError: the name is none.
        """
        if not is_name(name):
            raise ConfigurationError(
                f"a model cannot be called {name!r}", hint="1 to 64 small letters, digits, `_`, `-`, `.`"
            )
        ref = self._artifacts.put(source, kind=ArtifactKind.MODEL) if isinstance(source, Path) else source
        about = self._about(ref.digest)
        content = {
            "kind": about["kind"],
            "party": party,
            "base": about["base"],
            "parties": list(parties),
            "data": [one.model_dump() for one in data],
            "privacy": privacy,
            "watermarks": [dict(one) for one in watermarks],
            "metrics": _finite(dict(metrics or {})),
            "policy": policy,
            "specification": specification,
        }
        checked = ModelRow(name, 1, ref.digest, job, task, created, content)
        _record(checked)
        row = self._store.add_model(name=name, digest=ref.digest, job=job, task=task, created=created, content=content)
        return _record(row)

    def _about(self, digest: str) -> dict[str, Any]:
        if _ABOUT not in self._artifacts.contents(digest):
            raise ModelError(
                f"artifact {digest[:12]} has no {_ABOUT}", hint="Register the folder that a trainer wrote."
            )
        try:
            about = json.loads(self._artifacts.read(digest, _ABOUT, most=_MOST_ABOUT))
        except ValueError:
            about = None
        known = isinstance(about, dict) and about.get("format") == 1 and about.get("kind") in ("adapter", "full")
        if not known or not isinstance(about.get("base"), dict):
            raise ModelError(f"{_ABOUT} of artifact {digest[:12]} is of another version, or damaged")
        return about  # type: ignore[no-any-return]

    def list(self, *, name: str | None = None) -> list[ModelRecord]:
        """All registered models, newest first; or the versions of one name."""
        return [_record(row) for row in self._store.models(name=name)]

    def show(self, which: str) -> ModelRecord:
        """The model that NAME (its newest version), NAME@VERSION or the beginning of a digest stands for.

        Raises:
            ModelError: none, or more than one.
        """
        name, at, version = which.partition("@")
        found = self._store.models(name=name)
        if at and not re.fullmatch(r"[1-9]\d{0,8}", version):
            raise ModelError(f"{version!r} in {which!r} is no version", hint="NAME@VERSION, a version is 1, 2, ...")
        if at and found:
            by_version = {row.version: row for row in found}
            if int(version) not in by_version:
                there = ", ".join(map(str, sorted(by_version)))
                raise ModelError(f"model {name} has no version {version}", hint=f"It has {there}.")
            return _record(by_version[int(version)])
        if not found and re.fullmatch(f"[0-9a-f]{{{_LEAST_PREFIX},64}}", which):
            found = self._store.models(digest=which)
            if len({row.digest for row in found}) > 1:
                raise ModelError(f"{len(found)} models have a digest that begins with {which}", hint="Give more of it.")
        if not found:
            known = {row.name for row in self._store.models()}
            hint = nearest(name, known) or "No model is registered at this party."
            raise ModelError(f"no model {which!r} at this party", hint=hint)
        return _record(max(found, key=lambda row: row.version))

    def export(
        self,
        which: str,
        out: Path,
        *,
        merged: bool = False,
        merge: Callable[[Path, Path], None] = merge_adapter,
    ) -> ModelRecord:
        """Copy a model to `out`, which must not exist, with a model card and its lineage: whole or not at all.

        merged: an adapter inside its base model, as an ordinary Hugging Face folder; a whole model is copied as it is.

        Raises:
            ModelError: no such model, or it cannot be merged. DataError: its artifact is damaged or gone.
            ConfigurationError: `out` exists or cannot be written.
        """
        record, out = self.show(which), Path(os.path.abspath(out))
        if out.is_symlink() or out.exists():
            raise ConfigurationError(f"{out} exists, and is not overwritten", hint="Name another folder.")
        work = out.with_name(f".{out.name}.{self._unique()}.partial")
        try:
            work.mkdir(parents=True)
            folder = work / "model"
            self._artifacts.get(record.digest, folder)
            if merged and record.kind == "adapter":
                merge(folder, work / "merged")
                folder = work / "merged"
            self._describe(record, folder)
            os.rename(folder, out)
        except OSError as error:
            raise ConfigurationError(f"{out} cannot be written: {error.strerror}", hint="Name another place.") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return record

    def _describe(self, record: ModelRecord, folder: Path) -> None:
        """Put the card and the lineage into a folder; the lineage has the digest of all that lies there besides."""
        if not folder.is_dir():
            raise InternalError("the merged model is not where it was asked for")
        for name in (_CARD, _LINEAGE):
            (folder / name).unlink(missing_ok=True)
        merged = not (folder / "adapter_config.json").is_file()
        model = record.model_dump(mode="json")
        form = "full" if record.kind == "full" else "merged" if merged else "adapter"
        write_json(
            folder / _LINEAGE, {"format": 1, "form": form, "files_digest": digest_folder(folder), "model": model}
        )
        (folder / _CARD).write_text(model_card(model, form=form), encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a loss that ran away becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(row: ModelRow) -> ModelRecord:
    known = {
        "name": row.name,
        "version": row.version,
        "digest": row.digest,
        "job": row.job,
        "task": row.task,
        "created": row.created,
    }
    try:
        return ModelRecord.model_validate({**row.content, **known})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"the record of model {row.name}@{row.version} is not valid: {where}: {first['msg']}",
            hint="Register the model again.",
        ) from None
