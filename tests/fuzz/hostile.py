"""What the fuzz tests share: how many examples, bytes and values that are nearly right, memory that something takes.

The fast tier tries some examples of each. Many more: `FATE_LLM_FUZZ=50 pytest tests/fuzz` tries fifty times as many.
An example is made by a generator of numbers from one seed: hypothesis draws the seeds, shows what came of one that
fails, and keeps it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import fate_llm.core

__all__ = ["FACTOR", "fuzz", "json_values", "nearly", "nearly_json", "peak_of", "places"]

FACTOR: Final = float(os.environ.get("FATE_LLM_FUZZ", "1"))
ROOT: Final = Path(fate_llm.core.__file__).parents[2]
_NUMBERS: Final = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
_TEXTS: Final = [
    "",
    "\0",
    "a/../b",
    "..",
    "/etc/passwd",
    "\ud800",
    "x" * 3000,
    "${HOME}",
    "__class__",
    "é\u202e",
    "1e400",
]
_SIMPLE: Final = [
    *_NUMBERS,
    *_TEXTS,
    None,
    True,
    False,
    -1,
    10**400,
    -(2**70),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings of a fuzz test. examples: in the fast tier."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=max(1, int(examples * FACTOR)), deadline=None, suppress_health_check=checks)


def _made(make: Callable[[Random], Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 2**64 - 1).map(lambda seed: make(Random(seed)))


def nearly(good: bytes) -> st.SearchStrategy[bytes]:
    """Good bytes with a few things done to them, or others altogether."""
    return _made(lambda random: _bytes_like(good, random))


def json_values() -> st.SearchStrategy[Any]:
    """Values of JSON (and what Python's reader takes for such), with those that programs get wrong."""
    return _made(lambda random: _value(random, 3))


def nearly_json(good: Any) -> st.SearchStrategy[Any]:
    """A good JSON value in which one to three things are other values, missing, added or exchanged."""
    return _made(lambda random: _value_like(good, random))


def _bytes_like(good: bytes, random: Random) -> bytes:
    if random.random() < 0.1:
        return random.randbytes(random.randrange(2 * len(good) + 16))
    found = bytearray(good)
    for _ in range(random.randint(1, 4)):
        at, size = random.randrange(len(found) + 1), random.randrange(17)
        what = random.choice(["flip", "flip", "number", "noise", "cut", "end", "again", "insert"])
        if what == "flip":
            found[at : at + 1] = bytes(byte ^ 1 << random.randrange(8) for byte in found[at : at + 1])
        elif what == "number":
            number, wide = random.choice(_NUMBERS), random.choice([1, 2, 4, 8])
            found[at : at + wide] = (number % 2 ** (8 * wide)).to_bytes(wide, random.choice(["big", "little"]))
        elif what == "noise":
            found[at : at + size] = random.randbytes(size)
        elif what == "cut":
            del found[at : at + size]
        elif what == "end":
            del found[at:]
        elif what == "again":
            found[at:at] = found[at : at + size] * random.randint(1, 3)
        else:
            found[at:at] = random.randbytes(random.randrange(9))
    return bytes(found)


def _value(random: Random, depth: int) -> Any:
    kind = random.randrange(6 if depth else 4)
    if kind < 3:
        return random.choice(_SIMPLE)
    if kind == 3:
        return random.choice(
            [random.randrange(-100, 100), random.gauss(0, 1e3), "".join(random.choices("abz.-_:/ ", k=5))]
        )
    if kind == 4:
        return [_value(random, depth - 1) for _ in range(random.randrange(4))]
    return {_key(random): _value(random, depth - 1) for _ in range(random.randrange(4))}


def _key(random: Random) -> str:
    return random.choice(_TEXTS) if random.random() < 0.5 else "".join(random.choices("abcxyz_", k=3))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _value_like(good: Any, random: Random) -> Any:
    found = copy.deepcopy(good)
    for _ in range(random.randint(1, 3)):
        paths = list(places(found))
        path = random.choice(paths)
        if not path:
            continue
        holder = _at(found, path[:-1])
        what = random.choice(["other", "other", "missing", "renamed", "moved"])
        if what == "missing":
            del holder[path[-1]]
        elif what == "renamed" and isinstance(holder, dict):
            holder[_key(random)] = holder.pop(path[-1])
        elif what == "moved":
            holder[path[-1]] = copy.deepcopy(_at(found, random.choice(paths)))
        else:
            holder[path[-1]] = _value(random, 3)
    return found


def peak_of(work: str, content: bytes) -> tuple[str, int]:
    """How `work(content)` of a script ends in a process of its own, and by how many bytes that grows, at its highest.

    It ends `well`, or by a `FateError`, by its name.
    """
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fate_llm.core.errors import FateError\n"
        f"{work}\n"
        "def highest():\n"  # not ru_maxrss: that begins with what the parent had
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) * 1024\n"
        "content = bytearray(int(sys.argv[1]))\n"
        "assert sys.stdin.buffer.readinto(content) == len(content)\n"
        "before = highest()\n"
        "try:\n    work(content); ended = 'well'\n"
        "except FateError as error:\n    ended = type(error).__name__\n"
        "print(ended, highest() - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(len(content))]
    done = subprocess.run(command, input=content, capture_output=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    ended, size = done.stdout.split()
    return ended.decode(), int(size)
