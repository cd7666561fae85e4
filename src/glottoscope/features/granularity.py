"""Human labels of features: what kind of thing a feature answers to (v1's granularity).

1 uninterpretable, 2 concept (semantic similarity), 3 concept (synonymy), 4 token-level. Labels come as CSV or JSONL
with the column `feature`, the label in `granularity` (or `label`), and as many key columns as it takes to say which
setup is meant (model, step, layer, ...): a label holds for every row that it matches.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from glottoscope.errors import InputError

KEY_COLUMNS = (
    "control",
    "family",
    "model",
    "d_model",
    "n_params",
    "step",
    "tokens_seen",
    "layer",
    "lm_seed",
    "sae_seed",
)
LABEL_COLUMNS = ("granularity", "label")
LABELS = {1: "uninterpretable", 2: "concept (semantic similarity)", 3: "concept (synonymy)", 4: "token-level"}
_TEXT_KEYS = ("control", "family", "model")


def read_labels(path: str | Path) -> pa.Table:
    """Read labels from a CSV (with a header) or JSONL file.

    Other columns are ignored and rows without a label (empty, null) skipped. `step`, `layer` ... are integers.

    Returns: the file's key columns, `feature` int64, `granularity` int8.

    Raises:
        InputError: missing or unreadable file, bad JSON (line number), no `feature` or label, a label outside 1-4, two
            different labels for one feature, no label at all.
    """
    path = Path(path)
    labels: dict[tuple[Any, ...], int] = {}
    keys: tuple[str, ...] | None = None
    for line, row in _rows(path):
        column = next((name for name in LABEL_COLUMNS if name in row), None)
        if "feature" not in row or column is None:
            needed = "'feature' and 'granularity' (or 'label')"
            raise InputError(f"{path}, line {line}: needs {needed}, has {', '.join(map(str, row)) or 'nothing'}")
        if row[column] is None or row[column] == "":
            continue
        names = tuple(name for name in KEY_COLUMNS if name in row)
        keys = names if keys is None else keys
        if names != keys:
            raise InputError(f"{path}, line {line}: key columns {list(names)}, but {list(keys)} before")
        label = _integer(row[column], path, line, column)
        if label not in LABELS:
            raise InputError(f"{path}, line {line}: label {label} is not 1, 2, 3 or 4")
        values = [str(row[name]) if name in _TEXT_KEYS else _integer(row[name], path, line, name) for name in keys]
        key = (*values, _integer(row["feature"], path, line, "feature"))
        if labels.setdefault(key, label) != label:
            raise InputError(f"{path}, line {line}: feature {key[-1]} has a second, different label")
    if keys is None:
        raise InputError(f"{path}: no labels in it")
    columns = list(zip(*labels, strict=True))
    arrays = [
        pa.array(column, pa.string() if name in _TEXT_KEYS else pa.int64()) for name, column in zip(keys, columns[:-1], strict=True)
    ]
    arrays += [pa.array(columns[-1], pa.int64()), pa.array(labels.values(), pa.int8())]
    return pa.table(dict(zip([*keys, "feature", "granularity"], arrays, strict=True)))


def join_labels(features: pa.Table, labels: pa.Table) -> tuple[pa.Table, int]:
    """Set the column `granularity` (int8, null where unlabelled) of a feature table, row order kept.

    Returns: the table, and the number of labels that match none of its rows.

    Raises:
        InputError: a key column of the labels that the table does not have, or labels of which none matches.
    """
    keys = [name for name in labels.column_names if name != "granularity"]
    missing = [name for name in keys if name not in features.column_names]
    if missing:
        raise InputError(f"labels have the key column {missing[0]!r}, which the feature table lacks: drop or rename it")
    # DESIGN's types may be narrower (int32 features): join on the table's own.
    types = {name: features.schema.field(name).type for name in keys} | {"granularity": pa.int8()}
    labels = labels.cast(pa.schema([(name, types[name]) for name in labels.column_names]))
    rows = features.select(keys).append_column("_row", pa.array(range(len(features)), pa.int64()))
    joined = rows.join(labels, keys=keys, join_type="left outer", use_threads=False).sort_by("_row")
    matched = rows.join(labels, keys=keys, join_type="right anti", use_threads=False)
    if len(labels) and len(matched) == len(labels):
        raise InputError(f"none of the {len(labels)} labels matches a feature: compare {', '.join(keys)} with the table")
    column = joined["granularity"].combine_chunks()
    if "granularity" in features.column_names:
        position = features.column_names.index("granularity")
        return features.set_column(position, pa.field("granularity", pa.int8()), column), len(matched)
    return features.append_column(pa.field("granularity", pa.int8()), column), len(matched)


def _integer(value: Any, path: Path, line: int, name: str) -> int:
    try:
        number = float(value)
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{path}, line {line}: {name} is {value!r}, not a whole number")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and row of every non-empty line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of labels") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name is not None}
        return
    for number, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object")
            yield number, row
