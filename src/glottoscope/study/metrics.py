"""How trainings get on, in numbers: `RUN/metrics/UNIT.jsonl`, a line for each point, for people and their loggers.

The files are no results. No record names them, no key depends on them, and one that cannot be written is left out. What a line
says the training has computed anyway; a line is appended to the file and the file is closed, so that other machines see it.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glottoscope.atomic import TEMPORARY_PREFIX

POINTS = 200  # of one training, about
SERIES = ("stage", "unit", "model", "checkpoint", "layer", "sae_seed", "grid_lr")  # what a line is about; null or left out: none
ADDED = ("attempt", "tokens_per_second", "time")  # what a line says of its own making

Point = dict[str, Any]


def series_of(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """What training a point belongs to."""
    return tuple(point.get(name) for name in SERIES)


class MetricsFile:
    """Writes the metrics of one unit.

    A unit that goes on from a state goes on in the same file: points that the training still knows stay, what lies beyond
    its state is dropped, since it comes again. `attempt` counts the starts of the unit.

    Args:
        about: fields that are the same in all lines.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self._about = path, dict(about)
        self._attempt = 1
        self._head: str | None = ""  # what the file begins with, until it is written; None: it is
        self._tokens, self._at = 0, time.monotonic()
        self._broken = False

    def begin(self, known: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start, or go on after the points that the training knows already. Nothing is written before the next `add`."""
        before = list(points(self._path))
        self._attempt = 1 + max((p["attempt"] for p in before if isinstance(p.get("attempt"), int)), default=0)
        old = {_place(p): p for p in before}
        lines, self._tokens, is_same = [], 0, True
        for point in known:
            whole = {**self._about, **_plain(point)}
            same = old.get(_place(whole))
            # A line of other settings may have the same step, but not the same numbers. Attempts only go up in a file.
            is_same = is_same and same is not None and {k: v for k, v in same.items() if k not in ADDED} == whole
            lines.append(_line(same if is_same and same is not None else {**whole, **self._made(None)}))
            self._tokens = int(whole.get("tokens") or 0)
        self._head, self._at = "".join(lines), time.monotonic()

    def add(self, new: Sequence[Mapping[str, Any]]) -> None:
        """Append points of one step."""
        now, tokens = time.monotonic(), int(new[0].get("tokens") or 0)
        speed = (tokens - self._tokens) / (now - self._at) if tokens > self._tokens and now > self._at else None
        self._tokens, self._at = tokens, now
        if not self._broken:
            try:
                self._write("".join(_line({**self._about, **_plain(p), **self._made(speed)}) for p in new))
            except OSError:  # a full disk: what matters says so
                self._broken = True

    def _made(self, speed: float | None) -> Point:
        rounded = None if speed is None else round(speed, 1)
        return {"attempt": self._attempt, "tokens_per_second": rounded, "time": round(time.time(), 3)}

    def _write(self, text: str) -> None:
        if self._head is None:
            with open(self._path, "a", encoding="utf-8") as handle:
                handle.write(text)
            return
        self._path.parent.mkdir(exist_ok=True)
        temporary = self._path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}")
        try:
            temporary.write_text(self._head + text, encoding="utf-8")
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        self._head = None


def points(path: Path) -> Iterator[Point]:
    """The points of a metrics file; what is no whole line is passed over."""
    try:
        text = path.read_bytes()
    except OSError:
        return
    yield from parse(text)


def parse(text: bytes) -> Iterator[Point]:
    """The points of some lines."""
    for line in text.splitlines():
        try:
            point = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            continue
        if not isinstance(point, dict) or not isinstance(point.get("unit"), str) or not isinstance(point.get("step"), int):
            continue
        # A damaged line must not end whoever reads it.
        if all(isinstance(point.get(name, 0), int | float) for name in ("attempt", "steps", "time")):
            yield point


def is_last(point: Mapping[str, Any]) -> bool:
    """Whether a point is the last of its training. SAE steps count from 0, as in training.parquet; updates of a model from 1."""
    made = point["step"] + (1 if point.get("stage") == "train" else 0)
    return made >= point.get("steps", math.inf)


def _place(point: Mapping[str, Any]) -> str:
    """Series and step as text, whatever a damaged line holds in their place."""
    return json.dumps([*series_of(point), point["step"]])


def _plain(point: Mapping[str, Any]) -> Point:
    """JSON knows no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in point.items()}


def _line(point: Mapping[str, Any]) -> str:
    return json.dumps(point, ensure_ascii=False) + "\n"
