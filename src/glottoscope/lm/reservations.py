"""Room on a disk that processes, also of several machines, share out: who is at work, and how much each is to take.

A reservation is a file, TOKEN.MACHINE.reserved, with the bytes and a count; what is fetched for it lies beside it, under
names that end with -TOKEN. Its maker holds a flock on it, so that a killed process holds no room. flock may be missing,
or keep to one machine: another machine's reservation passes for a dead one's only when its count, raised every BEAT_S
seconds, stood still for STALE_S seconds of our own clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from glottoscope.walking import tree_size
from glottoscope.whereabouts import machine_id

SUFFIX = ".reserved"
BEAT_S = 10.0
STALE_S = 120.0
FIELD = 20  # characters of a number in the file


class Taken(NamedTuple):
    """What others at work have reserved."""

    reserved: int  # bytes
    pending: int  # of these, bytes that are not on the disk yet


class Reservation:
    """This process's own: alive for as long as its block."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle = path, handle
        self._need = self._beat = 0
        self._guard, self._ended = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._count, daemon=True, name="reservation")

    @property
    def token(self) -> str:
        return _token(self.path.name)

    def take(self, need: int) -> None:
        """Reserve so many bytes."""
        with self._guard:
            self._need = need
            self._write()

    def start(self) -> None:
        self._heart.start()

    def end(self) -> None:
        self._ended.set()
        self._heart.join()
        self.path.unlink(missing_ok=True)
        os.close(self._handle)

    def _count(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._guard, contextlib.suppress(OSError):  # a disk that stutters says nothing about this process
                self._beat += 1
                self._write()

    def _write(self) -> None:
        os.pwrite(self._handle, f"{self._need:<{FIELD}}{self._beat:<{FIELD}}".encode(), 0)
        os.fsync(self._handle)  # other machines see it now


class Reservations:
    """The reservations of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._machine = hashlib.sha256(machine_id().encode()).hexdigest()[:12]
        self._seen: dict[str, tuple[bytes, float]] = {}  # file -> what it held, since when

    @contextlib.contextmanager
    def made(self) -> Iterator[Reservation]:
        """A reservation of no bytes yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex[:12]}.{self._machine}{SUFFIX}"
        with self.alone():  # between its making and its lock it looks like a dead one's
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            _flock(handle, fcntl.LOCK_EX)
        own = Reservation(path, handle)
        own.start()
        try:
            yield own
        finally:
            own.end()

    def taken(self, own: Reservation) -> Taken:
        """What others have; what a dead one reserved is let go, and what it fetched removed."""
        reserved = pending = 0
        for path in self._files():
            if path == own.path:
                continue
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDWR)
                try:
                    content = os.pread(handle, 2 * FIELD, 0)
                    if self._is_dead(path, handle, content):
                        self._let_go(path)
                        continue
                finally:
                    os.close(handle)
                need = int(content[:FIELD] or 0)
                reserved += need
                pending += max(0, need - sum(tree_size(p) for p in self._fetched(path)))
        return Taken(reserved, pending)

    def clear(self) -> list[str]:
        """Let go of all but what living processes of this machine hold; returns the ends of their names."""
        kept: list[str] = []
        if not self.folder.is_dir():
            return kept
        with self.alone():  # a reservation that is being made looks like a dead one's
            for path in self._files():
                with contextlib.suppress(FileNotFoundError):
                    handle = os.open(path, os.O_RDWR)
                    try:
                        if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
                            kept.append(_token(path.name))
                        else:
                            self._let_go(path)
                    finally:
                        os.close(handle)
        return [f"-{token}" for token in kept]

    @contextlib.contextmanager
    def alone(self, name: str = ".lock") -> Iterator[None]:
        """Keep the others of this machine, and of others where flock reaches them, from the same block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _is_dead(self, path: Path, handle: int, content: bytes) -> bool:
        alone = _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if alone is False:
            return False
        if alone and path.name.split(".")[1] == self._machine:
            return True
        now = time.monotonic()
        before, since = self._seen.get(path.name, (b"", now))
        if path.name not in self._seen or content != before:
            self._seen[path.name] = content, now
            return False
        return now - since > STALE_S

    def _files(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [self.folder / name for name in sorted(os.listdir(self.folder)) if name.endswith(SUFFIX)]
        return []

    def _fetched(self, path: Path) -> list[Path]:
        """What lies there for a reservation, under its last name or its temporary one."""
        end = f"-{_token(path.name)}"
        return [self.folder / name for name in os.listdir(self.folder) if name.endswith(end)]

    def _let_go(self, path: Path) -> None:
        for left in self._fetched(path):
            shutil.rmtree(left, ignore_errors=True)
        path.unlink(missing_ok=True)


def _token(name: str) -> str:
    return name.partition(".")[0]


def _flock(handle: int, kind: int) -> bool | None:
    """Whether the lock is ours; None where the file system has none."""
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
