"""Reads the metrics files while they grow, and hands every new point to a logger once.

The files are the queue: nothing waits in memory, and it does not matter which machine writes them. What was handed over is
kept beside what the logger writes, so that a run that goes on does not tell it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Protocol

from glottoscope.atomic import TEMPORARY_PREFIX
from glottoscope.study.metrics import SERIES, Point, parse, series_of

LOOK_S = 2.0  # between two looks at the files
KEEP_S = 10.0  # at most this often is it written down what was handed over
CHUNK = 2**18  # bytes of a file read at one look
MOST = 10_000  # points handed over at one look, about
UNIT = SERIES.index("unit")
MARK = 64  # bytes that tell whether a file is still the one that was read: times are among them


class Logger(Protocol):
    """Who is told of metrics. It may raise, and it may take as long as it likes."""

    def log(self, points: list[Point]) -> None: ...

    def close(self) -> None: ...


class Tail:
    """New points of the metrics files of a folder, each once.

    Args:
        notes: file in which it is written down how far they were read.
    """

    def __init__(self, folder: Path, notes: Path) -> None:
        self._folder, self._notes = folder, notes
        self._places: dict[str, tuple[int, bytes]] = {}  # file -> bytes read, the last of them
        # Series -> attempt and step of its last point. A unit whose file is gone (`clean`) begins at its first attempt again.
        there = _units(folder)
        self._sent = {name: at for name, at in _read_notes(notes).items() if json.loads(name)[UNIT] in there}

    def read(self) -> list[Point]:
        """What is new, or as much of it as is handed over at once."""
        found: list[Point] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            if len(found) >= MOST:
                break
            with contextlib.suppress(OSError):
                found += self._new(path)
        return found

    def _new(self, path: Path) -> list[Point]:
        found: list[Point] = []
        with open(path, "rb") as handle:
            start, mark = self._places.get(path.name, (0, b""))
            handle.seek(start - len(mark))
            if handle.read(len(mark)) != mark:  # its unit began anew
                start = handle.seek(0)
            while not found and (text := handle.read(CHUNK)):
                end = text.rfind(b"\n") + 1
                if not end and len(text) < CHUNK:  # half a line
                    break
                read = text[: end or CHUNK]  # so long a line is none of ours
                start = handle.seek(start + len(read))
                self._places[path.name] = start, read[-MARK:]
                found += self._unsent(read)
        return found

    def _unsent(self, text: bytes) -> list[Point]:
        found = []
        for point in parse(text):
            name, at = json.dumps(series_of(point)), (int(point.get("attempt") or 0), point["step"])
            if at > self._sent.get(name, (-1, -1)):
                self._sent[name] = at
                found.append(point)
        return found

    def keep(self) -> None:
        """Write down how far the files were read."""
        temporary = self._notes.with_name(f"{TEMPORARY_PREFIX}{self._notes.name}")
        with contextlib.suppress(OSError):
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._sent), encoding="utf-8")
            os.replace(temporary, self._notes)


def _units(folder: Path) -> set[str]:
    """Units that have a file, by its first lines."""
    found = set()
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError), open(path, "rb") as handle:
            found |= {point["unit"] for point in parse(handle.read(CHUNK))}
    return found


def _read_notes(path: Path) -> dict[str, tuple[int, int]]:
    try:
        return {name: (int(at[0]), int(at[1])) for name, at in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, IndexError, AttributeError):
        return {}


def follow(logger: Logger, tail: Tail, ending: threading.Event) -> None:
    """Hand new points over until it is to end and nothing is left; then close the logger."""
    kept = time.monotonic()
    while True:
        over = ending.is_set()  # asked before the files are: what was written before the end is read
        if points := tail.read():
            logger.log(points)
            if time.monotonic() - kept > KEEP_S:
                tail.keep()
                kept = time.monotonic()
        elif over:
            break
        else:
            ending.wait(LOOK_S)
    logger.close()
    tail.keep()
