"""The folder that holds everything of one job on one machine.

    <workdir>/<job id>/
      manifest.json        status, versions, seeds, digests of pipeline and outputs
      pipeline.yaml        the pipeline as it was resolved
      metrics.json         what `submit` prints as metrics
      parties/<party>/     log.txt, events.jsonl, metrics.jsonl, <task>/<output>, scratch/<task>/;
                           of a party that outlives its process: finished.json, ended.json, journal/, link/

JSON files are replaced whole (written beside, then renamed), lines are appended and flushed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fate_llm.core.canonical import digest_folder
from fate_llm.core.errors import ConfigurationError

__all__ = ["JobFolder", "PartyFolder", "write_json"]


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON of `value`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


class PartyFolder:
    """One party's part of a job folder. Appending is thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()

    def output(self, task: str, name: str) -> Path:
        """Where an output of a task belongs; its parent exists."""
        folder = self.path / task
        folder.mkdir(exist_ok=True)
        return folder / name

    def scratch(self, task: str) -> Path:
        """A folder for a task's own use."""
        folder = self.path / "scratch" / task
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear(self, task: str, *, scratch: bool = True) -> None:
        """Remove what an earlier attempt at a task left behind. scratch: also what it keeps for itself."""
        shutil.rmtree(self.path / task, ignore_errors=True)
        if scratch:
            shutil.rmtree(self.path / "scratch" / task, ignore_errors=True)

    def append(self, file: str, value: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        self.append_text(file, json.dumps(value, ensure_ascii=False, default=str))

    def append_text(self, file: str, line: str) -> None:
        """Append one line of text."""
        with self._lock, (self.path / file).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


class JobFolder:
    """A job's folder. Creating it twice is refused: a job never writes into another job's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._manifest: dict[str, Any] = {}

    @classmethod
    def create(cls, workdir: Path, job_id: str) -> JobFolder:
        """Make the folder of a new job.

        Raises:
            ConfigurationError: the folder exists, or cannot be made.
        """
        path = workdir / job_id
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except OSError as error:
            raise ConfigurationError(f"the job folder {path} cannot be made: {error.strerror}") from None
        return cls(path)

    def party(self, name: str) -> PartyFolder:
        return PartyFolder(self.path / "parties" / name)

    def update_manifest(self, **values: Any) -> None:
        """Set keys of manifest.json."""
        with self._lock:
            self._manifest.update(values)
            write_json(self.path / "manifest.json", self._manifest)

    def digests(self, outputs: Mapping[str, Mapping[str, Mapping[str, str]]]) -> dict[str, str]:
        """SHA-256 of every output, by `party/task/output`."""
        return {
            f"{party}/{task}/{name}": digest_folder(Path(path))
            for party, tasks in outputs.items()
            for task, found in tasks.items()
            for name, path in found.items()
        }
