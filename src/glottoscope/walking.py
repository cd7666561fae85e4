"""Looking through folders in which others are at work: what goes meanwhile is passed over.

`Path.glob` and `Path.rglob` of Python 3.11 raise FileNotFoundError where a folder goes between its listing and its turn.
"""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path


def listed(folder: Path, pattern: str) -> list[Path]:
    """Paths below a folder that match a glob pattern, sorted; hidden ones only where the pattern names the dot."""
    return sorted(folder / name for name in glob.iglob(pattern, root_dir=folder))


def tree_size(path: Path) -> int:
    """Bytes of a file or folder; 0 where it is not there."""
    total = 0
    if not path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            total = path.stat().st_size
        return total
    for place, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def named(root: Path, prefix: str) -> list[Path]:
    """Files and folders at any depth whose name starts with `prefix`, sorted; what such a folder holds is not looked at."""
    found = []
    for place, below, names in os.walk(root):
        found += [Path(place, name) for name in (*below, *names) if name.startswith(prefix)]
        below[:] = [name for name in below if not name.startswith(prefix)]
    return sorted(found)
