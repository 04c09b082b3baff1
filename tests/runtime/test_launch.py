"""How a worker of several ranks is started, and how rank 0 and the others hear of each other."""

from __future__ import annotations

import itertools
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from fate_llm.core.errors import ConfigurationError, DataError, InternalError
from fate_llm.core.interfaces import Context
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Role
from fate_llm.pipelines.check import check
from fate_llm.runtime import follower, launch
from fate_llm.runtime.assign import assignments
from fate_llm.runtime.follower import Follower, FollowerContext
from fate_llm.runtime.launch import LaunchSettings, command
from tests.conftest import PATIENCE

PIPELINE = {
    "version": 1,
    "name": "ranks",
    "parties": {"guest": "a", "hosts": ["b"], "arbiter": "z"},
    "tasks": {
        "data": {"component": "words"},
        "tune": {"component": "words", "params": {"word": "tuned"}},
    },
    "job": {"seed": 11},
}


NUMBERS = itertools.count()


class TestCommand:
    def test_one_rank_is_a_plain_worker(self) -> None:
        assert command(LaunchSettings()) == [sys.executable, "-m", "fate_llm.runtime.worker"]

    def test_several_ranks_are_started_by_torchrun(self) -> None:
        found = command(LaunchSettings(nproc=4))
        assert found[1:3] == ["-m", "torch.distributed.run"]
        assert "--nproc-per-node=4" in found
        assert found[-2:] == ["-m", "fate_llm.runtime.launch"]

    def test_deepspeed_needs_torchrun_for_one_rank_too(self) -> None:
        assert "--nproc-per-node=1" in command(LaunchSettings(deepspeed={"zero_optimization": {"stage": 2}}))

    @pytest.mark.parametrize("nproc", [0, 65, -1, "two"])
    def test_counts_that_cannot_be(self, nproc: Any) -> None:
        with pytest.raises(ValidationError, match="nproc"):
            LaunchSettings(nproc=nproc)


class TestDeepSpeed:
    @pytest.mark.parametrize(
        "found",
        [
            {},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}},
            {"zero_optimization": {"stage": 3}, "train_batch_size": "auto", "fp16": {"enabled": False}},
        ],
    )
    def test_what_is_the_trainers_is_left_open(self, found: dict[str, Any], tmp_path: Path) -> None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(found))
        for settings in (LaunchSettings(deepspeed=found), LaunchSettings(deepspeed=file)):
            made = settings.order()["deepspeed"]
            assert made["zero_optimization" if found else "gradient_clipping"] == found.get("zero_optimization", "auto")
            assert made["train_micro_batch_size_per_gpu"] == made["train_batch_size"] == "auto"
            assert made["zero_allow_untested_optimizer"] is True
            assert json.loads(json.dumps(made)) == made

    @pytest.mark.parametrize(
        ("found", "text"),
        [
            ({"optimizer": {"type": "Adam"}}, "optimizer"),
            ({"scheduler": {}}, "scheduler"),
            ({"train_batch_size": 8}, "train_batch_size is 8"),
            ({"zero_optimization": {"stage": 4}}, r"stage is 4; valid: 0, 1, 2, 3"),
            ({"zero_optimization": {"stage": True}}, "stage is True"),
            ({"zero_optimization": 2}, "stage"),
            ({"fp16": {"enabled": True}}, "fp16"),
            ({"fp16": {"enabled": "auto"}}, "fp16"),
        ],
    )
    def test_what_is_the_pipelines_is_refused(self, found: dict[str, Any], text: str) -> None:
        with pytest.raises(ConfigurationError, match=text):
            command(LaunchSettings(deepspeed=found))

    @pytest.mark.parametrize(("content", "text"), [(None, "cannot be read"), ("{", "JSON"), ("[1]", "list")])
    def test_a_file_that_is_none_is_named(self, tmp_path: Path, content: str | None, text: str) -> None:
        file = tmp_path / "ds.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigurationError, match=text) as caught:
            command(LaunchSettings(deepspeed=file))
        assert "ds.json" in caught.value.message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SimpleNamespace]]:
    """Rank 0's end, what it said and the exit that it took; and a way to join it as another rank."""
    made: list[SimpleNamespace] = []

    def make() -> SimpleNamespace:
        found = SimpleNamespace(said=[], exits=queue.Queue(), sockets=[])

        monkeypatch.setattr(os, "_exit", found.exits.put)
        address = f"\0fate_llm-test-{os.getpid()}-{next(NUMBERS)}"
        order = {"party": "a", "pipeline": PIPELINE, "base": "/b", "folder": "/f", "launch": {"nproc": 2}}
        found.hub = launch._Hub(address, {**order, "identity": "SECRET", "broker": "SECRET"}, found.said.append)

        def join() -> Any:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(PATIENCE)
            connection.connect(address)
            found.sockets.append(connection)
            return connection

        found.join = join
        made.append(found)
        return found

    yield make
    for each in made:
        each.hub.close()
        for connection in each.sockets:
            connection.close()


MakeHub = Callable[[], SimpleNamespace]


class TestHub:
    def test_a_rank_hears_the_order_without_its_secrets_and_every_task(self, hub: MakeHub) -> None:
        found = hub()
        found.hub.go("early")
        lines = found.join().makefile()
        first = lines.readline()
        assert "SECRET" not in first
        assert json.loads(first)["order"]["launch"] == {"nproc": 2}
        assert json.loads(lines.readline()) == {"go": "early"}
        found.hub.go("late")
        assert json.loads(lines.readline()) == {"go": "late"}

    def test_its_end_is_the_end_of_the_stream(self, hub: MakeHub) -> None:
        found = hub()
        connection = found.join()
        stream = connection.makefile()
        stream.readline()
        found.hub.close()
        assert stream.readline() == ""
        connection.close()
        assert found.exits.empty()

    def test_an_error_at_another_rank_is_the_partys_error(self, hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "_GRACE", 0.0)
        found = hub()
        connection = found.join()
        error = DataError("no such record").as_dict()
        connection.sendall((json.dumps({"rank": 3}) + "\n" + json.dumps({"rank": 3, "error": error}) + "\n").encode())
        assert found.exits.get(timeout=PATIENCE) == 1
        assert found.said == [{"end": {"error": {**error, "message": "rank 3: no such record"}}}]

    def test_an_error_that_rank_0_has_found_as_well_is_told_by_itself(self, hub: MakeHub) -> None:
        found = hub()
        connection = found.join()
        connection.makefile().readline()
        connection.sendall((json.dumps({"rank": 1, "error": DataError("twice").as_dict()}) + "\n").encode())
        found.hub.close()
        until = time.monotonic() + PATIENCE
        while any(thread.name == "rank" for thread in threading.enumerate()) and time.monotonic() < until:
            time.sleep(0.01)  # one that is about to start cannot be joined
        assert (found.said, found.exits.empty()) == ([], True)

    def test_a_rank_that_dies_takes_rank_0_with_it_without_a_word(self, hub: MakeHub) -> None:
        found = hub()
        connection = found.join()
        connection.sendall(b'{"rank": 1}\n')
        connection.close()
        assert found.exits.get(timeout=PATIENCE) == 1
        assert found.said == [], "an end would be the job's; without one the worker is started again"

    def test_who_belongs_to_somebody_else_hears_nothing(self, hub: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        found = hub()
        monkeypatch.setattr(launch, "_user_of", lambda connection: os.getuid() + 1)
        assert found.join().makefile().readline() == ""


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from fate_llm.core import plugins
    from tests.runtime import toys

    monkeypatch.setattr(plugins, "_installed", toys.installed)
    launching = {"nproc": 2, "deepspeed": None}
    return {
        "party": "a",
        "pipeline": check(PIPELINE).to_data(),
        "base": str(tmp_path),
        "folder": str(tmp_path / "job"),
        "launch": launching,
        "catalog": {"loans": str(tmp_path / "loans.jsonl")},
    }


class TestFollower:
    def test_it_runs_ranked_roles_only(
        self, order: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[tuple[str, Any]] = []
        real = follower.plugins.load("component", "words")

        class Ranked(real):  # type: ignore[misc, valid-type]
            ranked = frozenset({Role.GUEST})

            def guest(self, ctx: Context) -> None:
                ran.append((ctx.task, ctx.params.word))

        found = Follower(order, tmp_path / "away")
        found.run("data")
        assert ran == [], "this component has no ranked roles"
        monkeypatch.setattr(follower.plugins, "load", lambda kind, name: Ranked)
        found.run("tune")
        assert ran == [("tune", "tuned")]
        Follower({**order, "party": "b"}, tmp_path / "away").run("tune")
        assert len(ran) == 1, "b is a host"

    def test_its_context_sees_what_rank_0_sees_and_touches_nothing(self, order: dict[str, Any], tmp_path: Path) -> None:
        found = Follower(order, tmp_path / "away")
        plan = assignments(found.spec)["a"]
        ctx = FollowerContext(found, plan[1], Role.GUEST, {})
        assert (ctx.party, ctx.task, ctx.params.word) == ("a", "tune", "tuned")
        assert ctx.seed("x", "y") == derive_seed(11, "x", "y")
        assert ctx.scratch() == found.folder.scratch("tune")
        assert ctx.resolve("m") == tmp_path / "m"
        assert ctx.resolve("catalog:loans") == tmp_path / "loans.jsonl"
        assert tmp_path / "away" in ctx.output("model").parents
        assert ctx.shared("k", lambda: [1]) is ctx.shared("k", lambda: [2])
        ctx.emit("round", loss=1.0)
        ctx.log_metrics({"loss": 1.0}, step=1)
        assert not list((tmp_path / "job").rglob("*.jsonl"))
        with pytest.raises(DataError, match="other"):
            ctx.resolve("catalog:other")

    def test_what_only_rank_0_can_do_is_refused(self, order: dict[str, Any], tmp_path: Path) -> None:
        found = Follower(order, tmp_path / "away")
        ctx = FollowerContext(found, assignments(found.spec)["a"][0], Role.GUEST, {})
        rounds = ctx.contributor_rounds(3, protection="plain")
        for refused in (
            lambda: ctx.channel,
            lambda: ctx.coordinator_rounds(3, protection="plain"),
            lambda: rounds.start({}),
            lambda: iter(rounds),
        ):
            with pytest.raises(InternalError, match="only rank 0"):
                refused()

    def test_deepspeed_is_for_this_process_alone(
        self, order: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fate_llm.components.llm.ranks import deepspeed_settings

        monkeypatch.delenv("FATE_LLM_DEEPSPEED", raising=False)
        assert deepspeed_settings() is None
        monkeypatch.setenv("FATE_LLM_DEEPSPEED", "")  # put back at the end
        Follower({**order, "launch": {"nproc": 2, "deepspeed": {"bf16": {"enabled": True}}}}, tmp_path)
        assert deepspeed_settings() == {"bf16": {"enabled": True}}


def test_no_thread_is_left(hub: MakeHub) -> None:
    found = hub()
    connection = found.join()
    connection.makefile().readline()
    found.hub.close()
    connection.close()
    for thread in threading.enumerate():
        if thread.name in ("ranks", "rank"):
            thread.join(PATIENCE)
            assert not thread.is_alive()
