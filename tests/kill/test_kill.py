"""A run that is killed anywhere, over and over, ends with the bytes of one that nothing stopped.

`make test-kill KILLS=20 SEED=1`: so many random moments; the seed is printed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from kill_fixture import (
    KINDS,
    Moment,
    Process,
    Reference,
    Run,
    contents,
    hit,
    moments,
    reference,
    session_of,
    wait_until,
    workers_of,
)
from study_fixture import command

from glottoscope.study.locks import RUN_HOLDER, holder_of
from glottoscope.study.store import RESUME_FOLDER, RunStore

KILLS = int(os.environ.get("KILLS") or 20)
SEED = int(os.environ.get("SEED") or time.time_ns() % 10**6)
STOPPED = "glottoscope: interrupted; the same command continues where it stopped"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    found = reference(tmp_path_factory.mktemp("kill"))
    print(
        f"\nSEED={SEED} KILLS={KILLS}; uninterrupted: {found.seconds:.1f} s ({found.cpu:.1f} s of CPU), {len(found.contents)} files"
    )
    print(", ".join(f"{s.stage} ({s.place}) {s.start:.1f}-{s.end:.1f}" for s in found.spans))
    return found


@pytest.fixture(scope="session")
def drawn(whole: Reference) -> list[Moment]:
    return moments(whole, KILLS, random.Random(SEED))


def test_the_reference_goes_through_every_stage(whole: Reference) -> None:
    assert {s.stage for s in whole.spans} == {"pretrain", "tokens", "train", "features", "score", "intervene", "report"}
    check(whole, whole.root)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(whole: Reference, drawn: list[Moment], number: int, tmp_path: Path) -> None:
    moment, rng = drawn[number], random.Random(SEED * 1000 + number)
    root = tmp_path / "run"
    started = time.monotonic()
    run = Run(whole.study, root)
    while not wait_until(run, moment):  # it was faster than the reference: earlier, then
        assert run.end() == 0, run.said
        shutil.rmtree(root)
        moment = moment._replace(after=moment.after / 2)
        run = Run(whole.study, root)
    before = list(session_of(run.pid))
    where = hit(run, whole.stages)
    words = [f"{moment}: {run.stop(moment.kind, rng)}; hit {where}"]
    ended(run, moment.kind)
    if moment.again is not None:
        run = following(whole, run, before)
        if wait_until(run, Moment(number, "all", None, moment.again, None)):
            before = list(session_of(run.pid))
            words.append(f"again after {moment.again:.2f} s; hit {hit(run, whole.stages)}")
            run.stop("all", rng)
            ended(run, "all")
        else:
            words.append(f"over before {moment.again:.2f} s")
            assert run.end() == 0, run.said
    run = following(whole, run, before)
    assert run.end() == 0, run.said
    assert "Traceback" not in run.said
    check(whole, root)
    print(f"\n{number + 1}/{KILLS} {' | '.join(words)} ({time.monotonic() - started:.1f} s)")
    shutil.rmtree(root)


def ended(run: Run, kind: str) -> None:
    """What a run that was sent a signal does."""
    code, said = run.end(), run.said
    if code == 0 and re.search(r"^ +report +1 done", said, re.M):
        return  # it was over when the signal came
    if kind == "worker" and code != -signal.SIGKILL:
        assert code in (0, 1), said
        assert code == 0 or "its process was killed" in said
    else:
        assert code == (-signal.SIGKILL if KINDS[kind][0] == signal.SIGKILL else 130), said
    if code == 130:
        assert said.splitlines()[-1] == STOPPED and said.count("glottoscope: ") == 1
        assert workers_of(run.pid) == []
    assert "Traceback" not in said, said


def following(whole: Reference, stopped: Run, before: list[Process]) -> Run:
    """The run after one that was stopped, started at once: it does not begin while anything of the other is at work."""
    root = stopped.root
    run = Run(whole.study, root)
    if stopped.frozen:
        while not run.ended and "waiting up to" not in run.said:
            time.sleep(0.01)
        assert not run.ended and run.done == 0 and all(w.lives for w in stopped.frozen), run.said
        for worker in stopped.frozen:
            os.kill(worker.pid, signal.SIGCONT)
    while not run.ended and f"process {run.pid} " not in (holder_of(root) or ""):
        time.sleep(0.001)
    assert [p.command for p in before if p.lives and "resource_tracker" not in p.command] == []
    return run


def check(whole: Reference, root: Path) -> None:
    """The run directory is the reference's, and nothing else is left."""
    assert contents(root) == whole.contents
    assert [p for p in root.rglob("*") if p.name == RESUME_FOLDER or p.name in ("work", RUN_HOLDER)] == []
    assert RunStore(root).leftovers() == []
    verified = command("verify", root)
    assert verified.code == 0, verified.out
    assert " 0 damaged, 0 missing, 0 unknown" in verified.out
