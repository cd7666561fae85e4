"""`--dry-run`: what a command would do in a run directory, from its records alone. Writes nothing, not even a lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from glottoscope.errors import InputError
from glottoscope.study.config import STAGES, InterventionConfig, Study
from glottoscope.study.engine import Unit
from glottoscope.study.engines import LOCAL, Machines, check_room, room_before
from glottoscope.study.machine import workers_of
from glottoscope.study.plan import cells_of, describe_memory, expand
from glottoscope.study.planning import forecast
from glottoscope.study.rates import Rates
from glottoscope.study.runner import preflight, stages
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene import units as intervening
from glottoscope.study.stages.intervene.experiments import STUDY_NAME, experiments
from glottoscope.study.store import RunStore

SHOWN = 3  # names of a stage's units
LATER = "known when the stages before are done"


def dry_run(
    study: Study, out: Path, *, until: str = "report", workers: int | None = None, console: Console, machines: Machines = LOCAL
) -> int:
    """Print the units that `run_study` would do, by stage; returns how many are known.

    Raises:
        InputError: bad input that the run itself would end with.
    """
    preflight(study)
    store = RunStore(out)
    store.check_owner(study)
    count, words = _workers(study, workers, machines)
    context = Context(study, store)
    room = room_before(study, count, machines)
    check_room(context, room, until)
    table = _table(f"{study.study.name} -> {out}, {words}")
    found: dict[str, list[Unit] | None] = {}
    for stage, units in stages(context, room, count):
        if STAGES.index(stage) > STAGES.index(until):
            break
        before = found.get(stage, [])
        more = _ask(units)
        found[stage] = None if before is None or more is None else [*before, *more]
    for stage, units in found.items():
        _row(table, stage, units)
    console.print(table)
    cells = {(c.model.name, c.checkpoint.step) for c in cells_of(context.runs)}
    console.print(f"{len(cells)} cells; it would write to {out.absolute()}" + ("" if out.exists() else ", which it would make"))
    if store.root.is_dir() and (left := store.leftovers()):
        console.print(f"{len(left)} temporary file(s) of a process that was stopped would be removed")
    _explain_cluster(study, machines, console)
    console.print("nothing was changed")
    return sum(len(u or ()) for u in found.values())


def _workers(study: Study, workers: int | None, machines: Machines) -> tuple[int, str]:
    """Units at once as far as they are known before there is an engine, and how they are called."""
    if machines.engine == "local":
        count = workers_of(study, workers)
        return count, f"{count} worker(s)"
    return workers or 1, f"--engine {machines.engine}" + (f", at most {workers} unit(s) at once" if workers else "")


def _explain_cluster(study: Study, machines: Machines, console: Console) -> None:
    if machines.engine == "local":
        return
    console.print("the nodes decide how many units are at work at once" + (
        ", and how the layers of a cell are grouped: here they are one unit" if study.compute.memory_gb is None else ""
    ))  # fmt: skip


def dry_scaled(study: Study, out: Path, *, until: str, workers: int | None, console: Console, machines: Machines = LOCAL) -> None:
    """The same for a small study whose text and models are not written yet: numbers from its plan.

    Raises:
        InputError: the run directory belongs to another study.
    """
    RunStore(out).check_owner(study)
    count, words = _workers(study, workers, machines)
    found = forecast(study, Rates(1e11), count, room_before(study, count, machines))
    checkpoints = sum(len(run.checkpoints) for run in expand(study) if run.name == run.lm)
    size = sum(2 * run.shape.n_params * len(run.checkpoints) for run in expand(study) if run.shape and run.name == run.lm)
    console.print(
        f"it would write {checkpoints} random checkpoints ({describe_memory(size)}) and text to {RunStore(out).scaled_dir}"
    )
    table = _table(f"{study.study.name} -> {out}, {words}")
    for stage in dict.fromkeys(u.stage for u in found.units):
        if STAGES.index(stage) <= STAGES.index(until):
            table.add_row(stage, f"{sum(u.count for u in found.units if u.stage == stage):,}", "as planned")
    console.print(table)
    _explain_cluster(study, machines, console)
    console.print("nothing was changed")


def dry_intervene(root: Path, config: InterventionConfig, name: str, console: Console) -> int:
    """Print the experiments that `intervene` would make; returns how many units are known.

    Raises:
        InputError: as the command itself.
    """
    store = RunStore(root)
    store.manifest()
    if name == STUDY_NAME:
        raise InputError(f"--name {name}: that is the name of the study file's own interventions; choose another")
    context = Context.open(root)
    store.table("features")  # says what to do where the study is not complete
    wanted = experiments(context, config, name)
    table = _table(f"{len(wanted)} experiment(s) in {root}")
    prepared = intervening.prepare_units(context, wanted)
    measured = _ask(lambda: intervening.measure_units(context, wanted))
    _row(table, "plan", prepared)
    _row(table, "measure", None if prepared else measured)
    _row(table, "effects", _ask(lambda: intervening.effect_units(context, wanted)))
    console.print(table)
    for experiment in wanted:
        console.print(f"  {experiment.title}: would write to {experiment.folder(context)}", markup=False)
    console.print("tables and report would be made again; nothing was changed")
    return len(prepared) + len(measured or ())


def _ask(units: Callable[[], Sequence[Unit]]) -> list[Unit] | None:
    """The missing units; None where only earlier stages can tell."""
    try:
        return list(units())
    except (InputError, FileNotFoundError):
        return None


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("stage", "units", "which"):
        table.add_column(name, justify="right" if name == "units" else "left")
    return table


def _row(table: Table, stage: str, units: Sequence[Unit] | None) -> None:
    if units is None:
        table.add_row(stage, "?", LATER)
    elif not units:
        table.add_row(stage, "0", "up to date")
    else:
        names = ", ".join(u.name for u in units[:SHOWN]) + (" ..." if len(units) > SHOWN else "")
        table.add_row(stage, f"{len(units):,}", names)
