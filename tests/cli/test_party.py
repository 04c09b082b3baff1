"""`fate_llm party init`, `party card` and `federation add`: three homes that find each other."""

from __future__ import annotations

import contextlib
import os
import stat
import urllib.error
from pathlib import Path

import pytest
from click.testing import CliRunner

from fate_llm import __version__
from fate_llm.cli.main import main
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.doctor_parties import Membership
from fate_llm.runtime.federation import load_federation, write_new
from fate_llm.runtime.federation_setup import Setup
from fate_llm.runtime.trust.home import Home, open_home
from tests.brokers import admin, broker  # noqa: F401
from tests.cli.conftest import Run, document, only_error
from tests.runtime.granted import Granted

PARTIES = ("bank-a", "bank-b", "hub")


def init(run: Run, party: str, *more: str, home: str | None = None) -> None:
    place = () if "--broker" in more else ("--broker", "mq.example")
    run("party", "init", home or party, "--party", party, "--federation", "loans", *place, *more)


def card(run: Run, party: str) -> tuple[Path, str]:
    """A file with the card, and its fingerprint as its people read it out."""
    path = Path(f"{party}.card")
    path.write_text(run("party", "card", "--home", party).stdout)
    return path, str(document(run("party", "card", "--home", party, "--json"))["fingerprint"])


def test_three_homes_end_with_one_roster(run: Run) -> None:
    # Given three homes that were made apart, When all cards went to all
    for party in PARTIES:
        init(run, party)
    for me in PARTIES:
        for other in PARTIES:
            path, fingerprint = card(run, other)
            if other != me:
                run("federation", "add", path, "--home", me, "--yes", fingerprint)
    # Then all have the same roster, and show the same fingerprints
    digests = {open_home(Path(party)).federation.digest() for party in PARTIES}
    assert len(digests) == 1
    shown = document(run("federation", "show", "hub/federation.yaml", "--json"))
    assert shown["digest"] == digests.pop() and set(shown["parties"]) == set(PARTIES)
    for party in PARTIES:
        assert shown["parties"][party]["card"] == card(run, party)[1]
        assert card(run, party)[1] in run("federation", "show", "bank-a/federation.yaml").stdout


def test_init_prints_no_secret_and_says_what_is_next(run: Run, tmp_path: Path) -> None:
    arguments = ("--party", "bank-a", "--broker", "mq.example")
    text = run("party", "init", "home", *arguments).stdout + run("party", "init", "other", *arguments, "--json").stdout
    text += run("party", "card", "--home", "home").stdout
    for name in ("identity.key", "sealing.key", "api.token", "broker.password"):
        content = (tmp_path / "home" / name).read_bytes()
        assert stat.S_IMODE((tmp_path / "home" / name).stat().st_mode) == 0o600
        assert content.strip().decode("latin-1") not in text and content.hex() not in text
    for words in ("party card --home home", "federation add", "federation grant", "refuses every job"):
        assert words in text


def test_init_writes_over_nothing(run: Run, tmp_path: Path) -> None:
    init(run, "bank-a")
    before = {path: path.read_bytes() for path in (tmp_path / "bank-a").iterdir()}
    arguments = ("party", "init", "bank-a", "--party", "bank-a", "--broker", "mq.example", "--json")
    assert "is not empty" in only_error(run(*arguments, exit_code=2))["message"]
    assert {path: path.read_bytes() for path in (tmp_path / "bank-a").iterdir()} == before


def test_init_takes_what_the_brokers_operator_gave(run: Run, tmp_path: Path) -> None:
    for name in ("ca.pem", "c.pem", "c.key"):
        (tmp_path / name).write_text(name)
    (tmp_path / "password").write_text("given\n")
    (tmp_path / "password").chmod(0o600)
    given = ("--password-file", "password", "--ca", "ca.pem", "--certificate", "c.pem", "--key", "c.key")
    init(run, "bank-a", *given, "--nodes", "3", "--broker", "[::1]:7")
    settings = open_home(tmp_path / "bank-a").settings
    assert settings.load_password() == "given" and settings.broker.endswith("@[::1]:7/fate.loans?queues=quorum")
    assert settings.ca is not None and settings.ca.read_text() == "ca.pem"
    (tmp_path / "password").chmod(0o644)
    bad = ("party", "init", "x", "--party", "x", "--broker", "h", "--json")
    assert "0644" in only_error(run(*bad, "--password-file", "password", exit_code=2))["message"]
    assert "nowhere" in only_error(run(*bad, "--ca", "nowhere", exit_code=2))["message"]
    assert "--no-tls" not in only_error(run(*bad, "--no-tls", exit_code=2))["message"]
    assert not (tmp_path / "x").exists()


def test_the_home_is_found_by_its_variable_or_where_we_are(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(run, "bank-a")
    assert "no party.yaml" in only_error(run("party", "card", "--json", exit_code=2))["message"]
    monkeypatch.setenv("FATE_LLM_HOME", str(tmp_path / "bank-a"))
    assert document(run("party", "card", "--json"))["party"] == "bank-a"
    monkeypatch.delenv("FATE_LLM_HOME")
    monkeypatch.chdir(tmp_path / "bank-a")
    assert document(run("party", "card", "--json"))["party"] == "bank-a"


# --- add -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def homes(run: Run) -> dict[str, tuple[Path, str]]:
    """Two homes; the card of each with its fingerprint."""
    for party in ("bank-a", "bank-b"):
        init(run, party)
    return {party: card(run, party) for party in ("bank-a", "bank-b")}


def members(home: str) -> tuple[str, ...]:
    return load_federation(Path(home) / "federation.yaml").members


def test_a_person_is_shown_the_fingerprint_and_asked(run: Run, homes: dict[str, tuple[Path, str]]) -> None:
    path, fingerprint = homes["bank-b"]
    for answer, code, after in (("n\n", 130, 1), ("", 130, 1), ("y\n", 0, 2), ("y\n", 0, 2)):
        done = CliRunner().invoke(main, ["federation", "add", str(path), "--home", "bank-a"], input=answer)
        assert done.exit_code == code and fingerprint in done.stdout
        assert len(members("bank-a")) == after
    assert "pinned already" in done.stdout


def test_a_script_gives_the_fingerprint(run: Run, homes: dict[str, tuple[Path, str]]) -> None:
    path, fingerprint = homes["bank-b"]
    add = ("federation", "add", path, "--home", "bank-a", "--json")
    assert "asks nobody" in only_error(run(*add, exit_code=2))["message"]
    error = only_error(run(*add, "--yes", homes["bank-a"][1], exit_code=2))
    assert fingerprint in error["message"] and "somebody else's" in error["hint"]
    assert members("bank-a") == ("bank-a",)
    found = document(run(*add, "--yes", fingerprint.replace(" ", "")))
    assert (found["party"], found["new"], set(found["parties"])) == ("bank-b", True, {"bank-a", "bank-b"})
    assert document(run(*add, "--yes", fingerprint))["new"] is False


def test_a_card_that_was_changed_is_refused(run: Run, homes: dict[str, tuple[Path, str]]) -> None:
    path, fingerprint = homes["bank-b"]
    path.write_text(path.read_text().replace("mq.example", "mq.evil"))
    add = ("federation", "add", path, "--home", "bank-a", "--yes", fingerprint, "--json")
    assert only_error(run(*add, exit_code=4))["code"] == "bad_signature"
    path.write_bytes(b"\xff\xfe\x00")
    assert "as text" in only_error(run(*add, exit_code=2))["message"]
    path.write_text("x" * 100_000)
    assert "at most" in only_error(run(*add, exit_code=2))["message"]
    assert members("bank-a") == ("bank-a",)


def test_new_keys_need_replace(run: Run, homes: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    path, fingerprint = homes["bank-b"]
    run("federation", "add", path, "--home", "bank-a", "--yes", fingerprint)
    (tmp_path / "bank-b").rename(tmp_path / "old")
    init(run, "bank-b")
    path, fingerprint = card(run, "bank-b")
    add = ("federation", "add", path, "--home", "bank-a", "--yes", fingerprint, "--json")
    assert "pinned with another identity, sealing" in only_error(run(*add, exit_code=2))["message"]
    run(*add, "--replace")
    assert load_federation(tmp_path / "bank-a" / "federation.yaml").member("bank-b").identity in path.read_text()


# --- with a broker -------------------------------------------------------------------------------------------------


def test_the_doctor_accepts_three_homes(run: Run, broker: BrokerNode, tmp_path: Path) -> None:  # noqa: F811
    """Made by hand, cards exchanged, places granted as the printed commands do: nothing fails, and all answer."""
    mark = os.urandom(3).hex()
    parties = [f"{party}-{mark}" for party in PARTIES]
    for party in parties:
        place = ("--broker", f"127.0.0.1:{broker.port}", "--no-tls")
        run("party", "init", party, "--party", party, "--federation", f"f{mark}", *place)
    cards = {party: card(run, party) for party in parties}
    for me in parties:
        for other in parties:
            run("federation", "add", cards[other][0], "--home", me, "--yes", cards[other][1])
    homes = {party: open_home(tmp_path / party) for party in parties}
    federation = homes[parties[0]].federation
    passwords = tmp_path / "passwords"
    passwords.mkdir()
    for party in parties:
        write_new(passwords / party, (tmp_path / party / "broker.password").read_bytes())
    place = Granted(broker, Setup(federation), passwords)
    try:
        for party in parties:
            place.grant(party)
        with contextlib.ExitStack() as stack:
            for party in parties[1:]:
                stack.enter_context(place.answering(member_of(homes[party])))
            done = run("doctor", "--as", tmp_path / parties[0] / "party.yaml", "--json")
    finally:
        for path in (f"vhosts/{federation.vhost}", *(f"users/{party}" for party in parties)):
            with contextlib.suppress(urllib.error.HTTPError):
                admin(broker, "DELETE", path)
    found = {check["name"]: check["status"] for check in document(done)["checks"]}
    assert "failed" not in found.values()
    assert [found[f"{party}: answers"] for party in parties[1:]] == ["ok", "ok"]


def member_of(home: Home) -> Membership:
    found = home.federation
    return Membership(home.party, home.identity(), found.identities(), found.digest(), __version__)


# --- approvals without a subcommand --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--home", "elsewhere"), ("list", "--home", "elsewhere")])
def test_approvals_without_a_subcommand_takes_the_options_of_list(run: Run, words: tuple[str, ...]) -> None:
    done = run("party", "approvals", *words, "--json", exit_code=2)
    assert "elsewhere is no party's home" in only_error(done)["message"]


def test_approvals_alone_looks_where_the_environment_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATE_LLM_HOME", "elsewhere")
    assert "elsewhere is no party's home" in run("party", "approvals", exit_code=2).stderr


def test_the_help_of_approvals_is_that_of_the_group(run: Run) -> None:
    assert "refuse" in run("party", "approvals", "--help").stdout
