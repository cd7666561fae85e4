"""Features of a large run, read as they are asked for: the rows of the table, without the table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from study_fixture import PLANTED, planted, run

import glottoscope as gs
from glottoscope.errors import InputError
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.scoring import score_layer
from glottoscope.study.store import RunStore, read_parquet


def test_it_holds_the_rows_of_the_table_in_their_order(tiny: RunStore) -> None:
    opened = gs.load_run(tiny.root)
    dataset = opened.features_dataset
    assert isinstance(dataset, ds.Dataset)
    assert dataset.to_table().equals(opened.features)
    assert len(list(dataset.get_fragments())) == len(opened.study.models[0].checkpoints) * 2  # type: ignore[union-attr]


def test_a_condition_on_key_columns_opens_no_other_setup(tiny: RunStore, tmp_path: Path) -> None:
    shutil.copytree(tiny.root, tmp_path / "run")
    store = RunStore(tmp_path / "run")
    dataset = gs.load_run(store.root).features_dataset
    wanted = (ds.field("step") == 20) & (ds.field("layer") == 1)
    rows = dataset.to_table(filter=wanted, columns=["feature", "density", "layer"])
    assert rows["layer"].unique().to_pylist() == [1] and rows.num_rows == 32
    for path in store.cells_dir.glob("*/layer_*/seed_*/features.parquet"):
        if "m@20/layer_01" not in str(path):
            path.write_bytes(b"not Parquet")
    assert dataset.to_table(filter=wanted, columns=["feature", "density", "layer"]).equals(rows)
    with pytest.raises((pa.ArrowInvalid, OSError)):
        dataset.to_table()


def test_setups_that_are_not_scored_yet_are_left_out(tiny: RunStore, tmp_path: Path) -> None:
    shutil.copytree(tiny.root, tmp_path / "run")
    store = RunStore(tmp_path / "run")
    store.begin(store.setup_dir("m", 20, 1, 0), "score")
    dataset = gs.load_run(store.root).features_dataset
    assert dataset.count_rows() == 3 * 32
    assert dataset.count_rows(filter=(ds.field("step") == 20) & (ds.field("layer") == 1)) == 0


def test_rows_of_old_settings_are_not_mixed_with_new_ones(tiny: RunStore, tmp_path: Path) -> None:
    shutil.copytree(tiny.root, tmp_path / "run", ignore=shutil.ignore_patterns(".lock*"))
    store = RunStore(tmp_path / "run")
    changed = planted(features={"threshold": 0.9})
    run(changed, store.root, until="features")  # the new settings are written, and nothing is scored with them yet
    assert gs.load_run(store.root).features_dataset.to_table().equals(store.table("features"))
    context = Context.open(store.root)
    cell = context.cell_of("m", 20)
    layer, seed = next(context.setups(cell))
    key, folder = context.score_key(cell, layer, seed), store.setup_dir("m", 20, layer, seed)
    score_layer(str(store.root), "m", layer, ((20, seed),), lambda *_: None)
    assert store.is_done(folder, "score", key)
    rows = gs.load_run(store.root).features_dataset.to_table()
    assert rows.equals(read_parquet(folder / "features.parquet"))


def test_where_nothing_is_scored_it_says_what_to_do(tmp_path: Path) -> None:
    run(PLANTED, tmp_path / "run", until="tokens")
    with pytest.raises(InputError, match="`glottoscope run` continues it"):
        _ = gs.load_run(tmp_path / "run").features_dataset
