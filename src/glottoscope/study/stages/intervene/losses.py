"""Losses and added norms of units under conditions, as files.

Shape legend: S conditions, U units.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from glottoscope.atomic import atomic_path
from glottoscope.intervention.perplexity import Measured


def save_losses(path: Path, found: Measured) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, nll=found.nll, tokens=found.tokens, added=found.added, positions=found.positions)


def read_losses(path: Path) -> Measured:
    with np.load(path) as found:
        return Measured(found["nll"], found["tokens"], found["added"], found["positions"])


def joined(parts: list[Measured]) -> Measured:
    """Conditions measured on the same units, one after the other."""
    nll_SU, added_SU, positions_SU = (np.concatenate(x) for x in zip(*((p.nll, p.added, p.positions) for p in parts), strict=True))
    return Measured(nll_SU, parts[0].tokens, added_SU, positions_SU)
