"""The three pages about deployment name files, targets, arguments, ports and users that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .compose import env_example
from .program import HOME, ROOT, demo_module
from .test_images import TARGETS, stages

PAGES = [
    ROOT / "docs" / "how-to" / f"{name}.md"
    for name in ("deploy-with-compose", "deploy-on-kubernetes", "run-as-a-system-service")
]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def table(text: str) -> dict[str, str]:
    """First and second column of all tables whose first column is in backticks; several names share their second."""
    rows = re.findall(r"^\| (`[^|]*`) \|([^|]*)\|", text, re.MULTILINE)
    return {name: second.strip().strip("`") for first, second in rows for name in re.findall(r"`([^`]+)`", first)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = set(re.findall(r"\bdeploy/[\w./@-]*[\w@-]", read(page)))
    assert named
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


def test_the_targets_and_arguments_are_those_of_the_dockerfile() -> None:
    found = table(read(PAGES[0]))
    arguments, built = stages(ROOT)
    for stage in built.values():
        for words in stage.all("ARG"):
            name, _, value = words[0].partition("=")
            if value:
                arguments[name] = value
    explained = {name: value for name, value in found.items() if name.isupper()}
    given = {name: value for name, value in arguments.items() if name not in ("VERSION", "REVISION")}
    assert explained == {**given, "VERSION": "", "REVISION": ""}
    assert set(TARGETS) <= found.keys()


def test_variables_that_are_named_are_in_the_examples() -> None:
    known = {name for path in (ROOT / "deploy").rglob(".env.example") for name in env_example(path)}
    named = set(re.findall(r"\b(?:PARTY|BROKER|DEMO)_[A-Z_]+", read(PAGES[0])))
    assert {"PARTY_HOME", "BROKER_FILES"} <= named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_numbers_are_those_of_the_files(page: Path) -> None:
    prepare = demo_module("prepare")
    text = read(page)
    assert set(re.findall(r"\b84\d\d\b", text)) <= {str(prepare.API_PORT)}
    assert set(re.findall(r"(?:user|chown -R) (\d+)", text)) <= {str(prepare.PARTY_USER), str(prepare.BROKER_USER)}
    assert set(re.findall(r"port (5\d{3})\b", text)) <= {"5671"}


def test_the_unit_and_its_page_speak_of_the_same_places() -> None:
    text = read(PAGES[2])
    assert f"{HOME}/bank-a" in text
    for name in re.findall(
        r"LoadCredential=([\w.]+):", read(ROOT / "deploy/systemd/fate-llm-party@.service.d/credentials.conf")
    ):
        assert f"/run/credentials/fate-llm-party@bank-a.service/{name}" in text
        assert name in re.search(r"\{([^}]*)\} /etc/fate_llm/bank-a/", text)[1].split(",")  # type: ignore[index]


def test_nothing_in_deploy_names_a_machine() -> None:
    """Paths of a machine that somebody worked on, hosts and indexes have no place in files that others use."""
    wrong = re.compile(r"/(?:work|root|home|mnt)/|https?://(?!\{|127\.0\.0\.1)|pypi|\b(?:10|192|172)\.\d+\.\d+\.\d+")
    count = 0
    for path in (ROOT / "deploy").rglob("*"):
        if path.is_file() and not {"demo-run", "__pycache__"} & set(path.parts):
            count += 1
            found = wrong.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.name}: {found and found[0]}"
    assert count > 20
