"""Checkpoints of a hub, fetched for as long as they are looked at and within a disk budget.

Two hubs: the public one, and a folder that stands for it (a mirror: HUB/OWNER/NAME/REVISION/ with the files). What is
fetched lies in one folder, and every fetching process holds a reservation there: a file with the bytes it will take,
locked for as long as its maker lives, so that a killed process holds no room.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from glottoscope.atomic import atomic_path
from glottoscope.errors import InputError

What = Literal["model", "tokenizer", "config"]
TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # of the first kind that is there
SUFFIX = ".reserved"
PATIENCE_S = 0.2  # between two looks at whether others have let go of their room


class Hub(Protocol):
    """Where repositories with revisions are."""

    def sizes(self, repo: str, revision: str) -> dict[str, int]:
        """Bytes of every file. Raises InputError where there is no such revision."""
        ...

    def fetch(self, repo: str, revision: str, names: Iterable[str], folder: Path) -> None:
        """Put files into a new folder."""
        ...


class FolderHub:
    """A folder that stands for the hub: OWNER/NAME/REVISION/ with the files."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def sizes(self, repo: str, revision: str) -> dict[str, int]:
        folder = self._folder(repo, revision)
        return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}

    def fetch(self, repo: str, revision: str, names: Iterable[str], folder: Path) -> None:
        source = self._folder(repo, revision)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)

    def _folder(self, repo: str, revision: str) -> Path:
        folder = self.root / repo / revision
        if not folder.is_dir():
            raise InputError(f"{self.root} has no {repo} at revision {revision}: looked for {folder} (compute.hub)")
        return folder


class PublicHub:
    """The hub that huggingface_hub knows (its own environment variables name another address or a token)."""

    def sizes(self, repo: str, revision: str) -> dict[str, int]:
        from huggingface_hub import HfApi

        try:
            found = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        except Exception as error:  # its errors are of many libraries
            raise InputError(f"the hub does not show {repo} at revision {revision}: {_first_line(error)}") from None
        return {x.rfilename: x.size or 0 for x in found}

    def fetch(self, repo: str, revision: str, names: Iterable[str], folder: Path) -> None:
        from huggingface_hub import hf_hub_download

        try:
            for name in names:
                hf_hub_download(repo, name, revision=revision, local_dir=folder)
        except Exception as error:
            raise InputError(f"{repo} at revision {revision} cannot be fetched: {_first_line(error)}") from None
        shutil.rmtree(folder / ".cache", ignore_errors=True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def choose_files(sizes: dict[str, int], what: What) -> dict[str, int]:
    """The files of a repository that loading a model, its tokenizer or its configuration needs."""
    if what == "config":
        return {name: size for name, size in sizes.items() if name == "config.json"}
    here = {name: size for name, size in sizes.items() if "/" not in name}
    chosen = {name: size for name, size in here.items() if _matches(name, TOKENIZER)}
    if what == "model":
        for pattern in WEIGHTS:
            if weights := {name: size for name, size in here.items() if fnmatch.fnmatch(name, pattern)}:
                return chosen | weights
    return chosen


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in patterns)


class Downloads:
    """What is fetched from a hub into one folder.

    Args:
        budget: bytes that all of it may take; None: what the disk has.
        remove: a checkpoint is removed as soon as its block ends. Processes that need room wait for each other. Else it
            stays, and the next block finds it.
    """

    def __init__(self, folder: Path, hub: Hub, *, budget: float | None = None, remove: bool = False) -> None:
        self.folder, self.hub, self.budget, self.remove = folder, hub, budget, remove

    @contextlib.contextmanager
    def held(self, repo: str, revision: str | None, what: What = "model") -> Iterator[Path]:
        """A folder with the files, for the length of the block.

        Raises:
            InputError: no such revision, or it does not fit the budget or the disk; nothing is fetched then.
        """
        revision = revision or "main"
        name = re.sub(r"[^\w.-]+", "--", f"{repo}@{revision}") + ("" if what == "model" else f".{what}")
        if self.remove:
            with self._reserved(f"{repo} at revision {revision}", self._files(repo, revision, what)) as token:
                # A copy for each process: no one takes another's away.
                place = self.folder / f"{name}-{token}"
                try:
                    self._fetch(repo, revision, what, place)
                    yield place
                finally:
                    shutil.rmtree(place, ignore_errors=True)
            return
        place = self.folder / name
        if not place.is_dir():
            with self._alone(f".{name}.lock"):
                if not place.is_dir():
                    with self._reserved(f"{repo} at revision {revision}", self._files(repo, revision, what)):
                        self._fetch(repo, revision, what, place)
        yield place

    def _files(self, repo: str, revision: str, what: What) -> dict[str, int]:
        return choose_files(self.hub.sizes(repo, revision), what)

    def _fetch(self, repo: str, revision: str, what: What, place: Path) -> None:
        with atomic_path(place) as temporary:
            temporary.mkdir()
            self.hub.fetch(repo, revision, self._files(repo, revision, what), temporary)

    def clear(self) -> None:
        """Remove what processes that are gone have left; only where none is at work."""
        if self.remove:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _reserved(self, what: str, files: dict[str, int]) -> Iterator[str]:
        need = sum(files.values())
        if self.budget is not None and need > self.budget:
            raise InputError(f"{what} needs {_gb(need)} and compute.disk_gb allows {_gb(self.budget)}: it is not fetched; raise it")
        self.folder.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex[:12]
        path = self.folder / f"{token}{SUFFIX}"
        with self._alone():  # between its making and its lock it looks like a dead one's
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            _flock(handle, fcntl.LOCK_EX)
        try:
            while not self._take(what, handle, path, need):
                time.sleep(PATIENCE_S)
            yield token
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)

    def _take(self, what: str, handle: int, path: Path, need: int) -> bool:
        """Reserve room; False where others at work have to let go of theirs first."""
        with self._alone():
            others = self._others(path)
            lying = 0 if self.remove else _lying(self.folder)
            taken = others + lying
            if self.budget is None or taken + need <= self.budget:
                free = shutil.disk_usage(self.folder).free
                if need > free - others:
                    raise InputError(f"{what} needs {_gb(need)} and {self.folder} has {_gb(free - others)} free: it is not fetched")
                os.pwrite(handle, f"{need:<20}".encode(), 0)
                return True
        if not others:
            raise InputError(
                f"{what} needs {_gb(need)}; of compute.disk_gb = {_gb(self.budget)}, {_gb(lying)} are taken: it is not fetched; "
                "set compute.remove_downloads = true, or raise it"
            )
        return False

    def _others(self, own: Path) -> int:
        """Bytes that processes at work have reserved; what a dead one reserved is let go."""
        total = 0
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path == own:
                continue
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDWR)
                try:
                    if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        for left in self.folder.glob(f"*-{path.name.removesuffix(SUFFIX)}"):
                            shutil.rmtree(left, ignore_errors=True)
                        path.unlink(missing_ok=True)
                    else:
                        total += int(os.pread(handle, 20, 0) or 0)
                finally:
                    os.close(handle)
        return total

    @contextlib.contextmanager
    def _alone(self, name: str = ".lock") -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _lying(folder: Path) -> int:
    """Bytes of the files in the folders of a folder, while others may be renaming or removing them."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names if Path(place) != folder else ():
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _flock(handle: int, kind: int) -> bool:
    """Whether the lock is ours; where a file system has none, nobody's reservation is ever taken for a dead one's."""
    try:
        fcntl.flock(handle, kind)
    except OSError:
        return False
    return True


def _gb(value: float | None) -> str:
    value = float(value or 0.0)
    return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.3f} MB"
