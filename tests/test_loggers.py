"""Loggers are told every point once, and whatever they do, a run ends as it would have without them."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console
from study_fixture import as_study, contents, environment, log_lines, planted, run, state, work_done

from glottoscope.errors import InputError
from glottoscope.study import telling
from glottoscope.study.following import Tail, follow
from glottoscope.study.loggers import UnitLogger, setup_of, values_of
from glottoscope.study.merging import merge
from glottoscope.study.metrics import MetricsFile, Point, points
from glottoscope.study.runner import run_study
from glottoscope.study.stages.context import Context
from glottoscope.study.store import RunStore

BOTH = {"tensorboard": True, "wandb": {"project": "p"}}
LOGGED = planted(logging=BOTH)
RESULTS = ("cells/**/*", "models/**/*", "rulers/**/*", "tables/*", "tokens/**/*", "report/**/*")
MANIFEST = ("manifest.json",)
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A finished run without loggers."""
    return run(planted(), tmp_path_factory.mktemp("plain") / "run", until="report")


def copy(store: RunStore, folder: Path) -> RunStore:
    return RunStore(shutil.copytree(store.root, folder / "run"))


def logged(raw: dict[str, Any], out: Path, *, until: str = "train", workers: int = 1) -> tuple[RunStore, str, float]:
    """Run a study that must succeed; returns what the console said, and seconds."""
    console, started = Console(file=StringIO(), width=300), time.monotonic()
    result = run_study(as_study(raw, out.parent), out, until=until, workers=workers, console=console)
    assert result.exit_code == 0, result.failures
    assert isinstance(console.file, StringIO)
    return RunStore(out), console.file.getvalue(), time.monotonic() - started


def warnings(said: str) -> list[str]:
    return [x for x in said.splitlines() if "logging." in x]


def all_points(store: RunStore) -> list[Point]:
    return [p for path in sorted(store.metrics_dir.glob("*.jsonl")) for p in points(path)]


# ---- settings


def test_logging_changes_no_key_no_hash_and_no_result(plain: RunStore, tmp_path: Path) -> None:
    study, other = as_study(planted()), as_study(LOGGED)
    assert study.identity() == other.identity() == study.dump()
    a, b = Context(study, RunStore(tmp_path / "a")), Context(other, RunStore(tmp_path / "a"))
    assert a.pretrain_key(a.runs[0]) == b.pretrain_key(b.runs[0])
    assert [a.train_key(c, 0, 0) for c in a.cells] == [b.train_key(c, 0, 0) for c in b.cells]
    # A finished run, with other logging: nothing is made again, and no file of a result changes.
    store = copy(plain, tmp_path)
    before, n = state(store.root, RESULTS), log_lines(store)
    assert len(before) > 30
    for raw in (LOGGED, planted(logging={"wandb": {"project": "q", "mode": "offline"}}), planted()):
        logged(raw, store.root, until="report")
        assert state(store.root, RESULTS) == before
        assert contents(store.root, MANIFEST) == contents(plain.root, MANIFEST)
        assert store.study().logging == as_study(raw).logging
    assert sum(work_done(store, n).values()) == 0
    assert store.study_path.read_bytes() == plain.study_path.read_bytes()


def test_the_report_of_a_logged_run_is_that_of_another(plain: RunStore, tmp_path: Path) -> None:
    store = run(LOGGED, tmp_path / "run", until="report")
    assert contents(store.root, (*RESULTS, *MANIFEST)) == contents(plain.root, (*RESULTS, *MANIFEST))


def test_a_merge_keeps_the_logging_of_the_first(plain: RunStore, tmp_path: Path) -> None:
    mine = copy(plain, tmp_path)
    mine.study_path.write_text(tomli_w.dumps(LOGGED), encoding="utf-8")
    merge(mine.root, plain.root)
    assert mine.study().logging == as_study(LOGGED).logging


@pytest.mark.parametrize(
    ("logging", "words"),
    [
        ({"wandb": {}}, "missing field logging.wandb.project"),
        ({"wandb": {"project": "p", "key": "k"}}, "unknown field logging.wandb.key"),
        ({"tensorbord": True}, "did you mean 'tensorboard'"),
        ({"wandb": {"project": "p", "mode": "maybe"}}, "logging.wandb.mode"),
    ],
)
def test_wrong_settings_are_named(logging: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_study(planted(logging=logging))


# ---- failures: packages that are not there, that raise, that hang, as the logger's process finds them

PACKAGES = {
    "raises at its import": "raise ImportError('broken wheel')",
    "raises at the start": "Settings = dict\ndef init(**_): raise RuntimeError('no network\\nat all')",
    "ends the process": "Settings = dict\ndef init(**_): raise SystemExit('no key')",
    "dies": "import os\nSettings = dict\ndef init(**_): os.abort()",
    "raises while it logs": "class R:\n  def define_metric(*_, **__): pass\n  def log(*_): raise OSError(28, 'No space left')\n"
    "def init(**_): return R()\nSettings = dict",
    "hangs at its import": "import time; time.sleep(1000)",
    "hangs at the start": "import time\ndef init(**_): time.sleep(1000)\nSettings = dict",
    "hangs at the end": "import time\nclass R:\n  def define_metric(*_, **__): pass\n  def log(*_): pass\n"
    "  def finish(*_): time.sleep(1000)\ndef init(**_): return R()\nSettings = dict",
}  # fmt: skip


def with_package(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that a logger's process finds before any other of its name."""
    (folder / "packages" / name).mkdir(parents=True)
    (folder / "packages" / name / "__init__.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder / "packages"), prepend=os.pathsep)


@pytest.mark.parametrize("kind", PACKAGES)
def test_whatever_a_logger_does_is_one_warning(plain: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with_package(tmp_path, "wandb", PACKAGES[kind], monkeypatch)
    monkeypatch.setattr(telling, "END_S", 4.0)
    store, said, seconds = logged(planted(logging={"wandb": {"project": "p"}}), tmp_path / "run")
    found = warnings(said)
    assert len(found) == 1, said
    assert found[0].startswith("logging.wandb: ")
    assert found[0].endswith("; the run goes on without it")
    expected = {
        "raises at its import": "glottoscope[wandb]", "raises at the start": "RuntimeError: no network",
        "ends the process": "SystemExit: no key", "dies": f"ended with {-signal.SIGABRT}",
        "raises while": "OSError: [Errno 28] No space left", "hangs": "given up 4 s after",
    }  # fmt: skip
    assert next(words for start, words in expected.items() if kind.startswith(start)) in found[0]
    assert seconds < 60  # far from 1,000
    trained = ("cells/*/layer_*/seed_*/sae.safetensors", "cells/**/training.parquet", "models/**/*")
    assert contents(store.root, trained) == contents(plain.root, trained)
    assert len(all_points(store)) == len(all_points(plain))


def test_packages_that_are_not_there_are_named(plain: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb"):
        with_package(tmp_path / name, name, f"raise ModuleNotFoundError(\"No module named '{name}'\")", monkeypatch)
    _, said, _ = logged(LOGGED, copy(plain, tmp_path).root)
    assert sorted(warnings(said)) == [
        f"logging.{name}: it needs a package: pip install 'glottoscope[{name}]' (No module named '{name}'); "
        "the run goes on without it"
        for name in ("tensorboard", "wandb")
    ]


def test_a_logger_does_not_outlive_a_run_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import os, sys\ninit = None\nwith open(os.environ['SEEN'], 'w') as file: file.write(str(os.getpid()))"
    with_package(tmp_path, "wandb", text, monkeypatch)
    monkeypatch.setenv("SEEN", str(tmp_path / "pid"))
    store = run(planted(), tmp_path / "run", until="tokens")
    code = (
        "import sys, time\nfrom rich.console import Console\nfrom glottoscope.study.load import parse_study\n"
        "from glottoscope.study.store import RunStore\nfrom glottoscope.study.telling import telling\nfrom pathlib import Path\n"
        "study = parse_study(open(sys.argv[1]).read(), name='s', folder=Path())\n"
        "with telling(study, RunStore(sys.argv[2]), Console()): time.sleep(100)"
    )
    (tmp_path / "study.toml").write_text(tomli_w.dumps(planted(logging={"wandb": {"project": "p"}})), encoding="utf-8")
    store.study_path.write_bytes((tmp_path / "study.toml").read_bytes())
    inherited = {**environment(), "PYTHONPATH": os.pathsep.join((environment()["PYTHONPATH"], os.environ["PYTHONPATH"]))}
    command = [sys.executable, "-c", code, str(tmp_path / "study.toml"), str(store.root)]
    with subprocess.Popen(command, env=inherited) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(encoding="utf-8"))
        process.kill()
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    wait_until(lambda: not is_running(pid))


def test_nor_does_one_that_hangs(plain: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_package(tmp_path, "wandb", PACKAGES["hangs at its import"], monkeypatch)
    store = copy(plain, tmp_path)
    store.study_path.write_text(tomli_w.dumps(planted(logging={"wandb": {"project": "p"}})), encoding="utf-8")
    code = "import sys\nfrom glottoscope.study import loggers\nloggers.END_S = 0.5\nsys.exit(loggers.main('wandb', sys.argv[1]))"
    path = os.pathsep.join((environment()["PYTHONPATH"], os.environ["PYTHONPATH"]))
    command = [sys.executable, "-c", code, str(store.root)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert ended.returncode == 1


def wait_until(holds: Any, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_wish_nothing_is_started(plain: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling.Teller, "__init__", lambda *_: pytest.fail("a logger was started"))
    logged(planted(logging={"tensorboard": False}), copy(plain, tmp_path).root)


# ---- following


class Memory:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.is_closed = False

    def log(self, points: list[Point]) -> None:
        assert points
        self.points += points

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("seed", range(20))
def test_every_point_is_told_once_however_the_files_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr("glottoscope.study.following.CHUNK", rng.choice([200, 1000, 2**18]))
    monkeypatch.setattr("glottoscope.study.following.MOST", rng.choice([1, 3, 10_000]))
    folder, notes = tmp_path / "metrics", tmp_path / "notes" / "sent.json"
    tail, told = Tail(folder, notes), []
    for attempt in (1, 2, 3):
        for unit in ("a", "b@1"):
            known = rng.randrange(attempt * 3)
            file = MetricsFile(folder / f"{unit}.jsonl", {"unit": unit})
            file.begin([{"step": n, "loss": n / 7} for n in range(known)])
            for step in range(known, attempt * 3):
                file.add([{"step": step, "loss": step / 7}])
                with open(folder / f"{unit}.jsonl", "ab") as handle:  # half a line, as another machine may see it
                    handle.write(b'{"step": 99, "un')
                told += tail.read()
                os.truncate(folder / f"{unit}.jsonl", (folder / f"{unit}.jsonl").stat().st_size - 16)
                if rng.random() < 0.2:  # another process goes on
                    while more := tail.read():
                        told += more
                    tail.keep()
                    tail = Tail(folder, notes)
    while more := tail.read():
        told += more
    for unit in ("a", "b@1"):
        order = [(p["attempt"], p["step"]) for p in told if p["unit"] == unit]
        assert order == sorted(set(order))
        assert {(p["attempt"], p["step"]) for p in points(folder / f"{unit}.jsonl")} <= set(order)


def test_what_is_written_before_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glottoscope.study.following.LOOK_S", 0.01)
    file, logger, ending = MetricsFile(tmp_path / "u.jsonl", {"unit": "u"}), Memory(), threading.Event()
    file.begin()
    thread = threading.Thread(target=follow, args=(logger, Tail(tmp_path, tmp_path / "sent.json"), ending))
    thread.start()
    for step in range(100):
        file.add([{"step": step}])
    ending.set()
    thread.join(30)
    assert [p["step"] for p in logger.points] == list(range(100))
    assert logger.is_closed
    assert json.loads((tmp_path / "sent.json").read_text(encoding="utf-8"))


def test_a_unit_that_was_cleaned_and_comes_back_is_told(tmp_path: Path) -> None:
    for unit in ("gone", "stays"):
        file = MetricsFile(tmp_path / f"{unit}.jsonl", {"unit": unit})
        file.begin()
        file.add([{"step": 3}])
    tail = Tail(tmp_path, tmp_path / "sent.json")
    assert {p["unit"] for p in tail.read() + tail.read()} == {"gone", "stays"}
    tail.keep()
    (tmp_path / "gone.jsonl").unlink()
    tail = Tail(tmp_path, tmp_path / "sent.json")
    file = MetricsFile(tmp_path / "gone.jsonl", {"unit": "gone"})
    file.begin()
    file.add([{"step": 1}])
    assert [(p["unit"], p["step"]) for p in tail.read() + tail.read()] == [("gone", 1)]


class Calls(UnitLogger):
    """What is opened, written and shut."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def open(self, first: Point) -> str:
        self.calls.append(("open", first["unit"], first["step"]))
        return first["unit"]

    def write(self, opened: str, points: Sequence[Point]) -> None:
        self.calls.append(("write", opened, points[0]["step"], len(points)))

    def shut(self, opened: str) -> None:
        self.calls.append(("shut", opened))


def test_a_unit_is_open_from_its_first_point_to_its_last_and_anew_when_it_began_anew() -> None:
    def point(unit: str, step: int, attempt: int = 1) -> Point:
        return {"unit": unit, "step": step, "steps": 2, "attempt": attempt, "stage": "train"}

    logger = Calls()
    logger.log([point("a", 0), point("a", 0), point("b", 0)])
    logger.log([point("a", 0, 2), point("a", 1, 2)])
    logger.log([point("a", 1, 2)])  # of the same step, in a later look
    logger.log([point("b", 1)])
    logger.close()
    assert logger.calls == [
        ("open", "a", 0), ("write", "a", 0, 2), ("open", "b", 0), ("write", "b", 0, 1),
        ("shut", "a"), ("open", "a", 0), ("write", "a", 0, 1), ("write", "a", 1, 1), ("write", "a", 1, 1),
        ("shut", "a"), ("write", "b", 1, 1), ("shut", "b"),
    ]  # fmt: skip


# ---- the real packages


@needs_tensorboard
def test_tensorboard_shows_what_the_metrics_say(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-not-found]

    raw = planted(logging={"tensorboard": True})
    store, said, _ = logged(raw, tmp_path / "run", workers=2)
    assert warnings(said) == []
    assert_shown(store, EventAccumulator)
    written = state(store.logger_dir("tensorboard"), ("*/*",))
    logged(raw, store.root)  # goes on: nothing is told again
    assert state(store.logger_dir("tensorboard"), ("*/*",)) == written
    logged(planted(logging={"tensorboard": True}, sae={"k": 3}), store.root)  # begins anew: what was before is not shown
    assert_shown(store, EventAccumulator)


def assert_shown(store: RunStore, accumulator: Any) -> None:
    expected: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for point in all_points(store):
        unit = expected.setdefault(point["unit"], {})
        for name, value in values_of(point).items():
            unit.setdefault(f"{name}/{setup_of(point) or 'language model'}", []).append((point["step"], value))
    assert set(expected) == {"m", "m@0", "m@20"}
    for unit, tags in expected.items():
        events = accumulator(str(store.logger_dir("tensorboard") / unit), size_guidance={"scalars": 0})
        events.Reload()
        assert set(events.Tags()["scalars"]) == set(tags)
        for tag, values in tags.items():
            found = [(e.step, e.value) for e in events.Scalars(tag)]
            assert [step for step, _ in found] == [step for step, _ in values]
            assert [value for _, value in found] == pytest.approx([value for _, value in values], rel=1e-6)


@needs_wandb
def test_wandb_offline_holds_what_the_metrics_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    store, said, _ = logged(planted(logging={"wandb": {"project": "p", "tags": ["t"]}}), tmp_path / "run")
    assert warnings(said) == []
    expected: dict[str, dict[int, dict[str, float]]] = {}
    for point in all_points(store):
        row = expected.setdefault(point["unit"], {}).setdefault(point["step"], {"step": point["step"]})
        setup = setup_of(point).replace(" ", "/")
        row |= {f"{setup}/{k}" if setup else k: v for k, v in values_of(point).items()}
    assert wandb_history(store.logger_dir("wandb")) == {unit: list(rows.values()) for unit, rows in expected.items()}
    assert not (tmp_path / "wandb").exists()


def wandb_history(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Run's name -> rows of its history, as wandb's own files hold them."""
    from wandb.proto import wandb_internal_pb2  # type: ignore[import-not-found]

    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        rows, name = [], ""
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue] - made at import
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
                assert (record.run.project, record.run.run_group, list(record.run.tags)) == ("p", "tiny", ["t"])
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
        found[name] = rows
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB; pieces with checksum, length, kind (whole, first, middle, last)."""
    at, pieces = 7, []  # wandb's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):
            yield b"".join(pieces)
            pieces = []
