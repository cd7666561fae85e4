"""`glottoscope verify`: are the files of a run directory what its records say, and which stages must be made again?"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from glottoscope.atomic import TEMPORARY_PREFIX, write_text
from glottoscope.errors import InputError
from glottoscope.study import artefacts
from glottoscope.study.locks import RUN_HOLDER, RUN_LOCK
from glottoscope.study.store import DamagedManifest, RunStore, json_text

READ = 2**20  # bytes at a time
READERS = 4  # files hashed at once: hashing and reading let the other threads work


class Problem(NamedTuple):
    """A file that is not what its record says, or a record that is not what was written."""

    path: str  # relative to the run directory
    state: str  # damaged | missing
    why: str
    folder: str
    stages: tuple[str, ...]  # of the folder, that made it


@dataclass
class Verdict:
    """What `verify` found."""

    problems: list[Problem] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # files that no record names
    uncheckable: list[str] = field(default_factory=list)  # files whose record is damaged
    leftovers: int = 0
    artefacts: int = 0
    files: int = 0
    read: int = 0  # bytes
    seconds: float = 0.0
    unsized: int = 0  # files whose record, of the first version, holds no size
    made_again: list[str] = field(default_factory=list)  # "folder: stages"


class Named(NamedTuple):
    """A file that records name."""

    folder: str
    name: str
    hash: str
    size: int | None
    stages: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.name if self.folder == "." else f"{self.folder}/{self.name}"


def verify(root: Path, *, quick: bool = False, keep: bool = False, console: Console | None = None) -> Verdict:
    """Compare every file that a record of the run directory names with its hash (`quick`: its size).

    Unless `keep`, stages with damaged or missing files are forgotten, so that the next run makes them again.

    Raises:
        InputError: no run directory; a file that this user may not read; another process is at work in it.
    """
    store = RunStore(root)
    try:
        store.manifest()
    except DamagedManifest:
        if next(artefacts.folders(root), None) is None:
            raise
    if keep:
        return _verify(store, quick, console)
    if not os.access(root, os.W_OK):
        raise InputError(f"{root} cannot be written: `glottoscope verify {root} --keep` only looks")
    with store.lock():
        verdict = _verify(store, quick, console)
        verdict.made_again = _forget(store, verdict)
    return verdict


def _verify(store: RunStore, quick: bool, console: Console | None) -> Verdict:
    started, verdict = time.monotonic(), Verdict()
    named = list(_named(store, verdict))
    verdict.files = len(named)
    verdict.unsized = sum(x.size is None for x in named) if quick else 0
    total = 0 if quick else sum(_size(store.root / x.path) or 0 for x in named)
    with (
        Progress(
            TextColumn("verifying"), BarColumn(bar_width=24), DownloadColumn(binary_units=True), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console, transient=True, disable=console is None or not console.is_terminal,
        ) as progress,
        ThreadPoolExecutor(READERS) as pool,
    ):  # fmt: skip
        task = progress.add_task("", total=total)

        def look(file: Named) -> Problem | None:
            return _look(store.root, file, quick, lambda n: progress.advance(task, n))

        for problem in pool.map(look, named):
            if problem is not None and _is_still(store, problem):
                verdict.problems.append(problem)
    verdict.read = total
    _find_unknown(store, named, verdict)
    verdict.problems.sort()
    verdict.seconds = time.monotonic() - started
    return verdict


def _named(store: RunStore, verdict: Verdict) -> Iterator[Named]:
    """Every file of every whole record, once; records that are not whole go to the verdict."""
    for folder in artefacts.folders(store.root):
        path = store.root / folder / "done.json"
        text, record = _read_record(path)
        shown = path.relative_to(store.root).as_posix()
        if not isinstance(record, dict):
            verdict.problems.append(Problem(shown, "damaged", "it is no record", folder, ()))
            continue
        bad = tuple(s for s in record if not artefacts.is_whole(s, record[s]))
        if bad or json_text(record) != text:
            verdict.problems.append(Problem(shown, "damaged", "it was changed after it was written", folder, bad))
        files: dict[str, Named] = {}
        for stage in (s for s in record if s not in bad):
            verdict.artefacts += 1
            sizes = record[stage].get("sizes", {})
            for name, expected in record[stage]["files"].items():
                # Stages may share a file (the embeddings of a ruler): it is read once.
                before = files[name].stages if name in files else ()
                files[name] = Named(folder, name, expected, sizes.get(name), (*before, stage))
        yield from files.values()


def _read_record(path: Path) -> tuple[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, json.loads(text)
    except ValueError:
        return "", None
    except PermissionError:
        raise InputError(f"{path} cannot be read: verify as the user whose files these are") from None
    except OSError:
        return "", None


def _look(root: Path, file: Named, quick: bool, advance: Callable[[int], object]) -> Problem | None:
    path = root / file.path

    def problem(state: str, why: str) -> Problem:
        return Problem(file.path, state, why, file.folder, file.stages)

    try:
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            advance(0 if quick else size)
            return problem("damaged", f"{size:,} bytes instead of {file.size:,}")
        if quick or _hash(path, advance) == file.hash:
            return None
        return problem("damaged", "its bytes have changed")
    except FileNotFoundError:
        return problem("missing", "it is not there")
    except PermissionError:
        raise InputError(f"{path} cannot be read: verify as the user whose files these are") from None
    except OSError as error:
        return problem("damaged", f"it cannot be read ({error.strerror})")


def _hash(path: Path, advance: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:
        while chunk := handle.read(READ):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _is_still(store: RunStore, problem: Problem) -> bool:
    """Whether a file is still wrong: a run at work (`--keep` does not exclude one) may have made it again meanwhile."""
    record, name = store.done(store.root / problem.folder), problem.path.removeprefix(f"{problem.folder}/")
    fresh = [Named(problem.folder, name, r["files"][name], None, (s,)) for s, r in record.items() if name in r.get("files", {})]
    return any(_look(store.root, x, False, lambda _: None) is not None for x in fresh)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _find_unknown(store: RunStore, named: list[Named], verdict: Verdict) -> None:
    known = {x.path for x in named}
    own = {RUN_LOCK, RUN_HOLDER, *(p.name for p in (store.log_path, store.damaged_path))}
    own |= {p.name for p in (store.manifest_path, store.study_path, store.sources_path)}
    broken = [p.folder for p in verdict.problems if p.path.endswith("done.json")]
    for place, below, files in os.walk(store.root):
        folder = Path(place).relative_to(store.root).as_posix()
        verdict.leftovers += sum(x.startswith(TEMPORARY_PREFIX) for x in (*below, *files))
        # Hidden folders hold training states, which check themselves when they are read.
        below[:] = sorted(x for x in below if not x.startswith("."))
        if folder == ".":
            # What people wrote, what says which units are at work, and how they got on is no result.
            apart = (store.labels_path.parent, store.work_dir, store.metrics_dir)
            below[:] = [x for x in below if x not in [p.name for p in apart]]
        for name in sorted(files):
            path = name if folder == "." else f"{folder}/{name}"
            if name == "done.json" or name.startswith(TEMPORARY_PREFIX) or path in known or path in own:
                continue
            under = any(folder == x or folder.startswith(f"{x}/") for x in broken)
            (verdict.uncheckable if under else verdict.unknown).append(path)


def _forget(store: RunStore, verdict: Verdict) -> list[str]:
    stages: dict[str, set[str]] = {}
    for problem in verdict.problems:
        stages.setdefault(problem.folder, set()).update(problem.stages)
    for folder in [x for x in stages if "cell" in stages[x]]:
        # A cell's own file is made in the pass that collects its features: one setup's are made again with it.
        for setup in sorted((store.root / folder).glob("layer_*/seed_*")):
            if "features" in store.done(setup):
                stages.setdefault(setup.relative_to(store.root).as_posix(), set()).add("features")
                break
    for folder, wanted in stages.items():
        path = store.root / folder / "done.json"
        if folder == ".":  # a run writes what says whose directory it is wherever it is not as it should be
            wanted = {s for s in wanted if not artefacts.is_whole(s, store.done(path.parent).get(s))}
        store.forget(path.parent, *sorted(wanted))
        text, record = _read_record(path)
        if not isinstance(record, dict):
            path.unlink()
        elif text != json_text(record):
            write_text(path, json_text(record))
    return [_made_again(folder, sorted(wanted)) for folder, wanted in sorted(stages.items())]


def _made_again(folder: str, stages: list[str]) -> str:
    if folder == ".":
        return "what says whose directory it is: " + ", ".join(stages)
    return f"{folder}: {', '.join(stages) or 'everything'}"


def print_verdict(root: Path, verdict: Verdict, console: Console, *, quick: bool, keep: bool, shown: int = 20) -> None:
    """What was found, in words: a line for each problem, then counts."""
    for problem in verdict.problems:
        stages = f" ({', '.join(problem.stages)})" if problem.stages else ""
        console.print(f"{problem.state:<8} {problem.path}{stages}: {problem.why}", markup=False)
    for path in verdict.unknown[:shown]:
        console.print(f"unknown  {path}: no record names it", markup=False)
    if len(verdict.unknown) > shown:
        console.print(f"unknown  ... and {len(verdict.unknown) - shown:,} more")
    count = {state: sum(p.state == state for p in verdict.problems) for state in ("damaged", "missing")}
    rate = verdict.read / 2**20 / max(verdict.seconds, 1e-9)
    read = "sizes only" if quick else f"{verdict.read / 2**20:,.0f} MiB, {rate:,.0f} MiB/s"
    console.print(
        f"{verdict.files:,} files of {verdict.artefacts:,} artefacts in {verdict.seconds:.1f} s ({read}): "
        f"{count['damaged']} damaged, {count['missing']} missing, {len(verdict.unknown)} unknown"
    )
    if verdict.unsized:
        console.print(f"{verdict.unsized:,} files have no size on record (an older version made them): only looked for")
    if verdict.uncheckable:
        console.print(f"{len(verdict.uncheckable):,} files cannot be checked: the record of their folder is damaged")
    if verdict.leftovers:
        console.print(f"{verdict.leftovers} temporary file(s) of a process that was stopped: the next run removes them")
    if verdict.problems and keep:
        console.print(f"nothing was changed; `glottoscope verify {root}` lets the next run make them again", markup=False)
    elif verdict.problems:
        console.print("the next run makes again:")
        for line in verdict.made_again:
            console.print(f"  {line}", markup=False)
