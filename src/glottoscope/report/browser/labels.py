"""Human labels of a run's features: RUN/labels/labels.jsonl, one JSON object per line, only ever appended to.

The last line about a feature by a rater holds; a line with neither grade nor note withdraws. Each line names the SAE by the
hash of its file: when a study is changed and its SAEs are trained again, feature 17 is another feature, and labels of the old
one are kept in the file but no longer shown.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import getpass
import io
import json
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from glottoscope.atomic import is_disk_full
from glottoscope.errors import InputError
from glottoscope.study.config import NAME_PATTERN
from glottoscope.study.store import RunStore

# The paper's first version has these four grades; features.granularity reads them (a test holds the two lists together).
GRADES = {1: "uninterpretable", 2: "concept (semantic similarity)", 3: "concept (synonymy)", 4: "token-level"}
CSV_COLUMNS = (
    "model", "step", "layer", "lm_seed", "sae_seed", "feature", "granularity", "rater", "blind", "time", "note"
)  # fmt: skip
MAX_NOTE = 10_000
MAX_RATER = 64
MAX_FEATURE = 2**31 - 1  # features are int32 in the tables

_RATER = re.compile(rf"[^\W_][\w .@'+-]{{0,{MAX_RATER - 1}}}")
_SETUP = re.compile(rf"({NAME_PATTERN.strip('^$')})@(\d{{1,12}})/layer_(\d{{2,4}})/seed_(\d{{1,12}})", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_SURROGATES = re.compile("[\ud800-\udfff]")
# A spreadsheet takes a cell that starts with one of these for a formula; Japanese ones take the full-width forms, too.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LONGEST_LINE = 2**18


class SetupId(NamedTuple):
    """What a setup's id says: `d128@600/layer_02/seed_0`."""

    model: str
    step: int
    layer: int
    sae_seed: int


def parse_setup(setup: str) -> SetupId:
    """The parts of a setup's id.

    Raises:
        InputError: it is no id of a setup.
    """
    match = _SETUP.fullmatch(setup) if isinstance(setup, str) else None
    if match is None:
        raise InputError(f"setup {str(setup)[:80]!r}: write MODEL@STEP/layer_LL/seed_S, as in d128@600/layer_02/seed_0")
    return SetupId(match[1], int(match[2]), int(match[3]), int(match[4]))


def clean_rater(name: str) -> str:
    """A rater's name in its canonical form (NFC, no space around it).

    Raises:
        InputError: empty, longer than 64 characters, or other characters than letters, digits, spaces and . _ - + @ '
    """
    cleaned = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
    if not _RATER.fullmatch(cleaned):
        raise InputError(
            f"rater {str(name)[:80]!r}: use up to {MAX_RATER} letters, digits, spaces and . _ - + @ ', a letter or digit first"
        )
    return cleaned


def default_rater() -> str:
    """The user's name on this machine, or "rater" where it has none that could be one."""
    try:
        return clean_rater(getpass.getuser())
    except (InputError, KeyError, OSError, ImportError):
        return "rater"


def now() -> str:
    """This second in UTC, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Label:
    """What one rater says of one feature.

    Attributes:
        rater: name, at most 64 characters.
        setup: id of the setup.
        feature: number of the feature in it.
        granularity: 1 to 4 (`GRADES`); None for a note alone, or, with an empty note, to withdraw what was said.
        note: free text, at most 10,000 characters.
        time: ISO 8601, UTC, seconds.
        blind: given without seeing class, measures or place.
        sae: first 16 digits of the SHA-256 of the SAE's file; "" where it is not known. `LabelStore.append` sets it.

    Raises:
        InputError: a field that is not so. Whether the run has that setup and feature is the caller's to check.
    """

    rater: str
    setup: str
    feature: int
    granularity: int | None
    note: str = ""
    time: str = ""
    blind: bool = False
    sae: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rater", clean_rater(self.rater))
        parse_setup(self.setup)
        if not _whole(self.feature) or not 0 <= self.feature <= MAX_FEATURE:
            raise InputError(f"feature {str(self.feature)[:80]!r}: the number of a feature, 0 or more")
        if self.granularity is not None and (not _whole(self.granularity) or self.granularity not in GRADES):
            raise InputError(f"granularity {str(self.granularity)[:80]!r}: 1, 2, 3, 4 or null")
        if not isinstance(self.note, str):
            raise InputError("note: text, or an empty text")
        if len(self.note) > MAX_NOTE:
            raise InputError(f"note: {len(self.note):,} characters; at most {MAX_NOTE:,}")
        # JSON may carry half of a character (\ud83d alone), which no file can hold.
        object.__setattr__(self, "note", _SURROGATES.sub("\ufffd", self.note))
        if not isinstance(self.blind, bool):
            raise InputError("blind: true or false")
        object.__setattr__(self, "time", self.time or now())
        if not isinstance(self.time, str) or not _TIME.fullmatch(self.time):
            raise InputError(f"time {str(self.time)[:80]!r}: write it as 2025-01-31T12:00:00Z")
        if not isinstance(self.sae, str) or not re.fullmatch(r"[0-9a-f]{0,64}", self.sae):
            raise InputError("sae: the first digits of a hash")

    @property
    def withdrawn(self) -> bool:
        return self.granularity is None and not self.note

    def entry(self) -> dict[str, Any]:
        """The label as data/labels.json has it."""
        return {
            "setup": self.setup, "feature": self.feature, "rater": self.rater, "granularity": self.granularity,
            "note": self.note, "time": self.time, "blind": self.blind,
        }  # fmt: skip

    def line(self) -> bytes:
        """The label as a line of labels.jsonl."""
        return json.dumps({**self.entry(), "sae": self.sae}, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Label:
        """Read a line of labels.jsonl; fields of later versions are ignored.

        Raises:
            InputError: it is none.
        """
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError("not JSON") from None
        if not isinstance(raw, dict):
            raise InputError("not a JSON object")
        missing = [name for name in ("rater", "setup", "feature", "granularity", "time") if name not in raw]
        if missing:
            raise InputError(f"no {missing[0]}")
        return cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class LabelStore:
    """The labels of a run. Reading changes nothing; `append` is safe beside other processes and after a crash.

    Attributes:
        path: RUN/labels/labels.jsonl.
        problems: what was wrong with the file at the last look, one plain sentence each.
    """

    def __init__(self, path: Path | str, run: RunStore | None = None) -> None:
        """Open the labels at `path` (`RunStore.labels_path`) of `run`, by default the run that they lie in."""
        self.path = Path(path)
        self.problems: list[str] = []
        self._run = run or RunStore(self.path.parent.parent)
        self._lock = threading.Lock()
        self._hashes: dict[str, str] = {}
        self._read: tuple[int, list[Label], list[str]] | None = None
        self._set_aside = 0

    @property
    def torn_path(self) -> Path:
        """Where a line that a crash cut off is kept."""
        return self.path.with_name(f"{self.path.name}.torn")

    def append(self, label: Label) -> Label:
        """Write a label and flush it to disk; returns it with the SAE that it is of.

        Raises:
            InputError: the file cannot be written, or the disk is full; nothing is left of the label then.
        """
        label = replace(label, sae=self._hash(label.setup))
        try:
            self._append(label.line())
        except OSError as error:
            reason = "no space left on device" if is_disk_full(error) else error.strerror
            raise InputError(f"{self.path}: the label is not saved ({reason})") from None
        return label

    def _append(self, line: bytes) -> None:
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(parents=True)
        new = not self.path.exists()
        with self._lock, _locked(self.path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as handle:
            self._mend(handle)
            end = os.lseek(handle, 0, os.SEEK_END)
            try:
                written = 0
                while written < len(line):
                    written += os.write(handle, line[written:])
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        if new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _mend(self, handle: int) -> None:
        """End the last line, or, where a crash cut it off, set it aside."""
        end = os.lseek(handle, 0, os.SEEK_END)
        start = max(0, end - _LONGEST_LINE)
        tail = os.pread(handle, end - start, start)
        if not tail or tail.endswith(b"\n"):
            return
        torn = tail[tail.rfind(b"\n") + 1 :]
        try:
            Label.from_line(torn)
        except InputError:
            with open(self.torn_path, "ab") as aside:
                aside.write(torn + b"\n")
                aside.flush()
                os.fsync(aside.fileno())
            os.ftruncate(handle, end - len(torn))
            self._set_aside += 1
        else:
            os.pwrite(handle, b"\n", end)

    def latest(self) -> list[Label]:
        """The labels that hold: the last one of each rater and feature, without withdrawn ones, of the SAEs that are there.

        Sorted by setup, feature, rater. `problems` says what was left out.

        Raises:
            InputError: the file cannot be read.
        """
        with self._lock:
            problems: list[str] = []
            if self._set_aside:
                problems.append(f"{self.path}: the last line was cut off; what there was of it is in {self.torn_path}")
            last: dict[tuple[str, str, int, bool], Label] = {}
            for label in self._lines(problems):
                there = label.sae in ("", self._hash(label.setup))
                last[label.rater, label.setup, label.feature, there] = label
            held = [(there, x) for (*_, there), x in last.items() if not x.withdrawn]
            if gone := [x for there, x in held if not there]:
                problems.append(
                    f"{self.path}: {len(gone)} label(s) are of SAEs that this run no longer has (the first: "
                    f"{gone[0].setup}, feature {gone[0].feature}): kept in the file, left out here"
                )
            self.problems = problems
            return sorted((x for there, x in held if there), key=lambda x: (parse_setup(x.setup), x.feature, x.rater))

    def _lines(self, problems: list[str]) -> list[Label]:
        """Every label of the file, in its order; read again when it has changed."""
        try:
            with _locked(self.path, os.O_RDONLY, fcntl.LOCK_SH) as handle:
                state = os.fstat(handle)
                stamp = state.st_size  # only ever appended to; times of a network's files are not to be relied on
                content = b"" if self._read and self._read[0] == stamp else os.pread(handle, state.st_size, 0)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        if self._read is None or self._read[0] != stamp:
            self._read = (stamp, *self._parsed(content))
        _, labels, bad = self._read
        problems += bad[:5] + ([f"{self.path}: {len(bad) - 5} more lines are no labels"] if len(bad) > 5 else [])
        return labels

    def _parsed(self, content: bytes) -> tuple[list[Label], list[str]]:
        labels, bad = [], []
        lines = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                labels.append(Label.from_line(line))
            except InputError as error:
                wrong = "the last line is cut off" if number == len(lines) else f"line {number} is no label ({error})"
                bad.append(f"{self.path}: {wrong}: left out")
        return labels, bad

    def _hash(self, setup: str) -> str:
        """The SAE that `setup` has, as it was when this store first asked."""
        if setup not in self._hashes:
            self._hashes[setup] = self._run.sae_hash(setup)
        return self._hashes[setup]


@contextlib.contextmanager
def _locked(path: Path, flags: int, operation: int) -> Iterator[int]:
    """An open file, held against other processes where the file system can do that."""
    handle = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        # Some network file systems have no locks; a single writer needs none.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, operation)
        yield handle
    finally:
        os.close(handle)


def labels_csv(labels: Iterable[Label], lm_seeds: Mapping[str, int]) -> str:
    """Labels as CSV, with the columns that a study's `features.labels` reads and rater, blind, time, note beside them.

    A study takes one label per feature: give it the labels of one rater. A note that a spreadsheet would take for a
    formula gets an apostrophe in front.

    Args:
        lm_seeds: setup id -> seed of its language model. Labels of other setups are left out: the run has them no more.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for label in labels:
        if label.setup in lm_seeds:
            model, step, layer, sae_seed = parse_setup(label.setup)
            grade = "" if label.granularity is None else label.granularity
            key = (model, step, layer, lm_seeds[label.setup], sae_seed, label.feature, grade)
            writer.writerow((*key, label.rater, int(label.blind), label.time, defused(label.note)))
    return out.getvalue()


def defused(text: str) -> str:
    """Text for a spreadsheet's cell: never a formula, no control characters but tabs and line feeds."""
    # A bare carriage return would end the row: csv quotes it in some versions of Python only.
    text = _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    return f"'{text}" if text.startswith(_FORMULA) else text
