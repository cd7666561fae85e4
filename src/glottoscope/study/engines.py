"""Which engine a run uses, how many units it does at once, and how much memory each may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console

from glottoscope.errors import InputError
from glottoscope.study.config import STAGES, Study
from glottoscope.study.engine import Engine
from glottoscope.study.local import LocalEngine
from glottoscope.study.machine import room_for, stated_room, visible_gpus, workers_of
from glottoscope.study.plan import Room
from glottoscope.study.store import RunStore

if TYPE_CHECKING:
    from glottoscope.study.stages.context import Context

ENGINES = ("local", "ray")


class Machines(NamedTuple):
    """Where the units of a run work, and how it tells of them. None of it changes a number."""

    engine: Literal["local", "ray"] = "local"
    address: str | None = None  # ray: of a cluster that is there, or "auto"; None: one is started on this machine
    pin: bool = True  # local: cores of its own for every worker
    plain: bool = False  # lines with time stamps instead of a live view

    def checked(self) -> Machines:
        """Itself. Raises InputError where its parts do not go together."""
        if self.engine not in ENGINES:
            raise InputError(f"--engine {self.engine}: unknown engine; choose one of {', '.join(ENGINES)}")
        if self.address is not None and self.engine != "ray":
            raise InputError(f"--address {self.address} is a Ray cluster's: add --engine ray")
        return self


LOCAL = Machines()


def open_engine(study: Study, store: RunStore, console: Console, workers: int | None, machines: Machines) -> Engine:
    """The engine of a run, as a context manager.

    Args:
        workers: units at once. Default: as many as the machine, or the cluster, has room for.

    Raises:
        InputError: it cannot be had; says why.
    """
    machines.checked()
    from glottoscope.lm.checkpoints import choose_device

    compute = study.compute
    device = choose_device(compute.device)
    if machines.engine == "ray":
        from glottoscope.study.ray_engine import RayEngine

        # All units on one kind of device, the driver's: numbers differ between kinds.
        gpus = compute.gpus_per_unit if device == "cuda" else 0.0
        return RayEngine(
            store, compute.threads, console, device=device, gpus=gpus, fast_matmul=device == "cpu", address=machines.address,
            workers=workers, plain=machines.plain,
        )  # fmt: skip
    return LocalEngine(
        store, workers_of(study, workers), compute.threads, console, fast_matmul=device == "cpu",
        gpus=visible_gpus() if device == "cuda" else (), pin=machines.pin, plain=machines.plain,
    )  # fmt: skip


def room_of(engine: Engine, study: Study) -> Room:
    """What one unit may use where this engine runs it: layers are trained in groups that fit."""
    found = engine.memory_per_unit()
    if study.compute.memory_gb is not None or found is None:
        return room_for(study, engine.slots)
    return found


def room_before(study: Study, workers: int, machines: Machines) -> Room:
    """The same before any engine is there: what the nodes of a cluster have only they know."""
    return room_for(study, workers) if machines.engine == "local" else stated_room(study)


def check_room(context: Context, room: Room, until: str) -> None:
    """Find what cannot be trained before anything is.

    Raises:
        InputError: not even one layer of a model fits.
    """
    if STAGES.index(until) < STAGES.index("train"):
        return
    for run in context.runs:
        if run.shape is not None:
            context.groups(run, room)
