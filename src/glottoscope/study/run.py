"""A run directory from Python: `gs.load_run(path)` with its tables and its SAEs."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from glottoscope.errors import InputError
from glottoscope.study.config import Study
from glottoscope.study.plan import Cell
from glottoscope.study.store import RunStore, read_parquet
from glottoscope.walking import listed

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glottoscope.intervention.parts import Injection, Mode, Scale
    from glottoscope.sae.model import TopKSAE
    from glottoscope.study.stages.context import Context


class _Scored(NamedTuple):
    """A setup with a feature table, and whether that is what the present settings make."""

    cell: Cell
    layer: int
    seed: int
    present: bool


class Run:
    """A run directory: read-only views of what a study found.

    Attributes:
        features: Arrow table, one row per feature of every setup (docs/tables.md); `.to_pandas()` for a data frame.
        features_dataset: the same rows, read from disk as they are asked for: for runs whose table does not fit memory.
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
    def features_dataset(self) -> ds.Dataset:
        """Features of every setup that is scored so far, as a `pyarrow.dataset` of one file per setup.

        While a run with changed settings is under way: of those scored with them. Before it has scored one, or where the
        corpus or the checkpoints are gone, so that nothing can be compared: of all there are, the rows of the table.

        A condition on model, step, layer or sae_seed opens the files of those setups only:
        `run.features_dataset.to_table(filter=ds.field("layer") == 4, columns=["step", "language"])`.

        Raises:
            InputError: no setup is scored yet.
        """
        import pyarrow.dataset as ds
        import pyarrow.parquet as pq
        from pyarrow.fs import LocalFileSystem

        store, form, system = self._store, ds.ParquetFileFormat(), LocalFileSystem()
        scored = list(self._scored())
        present = [x for x in scored if x.present]
        fragments, schema = [], None
        for cell, layer, seed, _ in present or scored:
            model, step = cell.model.name, cell.checkpoint.step
            path = store.setup_dir(model, step, layer, seed) / "features.parquet"
            key = {"model": model, "step": step, "layer": layer, "sae_seed": seed}
            holds = functools.reduce(operator.and_, (ds.field(k) == v for k, v in key.items()))
            fragments.append(form.make_fragment(str(path), system, partition_expression=holds))
            schema = schema or pq.read_schema(path)
        if schema is None:
            raise InputError(f"{store.root}: no setup is scored yet; `glottoscope run` continues it")
        return ds.FileSystemDataset(fragments, schema, form, system)

    def _scored(self) -> Iterator[_Scored]:
        """Setups with a feature table, in the order of the table."""
        context = self._context
        for run in context.runs:
            for cell in (Cell(run, c) for c in run.checkpoints):
                for layer, seed in context.setups(cell):
                    record = self._store.done(self._store.setup_dir(run.name, cell.checkpoint.step, layer, seed)).get("score")
                    if not isinstance(record, dict):
                        continue
                    present = True
                    with contextlib.suppress(InputError):
                        present = record.get("key") == context.score_key(cell, layer, seed)
                    yield _Scored(cell, layer, seed, present)

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
            have = [str(p.relative_to(self._store.cells_dir)) for p in listed(self._store.cells_dir, "*/layer_*/seed_*")]
            near = [h for h in have if h.startswith(f"{model}@")] or have
            shown = ", ".join(near[:8]) + (" ..." if len(near) > 8 else "")
            raise InputError(f"no SAE for model {model!r}, step {step}, layer {layer}, seed {seed}; there are: {shown}")
        return TopKSAE.load(folder)

    def load_lm(self, *, model: str, step: int) -> PreTrainedModel:
        """The language model of one cell, as the study reads it (its device and precision).

        Raises:
            InputError: the study has no such model or step; says which there are.
        """
        return self._context.load_lm(self._cell(model, step))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The study's tokenizer."""
        from glottoscope.study.stages.tokenizing import load_run_tokenizer

        return load_run_tokenizer(self._context)

    @contextlib.contextmanager
    def inject(
        self,
        lm: PreTrainedModel,
        *,
        model: str,
        step: int,
        layer: int,
        features: str | Sequence[int],
        seed: int = 0,
        multiply: float | None = None,
        add: float | None = None,
        donor: PreTrainedModel | None = None,
        alpha: float = 1.0,
        mode: Mode = "add",
        scale: Scale = "matched",
    ) -> Iterator[Injection]:
        """Within the block, `lm` (any Hugging Face model of that width) runs with some features changed at one layer.

        Say one of three things: `multiply`, the features of lm's own state times this (0 removes them, 2 doubles them);
        `add`, their directions at every position, each at this share of its largest activation on the test split;
        `donor`, alpha times their part of the donor's state (mode and scale as in [intervention]). Special tokens and
        padding stay as they are. Works in a forward pass and in `generate` (greedy or sampling; with a donor, no beam
        search).

        Args:
            model, step, layer, seed: the setup whose SAE reads the states and names the features.
            features: ids, a class (a language, mixed, bilingual, bilingual_paper, all), or a condition on the feature
                table in SQL, such as "phi > 0.6".
            mode: "add", or "replace", which takes lm's own part out (donor only).
            scale: "matched" to the norm of lm's state, or "raw", the donor's own (donor only).

        Yields:
            The edit; its `added / positions` is the mean relative norm of the change so far.

        Raises:
            InputError: no such setup, no such feature, none or several of the three, an alpha that is not finite, an unknown
                mode or scale, or models and SAE of different widths.
        """
        from glottoscope.intervention.parts import Injection, Mode, Reader, Scale
        from glottoscope.intervention.selection import select
        from glottoscope.lm.patch import Donor, check_pair, patched

        if sum(x is not None for x in (multiply, add, donor)) != 1:
            raise InputError("inject: give exactly one of multiply, add and donor")
        for name, value in (("multiply", multiply), ("add", add), ("alpha", alpha)):
            if value is not None and not math.isfinite(value):
                raise InputError(f"inject: {name} = {value}: give a finite number")
        for name, value, known in (("mode", mode, get_args(Mode)), ("scale", scale, get_args(Scale))):
            if value not in known:
                raise InputError(f"inject: {name} = {value!r}: choose one of {', '.join(known)}")
        sae = self.sae(model=model, step=step, layer=layer, seed=seed).to(lm.device)
        table = read_parquet(self._store.setup_dir(model, step, layer, seed) / "features.parquet")
        chosen = select(table, features, self.study.languages)
        if not chosen.any():
            raise InputError(f"inject: features {features!r} name no feature of {model}, step {step}, layer {layer}")
        width = int(lm.config.get_text_config().hidden_size)
        if width != sae.d:
            raise InputError(f"inject: the SAE reads states of width {sae.d} and the model has width {width}")
        weight = _tensor(chosen).to(sae.W_dec)
        kind, strength = "part", alpha
        if multiply is not None:
            kind, strength = "self", multiply - 1.0
        elif add is not None:
            kind, strength = "steer", add
            weight = weight * _tensor(table["max_activation"].to_numpy()).to(sae.W_dec)
        else:
            assert donor is not None
            check_pair(lm, donor, [layer], ("lm", "donor"))
        edit = Injection(Reader(sae), layer, kind, weight, strength, "add" if donor is None else mode, scale, Reader(sae))
        special = self._context.token_info.special_ids
        with patched(lm, {layer: edit}, special_ids=special, donor=None if donor is None else Donor(donor, [layer])):
            yield edit

    @cached_property
    def _context(self) -> Context:
        from glottoscope.study.stages.context import Context

        return Context(self.study, self._store, recorded=True)

    def _cell(self, model: str, step: int) -> Cell:
        found = {(c.model.name, c.checkpoint.step): c for c in self._context.cells}
        if (model, step) not in found:
            raise InputError(f"no model {model!r} of step {step}; there are: {', '.join(found[k].name for k in sorted(found))}")
        return found[model, step]


def _tensor(array: Any) -> Tensor:
    """A tensor of its own from an array that may not be writable."""
    import torch

    return torch.tensor(np.asarray(array))


def load_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        InputError: it is none, or was written by a newer glottoscope.
    """
    return Run(RunStore(path))
