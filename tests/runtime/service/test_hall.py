"""What a service works with: files that change while it runs, and waiting for news."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.pipelines.schema import Need
from fate_llm.runtime.federation import ResourceSettings, dump_model, load_federation
from fate_llm.runtime.federation_setup import plan_setup, set_up, write_files
from fate_llm.runtime.service.hall import Fresh, News, Roster
from fate_llm.runtime.service.room import Rooms
from tests.runtime.service.test_workers import PATIENCE


def test_a_file_is_read_again_only_when_it_was_written(tmp_path: Path) -> None:
    path, reads = tmp_path / "policy.yaml", []
    path.write_text("one")
    fresh = Fresh(path, lambda: reads.append(path.read_text()) or path.read_text())  # type: ignore[func-returns-value]
    assert [fresh(), fresh()] == ["one", "one"]
    assert len(reads) == 1
    path.write_text("three")
    assert fresh() == "three"
    os.utime(path, ns=(1, 1))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        fresh()


def test_what_cannot_be_read_is_an_error_each_time_and_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("bad")

    def read() -> str:
        if path.read_text() == "bad":
            raise ConfigurationError("it is bad")
        return "good"

    fresh = Fresh(path, read)
    for _ in range(2):
        with pytest.raises(ConfigurationError):
            fresh()
    path.write_text("mended")
    assert fresh() == "good"


def test_no_file_is_read_once() -> None:
    count = iter(range(10))
    fresh = Fresh(None, lambda: next(count))
    assert [fresh(), fresh()] == [0, 0]


def test_a_partner_who_is_added_is_seen(tmp_path: Path) -> None:
    setup = plan_setup(name="f", parties=["a", "b"], topology="shared")
    write_files(tmp_path / "f", set_up(setup, now=datetime(2026, 1, 1, tzinfo=UTC)))
    path = tmp_path / "f/parties/a/federation.yaml"
    whole = load_federation(path)
    alone = whole.model_copy(update={"parties": {"a": whole.member("a")}})
    path.write_text(dump_model(alone))
    roster = Roster(path, alone)
    assert not roster.renew()
    path.write_text(dump_model(whole))
    assert roster.renew()
    assert roster.present.members == ("a", "b")
    path.write_text(dump_model(whole) + "\n# a remark\n")
    assert not roster.renew(), "it says the same"
    path.write_text("version: 7")
    with pytest.raises(ConfigurationError):
        roster.renew()
    assert roster.present.members == ("a", "b"), "a broken file changes nothing"
    assert not roster.renew(), "and is complained about once"


def test_who_waits_for_news_wakes_up() -> None:
    news, woken = News(), threading.Event()
    version = news.version

    def wait() -> None:
        news.wait(version, PATIENCE)
        woken.set()

    threading.Thread(target=wait, daemon=True).start()
    news.tell()
    assert woken.wait(PATIENCE)
    news.wait(version, 10 * PATIENCE)  # it has come already: nobody waits, and the test does not time out


def test_room_in_the_units_of_the_settings() -> None:
    rooms = Rooms(ResourceSettings.model_validate({"cpus": 2.0, "memory": 1024, "gpus": 1}))
    need = Need.model_validate({"cpus": 1.5, "memory": 1000, "gpus": 1})
    assert rooms.request("first", need, 5, 0.0, since=0.0) == {"first": ""}
    assert rooms.request("second", need, 5, 1.0, since=1.0) == {}
    assert rooms.release("first", 2.0) == {"second": ""}
    too_much = rooms.request("third", Need.model_validate({"cpus": 3.0}), 5, 3.0, since=3.0)
    assert "cores" in too_much["third"]


def test_what_is_not_said_is_the_machine() -> None:
    rooms = Rooms(ResourceSettings())
    assert rooms.request("j", Need.model_validate({"cpus": 1.0, "memory": 1}), 5, 0.0, since=0.0) == {"j": ""}
    assert rooms.request("g", Need.model_validate({"gpus": 1}), 5, 0.0, since=0.0)["g"]
