"""Cards: what is changed is found, what is pinned stays pinned, and a roster keeps its comments."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import BadSignature, ConfigurationError, FateError
from fate_llm.pipelines.dialect import dump
from fate_llm.runtime.federation import dump_model, load_federation, make_federation
from fate_llm.runtime.trust import cards
from fate_llm.runtime.trust.cards import card_of, fingerprint_of, parse_card, pin, same_fingerprint
from tests.runtime.trust.conftest import IDENTITIES, roster


def text_of(party: str, **changes: Any) -> str:
    return card_of(party, roster(**changes), IDENTITIES[party], program="1.2.3")


def alone(party: str = "bank-a", **changes: Any) -> str:
    """The roster of a party that has just been set up."""
    data = roster(**changes).model_dump(mode="json")
    return dump_model(make_federation({**data, "parties": {party: data["parties"][party]}}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "federation.yaml"
    found.write_text(alone())
    return found


# --- cards ---------------------------------------------------------------------------------------------------------


def test_a_card_is_read_back() -> None:
    card = parse_card(text_of("bank-b"))
    assert (card.party, card.member, card.program) == ("bank-b", roster().member("bank-b"), "1.2.3")
    assert card.federation == {"name": "loans", "vhost": "fate.loans", "topology": "shared"}
    assert card.fingerprint == fingerprint_of("bank-b", roster().member("bank-b"), roster())
    groups = card.fingerprint.split(" ")
    assert len(groups) == 8 and all(len(group) == 5 and group.isdecimal() for group in groups)


def test_a_card_may_also_be_json() -> None:
    import json

    assert parse_card(json.dumps(yaml.safe_load(text_of("hub")))).party == "hub"


def test_a_fingerprint_is_over_all_that_is_pinned_and_not_over_the_version() -> None:
    member = roster().member("bank-b")
    found = {fingerprint_of("bank-b", member, roster()), fingerprint_of("bank-c", member, roster())}
    for change in (
        {"sealing": None},
        {"broker": {"host": "other.example"}},
        {"broker": {"host": "hub.example", "port": 1}},
    ):
        changed = make_federation(
            {**roster().model_dump(mode="json"), "topology": "per-party"}
            | {"parties": {"bank-b": member.model_dump(mode="json") | change}}
        )
        found.add(fingerprint_of("bank-b", changed.member("bank-b"), roster()))
    found.add(fingerprint_of("bank-b", member, {"name": "other", "vhost": "fate.loans", "topology": "shared"}))
    assert len(found) == 6
    later = card_of("bank-b", roster(), IDENTITIES["bank-b"], program="9.9.9")
    assert parse_card(later).fingerprint == parse_card(text_of("bank-b")).fingerprint


def test_what_is_typed_is_compared_without_its_spaces() -> None:
    found = parse_card(text_of("bank-b")).fingerprint
    assert same_fingerprint(found.replace(" ", ""), found) and same_fingerprint(f" {found}\n", found)
    assert not same_fingerprint(found[:-1], found) and not same_fingerprint("", found)


@pytest.mark.parametrize("field", ["party", "identity", "sealing", "broker", "federation", "program", "fingerprint"])
def test_a_changed_field_is_found(field: str) -> None:
    data, other = yaml.safe_load(text_of("bank-b")), yaml.safe_load(text_of("hub"))
    changes = {"program": "0.0.1", "broker": {"host": "evil.example", "port": 5671, "tls": True}}
    changes["federation"] = {"name": "x", "vhost": "fate.x", "topology": "shared"}
    data[field] = changes.get(field, other[field])
    with pytest.raises(BadSignature, match="was changed"):
        parse_card(yaml.safe_dump(data, sort_keys=False))


def test_a_card_that_lies_about_its_fingerprint_is_found() -> None:
    """The one who makes a card could sign another number: what is read out has to be what is pinned."""
    from fate_llm.core.canonical import canonical_json

    data = yaml.safe_load(text_of("bank-b"))
    del data["signature"]
    data["fingerprint"] = "00000 " * 7 + "00000"
    data["signature"] = IDENTITIES["bank-b"].sign(canonical_json(data), purpose="card").hex()
    with pytest.raises(ConfigurationError, match="its contents give"):
        parse_card(yaml.safe_dump(data, sort_keys=False))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_garbled_card_is_taken(data: st.DataObject) -> None:
    text = text_of("bank-b")
    at = data.draw(st.integers(0, len(text) - 1))
    garbled = text[:at] + data.draw(st.text(max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    try:
        found = parse_card(garbled)
    except FateError:
        return
    assert found == parse_card(text)  # a blank here and there says the same


@pytest.mark.parametrize("text", ["", "[]", "fate_llm_card: 1", "a: [", "x" * 20_000])
def test_what_is_no_card_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_card(text)


def test_faults_of_a_card_have_their_lines() -> None:
    text = text_of("bank-b").replace("party: bank-b", "party: Bank B")
    with pytest.raises(ConfigurationError, match=r"b\.card:2: party"):
        parse_card(text, "b.card")


def test_no_card_without_keys_that_fit() -> None:
    with pytest.raises(ConfigurationError, match="no sealing key of hub"):
        text_of("hub", hub={"sealing": None})
    with pytest.raises(ConfigurationError, match="the identity key here is"):
        card_of("hub", roster(), IDENTITIES["bank-a"], program="1")


# --- pinning -------------------------------------------------------------------------------------------------------


def test_a_partner_is_added_and_all_get_the_same_roster(tmp_path: Path) -> None:
    # Given three homes, When each adds the cards of the others, in whatever order
    digests = set()
    for me, others in (("bank-a", ("bank-b", "hub")), ("bank-b", ("hub", "bank-a")), ("hub", ("bank-a", "bank-b"))):
        path = tmp_path / f"{me}.yaml"
        path.write_text(alone(me))
        for other in others:
            after = pin(path, parse_card(text_of(other)), me=me)
            assert load_federation(path) == after
        digests.add(after.digest())
    # Then all have the same
    assert digests == {roster().digest()}


def test_comments_and_everything_else_stay(path: Path) -> None:
    lines = alone().splitlines()
    at = lines.index("parties:")
    text = "\n".join(["# ours", *lines[: at + 1], "  # the first", *lines[at + 1 :], "", "# the end", ""])
    path.write_text(text)
    pin(path, parse_card(text_of("bank-b")), me="bank-a")
    found = path.read_text()
    rest = iter(found.splitlines())
    assert all(line in rest for line in text.splitlines())  # all of them, in their order
    assert found.index("  # the first") < found.index("  bank-b:") < found.index("# the end")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("end", ["", "\n", "\n\n# x", "\nname: loans\n"])
def test_wherever_the_parties_stand(end: str, path: Path) -> None:
    text = alone().rstrip("\n")
    if "name" in end:
        text = text.replace("name: loans\n", "")
    path.write_text(text + end)
    after = pin(path, parse_card(text_of("bank-b")), me="bank-a")
    assert load_federation(path) == after and after.members == ("bank-a", "bank-b")
    assert not end.strip() or end.strip() in path.read_text()


@pytest.mark.parametrize("indent", [None, 4])
def test_a_roster_in_another_style_is_written_anew_or_kept(indent: int | None, path: Path) -> None:
    data = yaml.safe_load(alone())
    path.write_text(yaml.safe_dump(data, default_flow_style=indent is None, indent=indent, sort_keys=False))
    assert pin(path, parse_card(text_of("bank-b")), me="bank-a") == load_federation(path)
    assert load_federation(path).members == ("bank-a", "bank-b")


def test_the_same_card_again_changes_nothing(path: Path) -> None:
    pin(path, parse_card(text_of("bank-b")), me="bank-a")
    before = path.read_bytes()
    pin(path, parse_card(text_of("bank-b")), me="bank-a")
    pin(path, parse_card(text_of("bank-a")), me="bank-a")
    assert path.read_bytes() == before


def test_another_key_of_a_known_party_needs_a_word(path: Path) -> None:
    for party in ("hub", "bank-b"):
        pin(path, parse_card(text_of(party)), me="bank-a")
    text = path.read_text().replace("  hub:", "  # our friends\n  hub:")
    path.write_text(text)
    from fate_llm.security.sealed_box import SealingKey

    new = {"sealing": SealingKey.from_bytes(bytes([9]) * 32).public.to_text()}
    card = parse_card(text_of("hub", hub=new))
    with pytest.raises(ConfigurationError, match="hub is pinned with another sealing; nothing was changed"):
        pin(path, card, me="bank-a")
    assert path.read_text() == text
    after = pin(path, card, me="bank-a", replace=True)
    assert load_federation(path) == after and after.member("hub").sealing == new["sealing"]
    assert after.members == ("bank-a", "hub", "bank-b") and "# our friends" in path.read_text()
    card = parse_card(text_of("bank-a", bank_a=new | {"sealing": SealingKey.generate().public.to_text()}))
    with pytest.raises(ConfigurationError, match="which is this party"):
        pin(path, card, me="bank-a", replace=True)


def test_a_stolen_key_is_no_new_party(path: Path) -> None:
    # Given a card that mallory made out of bank-b's identity... which she cannot sign, so: two ids, one key
    pin(path, parse_card(text_of("bank-b")), me="bank-a")
    data = roster().model_dump(mode="json")
    twin = make_federation({**data, "parties": {"bank-x": data["parties"]["bank-b"]}})
    card = parse_card(card_of("bank-x", twin, IDENTITIES["bank-b"], program="1"))
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="same identity"):
        pin(path, card, me="bank-a")
    assert path.read_bytes() == before


def test_cards_of_other_federations_and_brokers_are_refused(path: Path) -> None:
    data = roster().model_dump(mode="json")
    other = make_federation({**data, "name": "cards", "vhost": "fate.cards"})
    with pytest.raises(ConfigurationError, match="name 'cards', ours is 'loans'"):
        pin(path, parse_card(card_of("bank-b", other, IDENTITIES["bank-b"], program="1")), me="bank-a")
    place = {"broker": {"host": "elsewhere.example"}}
    with pytest.raises(ConfigurationError, match=r"elsewhere.example:5671 .* we at hub.example:5671"):
        pin(path, parse_card(text_of("bank-b", bank_a=place, bank_b=place, hub=place)), me="bank-a")
    assert load_federation(path).members == ("bank-a",)


def test_a_roster_that_cannot_be_written_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        pin(path, parse_card(text_of("bank-b")), me="bank-a")
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == [path.name]


def test_an_edit_that_would_say_something_else_is_not_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are put into a text that people wrote; what comes out is read again, and has to be what is meant."""
    card = parse_card(text_of("bank-b"))
    wrong = {"bank-b": roster().member("hub").model_dump(mode="json")}
    monkeypatch.setattr(cards, "dump", lambda _: dump(wrong))
    after = pin(path, card, me="bank-a")
    assert load_federation(path) == after and after.member("bank-b") == roster().member("bank-b")
