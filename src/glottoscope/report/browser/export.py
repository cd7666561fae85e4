"""A site as files in a folder: any web server shows it as `glottoscope browse` does."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from glottoscope.atomic import atomic_path
from glottoscope.errors import InputError
from glottoscope.report.browser.site import FILES, NO_JEKYLL, Site, files_record

MARKER = "data/site.json"
THREADS = min(8, os.cpu_count() or 1)
AHEAD = 64  # files that are made before they are written
Progress = Callable[[int, int, str], None]  # files done, files in all, what is at work


class Exported(NamedTuple):
    """What an export did."""

    files: int
    bytes: int
    written: int  # files that were not there with the same content
    removed: int
    left: int  # files of an earlier export that are no longer part of the site, and were left


def export_site(site: Site, folder: Path, progress: Progress, *, force: bool = False) -> Exported:
    """Write every file of a site. A file appears whole or not at all; one that is there with the same bytes is left alone.

    Interrupted, it leaves a folder that the next call completes.

    Args:
        force: remove the files of an earlier export that are no longer part of the site, and take over the export of
            another study.

    Raises:
        InputError: the folder holds something else, or cannot be written; a file of the run is damaged.
    """
    earlier = _earlier(site, folder, force)
    addresses = list(site.addresses())
    known = {*addresses, NO_JEKYLL}
    size = written = 0
    try:
        # The marker and the names of all files come first, so that an interrupted export is known for one.
        written += _write(folder / FILES, files_record(known | earlier))
        written += _write(folder / MARKER, site.read(MARKER))
        written += _write(folder / NO_JEKYLL, b"")
        for n, (address, data) in enumerate(_contents(site, addresses)):
            progress(n, len(addresses), address.removeprefix("data/cells/").partition("/features/")[0])
            data = files_record(known | earlier) if address == FILES else data
            size += len(data)
            written += _write(folder / address, data)
        gone = sorted(earlier - known)
        if force and gone:
            for address in gone:
                _remove(folder, address)
            _write(folder / FILES, files_record(known))
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None
    progress(len(addresses), len(addresses), "done")
    return Exported(len(known), size, written, len(gone) if force else 0, 0 if force else len(gone))


class Planned(NamedTuple):
    """What an export would do, as far as names tell."""

    files: int
    there: int  # of them, files that are there already, perhaps with other bytes
    left: int  # files of an earlier export that are no longer part of the site


def plan_export(site: Site, folder: Path, *, force: bool = False) -> Planned:
    """What `export_site` would do. Makes no page and writes nothing.

    Raises:
        InputError: the folder holds something else, as `export_site` finds.
    """
    earlier = _earlier(site, folder, force)
    known = {*site.addresses(), NO_JEKYLL}
    return Planned(len(known), sum((folder / address).is_file() for address in known), len(earlier - known))


def _contents(site: Site, addresses: list[str]) -> Iterator[tuple[str, bytes]]:
    """Every address with its bytes, in order. Packing takes most of the time, and lets other threads run."""
    with ThreadPoolExecutor(THREADS, "export") as pool:
        try:
            for _, group in itertools.groupby(addresses, lambda x: x.partition("/features/")[0] if "/features/" in x else ""):
                batch = list(group)
                if "/features/" in batch[0]:
                    site.prepare(site.setup(batch[0].removeprefix("data/cells/").partition("/features/")[0]))
                for part in range(0, len(batch), AHEAD):
                    yield from zip(batch[part : part + AHEAD], pool.map(site.read, batch[part : part + AHEAD]), strict=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _earlier(site: Site, folder: Path, force: bool) -> set[str]:
    """Files of an earlier export in the folder; none where it is new or empty.

    Raises:
        InputError: it is a file, holds something else, or is the export of another study.
    """
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder: choose another one")
    if not any(folder.iterdir()):
        return set()
    marker, names = _json(folder / MARKER), _json(folder / FILES)
    if (marker is None and names is None) or (marker is not None and "glottoscope" not in marker):
        raise InputError(f"{folder} is not empty and no earlier export: choose another folder")
    study = (marker or {}).get("study", site.source.study)
    if study != site.source.study and not force:
        raise InputError(f"{folder} holds the site of the study {study!r}: choose another folder, or --force to replace it")
    files = (names or {}).get("files", ())
    return {str(x) for x in files if isinstance(x, str)} if isinstance(files, list) else set()


def _json(path: Path) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, data: bytes) -> int:
    """1 where the file had to be written."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return 0
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return 1


def _remove(folder: Path, address: str) -> None:
    """Remove a file of an earlier export, and the folders that it leaves empty."""
    path = folder / address
    # The list of files is data that anyone may have changed: nothing outside of the folder is touched.
    if folder.resolve() not in path.resolve().parents or not path.is_file():
        return
    path.unlink()
    for parent in path.parents:
        if parent == folder or any(parent.iterdir()):
            break
        parent.rmdir()
