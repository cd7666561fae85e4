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
from study_fixture import BRIEF, as_study, planted, planted_model

from glottoscope.errors import InputError
from glottoscope.study import machine
from glottoscope.study.engine import Unit, usable_cores
from glottoscope.study.engines import Machines, room_of
from glottoscope.study.local import LocalEngine, Place, places
from glottoscope.study.machine import pretrain_memory, reading_memory
from glottoscope.study.plan import PROCESS, expand
from glottoscope.study.ray_engine import Node, RayEngine
from glottoscope.study.runner import describe_run, stages
from glottoscope.study.stages.context import Context
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


def test_a_node_is_shared_by_what_units_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of a node, or for one layer the whole of the largest: Ray then runs fewer at once."""
    nodes = [Node("a", "a", 32, 0, 64e9), Node("b", "b", 16, 0, 48e9)]
    engine = RayEngine(RunStore(tmp_path), 1, Console(file=StringIO()))
    engine._nodes, engine.slots = nodes, 48
    study = as_study(planted())
    room = room_of(engine, study)
    assert (room.each, room.most) == (2e9, 64e9)
    assert room.advice(65e9) == "take a larger machine"
    stated = room_of(engine, as_study(planted(compute={"memory_gb": 3.0})))
    assert (stated.each, stated.most) == (3 * 2**30, 3 * 2**30)


@pytest.mark.parametrize(("gpus", "sharing"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.6, 1), (2.0, 1)])
def test_units_that_share_a_gpu_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, sharing: int
) -> None:
    """Whatever the driver's own GPUs and the cluster's slots."""
    monkeypatch.setattr(machine, "gpu_memory", lambda: 10**10)
    engine = RayEngine(RunStore(tmp_path), 1, Console(file=StringIO()), gpus=gpus)
    engine.slots = 64
    assert room_of(engine, as_study(planted())).each == pytest.approx(8e9 / sharing + PROCESS)


def test_local_workers_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_memory", lambda: 10**10)
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1"])
    study = as_study(planted(compute={"device": "cuda"}))
    assert machine.room_for(study, 2).each == pytest.approx(8e9 + PROCESS)
    assert machine.room_for(study, 3).each == pytest.approx(4e9 + PROCESS)


def test_units_that_hold_a_language_model_declare_its_memory(tmp_path: Path) -> None:
    """A Ray node is then not given more of them than it has room for."""
    root, declared = tmp_path / "run", dict[str, int]()
    study = as_study(planted(intervention=BRIEF))
    store = RunStore(root)
    store.create(study, describe_run(study))
    context = Context.open(root)
    with LocalEngine(store, 1, 1, Console(file=StringIO())) as engine:
        for stage, units in stages(context, float("inf")):
            if stage == "report":
                break
            made = units()
            declared |= {u.name: u.memory for u in made}
            assert not engine.run(stage, made).failures
    (run,) = context.runs
    holding = {name for name, memory in declared.items() if memory > PROCESS}
    assert {"m", "m@0", "m@20"} <= holding and any(name.startswith("m@0 + 20 layer 1: documents") for name in holding)
    assert not {"tokenizer", "token store", "tables"} & holding
    assert reading_memory(study, [run, run], 1, 2) > reading_memory(study, [run]) > PROCESS
    wide = planted(models=planted_model(d_model=256, n_layers=4, batch_size=128))
    # 1,705 MiB measured; with --engine local its peak stands in log.jsonl.
    assert pretrain_memory(as_study(wide), expand(as_study(wide))[0]) == pytest.approx(1705 * 2**20, rel=0.1)
