"""Who works in a folder: one process at a time, on local disks, network file systems and several machines alike.

Two guards together. `flock` answers at once between processes of one machine, and the system lets go of what a dead
process held. Where a file system has no flock, or keeps it to one machine, a holder file decides: it is made with
O_EXCL, says who holds the folder, and holds a count that goes up every BEAT_S seconds. A holder on another machine
passes for dead once its count stood still for STALE_S seconds of our own clock: neither the times of files nor the
clocks of two machines are compared.

A run's local workers hold the flock with it (`WorkersLock`): where their driver is killed, the folder is free when the
last of them has ended, and not before.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from glottoscope.atomic import TEMPORARY_PREFIX, is_disk_full
from glottoscope.errors import InputError
from glottoscope.whereabouts import machine_id as _machine

BEAT_S = 10.0  # a holder counts up this often
STALE_S = 120.0  # a count that stood still for so long is a dead holder's
BRIEF_STALE_S = 10.0  # the same for a record's lock, which is held for milliseconds
ENDING_S = 60.0  # workers of a run that was stopped write a last state and end: waited for so long
RUN_LOCK = ".lock"
RUN_HOLDER = ".lock-holder"
RECORD_HOLDER = f"{TEMPORARY_PREFIX}lock"
# flock of a folder is EBADF on NFS, which wants what it locks open for writing.
NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
ENDING: dict[str, Any] = {"ending": True}  # in the place of a holder
WIDTH = 512  # bytes of a holder file: one write replaces it whole


class InUse(Exception):
    """Another process holds it."""

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__(holder)
        self.holder = holder


class WorkersLock:
    """A run directory's flock, to be given to a process that is spawned: until that ends, no other run gets the folder.

    flock belongs to the open file, which both processes then have; where there is none, only the holder file counts.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __reduce__(self) -> Any:
        return _received, (reduction.DupFd(self._handle),)


def _received(handle: Any) -> WorkersLock:
    number = handle.detach()
    os.set_inheritable(number, False)
    return WorkersLock(number)


_held: dict[Path, int] = {}  # run directories that this process holds -> descriptor of the lock


def lock_for_workers(folder: Path) -> WorkersLock | None:
    """What a worker of this process must be given; None where this process does not hold the folder."""
    handle = _held.get(folder.resolve())
    return WorkersLock(handle) if handle is not None else None


def _say(line: str) -> None:
    print(f"glottoscope: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def hold_run(folder: Path, say: Callable[[str], None] = _say) -> Iterator[None]:
    """Hold a run directory for this process; should another machine take it over, this process is interrupted.

    Args:
        say: told one line where it takes time to see whether a process of another machine is still at work.

    Raises:
        InputError: another process holds it (says which, where and since when), or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / RUN_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another folder, or its owner") from None
    path = folder / RUN_HOLDER
    try:
        alone = _flock_run(handle, path, say)
        own = _record()
        heart = _Heart(path, own, _take(path, own, alone=alone, stale=STALE_S, wait=False, say=say), say)
        heart.start()
        _held[folder.resolve()] = handle
        try:
            yield
        finally:
            del _held[folder.resolve()]
            heart.end()
    except InUse as error:
        if error.holder == ENDING:
            raise InputError(f"processes of a run that was stopped are still at work in {folder}: wait for them") from None
        raise InputError(
            f"another process is running the study in {folder}{_words(error.holder)}: wait for it or stop it"
        ) from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def hold_records(folder: Path) -> Iterator[None]:
    """Hold the record of a folder for a moment: wait for whoever has it, on this machine or another."""
    handle = os.open(folder, os.O_RDONLY)
    path = folder / RECORD_HOLDER
    try:
        own = _record()
        try:
            alone = _flock(handle, wait=True)
            os.close(_take(path, own, alone=alone, stale=BRIEF_STALE_S, wait=True))
        except OSError as error:
            if is_disk_full(error):
                raise InputError(f"no space left on device while writing {folder}: free some and run the study again") from None
            raise
        try:
            yield
        finally:
            _let_go(path, own)
    finally:
        os.close(handle)


def holder_of(folder: Path) -> str | None:
    """Who of this machine runs the study in a folder, as words; None where no one is known to. Writes nothing."""
    holder = _parse(_read(folder / RUN_HOLDER) or b"")
    return _words(holder).strip(" ()") if _lives(holder, None) else None


# ---- the holder file


def _record() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex, "host": socket.gethostname()[:100], "machine": _machine(), "space": _process_space(),
        "pid": os.getpid(), "started": _started(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "beat": 0,
    }  # fmt: skip


def _bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode().ljust(WIDTH - 1)[: WIDTH - 1] + b"\n"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(found: bytes) -> dict[str, Any]:
    try:
        record = json.loads(found)
    except ValueError:
        return {}  # its maker has not written it yet, or died before
    return record if isinstance(record, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= set(holder):
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"


def _take(
    path: Path, own: dict[str, Any], *, alone: bool | None, stale: float, wait: bool, say: Callable[[str], None] | None = None
) -> int:
    """Make the holder file; returns its descriptor.

    Args:
        alone: whether flock says that no process of this machine holds it; None where it cannot say.
        wait: until it is free, instead of raising.

    Raises:
        InUse: it is held, and not waited for.
    """
    seen: bytes | None = None
    since = time.monotonic()
    pause = min(1.0, stale / 20)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            pass
        else:
            try:
                os.pwrite(handle, _bytes(own), 0)
            except OSError:
                os.close(handle)
                path.unlink(missing_ok=True)
                raise
            return handle
        found = _read(path)
        if found is None:
            continue
        holder = _parse(found)
        lives = _lives(holder, alone)
        if lives is False or (found == seen and time.monotonic() - since > stale):
            _put_aside(path, found)
            continue
        if not wait and (lives or (seen is not None and found != seen)):
            raise InUse(holder)
        if found != seen:
            if seen is None and say is not None:
                say(f"{path.parent}{_words(holder)} may be in use: waiting up to {stale:.0f} s to see whether it is")
            seen, since = found, time.monotonic()
        time.sleep(0.005 if wait and time.monotonic() - since < 0.5 else pause)


def _put_aside(path: Path, found: bytes) -> None:
    """Remove a dead holder's file, unless someone was quicker and it is a new one."""
    aside = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-lock")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) == found:
        aside.unlink(missing_ok=True)
    else:
        os.rename(aside, path)


def _let_go(path: Path, own: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        if _parse(_read(path) or b"").get("token") == own["token"]:
            path.unlink()


class _Heart(threading.Thread):
    """Counts up in the holder file for as long as the run directory is held."""

    def __init__(self, path: Path, own: dict[str, Any], handle: int, say: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name="run directory lock")
        self._path, self._own, self._handle, self._say = path, own, handle, say
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(BEAT_S):
            # A full disk or a network file system that stutters says nothing about whose the folder is.
            with contextlib.suppress(OSError):
                if not self._is_ours():
                    self._say(f"{self._path.parent} was taken over by another process: this one stops")
                    _interrupt()
                    return
                self._own["beat"] += 1
                os.pwrite(self._handle, _bytes(self._own), 0)
                os.fsync(self._handle)

    def _is_ours(self) -> bool:
        for _ in range(10):  # a file put aside by mistake comes back at once
            found = _read(self._path)
            if found is not None:
                return _parse(found).get("token") == self._own["token"]
            time.sleep(0.02)
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        os.close(self._handle)
        self._handle = handle
        return True

    def end(self) -> None:
        self._ended.set()
        self.join()
        _let_go(self._path, self._own)
        os.close(self._handle)


# ---- what the system says


def _interrupt() -> None:
    """Stop the main thread as Ctrl-C does; where a shell started us with Ctrl-C ignored, as SIGTERM does."""
    if callable(signal.getsignal(signal.SIGINT)):
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def _flock_run(handle: int, path: Path, say: Callable[[str], None]) -> bool | None:
    """Flock of a run directory, as `_flock` gives it; waits for the workers of a process that has ended or is ending.

    Raises:
        InUse: a process that lives holds it, or workers have not ended in time.
    """
    started, said = time.monotonic(), False
    while (alone := _flock(handle, wait=False)) is False:
        holder = _parse(_read(path) or b"")
        if holder and _lives(holder, None) is not False:
            raise InUse(holder)
        waited = time.monotonic() - started
        if waited > ENDING_S:
            raise InUse(ENDING)
        if waited > 1 and not said:
            say(f"waiting up to {ENDING_S:.0f} s for processes of a run that was stopped to end in {path.parent}")
            said = True
        time.sleep(0.05)
    return alone


def _flock(handle: int, *, wait: bool) -> bool | None:
    """Whether flock gave us the lock; None where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return None
    return True


def _lives(holder: dict[str, Any], alone: bool | None) -> bool | None:
    """Whether a holder is at work; None where only its count can tell."""
    if holder.get("machine") != _machine():
        return None
    if alone:
        return False
    if alone is None and holder.get("space") == _process_space():
        return _is_running(int(holder.get("pid", 0)), str(holder.get("started", "")))
    return None


def _is_running(pid: int, started: str) -> bool:
    if started or _started(os.getpid()):
        return started != "" and _started(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str:
    """When a process started, in the system's own ticks: numbers of processes are used again. Empty where it is not running."""
    try:
        # The name in the second field may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _process_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
