"""Signs of life: written while a unit works, seen by `status`, gone at its end; and what a batch log says meanwhile."""

from __future__ import annotations

import json
import os
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from study_fixture import PLANTED, command, run, stop_when

from glottoscope.errors import InputError
from glottoscope.study import heartbeats, view
from glottoscope.study.engine import Engine, Unit
from glottoscope.study.heartbeats import Heart, Sign, signs
from glottoscope.study.local import LocalEngine
from glottoscope.study.store import RunStore


def write_letter(root: str, name: str, report: Any) -> None:
    """A unit that makes one file."""
    report(1, 2, "half")
    (Path(root) / f"{name}.txt").write_text(name, encoding="utf-8")


def look_around(root: str, report: Any) -> None:
    """A unit that keeps what others can see of it."""
    report(1.0, 4.0, "first")
    (Path(root) / "seen.json").write_text(json.dumps([s._asdict() for s in signs(RunStore(root).work_dir)]), encoding="utf-8")


def fail(root: str, bad_input: bool, report: Any) -> None:
    raise InputError("mend me") if bad_input else ValueError("a defect")


def leave(root: str, report: Any) -> None:
    os._exit(9)


def engine(store: RunStore, workers: int = 1) -> tuple[Engine, StringIO]:
    text = StringIO()
    return LocalEngine(store, workers, 1, Console(file=text, width=200)), text


def test_a_sign_is_there_while_its_unit_works_and_only_then(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    machine, _ = engine(store)
    with machine:
        outcome = machine.run("train", [Unit("m@20 layers 1-2", look_around, (str(tmp_path),))])
    assert outcome.done == ["m@20 layers 1-2"]
    (seen,) = (Sign(**x) for x in json.loads((tmp_path / "seen.json").read_text(encoding="utf-8")))
    assert (seen.unit, seen.stage, seen.pid) == ("m@20 layers 1-2", "train", os.getpid())
    assert not store.work_dir.exists()


def test_signs_follow_what_a_unit_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "WRITE_S", 0.01)
    path = RunStore(tmp_path).sign_path("a unit")
    with Heart(path, "train", "a unit") as heart:
        heart.tell(100, 400, "step 100")
        heart.tell(200, 400, "step 200")
        limit = time.monotonic() + 20
        while not (found := list(signs(path.parent)))[0].words and time.monotonic() < limit:
            time.sleep(0.01)
        (sign,) = found
        assert (sign.done, sign.total, sign.first) == (200, 400, 100)
        assert sign.rate == pytest.approx(100 / (sign.now - sign.started))
    assert list(signs(path.parent)) == []


def test_a_silent_unit_keeps_beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "WRITE_S", 0.01)
    monkeypatch.setattr(heartbeats, "BEAT_S", 0.02)
    path = RunStore(tmp_path).sign_path("a")
    with Heart(path, "train", "a"):
        (first,) = signs(path.parent)
        limit = time.monotonic() + 20
        while (now := next(signs(path.parent)).now) == first.now and time.monotonic() < limit:
            time.sleep(0.01)
        assert now > first.now


def test_names_of_units_become_names_of_files(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    names = ["a/b", "a_b", "a b", "Übung: 1/2", "x" * 300, "x" * 301, "..", "言語"]
    paths = {store.sign_path(name) for name in names}
    assert len(paths) == len(names)
    for path in paths:
        assert path.parent == store.work_dir
        assert len(path.name) < 120 and path.name.isascii()


def test_damaged_signs_are_passed_over(tmp_path: Path) -> None:
    for name, text in {"a": "", "b": "[]", "c": "{}", "d": '{"unit": 1}', "e": "\x00"}.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    assert list(signs(tmp_path)) == []
    assert list(signs(tmp_path / "nothing")) == []


def test_a_disk_that_takes_no_signs_stops_no_unit(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.work_dir.write_text("a file where the folder should be", encoding="utf-8")
    machine, _ = engine(store)
    with machine:
        outcome = machine.run("train", [Unit("a", write_letter, (str(tmp_path), "a"))])
    assert outcome.done == ["a"] and (tmp_path / "a.txt").exists()


def test_failures_are_collected_and_logged(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    machine, text = engine(store)
    root = str(tmp_path)
    units = [Unit("a", write_letter, (root, "a")), Unit("b", fail, (root, True)), Unit("c", fail, (root, False))]
    with machine:
        outcome = machine.run("train", units)
        assert machine.run("score", []).done == []
    assert outcome.done == ["a"]
    assert {f.unit: (f.message, f.bad_input) for f in outcome.failures} == {
        "b": ("mend me", True),
        "c": ("ValueError: a defect", False),
    }
    assert not store.work_dir.exists()
    line = json.loads(store.log_path.read_text(encoding="utf-8").splitlines()[0])
    assert (line["stage"], line["done"], set(line["units"])) == ("train", 1, {"a", "b", "c"})
    assert all(seconds >= 0 and peak > 2**20 for seconds, peak in line["units"].values())
    said = text.getvalue()
    assert " train a: done in " in said and " train b: failed: mend me (" in said and "Traceback" in said


def test_a_lost_process_is_a_failure_and_the_next_stage_has_new_ones(tmp_path: Path) -> None:
    machine, text = engine(RunStore(tmp_path), 2)
    root = str(tmp_path)
    with machine:
        outcome = machine.run("train", [Unit("a", write_letter, (root, "a")), Unit("b", fail, (root, True))])
        assert outcome.done == ["a"] and [f.message for f in outcome.failures] == ["mend me"]
        outcome = machine.run("train", [Unit("a", leave, (root,)), Unit("b", leave, (root,))])
        assert {f.message for f in outcome.failures} == {"its process was killed (out of memory?)"}
        again = machine.run("train", [Unit(x, write_letter, (root, x)) for x in "cd"])
    assert sorted(again.done) == ["c", "d"]
    assert " train a: done in " in text.getvalue() and " train b: failed: mend me (" in text.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    text, now = StringIO(), [1000.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    unit = Unit("m@20", write_letter, ())
    shown = view.PlainView(Console(file=text, width=200), "train", [unit])
    for second in range(100):
        now[0] = 1000.0 + second
        shown.update("m@20", 10.0 * second, 2000.0, f"step {10 * second}")
    lines = text.getvalue().splitlines()
    assert len(lines) == 3  # at 30, 60 and 90 seconds
    assert lines[0].endswith(" train m@20: 15 %, 10.0/s, 3 min left, step 300")
    shown.finish(unit, None, 100.0)
    now[0] += 100
    shown.update("m@20", 1.0, 2000.0, "late")
    assert [x[19:] for x in text.getvalue().splitlines()[3:]] == [" train m@20: done in 100 s (1 of 1)"]


def test_status_shows_units_at_work_and_those_that_fell_silent(tiny: RunStore, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    run({**PLANTED}, store.root, until="tokens")
    store.work_dir.mkdir()
    now = time.time()
    for unit, age in (("m@0", 1.0), ("m@20 [x]", 600.0)):
        sign = Sign(unit, "train", "node7", 4711, 300, 600, "loss 0.25", 0, now - 900 - age, now - age)
        store.sign_path(unit).write_text(json.dumps(sign._asdict()), encoding="utf-8")
    shown = command("status", store.root).out
    lines = {x.split("│")[1].strip(): x for x in shown.splitlines() if "node7" in x}
    assert set(lines) == {"m@0", "m@20 [x]"}
    assert "50 %" in lines["m@0"] and "15 min left" in lines["m@0"] and "process 4711" in lines["m@0"]
    assert "no sign of life" not in lines["m@0"] and "no sign of life for 10 min" in lines["m@20 [x]"]


def test_a_killed_run_leaves_signs_that_the_next_one_removes(tmp_path: Path) -> None:
    import signal

    import tomli_w

    study = tmp_path / "study.toml"
    study.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    store = RunStore(tmp_path / "run")
    stop_when(
        ["run", study, "--out", store.root, "--workers", "1"],
        lambda: any(s.stage == "train" for s in signs(store.work_dir)),
        signal.SIGKILL,
    )
    assert list(signs(store.work_dir))
    run(PLANTED, store.root, until="train")
    assert not store.work_dir.exists()
