"""Starts the loggers that a study file asks for, and ends them with the run: they can neither stop, nor fail, nor delay it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

import glottoscope
from glottoscope.study.config import Study
from glottoscope.study.loggers import END_S, TensorBoardLogger, WandbLogger
from glottoscope.study.store import RunStore


def wanted(study: Study) -> list[str]:
    """Names of the loggers that the study file asks for."""
    if study.logging is None:
        return []
    asked = {TensorBoardLogger.name: study.logging.tensorboard, WandbLogger.name: study.logging.wandb is not None}
    return [name for name, is_wanted in asked.items() if is_wanted]


class Teller:
    """The process of one logger, and a thread that passes on the one line it may say."""

    def __init__(self, name: str, store: RunStore, warn: Callable[[str], None]) -> None:
        self._warn, self._once = warn, threading.Lock()
        # The same program, wherever this one was found, and no folder "wandb" that happens to lie here.
        places = [str(Path(glottoscope.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "glottoscope.study.loggers", name, str(store.root.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(x for x in places if x)},
        )  # fmt: skip
        self._thread = threading.Thread(target=self._listen, daemon=True, name=f"logger {name}")
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.read().strip()
        if code := self._process.wait():
            self._say(said or f"its process ended with {code}")

    def _say(self, words: str) -> None:
        if self._once.acquire(blocking=False):
            self._warn(words)

    def end(self) -> None:
        """Let it hand over what is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def join(self, seconds: float) -> None:
        """Wait for its end so long, and no longer."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._say(f"it was given up {END_S:g} s after the end of the run")
            self._process.kill()
            self._thread.join(1.0)


@contextlib.contextmanager
def telling(study: Study, store: RunStore, console: Console) -> Iterator[None]:
    """Tell the study's loggers of the metrics for the length of the block."""

    def warn(name: str) -> Callable[[str], None]:
        def say(words: str) -> None:
            console.print(f"logging.{name}: {words}; the run goes on without it", style="yellow", markup=False, highlight=False)

        return say

    tellers = []
    for name in wanted(study):
        try:
            tellers.append(Teller(name, store, warn(name)))
        except OSError as error:
            warn(name)(f"its process could not be started ({error})")
    try:
        yield
    finally:
        limit = time.monotonic() + END_S
        for teller in tellers:
            teller.end()
        for teller in tellers:
            teller.join(limit - time.monotonic())
