"""How a stage gets on, for people: one live view in a terminal, lines with time stamps in a batch system's log."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from glottoscope.study.heartbeats import SILENT_S, Sign, pace
from glottoscope.study.plan import describe_time

if TYPE_CHECKING:
    from glottoscope.study.engine import Failure, Unit

LINE_S = 30.0  # in a log: at most one line per unit at work in this time


class View(ABC):
    """What is told of the units of one stage while they run. A context manager."""

    def __init__(self, stage: str, units: Sequence[Unit]) -> None:
        self.stage = stage
        self.units = {u.name: u for u in units}
        self.finished = 0
        self._ended: set[str] = set()

    def __enter__(self) -> View:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def update(self, unit: str, done: float, total: float, words: str) -> None:
        if unit in self.units and unit not in self._ended:  # else a late message of a finished unit
            self.show(unit, done, total, words)

    def finish(self, unit: Unit, failure: Failure | None, seconds: float) -> None:
        self.finished += 1
        self._ended.add(unit.name)
        self.show_end(unit, failure, seconds)

    @abstractmethod
    def show(self, unit: str, done: float, total: float, words: str) -> None: ...

    @abstractmethod
    def show_end(self, unit: Unit, failure: Failure | None, seconds: float) -> None: ...


def view_of(console: Console, plain: bool, stage: str, units: Sequence[Unit]) -> View:
    return PlainView(console, stage, units) if plain else LiveView(console, stage, units)


class _Rate(ProgressColumn):
    """Units of work per second, from the unit's own count."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="dim")


class LiveView(View):
    """The stage's own bar, and one line below it for each unit at work."""

    def __init__(self, console: Console, stage: str, units: Sequence[Unit]) -> None:
        super().__init__(stage, units)
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"), _Rate(), TimeRemainingColumn(), TextColumn("{task.fields[words]}"),
            console=console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self.total = self.progress.add_task(f"[bold]{stage}", total=sum(u.weight for u in units), words=f"0 of {len(units)}")
        self.tasks: dict[str, Any] = {}
        self.shares: dict[str, float] = {}
        self.completed = 0.0  # weight of the units that ended

    def __enter__(self) -> View:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def show(self, unit: str, done: float, total: float, words: str) -> None:
        if unit not in self.tasks:
            self.tasks[unit] = self.progress.add_task(f"  {escape(unit)}", total=total, words=words)
        self.progress.update(self.tasks[unit], completed=done, total=total, words=words)
        self.shares[unit] = min(done / total, 0.999) if total else 0.0
        self._show_stage()

    def show_end(self, unit: Unit, failure: Failure | None, seconds: float) -> None:
        self.shares.pop(unit.name, None)
        self.completed += unit.weight
        if unit.name in self.tasks:
            self.progress.remove_task(self.tasks.pop(unit.name))
        self._show_stage()

    def _show_stage(self) -> None:
        completed = self.completed + sum(self.units[u].weight * s for u, s in self.shares.items())
        self.progress.update(self.total, completed=completed, words=f"{self.finished} of {len(self.units)}")


class PlainView(View):
    """A line for every finished unit, and now and then one for each unit at work."""

    def __init__(self, console: Console, stage: str, units: Sequence[Unit]) -> None:
        super().__init__(stage, units)
        self.console = console
        self._first: dict[str, tuple[float, float]] = {}  # unit -> time and count of its first message
        self._said: dict[str, float] = {}

    def show(self, unit: str, done: float, total: float, words: str) -> None:
        now = time.monotonic()
        started, first = self._first.setdefault(unit, (now, done))
        if now - self._said.setdefault(unit, now) < LINE_S:
            return
        self._said[unit] = now
        self._say(unit, progress_words(done, total, pace(done - first, now - started), words))

    def show_end(self, unit: Unit, failure: Failure | None, seconds: float) -> None:
        what = f"done in {describe_time(seconds)}" if failure is None else f"failed: {failure.message}"
        self._say(unit.name, f"{what} ({self.finished} of {len(self.units)})")

    def _say(self, unit: str, words: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.console.print(f"{stamp} {self.stage} {unit}: {words}", markup=False, highlight=False)


def progress_words(done: float, total: float, rate: float, words: str) -> str:
    """ "40 %, 12.5/s, 3 min left, loss 0.1" """
    share = f"{100 * min(done / total, 1):.0f} %" if total else ""
    left = f"{describe_time((total - done) / rate)} left" if rate > 0 and total > done else ""
    return ", ".join(x for x in (share, f"{rate:,.1f}/s" if rate else "", left, words) if x)


def print_signs(found: Iterable[Sign], console: Console) -> None:
    """The units at work, as `status` shows them."""
    table = Table("at work", "stage", "on", "how far", title_justify="left")
    for sign in found:
        words = progress_words(sign.done, sign.total, sign.rate, sign.words)
        # By this machine's clock and the unit's own: to the minute, clocks agree.
        silent = time.time() - sign.now
        if silent > SILENT_S:
            words += f"; [red]no sign of life for {describe_time(silent)}[/red]: its process is dead or does not answer"
        table.add_row(escape(sign.unit), sign.stage, f"{escape(sign.host)}, process {sign.pid}", words)
    if table.row_count:
        console.print(table)
