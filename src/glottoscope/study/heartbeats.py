"""Signs of life of the units at work: small files in the run directory that another terminal, or another machine, can read.

A unit says how far it is as often as it likes; a thread of its process writes that down at most every WRITE_S seconds,
and at least every BEAT_S seconds where nothing is said. A file whose time is long past is a dead process's, or one that
does not answer. They are no results: nothing waits for the disk, and a write that fails is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from glottoscope.atomic import TEMPORARY_PREFIX
from glottoscope.walking import listed

WRITE_S = 2.0  # at most one write in this time
BEAT_S = 10.0  # a unit that says nothing for this long is written down as it is
SILENT_S = 60.0  # no sign of life for this long: said by `status`


class Sign(NamedTuple):
    """What a unit at work last wrote."""

    unit: str
    stage: str
    host: str
    pid: int
    done: float
    total: float
    words: str
    first: float  # `done` when it first said how far it is: a unit that goes on from a state starts beyond 0
    started: float  # seconds since 1970 by the clock of its own machine
    now: float  # the same, when this was written

    @property
    def rate(self) -> float:
        """Of the unit's own count, per second."""
        return pace(self.done - self.first, self.now - self.started)


def pace(done: float, seconds: float) -> float:
    """Done per second; 0 where nothing can be said yet."""
    return max(0.0, done) / seconds if seconds > 0 else 0.0


class Heart:
    """Writes the signs of life of one unit for as long as the block lasts, and removes them at its end."""

    def __init__(self, path: Path, stage: str, unit: str) -> None:
        self._path = path
        self._unit, self._stage = unit, stage
        self._state: tuple[float, float, str] = (0.0, 1.0, "")
        self._first: float | None = None
        self._started = time.time()
        self._written: tuple[float, float, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def tell(self, done: float, total: float, words: str = "") -> None:
        """Say how far the unit is; costs nothing but three assignments."""
        if self._first is None:
            self._first = done
        self._state = (done, total, words)

    def __enter__(self) -> Heart:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _beat(self) -> None:
        at = time.monotonic()
        while not self._ended.wait(WRITE_S):
            if self._state != self._written or time.monotonic() - at >= BEAT_S:
                self._write()
                at = time.monotonic()

    def _write(self) -> None:
        self._written = done, total, words = self._state
        sign = Sign(
            self._unit, self._stage, socket.gethostname(), os.getpid(), done, total, words, self._first or 0.0, self._started,
            time.time(),
        )  # fmt: skip
        temporary = self._path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}")
        try:
            temporary.write_text(json.dumps(sign._asdict(), ensure_ascii=False), encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:  # a full disk: what matters says so
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def signs(folder: Path) -> Iterator[Sign]:
    """Every unit at work, by name; a file that goes or is damaged meanwhile is passed over."""
    for path in listed(folder, "*.json"):
        if (sign := read_sign(path)) is not None:
            yield sign


def read_sign(path: Path) -> Sign | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Sign(**raw)
    return None


def clear(folder: Path) -> None:
    """Remove the signs of units that are not at work any more, and their folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()
