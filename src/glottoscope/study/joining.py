"""What a merge joins line by line: logs of models trained here, and what people said of features."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from glottoscope.atomic import write_table
from glottoscope.study.config import PretrainModel
from glottoscope.study.store import RunStore, file_digest, read_parquet

if TYPE_CHECKING:
    import pyarrow as pa


def joined_log(ours: RunStore, theirs: RunStore, folder: str) -> pa.Table | None:
    """The training log of both, where they differ in nothing but the steps at which losses were measured; else None.

    A model's log holds validation losses at its checkpoints, and the two may have saved others.
    """
    import pyarrow.compute as pc

    tables, others = [], []
    for store in (ours, theirs):
        path = store.root / folder / "log.parquet"
        hashes = dict(store.done(path.parent)["pretrain"]["files"])
        if not path.exists() or file_digest(path) != hashes.pop("log.parquet", None):
            return None
        tables.append(read_parquet(path))
        others.append(hashes)
    mine, new = tables
    if others[0] != others[1] or mine.num_rows != new.num_rows or not mine.schema.equals(new.schema):
        return None
    joined = mine
    for n, name in enumerate(mine.column_names):
        either = pc.call_function("coalesce", [mine[name], new[name]])
        if not either.equals(pc.call_function("coalesce", [new[name], mine[name]])):
            return None
        joined = joined.set_column(n, mine.schema.field(n), either)
    return joined


def join_log(ours: RunStore, theirs: RunStore, spec: PretrainModel, name: str) -> None:
    """Write the log of both as model `name`'s."""
    folder = ours.model_dir(name)
    record = ours.done(folder)["pretrain"]
    table = joined_log(ours, theirs, f"models/{name}")
    if table is None or table.equals(read_parquet(folder / "log.parquet")):
        return
    ours.begin(folder, "pretrain")
    write_table(folder / "log.parquet", table)
    ours.mark_done(folder, "pretrain", record["key"], spec.model_dump(mode="json"), sorted(record["files"]))


def join_labels(ours: RunStore, theirs: RunStore, *, write: bool) -> int:
    """Add what people said of features in the other run, unless the same person said something later here; returns lines."""
    if not theirs.labels_path.exists():
        return 0
    mine = ours.labels_path.read_bytes() if ours.labels_path.exists() else b""
    here, latest = set(mine.splitlines()), {}
    for line in here:
        what, when = _label(line)
        latest[what] = max(when, latest.get(what, ""))
    new = [
        x for x in theirs.labels_path.read_bytes().splitlines() if x not in here and _label(x)[1] >= latest.get(_label(x)[0], "")
    ]
    new = [x for x in new if _label(x)[1]]
    if new and write:
        ours.labels_path.parent.mkdir(exist_ok=True)
        with open(ours.labels_path, "ab") as handle:
            handle.write((b"" if not mine or mine.endswith(b"\n") else b"\n") + b"".join(x + b"\n" for x in new))
            handle.flush()
            os.fsync(handle.fileno())
    return len(new)


def _label(line: bytes) -> tuple[tuple[Any, ...], str]:
    """(rater, setup, feature) of a line of labels, and its time; no time where the line is none."""
    try:
        raw = json.loads(line)
        return (raw["rater"], raw["setup"], raw["feature"]), str(raw["time"])
    except (ValueError, KeyError, TypeError):
        return (), ""
