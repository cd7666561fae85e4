"""`glottoscope measure`: feature examples of any origin, classed by language, as a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
from rich.console import Console
from rich.table import Table

from glottoscope.atomic import atomic_path, write_table
from glottoscope.corpus.display import merge_spans, piece_bytes
from glottoscope.errors import InputError
from glottoscope.features.published import measure_file

RULES = ("v1", "script", "document")


def measure_examples(path: Path, *, rule: str = "v1", min_count: int = 20) -> pa.Table:
    """Class the features of a JSONL file of examples; columns as in features.parquet (docs/tables.md).

    Raises:
        InputError: an unknown rule, a file that is missing or wrong (with the line).
    """
    if rule not in RULES:
        raise InputError(f"--rule {rule}: unknown; choose one of {', '.join(RULES)}")
    return measure_file(
        path, rule=rule, min_count=min_count, merge_spans=lambda tokens: merge_spans([piece_bytes(t) for t in tokens])
    )


def write_measured(table: pa.Table, out: Path) -> None:
    """Write the table as CSV or Parquet, by suffix."""
    if out.suffix == ".parquet":
        write_table(out, table)
    elif out.suffix == ".csv":
        with atomic_path(out) as temporary:
            pyarrow.csv.write_csv(table, temporary)
    else:
        raise InputError(f"--out {out}: end it in .csv or .parquet")


def print_summary(table: pa.Table, console: Console) -> None:
    """How many features are of which class."""
    counts = Counter(table["language"].to_pylist())
    view = Table("language", "features", "share")
    for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        view.add_row(name, str(n), f"{n / table.num_rows:.1%}")
    console.print(view)
