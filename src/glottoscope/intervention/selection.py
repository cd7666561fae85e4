"""Which features a part is made of: a class of the feature table, ids, or a condition on the table in SQL.

Shape legend: N features of one SAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.errors import InputError

FLAGS = ("bilingual", "bilingual_paper")


def select(table: pa.Table, wanted: str | Sequence[int], languages: Sequence[str]) -> NDArray[np.bool_]:
    """bool [N]: the features of a setup's table (one row per feature, in order) that a part holds.

    Args:
        wanted: a language code, mixed, bilingual, bilingual_paper, all (every alive feature), ids, or a condition in
            SQL on the table's columns. Features that are not alive are never part of a class.

    Raises:
        InputError: an id beyond the SAE or that is no whole number, or a condition that DuckDB cannot read; repeats what it says.
    """
    alive = _flags(table, "alive")
    if not isinstance(wanted, str):
        ids = _ids(wanted)
        if outside := [i for i in ids if not 0 <= i < table.num_rows]:
            raise InputError(f"feature {outside[0]} does not exist: the SAE has {table.num_rows:,}, numbered from 0")
        chosen = np.zeros(table.num_rows, bool)
        chosen[ids] = True
        return chosen
    if wanted == "all":
        return alive
    if wanted in FLAGS:
        return alive & _flags(table, wanted)
    if wanted == "mixed" or wanted in languages:
        return alive & (np.array(table["language"].to_pylist(), dtype=object) == wanted)
    return _query(table, wanted)


def _ids(wanted: Sequence[int]) -> list[int]:
    try:
        return [index(i) for i in wanted]
    except TypeError:
        raise InputError(f"features {wanted!r}: give a list of ids (whole numbers), a class, or a condition in SQL") from None


def _flags(table: pa.Table, column: str) -> NDArray[np.bool_]:
    return np.array([bool(x) for x in table[column].to_pylist()])  # null: not known to be


def _query(table: pa.Table, condition: str) -> NDArray[np.bool_]:
    import duckdb

    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        connection.register("features", table)  # for a condition with a query of its own
        try:
            rows = connection.table("features").filter(condition).project("feature").fetchall()  # one expression, nothing else
        except duckdb.Error as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"features {condition!r} is no condition on the feature table ({first}): see docs/tables.md") from None
    chosen = np.zeros(table.num_rows, bool)
    chosen[[row[0] for row in rows]] = True
    return chosen
