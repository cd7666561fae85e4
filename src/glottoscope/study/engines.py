"""Which engine a run uses, how many units it does at once, and how much memory each may take."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from rich.console import Console

from glottoscope.errors import InputError
from glottoscope.study.config import Study
from glottoscope.study.engine import Engine, usable_cores
from glottoscope.study.local import LocalEngine, visible_gpus
from glottoscope.study.plan import PROCESS
from glottoscope.study.store import RunStore

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
        store, workers or default_workers(study), compute.threads, console, fast_matmul=device == "cpu",
        gpus=visible_gpus() if device == "cuda" else (), pin=machines.pin, plain=machines.plain,
    )  # fmt: skip


def default_workers(study: Study) -> int:
    """Local processes: cores / threads; with accelerators one for each, which several would have to share."""
    from glottoscope.lm.checkpoints import choose_device

    device = choose_device(study.compute.device)
    if device == "cuda":
        return max(1, len(visible_gpus()))
    if device != "cpu":
        return 1
    return max(1, len(usable_cores()) // study.compute.threads)


def memory_of(engine: Engine, study: Study) -> float:
    """Bytes one unit may use where this engine runs it: layers are trained in groups that fit."""
    found = engine.memory_per_unit()
    if study.compute.memory_gb is not None or found is None:
        return memory_budget(study, engine.slots)
    return found


def memory_budget(study: Study, workers: int) -> float:
    """Bytes one process of this machine may use: compute.memory_gb, or four fifths of the memory (of a CUDA device: what is
    free there) divided by the processes that share it."""
    if study.compute.memory_gb is not None:
        return study.compute.memory_gb * 2**30
    import torch

    from glottoscope.lm.checkpoints import choose_device

    if choose_device(study.compute.device) == "cuda":
        sharing = -(-workers // max(1, torch.cuda.device_count()))
        # The plan counts the process's libraries, which lie in the host's memory.
        return 0.8 * torch.cuda.mem_get_info()[0] / sharing + PROCESS
    return 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / workers
