"""A study on a real Ray cluster of two nodes: the bytes of a local run, whatever becomes of a node; all of it on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray_fixture as rays
import tomli_w
import torch
from rich.console import Console
from study_fixture import BRIEF, as_study, contents, planted, run

from glottoscope.errors import InputError
from glottoscope.study import ray_engine
from glottoscope.study.engine import Unit
from glottoscope.study.engines import Machines
from glottoscope.study.heartbeats import signs
from glottoscope.study.interventions import intervene, settings_of
from glottoscope.study.ray_engine import RayEngine
from glottoscope.study.runner import run_study
from glottoscope.study.store import RunStore

STUDY = planted(intervention=BRIEF, sae={"steps": 60, "batch_tokens": 2048, "n": 256})
EVERYTHING = ("tables/*", "cells/**/*", "models/**/*", "rulers/**/*", "interventions/**/*", "report/**/*")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    with rays.two_nodes() as found:
        yield found


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of every result of the study on local processes."""
    root = tmp_path_factory.mktemp("local") / "run"
    run(STUDY, root, until="report")
    return contents(root, EVERYTHING)


def on_cluster(cluster: Any, root: Path) -> str:
    """Run the study on the cluster, whose nodes have another current folder; returns what it said."""
    text = StringIO()
    machines = Machines("ray", cluster.address, plain=True)
    result = run_study(as_study(STUDY, root.parent), root, console=Console(file=text, width=200), machines=machines)
    assert result.exit_code == 0, [f.message + f.details for f in result.failures]
    return text.getvalue()


def test_two_nodes_make_the_bytes_of_a_local_run_and_listen_on_loopback_only(
    cluster: Any, local: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # from where the nodes do not see a relative path
    raylets = {rays.raylet(node) for node in cluster.list_all_nodes()}
    assert len(raylets) == 2
    heard: dict[str, int] = {}
    used: set[int] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            used.update(rays.parent_of(s.pid) for s in signs(tmp_path / "run" / "work"))
            if not ended.wait(0.2):
                heard.update(rays.listening(rays.descendants(os.getpid())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        said = on_cluster(cluster, Path("run"))
    finally:
        ended.set()
        watcher.join()
    assert "2 node(s), 2 unit(s) at once" in said
    assert "1 GPU(s) of the cluster are not used: units work on the cpu" in said
    assert contents(tmp_path / "run", EVERYTHING) == local
    assert raylets <= used, "one of the nodes did nothing"
    assert heard, "a cluster that listens nowhere was not looked at"
    assert set(heard) <= rays.LOOPBACK, heard
    # Experiments beside the study's, from a relative path, too.
    settings = settings_of(RunStore("run"), {"parts": ["mixed"]}, [])
    machines, console = Machines("ray", cluster.address), Console(file=StringIO())
    assert intervene(Path("run"), settings, name="second", workers=None, console=console, machines=machines) == []


def test_a_run_that_was_stopped_goes_on_and_a_raylet_killed_in_its_middle_changes_nothing(
    cluster: Any, local: dict[str, str], tmp_path: Path
) -> None:
    study, store = tmp_path / "study.toml", RunStore(tmp_path / "run")
    study.write_text(tomli_w.dumps(STUDY), encoding="utf-8")
    command = [sys.executable, "-m", "glottoscope.cli", "run", str(study), "--out", str(store.root)]
    command += ["--engine", "ray", "--address", cluster.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = rays.wait_for(lambda: process.poll() is not None or [s for s in signs(store.work_dir) if s.stage == "train"])
        assert found is not True, process.communicate()
        process.send_signal(signal.SIGTERM)  # as a batch system does
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; the same command continues" in errors and "Traceback" not in errors
    assert list(signs(store.work_dir)) == []
    assert not list(store.cells_dir.glob("*/layer_*/*/done.json"))
    victim = next(n for n in cluster.list_all_nodes() if n is not cluster.head_node)
    killed: list[str] = []

    def kill() -> None:
        def at_work() -> Any:
            found = [s for s in signs(store.work_dir) if rays.parent_of(s.pid) == rays.raylet(victim)]
            return next((s for s in found if s.stage in ("train", "features")), None)

        sign = rays.wait_for(at_work)
        rays.kill_raylet(victim)
        killed.append(sign.unit)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        on_cluster(cluster, store.root)
    finally:
        killer.join()
        cluster.remove_node(victim, allow_graceful=False)
        rays.add_node(cluster)
    assert len(killed) == 1
    assert contents(store.root, EVERYTHING) == local
    assert not store.work_dir.exists()


def make_file(root: str, name: str, report: Any) -> None:
    (Path(root) / name).write_text(repr(os.environ.get("CUDA_VISIBLE_DEVICES")), encoding="utf-8")


def kill_oneself(root: str, report: Any) -> None:
    """The first try is killed, the second is not."""
    path = Path(root) / "tried"
    if not path.exists():
        path.write_text("", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


def fail(root: str, report: Any) -> None:
    with open(Path(root) / "tries", "a", encoding="utf-8") as handle:
        handle.write("x")
    raise ValueError("a defect")


def linger(root: str, report: Any) -> None:
    """What is asked to stop has much to write."""
    (Path(root) / "began").write_text(str(os.getpid()), encoding="utf-8")
    for asked in (False, True):
        try:
            for _ in range(3000):
                time.sleep(0.1)
        except KeyboardInterrupt:
            assert not asked
            (Path(root) / "asked").write_text("", encoding="utf-8")


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run directory with nothing in it but its identity."""
    store = RunStore(tmp_path / "run")
    store.create(as_study(STUDY, tmp_path), {})
    return store


def test_lost_processes_are_tried_again_and_failures_are_not(cluster: Any, store: RunStore) -> None:
    root = str(store.root)
    units = [Unit("killed", kill_oneself, (root,)), Unit("fails", fail, (root,))]
    units += [Unit(f"file {i}", make_file, (root, str(i))) for i in range(4)]
    units.append(Unit("giant", make_file, (root, "giant"), memory=2**60))
    with RayEngine(store, 1, Console(file=StringIO()), address=cluster.address) as engine:
        room = engine.memory_per_unit()
        assert engine.slots == 2 and room is not None and room.each > 2**20
        outcome = engine.run("train", units)
        engine.workers = engine.slots = 1
        limited = engine.run("train", [units[-1], Unit("last", make_file, (root, "last"))])
    assert limited.done == ["last"] and [f.unit for f in limited.failures] == ["giant"]
    # The node that says it has a GPU hides it from units that work on the CPU.
    assert {(store.root / f"{i}").read_text(encoding="utf-8") for i in range(4)} == {"''"}
    assert len(outcome.failures) == 2, [f.message for f in outcome.failures]
    assert sorted(outcome.done) == ["file 0", "file 1", "file 2", "file 3", "killed"]
    failures = {f.unit: f for f in outcome.failures}
    assert failures["fails"].message == "ValueError: a defect" and not failures["fails"].bad_input
    assert (store.root / "tries").read_text(encoding="utf-8") == "x"
    assert "the largest node offers" in failures["giant"].message and failures["giant"].bad_input
    assert not (store.root / "giant").exists()


def test_units_that_a_node_has_no_memory_for_or_no_node_room_for(
    cluster: Any, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The only node with three CPUs: Ray takes its memory for exhausted from the start.
    node = rays.add_node(cluster, 3, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="50")
    units = [Unit("large", linger, (str(store.root),))]
    try:
        assert "cannot run glottoscope: it ran out of memory" in complaint(store, cluster.address, threads=3)
        monkeypatch.setattr(RayEngine, "_probe", lambda self: None)
        monkeypatch.setattr(ray_engine, "GONE_S", 1.0)
        with RayEngine(store, 3, Console(file=StringIO()), address=cluster.address) as engine:
            (failure,) = engine.run("train", units).failures
            assert failure.message == "its node ran out of memory, 4 times: set compute.memory_gb, or fewer --workers"
            assert failure.bad_input
            cluster.remove_node(node, allow_graceful=True)
            with pytest.raises(InputError, match=r"no node of the Ray cluster is left that has 3 CPU\(s\)"):
                engine.run("train", units)
    finally:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node, allow_graceful=True)


def test_units_may_write_their_state_and_a_second_interruption_does_not_wait(cluster: Any, store: RunStore) -> None:
    began, said, stopped = store.root / "began", StringIO(), []

    def interrupt() -> None:
        rays.wait_for(lambda: began.exists() and began.read_text(encoding="utf-8"))
        os.kill(os.getpid(), signal.SIGINT)
        rays.wait_for(lambda: stopped or "waiting for the states of 1 unit(s)" in said.getvalue())
        if not stopped:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(KeyboardInterrupt), RayEngine(store, 1, Console(file=said), address=cluster.address) as engine:
            engine.run("train", [Unit("lingers", linger, (str(store.root),))])
    finally:
        stopped.append(True)
        interrupter.join()
        signal.signal(signal.SIGINT, before)
    assert "Ctrl-C again stops at once" in said.getvalue()
    assert (store.root / "asked").exists()
    rays.wait_for(lambda: not Path(f"/proc/{began.read_text(encoding='utf-8')}").exists(), 30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a node that lacks its GPU")
def test_a_node_with_another_device_is_refused(cluster: Any, store: RunStore) -> None:
    with RayEngine(store, 1, Console(file=StringIO()), device="cuda", gpus=1.0, address=cluster.address) as engine:
        (failure,) = engine.run("train", [Unit("file", make_file, (str(store.root), "file"))]).failures
    assert failure.bad_input and "device 'cuda' is not available here" in failure.message
    assert "works on another device than this process" in failure.message
    assert not (store.root / "file").exists()


def test_a_cluster_started_here_listens_on_loopback_and_is_gone_after(
    cluster: Any, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # of another, which was not asked for
    before = rays.descendants(os.getpid())
    root = str(store.root)
    with RayEngine(store, 1, Console(file=StringIO()), workers=1) as engine:
        assert engine.run("train", [Unit(f"file {i}", make_file, (root, str(i))) for i in range(3)]).failures == []
        started = rays.descendants(os.getpid()) - before
        heard = rays.listening(started)
        folder = Path(engine._folder or "")
        assert folder.is_dir() and len(str(folder)) < 20
    assert heard and set(heard) <= rays.LOOPBACK, heard
    assert not folder.exists()
    rays.wait_for(lambda: not {p for p in started if Path(f"/proc/{p}").exists() and rays.parent_of(p) == os.getpid()}, 30)


def complaint(store: RunStore, address: str | None, threads: int = 1) -> str:
    with pytest.raises(InputError) as caught, RayEngine(store, threads, Console(file=StringIO()), address=address):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("127.0.0.1", "give HOST:PORT"),
        ("ray://127.0.0.1:1", "run on a node of the cluster"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
    ],
)
def test_no_cluster_there_is_one_line(store: RunStore, address: str, words: str) -> None:
    assert words in complaint(store, address)


def test_no_cluster_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Ray cluster answers there"):
        run_study(as_study(STUDY, tmp_path), tmp_path / "run", machines=Machines("ray", "127.0.0.1:1"))
    assert not (tmp_path / "run").exists()


def test_nodes_that_cannot_do_the_work_are_one_line(
    cluster: Any, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ray_engine.describe_node
    with pytest.raises(InputError, match="no node of the Ray cluster has 8 CPU"):
        RayEngine(store, 8, Console(file=StringIO()), address=cluster.address).start()

    def other_torch(root: str | None) -> dict[str, Any]:
        found = own(root)
        return {**found, "versions": {**found["versions"], "torch": "0.1"}}

    monkeypatch.setattr(ray_engine, "describe_node", other_torch)
    assert "and this process has 0.1: use the same environment on all nodes" in complaint(store, cluster.address)

    def elsewhere(root: str | None) -> dict[str, Any]:
        return {**own(root), "manifest": "another"}

    monkeypatch.setattr(ray_engine, "describe_node", elsewhere)
    assert "all nodes need one shared folder" in complaint(store, cluster.address)
