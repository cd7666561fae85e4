"""Doing the units of a stage: in this process or in several local processes, with one view of the progress.

A unit is a function of the run directory and a few plain values; what it makes goes through the store, never
through the driver's memory. Every unit runs with the study's number of threads wherever it runs, so the number of
workers changes no number.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from glottoscope.errors import InputError

Report = Callable[[str, float, float, str], None]  # unit, done, total, words


class Failure(NamedTuple):
    """A unit that did not end well."""

    unit: str
    message: str
    bad_input: bool  # the user's to mend, as opposed to a defect of the program
    details: str


@dataclass(frozen=True)
class Unit:
    """One piece of work: `function(*arguments, report)` with plain, picklable arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    weight: float = 1.0


@dataclass
class Outcome:
    """What became of the units of one stage."""

    done: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)  # unit -> bytes, see `peak_rss`


_messages: Any = None


def _start_worker(messages: Any, threads: int, fast_matmul: bool) -> None:
    global _messages
    _messages = messages
    # The driver answers Ctrl-C and stops its workers; were they to answer too, half of them would print tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def follow_parent() -> None:
        # A killed driver must not leave workers behind that write into a run directory someone else now holds.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    _prepare_process(threads, fast_matmul)


def _prepare_process(threads: int, fast_matmul: bool) -> None:
    import scipy.linalg  # noqa: F401 - brings its own BLAS, which is limited below
    import torch
    from threadpoolctl import threadpool_limits
    from transformers.utils import logging

    from glottoscope.sae.matmul import enable_fast_matmul

    logging.disable_progress_bar()  # one view of the progress, ours
    torch.set_num_threads(threads)
    # numpy's and scipy's products have threads of their own: with every core at work they wait for each other.
    threadpool_limits(threads, user_api="blas")
    # Chosen only where a measurement shows that it is true float32 here; `status` says which is in use. Never beside an
    # accelerator: the switch is process-wide, and there it would mean TF32.
    if fast_matmul:
        enable_fast_matmul()


def _send(unit: str, done: float, total: float, words: str) -> None:
    _messages.put((unit, done, total, words))


def _run_unit(unit: Unit) -> tuple[Failure | None, int]:
    return _guard(unit, _send), peak_rss()


def peak_rss() -> int:
    """Most resident bytes of this process so far. A process does several units: of the later ones it is an upper bound."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _guard(unit: Unit, report: Report) -> Failure | None:
    try:
        unit.function(*unit.arguments, lambda done, total, words="": report(unit.name, done, total, words))
    except InputError as error:
        return Failure(unit.name, str(error), True, "")
    except Exception as error:
        return Failure(unit.name, f"{type(error).__name__}: {error}", False, traceback.format_exc())
    return None


class _Rate(ProgressColumn):
    """Units of work per second, from the unit's own count."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="dim")


class Engine:
    """Runs units in order of submission on `workers` local processes (1: in this process).

    Use as a context manager: the processes live for the whole run and are stopped on any exit.
    """

    def __init__(
        self, workers: int, threads: int, log: Path | None = None, console: Console | None = None, *, fast_matmul: bool = True
    ) -> None:
        self.workers = max(1, workers)
        self.threads = threads
        self.fast_matmul = fast_matmul
        self.console = console or Console(stderr=True)
        self._log = log
        self._pool: ProcessPoolExecutor | None = None
        self._queue: Any = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stop(kill=error is not None)

    def _stop(self, kill: bool) -> None:
        if self._pool is None:
            return
        if kill:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=not kill, cancel_futures=True)
        self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._queue = context.Queue()
            self._pool = ProcessPoolExecutor(self.workers, context, _start_worker, (self._queue, self.threads, self.fast_matmul))
        return self._pool

    def run(self, stage: str, units: Sequence[Unit]) -> Outcome:
        """Run the units of one stage and show how they get on; failures are collected, not raised."""
        outcome = Outcome()
        started = time.monotonic()
        if units:
            with Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"), _Rate(), TimeRemainingColumn(), TextColumn("{task.fields[words]}"),
                console=self.console, transient=True, refresh_per_second=4, disable=not self.console.is_terminal,
            ) as progress:  # fmt: skip
                view = _View(progress, stage, units)
                if self.workers == 1 or len(units) == 1:
                    self._run_here(units, view, outcome)
                else:
                    self._run_pool(units, view, outcome)
        outcome.seconds = time.monotonic() - started
        self._write_log(stage, outcome)
        if units:
            rate = f" in {outcome.seconds:.0f} s"
            failed = f", [red]{len(outcome.failures)} failed[/red]" if outcome.failures else ""
            self.console.print(f"  [bold]{stage:<9}[/bold] {len(outcome.done)} done{failed}{rate}")
        return outcome

    def _run_here(self, units: Sequence[Unit], view: _View, outcome: Outcome) -> None:
        _prepare_process(self.threads, self.fast_matmul)
        for unit in units:
            failure = _guard(unit, view.update)
            outcome.peaks[unit.name] = peak_rss()
            self._finish(unit, failure, view, outcome)

    def _run_pool(self, units: Sequence[Unit], view: _View, outcome: Outcome) -> None:
        pool = self._start()
        waiting: dict[Future[tuple[Failure | None, int]], Unit] = {pool.submit(_run_unit, u): u for u in units}
        while waiting:
            finished, _ = wait(waiting, timeout=0.25, return_when=FIRST_COMPLETED)
            while True:
                try:
                    view.update(*self._queue.get_nowait())
                except queue.Empty:
                    break
            for future in finished:
                unit = waiting.pop(future)
                try:
                    failure, outcome.peaks[unit.name] = future.result()
                except BrokenProcessPool:
                    failure = Failure(unit.name, "its process was killed (out of memory?)", False, "")
                    self._pool = None
                self._finish(unit, failure, view, outcome)

    def _finish(self, unit: Unit, failure: Failure | None, view: _View, outcome: Outcome) -> None:
        view.finish(unit)
        if failure is None:
            outcome.done.append(unit.name)
            return
        outcome.failures.append(failure)
        if failure.details:
            self.console.print(failure.details, style="dim", highlight=False, markup=False)

    def _write_log(self, stage: str, outcome: Outcome) -> None:
        """One JSON line per stage: how long it took. Kept out of the tables, whose bytes must not depend on time."""
        if self._log is None:
            return
        record = {
            "time": round(time.time(), 1), "stage": stage, "seconds": round(outcome.seconds, 2), "done": len(outcome.done),
            "failures": [f"{f.unit}: {f.message}" for f in outcome.failures], "peak_rss": outcome.peaks,
        }  # fmt: skip
        with open(self._log, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")


class _View:
    """The stage's own bar, and one line below it for each unit at work."""

    def __init__(self, progress: Progress, stage: str, units: Sequence[Unit]) -> None:
        self.progress = progress
        self.total = progress.add_task(f"[bold]{stage}", total=sum(u.weight for u in units), words=f"0 of {len(units)}")
        self.weights = {u.name: u.weight for u in units}
        self.tasks: dict[str, Any] = {}
        self.shares: dict[str, float] = {}
        self.finished = 0
        self.units = len(units)

    def update(self, unit: str, done: float, total: float, words: str) -> None:
        if unit not in self.weights or self.shares.get(unit) == 1.0:
            return  # a late message of a finished unit
        if unit not in self.tasks:
            self.tasks[unit] = self.progress.add_task(f"  {unit}", total=total, words=words)
        self.progress.update(self.tasks[unit], completed=done, total=total, words=words)
        self.shares[unit] = min(done / total, 0.999) if total else 0.0
        self._show()

    def finish(self, unit: Unit) -> None:
        self.finished += 1
        self.shares[unit.name] = 1.0
        if unit.name in self.tasks:
            self.progress.remove_task(self.tasks.pop(unit.name))
        self._show()

    def _show(self) -> None:
        completed = sum(self.weights[u] * s for u, s in self.shares.items())
        self.progress.update(self.total, completed=completed, words=f"{self.finished} of {self.units}")


def stop_on_sigterm() -> None:
    """Let SIGTERM end a run the way Ctrl-C does: workers stopped, nothing half written."""

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread() and sys.platform != "win32":
        signal.signal(signal.SIGTERM, interrupt)
