"""What the benchmarks share: options, fresh processes in interleaved rounds, memory, the machine, Markdown tables.

Every measurement is a process of its own that prints one line of JSON. Rounds go A B C A B C: drift of the machine (heat,
neighbours) meets all contestants alike, and the median over rounds is quoted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MB = 2**20
BUSY = 0.1  # cores kept busy by others above which a measurement is doubtful


class Shape(NamedTuple):
    """One SAE and its batch: width of the hidden states, features, rows of a batch."""

    d: int
    n: int
    B: int

    def __str__(self) -> str:
        return f"{self.d}x{self.n}x{self.B}"


class Verdict(NamedTuple):
    """One target of the project and what was measured; `measured` is None where the run did not measure it."""

    target: str
    threads: int | None  # None: as the study chooses
    measured: float | None
    limit: float
    at_least: bool = True

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if (self.measured >= self.limit if self.at_least else self.measured <= self.limit) else "SHORT"


class Section(NamedTuple):
    """A part of the page, the same as data, and the targets it can judge."""

    title: str
    markdown: str
    record: dict[str, Any]
    verdicts: Sequence[Verdict] = ()


@dataclass
class Options:
    """What to run. `interrupted` is set by Ctrl-C: sections then show what they have, and no other one starts."""

    shapes: tuple[Shape, ...] = ()
    thread_counts: tuple[int, ...] = (1,)
    steps: int = 3
    rounds: int = 2
    k: int = 32
    kernels: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    quick: bool = False
    baseline: Path | None = None
    full: bool = False
    keep: Path | None = None
    interrupted: bool = False

    def wants(self, section: str) -> bool:
        """Whether --only names this section (all of them without --only)."""
        return not self.only or any(fnmatch.fnmatch(section, pattern.partition("/")[0]) for pattern in self.only)

    def selects(self, section: str, name: str) -> bool:
        """Whether --only names this measurement: SECTION, or SECTION/PATTERN with a pattern for the measurement's name."""
        if not self.only:
            return True
        parts = (pattern.partition("/") for pattern in self.only)
        return any(fnmatch.fnmatch(section, head) and fnmatch.fnmatch(name, tail or "*") for head, _, tail in parts)


@dataclass(frozen=True)
class Job:
    """One measurement: a command that prints a line of JSON, and its expected share of the time."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    rounds: int = 1


def python_job(name: str, script: str, task: dict[str, Any], *, weight: float, rounds: int) -> Job:
    """A measurement by a script beside this one, which gets `task` as JSON; task["threads"] sets every thread pool."""
    command = (sys.executable, str(HERE / script), json.dumps(task))
    return Job(name, command, thread_env(task["threads"]), weight, rounds)


def thread_env(threads: int) -> dict[str, str]:
    """Environment that holds every thread pool in use here to one size."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def run_job(job: Job) -> dict[str, Any]:
    """The job's record, or {"error": why there is none}; "other_cores" is how many cores other processes kept busy meanwhile."""
    busy, started = _others_seconds(), time.monotonic()
    record = _run_job(job)
    if busy is not None and (now := _others_seconds()) is not None:
        record["other_cores"] = round(max(0.0, (now - busy) / (time.monotonic() - started)), 2)
    return record


def _others_seconds() -> float | None:
    """CPU seconds since boot of everything but this process and its finished children; None where there is no /proc/stat."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal (time that another guest of the host had)
    busy = (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)


def _run_job(job: Job) -> dict[str, Any]:
    # A session of its own: Ctrl-C reaches this process alone, which then stops the job with all it has started.
    process = subprocess.Popen(
        job.command, env={**os.environ, **job.env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate()
    except BaseException:
        stop_group(process)
        raise
    if process.returncode < 0:
        why = f"killed by signal {-process.returncode}"
        return {"error": why + (" (out of memory?)" if process.returncode == -signal.SIGKILL else "")}
    lines = (out if process.returncode == 0 else err).strip().splitlines()
    if process.returncode != 0 or not lines:
        return {"error": lines[-1][:300] if lines else f"exit code {process.returncode}, no output"}
    return json.loads(lines[-1])


def stop_group(process: subprocess.Popen[str]) -> None:
    """End a job and what it has started: politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


class Progress:
    """One line to stderr per measurement, with the time left by the jobs' weights."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.total = sum(job.weight * job.rounds for job in jobs)
        self.count = sum(job.rounds for job in jobs)
        self.done, self.finished, self.seconds = 0.0, 0, 0.0
        self.known: dict[str, float] = {}

    def start(self, job: Job) -> None:
        left = ""
        if self.done:
            minutes = (self.total - self.done) * self.seconds / self.done / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1 else ", under 1 min left"
        print(f"[{self.finished + 1}/{self.count}{left}] {job.name} ", end="", file=sys.stderr, flush=True)

    def skip(self, job: Job) -> None:
        self.total, self.count = self.total - job.weight, self.count - 1

    def stop(self, job: Job, seconds: float, words: str) -> None:
        self.done, self.finished, self.seconds = self.done + job.weight, self.finished + 1, self.seconds + seconds
        print(words, file=sys.stderr, flush=True)


def interleave(jobs: Sequence[Job], options: Options, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Run every job once per round, in order, until all have had their rounds; a job that failed is not run again."""
    results: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
    for number in range(max((job.rounds for job in jobs), default=0)):
        for job in jobs:
            if options.interrupted or number >= job.rounds:
                continue
            if results[job.name] and "error" in results[job.name][-1]:
                progress.skip(job)  # it would fail again, after minutes of filling memory
                continue
            progress.start(job)
            started = time.monotonic()
            try:
                result = run_job(job)
            except KeyboardInterrupt:
                options.interrupted = True
                print("interrupted", file=sys.stderr)
                break
            results[job.name].append(result)
            words = result.get("error") or result.get("words") or "done"
            if result.get("other_cores", 0.0) > BUSY:
                words += f" (others kept {result['other_cores']:.1f} cores busy)"
            progress.stop(job, time.monotonic() - started, words)
    return {name: found for name, found in results.items() if found}


def median_of(records: Sequence[dict[str, Any]] | None, key: str) -> float | None:
    """Median over rounds of one number of the records; None where there is none (not run, or failed)."""
    values = [record[key] for record in records or () if key in record]
    return statistics.median(values) if values else None


def range_of(records: Sequence[dict[str, Any]], key: str) -> str:
    """ "lowest-highest" over rounds, for a table."""
    values = [record[key] for record in records if key in record]
    return f"{min(values):.3g}-{max(values):.3g}" if len(values) > 1 else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))


def reset_peak() -> None:
    """Let `peak_memory` start again from what is resident now; without Linux's clear_refs it keeps its old maximum."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Highest resident memory of this process in bytes.

    Linux's VmHWM, not ru_maxrss: a child inherits the ru_maxrss of the process that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


PACKAGES = ("torch", "numpy", "numba", "triton", "transformers", "sae-lens", "eai-sparsify", "dictionary-learning")


def machine() -> dict[str, Any]:
    """What the numbers depend on: CPU, instruction sets, cores, versions, commit, date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instruction_set": _instruction_set(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        **git_state(ROOT),
    }


def _instruction_set() -> str:
    # In a child: this process stays small.
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    return subprocess.run((sys.executable, "-c", code), capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f" (family {found['cpu family']}, model {found['model']})" if {"cpu family", "model"} <= found.keys() else ""
    return found.get("model name", platform.processor()) + family


def git_state(tree: Path) -> dict[str, Any]:
    """Commit of a source tree, and whether it differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", "-C", str(tree), *arguments), capture_output=True, text=True).stdout.strip()

    return {"commit": git("rev-parse", "--short=12", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
