"""The units: by systemd's own verification where it is installed, and against the program everywhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fate_llm.runtime.federation import PartySettings

from .program import HOME, ROOT, command_fault, needs_service, variables_read
from .test_images import OTHERS_READ
from .test_kubernetes import home_files

FOLDER = "deploy/systemd"
SERVICE = f"{FOLDER}/fate-llm-party@.service"
SLICE = f"{FOLDER}/fate-llm-party.slice"
CREDENTIALS = f"{FOLDER}/fate-llm-party@.service.d/credentials.conf"
STATE_FOLDER = "/var/lib"  # what %S is for services of the system
MOST_EXPOSED = 2.0  # of 10, by systemd's own account


def unit(path: Path) -> dict[str, list[str]]:
    """Values by `Section.Key`, in order."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


def of_bank_a(text: str) -> str:
    return text.replace("%S", STATE_FOLDER).replace("%i", "bank-a")


def wrong_program(root: Path) -> Iterator[str]:
    """The command, its home, its variables and where it may write."""
    found = unit(root / SERVICE)
    home = f"{HOME}/bank-a"
    words = shlex.split(of_bank_a(found["Service.ExecStart"][0]))
    if fault := command_fault(words[1:]):
        yield fault
    if Path(words[0]).name != "fate_llm" or words[-2:] != ["--home", home]:
        yield f"it runs {words}"
    state = PartySettings.model_fields["state"].default
    if [of_bank_a(one) for one in found["Service.StateDirectory"]] != [f"fate_llm/bank-a/{state}"]:
        yield "the state is kept elsewhere"
    if found["Service.ProtectSystem"] != ["strict"] or "Service.ReadWritePaths" in found:
        yield "it can write elsewhere than into its state"
    for line in found["Service.Environment"]:
        name, _, value = of_bank_a(line).partition("=")
        if name not in variables_read() | OTHERS_READ.keys():
            yield f"{name} is read by nobody"
        elif value.startswith("/") and value != home and not value.startswith(f"{home}/{state}/"):
            yield f"{name} leads to {value}, which cannot be written to"
    if int(found["Service.TimeoutStopSec"][0]) < 10 or found["Service.KillMode"] != ["control-group"]:
        yield "it is killed before it can end, or leaves workers behind"
    if found["Service.Restart"] != ["always"]:
        yield "it is not started again"
    if f"{found['Service.Slice'][0]}" != Path(SLICE).name:
        yield "its slice is another"


def wrong_credentials(root: Path) -> Iterator[str]:
    """The credentials are the secrets of a home, each under its own name."""
    settings = yaml.safe_load(home_files()["party.yaml"])
    wanted = {settings[key] for key in ("identity", "sealing", "password", "key")} | {settings["api"]["token"]}
    lines = [line.partition(":") for line in unit(root / CREDENTIALS)["Service.LoadCredential"]]
    if {name for name, _, _ in lines} != wanted:
        yield f"credentials are {sorted(name for name, _, _ in lines)}, secrets {sorted(wanted)}"
    for name, _, path in lines:
        if path != f"/etc/fate_llm/%i/{name}":
            yield f"{name} comes from {path}"


CHECKS = (wrong_program, wrong_credentials)


@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=needs_service if check is wrong_program else ()) for check in CHECKS]
)
def test_the_units_are_what_the_program_needs(check: Callable[[Path], Iterator[str]]) -> None:
    assert list(check(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (SERVICE, "party serve", "party server", "party server"),
        (SERVICE, "--home %S/fate_llm/%i", "--home %S/fate_llm", "it runs"),
        (SERVICE, "StateDirectory=fate_llm/%i/state", "StateDirectory=fate_llm/%i", "kept elsewhere"),
        (SERVICE, "ProtectSystem=strict", "ProtectSystem=full", "can write elsewhere"),
        (SERVICE, "=FATE_LLM_HOME=", "=FATE_HOME=", "read by nobody"),
        (SERVICE, "%i/state/cache/matplotlib", "%i/matplotlib", "cannot be written to"),
        (SERVICE, "KillMode=control-group", "KillMode=process", "leaves workers"),
        (SERVICE, "Restart=always", "Restart=no", "not started again"),
        (SERVICE, "Slice=fate-llm-party.slice", "Slice=fate.slice", "slice is another"),
        (CREDENTIALS, "LoadCredential=sealing.key:", "LoadCredential=seal.key:", "credentials are"),
        (CREDENTIALS, "/etc/fate_llm/%i/api.token", "/etc/fate_llm/api.token", "comes from"),
    ],
)
def test_a_wrong_word_in_a_unit_is_found(spoiled: Any, file: str, old: str, new: str, said: str) -> None:
    root = spoiled(file, old, new)
    assert any(said in text for check in CHECKS for text in check(root))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as they would be installed, but for the program, which need not be where they look for it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    shutil.copytree(ROOT / FOLDER, tmp_path / "units")
    path = tmp_path / "units" / Path(SERVICE).name
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text), encoding="utf-8")
    drop_in = tmp_path / "units" / "fate-llm-party@bank-a.service.d"
    shutil.copytree(ROOT / CREDENTIALS.rpartition("/")[0], drop_in)
    shutil.copy(path, tmp_path / "units" / "fate-llm-party@bank-a.service")
    return tmp_path / "units"


def analyze(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True, check=False)


def test_systemd_accepts_the_units(installed: Path) -> None:
    done = analyze("verify", installed / "fate-llm-party@bank-a.service", installed / "fate-llm-party.slice")
    assert (done.returncode, done.stderr) == (0, "")
    # and would say what it does not know
    path = installed / "fate-llm-party@bank-a.service"
    path.write_text(path.read_text().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"), encoding="utf-8")
    assert "NoNewPrivilege" in analyze("verify", path).stderr


def test_systemd_finds_the_service_little_exposed(installed: Path) -> None:
    done = analyze(
        "security",
        "--offline=true",
        f"--threshold={MOST_EXPOSED * 10:.0f}",
        installed / "fate-llm-party@bank-a.service",
    )
    assert done.returncode == 0, done.stdout[-600:]
    level = re.search(r"exposure level .*: ([\d.]+)", done.stdout)
    assert level is not None
    assert float(level[1]) <= MOST_EXPOSED
