"""A study of seconds that goes through every stage, its runs, and what the kills must leave unchanged."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tomli_w
from study_fixture import environment, planted, planted_model

from glottoscope.study import locks
from glottoscope.study.heartbeats import Sign, signs

# Two models (seeds of one: the report draws them together) and their cells share two workers. The epoch is larger than the
# shuffle buffer; two layers, learning rates and seeds share each stream, the last checkpoint chooses the rate; a state is
# written as often as its cost allows.
STUDY = planted(
    study={"name": "kill"}, compute={"checkpoint_minutes": 1e-6, "lm_batch": 16},
    models=planted_model(steps=40, checkpoints=[0, 40], seeds=[0, 1]), corpus={"train_documents": 30, "aligned_pairs": 40},
    sae={"n": 32, "steps": 60, "lr": [1e-3, 3e-3], "seeds": [0, 1], "batch_tokens": 256, "buffer_tokens": 1000},
    intervention={
        "models": ["m"], "bases": [0], "layers": [1], "draws": 2, "alphas": [1.0], "tokens": 600, "bootstrap": 20,
        "parts": ["mixed", "all"], "texts": ["documents"],
    },
    report={"pattern_features": 1, "pattern_examples": 1},
)  # fmt: skip
WORKERS = 2
# Everything else is compared, byte for byte.
NOT_COMPARED = {
    "log.jsonl": "one line for each stage of each run: how long it took, and when",
    "metrics": "curves while they are drawn: steps made twice are there twice",
    ".lock": "what flock is taken on; empty",
}
SHORT_S = 0.1  # stages below it are hit by chance only
LIMIT_S = 300.0


def contents(root: Path) -> dict[str, str]:
    """File -> hash of everything in a run directory that does not hold time."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.relative_to(root).parts[0] not in NOT_COMPARED)
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def log_of(root: Path) -> list[dict]:
    path = root / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# ---- processes


class Process(NamedTuple):
    """A process that may end and whose number may then be used again."""

    pid: int
    started: str

    @property
    def lives(self) -> bool:
        return locks._started(self.pid) == self.started != ""

    @property
    def command(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
        except OSError:
            return ""


def session_of(leader: int) -> Iterator[Process]:
    """Processes of a session."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] not in "ZX":
                yield Process(int(path.name), fields[19])


def workers_of(leader: int) -> list[Process]:
    found = [p for p in session_of(leader) if p.pid != leader]
    return [p for p in found if "spawn_main" in p.command]


class Run:
    """`glottoscope run` in a session of its own."""

    def __init__(self, study: Path, root: Path) -> None:
        self.root = root
        self.lines = len(log_of(root))
        self.frozen: list[Process] = []
        self.errors = root.with_name(f"{root.name}.stderr")
        arguments = ["run", study, "--out", root, "--workers", WORKERS, "--plain"]
        with open(self.errors, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "glottoscope.cli", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=errors,
                env=environment(), start_new_session=True,
                # A shell that runs in the background ignores Ctrl-C, and what it starts does so too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def done(self) -> int:
        """Stages that this run has gone through."""
        return len(log_of(self.root)) - self.lines

    @property
    def at_work(self) -> list[Sign]:
        return list(signs(self.root / "work"))

    @property
    def said(self) -> str:
        return self.errors.read_text(encoding="utf-8")

    def end(self) -> int:
        return self.process.wait(LIMIT_S)

    def stop(self, kind: str, rng: random.Random) -> str:
        """Send what `kind` says, and to whom; returns that in words."""
        if kind == "worker":
            workers = workers_of(self.pid)
            if workers:
                victim = rng.choice(workers)
                os.kill(victim.pid, signal.SIGKILL)
                return f"SIGKILL to worker {victim.pid} of {len(workers)}"
            kind = "driver"  # before there are workers
        number, group = KINDS[kind]
        if kind == "frozen":  # its workers cannot see that it was killed
            self.frozen = workers_of(self.pid)
            for worker in self.frozen:
                os.kill(worker.pid, signal.SIGSTOP)
        (os.killpg if group else os.kill)(self.pid, number)
        whom = "all" if group else f"the driver, {len(self.frozen)} worker(s) frozen" if self.frozen else "the driver"
        return f"{number.name} to {whom}"


# Kind -> signal, and whether the whole process group gets it, as from a terminal.
KINDS = {
    "all": (signal.SIGKILL, True), "driver": (signal.SIGKILL, False), "frozen": (signal.SIGKILL, False),
    "worker": (signal.SIGKILL, False),
    "terminate": (signal.SIGTERM, False), "terminate all": (signal.SIGTERM, True), "ctrl-c": (signal.SIGINT, True),
}  # fmt: skip


CYCLE = ("all", "frozen", "ctrl-c", "all", "all", "worker", "terminate", "all",
         "all", "driver", "ctrl-c", "all", "all", "worker", "terminate all", "all")  # fmt: skip


# ---- the reference, and moments


class Span(NamedTuple):
    """When the units of one step of the run were at work, in seconds from its start."""

    place: int  # lines of the log before it
    stage: str
    start: float
    end: float


class Reference(NamedTuple):
    """A run that nothing stopped."""

    study: Path
    root: Path
    seconds: float
    cpu: float  # seconds of all its processes
    stages: list[str]  # of the lines of its log
    spans: list[Span]
    contents: dict[str, str]


def reference(folder: Path) -> Reference:
    """Run the study, and watch when which stage is at work."""
    study, root = folder / "study.toml", folder / "reference"
    study.write_text(tomli_w.dumps(STUDY), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = Run(study, root)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while not run.ended:
        now, place = time.monotonic() - run.started, run.done
        last = dict.fromkeys(range(place), now) | last
        if place not in first and run.at_work:
            first[place] = now
        time.sleep(0.01)
    seconds = time.monotonic() - run.started
    assert run.end() == 0, run.said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    names = [row["stage"] for row in log_of(root)]
    spans = [Span(n, names[n], start, last.get(n, seconds)) for n, start in first.items() if n < len(names)]
    return Reference(study, root, seconds, cpu, names, spans, contents(root))


class Moment(NamedTuple):
    """When and how a run is stopped."""

    number: int
    kind: str
    span: Span | None  # counted from when the units of this step are at work; None: from the start of the run
    after: float  # seconds
    again: float | None  # the run after it is killed as well, after so many seconds

    def __str__(self) -> str:
        where = f"{self.span.stage} ({self.span.place})" if self.span else "any time"
        return f"{self.kind}, {self.after:.2f} s into {where}"


def moments(found: Reference, count: int, rng: random.Random) -> list[Moment]:
    """Moments of the run's wall time: any time, then within each step that takes long enough, in turn and drawn order.

    Half of them kill everything, the others the driver or one worker, or are a SIGTERM or a Ctrl-C; every fourth is followed
    by a second one.
    """
    long = [s for s in found.spans if s.end - s.start >= SHORT_S]
    strata: list[Span | None] = rng.sample([None, *long], k=len(long) + 1)
    drawn = []
    for number, kind in enumerate(itertools.islice(itertools.cycle(CYCLE), count)):
        span = strata[number % len(strata)]
        if span is None and KINDS[kind][0] != signal.SIGKILL:
            span = rng.choice(long)  # signals are answered from when the run says what it does
        length = found.seconds if span is None else span.end - span.start
        again = rng.random() * found.seconds if number % 4 == 0 else None
        drawn.append(Moment(number, kind, span, rng.random() * length, again))
    return drawn


def wait_until(run: Run, moment: Moment) -> bool:
    """Wait for the moment; False: the run was over before."""
    start = run.started
    if moment.span is not None:
        while not run.ended and not (run.done == moment.span.place and run.at_work) and run.done <= moment.span.place:
            time.sleep(0.005)
        start = time.monotonic()
    while not run.ended and time.monotonic() - start < moment.after:
        time.sleep(0.005)
    return not run.ended


def hit(run: Run, stages: list[str]) -> str:
    """Which units were at work, as far as the run directory tells."""
    units = [f"{s.stage}: {s.unit} ({s.words or f'{s.done:g} of {s.total:g}'})" for s in run.at_work]
    if units:
        return "; ".join(units)
    return f"no unit at work, before {stages[run.done]} ({run.done})" if run.done < len(stages) else "at the end"
