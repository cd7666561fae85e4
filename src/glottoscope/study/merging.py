"""`glottoscope merge`: what another machine made of the same study joins this run directory.

An artefact comes over when it is not there, its files are what their record says, and nothing that it was made from
differs between the two. Nothing is ever overwritten. Tables and report are made again by the next run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from glottoscope.atomic import atomic_path, write_text
from glottoscope.errors import InputError
from glottoscope.study import artefacts
from glottoscope.study.config import CheckpointModel, PretrainModel, Study
from glottoscope.study.joining import join_labels, join_log, joined_log
from glottoscope.study.locks import holder_of
from glottoscope.study.store import RunStore, digest, file_digest, json_text
from glottoscope.study.union import unite

READ = 2**20  # bytes at a time
MADE_AGAIN = ("tables", "report")
# Versions and facts of a machine that can change the last bits of a number.
VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "scipy")
MACHINE = ("architecture", "device", "threads", "matmul", "sae_kernel")


class Item(NamedTuple):
    """An artefact of the other run that this one lacks."""

    folder: str
    stage: str
    record: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.folder} ({self.stage})"


@dataclass
class Merge:
    """What a merge does, or would do."""

    items: list[Item] = field(default_factory=list)
    copied: int = 0  # bytes
    same: int = 0
    conflicts: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # made from something that conflicts or is damaged
    stale: list[str] = field(default_factory=list)  # to be made again, since another checkpoint is the last one now
    strange: int = 0  # of models that neither study file names: of earlier settings
    logs: list[str] = field(default_factory=list)  # models whose logs were joined
    labels: int = 0
    gained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not (self.conflicts or self.damaged or self.left)


class _Damaged(Exception):
    """A file of the other run is not what its record says."""


def merge(root: Path, other: Path, *, dry_run: bool = False, console: Console | None = None) -> Merge:
    """Join the run directory `other` into `root`. `other` is only read.

    Raises:
        InputError: other studies, settings that do not fit, or a run at work in one of them.
    """
    ours, theirs = RunStore(root), RunStore(other)
    if ours.manifest()["study"] != theirs.manifest()["study"]:
        raise InputError(
            f"{root} belongs to the study {ours.manifest()['study']!r} and {other} to {theirs.manifest()['study']!r}: "
            "only runs of one study can be joined"
        )
    if os.path.samefile(root, other):
        raise InputError(f"{root} and {other} are the same folder")
    if holder := holder_of(other):
        raise InputError(f"another process is running the study in {other} ({holder}): wait for it or stop it")
    union = unite(ours.study(), theirs.study())
    found = Merge(gained=union.gained, notes=union.notes, warnings=_warnings(ours.manifest(), theirs.manifest()))
    with contextlib.nullcontext() if dry_run else ours.lock():
        if not dry_run:
            for path in ours.leftovers():
                ours.remove(path)
        _compare(ours, theirs, union.study, union.new_final, found)
        found.copied = sum(_size(theirs, item) for item in found.items)
        if not dry_run:
            _copy_all(ours, theirs, found, console)
            for spec in (m for m in union.study.models if isinstance(m, PretrainModel)):
                for name in set(found.logs) & set(_run_names(spec)):
                    join_log(ours, theirs, spec, name)
        found.labels = join_labels(ours, theirs, write=not dry_run)
        if not dry_run:
            ours.create(union.study, _manifest(ours.manifest(), theirs.manifest(), union.study))
            if shapes := {**theirs.recorded_shapes(), **ours.recorded_shapes()}:
                ours.record_shapes(shapes)
    return found


def _size(theirs: RunStore, item: Item) -> int:
    sizes = item.record.get("sizes", {})
    return sum(sizes.get(n) or _bytes(theirs.root / item.folder / n) for n in item.record["files"])


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---- what comes over


def _compare(ours: RunStore, theirs: RunStore, study: Study, new_final: frozenset[str], found: Merge) -> None:
    """Sort the artefacts of the other run, in an order in which nothing comes before what it is made from."""
    blocked: dict[tuple[str, str], str] = {}  # what does not come over -> its verdict
    names = {name for spec in study.models for name in _run_names(spec)}
    moved = {name for spec in study.models if spec.name in new_final for name in _run_names(spec)}
    for folder in artefacts.folders(theirs.root):
        mine, records = ours.done(ours.root / folder), theirs.done(theirs.root / folder)
        known = {n: h for r in mine.values() if isinstance(r, dict) for n, h in r.get("files", {}).items()}
        for stage in sorted(records, key=lambda s: (artefacts.place(folder, s), s)):
            if artefacts.place(folder, stage) < 0 or folder.split("/")[0] in MADE_AGAIN:
                continue
            if not artefacts.models_of(folder) <= names:
                found.strange += 1
                continue
            item = Item(folder, stage, records[stage])
            verdict = _judge(ours, theirs, item, mine.get(stage), known, moved)
            if verdict == "same":
                found.same += 1
                continue
            sources = [x for x in blocked if artefacts.is_made_from(folder, stage, *x)] if verdict in ("lacking", "log") else []
            if not sources and verdict == "lacking":
                found.items.append(item)
                continue
            if not sources and verdict == "log":
                found.logs.append(folder.split("/")[1])
                continue
            if sources and all(blocked[x] == "stale" for x in sources):
                verdict = "stale"
            if verdict == "stale":
                found.stale.append(str(item))
            elif sources:
                place, made_by = next(x for x in sources if blocked[x] != "stale")
                found.left.append(f"{item}: made from {place} ({made_by}), which did not come over")
            elif verdict == "damaged":
                found.damaged.append(str(item))
            else:
                found.conflicts.append(f"{item}: {verdict}")
            blocked[folder, stage] = verdict


def _judge(ours: RunStore, theirs: RunStore, item: Item, mine: Any, known: dict[str, str], moved: set[str]) -> str:
    """same | lacking | log | stale | damaged, or what the conflict is."""
    folder, stage, record = item
    if not artefacts.is_whole(stage, record):
        return "damaged"
    if not artefacts.is_whole(stage, mine):
        clash = next((n for n, h in record["files"].items() if known.get(n, h) != h), None)
        return "lacking" if clash is None else f"{clash} is there with other bytes"
    if mine["key"] != record["key"]:
        return "stale" if artefacts.models_of(folder) & moved else "made with other settings or from other inputs"
    if mine["files"] == record["files"]:
        return "same" if all((ours.root / folder / n).exists() for n in mine["files"]) else "lacking"
    if folder.startswith("models/") and artefacts.step_of(folder) is None and joined_log(ours, theirs, folder) is not None:
        return "log"
    return "same settings, other bytes"


def _run_names(spec: PretrainModel | CheckpointModel) -> Iterator[str]:
    """Names of the models that a model of the study file stands for."""
    seeds = spec.seeds if isinstance(spec, PretrainModel) else (0,)
    for seed in seeds:
        yield from (f"{spec.name if seed == 0 else f'{spec.name}-s{seed}'}{end}" for end in artefacts.CONTROLS)


# ---- copying


def _copy_all(ours: RunStore, theirs: RunStore, found: Merge, console: Console | None) -> None:
    with Progress(
        TextColumn("merging"), BarColumn(bar_width=24), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console, transient=True, disable=console is None or not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=found.copied)
        copying = _Copying(ours, theirs, found, lambda n: progress.advance(task, n))
        for folder, items in groupby(found.items, key=lambda x: x.folder):
            copying.folder(folder, list(items))
    found.items = copying.taken
    found.copied = sum(_size(theirs, item) for item in found.items)


class _Copying:
    """Copies artefacts in their order; what is made from one that turns out to be damaged is left."""

    def __init__(self, ours: RunStore, theirs: RunStore, found: Merge, advance: Callable[[int], object]) -> None:
        self.taken: list[Item] = []
        self._ours, self._theirs, self._found, self._advance = ours, theirs, found, advance
        self._failed: list[tuple[str, str]] = []

    def folder(self, folder: str, items: list[Item]) -> None:
        """Stages of one folder: the folder appears whole where it was not there."""
        target = self._ours.root / folder
        items = [item for item in items if not self._is_blocked(item)]
        if not items:
            return
        if target.exists():
            for item in items:
                if self._stage(item, target):
                    self._ours.adopt(target, item.stage, item.record)
                    self.taken.append(item)
            return
        with contextlib.suppress(_Damaged), atomic_path(target) as temporary:
            temporary.mkdir()
            got = [item for item in items if self._stage(item, temporary)]
            if not got:
                raise _Damaged
            write_text(temporary / "done.json", json_text({x.stage: artefacts.signed(x.stage, x.record) for x in got}))
            self.taken += got

    def _is_blocked(self, item: Item) -> bool:
        source = next((x for x in self._failed if artefacts.is_made_from(item.folder, item.stage, *x)), None)
        if source is not None:
            self._found.left.append(f"{item}: made from {source[0]} ({source[1]}), which did not come over")
            self._failed.append((item.folder, item.stage))
        return source is not None

    def _stage(self, item: Item, target: Path) -> bool:
        """Copy the files of one stage; False, and none of them is kept, where one is not what its record says."""
        if self._is_blocked(item):
            return False
        copied: list[Path] = []
        try:
            for name, expected in item.record["files"].items():
                path = target / name
                if path.exists() and file_digest(path) == expected:
                    self._advance(_bytes(path))
                    continue
                with atomic_path(path) as temporary:
                    if _copy(self._theirs.root / item.folder / name, temporary, self._advance) != expected:
                        raise _Damaged
                copied.append(path)
        except (_Damaged, FileNotFoundError):
            for path in copied:
                path.unlink()
            self._found.damaged.append(str(item))
            self._failed.append((item.folder, item.stage))
            return False
        return True


def _copy(source: Path, target: Path, advance: Callable[[int], object]) -> str:
    """Copy a file; returns the hash of what was read."""
    found = hashlib.sha256()
    with open(source, "rb", buffering=0) as reader, open(target, "wb") as writer:
        while chunk := reader.read(READ):
            found.update(chunk)
            writer.write(chunk)
            advance(len(chunk))
    return found.hexdigest()


# ---- whose and with what


def _warnings(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Versions and machines that may differ in the last bits of numbers."""
    found = []
    for part, names in (("versions", VERSIONS), ("machine", MACHINE)):
        for name in names:
            a, b = (m.get(part, {}).get(name) for m in (mine, theirs))
            if a != b:
                found.append(f"{name}: {a} here, {b} there")
    if mine.get("glottoscope") != theirs.get("glottoscope"):
        found.append(f"glottoscope: {mine.get('glottoscope')} here, {theirs.get('glottoscope')} there")
    return found


def _manifest(mine: dict[str, Any], theirs: dict[str, Any], study: Study) -> dict[str, Any]:
    """Our manifest of the joined study, with what the other's part was made with."""
    kept = ("glottoscope", "versions", "machine")
    here, there = ({k: m.get(k) for k in kept} for m in (mine, theirs))
    merged = list(mine.get("merged", ()))
    merged += [x for x in (there, *theirs.get("merged", ())) if x != here and x not in merged]
    rest = {k: v for k, v in mine.items() if k not in ("schema", "study", "merged")}
    seeds = {**mine.get("seeds", {}), "sae": list(study.sae.seeds)}
    seeds["lm"] = {m.name: list(m.seeds) if isinstance(m, PretrainModel) else m.seed for m in study.models}
    rest |= {"seeds": seeds, "hashes": {**mine.get("hashes", {}), "study": digest(study.identity())}}
    return {**rest, "merged": merged} if merged else rest


def print_merge(root: Path, other: Path, found: Merge, console: Console, *, dry_run: bool) -> None:
    """What came over and what did not, in words."""

    def say(line: str) -> None:
        console.print(line, markup=False)

    verb = "would come over" if dry_run else "came over"
    for top, group in groupby(found.items, key=lambda x: x.folder.split("/")[0]):
        items = list(group)
        say(f"{top}: {len(items):,} artefacts of {len({x.folder for x in items}):,} folders {verb}")
    say(f"{len(found.items):,} artefacts ({decimal(found.copied)}) {verb}; {found.same:,} were there with the same bytes")
    if found.labels:
        say(f"{found.labels:,} lines of labels {verb}")
    for name in found.logs:
        say(f"models/{name}: the logs {'would be' if dry_run else 'were'} joined")
    if found.strange:
        say(f"{found.strange:,} artefacts there are of models that its study file no longer names: left")
    if found.gained:
        say(f"{root / 'study.toml'} {'would gain' if dry_run else 'gained'} {'; '.join(found.gained)}")
    for note in found.notes:
        say(f"note: {note}; what {root} has is kept")
    for warning in found.warnings:
        say(f"warning: {warning}: the last bits of numbers may differ")
    if found.stale:
        say(f"{len(found.stale):,} artefacts are made again, since another checkpoint is the last one now: {_first(found.stale)}")
    for state, lines in (("conflict", found.conflicts), ("damaged in the other run", found.damaged), ("left", found.left)):
        for line in lines:
            say(f"{state}: {line}")
    if not found.is_whole:
        say(f"nothing in {root} was overwritten; what did not come over is made by the next run where the study wants it")
    if not dry_run:
        say(f"next: glottoscope run {root / 'study.toml'} --out {root}")


def _first(lines: list[str], n: int = 3) -> str:
    return ", ".join(lines[:n]) + (" ..." if len(lines) > n else "")
