"""The tree of errors: stable codes, exit codes, hints."""

from __future__ import annotations

import inspect

import pytest

from fate_llm.core import errors
from fate_llm.core.errors import ConfigurationError, FateError, Fault, PipelineInvalid, all_errors, error_from

# Codes are never renamed nor reused: this list only grows.
CODES = {
    "error": 1,
    "configuration": 2,
    "pipeline_invalid": 2,
    "unknown_plugin": 2,
    "data_invalid": 2,
    "model_invalid": 2,
    "missing_extra": 2,
    "unknown_job": 2,
    "wrong_state": 2,
    "policy_refused": 3,
    "unauthorised": 3,
    "federation": 4,
    "peer_violation": 4,
    "bad_envelope": 4,
    "bad_seal": 4,
    "bad_signature": 4,
    "conflicting_duplicate": 4,
    "message_lost": 4,
    "peer_failed": 4,
    "peer_restarted": 4,
    "timeout": 4,
    "quorum_lost": 4,
    "broker_lost": 4,
    "broker_refused": 4,
    "service_lost": 4,
    "store_lost": 4,
    "transport_closed": 4,
    "protection_refused": 5,
    "unsafe_request": 5,
    "inconsistent_view": 5,
    "cancelled": 130,
    "internal": 70,
}
OURS = [error for error in all_errors() if error.__module__ == errors.__name__]


def test_codes_and_exit_codes_are_those_that_were_promised() -> None:
    assert {error.code: error.exit_code for error in OURS} == CODES
    assert len({error.code for error in all_errors()}) == len(all_errors()), "two errors share a code"


def test_all_errors_of_the_module_are_in_the_tree_and_drawn_at_its_top() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert set(classes) == set(OURS)
    for error in OURS:
        assert error.__name__ in (errors.__doc__ or ""), f"{error.__name__} is not drawn"
        assert error.__name__ in errors.__all__


@pytest.mark.parametrize("error", OURS, ids=lambda e: e.__name__)
def test_every_error_has_a_sentence_and_a_hint(error: type[FateError]) -> None:
    assert error.__doc__
    assert len(error.default_hint) > 10
    assert error.code == error.code.lower()
    assert error.code.isidentifier()


def test_an_error_prints_as_json() -> None:
    error = errors.QuorumLost("2 of 3", hint="wait")
    assert error.as_dict() == {"code": "quorum_lost", "message": "2 of 3", "hint": "wait"}
    assert errors.QuorumLost("x").hint == errors.QuorumLost.default_hint
    assert errors.QuorumLost("x", hint="").hint == ""
    assert str(error) == "2 of 3"


def test_what_may_quote_data_is_not_told_to_others() -> None:
    told = errors.DataError("row 3: Patient X takes warfarin").told_others()
    assert told["code"] == "data_invalid"
    assert "warfarin" not in str(told)
    assert "secret" not in str(errors.InternalError("ValueError: 'secret'").told_others())
    assert errors.QuorumLost("2 of 3").told_others() == errors.QuorumLost("2 of 3").as_dict()


def test_all_faults_of_a_pipeline_are_reported_at_once() -> None:
    faults = [
        Fault("unknown_key", "p.yaml", 3, "tasks.tune", "what is 'rond'", "did you mean 'rounds'?"),
        Fault("missing", None, None, "", "no parties", ""),
    ]
    error = PipelineInvalid(iter(faults))
    assert error.faults == tuple(faults)
    assert error.message.splitlines() == [
        "2 faults in the pipeline",
        "p.yaml:3: tasks.tune: what is 'rond' (did you mean 'rounds'?) [unknown_key]",
        "<pipeline>: <root>: no parties [missing]",
    ]
    assert "1 fault in" in PipelineInvalid(faults[:1]).message
    assert faults[0].as_dict()["line"] == 3


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.code)
def test_an_error_of_another_process_comes_back_as_its_class(kind: type[FateError]) -> None:
    told = {"code": kind.code, "message": "what happened", "hint": "what to do"}
    found = error_from(**told)
    expected = ConfigurationError if kind is PipelineInvalid else kind
    assert type(found) is expected
    assert (found.message, found.hint, found.exit_code) == ("what happened", "what to do", kind.exit_code)


def test_a_code_nobody_knows_is_still_an_error() -> None:
    assert type(error_from("new_in_version_9", "m", "h")) is FateError
