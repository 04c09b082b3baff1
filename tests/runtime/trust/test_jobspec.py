"""Specifications: what is signed is what is meant, and whatever differs is refused with its reason."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadSignature, ConfigurationError, FateError, PipelineInvalid, PolicyError
from fate_llm.pipelines.check import check
from fate_llm.runtime.trust.jobspec import (
    MAX_SPECIFICATION,
    PURPOSE,
    JobSpecification,
    Reuse,
    SignedSpecification,
    make_specification,
    verify,
)
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey
from tests.runtime.trust.conftest import IDENTITIES, NOW, PIPELINE, roster, signed, specified


def data_of(**changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(signed().to_data())
    data["specification"] |= changes
    return data


def resigned(by: str = "bank-a", **changes: Any) -> SignedSpecification:
    """Signed with the key of `by`, whatever it says."""
    found = JobSpecification.model_validate(data_of(**changes)["specification"])
    return found.sign(IDENTITIES[by])


def refusal(given: SignedSpecification, now: float = NOW, **options: Any) -> FateError:
    with pytest.raises(FateError) as caught:
        verify(given, roster(), now, **options)
    return caught.value


# --- round trips ---------------------------------------------------------------------------------------------------


def test_what_is_signed_is_read_back_and_believed() -> None:
    given = signed(labels={"ticket": "42"}, reuse=Reuse(job="loans-0", tasks=("data",)))
    found = SignedSpecification.from_bytes(json.dumps(given.to_data()).encode())
    assert found == given and found.digest == given.digest == given.specification.digest
    assert verify(found, roster(), NOW) == check(PIPELINE)
    assert list(found.specification.members) == ["bank-a", "bank-b", "hub"]
    assert found.specification.reuse == Reuse(job="loans-0", tasks=("data",))


def test_the_digest_does_not_hang_on_the_order_of_keys() -> None:
    data = signed().to_data()
    turned = {key: data[key] for key in reversed(data)}
    turned["specification"] = dict(reversed(data["specification"].items()))
    assert SignedSpecification.from_data(turned).digest == signed().digest


def test_other_jobs_have_other_digests() -> None:
    given = [specified(), specified(job="loans-2"), specified(created=NOW + 1), specified(priority=6)]
    given += [specified(labels={"a": "b"}), specified(lambda data: data["job"].update(seed=9))]
    assert len({one.digest for one in given}) == len(given)


def test_what_the_pipeline_says_of_the_job_is_in_it() -> None:
    found = specified(lambda data: data["job"].update(approval_deadline="2h", retries=3, priority=8))
    assert (found.expires - found.created, found.attempts.retries, found.priority) == (7200.0, 3, 8)
    assert (specified().expires - NOW, specified().attempts.restarts) == (7 * 86400.0, 10)
    assert specified(lambda data: data["job"].update(priority=8), priority=1).priority == 1


def test_names_of_variables_and_files_of_the_guest_stay_there() -> None:
    found = specified(lambda data: data.update(env=["HOME_OF_MINE"]))
    assert "HOME_OF_MINE" not in found.canonical().decode()


# --- the signature -------------------------------------------------------------------------------------------------


def test_any_change_breaks_the_signature() -> None:
    # Given a signed job, When one value of it is another, Then it is not believed
    changes: list[dict[str, Any]] = [
        {"job": "loans-2"},
        {"created": NOW - 1},
        {"expires": NOW + 60},
        {"priority": 9},
        {"labels": {"a": "b"}},
        {"attempts": {"retries": 1, "restarts": 10}},
        {"reuse": {"job": "loans-0", "tasks": ["data"]}},
        {"pipeline": {**PIPELINE, "job": {"quorum": 1}}},
    ]
    for change in changes:
        assert isinstance(refusal(SignedSpecification.from_data(data_of(**change))), BadSignature), change


def test_every_bit_of_the_signature_counts() -> None:
    given = signed()
    for bit in range(0, 512, 37):
        flipped = bytearray(given.signature)
        flipped[bit // 8] ^= 1 << bit % 8
        assert isinstance(refusal(SignedSpecification(given.specification, bytes(flipped))), BadSignature)


def test_another_party_or_purpose_cannot_sign() -> None:
    assert isinstance(refusal(resigned(by="bank-b")), BadSignature)
    found = specified()
    other = IDENTITIES["bank-a"].sign(found.canonical(), purpose="hello")
    assert PURPOSE != "hello"
    assert isinstance(refusal(SignedSpecification(found, other)), BadSignature)


def test_only_the_guest_may_start_it() -> None:
    error = refusal(resigned(by="bank-b", initiator="bank-b"))
    assert isinstance(error, PolicyError) and "whose guest is bank-a" in error.message


# --- who takes part ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["identity", "sealing"])
def test_who_is_meant_with_another_key_is_named(what: str) -> None:
    # Given a guest that has another key of hub than we have
    other = Identity.generate().public if what == "identity" else SealingKey.generate().public
    theirs = roster(hub={what: other.to_text()})
    error = refusal(specified(federation=theirs).sign(IDENTITIES["bank-a"]))
    assert isinstance(error, PolicyError) and "another hub" in error.message and what in error.message


def test_strangers_are_refused() -> None:
    members = dict(data_of()["specification"]["members"])
    error = refusal(resigned(members={**members, "mallory": members["hub"]}))
    assert isinstance(error, PolicyError) and "'mallory'" in error.message
    error = refusal(resigned(initiator="mallory"))
    assert isinstance(error, PolicyError) and "'mallory'" in error.message and "card" in error.hint


def test_members_are_exactly_the_parties_of_the_pipeline() -> None:
    members = dict(data_of()["specification"]["members"])
    del members["hub"]
    error = refusal(resigned(members=members))
    assert isinstance(error, PolicyError) and error.message.endswith("differ: hub")


# --- time ----------------------------------------------------------------------------------------------------------


def test_it_is_valid_from_a_little_before_it_was_made_to_its_end() -> None:
    given = signed()
    end = given.specification.expires
    for now in (NOW - 300, NOW, end):
        verify(given, roster(), now)
    assert "301 s in our future" in refusal(given, NOW - 301).message
    assert "expired 1 s ago" in refusal(given, end + 1).message


def test_what_was_accepted_does_not_expire_while_it_runs() -> None:
    given = signed()
    verify(given, roster(), given.specification.expires + 1e6, accepted=True)
    assert isinstance(refusal(resigned(by="bank-b"), NOW + 1e9, accepted=True), BadSignature)


@pytest.mark.parametrize("expires", [NOW, NOW - 5, NOW + 32 * 86400])
def test_its_life_is_neither_nothing_nor_for_ever(expires: float) -> None:
    error = refusal(resigned(expires=expires), NOW - 10)
    assert isinstance(error, PolicyError) and ("valid for" in error.message or "expired" in error.message)


# --- the pipeline --------------------------------------------------------------------------------------------------


def test_a_pipeline_with_faults_is_refused_with_all_of_them() -> None:
    pipeline = copy.deepcopy(PIPELINE)
    pipeline["tasks"]["data"]["component"] = "os.system"
    pipeline["tasks"]["tune"]["params"]["rounds"] = "many"
    error = refusal(resigned(pipeline=pipeline))
    assert isinstance(error, PipelineInvalid)
    assert {fault.code for fault in error.faults} >= {"unknown_component", "invalid_value"}


def test_experiments_are_refused_on_both_sides() -> None:
    error = refusal(resigned(pipeline={**PIPELINE, "experiment": True}))
    assert isinstance(error, PolicyError) and "experiment" in error.message
    with pytest.raises(PolicyError, match="experiment"):
        specified(lambda data: data.update(experiment=True))


def test_files_of_others_are_not_included() -> None:
    error = refusal(resigned(pipeline={**PIPELINE, "include": ["/etc/passwd"]}))
    assert isinstance(error, PolicyError) and "includes" in error.message


def test_reuse_is_of_tasks_that_are_there() -> None:
    error = refusal(resigned(reuse={"job": "loans-0", "tasks": ["data", "nothing"]}))
    assert isinstance(error, PolicyError) and "nothing" in error.message


# --- shape and size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"job": "../../etc"}, "job"),
        ({"job": "a"}, "job"),
        ({"initiator": "Bank A"}, "initiator"),
        ({"priority": 10}, "priority"),
        ({"priority": "5"}, "priority"),
        ({"created": "now"}, "created"),
        ({"created": -1.0}, "created"),
        ({"members": {}}, "members"),
        ({"members": {"bank-a": {"identity": "x"}}}, "members.bank-a.sealing"),
        ({"pipeline": []}, "pipeline"),
        ({"reuse": {"job": "loans-0", "tasks": "data"}}, "reuse.tasks"),
        ({"labels": {"a": "x" * 1001}}, "labels.a"),
        ({"code": "print()"}, "code"),
    ],
)
def test_what_is_no_specification_is_refused_with_its_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SignedSpecification.from_data(data_of(**change))


@pytest.mark.parametrize("signature", [None, "", "ab", "Z" * 128, "A" * 128, 5])
def test_a_signature_is_hex(signature: Any) -> None:
    with pytest.raises(ConfigurationError, match="signature"):
        SignedSpecification.from_data({**signed().to_data(), "signature": signature})


@pytest.mark.parametrize("data", [{}, {"specification": {}}, {"signature": "0" * 128, "specification": 5, "x": 1}])
def test_other_objects_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SignedSpecification.from_data(data)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"a":1,"a":2}', b"NaN", b"[" * 100_000])
def test_bytes_that_are_no_specification_are_refused(raw: bytes) -> None:
    with pytest.raises(ConfigurationError):
        SignedSpecification.from_bytes(raw)


def test_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(ConfigurationError, match=f"at most {MAX_SPECIFICATION}"):
        SignedSpecification.from_bytes(b" " * (MAX_SPECIFICATION + 1))
    with pytest.raises(ConfigurationError, match=f"at most {MAX_SPECIFICATION}"):
        SignedSpecification.from_data(data_of(labels={"a": "x" * MAX_SPECIFICATION}))
    with pytest.raises(ConfigurationError, match="values in"):
        SignedSpecification.from_data(data_of(labels=dict.fromkeys(map(str, range(30_000)), "")))
    deep: Any = 0
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ConfigurationError, match="levels"):
        SignedSpecification.from_data(data_of(pipeline={"a": deep}))
    with pytest.raises(ConfigurationError, match=f"at most {MAX_SPECIFICATION}"):
        specified(lambda data: data.update(description="x" * MAX_SPECIFICATION))


@pytest.mark.parametrize("odd", [{1, 2}, b"x", float("nan"), "\ud800", {"a": object()}])
def test_values_that_json_has_not_are_refused(odd: Any) -> None:
    with pytest.raises(ConfigurationError, match="no JSON"):
        SignedSpecification.from_data(data_of(pipeline={"a": odd}))


def test_a_job_needs_every_partys_sealing_key_and_place_in_the_roster() -> None:
    with pytest.raises(ConfigurationError, match="no sealing key of hub"):
        specified(federation=roster(hub={"sealing": None}))
    with pytest.raises(ConfigurationError, match="no party 'carol'"):
        specified(lambda data: data["parties"].update(hosts=["carol"]))
    for wrong in ({"job": "Not An Id"}, {"priority": 77}, {"labels": {"A b": "c"}}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            specified(**wrong)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_changed_specification_never_does_more_than_an_error_of_ours(data: st.DataObject) -> None:
    # Given a sound one, When a piece of its bytes is another
    raw = bytearray(canonical_json(signed().to_data()))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        found = SignedSpecification.from_bytes(bytes(raw))
        verify(found, roster(), NOW)
    except FateError:
        return
    assert found.digest == signed().digest  # nothing but the same job is believed


def test_make_specification_does_not_write_to_the_pipeline() -> None:
    spec = check(PIPELINE)
    before = spec.to_data()
    make_specification(spec, job="loans-1", federation=roster(), created=NOW)
    assert spec.to_data() == before
