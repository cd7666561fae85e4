"""The run directory: what is written whole, what is complete, whose it is."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from study_fixture import PLANTED, as_study, planted

from glottoscope.atomic import TEMPORARY_PREFIX, atomic_path, is_disk_full, write_json, write_table, write_text
from glottoscope.errors import InputError
from glottoscope.study import artefacts
from glottoscope.study.store import RunStore, digest, file_digest, read_parquet
from glottoscope.walking import listed, tree_size

MANIFEST: dict[str, Any] = {"glottoscope": "0"}


def made(root: Path, **changes: Any) -> RunStore:
    store = RunStore(root)
    store.create(as_study(planted(**changes)), MANIFEST)
    return store


# ---- files that appear whole or not at all


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            (temporary / f"{content}.txt").write_text(content)
    assert [p.name for p in folder.iterdir()] == ["two.txt"]
    with pytest.raises(RuntimeError), atomic_path(folder) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert [p.name for p in folder.iterdir()] == ["two.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("1024 requested and 16 written"),  # numpy
    RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["errno", "quota", "numpy", "safetensors"])
def test_a_full_disk_is_named(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(InputError, match=r"no space left on device while writing .*a\.json: free some"), atomic_path(path):
        raise error
    assert json.loads(path.read_text()) == {"old": 1}
    assert is_disk_full(error)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": "寺"})
    write_json(tmp_path / "b", {"a": "寺", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "寺" in (tmp_path / "a").read_text(encoding="utf-8")
    for name in ("a", "b"):
        write_table(tmp_path / name, pa.table({"x": [1, 2], "y": ["寺", None]}))
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")


# ---- whose directory it is


def test_a_run_directory_belongs_to_its_study(tmp_path: Path) -> None:
    store = made(tmp_path / "run")
    assert store.manifest() == {"schema": 1, "study": "tiny", **MANIFEST}
    assert store.study() == as_study(PLANTED)
    changed = made(tmp_path / "run", sae={"k": 2})
    assert changed.study().sae.k == 2
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="belongs to the study 'tiny', not to 'other': choose another --out"):
        made(tmp_path / "run", study={"name": "other"})
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_foreign_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    with pytest.raises(InputError, match="is not empty and is no run directory"):
        made(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    with pytest.raises(InputError, match="is a file, not a folder"):
        made(tmp_path / "thesis" / "chapter.tex")
    with pytest.raises(InputError, match="cannot be made"):
        made(tmp_path / "thesis" / "chapter.tex" / "run")
    (tmp_path / "empty").mkdir()
    made(tmp_path / "empty")


def test_a_killed_start_leaves_a_directory_that_can_be_used(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / ".lock").touch()
    (root / f"{TEMPORARY_PREFIX}0123-manifest.json").touch()
    store = made(root)
    store.study_path.unlink()  # killed between the two files
    assert made(root).study() == as_study(PLANTED)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": "one", "study": "tiny"}', "\udc80"])
def test_a_damaged_manifest_is_named_and_mended_by_running_again(tmp_path: Path, content: str) -> None:
    store = made(tmp_path)
    store.manifest_path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json is damaged .*run the study again to mend it"):
        RunStore(tmp_path).study()
    with pytest.raises(InputError, match="belongs to the study 'tiny'"):
        made(tmp_path, study={"name": "other"})
    made(tmp_path)
    assert RunStore(tmp_path).manifest()["study"] == "tiny"


def test_a_newer_run_directory_is_refused(tmp_path: Path) -> None:
    store = made(tmp_path)
    write_json(store.manifest_path, {"schema": 2, "study": "tiny"})
    for attempt in (store.manifest, store.study, lambda: made(tmp_path)):
        with pytest.raises(InputError, match=r"newer glottoscope \(schema 2\): update yours"):
            attempt()


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory; `glottoscope run"):
        RunStore(tmp_path / "none").manifest()
    with pytest.raises(InputError, match=r"is no run directory: it has no manifest\.json"):
        RunStore(tmp_path).manifest()
    store = made(tmp_path)
    store.study_path.unlink()
    with pytest.raises(InputError, match=r"has no study\.toml: run the study again"):
        store.study()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    store = made(tmp_path)
    with store.lock(), pytest.raises(InputError, match="another process is running the study"), RunStore(tmp_path).lock():
        pass
    with store.lock():
        pass


# ---- what is complete


def test_done_records(tmp_path: Path) -> None:
    store = made(tmp_path)
    folder = store.setup_dir("m", 20, 1, 0)
    folder.mkdir(parents=True)
    assert folder.relative_to(tmp_path).as_posix() == "cells/m@20/layer_01/seed_0"
    assert not store.is_done(folder, "train", "k1")
    write_text(folder / "a", "weights")
    store.mark_done(folder, "train", "k1", {"lr": 1}, ["a"])
    store.mark_done(folder, "features", "k2", {}, [])
    record = store.done(folder)
    written = {"key": "k1", "settings": {"lr": 1}, "files": {"a": file_digest(folder / "a")}, "sizes": {"a": 7}}
    assert record["train"] == artefacts.signed("train", written)
    assert store.is_done(folder, "train", "k1")
    assert not store.is_done(folder, "train", "other")
    assert not store.is_done(folder, "score", "k1")
    (folder / "a").unlink()
    assert not store.is_done(folder, "train", "k1")
    assert store.is_done(folder, "features", "k2")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"train": 1}', '{"train": {}}', "\udcff"])
def test_a_damaged_record_means_not_done(tmp_path: Path, content: str) -> None:
    store = made(tmp_path)
    (tmp_path / "done.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert not store.is_done(tmp_path, "train", "k")
    store.mark_done(tmp_path, "train", "k", {}, [])
    assert store.is_done(tmp_path, "train", "k")


def _mark(root: str, stage: str) -> None:
    RunStore(root).mark_done(Path(root), stage, "k", {}, [])


def test_no_record_is_lost_when_workers_share_a_folder(tmp_path: Path) -> None:
    names = [f"clusters_{n}" for n in range(40)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_mark, [(str(tmp_path), n) for n in names], chunksize=1)
    assert set(RunStore(tmp_path).done(tmp_path)) == set(names)
    assert [p.name for p in tmp_path.iterdir()] == ["done.json"]


# ---- tables and housekeeping


def test_damaged_and_missing_tables_are_named(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(InputError, match="the study is not complete; `glottoscope run` continues it"):
        store.table("evolution")
    assert store.table_or_none("evolution") is None
    write_table(store.table_path("evolution"), pa.table({"x": [1]}))
    assert store.table("evolution")["x"].to_pylist() == [1]
    whole = store.table_path("evolution").read_bytes()
    for damaged in (b"", whole[:-20], b"no parquet at all"):
        store.table_path("evolution").write_bytes(damaged)
        with pytest.raises(InputError, match=r"evolution\.parquet is damaged"):
            store.table("evolution")
        with pytest.raises(InputError, match="is damaged"):
            read_parquet(store.table_path("evolution"))


def test_only_parts_of_the_run_are_removed(tmp_path: Path) -> None:
    store = made(tmp_path / "run")
    folder = store.cell_dir("m", 0)
    folder.mkdir(parents=True)
    write_text(folder / "a", "x" * 1000)
    assert tree_size(folder) == 1000
    for path in (tmp_path, store.root, tmp_path / "elsewhere"):
        with pytest.raises(InputError, match="is not inside"):
            store.remove(path)
    assert store.remove(folder) == 1000
    assert not folder.exists()


def test_leftovers_of_a_killed_process_are_found(tmp_path: Path) -> None:
    store = made(tmp_path)
    left = store.cells_dir / f"{TEMPORARY_PREFIX}01-a"
    left.mkdir(parents=True)
    assert store.leftovers() == [left]


class Listing:
    """What `os.scandir` gives, read to its end at once."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self._entries = iter(entries)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Listing:
        return self

    def __next__(self) -> os.DirEntry[str]:
        return next(self._entries)

    def close(self) -> None:
        pass


WALKS: dict[str, tuple[Callable[[RunStore], Any], Any, Any]] = {  # walk, what it finds, what it finds once `gone` is
    "size": (lambda store: tree_size(store.cells_dir), 12, 9),
    "leftovers": (lambda store: [p.name for p in store.leftovers()], [".tmp-x", ".tmp-y"], [".tmp-x", ".tmp-y"]),
    "glob": (lambda store: [p.parts[-3] for p in listed(store.cells_dir, "*/layer_*/x")], ["gone", "here"], ["here"]),
}


@pytest.mark.parametrize("walk", list(WALKS))
def test_what_others_remove_meanwhile_is_passed_over(walk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, scandir = RunStore(tmp_path), os.scandir
    for name in ("gone", "here", ".tmp-x", ".tmp-y"):
        (store.cells_dir / name / "layer_00").mkdir(parents=True)
        (store.cells_dir / name / "layer_00" / "x").write_bytes(b"123")

    with scandir(store.cells_dir) as entries:
        listing = list(entries)

    def overtaken(path: Any = ".") -> Any:
        """A listing with a folder that is gone when its turn comes."""
        if str(path) != str(store.cells_dir):
            return scandir(path)
        shutil.rmtree(store.cells_dir / "gone", ignore_errors=True)
        return Listing(listing)

    look, before, after = WALKS[walk]
    assert look(store) == before
    monkeypatch.setattr(os, "scandir", overtaken)
    assert look(store) == after


def test_the_size_of_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12")
    assert [tree_size(tmp_path / name) for name in ("x", "nothing")] == [2, 0]


def test_digest_tells_values_apart() -> None:
    assert digest("a", 1) == digest("a", 1)
    assert len({digest("a", 1), digest("a", "1"), digest(["a", 1]), digest("a", 1.0), digest("a", 1, None)}) == 5
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
