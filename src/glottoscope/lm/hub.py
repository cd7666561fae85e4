"""Checkpoints of a hub, fetched for as long as they are looked at and within a disk budget.

Two hubs: the public one, and a folder that stands for it (a mirror: HUB/OWNER/NAME/REVISION/ with the files). What is
fetched lies in one folder, in which every process that fetches has reserved the room (lm.reservations). A configuration is
read and gone: it takes no room there, and the folder is not even made for it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from glottoscope.atomic import atomic_path
from glottoscope.errors import InputError
from glottoscope.lm.reservations import Reservation, Reservations
from glottoscope.walking import tree_size

What = Literal["model", "tokenizer", "config"]
TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")
# Of the first kind that can be loaded: its one file, the index of its shards, what either is called.
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
NO_PARTS = ("consolidated*",)  # the same weights again, in their makers' own format
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
    # An index names shards, which only its own format brings.
    chosen = {name: size for name, size in here.items() if _matches(name, TOKENIZER) and not _matches(name, ("*.index*.json",))}
    return chosen | _weights(here) if what == "model" else chosen


def _weights(here: dict[str, int]) -> dict[str, int]:
    found: list[dict[str, int]] = []
    for single, index, pattern in WEIGHTS:
        if single in here:
            return {single: here[single]}
        shards = {name: size for name, size in here.items() if _matches(name, (pattern,)) and not _matches(name, NO_PARTS)}
        if shards and index in here:
            return {**shards, index: here[index]}
        found.append(shards)
    # Nothing that can be loaded: loading says what is missing.
    return next((shards for shards in found if shards), {})


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in patterns)


class Downloads:
    """What is fetched from a hub into one folder.

    Args:
        budget: bytes that all of it may take; None: what the disk has.
        remove: a checkpoint is removed as soon as its block ends. Else it stays, and the next block finds it.
    """

    def __init__(self, folder: Path, hub: Hub, *, budget: float | None = None, remove: bool = False) -> None:
        self.folder, self.hub, self.budget, self.remove = folder, hub, budget, remove
        self._reservations = Reservations(folder)

    @contextlib.contextmanager
    def held(self, repo: str, revision: str | None, what: What = "model") -> Iterator[Path]:
        """A folder with the files, for the length of the block. Who needs room that others at work have waits for them.

        Raises:
            InputError: no such revision, or it does not fit the budget or the disk; nothing is fetched then.
        """
        revision = revision or "main"
        title = f"{repo} at revision {revision}"
        name = re.sub(r"[^\w.-]+", "--", f"{repo}@{revision}") + ("" if what == "model" else f".{what}")
        if what == "config":
            with tempfile.TemporaryDirectory(prefix="glottoscope-") as folder:
                if not (files := self._files(repo, revision, what)):
                    raise InputError(f"{title} holds no config.json: not a Hugging Face checkpoint")
                self.hub.fetch(repo, revision, files, Path(folder))
                yield Path(folder)
        elif self.remove:
            files = self._files(repo, revision, what)
            with self._reserved(title, files) as token:
                # A copy for each process: no one takes another's away.
                place = self.folder / f"{name}-{token}"
                try:
                    self._fetch(repo, revision, files, place)
                    yield place
                finally:
                    shutil.rmtree(place, ignore_errors=True)
        else:
            place = self.folder / name
            if not place.is_dir():
                with self._reservations.alone(f".{name}.lock"):
                    if not place.is_dir():
                        self._keep(repo, revision, what, place)
            yield place

    def clear(self) -> None:
        """Remove what processes that are gone have left; only where no other machine is at work."""
        at_work = tuple(self._reservations.clear())
        if self.remove and self.folder.is_dir():
            for name in os.listdir(self.folder):
                if not name.startswith(".") and not name.endswith(at_work):
                    shutil.rmtree(self.folder / name, ignore_errors=True)

    def _keep(self, repo: str, revision: str, what: What, place: Path) -> None:
        files = self._files(repo, revision, what)
        with self._reserved(f"{repo} at revision {revision}", files) as token:
            # Under its token it counts as what was reserved, and goes with it if this process is killed.
            fetched = place.with_name(f"{place.name}-{token}")
            try:
                self._fetch(repo, revision, files, fetched)
                with contextlib.suppress(FileExistsError):
                    _rename(fetched, place)
            finally:
                shutil.rmtree(fetched, ignore_errors=True)

    def _files(self, repo: str, revision: str, what: What) -> dict[str, int]:
        return choose_files(self.hub.sizes(repo, revision), what)

    def _fetch(self, repo: str, revision: str, files: Iterable[str], place: Path) -> None:
        with atomic_path(place) as temporary:
            temporary.mkdir()
            self.hub.fetch(repo, revision, files, temporary)

    @contextlib.contextmanager
    def _reserved(self, what: str, files: dict[str, int]) -> Iterator[str]:
        need = sum(files.values())
        if self.budget is not None and need > self.budget:
            raise InputError(f"{what} needs {_gb(need)} and compute.disk_gb allows {_gb(self.budget)}: it is not fetched; raise it")
        with self._reservations.made() as own:
            while not self._take(what, own, need):
                time.sleep(PATIENCE_S)
            yield own.token

    def _take(self, what: str, own: Reservation, need: int) -> bool:
        """Reserve room; False where others at work may yet let go of theirs."""
        with self._reservations.alone():
            # In this order what is being fetched meanwhile is counted twice rather than not at all.
            others = self._reservations.taken(own)
            lying = 0 if self.remove else sum(tree_size(p) for p in self.folder.iterdir() if p.is_dir())
            free = shutil.disk_usage(self.folder).free - others.pending
            taken = others.reserved if self.remove else lying + others.pending
            fits_budget = self.budget is None or taken + need <= self.budget
            if fits_budget and need <= free:
                own.take(need)
                return True
        if others.reserved:
            return False
        if fits_budget:
            raise InputError(f"{what} needs {_gb(need)} and {self.folder} has {_gb(free)} free: it is not fetched")
        raise InputError(
            f"{what} needs {_gb(need)}; of compute.disk_gb = {_gb(self.budget)}, {_gb(lying)} are taken: it is not fetched; "
            "set compute.remove_downloads = true, or raise it"
        )


def _rename(folder: Path, place: Path) -> None:
    """Raises FileExistsError where another machine was quicker: what is there may be in use already, and stays."""
    try:
        os.rename(folder, place)
    except OSError:
        if place.is_dir():
            raise FileExistsError(place) from None
        raise


def _gb(value: float | None) -> str:
    value = float(value or 0.0)
    return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.3f} MB"
