"""Going on inside a unit: a long training leaves its state beside its result, and a killed one goes on from there.

Time decides only when a state is written, never a number: a training that was stopped ends with the bytes of one that
was not. States of other settings or other libraries are passed over, damaged ones too.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import glottoscope
from glottoscope.errors import InputError
from glottoscope.study.stages.states import State, load_state, remove_state, states_in, write_state
from glottoscope.study.store import RESUME_FOLDER
from glottoscope.walking import listed

VERSION = 1  # of what states hold; part of every key
LIBRARIES = ("torch", "numpy", "transformers", "numba", "triton")
COST = 0.05  # largest share of the time that is spent on writing states
STOPS = (signal.SIGINT, signal.SIGTERM)


class Training(Protocol):
    """A training between two steps."""

    @property
    def steps(self) -> int:
        """Steps made."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on: the tensors themselves, to read from and to copy into."""
        ...

    def notes(self) -> dict[str, Any]:
        """Everything else, as JSON knows it."""
        ...

    def resume_at(self, steps: int, notes: dict[str, Any]) -> None:
        """Go on after `steps` steps; the tensors are in place."""
        ...


def surroundings(device: torch.device, **more: Any) -> dict[str, Any]:
    """What decides a training's bytes besides its settings: states made with something else are not continued."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "glottoscope": glottoscope.__version__, "versions": versions, "threads": torch.get_num_threads(), "device": device.type,
        "matmul": torch.get_float32_matmul_precision(), **more,
    }  # fmt: skip


class Keeper:
    """Keeps the state of one training: every so often, and once more when the run is stopped.

    As a context manager around the training it makes SIGINT and SIGTERM wait for the end of `held` and `calm` blocks,
    writes a last state, and lets them do what they do.

    Args:
        folder: where its states go; those of other settings there make way for the first one written.
        keys: part of the training -> key of what it is to become.
        minutes: time between two states; more where writing one takes long. 0: none is written.
        elsewhere: folders whose states may hold all parts of this training among others.
        usable: whether the training can go on from a state of so many steps.
        restored: called with the training once it is where it begins, or goes on.
    """

    def __init__(
        self, folder: Path, keys: Mapping[str, str], around: Mapping[str, Any], minutes: float, elsewhere: Sequence[Path] = (),
        *, usable: Callable[[int], bool] = lambda steps: True, restored: Callable[[Any], None] = lambda training: None,
    ) -> None:  # fmt: skip
        self._folder, self._keys, self._around = folder, dict(keys), dict(around)
        self._minutes, self._elsewhere, self._usable, self._restored = minutes, elsewhere, usable, restored
        self._training: Training | None = None
        self._good: list[Path] = []  # states of the folder known to be whole, oldest first
        self._saved_at = -1  # steps of the newest state
        self._next = 0.0
        self._whole, self._holding = True, False
        self._stopped_by: int | None = None
        self._handlers: dict[int, Any] = {}
        self.words = ""  # for the line of progress

    def restore(self, training: Training) -> None:
        """Take over a training, and let it go on from the newest state that is its own, usable and whole, if any."""
        self._training = training
        places = [self._folder, *(p for p in self._elsewhere if p != self._folder)]
        found = [s for place in places for s in states_in(place) if self._is_ours(s) and self._usable(s.steps)]
        for state in sorted(found, key=lambda s: -s.steps):
            if load_state(state, training.tensors()):
                training.resume_at(state.steps, state.notes)
                self._saved_at = state.steps
                self._good = [state.path] if state.path.parent == self._folder else []
                self.words = f", resumed at step {state.steps:,}"
                break
        self._restored(training)

    def _is_ours(self, state: State) -> bool:
        return state.surroundings == self._around and self._keys.items() <= state.keys.items()

    def tick(self) -> None:
        """Between two steps: write a state if it is time."""
        if self._minutes and time.monotonic() >= self._next:
            with self.calm():
                self._write()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A step: in it the training is neither before nor after it, and signals wait."""
        with self.calm():
            self._whole = False
            yield
            self._whole = True

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """Signals wait: for what takes locks of Python's, such as telling of progress, which an exception leaves in disorder."""
        self._holding = True
        yield
        self._holding = False
        if self._stopped_by is not None:
            raise KeyboardInterrupt

    def _write(self) -> None:
        training = self._training
        assert training is not None
        if training.steps == self._saved_at:
            return
        started = time.monotonic()
        # One stays until the new one is whole: never more than two on the disk.
        for path in listed(self._folder, "state_*"):
            if path.with_suffix(".json") not in self._good[-1:]:
                remove_state(path)
        self._good = self._good[-1:]
        try:
            state = write_state(
                self._folder, training.steps, self._keys, self._around, training.notes(), training.tensors()
            )  # fmt: skip
        except InputError:
            # Only of use after a kill: no reason to end a training whose result may well fit.
            self.words = ", no room on the disk for its state"
        else:
            self._good.append(state.path)
            self._saved_at = training.steps
            self.words = ""
        now = time.monotonic()
        self._next = now + max(60 * self._minutes, (now - started) / COST)

    def done(self, missing: Mapping[str, str] = MappingProxyType({})) -> None:
        """The training's result is complete: remove its states, and others that held it and nothing that is `missing`."""
        folders = [p for p in self._elsewhere if newest(p, self._keys) is not None and newest(p, missing) is None]
        for folder in {self._folder, *folders}:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent.name == RESUME_FOLDER:
                with contextlib.suppress(OSError):  # others' states are there
                    folder.parent.rmdir()

    # ---- signals

    def __enter__(self) -> Keeper:
        self._next = time.monotonic() + 60 * self._minutes
        if self._minutes and threading.current_thread() is threading.main_thread():
            for number in STOPS:
                handler = signal.getsignal(number)
                # Workers ignore Ctrl-C, which their driver answers; a handler that is not Python's cannot be put back.
                if handler not in (signal.SIG_IGN, None):
                    self._handlers[number] = handler
                    signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, _frame: Any) -> None:
        if self._stopped_by is None:
            self._stopped_by = number
            if not self._holding:
                raise KeyboardInterrupt
        elif number == signal.SIGINT:  # a second Ctrl-C does not wait; a driver may send SIGTERM twice
            raise KeyboardInterrupt

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if isinstance(error, KeyboardInterrupt) and self._whole and self._minutes and self._training is not None:
                self._write()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            if self._stopped_by is not None:
                signal.raise_signal(self._stopped_by)


class Waiting(NamedTuple):
    """States of a unit that is not done."""

    folder: Path
    unit: str
    steps: int | None  # of the newest; None: no training of the study goes on from them
    is_complete: bool  # whether nothing of what they were for is missing


def newest(folder: Path, wanted: Mapping[str, str]) -> int | None:
    """Steps of the newest state that holds a part of `wanted` (part -> key) as it is to become; None where none does."""
    return next((s.steps for s in states_in(folder) if wanted.items() & s.keys.items()), None)
