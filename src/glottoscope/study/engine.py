"""Doing the units of a stage: the contract of every engine, and what a unit's process does wherever it runs.

A unit is a function of the run directory and a few plain values; what it makes goes through the store, never
through the driver's memory. Every unit runs with the study's number of threads wherever it runs, so neither the number
of workers nor the engine changes a number.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from rich.console import Console

from glottoscope.errors import InputError, is_interruption
from glottoscope.study.heartbeats import Heart, clear
from glottoscope.study.plan import Room
from glottoscope.study.store import RunStore
from glottoscope.study.view import View, view_of

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
    memory: int = 0  # bytes of the host that its process needs at most; 0: not known


class Ended(NamedTuple):
    """How a unit ended, as its own process saw it."""

    failure: Failure | None
    seconds: float
    peak_memory: int  # bytes; the largest of the process so far, not of this unit alone


@dataclass
class Outcome:
    """What became of the units of one stage."""

    done: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    units: dict[str, Ended] = field(default_factory=dict)


class Engine(ABC):
    """Runs units in order of submission, `slots` of them at once.

    Use as a context manager: what it started lives for the whole run and is stopped on any exit.
    """

    slots: int

    def __init__(self, store: RunStore, threads: int, console: Console | None = None, *, plain: bool = False) -> None:
        self.store = store
        self.threads = threads
        self.console = console or Console(stderr=True)
        self.plain = plain or not self.console.is_terminal

    def __enter__(self) -> Self:
        clear(self.store.work_dir)  # of a run that was killed: this one holds the directory now
        self.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stop(kill=error is not None)
        clear(self.store.work_dir)

    def start(self) -> None:  # noqa: B027 - not every engine has something to start
        """Start what the units need; raises InputError where it cannot be had."""

    def memory_per_unit(self) -> Room | None:
        """Memory that a unit may use where it runs; None: as this machine has."""
        return None

    @abstractmethod
    def stop(self, kill: bool) -> None:
        """Stop what was started; `kill`: units at work, too."""

    @abstractmethod
    def work(self, stage: str, units: Sequence[Unit], view: View, finish: Callable[[Unit, Ended], None]) -> None:
        """Run the units, tell the view how they get on, and `finish` each of them once."""

    def run(self, stage: str, units: Sequence[Unit]) -> Outcome:
        """Run the units of one stage and show how they get on; failures are collected, not raised."""
        outcome = Outcome()
        started = time.monotonic()
        if units:
            with view_of(self.console, self.plain, stage, units) as view:

                def finish(unit: Unit, ended: Ended) -> None:
                    self._finish(unit, ended, view, outcome)

                self.work(stage, units, view, finish)
        outcome.seconds = time.monotonic() - started
        self._write_log(stage, outcome)
        if units:
            rate = f" in {outcome.seconds:.0f} s"
            failed = f", [red]{len(outcome.failures)} failed[/red]" if outcome.failures else ""
            self.console.print(f"  [bold]{stage:<9}[/bold] {len(outcome.done)} done{failed}{rate}")
        return outcome

    def _finish(self, unit: Unit, ended: Ended, view: View, outcome: Outcome) -> None:
        view.finish(unit, ended.failure, ended.seconds)
        outcome.units[unit.name] = ended
        if ended.failure is None:
            outcome.done.append(unit.name)
            return
        outcome.failures.append(ended.failure)
        if ended.failure.details:
            self.console.print(ended.failure.details, style="dim", highlight=False, markup=False)

    def _write_log(self, stage: str, outcome: Outcome) -> None:
        """One JSON line per stage: how long it took. Kept out of the tables, whose bytes must not depend on time."""
        record = {
            "time": round(time.time(), 1), "stage": stage, "seconds": round(outcome.seconds, 2), "done": len(outcome.done),
            "failures": [f"{f.unit}: {f.message}" for f in outcome.failures],
            "units": {name: [round(e.seconds, 2), e.peak_memory] for name, e in outcome.units.items()},
        }  # fmt: skip
        with open(self.store.log_path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---- in the unit's process

_prepared: tuple[int, bool] | None = None


def prepare_process(threads: int, fast_matmul: bool) -> None:
    """Set threads and products as the study wants them; once per process is enough."""
    global _prepared
    if _prepared == (threads, fast_matmul):
        return
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
    _prepared = threads, fast_matmul


def run_unit(unit: Unit, stage: str, root: str, report: Report | None = None) -> Ended:
    """Run a unit in this process; what goes wrong is in the result, an interruption is not caught."""
    started, failure = time.monotonic(), None
    with Heart(RunStore(root).sign_path(unit.name), stage, unit.name) as heart:

        def tell(done: float, total: float, words: str = "") -> None:
            heart.tell(done, total, words)
            if report is not None:
                report(unit.name, done, total, words)

        try:
            unit.function(*unit.arguments, tell)
        except InputError as error:
            failure = Failure(unit.name, str(error), True, "")
        except Exception as error:
            if is_interruption(error):
                raise KeyboardInterrupt from None
            failure = Failure(unit.name, f"{type(error).__name__}: {error}", False, traceback.format_exc())
    return Ended(failure, time.monotonic() - started, peak_memory())


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def lost(unit: Unit, message: str, seconds: float = 0.0) -> Ended:
    """The end of a unit whose process did not live to tell."""
    return Ended(Failure(unit.name, message, False, ""), seconds, 0)


# ---- in the driver


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use: a batch system may give fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stop_on_sigterm() -> None:
    """Let SIGTERM end a run the way Ctrl-C does: workers stopped, nothing half written.

    The first one only: batch systems send it to a process and then to its group, and while a run ends, units write their states.
    """
    asked = False

    def interrupt(_signal: int, _frame: Any) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread() and sys.platform != "win32":
        signal.signal(signal.SIGTERM, interrupt)
