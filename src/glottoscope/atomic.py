"""Files that appear whole or not at all: temporary file in the same folder, fsync, os.replace."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glottoscope.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    Works for a file or a directory. Anything that fails leaves `path` as it was.

    Raises:
        InputError: the disk is full (named with the path), so that the run can be continued after space is freed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        if temporary.is_dir() and path.is_dir():
            old = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _flush_directory(path.parent)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise InputError(f"no space left on device while writing {path}: free some and run the study again") from None
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that the disk, or a quota of it, is full.

    Libraries word it in their own ways: Arrow with an errno, safetensors and tokenizers in their message ("os error
    28"), NumPy as a short write without any errno ("1024 requested and 100 written").
    """
    numbers, message = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), str(error)
    if getattr(error, "errno", None) in numbers or "No space left on device" in message:
        return True
    found = re.search(r"\(os error (\d+)\)", message)
    return (found is not None and int(found[1]) in numbers) or re.search(r"\d+ requested and \d+ written", message) is not None


def _flush(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted keys, two spaces, no timestamps, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow table as Parquet (zstd) atomically."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
