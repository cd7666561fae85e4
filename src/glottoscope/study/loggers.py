"""TensorBoard and Weights & Biases, told of the metrics of a run as its study file wishes.

Each in a process of its own (`python -m glottoscope.study.loggers NAME RUN`, which `telling` starts): they wait for networks,
ask for passwords, and do things at the end of a process that a run must not wait for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar

from glottoscope.study.config import Study, WandbConfig
from glottoscope.study.following import Logger, Tail, follow
from glottoscope.study.metrics import SERIES, Point, is_last
from glottoscope.study.store import RunStore

END_S = 10.0  # a run that is over waits this long for all its loggers together
SHOWN = ("loss", "l0", "lr", "grad_norm", "tokens_per_second")  # and loss_LANGUAGE


def values_of(point: Point) -> dict[str, float]:
    """The measures of a point."""
    return {k: float(v) for k, v in point.items() if (k in SHOWN or k.startswith("loss_")) and isinstance(v, int | float)}


def setup_of(point: Point) -> str:
    """ "layer_01 seed_0 lr_0.001"; "" for a language model: what tells the trainings of one unit apart."""
    if point.get("layer") is None:
        return ""
    return f"layer_{point['layer']:02d} seed_{point['sae_seed']} lr_{point['grid_lr']:g}"


class UnitLogger(ABC):
    """A logger that keeps something open for each unit at work, and begins anew where a unit did."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Any, Any]] = {}  # unit -> attempt, what is open
        self._ended: set[str] = set()

    def log(self, points: list[Point]) -> None:
        there = {p["unit"] for p in points}
        for unit in self._ended - there:  # its last points were in an earlier look
            self._close(unit)
        for (unit, attempt, _), group in groupby(points, key=lambda p: (p["unit"], p.get("attempt"), p["step"])):
            same = list(group)
            if unit in self._open and self._open[unit][0] != attempt:
                self._close(unit)
            if unit not in self._open:
                self._open[unit] = attempt, self.open(same[0])
            self.write(self._open[unit][1], same)
        self._ended |= {p["unit"] for p in points if is_last(p)}

    def close(self) -> None:
        for unit in list(self._open):
            self._close(unit)

    def _close(self, unit: str) -> None:
        self._ended.discard(unit)
        self.shut(self._open.pop(unit)[1])

    @abstractmethod
    def open(self, first: Point) -> Any:
        """Something to write the points of a unit to."""

    @abstractmethod
    def write(self, opened: Any, points: Sequence[Point]) -> None:
        """Points of one step of a unit."""

    @abstractmethod
    def shut(self, opened: Any) -> None:
        """No more points of the unit come."""


class TensorBoardLogger(UnitLogger):
    """A folder of event files for each unit; in one chart, the same training at all checkpoints."""

    name: ClassVar = "tensorboard"

    def __init__(self, study: Study, store: RunStore) -> None:
        super().__init__()
        self._store = store
        # torch asks whether the package is there; it needs no TensorFlow.
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def open(self, first: Point) -> Any:
        folder = self._store.logger_dir(self.name) / self._store.metrics_path(first["unit"]).stem
        # Of a unit that began anew, points beyond its state come again: those of before are not shown.
        return self._writer(str(folder), purge_step=first["step"] if folder.exists() else None)

    def write(self, opened: Any, points: Sequence[Point]) -> None:
        for point in points:
            setup = setup_of(point) or "language model"
            for name, value in values_of(point).items():
                opened.add_scalar(f"{name}/{setup}", value, point["step"], walltime=point.get("time"))
        opened.flush()

    def shut(self, opened: Any) -> None:
        opened.close()


class WandbLogger(UnitLogger):
    """A run of Weights & Biases for each unit, grouped by study."""

    name: ClassVar = "wandb"

    def __init__(self, study: Study, store: RunStore) -> None:
        super().__init__()
        assert study.logging is not None
        assert study.logging.wandb is not None
        self._config: WandbConfig = study.logging.wandb
        self._group = self._config.group or study.study.name
        self._study, self._folder = study.identity(), store.logger_dir(self.name)
        self._wandb = importlib.import_module("wandb")
        if not hasattr(self._wandb, "init"):  # a folder of that name, as it leaves them
            raise ImportError("No module named 'wandb'")
        self._mode = self._config.mode or os.environ.get("WANDB_MODE") or "online"

    def open(self, first: Point) -> Any:
        self._folder.mkdir(parents=True, exist_ok=True)
        about = {k: first[k] for k in SERIES[:4] if first.get(k) is not None}
        run = self._wandb.init(
            project=self._config.project, entity=self._config.entity, group=self._group, tags=list(self._config.tags),
            name=first["unit"], job_type=first.get("stage"), mode=self._mode, dir=str(self._folder.parent), reinit="create_new",
            config={**about, "study": self._study}, settings=self._settings(),
        )  # fmt: skip
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def _settings(self) -> Any:
        # Numbers only: no output of the console, nothing of the machine or of the folder that the run was started in.
        return self._wandb.Settings(
            silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True, save_code=False,
            x_disable_meta=True,
        )  # fmt: skip

    def write(self, opened: Any, points: Sequence[Point]) -> None:
        values: dict[str, float] = {"step": points[0]["step"]}
        for point in points:
            setup = setup_of(point).replace(" ", "/")
            values |= {f"{setup}/{k}" if setup else k: v for k, v in values_of(point).items()}
        opened.log(values)

    def shut(self, opened: Any) -> None:
        opened.finish()


LOGGERS: dict[str, Callable[[Study, RunStore], Logger]] = {
    TensorBoardLogger.name: TensorBoardLogger,
    WandbLogger.name: WandbLogger,
}


def main(name: str, root: str) -> int:
    """Tell one logger of the metrics of a run, as a process of its own: until standard input ends, and for a while after.

    What went wrong is the only line on standard output.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver answers them, and then closes our input
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for number in (1, 2):  # what libraries say there is not for people; and their own processes do not keep our output open
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    ending = threading.Event()

    def wait_for_end() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        ending.set()
        time.sleep(1.5 * END_S)  # the driver kills sooner, unless it was killed itself
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        store = RunStore(root)
        follow(LOGGERS[name](store.study(), store), Tail(store.metrics_dir, store.logger_dir(name) / "sent.json"), ending)
    except ImportError as error:
        print(f"it needs a package: pip install 'glottoscope[{name}]' ({error})", file=output, flush=True)
        return 1
    except BaseException as error:  # libraries end a process with SystemExit, too: here it would end without a word
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
        print(f"{type(error).__name__}: {line}" if line else type(error).__name__, file=output, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    # Without the clean-up that libraries have asked for at the end of a process: it may wait for a network.
    os._exit(main(*sys.argv[1:]))
