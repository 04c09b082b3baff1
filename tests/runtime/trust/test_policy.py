"""Policies: what is not written is refused, every rule is reported, and no job gets around one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import ConfigurationError, FateError, PipelineInvalid
from fate_llm.core.values import SumFloor
from fate_llm.pipelines.check import check
from fate_llm.runtime.service.words import Estimates, Finding
from fate_llm.runtime.trust.catalog import EMPTY_CATALOG
from fate_llm.runtime.trust.policy import MOST_FINDINGS, Evaluation, evaluate
from fate_llm.runtime.trust.policy_schema import make_policy
from tests.runtime.trust.conftest import CATALOG, NOW, PIPELINE, POLICY, crowded, judged, signed

Change = Callable[[dict[str, Any]], object]


def params(task: str, **values: Any) -> Change:
    return lambda data: data["tasks"][task]["params"].update(values)


def both(*changes: Change) -> Change:
    def change(data: dict[str, Any]) -> None:
        for one in changes:
            one(data)

    return change


def at(party: str, task: str, **values: Any) -> Change:
    return lambda data: data.setdefault("overrides", {}).update({party: {task: {"params": values}}})


def refused(found: Evaluation) -> set[str]:
    """The rules that refuse; such a job opens nothing and starts never."""
    if found.verdict == "refuse":
        assert found.opens == () and found.not_before is None
    return {one.rule for one in found.refusals}


def finding(found: Evaluation, rule: str) -> Finding:
    (one,) = [one for one in found.findings if one.rule == rule]
    return one


# --- as a whole ----------------------------------------------------------------------------------------------------


def test_a_job_that_fits_is_accepted_and_every_rule_is_shown() -> None:
    found = judged()
    assert (found.verdict, found.opens, found.not_before) == ("accept", ("loans",), NOW)
    assert {one.rule for one in found.findings} == {
        "initiators",
        "components.data",
        "components.tune",
        "params.tune.rounds",
        "params.tune.rate",
        "data.data.params.path",
        "models.tune.params.model.package",
        "protection.tune",
        "privacy",
        "schedule",
        "resources.cpus",
        "resources.gpus",
        "resources.memory",
        "resources.hours",
    }


def test_an_empty_policy_refuses_everything_and_says_which_line_to_add() -> None:
    # Given a policy with nothing in it, When a job comes, Then every section is missed by name
    found = evaluate(make_policy({"version": 1}), signed(), "bank-b", CATALOG, NOW)
    assert found.verdict == "refuse"
    needed = " ".join(one.allowed for one in found.refusals)
    for section in ("initiators", "components", "models", "data", "protection", "privacy", "schedule", "resources"):
        assert f"`{section}: " in needed, section
    assert finding(found, "manual.any").outcome == "manual"


@pytest.mark.parametrize("section", sorted(set(POLICY) - {"version", "manual"}))
def test_a_missing_section_refuses_what_it_speaks_of(section: str) -> None:
    found = judged({section: None})
    assert found.verdict == "refuse"
    assert {rule.partition(".")[0] for rule in refused(found)} == {section}


def test_the_same_question_has_the_same_answer() -> None:
    assert judged() == judged()
    policy = make_policy(POLICY)
    shuffled = make_policy(dict(reversed(POLICY.items())))
    assert policy.digest == shuffled.digest != make_policy(POLICY | {"initiators": ["bank-b"]}).digest


def test_a_refusal_beats_a_person_and_both_are_shown() -> None:
    found = judged({"manual": ["any"], "initiators": ["bank-b"]})
    assert found.verdict == "refuse" and finding(found, "manual.any").outcome == "manual"


def test_a_checked_pipeline_saves_the_second_check() -> None:
    policy = make_policy(POLICY)
    assert evaluate(policy, signed(), "bank-b", CATALOG, NOW, pipeline=check(PIPELINE)) == judged()


def test_a_party_that_has_no_part_refuses() -> None:
    assert "parties" in refused(judged(me="carol"))


# --- components and bounds -----------------------------------------------------------------------------------------


def test_only_components_of_tasks_that_run_here_are_asked_about() -> None:
    found = judged({"components": {"tuning": {}}}, me="hub")
    assert found.verdict == "accept" and found.opens == ()
    assert refused(judged({"components": {"tuning": {}}}, me="bank-b")) == {"components.data"}


@pytest.mark.parametrize(
    ("bound", "values", "fits"),
    [
        ({"rounds": {"max": 50}}, {"rounds": 50}, True),
        ({"rounds": {"max": 50}}, {"rounds": 51}, False),
        ({"rounds": {"min": 2}}, {"rounds": 1}, False),
        ({"rounds": {"one_of": [1, 2]}}, {"rounds": 2}, True),
        ({"rounds": {"one_of": [1, 2]}}, {"rounds": 3}, False),
        ({"rate": {"max": 0.001}}, {}, True),  # a default counts as well
        ({"rate": {"max": 0.0009}}, {}, False),
        ({"peft.r": {"max": 8}}, {"peft": {"r": 8}}, True),
        ({"peft.r": {"max": 8}}, {"peft": {"r": 9}}, False),
        ({"peft.r": {"max": 8}}, {"peft": {"r": "8"}}, False),
        ({"peft.r": {"max": 8}}, {"peft": {"r": True}}, False),
        ({"peft.r": {"max": 8}}, {}, False),  # not given is not within
        ({"peft.r": {"max": 8, "optional": True}}, {}, True),
        ({"peft.r": {"one_of": [8, None]}}, {}, True),
        ({"peft.r": {"max": 8}}, {"peft": {"r": [1, 2, 9]}}, False),
        ({"peft.r": {"max": 8}}, {"peft": {"r": {"x": 1}}}, False),
        ({"peft.on": {"one_of": [1]}}, {"peft": {"on": True}}, False),
        ({"hooks.name": {"one_of": ["clip"]}}, {"hooks": []}, True),
        ({"hooks.name": {"one_of": ["clip"]}}, {"hooks": [{"name": "clip"}]}, True),
        ({"hooks.name": {"pattern": "cl"}}, {"hooks": [{"name": "clip"}]}, False),
        ({"hooks.name": {"pattern": "cl.*"}}, {"hooks": [{"name": "clip"}]}, True),
        ({"hooks.params.norm": {"max": 1}}, {"hooks": [{"name": "clip", "params": {"norm": 2}}]}, False),
    ],
)
def test_bounds(bound: dict[str, Any], values: dict[str, Any], fits: bool) -> None:
    components = {"reading": {}, "tuning": {"params": bound}}
    found = judged({"components": components}, params("tune", **values))
    rule = f"params.tune.{next(iter(bound))}"
    assert refused(found) == (set() if fits else {rule})
    assert finding(found, rule).allowed


def test_our_overrides_are_what_is_judged() -> None:
    assert refused(judged(change=at("bank-b", "tune", rounds=51))) == {"params.tune.rounds"}
    assert "51" in finding(judged(change=at("bank-b", "tune", rounds=51)), "params.tune.rounds").found


def test_params_of_others_in_tasks_that_run_here_count_too() -> None:
    # Given an arbiter with more rounds than we allow, When we judge our part
    found = judged(change=at("hub", "tune", rounds=51))
    assert refused(found) == {"params.tune.rounds"}
    assert "at hub" in finding(found, "params.tune.rounds").found


def test_where_others_keep_their_data_is_not_our_matter() -> None:
    components = {"tuning": {}, "reading": {"params": {"path": {"one_of": ["catalog:loans"]}}}}
    found = judged({"components": components}, at("bank-a", "data", path="/their/own/file"))
    assert found.verdict == "accept"
    found = judged({"components": components}, at("bank-b", "data", path="catalog:secret"))
    assert refused(found) == {"params.data.path", "data.data.params.path"}


# --- data and models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "~/x", "data/loans.jsonl", "loans.jsonl", "C:\\x", "file:///etc/passwd", "hub/name", " /x"],
)
def test_a_path_is_no_name_of_the_catalogue(path: str) -> None:
    found = judged(change=params("data", path=path))
    assert refused(found) == {"data.data.params.path"}
    one = finding(found, "data.data.params.path")
    assert "catalog:NAME" in one.allowed and path.strip() not in one.found


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "a/../../b", "x y/../../etc", "~root", "file:x", "..", "a/b", "\\\\host\\x", "\n/etc"]
)
@pytest.mark.parametrize("where", ["notes", "extra.deep", "extra.list", "extra.key"])
def test_a_field_without_a_mark_is_no_way_around(text: str, where: str) -> None:
    extra: dict[str, Any] = {"extra.deep": {"a": {"b": text}}, "extra.list": {"a": [1, text]}, "extra.key": {text: 1}}
    values = {"notes": text} if where == "notes" else {"extra": extra[where]}
    assert judged(change=params("data", **values)).verdict == "refuse"


@pytest.mark.parametrize("text", ["", "hello", "a or b / c", "0.5", "q_proj", "yes, and no"])
def test_other_texts_are_texts(text: str) -> None:
    assert judged(change=params("data", notes=text)).verdict == "accept"


def test_a_name_of_the_catalogue_is_judged_wherever_it_stands() -> None:
    assert refused(judged(change=params("data", notes="catalog:secret"))) == {"data.data.params.notes"}
    found = judged(change=params("data", extra={"a": [" catalog:secret"]}))
    assert refused(found) == {"data.data.params.extra.a[0]"}
    assert judged({"data": {"loans": {}, "s*": {}}}, params("data", notes="catalog:secret")).opens == (
        "loans",
        "secret",
    )
    nested = [{"name": "clip", "params": {"file": "catalog:secret"}}]
    assert judged(change=params("tune", hooks=nested)).verdict == "refuse"


def test_what_is_not_there_and_what_is_not_allowed_look_the_same() -> None:
    """Else a partner could ask for names until one is there."""
    shown = []
    for name in ("secret", "absent"):
        one = finding(judged(change=params("data", path=f"catalog:{name}")), "data.data.params.path")
        assert one.outcome == "refuse"
        shown.append((one.found + one.allowed).replace(name, "NAME"))
    assert shown[0] == shown[1]
    assert judged({"data": {"*": {}}}, params("data", path="catalog:absent")).verdict == "refuse"
    assert judged(catalog=EMPTY_CATALOG).verdict == "refuse"


def test_a_model_is_no_data_set_and_the_other_way_round() -> None:
    rules = {"data": {"*": {}}, "models": ["catalog:*", "package:*"]}
    assert judged(rules, params("data", path="catalog:base")).verdict == "refuse"
    assert judged(rules, params("tune", model={"path": "catalog:loans"})).verdict == "refuse"
    found = judged(rules, params("tune", model={"path": "catalog:base"}))
    assert (found.verdict, found.opens) == ("accept", ("loans", "base"))


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({}, True),
        ({"initiators": ["bank-a"]}, True),
        ({"initiators": ["bank-b"]}, False),
        ({"initiators": []}, False),
        ({"components": ["reading", "tuning"]}, True),
        ({"components": ["reading"]}, False),  # tuning gets what reading reads
        ({"components": ["tuning"]}, False),
    ],
)
def test_who_may_use_a_data_set(rule: dict[str, Any], fits: bool) -> None:
    assert (judged({"data": {"loans": rule}}).verdict == "accept") is fits


def test_one_rule_of_several_that_fits_is_enough() -> None:
    assert judged({"data": {"loans": {"initiators": ["bank-b"]}, "lo*": {}}}).verdict == "accept"


@pytest.mark.parametrize(
    ("model", "patterns", "fits"),
    [
        ({"package": "llm_tiny"}, ["package:llm_tiny"], True),
        ({"package": "llm_tiny"}, ["package:llm_t"], False),
        ({"package": "llm_tiny"}, ["hub:*", "catalog:*"], False),
        ({"hub": "org/name"}, ["hub:org/*"], True),
        ({"hub": "org/name", "revision": "v1"}, ["hub:org/name"], False),
        ({"hub": "org/name", "revision": "v1"}, ["hub:org/name@v1"], True),
        ({"path": "/models/x"}, ["package:*", "hub:*", "catalog:*"], False),
        ({"path": "catalog:absent"}, ["catalog:*"], False),
    ],
)
def test_models(model: dict[str, Any], patterns: list[str], fits: bool) -> None:
    found = judged({"models": patterns}, lambda data: data["tasks"]["tune"]["params"].update(model=model))
    assert (found.verdict == "accept") is fits
    assert fits or {rule.partition(".")[0] for rule in refused(found)} == {"models"}


def test_an_arbiter_opens_no_name_of_its_catalogue() -> None:
    change = params("tune", model={"path": "catalog:anything"})
    found = judged(change=change, me="hub")
    assert (found.verdict, found.opens) == ("accept", ())
    assert refused(judged(change=params("tune", model={"path": "/anything"}), me="hub"))


def test_a_folder_given_as_an_input_is_a_resource() -> None:
    def folder(path: str) -> Change:
        return lambda data: data["tasks"]["tune"]["inputs"].update(start={"path": path})

    assert refused(judged(change=folder("/models/x"))) == {"models.tune.inputs.start"}
    assert judged(change=folder("catalog:base")).opens == ("loans", "base")
    assert judged(change=folder("catalog:loans")).verdict == "refuse"


# --- protection, privacy, time, room -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "used", "fits"),
    [
        ("plain", "plain", True),
        ("plain", "secagg", True),
        ("secagg", "secagg", True),
        ("secagg", "plain", False),
        ("ckks", "secagg", True),
        ("secagg", "ckks", False),  # a coordinator that lies is not found out there
        ("ckks", "plain", False),
        ("secagg", "homebrew", False),  # it says that it hides everything
    ],
)
def test_the_weakest_protection(least: str, used: str, fits: bool) -> None:
    rules = {"protection": {"least": least, "contributors": 2}}
    found = judged(rules, both(crowded, params("tune", protection=used)))
    assert refused(found) == (set() if fits else {"protection.tune"})


def test_a_weaker_protection_at_one_party_is_no_pipeline() -> None:
    with pytest.raises(PipelineInvalid) as raised:
        judged(change=both(crowded, params("tune", protection="secagg"), at("bank-a", "tune", protection="plain")))
    assert [fault.code for fault in raised.value.faults] == ["protection_differs"]


@pytest.mark.parametrize(
    ("protection", "wanted", "rule", "found", "allowed"),
    [
        ({}, {}, None, "3 of 4", "at least 3"),
        ({}, {"threshold": 4}, None, "4 of 4", "at least 3"),
        ({}, {"threshold": 2}, "threshold", "2 of 4", "at least 3"),
        ({"threshold": 2}, {"threshold": 2}, None, "2 of 4", "at least 2"),
        ({"threshold": 4}, {}, "threshold", "3 of 4", "at least 4"),
        ({"clip": 0.5}, {}, "clip", "1", "at most 0.5"),
        ({"clip": 0.5}, {"clip": 0.5}, None, "0.5", "at most 0.5"),
        ({}, {"clip": 1e6}, None, "", ""),
        ({"contributors": 4}, {}, None, "4 contributors that count", "at least 4"),
    ],
)
def test_a_sum_that_hides_terms_is_held_to_the_threshold_and_the_clip(
    protection: dict[str, Any], wanted: dict[str, Any], rule: str | None, found: str, allowed: str
) -> None:
    rules = {"protection": {"least": "secagg", "contributors": 3} | protection}
    said = judged(rules, both(crowded, params("tune", protection="secagg", protection_params=wanted)))
    assert refused(said) == (set() if rule is None else {f"protection.tune.{rule}"})
    if found:
        name = rule or next((name for name in ("clip", "contributors") if name in protection), "threshold")
        one = finding(said, f"protection.tune.{name}")
        assert (one.found, one.allowed) == (found, allowed)
    assert ("clip" in protection) == any(one.rule == "protection.tune.clip" for one in said.findings)


def test_one_that_adds_up_does_not_count_among_the_contributors() -> None:
    def alone(data: dict[str, Any]) -> None:
        crowded(data)
        del data["parties"]["arbiter"]

    hidden = params("tune", protection="secagg")
    for least, fits in ((3, True), (4, False)):
        rules = {"protection": {"least": "secagg", "contributors": least}}
        said = judged(rules, both(alone, hidden))
        assert refused(said) == (set() if fits else {"protection.tune.contributors"})
        one = finding(said, "protection.tune.contributors")
        assert one.found == "3 contributors that count, who adds up does not"


def test_what_is_seen_has_no_such_rules() -> None:
    rules = {"protection": {"least": "plain", "contributors": 2, "threshold": 9, "clip": 0.001}}
    said = judged(rules)
    assert said.verdict == "accept"
    assert [one.rule for one in said.findings if one.rule.startswith("protection")] == ["protection.tune"]


def test_the_floor_of_sums_is_what_the_policy_says() -> None:
    assert make_policy({key: value for key, value in POLICY.items() if key != "protection"}).sum_floor == SumFloor(
        3, None, None
    )
    wanted = {"least": "plain", "contributors": 2, "threshold": 2, "clip": 0.5}
    assert make_policy(POLICY | {"protection": wanted}).sum_floor == SumFloor(2, 2, 0.5)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [({"threshold": 0}, "threshold"), ({"clip": 0}, "clip"), ({"clip": float("inf")}, "clip"), ({"clap": 1}, "clap")],
)
def test_a_floor_that_says_nothing_is_refused(wanted: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make_policy(POLICY | {"protection": {"least": "plain", "contributors": 2} | wanted})


def test_estimates_of_a_job_that_hides_terms_are_not_told_in_numbers() -> None:
    # Given estimates that speak of this party's records
    costs = Estimates(memory_bytes=1_234_567_890, minutes=77.0)
    # Then a job that shows terms tells them, and one that hides terms says only whether they fit
    seen, hidden = (
        judged(estimates=costs),
        judged(change=both(crowded, params("tune", protection="secagg")), estimates=costs),
    )
    assert "1234567890" in str(seen.findings)
    for number in ("1234567890", "1.28", "77"):
        assert number not in str(hidden.findings)
    assert finding(hidden, "resources.hours").found == "it is estimated to take no more"
    much = Estimates(memory_bytes=2**50, minutes=1e6)
    found = judged(change=both(crowded, params("tune", protection="secagg")), estimates=much)
    assert refused(found) == {"resources.memory", "resources.hours"}
    assert str(2**50) not in str(found.findings)


@pytest.mark.parametrize(("contributors", "quorum", "fits"), [(2, 2, True), (2, 1, False), (3, 2, False), (1, 1, True)])
def test_the_quorum_counts_and_not_who_is_listed(contributors: int, quorum: int, fits: bool) -> None:
    rules = {"protection": {"least": "plain", "contributors": contributors}}
    found = judged(rules, lambda data: data["job"].update(quorum=quorum))
    assert refused(found) == (set() if fits else {"protection.tune"})


def test_a_party_alone_sends_nothing_that_needs_protection() -> None:
    def alone(data: dict[str, Any]) -> None:
        data["parties"] = {"guest": "bank-a"}
        data["job"] = {}

    found = judged({"protection": None}, alone, me="bank-a")
    assert found.verdict == "accept" and not [one for one in found.findings if one.rule.startswith("protection")]


def test_privacy() -> None:
    assert refused(judged({"privacy": {"require": "differential_privacy"}})) == {"privacy"}
    assert finding(judged(), "privacy").found == "no differential privacy"


def test_a_schedule_lets_a_job_in_and_says_when_it_may_start() -> None:
    night = {"schedule": {"hours": "20:00-06:00"}}
    found = judged(night)
    assert found.verdict == "accept"
    assert found.not_before == NOW + 4 * 3600 + 53 * 60 + 20  # from 15:06:40 to 20:00
    assert judged(night, now=found.not_before).not_before == found.not_before
    late = judged(night, lambda data: data["job"].update(approval_deadline="1h"))
    assert refused(late) == {"schedule"} and "expires" in finding(late, "schedule").found


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({"cpus": 4.5}, "resources.cpus"),
        ({"gpus": 2}, "resources.gpus"),
        ({"memory": "17GiB"}, "resources.memory"),
        ({"at": {"bank-b": {"gpus": 2}}}, "resources.gpus"),
        ({"at": {"bank-a": {"gpus": 2}}}, None),
        ({"gpus": 2, "at": {"bank-b": {}}}, None),
        ({"memory": "16GiB", "cpus": 4, "gpus": 1}, None),
    ],
)
def test_resources_that_the_job_asks_for_here(asked: dict[str, Any], rule: str | None) -> None:
    found = judged(change=lambda data: data["job"].update(resources=asked))
    assert refused(found) == ({rule} if rule else set())


def test_resources_that_are_estimated() -> None:
    assert refused(judged(estimates=Estimates(memory_bytes=2**34))) == set()
    assert refused(judged(estimates=Estimates(memory_bytes=2**34 + 1))) == {"resources.memory"}
    assert refused(judged(estimates=Estimates(minutes=720))) == set()
    assert refused(judged(estimates=Estimates(minutes=721))) == {"resources.hours"}


# --- what a person decides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "rule"),
    [
        (["any"], "manual.any"),
        (["new_initiator"], "manual.new_initiator"),
        ([{"initiators": ["bank-*"]}], "manual.initiators"),
        ([{"components": ["tun*"]}], "manual.components"),
        ([{"data": ["lo*"]}], "manual.data"),
        ([{"models": ["package:*"]}], "manual.models"),
    ],
)
def test_what_a_person_decides(rules: list[Any], rule: str) -> None:
    found = judged({"manual": rules})
    assert found.verdict == "manual" and finding(found, rule).outcome == "manual"
    assert (found.opens, found.not_before) == (("loans",), NOW)


def test_what_no_manual_rule_speaks_of_is_accepted() -> None:
    rules = [{"initiators": ["x"], "components": ["y"], "data": ["secret"], "models": ["hub:*"]}, "new_initiator"]
    assert judged({"manual": rules}, known={"bank-a"}).verdict == "accept"
    assert judged({"manual": rules}, known={"bank-b"}).verdict == "manual"


def test_without_a_word_about_it_a_person_decides_on_everything() -> None:
    assert judged({"manual": None}).verdict == "manual"


# --- bounds of the answer ------------------------------------------------------------------------------------------


def many_tasks(count: int) -> Change:
    def change(data: dict[str, Any]) -> None:
        for number in range(count):
            data["tasks"][f"more-{number}"] = copy.deepcopy(data["tasks"]["data"])
        data["tasks"][f"more-{count - 1}"]["params"]["path"] = "/etc/passwd"

    return change


def test_an_answer_is_bounded_and_keeps_what_refuses() -> None:
    found = judged(change=many_tasks(150))
    assert len(found.findings) == MOST_FINDINGS
    assert refused(found) == {"data.more-149.params.path"}
    assert found.findings[-1].rule == "more" and "not shown" in found.findings[-1].found
    worst = judged({"components": None}, many_tasks(250))
    assert worst.verdict == "refuse" and worst.findings[-1].outcome == "refuse"


def test_long_names_make_no_finding_that_cannot_be_sent() -> None:
    found = judged(change=params("tune", model={"hub": "x" * 50_000}))
    assert found.verdict == "refuse"
    extra = {"a" * 3000: "catalog:" + "b" * 3000}
    assert judged(change=params("data", extra=extra)).verdict == "refuse"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_less_policy_never_lets_more_in(data: st.DataObject) -> None:
    """Take a section away, or change a job: what was refused before for one reason is not accepted by having less."""
    kept = data.draw(st.sets(st.sampled_from(sorted(set(POLICY) - {"version"}))))
    change = data.draw(
        st.sampled_from([None, params("tune", rounds=51), params("data", path="/x"), params("data", path="catalog:x")])
    )
    less = judged({section: None for section in POLICY if section not in kept and section != "version"}, change)
    full = judged(change=change)
    if less.verdict == "accept":
        assert full.verdict == "accept"
    assert refused(full) <= refused(less) | {rule for rule in refused(full) if rule.startswith("params.")}


def test_a_pipeline_with_faults_is_an_error_of_ours() -> None:
    found = signed()
    broken = found.specification.model_copy(update={"pipeline": {"version": 1}})
    with pytest.raises(FateError):
        evaluate(make_policy(POLICY), type(found)(broken, found.signature), "bank-b", CATALOG, NOW)
