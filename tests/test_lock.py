"""One process at a time in a run directory: with flock and without, on one machine and on several."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_fixture import environment

from glottoscope.errors import InputError
from glottoscope.study import locks
from glottoscope.study.locks import RECORD_HOLDER, RUN_HOLDER, hold_records, hold_run, holder_of

BEAT, STALE = 0.1, 1.5
# A process that holds a run directory until it is told to let go (or is killed); argv: folder, errno of flock or 0,
# machine. It says "held", and what ends it.
HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
from glottoscope.errors import InputError
from glottoscope.study import locks
folder, number, machine, beat, stale = sys.argv[1:]
locks.BEAT_S, locks.STALE_S = float(beat), float(stale)
if int(number):
    def refuse(*_):
        raise OSError(int(number), "no flock here")
    fcntl.flock = refuse
if machine:
    locks._machine = lambda: machine
try:
    with locks.hold_run(Path(folder)):
        print("held", flush=True)
        if sys.stdin.readline() == "sleep\\n":
            while True:
                time.sleep(0.01)
except InputError as error:
    print(error, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
# The same with a worker, whose number it says, and which does not notice that it is killed.
HOLD_WITH_WORKER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from glottoscope.study import locks
folder = Path(sys.argv[1])
with locks.hold_run(folder):
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), repr, (locks.lock_for_workers(folder),))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 3600).result()
"""
NO_FLOCK = [0, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", BEAT)
    monkeypatch.setattr(locks, "STALE_S", STALE)
    monkeypatch.setattr(locks, "BRIEF_STALE_S", STALE)


def without_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no flock here")

    if number:
        monkeypatch.setattr(fcntl, "flock", refuse)


def start(folder: Path, number: int = 0, machine: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), str(number), machine, str(BEAT), str(STALE)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    return process


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path; parameters: errno of its flock, its machine."""
    number, machine = request.param
    process = start(tmp_path, number, machine)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=30)
    assert process.returncode == 0


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("held", [(n, "") for n in NO_FLOCK], ids=["flock", "ENOLCK", "EOPNOTSUPP"], indirect=True)
@pytest.mark.parametrize("end", [let_go, kill])
def test_a_second_process_is_told_who_holds_it(
    held: subprocess.Popen[str], end: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    without_flock(monkeypatch, request.node.callspec.params["held"][0])
    host, since = os.uname().nodename, r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    words = rf"in {tmp_path} \(process {held.pid} on {host}, since {since}\): wait for it or stop it"
    started = time.monotonic()
    with pytest.raises(InputError, match=f"another process is running the study {words}"), hold_run(tmp_path):
        pass
    assert str(held.pid) in (holder_of(tmp_path) or "")
    assert callable(end)
    end(held)
    # On one machine the dead are known at once, without waiting for their count to stand still.
    with hold_run(tmp_path):
        assert time.monotonic() - started < STALE
        assert json.loads((tmp_path / RUN_HOLDER).read_bytes())["pid"] == os.getpid()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
    assert holder_of(tmp_path) is None


def test_workers_hold_it_until_the_last_of_them_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLD_WITH_WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert driver.stdout is not None
    worker = int(driver.stdout.readline())
    try:
        with pytest.raises(InputError, match=rf"process {driver.pid} on .*: wait for it or stop it"), hold_run(tmp_path):
            pass
        kill(driver)
        monkeypatch.setattr(locks, "ENDING_S", 1.5)
        said: list[str] = []
        with (
            pytest.raises(InputError, match="processes of a run that was stopped are still at work"),
            hold_run(tmp_path, said.append),
        ):
            pass
        assert said == [f"waiting up to 2 s for processes of a run that was stopped to end in {tmp_path}"]
        monkeypatch.setattr(locks, "ENDING_S", 60.0)
        threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
        with hold_run(tmp_path, said.append):
            assert not Path(f"/proc/{worker}").exists() or locks._started(worker) == ""
        assert len(said) == 1
    finally:
        if locks._started(worker):
            os.kill(worker, signal.SIGKILL)


def test_workers_are_given_no_lock_of_a_folder_that_is_not_held(tmp_path: Path) -> None:
    assert locks.lock_for_workers(tmp_path) is None
    with hold_run(tmp_path):
        assert locks.lock_for_workers(tmp_path / ".." / tmp_path.name) is not None
    assert locks.lock_for_workers(tmp_path) is None


@pytest.mark.parametrize("held", [(n, "another machine") for n in NO_FLOCK], ids=str, indirect=True)
def test_a_holder_on_another_machine_is_known_by_its_count(
    held: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock is kept to one machine, or there is none: here every process finds it free."""
    monkeypatch.setattr(locks, "_flock", lambda _handle, *, wait: True)
    said: list[str] = []
    started = time.monotonic()
    with pytest.raises(InputError, match=f"process {held.pid} on "), hold_run(tmp_path, said.append):
        pass
    assert time.monotonic() - started < STALE  # its count went up
    assert len(said) == 1
    assert "may be in use: waiting up to" in said[0]
    kill(held)
    started = time.monotonic()
    with hold_run(tmp_path, said.append):
        assert time.monotonic() - started > STALE
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]


@pytest.mark.parametrize("held", [(errno.ENOLCK, "another machine")], indirect=True)
def test_who_was_taken_over_stops(held: subprocess.Popen[str], tmp_path: Path) -> None:
    """A machine that slept wakes up to find that its run directory went to another process."""
    assert held.stdin is not None
    held.stdin.write("sleep\n")
    held.stdin.flush()
    held.send_signal(signal.SIGSTOP)
    with hold_run(tmp_path, lambda _: None):
        held.send_signal(signal.SIGCONT)
        out, errors = held.communicate(timeout=30)
        assert out == "interrupted\n"
        assert f"glottoscope: {tmp_path} was taken over by another process: this one stops\n" in errors
        # What it leaves behind is not ours to lose.
        assert json.loads((tmp_path / RUN_HOLDER).read_bytes())["pid"] == os.getpid()


def test_who_was_taken_over_stops_where_ctrl_c_is_ignored(tmp_path: Path) -> None:
    """As in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        held = start(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    with held:
        assert held.stdin is not None and held.stdout is not None
        assert held.stdout.readline() == "held\n"
        held.stdin.write("sleep\n")
        held.stdin.flush()
        (tmp_path / RUN_HOLDER).write_bytes(json.dumps({"pid": 1}).encode())
        try:
            _, errors = held.communicate(timeout=30)
        finally:
            held.kill()
    assert held.returncode == -signal.SIGTERM
    assert "was taken over by another process" in errors


def test_a_holder_file_removed_by_hand_is_written_again(tmp_path: Path) -> None:
    with hold_run(tmp_path):
        (tmp_path / RUN_HOLDER).unlink()
        limit = time.monotonic() + 10
        while not (tmp_path / RUN_HOLDER).exists() and time.monotonic() < limit:
            time.sleep(0.01)
        assert json.loads((tmp_path / RUN_HOLDER).read_bytes())["pid"] == os.getpid()
    assert not (tmp_path / RUN_HOLDER).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 9], ids=["empty", "half", "list", "noise"])
def test_a_holder_file_of_a_maker_that_died_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RUN_HOLDER).write_bytes(content)
    started = time.monotonic()
    with hold_run(tmp_path, lambda _: None):
        assert time.monotonic() - started > STALE


@pytest.mark.parametrize("number", NO_FLOCK, ids=["flock", "ENOLCK", "EOPNOTSUPP"])
def test_of_many_only_one_gets_it(tmp_path: Path, number: int) -> None:
    """Also where all of them find the same dead holder."""
    dead = start(tmp_path, number, "another machine")
    assert dead.stdout is not None
    assert dead.stdout.readline() == "held\n"
    kill(dead)
    dead.communicate()
    processes = [start(tmp_path, number, "one machine" if number == 0 else f"machine {n}") for n in range(4)]
    said = []
    for process in processes:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    assert said.count("held\n") == 1
    assert sum("another process is running" in x for x in said) == 3
    for process in processes:
        process.kill()
        process.communicate()


def _count(folder: str, number: int, turns: int) -> None:
    """Read a number, wait, write the next: turns are lost unless one process has the folder at a time."""
    if number:
        locks._flock = lambda _handle, *, wait: None
    path = Path(folder) / "count"
    for _ in range(turns):
        with hold_records(Path(folder)):
            value = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(value + 1))


@pytest.mark.parametrize("number", [0, errno.EBADF], ids=["flock", "EBADF"])
def test_a_record_is_held_by_one_process(tmp_path: Path, number: int) -> None:
    (tmp_path / "count").write_text("0")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_count, [(str(tmp_path), number, 20)] * 4, chunksize=1)
    assert (tmp_path / "count").read_text() == "80"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]


def test_nfs_has_no_flock_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There flock is for what is open for writing: locking a folder is EBADF, and a holder file stands in."""
    without_flock(monkeypatch, errno.EBADF)
    inside = threading.Event()
    with hold_records(tmp_path):
        other = threading.Thread(target=lambda: _enter(tmp_path, inside))
        other.start()
        assert (tmp_path / RECORD_HOLDER).exists()
        assert not inside.wait(0.3)
    assert inside.wait(10)
    other.join()


def _enter(folder: Path, inside: threading.Event) -> None:
    with hold_records(folder):
        inside.set()


def test_a_record_of_a_dead_process_is_free_again(tmp_path: Path) -> None:
    (tmp_path / RECORD_HOLDER).write_bytes(locks._bytes({**locks._record(), "machine": "gone", "pid": 1}))
    started = time.monotonic()
    with hold_records(tmp_path):
        assert time.monotonic() - started > STALE
    (tmp_path / RECORD_HOLDER).write_bytes(locks._bytes(locks._record()))  # of this machine: flock knows better
    started = time.monotonic()
    with hold_records(tmp_path):
        assert time.monotonic() - started < STALE


def test_a_number_used_again_is_another_process() -> None:
    own = locks._started(os.getpid())
    assert locks._is_running(os.getpid(), own)
    assert not locks._is_running(os.getpid(), str(int(own) - 1))
    process = subprocess.Popen([sys.executable, "-c", ""])
    while locks._started(process.pid):  # a process that ended and was not yet waited for runs no more
        time.sleep(0.01)
    assert not locks._is_running(process.pid, "1")
    process.wait()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), hold_run(tmp_path / "file" / "run"):
        pass
