"""A run directory from Python: `gs.load_run(path)` with its tables and its SAEs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from glottoscope.errors import InputError
from glottoscope.study.config import Study
from glottoscope.study.store import RunStore

if TYPE_CHECKING:
    import pyarrow as pa

    from glottoscope.sae.model import TopKSAE


class Run:
    """A run directory: read-only views of what a study found.

    Attributes:
        features: Arrow table, one row per feature of every setup (docs/tables.md); `.to_pandas()` for a data frame.
        evolution: Arrow table, one row per setup.
        study: the settings.
        manifest: versions, seeds and hashes.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self.manifest = store.manifest()

    def __repr__(self) -> str:
        return f"Run({str(self._store.root)!r})"

    @property
    def path(self) -> Path:
        return self._store.root

    @cached_property
    def study(self) -> Study:
        return self._store.study()

    @cached_property
    def features(self) -> pa.Table:
        return self._store.table("features")

    @cached_property
    def evolution(self) -> pa.Table:
        return self._store.table("evolution")

    def table(self, name: str) -> pa.Table:
        """Any table of the run: evolution_seeds, sweeps, intervention ..."""
        return self._store.table(name)

    def sae(self, *, model: str, step: int, layer: int, seed: int = 0) -> TopKSAE:
        """The SAE of one setup.

        Raises:
            InputError: there is none; says which there are.
        """
        from glottoscope.sae.model import TopKSAE

        folder = self._store.setup_dir(model, step, layer, seed)
        if not folder.is_dir():
            have = sorted(str(p.relative_to(self._store.cells_dir)) for p in self._store.cells_dir.glob("*/layer_*/seed_*"))
            near = [h for h in have if h.startswith(f"{model}@")] or have
            shown = ", ".join(near[:8]) + (" ..." if len(near) > 8 else "")
            raise InputError(f"no SAE for model {model!r}, step {step}, layer {layer}, seed {seed}; there are: {shown}")
        return TopKSAE.load(folder)


def load_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        InputError: it is none, or was written by a newer glottoscope.
    """
    return Run(RunStore(path))
