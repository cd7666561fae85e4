"""Cores and GPUs of local workers: who gets what, that it holds in the workers, and that it changes nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from glottoscope.errors import InputError
from glottoscope.study.engine import Unit, usable_cores
from glottoscope.study.engines import Machines
from glottoscope.study.local import LocalEngine, Place, places
from glottoscope.study.store import RunStore


def test_every_worker_has_cores_of_its_own() -> None:
    found = places(3, 2, [0, 1, 4, 5, 6, 7, 9], ())
    assert found == [Place((0, 1), None), Place((4, 5), None), Place((6, 7), None)]


def test_too_few_cores_pin_nothing() -> None:
    assert places(3, 2, [0, 1, 2, 3, 4], ()) == [Place((), None)] * 3
    assert places(2, 1, (), ()) == [Place((), None)] * 2


def test_gpus_go_round() -> None:
    assert [p.gpu for p in places(2, 1, range(8), ["2", "GPU-5fa"])] == ["2", "GPU-5fa"]
    assert [p.gpu for p in places(5, 1, range(8), ["0", "1"])] == ["0", "1", "0", "1", "0"]


def note_place(root: str, name: str, report: Any) -> None:
    """A unit that says where it runs, once another one runs beside it."""
    import time

    import torch

    found = {"cores": sorted(os.sched_getaffinity(0)), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
    (Path(root) / f"{name}.json").write_text(json.dumps({**found, "threads": torch.get_num_threads()}), encoding="utf-8")
    limit = time.monotonic() + 60
    while len(list(Path(root).glob("place*.json"))) < 2 and time.monotonic() < limit:
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to cores")
def test_workers_keep_to_their_places(tmp_path: Path) -> None:
    before, threads = usable_cores(), threading.active_count()
    store = RunStore(tmp_path)
    with LocalEngine(store, 2, 1, Console(file=StringIO()), gpus=["0", "1"]) as engine:
        outcome = engine.run("train", [Unit(f"place {i}", note_place, (str(tmp_path), f"place{i}")) for i in range(2)])
    assert not outcome.failures
    a, b = (json.loads((tmp_path / f"place{i}.json").read_text(encoding="utf-8")) for i in range(2))
    assert a["pid"] != b["pid"] and {a["gpu"], b["gpu"]} == {"0", "1"} and a["threads"] == b["threads"] == 1
    if len(before) >= 2:
        assert len(a["cores"]) == len(b["cores"]) == 1 and a["cores"] != b["cores"]
    assert usable_cores() == before, "the driver itself is not pinned"
    assert threading.active_count() <= threads + 1


def test_workers_hold_the_run_directory_with_their_driver(tmp_path: Path) -> None:
    units = [Unit(f"unit {i}", do_nothing, (str(tmp_path),)) for i in range(2)]
    store = RunStore(tmp_path)
    with store.lock(), LocalEngine(store, 2, 1, Console(file=StringIO())) as engine:
        assert not engine.run("train", units).failures
        assert engine._pool is not None
        for pid in engine._pool._processes or {}:
            assert str(tmp_path / ".lock") in {os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()}
    with store.lock():
        pass


def do_nothing(_root: str, _report: Any) -> None:
    """A unit that is done at once."""


def test_a_worker_killed_between_two_stages_is_replaced(tmp_path: Path) -> None:
    units = [Unit(f"unit {i}", do_nothing, (str(tmp_path),)) for i in range(3)]
    with LocalEngine(RunStore(tmp_path), 2, 1, Console(file=StringIO())) as engine:
        assert not engine.run("train", units).failures
        assert engine._pool is not None
        before = list((engine._pool._processes or {}).values())
        os.kill(before[0].pid or 0, signal.SIGKILL)
        before[0].join(30)
        outcome = engine.run("features", units)
        assert (outcome.failures, len(outcome.done)) == ([], 3)
        assert engine._pool is not None
        assert not {p.pid for p in before} & set(engine._pool._processes or {})


@pytest.mark.parametrize(
    ("machines", "words"),
    [
        (Machines("slurm"), "unknown engine"),  # pyright: ignore[reportArgumentType]
        (Machines("local", "10.0.0.1:6379"), "add --engine ray"),
    ],
)
def test_parts_that_do_not_go_together_are_said(machines: Machines, words: str) -> None:
    with pytest.raises(InputError, match=words):
        machines.checked()
