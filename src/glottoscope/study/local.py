"""The engine of one machine: units in this process (one worker) or in several, each with cores or a GPU of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from rich.console import Console

from glottoscope.study.engine import Ended, Engine, Unit, lost, prepare_process, run_unit, usable_cores
from glottoscope.study.locks import WorkersLock, lock_for_workers
from glottoscope.study.store import RunStore
from glottoscope.study.view import View

STARTING = {signal.SIGINT}  # blocked while a worker starts, which has no answer to it before it is set up


class Place(NamedTuple):
    """What one worker has for itself."""

    cores: tuple[int, ...]  # none: as the system likes
    gpu: str | None  # its value of CUDA_VISIBLE_DEVICES; None: as it is


def places(workers: int, threads: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Place]:
    """Disjoint cores for every worker where there are enough for all, and one GPU each, in turn."""
    enough = workers * threads <= len(cores)
    return [
        Place(tuple(cores[i * threads : (i + 1) * threads]) if enough else (), gpus[i % len(gpus)] if gpus else None)
        for i in range(workers)
    ]


_messages: Any = None


def _start_worker(messages: Any, free: Any, threads: int, fast_matmul: bool, _lock: WorkersLock | None) -> None:
    global _messages
    _messages = messages
    # The driver answers Ctrl-C and stops its workers; were they to answer too, half of them would print tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STARTING)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        # Workers of a killed driver end, and with the last of them its hold on the run directory.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    place: Place = free.get()
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # read when CUDA starts, which is later
    # Before any library counts cores. Threads inherit it.
    if place.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, place.cores)
    prepare_process(threads, fast_matmul)


def _send(unit: str, done: float, total: float, words: str) -> None:
    _messages.put((unit, done, total, words))


def _run(unit: Unit, stage: str, root: str) -> Ended:
    return run_unit(unit, stage, root, _send)


@contextlib.contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LocalEngine(Engine):
    """Units on `workers` local processes (1: in this process).

    Args:
        gpus: CUDA devices that the workers share out, as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        pin: give every worker cores of its own.
    """

    def __init__(
        self, store: RunStore, workers: int, threads: int, console: Console | None = None, *, fast_matmul: bool = True,
        gpus: Sequence[str] = (), pin: bool = True, plain: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(store, threads, console, plain=plain)
        self.slots = max(1, workers)
        self.places = places(self.slots, threads, usable_cores() if pin else (), gpus)
        self.fast_matmul = fast_matmul
        self._pool: ProcessPoolExecutor | None = None
        self._queue: Any = None

    def stop(self, kill: bool) -> None:
        if self._pool is None:
            return
        if kill:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=not kill, cancel_futures=True)
        self._pool = None

    def _started_pool(self) -> ProcessPoolExecutor:
        if self._pool is not None and not all(p.is_alive() for p in (self._pool._processes or {}).values()):
            self._pool = None  # a worker was killed while none of them had anything to do: nothing is lost
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._queue = context.Queue()
            free = context.Queue()
            for place in self.places:
                free.put(place)
            arguments = (self._queue, free, self.threads, self.fast_matmul, lock_for_workers(self.store.root))
            self._pool = ProcessPoolExecutor(self.slots, context, _start_worker, arguments)
        return self._pool

    def work(self, stage: str, units: Sequence[Unit], view: View, finish: Callable[[Unit, Ended], None]) -> None:
        if self.slots == 1 or len(units) == 1:
            prepare_process(self.threads, self.fast_matmul)
            for unit in units:
                finish(unit, run_unit(unit, stage, str(self.store.root), view.update))
        else:
            self._work_in_pool(stage, units, view, finish)

    def _work_in_pool(self, stage: str, units: Sequence[Unit], view: View, finish: Callable[[Unit, Ended], None]) -> None:
        pool = self._started_pool()
        ended: queue.SimpleQueue[Future[Ended]] = queue.SimpleQueue()
        waiting: dict[Future[Ended], Unit] = {}
        with _blocked(STARTING):  # inherited by the workers that it starts
            for unit in units:
                try:
                    future = pool.submit(_run, unit, stage, str(self.store.root))
                except BrokenProcessPool:
                    self._lose(unit, finish)
                    continue
                waiting[future] = unit
                future.add_done_callback(ended.put)
        while waiting:
            try:
                future = ended.get(timeout=0.25)
            except queue.Empty:
                future = None
            while True:
                try:
                    view.update(*self._queue.get_nowait())
                except queue.Empty:
                    break
            if future is None:
                continue
            unit = waiting.pop(future)
            try:
                finish(unit, future.result())
            except BrokenProcessPool:
                self._lose(unit, finish)

    def _lose(self, unit: Unit, finish: Callable[[Unit, Ended], None]) -> None:
        self._pool = None
        finish(unit, lost(unit, "its process was killed (out of memory?)"))
