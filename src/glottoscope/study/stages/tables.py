"""Tables of the whole study: features, evolution, seeds and sweeps of all setups in one place, rows in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from glottoscope.atomic import atomic_path, write_table
from glottoscope.features.evolution import evolution_fields, seeds_band
from glottoscope.study.plan import Cell
from glottoscope.study.stages.context import KEY_COLUMNS, Context
from glottoscope.study.stages.scoring import QUALITY
from glottoscope.study.stages.tokenizing import read_json
from glottoscope.study.store import digest, read_parquet


def tables_key(context: Context) -> str:
    return digest("tables", [context.score_key(c, x, s) for c in _ordered(context) for x, s in context.setups(c)])


def _ordered(context: Context) -> list[Cell]:
    return [Cell(run, c) for run in context.runs for c in run.checkpoints]


def _rows(context: Context) -> Iterator[tuple[dict[str, Any], Path]]:
    for cell in _ordered(context):
        for layer, seed in context.setups(cell):
            folder = context.store.setup_dir(cell.model.name, cell.checkpoint.step, layer, seed)
            yield read_json(folder / "row.json"), folder


def make_tables(root: str, report: Any) -> None:
    """tables/features, evolution, evolution_seeds and sweeps: one place for all setups, rows in a fixed order."""
    context = Context.open(root)
    store, languages = context.store, context.token_info.languages
    rows, sweeps = [], []
    writer = None
    store.begin(store.tables_dir, "tables")
    with atomic_path(store.table_path("features")) as temporary:
        for n, (row, folder) in enumerate(_rows(context)):
            report(n, 1, f"{n} setups")
            key = {k: row[k] for k in KEY_COLUMNS}
            sweeps += [{**key, **dict(zip(("sweep", "value", "measure", "result"), s, strict=True))} for s in row.pop("sweeps")]
            rows.append(row)
            table = read_parquet(folder / "features.parquet")
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
    evolution = pa.Table.from_pylist(rows, evolution_schema(languages))
    files = ["features.parquet"]
    tables = {"evolution": evolution, "sweeps": pa.Table.from_pylist(sweeps, _sweep_schema())}
    if bands := seeds_band(rows):
        tables["evolution_seeds"] = pa.Table.from_pylist([_plain(b) for b in bands], _band_schema(bands))
    for name, table in tables.items():
        write_table(store.table_path(name), table)
        files.append(f"{name}.parquet")
    with atomic_path(store.tables_dir / "evolution.csv") as temporary:
        pyarrow.csv.write_csv(evolution, temporary)
    store.mark_done(store.tables_dir, "tables", tables_key(context), {}, [*files, "evolution.csv"])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _band_schema(bands: list[dict[str, Any]]) -> pa.Schema:
    """Key columns and counts are what they are; measures are floats, also where every one is null."""
    known = dict(key_fields())
    counts = ("n", "n_lm_seeds", "n_sae_seeds")
    return pa.schema([(k, known.get(k, pa.int64() if k in counts else pa.float64())) for k in bands[0]])


def key_fields() -> list[tuple[str, pa.DataType]]:
    return [(k, pa.string() if k in ("control", "family", "model") else pa.int64()) for k in KEY_COLUMNS]


def _sweep_schema() -> pa.Schema:
    return pa.schema(
        [
            *key_fields(),
            ("sweep", pa.string()),
            ("value", pa.float64()),
            ("measure", pa.string()),
            ("result", pa.float64()),
        ]
    )


def evolution_schema(languages: tuple[str, ...]) -> pa.Schema:
    """Columns of tables/evolution.parquet, in order."""
    floats = ["alignment", "alignment_low", "alignment_high", "alignment_truth", *QUALITY]
    floats += [f"fvu_{x}" for x in languages] + [f"lm_loss_{x}" for x in languages]
    floats += ["lm_learning_rate", "sae_learning_rate", "theta", "theta_hidden"]
    floats += ["monosemanticity_floor_shuffled", "monosemanticity_floor_random"]
    floats += ["monosemanticity_hidden_floor_shuffled", "coherence_floor_shuffled"]
    floats += ["truth_auc_phi", "truth_auc_flag", "truth_auc_mixed"]
    integers = ["n_bilingual_shuffled", "n_bilingual_next", "truth_n_bilingual", "truth_n_alive"]
    return pa.schema(
        key_fields() + evolution_fields(languages) + [(x, pa.float64()) for x in floats] + [(x, pa.int64()) for x in integers]
    )
