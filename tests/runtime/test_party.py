"""One party's work: its tasks in order, in every role it holds, told to the others however it ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fate_llm.core.errors import DataError, InternalError, PeerFailed
from fate_llm.core.values import ArtifactKind, Cohort, Role, Roster
from fate_llm.protocols.channel import JobChannel
from fate_llm.runtime.context import JobSetting
from fate_llm.runtime.events import Event, EventLog
from fate_llm.runtime.jobfolder import PartyFolder
from fate_llm.runtime.journal import RoundFolder, journal_folder
from fate_llm.runtime.party import Assignment, InputRef, PartyRun
from fate_llm.runtime.sharing import Sharing
from tests.runtime.toys import Adder, Breaker, Meeting, Words

COHORT = Cohort(("a", "b"), "a", 2)
BOTH = (Role.GUEST, Role.ARBITER)


class Party:
    """Party `a` of a job with `b`, whose channel is held by the test."""

    def __init__(self, channels: dict[str, JobChannel], base: Path) -> None:
        self.channels, self.base = channels, base
        self.events: list[Event] = []
        self.folder = PartyFolder(base / "party-a")
        log = EventLog(now=lambda: 0.0, observers=(self.events.append,))
        roster = Roster("a", ("b",))
        self.setting = JobSetting("job", "a", roster, 1, 20.0, base, self.folder, channels["a"], log, Sharing())

    def run(self, *assignments: Assignment, finished: dict[str, dict[str, str]] | None = None) -> PartyRun:
        found = PartyRun(self.setting, assignments, finished)
        found.run()
        return found

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture
def party(make_channels: Callable[..., dict[str, JobChannel]], tmp_path: Path) -> Party:
    return Party(make_channels("ab"), tmp_path)


def words(task: str = "words", roles: Sequence[Role] = (Role.GUEST,), **params: object) -> Assignment:
    return Assignment(task, "words", tuple(roles), COHORT, Words.Params.model_validate(params))


def test_outputs_are_what_was_written(party: Party) -> None:
    run = party.run(words(word="x"))
    assert run.error is None
    found = run.outputs["words"]["dataset"]
    assert (found.kind, found.name, found.party) == (ArtifactKind.DATASET, "words.dataset", "a")
    assert found.path.read_text() == "x"
    assert party.kinds() == ["task_started", "data", "task_finished", "party_finished"]


def test_the_others_hear_that_a_party_is_done(party: Party) -> None:
    party.run(words())
    with pytest.raises(PeerFailed, match="a has finished its part"):
        party.channels["b"].receive("a", task="words", kind="data.more", deadline=None)


def test_the_others_hear_what_a_party_failed_of(party: Party) -> None:
    run = party.run(Assignment("bad", "breaker", (Role.GUEST,), COHORT, Breaker.Params(at="a")))
    assert isinstance(run.error, DataError)
    with pytest.raises(PeerFailed, match=r"a failed in task bad: the message may quote data, .* \[data_invalid\]"):
        party.channels["b"].receive("a", task="bad", kind="x", deadline=None)
    assert party.kinds() == ["task_started", "party_failed"]


def test_what_a_component_raises_by_mistake_is_our_bug_with_its_story_in_the_log(party: Party) -> None:
    params = Breaker.Params(at="a", error="ValueError")
    run = party.run(Assignment("bad", "breaker", (Role.GUEST,), COHORT, params), words("later"))
    assert isinstance(run.error, InternalError)
    assert "ValueError: broken at a" in run.error.message
    assert "Traceback" in (party.folder.path / "log.txt").read_text()
    assert "later" not in run.outputs, "nothing runs after a failure"


def test_a_failure_that_nobody_can_be_told_is_noted(party: Party) -> None:
    party.channels["a"].close()
    run = party.run(Assignment("bad", "breaker", (Role.GUEST,), COHORT, Breaker.Params(at="a")))
    assert isinstance(run.error, DataError)
    assert party.kinds()[-1] == "note"


def test_a_task_that_was_finished_is_not_run_again(party: Party) -> None:
    party.run(words(word="first"))
    run = party.run(words(word="second"), finished={"words": {"dataset": "anywhere"}})
    assert run.outputs["words"]["dataset"].path.read_text() == "first"
    assert run.error is None


def test_what_an_earlier_attempt_left_is_cleared(party: Party) -> None:
    party.folder.output("words", "junk").write_text("half")
    party.run(words())
    assert not (party.folder.path / "words" / "junk").exists()


def test_a_folder_that_is_not_there_is_named(party: Party, tmp_path: Path) -> None:
    inputs = {"data": InputRef(path=str(tmp_path / "nowhere"))}
    run = party.run(Assignment("add", "adder", (Role.GUEST,), COHORT, Adder.Params(), inputs))
    assert isinstance(run.error, DataError)
    assert "nowhere" in run.error.message


def test_an_input_that_was_never_made_is_a_bug_of_ours(party: Party) -> None:
    inputs = {"data": InputRef(task="words", output="dataset")}
    run = party.run(Assignment("add", "adder", (Role.GUEST,), COHORT, Adder.Params(), inputs))
    assert isinstance(run.error, InternalError)


def test_of_many_sources_those_that_are_there_are_used(party: Party) -> None:
    cohort = Cohort(("a",), "a", 1)
    here, gone = InputRef(task="words", output="dataset"), InputRef(task="elsewhere", output="dataset")
    inputs = {"data": here, "more": (gone, here)}
    run = party.run(words(), Assignment("add", "adder", BOTH, cohort, Adder.Params(), inputs))
    assert run.error is None


def test_a_party_of_two_roles_runs_both_at_once(party: Party) -> None:
    run = party.run(Assignment("meet", "meeting", BOTH, Cohort(("a",), "a", 1), Meeting.Params()))
    assert run.error is None
    assert run.outputs["meet"]["dataset"].path.read_text() == "guest"
    assert run.outputs["meet"]["report"].path.read_text() == '["guest"]'


def test_when_one_side_fails_the_other_ends_and_the_first_error_counts(party: Party) -> None:
    # The guest's side has no input; its own arbiter side waits for it and for b, who never comes.
    inputs = {"data": InputRef(path=str(party.base))}
    run = party.run(Assignment("add", "adder", BOTH, COHORT, Adder.Params(), inputs))
    assert isinstance(run.error, InternalError)
    assert "IsADirectoryError" in run.error.message


def test_a_cancelled_job_starts_no_further_task(party: Party) -> None:
    party.channels["a"].cancel("enough")
    run = party.run(words())
    assert run.error is not None
    assert run.error.code == "cancelled"
    assert party.kinds() == ["party_failed"]


# --- a party that outlives its process ------------------------------------------------------------------------


@pytest.fixture
def durable(party: Party) -> Party:
    party.setting = dataclasses.replace(party.setting, durable=True)
    return party


def test_what_was_noted_as_finished_is_not_run_again_by_the_next_process(durable: Party) -> None:
    durable.run(words(word="first"), words("later"))
    durable.events.clear()
    run = durable.run(words(word="second"), words("later"))
    assert run.outputs["words"]["dataset"].path.read_text() == "first"
    # and who watches hears of it again, for it may not have
    assert durable.kinds() == ["task_finished", "task_finished", "party_finished"]


def test_another_attempt_runs_again_what_not_all_had_finished(durable: Party) -> None:
    durable.run(words("all", word="first"), words(word="first"))
    durable.setting = dataclasses.replace(durable.setting, attempt=2)
    run = durable.run(words("all", word="second"), words(word="second"), finished={"all": {"dataset": "anywhere"}})
    assert run.outputs["all"]["dataset"].path.read_text() == "first"
    assert run.outputs["words"]["dataset"].path.read_text() == "second"
    assert json.loads((durable.folder.path / "finished.json").read_text()) == {"attempt": 2, "tasks": ["words"]}


def test_outputs_are_on_disk_before_the_note_and_that_before_anything_is_acknowledged(
    durable: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("fate_llm.runtime.party.sync_tree", lambda path: seen.append(f"sync {path.name}"))
    monkeypatch.setattr("fate_llm.runtime.party.replace_json", lambda path, value: seen.append(path.name))
    monkeypatch.setattr(durable.setting.channel, "finish_task", lambda task: seen.append(f"finish {task}"))
    durable.run(words())
    assert seen == ["sync dataset", "finished.json", "finish words"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_task_with_a_finished_round_keeps_what_it_wrote_for_itself(durable: Party, number: int) -> None:
    durable.folder.output("words", "junk").write_text("half")
    (durable.folder.scratch("words") / "checkpoint").write_text("needed")
    journal = RoundFolder(journal_folder(durable.folder.path, "words", "contributor"), attempt=1)
    journal.commit(number, {}, {}, {}, {})
    durable.run(words())
    assert not (durable.folder.path / "words" / "junk").exists(), "outputs are made anew"
    assert (durable.folder.scratch("words") / "checkpoint").exists() is (number > 0)


def test_a_party_of_threads_notes_nothing(party: Party) -> None:
    party.run(words())
    assert not (party.folder.path / "finished.json").exists()
    assert not (party.folder.path / "journal").exists()
