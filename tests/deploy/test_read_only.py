"""A service in a file system as containers and units give it: everything read-only but its state and a tmpfs.

Made with a mount namespace, which needs root's rights; skipped where there are none.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .program import HOME, ROOT, needs_service
from .test_images import environment, last, lineage, stages

PATIENCE = 120.0  # seconds until a test that hangs is called so
PLACE, TEMPORARY = "/mnt", "/media"  # folders that every machine has
INSIDE = f"""
set -eu
mount --make-rprivate /
mount --bind "$1" {PLACE}
mount --bind "$2" {PLACE}/state
mount -t tmpfs tmpfs {TEMPORARY}
mount -o remount,bind,ro {PLACE}
mount -o remount,bind,ro /
! touch {PLACE}/policy.yaml 2>/dev/null
! touch {PLACE}/new 2>/dev/null
! touch /etc/new 2>/dev/null
touch {PLACE}/state/.writable
shift 2
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


def in_namespace(*words: object) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", INSIDE, "sh", *map(str, words)]


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A party's home with an empty folder `state`, and what is mounted over that."""
    home, state = tmp_path / "home", tmp_path / "volume"
    words = [sys.executable, "-m", "fate_llm", "party", "init", str(home), "--party", "a", "--broker", "localhost:1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for folder in (home / "state", state):
        folder.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("needs root, unshare and setpriv")
    if subprocess.run(in_namespace(home, state, "true"), capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine gives no mount namespaces, or has several file systems in the way")
    return home, state


@pytest.fixture
def service(places: tuple[Path, Path], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What the image starts, with the image's environment."""
    line = lineage(stages(ROOT)[1], "slim")
    variables = {
        name: value.replace(HOME, PLACE) for name, value in environment(line).items() if value.startswith("/var/")
    }
    with (tmp_path / "service.log").open("wb") as log:
        process = subprocess.Popen(
            in_namespace(*places, sys.executable, "-B", "-m", "fate_llm", *last(line, "CMD")),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": TEMPORARY, **variables},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@needs_service
def test_a_service_needs_to_write_to_nothing_but_its_state(
    places: tuple[Path, Path], service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    # When it has come up
    note = places[1] / "service.json"
    deadline = time.monotonic() + PATIENCE
    while not note.exists():
        assert service.poll() is None, (tmp_path / "service.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Then nothing but the broker, which is not there, is amiss
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{json.loads(note.read_text())['port']}/v1/health", timeout=30).close()
    assert caught.value.code == 503
    reasons = json.loads(caught.value.read())["reasons"]
    caught.value.close()
    assert len(reasons) == 1
    assert "broker" in reasons[0]
    assert (places[1] / "fate.db").exists()
    assert not any((places[0] / "state").iterdir())
    # and when it is told to end, it ends in order
    service.send_signal(signal.SIGTERM)
    assert service.wait(PATIENCE) == 0
    assert not note.exists()
