"""The setups of a site, their measures, and site.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glottoscope.errors import InputError
from glottoscope.report.browser.codec import SCHEMA, rounded
from glottoscope.report.browser.source import SiteSource
from glottoscope.study.config import CONTROLS
from glottoscope.study.store import RunStore, read_parquet
from glottoscope.walking import listed

SHARD = 64  # features of a shard
TEXT_FILE = 256  # blocks, or aligned pairs, of a text file
KEY = ("control", "family", "model", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed", "sae_seed")
_PLACE = re.compile(r"(?P<model>[^/]+)@(?P<step>\d+)/layer_(?P<layer>\d+)/seed_(?P<seed>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One SAE of one layer of one checkpoint, and what the run says about it as a whole."""

    id: str  # its path below cells/
    folder: Path
    control: str
    family: str
    model: str
    name: str  # of the model, one for all its LM seeds
    d_model: int
    n_params: int
    step: int
    tokens_seen: int
    layer: int
    lm_seed: int
    sae_seed: int
    n_features: int
    row: Mapping[str, Any]  # of the evolution table, as far as it is known

    @property
    def trajectory(self) -> tuple[str, int, int]:
        """What the setups of one SAE at all checkpoints have in common."""
        return self.model, self.layer, self.sae_seed

    def shards(self) -> list[tuple[int, int]]:
        """First and last feature of each shard."""
        return [(first, min(first + SHARD, self.n_features) - 1) for first in range(0, self.n_features, SHARD)]


def setup_folders(store: RunStore) -> dict[str, Path]:
    """Id -> folder of every setup that was begun."""
    found = {path.relative_to(store.cells_dir).as_posix(): path for path in listed(store.cells_dir, "*/layer_*/seed_*")}
    return {name: path for name, path in sorted(found.items()) if path.is_dir() and _PLACE.fullmatch(name)}


def read_setups(source: SiteSource) -> list[Setup]:
    """Setups whose features are scored, in the order of the site.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    store = source.store
    known = _evolution(store)
    setups = []
    for name, folder in setup_folders(store).items():
        if (folder / "features.parquet").exists():
            setups.append(_setup(source, name, folder, known))
    if not setups:
        raise InputError(f"{store.root} has no scored features yet: `glottoscope run` continues the study")
    order = {control: n for n, control in enumerate(CONTROLS)}
    return sorted(
        setups,
        key=lambda s: (order.get(s.control, len(order)), s.family, s.n_params, s.name, s.lm_seed, s.step, s.layer, s.sae_seed),
    )


def _evolution(store: RunStore) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of the evolution table by setup; empty before it is made."""
    table = store.table_or_none("evolution")
    rows = table.to_pylist() if table is not None else []
    return {(r["model"], r["step"], r["layer"], r["sae_seed"]): r for r in rows}


def _setup(source: SiteSource, name: str, folder: Path, known: Mapping[tuple[Any, ...], dict[str, Any]]) -> Setup:
    place = _PLACE.fullmatch(name)
    assert place is not None
    key = (place["model"], int(place["step"]), int(place["layer"]), int(place["seed"]))
    row = known.get(key) or _own_row(folder) or _counted(source, folder)
    return Setup(
        id=name, folder=folder, name=source.names.get(key[0], key[0]), n_features=int(row["n_features"]),
        row=row, **{column: row[column] for column in KEY},
    )  # fmt: skip


def _own_row(folder: Path) -> dict[str, Any] | None:
    path = folder / "row.json"
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it and run the study again") from None
    return {name: value for name, value in row.items() if name != "sweeps"}


def _counted(source: SiteSource, folder: Path) -> dict[str, Any]:
    """What the feature table alone says of a setup."""
    path = folder / "features.parquet"
    columns = [name for name in (*KEY, "language", "bilingual") if name in parquet_columns(path)]
    table = read_parquet(path).select(columns)
    if not table.num_rows or any(name not in columns for name in (*KEY, "language")):
        raise InputError(f"{path} has no features or no key columns: remove it and run the study again")
    classes = table["language"].to_pylist()
    row: dict[str, Any] = {name: table[name][0].as_py() for name in KEY}
    row |= {f"count_{name}": classes.count(name) for name in source.classes}
    row |= {"n_features": len(classes), "n_alive": len(classes) - row["count_dead"]}
    flags: list[bool | None] = table["bilingual"].to_pylist() if "bilingual" in columns else [None]
    row["n_bilingual"] = None if None in flags else flags.count(True)
    return row


def parquet_columns(path: Path) -> list[str]:
    """Columns of a Parquet file.

    Raises:
        InputError: it is damaged.
    """
    try:
        return pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and run the study again") from None


def final_steps(setups: Sequence[Setup]) -> dict[str, int]:
    """Model -> step of the checkpoint that has seen most tokens."""
    last: dict[str, tuple[int, int]] = {}
    for setup in setups:
        last[setup.model] = max(last.get(setup.model, (-1, -1)), (setup.tokens_seen, setup.step))
    return {model: step for model, (_, step) in last.items()}


def middle_layers(source: SiteSource, setups: Sequence[Setup]) -> dict[str, int]:
    """Model -> the layer that is shown first: the study's choice, else the one nearest to half of the deepest."""
    layers: dict[str, set[int]] = {}
    for setup in setups:
        layers.setdefault(setup.model, set()).add(setup.layer)
    result = {}
    for model, found in layers.items():
        wanted = source.middle.get(model)
        result[model] = wanted if wanted in found else min(found, key=lambda x: (abs(x - max(found) / 2), x))
    return result


def main_model(setups: Sequence[Setup]) -> str:
    """Shown name of the largest model that is no control (or the largest at all)."""
    own = [s for s in setups if s.control == "none"] or setups
    return max(own, key=lambda s: (s.n_params, s.name)).name


def site_record(source: SiteSource, setups: Sequence[Setup], n_blocks: int, n_pairs: int) -> dict[str, Any]:
    """site.json: what the site holds, and what it is about."""
    final, middle = final_steps(setups), middle_layers(source, setups)
    return {
        "schema": SCHEMA,
        "glottoscope": source.version,
        "study": source.study,
        "title": source.title,
        "notes": list(source.notes),
        "languages": list(source.languages),
        "language_names": {x: source.language_names.get(x, x) for x in source.languages},
        "thresholds": dict(source.thresholds),
        "rule": source.rule,
        "window": source.window,
        "k": source.k,
        "classes": list(source.classes),
        "measures": [
            {"name": m.name, "label": m.label, "unit": m.unit, "meaning": m.meaning, "digits": m.digits}
            | ({"setup_meaning": m.setup_meaning} if m.setup_meaning else {})
            for m in source.measures
        ],
        "controls": dict(source.controls),
        "shard": SHARD,
        "text_file": TEXT_FILE,
        "n_text_blocks": n_blocks,
        "n_pairs": n_pairs,
        "licences": [list(line) for line in source.licences],
        "partial": list(source.partial),
        "default": {"model": main_model(setups)},
        "setups": [_setup_record(source, setup, final, middle) for setup in setups],
    }


def _setup_record(source: SiteSource, setup: Setup, final: Mapping[str, int], middle: Mapping[str, int]) -> dict[str, Any]:
    names = ("id", "control", "family", "model", "name", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed",
             "sae_seed", "n_features")  # fmt: skip
    return {
        **{name: getattr(setup, name) for name in names},
        "n_alive": setup.row.get("n_alive"),
        "n_bilingual": setup.row.get("n_bilingual"),
        "counts": {name: setup.row.get(f"count_{name}") for name in source.classes},
        "final": setup.step == final[setup.model],
        "middle": setup.layer == middle[setup.model],
    }


def overview_record(source: SiteSource, setups: Sequence[Setup]) -> dict[str, Any]:
    """overview.json: measures of every setup, in the order of site.json; those that no setup has are left out."""
    measures: dict[str, Any] = {}
    for measure in source.measures:
        columns = {}
        for part, name in (("value", measure.name), ("low", f"{measure.name}_low"), ("high", f"{measure.name}_high")):
            values = np.array([_number(setup.row.get(name)) for setup in setups])
            if np.isfinite(values).any():
                columns[part] = rounded(values, 4 if measure.name == "density" else measure.decimals)
        if "value" in columns:
            measures[measure.name] = columns
    return {"schema": SCHEMA, "measures": measures}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
