"""Policy files: faults with their lines, schedules, what is shown to others."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fate_llm.core
from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.service.words import Line
from fate_llm.runtime.trust.catalog import load_catalog
from fate_llm.runtime.trust.policy_schema import Policy, Show, load_policy, make_policy
from fate_llm.runtime.trust.schedule import Schedule
from fate_llm.runtime.trust.templates import POLICY_TEMPLATE


def message(tmp_path: Path, text: str) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_policy(path)
    return caught.value.message


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("version: 2\n", 1, "version"),
        ("version: true\n", 1, "version"),
        ("name: x\n", 1, "'version' is required"),
        ("version: 1\ninitiator: [a]\n", 2, "did you mean 'initiators'"),
        ("version: 1\ninitiators: bank-a\n", 2, "should be a list"),
        ("version: 1\ninitiators: [Bank A]\n", 2, "not a valid id"),
        ("version: 1\ncomponents:\n  reeding: {}\n", 3, "did you mean 'reading'"),
        ("version: 1\ncomponents:\n  tuning:\n    params:\n      round: {max: 5}\n", 5, "did you mean 'rounds'"),
        ("version: 1\ncomponents:\n  tuning:\n    params:\n      hooks.nam: {one_of: [x]}\n", 5, "did you mean 'name'"),
        ("version: 1\ncomponents:\n  tuning:\n    params:\n      rounds.x: {max: 5}\n", 5, "no param 'rounds.x'"),
        ("version: 1\ncomponents: {tuning: {params: {rounds: {}}}}\n", 2, "at least one of min, max"),
        ("version: 1\ncomponents: {tuning: {params: {rounds: {min: 3, max: 2}}}}\n", 2, "nothing fits"),
        ("version: 1\ncomponents: {tuning: {params: {rounds: {pattern: '('}}}}\n", 2, "no regular expression"),
        ("version: 1\nmodels: [llm_tiny]\n", 2, "models"),
        ("version: 1\nmodels: ['path:/models/*']\n", 2, "models"),
        ("version: 1\nprotection: {least: none, contributors: 1}\n", 2, "least"),
        ("version: 1\nprotection: {least: plain}\n", 2, "contributors"),
        ("version: 1\nprotection: {least: plain, contributors: 0}\n", 2, "contributors"),
        ("version: 1\nprivacy: {}\n", 2, "require"),
        ("version: 1\nschedule: sometimes\n", 2, "schedule"),
        ("version: 1\nschedule: {hours: '20-6'}\n", 2, "hours"),
        ("version: 1\nschedule: {timezone: Mars/Olympus}\n", 2, "time zone"),
        ("version: 1\nschedule: {timezone: ../../etc/passwd}\n", 2, "time zone"),
        ("version: 1\nschedule: {days: []}\n", 2, "days"),
        ("version: 1\nresources: {cpus: 1, memory: much, hours: 1}\n", 2, "a size is"),
        ("version: 1\nmanual: [sometimes]\n", 2, "manual"),
        ("version: 1\nmanual: [{}]\n", 2, "at least one of"),
        ("version: 1\nretention: {days: 0}\n", 2, "days"),
    ],
)
def test_a_fault_is_named_with_its_line(text: str, line: int, said: str, tmp_path: Path) -> None:
    found = message(tmp_path, text)
    assert f"policy.yaml:{line}: " in found and said in found


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    text = "version: 1\nmodels: [x]\nprivacy: {require: maybe}\nshow: {logs: 5}\n"
    found = message(tmp_path, text)
    assert found.startswith("3 faults in the policy") and all(f"yaml:{line}:" in found for line in (2, 3, 4))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere.yaml cannot be read"):
        load_policy(tmp_path / "nowhere.yaml")
    (tmp_path / "policy.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load_policy(tmp_path / "policy.yaml")
    assert "yaml_tag" in message(tmp_path, "!!python/object:os.system {}")
    assert "bytes" in message(tmp_path, "# " + "x" * 600_000)


def test_plain_values_are_checked_like_a_file() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'rounds'"):
        make_policy({"version": 1, "components": {"tuning": {"params": {"round": {"max": 1}}}}})


def test_params_without_a_schema_may_have_any_bound() -> None:
    bounds = {"peft.r": {"max": 8}, "hooks.params.anything.at.all": {"max": 1}}
    policy = make_policy({"version": 1, "components": {"tuning": {"params": bounds}}})
    assert list(policy.components["tuning"].params) == list(bounds)


def test_a_bound_says_what_it_allows() -> None:
    bounds = {"rounds": {"min": 1, "max": 50, "optional": True}, "rate": {"one_of": [1, 2]}}
    rule = make_policy({"version": 1, "components": {"tuning": {"params": bounds}}}).components["tuning"]
    assert str(rule.params["rounds"]) == "at least 1, at most 50, or not given"
    assert str(rule.params["rate"]) == "one of 1, 2"


def test_the_template_refuses_everything_until_it_is_edited(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY_TEMPLATE)
    assert load_policy(path) == make_policy({"version": 1})


def test_the_examples_in_the_template_work(tmp_path: Path) -> None:
    # Given the template with the # of every example taken away (of two schedules, the first)
    lines = POLICY_TEMPLATE.partition("version: 1\n")[2].splitlines()
    examples = [line[1:] for line in lines if re.match(r"#(\w|  )", line)]
    assert len(examples) > 15
    examples.remove("schedule: always")
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\n" + "\n".join(examples) + "\n")
    # Then it is a policy with every section
    policy = load_policy(path)
    assert policy.model_fields_set == set(type(policy).model_fields)
    assert policy.components["homo_llm_trainer"].params["peft.r"].max == 64


# --- schedules -----------------------------------------------------------------------------------------------------


def moment(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("schedule", "now", "start"),
    [
        ({}, "2026-05-01T12:34", "2026-05-01T12:34"),
        ({"hours": "08:00-18:00"}, "2026-05-01T12:00", "2026-05-01T12:00"),
        ({"hours": "08:00-18:00"}, "2026-05-01T18:00", "2026-05-02T08:00"),
        ({"hours": "20:00-06:00"}, "2026-05-01T05:59", "2026-05-01T05:59"),
        ({"hours": "20:00-06:00"}, "2026-05-01T06:00", "2026-05-01T20:00"),
        ({"hours": ["08:00-09:00", "12:00-13:00"]}, "2026-05-01T10:00", "2026-05-01T12:00"),
        ({"days": ["mon"]}, "2026-05-01T10:00", "2026-05-04T00:00"),  # from a Friday on
        ({"days": ["thu"], "hours": "22:00-04:00"}, "2026-05-01T03:00", "2026-05-01T03:00"),
        ({"days": ["fri"], "hours": "22:00-04:00"}, "2026-05-01T03:00", "2026-05-01T22:00"),
        ({"days": ["fri"], "hours": "10:00-11:00"}, "2026-05-01T11:00", "2026-05-08T10:00"),
        ({"hours": "10:00-11:00", "timezone": "Europe/Berlin"}, "2026-05-01T07:00", "2026-05-01T08:00"),
        ({"hours": "10:00-11:00", "timezone": "Europe/Berlin"}, "2026-01-05T07:00", "2026-01-05T09:00"),
        ({"hours": "23:00-24:00"}, "2026-05-01T23:59", "2026-05-01T23:59"),
    ],
)
def test_when_a_job_may_start(schedule: dict[str, Any], now: str, start: str) -> None:
    assert Schedule.model_validate(schedule).next_start(moment(now)) == moment(start)


def test_an_hour_that_a_change_of_the_clock_swallows_is_not_waited_for() -> None:
    # Given a window within the hour that Berlin skips on 29 March 2026
    night = Schedule.model_validate({"hours": "02:10-02:50", "timezone": "Europe/Berlin"})
    start = night.next_start(moment("2026-03-28T23:00"))
    assert moment("2026-03-29T00:00") < start <= moment("2026-03-30T00:10")


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 4e9),
    st.sets(st.sampled_from(["mon", "tue", "sun"]), min_size=1),
    st.sampled_from(["00:00-24:00", "22:30-03:00", "07:00-07:01"]),
    st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"]),
)
def test_a_start_is_never_past_and_within_a_window(now: float, days: set[str], hours: str, zone: str) -> None:
    schedule = Schedule.model_validate({"days": sorted(days), "hours": hours, "timezone": zone})
    start = schedule.next_start(now)
    assert now <= start <= now + 8 * 86400
    assert schedule.next_start(start) == start


def test_a_policy_knows_when() -> None:
    assert make_policy({"version": 1}).next_start(5.0) is None
    assert make_policy({"version": 1, "schedule": "always"}).next_start(5.0) == 5.0
    night = make_policy({"version": 1, "schedule": {"days": ["mon"], "hours": "20:00-06:00"}})
    assert night.next_start(moment("2026-05-01T12:00")) == moment("2026-05-04T20:00")
    assert "mon 20:00-06:00 UTC" in str(night.schedule)


# --- what others see -----------------------------------------------------------------------------------------------

ROUND = Line(number=1, seconds=1.0, event="round", task="tune", fields={"round": 3, "train_loss": 0.5, "tokens": 99})
DATA = Line(number=2, seconds=1.0, event="data", task="data", fields={"rows": 40})
STARTED = Line(number=3, seconds=1.0, event="task_started", task="data", fields={"component": "reader", "path": "/x"})


@pytest.mark.parametrize(
    ("show", "line", "fields"),
    [
        ({}, ROUND, None),
        ({}, STARTED, None),
        ({"progress": True}, ROUND, {"round": 3}),
        ({"progress": True}, STARTED, {"component": "reader"}),
        ({"progress": True}, DATA, None),
        ({"losses": True}, ROUND, {"round": 3, "train_loss": 0.5}),
        ({"losses": True}, DATA, None),
        ({"losses": True, "progress": True}, ROUND, {"round": 3, "train_loss": 0.5}),
        ({"logs": "all"}, ROUND, {"round": 3, "tokens": 99}),
        ({"logs": "all", "losses": True}, ROUND, {"round": 3, "train_loss": 0.5, "tokens": 99}),
        ({"logs": ["data"]}, DATA, {"rows": 40}),
        ({"logs": ["data"]}, ROUND, None),
        ({"logs": "none"}, DATA, None),
    ],
)
def test_what_of_an_event_the_guest_sees(show: dict[str, Any], line: Line, fields: dict[str, Any] | None) -> None:
    found = Show.model_validate(show).visible(line)
    assert (None if found is None else found.fields) == fields
    assert found is None or (found.number, found.event, found.task) == (line.number, line.event, line.task)


# --- what the manual shows -----------------------------------------------------------------------------------------

HOW_TO = Path(fate_llm.core.__file__).parents[2] / "docs" / "how-to"


def shown(page: str, first: str) -> str:
    """The block of a page that starts with this line."""
    (found,) = re.findall(rf"^```yaml\n({re.escape(first)}\n.*?)^```", (HOW_TO / page).read_text(), re.M | re.S)
    return str(found)


def test_the_policy_in_the_manual_is_one(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(shown("write-a-policy.md", "# policy.yaml"))
    assert load_policy(path).model_fields_set == set(Policy.model_fields)


def test_the_catalogue_in_the_manual_is_one(tmp_path: Path) -> None:
    path = tmp_path / "catalog.yaml"
    path.write_text(shown("data-catalogue.md", "# catalog.yaml"))
    assert set(load_catalog(path).entries) == {"loans-2025", "base-model"}


def test_the_manual_speaks_of_every_section() -> None:
    text = (HOW_TO / "write-a-policy.md").read_text()
    for name in Policy.model_fields.keys() - {"version"}:
        assert f"- **{name}**: " in text
