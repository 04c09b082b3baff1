"""Compose files, read by two real parsers, against the program, the images and each other."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from fate_llm.runtime.federation import BrokerPlace, PartySettings
from fate_llm.runtime.federation_broker import CONFIG_FOLDER
from fate_llm.runtime.federation_setup import SHARED, plan_setup, set_up
from fate_llm.runtime.service.api import create_app

from . import compose
from .program import HOME, ROOT, command_fault, demo_module, library, needs_service, program, variables_read

BROKER, PARTY, DEMO = "deploy/compose/broker", "deploy/compose/party", "deploy/demo"
FILES = {
    BROKER: ("compose.yaml",),
    PARTY: ("compose.yaml", "compose.gpu.yaml"),
    DEMO: ("compose.yaml",),
}
ROOT_ALLOWED = {"setup"}  # runs once, without network, to give volumes to their users
TLS = BrokerPlace.model_fields["port"].default
USERS = {"party": "10001:10001", "broker": "999:999"}
OTHERS_READ = {"RABBITMQ_LOGS": "RabbitMQ"}


def values(root: Path, folder: str) -> dict[str, str]:
    """The variables of the example, those that have to be filled in filled in."""
    found = compose.env_example(root / folder / ".env.example")
    return {name: value or "./given" for name, (value, _) in found.items()}


def services(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Folder, name and content of every service that stands for itself."""
    count = 0
    for folder in FILES:
        for name, service in compose.load(root / folder / "compose.yaml", values(root, folder))["services"].items():
            count += 1
            yield folder, name, service
    assert count >= 7, "services are missing: the test looks at the wrong place"


def is_party(service: dict[str, Any]) -> bool:
    return "fate-llm-party" in service["image"] and "entrypoint" not in service


def mounts(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is mounted, by target; the short form spelled out."""
    found = {}
    for one in service.get("volumes", ()):
        if isinstance(one, str):
            source, target, *mode = one.split(":")
            kind = "bind" if source.startswith((".", "/")) else "volume"
            one = {"type": kind, "source": source, "target": target, "read_only": mode == ["ro"]}
        found[one["target"]] = one
    return found


# --- Checks: each says what is wrong --------------------------------------------------------------------------------


def wrong_variables(root: Path) -> Iterator[str]:
    """What is set in compose files and what the examples explain are the same, with the same defaults."""
    for folder, names in FILES.items():
        used: dict[str, set[str | None]] = {}
        for name in names:
            for key, defaults in compose.variables((root / folder / name).read_text(encoding="utf-8")).items():
                used.setdefault(key, set()).update(defaults)
        example = compose.env_example(root / folder / ".env.example")
        for key in sorted(used.keys() ^ example.keys()):
            where = "the example does not explain" if key in used else "nothing uses"
            yield f"{folder}: {where} {key}"
        for key in used.keys() & example.keys():
            value, optional = example[key]
            if optional and used[key] != {value}:
                yield f"{folder}: {key} is said to be {value!r} and is {used[key]}"
            if not optional and used[key] != {None}:
                yield f"{folder}: {key} has to be given, and has the default {used[key]}"


def wrong_rights(root: Path) -> Iterator[str]:
    """What a container may do: nothing that its work does not need."""
    for folder, name, service in services(root):
        where = f"{folder}: {name}"
        if service.get("read_only") is not True:
            yield f"{where} can write to its root"
        if service.get("cap_drop") != ["ALL"]:
            yield f"{where} keeps capabilities"
        if service.get("security_opt") != ["no-new-privileges:true"]:
            yield f"{where} may get new privileges"
        if service.get("privileged") or service.get("network_mode") == "host" or service.get("pid"):
            yield f"{where} has the host's rights"
        if name not in ROOT_ALLOWED:
            user = USERS["party" if is_party(service) else "broker"]
            if service.get("user") != user:
                yield f"{where} runs as {service.get('user')}, not {user}"
            if service.get("cap_add"):
                yield f"{where} adds capabilities"
            if service.get("restart") != "unless-stopped":
                yield f"{where} is not started again"
            if not {"mem_limit", "pids_limit", "healthcheck"} <= service.keys():
                yield f"{where} has no limits or no health check"
        elif service.get("network_mode") != "none" or "profiles" not in service:
            yield f"{where} is root with a network"
        if not any(entry.startswith("/tmp:") for entry in service.get("tmpfs", ())):
            yield f"{where} has no place for temporary files"
        for target, mount in mounts(service).items():
            if "docker.sock" in target:
                yield f"{where} holds the engine"
            if mount["type"] == "bind" and not mount.get("read_only"):
                yield f"{where} can write to the host's {mount['source']}"


def wrong_ports(root: Path) -> Iterator[str]:
    """Published are the API, on loopback, and the broker's TLS port."""
    api = demo_module("prepare").API_PORT
    for folder, name, service in services(root):
        for text in service.get("ports", ()):
            host, _, rest = str(text).rpartition(":")[0].rpartition(":")
            inner = int(str(text).rpartition(":")[2])
            if is_party(service) and (host != "127.0.0.1" or inner != api):
                yield f"{folder}: {name} publishes {text}; its API is {api}, for this machine only"
            if not is_party(service) and (inner != TLS or int(rest) != TLS):
                yield f"{folder}: {name} publishes {text}; a broker listens on {TLS}"
        if is_party(service) and len(service.get("ports", ())) != 1:
            yield f"{folder}: {name} has no API"
        if name == "broker" and str(service["healthcheck"]["test"][-1]) != str(TLS):
            yield f"{folder}: the health check of the broker asks for another port than {TLS}"


def wrong_commands(root: Path) -> Iterator[str]:
    """What runs in the containers of parties is understood by the program, and so are health checks."""
    for folder, name, service in services(root):
        if not is_party(service):
            continue
        kind, tool, *words = service["healthcheck"]["test"]
        for line in (service["command"], words):
            if fault := command_fault(line):
                yield f"{folder}: {name}: {fault}"
            if line[-2:] != ["--home", HOME]:
                yield f"{folder}: {name}: {line} is about another home"
        if (kind, tool) != ("CMD", "fate_llm"):
            yield f"{folder}: {name} has the health check {kind} {tool}"


def wrong_places(root: Path) -> Iterator[str]:
    """Where files are looked for is where they are mounted; targets of images and environment are known."""
    state = f"{HOME}/{PartySettings.model_fields['state'].default}"
    dockerfile = (root / "deploy/images/party.Dockerfile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    for folder, name, service in services(root):
        found = mounts(service)
        where = f"{folder}: {name}"
        if is_party(service):
            if not found.get(HOME, {}).get("read_only") or found.get(state, {"read_only": True}).get("read_only"):
                yield f"{where}: the home is not read-only with a state that is not"
            if float(service["stop_grace_period"].rstrip("s")) < 10:
                yield f"{where} is killed before it can end"
        elif name == "broker" and not found.get(CONFIG_FOLDER, {}).get("read_only"):
            yield f"{where}: nothing is mounted read-only at {CONFIG_FOLDER}"
        if build := service.get("build"):
            file = (root / folder / build["context"] / build["dockerfile"]).resolve()
            if file != (root / "deploy/images/party.Dockerfile").resolve() or build["target"] not in targets:
                yield f"{where} is built from {file} {build['target']}"
            if service["image"].rpartition(":")[2] != build["target"]:
                yield f"{where} is called {service['image']} and built as {build['target']}"
        for key, value in service.get("environment", {}).items():
            if key not in variables_read() | OTHERS_READ.keys() or (key == "FATE_LLM_HOME" and value != HOME):
                yield f"{where} sets {key} to {value}"
        for source in (one["source"] for one in found.values() if one["type"] == "bind" and folder == DEMO):
            if not (root / folder / source).exists():
                yield f"{where} mounts {source}, which is not there"


def wrong_volumes(root: Path) -> Iterator[str]:
    """Every named volume is declared, and every one that is declared is used."""
    for folder in FILES:
        declared = set(compose.load(root / folder / "compose.yaml", values(root, folder)).get("volumes", {}))
        inside = [one for place, _, service in services(root) if place == folder for one in mounts(service).values()]
        for name in sorted(declared ^ {one["source"] for one in inside if one["type"] == "volume"}):
            yield f"{folder}: the volume {name} is not both declared and used"


CHECKS = (wrong_variables, wrong_rights, wrong_ports, wrong_commands, wrong_places, wrong_volumes)


@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=needs_service if check is wrong_commands else ()) for check in CHECKS]
)
def test_the_compose_files_are_what_program_and_images_need(check: Callable[[Path], Iterator[str]]) -> None:
    assert list(check(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (f"{PARTY}/.env.example", "#PARTY_SHM=", "#PARTY_SHARED=", "does not explain PARTY_SHM"),
        (f"{PARTY}/compose.yaml", "${PARTY_SHM:-1g}", "1g", "nothing uses PARTY_SHM"),
        (f"{PARTY}/.env.example", "#PARTY_CPUS=4.0", "#PARTY_CPUS=8", "is said to be"),
        (f"{PARTY}/compose.yaml", "${PARTY_HOME:?", "${PARTY_HOME:-", "has to be given"),
        (f"{BROKER}/compose.yaml", "read_only: true\n    cap", "read_only: false\n    cap", "write to its root"),
        (f"{PARTY}/compose.yaml", "cap_drop: [ALL]", "cap_drop: [NET_RAW]", "keeps capabilities"),
        (f"{DEMO}/compose.yaml", "no-new-privileges:true", "seccomp:unconfined", "new privileges"),
        (f"{PARTY}/compose.yaml", "init: true", "privileged: true", "the host's rights"),
        (f"{PARTY}/compose.yaml", 'user: "10001:10001"', 'user: "1000:1000"', "runs as"),
        (f"{BROKER}/compose.yaml", "restart: unless-stopped", 'restart: "no"', "not started again"),
        (f"{BROKER}/compose.yaml", "mem_limit:", "x-mem_limit:", "no limits"),
        (f"{DEMO}/compose.yaml", "network_mode: none", "network_mode: bridge", "root with a network"),
        (f"{PARTY}/compose.yaml", "- /tmp:", "- /run:", "temporary files"),
        (f"{PARTY}/compose.yaml", "target: /data\n        read_only: true", "target: /data", "write to the host"),
        (f"{PARTY}/compose.yaml", "127.0.0.1:${PARTY", "0.0.0.0:${PARTY", "this machine only"),
        (f"{PARTY}/compose.yaml", ":8470", ":8080", "publishes"),
        (f"{BROKER}/compose.yaml", ":-5671}:${BROKER_PORT:-5671}", ":-5671}:5672", "a broker listens"),
        (f"{DEMO}/compose.yaml", 'port_listener", "5671"', 'port_listener", "5672"', "asks for another port"),
        (f"{PARTY}/compose.yaml", "[party, serve,", "[party, run,", "party run"),
        (f"{PARTY}/compose.yaml", '"health", "--home"', '"health", "--house"', "no such option"),
        (f"{DEMO}/compose.yaml", "serve, --home, /var/lib/fate_llm", "serve, --home, /home", "another home"),
        (f"{PARTY}/compose.yaml", "target: /var/lib/fate_llm\n", "target: /etc/fate_llm\n", "not read-only with"),
        (f"{PARTY}/compose.yaml", "/var/lib/fate_llm/state", "/var/lib/fate_llm/status", "not read-only with"),
        (f"{PARTY}/compose.yaml", "stop_grace_period: 15s", "stop_grace_period: 5s", "before it can end"),
        (f"{BROKER}/compose.yaml", "target: /etc/rabbitmq", "target: /etc/rabbit", "nothing is mounted"),
        (f"{PARTY}/compose.yaml", "party.Dockerfile", "Dockerfile", "is built from"),
        (f"{PARTY}/compose.yaml", "target: ${PARTY_TARGET:-slim}", "target: small", "is built from"),
        (f"{DEMO}/compose.yaml", "image: fate-llm-party:demo", "image: fate-llm-party:train", "is called"),
        (f"{PARTY}/compose.yaml", "FATE_LLM_HOME:", "FATE_LLM_HOUSE:", "sets FATE_LLM_HOUSE"),
        (f"{DEMO}/compose.yaml", "- bank-b-state:", "- bank-d-state:", "not both declared"),
        (f"{PARTY}/compose.yaml", "volumes:\n  state:", "volumes:\n  states:", "not both declared"),
        (f"{DEMO}/compose.yaml", "./pipeline.yaml:", "./pipelines.yaml:", "is not there"),
    ],
)
def test_a_wrong_word_in_a_compose_file_is_found(spoiled: Any, file: str, old: str, new: str, said: str) -> None:
    root = spoiled(file, old, new)
    found = (text for check in CHECKS for text in check(root))
    if said == "no such option" and command_fault(["party", "health"]):
        pytest.skip("this version has no `fate_llm party health`")
    assert any(said.lower() in text.lower() for text in found)


# --- Real parsers ----------------------------------------------------------------------------------------------------


def paths(folder: str) -> list[Path]:
    return [ROOT / folder / name for name in FILES[folder]]


@pytest.mark.parametrize("folder", sorted(FILES))
def test_the_specification_accepts_every_file(folder: str) -> None:
    spec = library("compose_spec")
    for path in paths(folder):
        found = compose.load(path, values(ROOT, folder))
        found.pop("x-party", None)
        spec.PyCompose.from_yaml(yaml.safe_dump(found)).validate()


def test_the_specification_refuses_what_is_none() -> None:
    spec = library("compose_spec")
    found = compose.load(ROOT / PARTY / "compose.yaml", values(ROOT, PARTY))
    for key, value in (("read_onyl", True), ("cap_drop", "ALL"), ("mem_limit", "plenty")):
        wrong = {**found, "services": {"party": {**found["services"]["party"], key: value}}}
        with pytest.raises((ValueError, TypeError)):
            spec.PyCompose.from_yaml(yaml.safe_dump(wrong)).validate()


def resolved(tmp_path: Path, folder: str, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a compose program makes of all files of a folder together. It only asks its engine for a version."""
    engine = tmp_path / "podman"
    engine.write_text("#!/bin/sh\necho podman version 4.3.1\n", encoding="ascii")
    engine.chmod(0o755)
    files = [word for path in paths(folder) for word in ("--file", str(path))]
    return subprocess.run(
        [program("podman-compose"), "--podman-path", str(engine), *files, "config"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath, "HOME": str(tmp_path), **given},
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(FILES))
def test_a_compose_program_makes_the_same_of_the_files(tmp_path: Path, folder: str) -> None:
    done = resolved(tmp_path, folder, values(ROOT, folder))
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)["services"]
    expected = compose.load(ROOT / folder / "compose.yaml", values(ROOT, folder))["services"]
    assert found.keys() >= expected.keys() - ROOT_ALLOWED
    for name in found:
        for key in ("user", "read_only", "cap_drop", "restart", "mem_limit"):
            assert str(found[name].get(key)) == str(expected[name].get(key)), (name, key)
    if folder == PARTY:  # the second file changes what it should, and nothing else
        assert found["party"]["image"] == "fate-llm-party:cuda"
        assert found["party"]["build"]["target"] == "cuda"
        (device,) = found["party"]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "lacking"), [(PARTY, "PARTY_HOME"), (BROKER, "BROKER_FILES")])
def test_without_its_folder_nothing_starts(tmp_path: Path, folder: str, lacking: str) -> None:
    done = resolved(tmp_path, folder, values(ROOT, folder) | {lacking: ""})
    assert done.returncode != 0
    assert lacking in done.stderr


def test_variables_are_put_in_as_compose_does() -> None:
    text = "$A ${A} ${B:-b} ${E:-e} ${E-kept} $$A ${C:-}"
    assert compose.interpolated(text, {"A": "1", "E": ""}) == "1 1 b e  $A "
    with pytest.raises(compose.Unset, match="why"):
        compose.interpolated("${B:?why}", {"B": ""})


# --- Against the program ---------------------------------------------------------------------------------------------


def test_the_broker_finds_the_files_that_init_writes() -> None:
    # Given what `federation init` writes for a shared broker
    setup = plan_setup(name="x", parties=["a", "b"], topology="shared", brokers=["mq.example"])
    files = set_up(setup, now=datetime.now(UTC))
    inside = {name.rpartition("/")[2]: text for name, text in files.items() if name.startswith(f"brokers/{SHARED}/")}
    # Then the example names them all, and every path in them lies where compose mounts the folder
    example = (ROOT / BROKER / ".env.example").read_text(encoding="utf-8")
    assert len(inside) == 6
    assert all(name in example for name in inside)
    named = re.findall(r"(/[\w./-]+\.(?:pem|key|json))", inside["rabbitmq.conf"].decode())
    (service,) = (one for folder, name, one in services(ROOT) if (folder, name) == (BROKER, "broker"))
    assert len(named) >= 4
    for path in named:
        folder, _, file = path.rpartition("/")
        assert folder in mounts(service)
        assert file in inside
    assert f"listeners.ssl.default = {TLS}" in inside["rabbitmq.conf"].decode()


def test_the_health_path_exists() -> None:
    class Nothing:
        def health(self) -> dict[str, Any]:
            return {"status": "ok"}

    app = create_app(Nothing(), "token")  # type: ignore[arg-type]
    assert "/v1/health" in app.openapi()["paths"]


@needs_service
def test_the_commands_that_the_examples_tell_to_run_exist() -> None:
    count = 0
    for path in (ROOT / "deploy").rglob("*"):
        if path.is_file() and "demo-run" not in path.parts and path.suffix != ".pyc":
            for line in re.findall(r"`fate_llm ((?:[a-z][a-z-]* ?)+)", path.read_text(encoding="utf-8")):
                count += 1
                fault = command_fault(line.split())
                assert fault is None or "Missing" in fault, f"{path.name}: {fault}"
    assert count >= 3
