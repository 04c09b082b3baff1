"""Outputs of a job at this party: where they lie, taken over from an earlier job, and models with their history."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fate_llm.core.errors import DataError
from fate_llm.core.values import ArtifactKind
from fate_llm.pipelines.graph import waits_for

from ..artifacts.models import DataFingerprint
from ..store.rows import TaskRow
from .cases import Case
from .hall import Hall
from .words import Ending

__all__ = ["Keeping", "is_kept", "known_initiators"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FEW = 5  # rows of jobs


def is_kept(row: TaskRow) -> bool:
    """Whether a task's outputs are among the artifacts; until then its row has their paths."""
    return all(_DIGEST.fullmatch(value) for value in row.outputs.values())


def known_initiators(hall: Hall) -> set[str]:
    """Of whom a job was let in before: by the policy, or by a person where the policy wanted one."""
    return {initiator for initiator in hall.store.initiators() if _was_let_in(hall, initiator)}


def _was_let_in(hall: Hall, initiator: str) -> bool:
    """Looked up with each decision, and a row is large: the newest few nearly always tell."""
    for after, most in ((0, _FEW), (_FEW, 1000)):
        rows = hall.store.jobs(lead=False, initiator=initiator, offset=after, limit=most)
        if any(row.machine.get("verdict") == "accept" or row.machine.get("approved") for row in rows):
            return True
    return False


class Keeping:
    """`take_over` and `register_models` read and write much: for the clerk's thread."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def outputs(self, case: Case, task: str) -> dict[str, str]:
        """Paths of a task's outputs that are in the job's folder, by name."""
        found = {name: case.own.path / task / name for name in case.spec.component(task).outputs}
        return {name: str(path) for name, path in found.items() if path.exists()}

    def missing(self, case: Case) -> list[str]:
        """Tasks whose outputs are to be taken over and are not kept here, or not as this very job would make them."""
        kept = self._kept(case) if self._same(case) else {}
        mine = [task for task in case.reused if task in case.tasks]
        return [task for task in mine if task not in kept or not all(map(self._is_there, kept[task].values()))]

    def _is_there(self, digest: str) -> bool:
        try:
            return self._hall.artifacts.ref(digest) is not None
        except DataError:  # it is damaged
            return False

    def _same(self, case: Case) -> bool:
        """Whether the earlier job was of the same initiator and the same pipeline, and nothing that is run again feeds
        what is taken over. Else a partner could have what another's job, or another task, made of our data.
        """
        reuse = case.signed.specification.reuse
        row = None if reuse is None else self._hall.store.job(reuse.job)
        if reuse is None or row is None:
            return False
        earlier = row.specification["specification"]
        before = waits_for(case.spec)
        closed = all(set(before[task]) <= set(reuse.tasks) for task in reuse.tasks)
        same = earlier["pipeline"] == case.signed.specification.to_data()["pipeline"]
        return closed and same and row.initiator == case.initiator

    def _kept(self, case: Case) -> dict[str, dict[str, str]]:
        """Digests of outputs of the earlier job, by task and name."""
        reuse = case.signed.specification.reuse
        rows = [] if reuse is None else self._hall.store.tasks(reuse.job)
        return {row.task: row.outputs for row in rows if row.state == "success" and is_kept(row)}

    def take_over(self, case: Case) -> None:
        """Copy the outputs of an earlier job into this one's folder."""
        kept = self._kept(case) if self._same(case) else {}
        for task in (task for task in case.reused if task in case.tasks):
            for name, digest in kept[task].items():
                place = case.own.output(task, name)
                if not place.exists():
                    partial = place.with_name(f"{place.name}.partial")
                    shutil.rmtree(partial, ignore_errors=True)
                    self._hall.artifacts.get(digest, partial)
                    partial.rename(place)

    def register_models(self, case: Case, ending: Ending) -> None:
        """Enter the models of a job that has succeeded, with where they come from."""
        data = self._data(case)
        for task in case.tasks:
            ports = case.spec.component(task).outputs
            outputs = self.outputs(case, task)
            metrics = self._metrics(outputs)
            for name, path in outputs.items():
                if ports[name].kind is ArtifactKind.MODEL and (Path(path) / "fate_model.json").is_file():
                    record = self._hall.models.register(
                        Path(path),
                        name=f"{case.spec.name}.{task}"[:64],
                        job=case.job,
                        task=task,
                        party=self._hall.me,
                        created=self._hall.now(),
                        parties=case.spec.members,
                        data=data,
                        metrics=metrics,
                        policy=case.accepted().policy,
                        specification=case.signed.digest,
                    )
                    self._hall.say(f"{case.job}: registered {record.name}@{record.version}")

    def _data(self, case: Case) -> list[DataFingerprint]:
        catalog = self._hall.catalog()
        names = [name for name in case.accepted().opens if name in catalog.paths()]
        found = [(name, catalog.fingerprint(name, self._hall.fingerprints)) for name in names]
        return [DataFingerprint(name=name, digest=print_.digest, records=print_.records) for name, print_ in found]

    def _metrics(self, outputs: dict[str, str]) -> dict[str, Any]:
        """Numbers of a task's metrics file."""
        path = outputs.get("metrics")
        if path is None or not Path(path).is_file():
            return {}
        try:
            found = json.loads(Path(path).read_text())
        except ValueError:
            return {}
        rows = found.get("rounds") if isinstance(found, dict) else None
        last = rows[-1] if isinstance(rows, list) and rows and isinstance(rows[-1], dict) else {}
        return {key: value for key, value in last.items() if isinstance(value, int | float)}
