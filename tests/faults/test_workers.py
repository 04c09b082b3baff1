"""Workers killed by SIGKILL over a real broker, and started again as a party's service does: the same bits at the end.

The service of these tests is a small one: it starts each party's worker with the same order until it ends with a word,
and tells the others who has left.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core import plugins
from fate_llm.pipelines import check
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.jobfolder import JobFolder
from fate_llm.security.identity import Identity
from tests.runtime import toys
from tests.runtime.durable_world import DurableWorld

from .links import loopback, nothing_on
from .mortal import Mortal

pytestmark = pytest.mark.slow
ENDS = 90.0  # seconds after which a job that has not ended hangs
TIMING = {"linger": 60.0, "probe": 0.3, "report": 0.05}


def pipeline(*, arbiter: bool = True, **params: Any) -> dict[str, Any]:
    data = toys.toy_pipeline(steps={"component": "stepper", "params": {"rounds": 3, "encode": True, **params}})
    data["parties"]["hosts"] = ["b"]
    data["job"]["round_deadline"] = "60s"
    if not arbiter:
        del data["parties"]["arbiter"]
    return data


class Service:
    """The workers of all parties of one attempt at a job.

    deaths: by party, `<spot>/<before or after>/<number>` of its first life; see `tests.faults.mortal`.
    """

    def __init__(
        self,
        folder: Path,
        site: Path,
        data: dict[str, Any],
        node: BrokerNode,
        deaths: Mapping[str, str],
        *,
        at: Callable[[str, dict[str, Any]], None] | None = None,
        attempt: int = 1,
    ) -> None:
        self.spec = check(data)
        self.folder, self.site = folder, site
        self.job = JobFolder(folder / "job")
        self.ends: dict[str, dict[str, Any]] = {}
        self.lives: dict[str, int] = dict.fromkeys(self.spec.members, 0)
        self.workers: dict[str, Mortal] = {}
        self.deaths, self.at, self.attempt, self.node = deaths, at, attempt, node
        identities = {
            name: Identity(bytes([attempt, number]) * 16) for number, name in enumerate(self.spec.members, start=1)
        }
        self._orders = {name: self._order(name, identity, identities) for name, identity in identities.items()}
        self._lock = threading.Lock()
        self._over = False

    def _order(self, name: str, identity: Identity, identities: Mapping[str, Identity]) -> dict[str, Any]:
        return {
            "job": self.folder.name,
            "attempt": self.attempt,
            "party": name,
            "pipeline": self.spec.to_data(),
            "base": str(self.folder),
            "folder": str(self.job.path),
            "slot": str(self.folder / "machine.lock"),
            "broker": loopback(self.node.url()),
            "identity": identity.to_bytes().hex(),
            "roster": {other: key.public.to_text() for other, key in identities.items()},
            "finished": {},
            "timing": TIMING,
            "durable": True,
            "orphan": "exit",
        }

    def run(self) -> Service:
        """All workers to their ends."""
        try:
            for name in self.spec.members:
                self.job.party(name)
                self._start(name)
            readers = [threading.Thread(target=self._keep, args=(name,), daemon=True) for name in self.spec.members]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(ENDS)
            hanging = [name for name in self.spec.members if name not in self.ends]
            assert not hanging, f"these have not ended: {hanging}; {self.said()}"
        finally:
            self._over = True
            for process in self.workers.values():
                process.close()
        return self

    def _start(self, name: str) -> None:
        self.lives[name] += 1
        errors, marker = self.job.path / f"{name}.stderr", self.folder / f"died-{name}"
        self.workers[name] = Mortal(errors, self.site, self.deaths.get(name, ""), marker)
        self._say(name, self._orders[name])
        for other in tuple(self.ends):
            self._say(name, {"left": other})

    def _say(self, name: str, message: Mapping[str, Any]) -> None:
        pipe = self.workers[name].stdin
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has died, and the next is told
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

    def _keep(self, name: str) -> None:
        """Hear a party's worker, and start it again until it ends with a word."""
        while not self._over:
            for line in self.workers[name].stdout:
                message = json.loads(line) if line.endswith("\n") else {}
                if "end" in message:
                    self._ended(name, message["end"])
                    return
                if "event" in message and self.at is not None:
                    self.at(name, {"event": message["event"][0], **message["event"][4]})
            if not self._over:
                self.workers[name].close()
                self._start(name)

    def _ended(self, name: str, end: dict[str, Any]) -> None:
        with self._lock:
            self.ends[name] = end
            for other in self.spec.members:
                if other not in self.ends:
                    self._say(other, {"left": name})

    def said(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.job.path.glob("*.stderr")))

    def models(self) -> dict[str, bytes]:
        errors = {name: end["error"] for name, end in self.ends.items() if end["error"]}
        assert not errors, (errors, self.said())
        return {
            name: Path(end["outputs"]["steps"]["model"]).read_bytes()
            for name, end in self.ends.items()
            if "model" in end["outputs"]["steps"]
        }


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], bytes]]:
    """The model of an undisturbed run, made without a broker or a process."""
    patches = pytest.MonkeyPatch()
    patches.setattr(plugins, "_installed", toys.installed)
    found: dict[bool, bytes] = {}

    def get(arbiter: bool) -> bytes:
        if arbiter not in found:
            world = DurableWorld(tmp_path_factory.mktemp("quiet"), pipeline(arbiter=arbiter), patches).run()
            (found[arbiter],) = set(world.outputs().values())
        return found[arbiter]

    yield get
    patches.undo()


@pytest.fixture
def serve(
    tmp_path: Path, node: BrokerNode, monkeypatch: pytest.MonkeyPatch, wanted: Callable[[bool], bytes]
) -> Callable[..., Service]:
    """Run a job with these deaths; it must end in success with the bits of an undisturbed run, and leave nothing."""
    toys.install(tmp_path / "site")
    monkeypatch.setattr(plugins, "_installed", toys.installed)

    def go(deaths: Mapping[str, str], *, arbiter: bool = True, **settings: Any) -> Service:
        folder = tmp_path / f"job{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        service = Service(folder, tmp_path / "site", pipeline(arbiter=arbiter), node, deaths, **settings).run()
        assert set(service.models().values()) == {wanted(arbiter)}, deaths
        assert {name for name in service.lives if (folder / f"died-{name}").exists()} == deaths.keys(), "all have died"
        assert all(service.lives[name] >= 2 for name in deaths)
        assert not list(folder.glob("job/parties/*/link")), "no journal of a link is left"
        nothing_on(node)
        return service

    return go


CELLS = {
    "a contributor in the agreement": ({"b": "agree/after/1"}, True),
    "a contributor in local work": ({"b": "work/after/2"}, True),
    "a contributor in the middle of a send": ({"b": "chunk/after/2"}, True),
    "a contributor after sending": ({"b": "send/after/3"}, True),
    "the arbiter after its journal, before telling": ({"z": "commit/after/3"}, True),
    "the arbiter in the final sum": ({"z": "commit/after/6"}, True),
    "the arbiter at its end": ({"z": "done/after/1"}, True),
    "the guest that coordinates, after its journal": ({"a": "commit/after/4"}, False),
    "both contributors, before the agreement and after a journal": (
        {"a": "start/before/1", "b": "commit/after/3"},
        True,
    ),
    "the arbiter and a contributor": ({"z": "collect/before/2", "b": "contribute/before/2"}, True),
    "all of them at the end": ({"a": "note/after/1", "b": "ended/after/1", "z": "close/after/1"}, True),
}


@pytest.mark.parametrize("cell", CELLS)
def test_killed_workers_go_on_bit_by_bit(serve: Callable[..., Service], cell: str) -> None:
    deaths, arbiter = CELLS[cell]
    serve(deaths, arbiter=arbiter)


def test_the_broker_and_a_worker_killed_at_once(serve: Callable[..., Service], node: BrokerNode) -> None:
    killed = threading.Event()

    def power_cut() -> None:
        node.kill()
        node.start(60)

    def at(name: str, event: dict[str, Any]) -> None:
        if event["event"] == "round_state" and name == "a" and not killed.is_set():
            killed.set()
            threads.append(threading.Thread(target=power_cut))
            threads[0].start()

    threads: list[threading.Thread] = []
    serve({"b": "work/after/2"}, at=at)
    threads[0].join(60)
