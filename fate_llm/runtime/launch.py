"""A worker of several ranks: `torchrun` starts them, rank 0 is the worker, the others run what a component shares out.

`command` says how whoever starts workers starts this one. Rank 0 gets the order on its stdin and is a worker in
everything (link, channel, journal, events, end). The other ranks know no secret: rank 0 tells them the pipeline and the
folders, and when a task begins whose component has `ranked` roles (a class variable: the roles that run on all ranks).

Rules:
1. The ranks are the party's own affair: how many, and how DeepSpeed is set up, stands in the party's settings and comes
   with the order. No pipeline and no other party has a say in it.
2. Rank 0 and the others hold a local socket, named by torchrun's run and open to the same user only. When rank 0 ends,
   however it ends, the others end at once.
3. An error at another rank is the party's error, said by rank 0. A rank that dies without a word ends rank 0 in the
   same way: whoever started the worker starts it again, as after any kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from pydantic import Field

from fate_llm.core.errors import ConfigurationError, FateError, InternalError, JobCancelled, error_from
from fate_llm.core.interfaces import Frozen

from .follower import Follower, use_deepspeed
from .worker import work

__all__ = ["LaunchSettings", "command", "main"]

_OURS = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
_RETRY, _TRIES = 0.1, 3000  # seconds between two tries to reach rank 0, which waits for its order; how many
_PR_SET_PDEATHSIG = 1
_GRACE = 15.0  # seconds in which rank 0 may find an error by itself that another rank has found
_LAST_WORD = 60.0  # seconds for rank 0 to end after an error elsewhere
Say = Callable[[Mapping[str, Any]], None]


class LaunchSettings(Frozen):
    """How a party's worker is started."""

    nproc: int = Field(1, ge=1, le=64, description="Ranks on this machine, one for each GPU.")
    deepspeed: Path | dict[str, Any] | None = Field(
        None, description="DeepSpeed's configuration, or the JSON file that holds it."
    )

    def order(self) -> dict[str, Any]:
        """What the worker's order says under `launch`.

        Raises:
            ConfigurationError: the DeepSpeed configuration cannot be read, or sets what is not the party's to set.
        """
        return {"nproc": self.nproc, "deepspeed": _deepspeed(self.deepspeed)}


def command(settings: LaunchSettings) -> list[str]:
    """The command line of a worker.

    Raises:
        ConfigurationError: see `LaunchSettings.order`.
    """
    if settings.order() == {"nproc": 1, "deepspeed": None}:
        return [sys.executable, "-m", "fate_llm.runtime.worker"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*torchrun, "--max-restarts=0", f"--nproc-per-node={settings.nproc}", "-m", "fate_llm.runtime.launch"]


def _deepspeed(value: Path | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The configuration with what the Trainer fills in left open."""
    if value is None:
        return None
    place, found = "launch.deepspeed", value
    if isinstance(value, Path):
        place = str(value)
        try:
            found = json.loads(value.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{place} cannot be read as JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{place} is no JSON object but {type(found).__name__}")
    _check_deepspeed(found, place)
    auto = dict.fromkeys(sorted(_OURS), "auto")
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **found, **auto}


def _check_deepspeed(found: Mapping[str, Any], place: str) -> None:
    for name in ("optimizer", "scheduler"):
        if name in found:
            raise ConfigurationError(
                f"{place}: {name}: the pipeline says how it is trained", hint=f"Leave {name} out of it."
            )
    for name in sorted(_OURS & found.keys()):
        if found[name] != "auto":
            raise ConfigurationError(f"{place}: {name} is {found[name]!r}; valid: 'auto', the pipeline sets it")
    zero = found.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigurationError(f"{place}: zero_optimization.stage is {stage!r}; valid: 0, 1, 2, 3")
    half = found.get("fp16", {})
    if isinstance(half, Mapping) and half.get("enabled", False) is not False:
        raise ConfigurationError(
            f"{place}: fp16 is enabled: it leaves out steps, and rounds would not be alike",
            hint="Use bf16, or loading.dtype of the pipeline.",
        )


# --- every rank ---------------------------------------------------------------------------------------------------


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Run one rank. torchrun says in the environment which."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries that print do not get between our lines
    address = f"\0fate_llm-ranks-{environment['TORCHELASTIC_RUN_ID']}-{environment['MASTER_PORT']}"
    if environment["RANK"] != "0":
        _follow(address, int(environment["RANK"]))
    lock = threading.Lock()

    def say(message: Mapping[str, Any]) -> None:
        try:
            with lock:
                answers.write(json.dumps(message, default=str) + "\n")
        except BrokenPipeError:  # whoever started us is gone; the end of stdin cancels
            return

    order = json.loads(sys.stdin.readline())
    try:
        say({"end": _lead(order, sys.stdin, say, address)})
    except FateError as error:
        say({"end": {"error": error.as_dict()}})
    # The process boundary: whatever it was, who started us gets an end and not a riddle.
    except Exception as error:
        say({"end": {"error": InternalError(f"{type(error).__name__}: {error}").as_dict()}})
        raise
    return 0


def _die_with_parent() -> None:
    """torchrun starts its ranks in sessions of their own: none of them may outlive it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)


# --- rank 0 -------------------------------------------------------------------------------------------------------


def _lead(order: Mapping[str, Any], commands: IO[str], say: Say, address: str) -> dict[str, Any]:
    """Be the worker, and tell the other ranks what to run."""
    use_deepspeed(order["launch"])
    hub = _Hub(address, order, say)

    def watched(message: Mapping[str, Any]) -> None:
        say(message)
        if "event" in message and message["event"][0] == "task_started":
            hub.go(message["event"][2])

    try:
        return work(order, commands, watched)
    finally:
        hub.close()


class _Hub:
    """Rank 0's end of the sockets to the other ranks."""

    def __init__(self, address: str, order: Mapping[str, Any], say: Say) -> None:
        known = ("party", "pipeline", "base", "folder", "launch")
        self._first = {"order": {**{name: order[name] for name in known}, "catalog": order.get("catalog", {})}}
        self._say = say
        self._lock = threading.Lock()
        self._told: list[Mapping[str, Any]] = [self._first]
        self._ranks: list[socket.socket] = []
        self._closed = threading.Event()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(address)
        self._server.listen(64)
        threading.Thread(target=self._accept, name="ranks", daemon=True).start()

    def go(self, task: str) -> None:
        """A task has begun here."""
        with self._lock:
            self._told.append({"go": task})
            for rank in self._ranks:
                _tell(rank, self._told[-1])

    def close(self) -> None:
        """The other ranks end."""
        with self._lock:
            self._closed.set()
            for each in (self._server, *self._ranks):
                with contextlib.suppress(OSError):  # the other end has closed it
                    each.shutdown(socket.SHUT_RDWR)  # a plain close does not wake the thread that waits for it
                each.close()

    def _accept(self) -> None:
        while True:
            try:
                rank, _ = self._server.accept()
            except OSError:  # closed
                return
            if _user_of(rank) != os.getuid():
                rank.close()
                continue
            with self._lock:
                self._ranks.append(rank)
                for message in self._told:
                    _tell(rank, message)
            threading.Thread(target=self._listen, args=(rank,), name="rank", daemon=True).start()

    def _listen(self, rank: socket.socket) -> None:
        """What another rank says: who it is, and with which error it ended. Its silence ends us."""
        number = "?"
        try:
            for line in rank.makefile(encoding="utf-8"):
                message = json.loads(line)
                number = message["rank"]
                if "error" in message:
                    self._end(error_from(**message["error"]), number)
                    return
        except OSError:  # closed by us
            pass
        with self._lock:
            if self._closed.is_set():
                return
        sys.stderr.write(f"rank {number} has ended without a word\n")
        os._exit(1)

    def _end(self, error: FateError, rank: int) -> None:
        """The main thread may wait for that rank in a library, where it cannot be asked to stop."""
        if self._closed.wait(_GRACE):
            return
        told = {**error.as_dict(), "message": f"rank {rank}: {error.message}"}
        self._say({"end": {"error": told}})
        os._exit(1)


def _tell(rank: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        rank.sendall((json.dumps(message) + "\n").encode("utf-8"))
    except OSError:  # it has ended; the thread that listens to it knows
        return


def _user_of(connection: socket.socket) -> int:
    """User id of the process at the other end."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[1])


# --- the other ranks ----------------------------------------------------------------------------------------------


def _follow(address: str, rank: int) -> NoReturn:
    """Run what rank 0 says, until it is gone."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the order is for rank 0
    hub = _reach(address)
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    throwaway = Path(tempfile.mkdtemp(prefix=f"fate_llm-rank-{rank}-"))

    def listen() -> None:
        try:
            for line in hub.makefile(encoding="utf-8"):
                messages.put(json.loads(line))
        except OSError:
            pass
        shutil.rmtree(throwaway, ignore_errors=True)
        os._exit(0)

    _tell(hub, {"rank": rank})
    threading.Thread(target=listen, name="rank 0", daemon=True).start()
    try:
        follower = Follower(messages.get()["order"], throwaway)
        while True:
            follower.run(messages.get()["go"])
    except JobCancelled:  # rank 0 has an error of its own, and says so itself
        error = None
    except FateError as found:
        error = found
    # The process boundary of a rank: whatever it was, rank 0 must hear of it.
    except Exception as found:
        traceback.print_exc()
        error = InternalError(f"{type(found).__name__}: {found}")
    if error is not None:
        _tell(hub, {"rank": rank, "error": error.as_dict()})
    time.sleep(_LAST_WORD)  # rank 0 ends first, and with it this process
    shutil.rmtree(throwaway, ignore_errors=True)
    os._exit(1)


def _reach(address: str) -> socket.socket:
    """A connection to rank 0, which listens when it has its order."""
    for _ in range(_TRIES):
        hub = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            hub.connect(address)
        except OSError:
            hub.close()
            time.sleep(_RETRY)
            continue
        if _user_of(hub) != os.getuid():
            raise InternalError("the ranks' socket belongs to another user")
        return hub
    raise InternalError(f"rank 0 was not there within {_TRIES * _RETRY:g} s")


if __name__ == "__main__":
    sys.exit(main())
