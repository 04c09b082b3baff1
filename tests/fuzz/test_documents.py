"""Documents: specifications from a partner, and files that people write. Whatever they say, an error of our tree."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fate_llm.pipelines
from fate_llm.core import plugins
from fate_llm.core.errors import BadSignature, ConfigurationError, FateError
from fate_llm.pipelines.check import check
from fate_llm.pipelines.loader import load_text
from fate_llm.runtime.federation import make_federation
from fate_llm.runtime.trust.cards import card_of, parse_card
from fate_llm.runtime.trust.catalog import load_catalog
from fate_llm.runtime.trust.jobspec import JobSpecification, SignedSpecification, verify
from fate_llm.runtime.trust.policy import evaluate
from fate_llm.runtime.trust.policy_schema import load_policy, make_policy
from tests.fuzz.hostile import fuzz, json_values, nearly, nearly_json
from tests.runtime.trust.conftest import CATALOG, FAKES, IDENTITIES, NOW, POLICY, fakes, judged, roster, signed  # noqa: F401

ROSTER = roster()
with pytest.MonkeyPatch.context() as patch:  # the toy components of those tests, here as well
    load = plugins.load
    patch.setattr(plugins, "load", lambda kind, name: FAKES.get(kind, {}).get(name) or load(kind, name))
    patch.setattr(plugins, "names", lambda kind: sorted(FAKES.get(kind, ())))
    GOOD = signed()
SIGNED = GOOD.to_data()
FILES = Path(fate_llm.pipelines.__file__).parent
QUICKSTART = (FILES / "quickstart.yaml").read_text()


# --- specifications ---------------------------------------------------------------------------------------------------


@fuzz(50)
@given(nearly_json(SIGNED) | json_values())
def test_specifications(data: Any) -> None:
    """What is read is as it was, or as its sender's signature does not fit; nobody else's job is believed."""
    try:
        found = SignedSpecification.from_bytes(json.dumps(data).encode())
    except ConfigurationError:
        return
    if found == GOOD:
        assert verify(found, ROSTER, NOW)
    else:
        with pytest.raises(FateError):
            verify(found, ROSTER, NOW)


@fuzz(40)
@given(nearly(json.dumps(SIGNED).encode()))
def test_texts_of_specifications(raw: bytes) -> None:
    with suppress(ConfigurationError, BadSignature):
        found = SignedSpecification.from_bytes(raw)
        found.verify_signature(IDENTITIES["bank-a"].public)
        assert found == GOOD


@fuzz(50)
@given(nearly_json(SIGNED["specification"]))
def test_specifications_that_their_initiator_has_signed(data: Any) -> None:
    """A partner may sign what it likes: it is read, judged or refused, and never more than refused."""
    try:
        inside = SignedSpecification.from_data({"specification": data, "signature": "0" * 128}).specification
        assert isinstance(inside, JobSpecification)
        given_job = inside.sign(IDENTITIES["bank-a"])
        again = SignedSpecification.from_bytes(json.dumps(given_job.to_data()).encode())
        assert again.digest == given_job.digest
        verify(given_job, ROSTER, NOW)
    except FateError:
        return
    found = evaluate(make_policy(copy.deepcopy(POLICY)), given_job, "bank-b", CATALOG, NOW)
    assert found == evaluate(make_policy(copy.deepcopy(POLICY)), given_job, "bank-b", CATALOG, NOW)
    assert found.verdict in ("accept", "manual", "refuse")


# --- files ------------------------------------------------------------------------------------------------------------


@fuzz(50)
@given(nearly_json(POLICY) | json_values())
def test_policies(data: Any) -> None:
    """Nothing that changes a policy file turns a refusal of everything into a crash."""
    with suppress(ConfigurationError):
        policy = make_policy(data) if isinstance(data, dict) else None
        if policy is not None:
            assert evaluate(policy, GOOD, "bank-b", CATALOG, NOW).verdict in ("accept", "manual", "refuse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz(30)
@given(load=st.sampled_from([load_policy, load_catalog]), raw=nearly(yaml.safe_dump(POLICY).encode()))
def test_texts_of_policies_and_catalogues(folder: Path, load: Any, raw: bytes) -> None:
    path = folder / "file.yaml"
    path.write_bytes(raw)
    with suppress(ConfigurationError):
        load(path)


@fuzz(40)
@given(nearly(QUICKSTART.encode()))
def test_texts_of_pipelines(raw: bytes) -> None:
    text = raw.decode("utf-8", "replace")
    with suppress(ConfigurationError):
        source = load_text(text)
        check(source.data)


@fuzz(40)
@given(nearly_json(yaml.safe_load(QUICKSTART)) | json_values())
def test_pipelines(data: Any) -> None:
    with suppress(ConfigurationError):
        check(data)


@fuzz(40)
@given(nearly_json(ROSTER.model_dump(mode="json")) | json_values())
def test_rosters(data: Any) -> None:
    with suppress(ConfigurationError):
        if isinstance(data, dict):
            assert make_federation(make_federation(data).model_dump(mode="json")) == make_federation(data)


CARD = card_of("bank-a", ROSTER, IDENTITIES["bank-a"], program="1.0")


@fuzz(40)
@given(nearly(CARD.encode()))
def test_cards(raw: bytes) -> None:
    with suppress(FateError):
        found = parse_card(raw.decode("utf-8", "replace"))
        assert found.member.identity == ROSTER.parties["bank-a"].identity, "nobody else can sign this card"


def test_the_good_ones_are_good() -> None:
    """Or these tests would try nothing but what is refused at the door."""
    assert verify(SignedSpecification.from_data(SIGNED), ROSTER, NOW)
    assert judged().verdict == "accept"
    assert check(load_text(QUICKSTART).data)
    assert parse_card(CARD)
