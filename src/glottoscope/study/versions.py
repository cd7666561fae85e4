"""Which program makes a run's numbers: one hash over its code."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import glottoscope
from glottoscope.study.store import digest, file_digest


@cache
def code_hash() -> str:
    """Hash over the program's files and their places, for the manifest and for the nodes of a cluster."""
    root = Path(glottoscope.__file__).parent
    return digest([(str(p.relative_to(root)), file_digest(p)) for p in sorted(root.rglob("*.py"))])
