"""`glottoscope plan`: the cost of a study, printed before anything runs, and warnings where it cannot fit."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from glottoscope.errors import InputError
from glottoscope.study.calibration import cached, calibrate, device_of, rates_of
from glottoscope.study.config import CheckpointModel, PretrainModel, Study
from glottoscope.study.plan import (
    BYTES,
    PROCESS,
    Cost,
    ModelRun,
    describe_memory,
    describe_time,
    layer_groups,
    lm_memory,
    summary,
    train_memory,
)
from glottoscope.study.rates import EFFICIENCY, Rates
from glottoscope.study.times import TIMED, Units, makespan, times, total


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_flops(seconds: float = 0.4) -> float:
    """FLOP/s of a float32 matrix product on this CPU, measured for a moment."""
    a = np.ones((512, 1024), np.float32)
    b = np.ones((1024, 2048), np.float32)
    np.matmul(a, b)
    n, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        np.matmul(a, b)
        n += 1
    return 2.0 * 512 * 1024 * 2048 * n / spent


def one_layer(study: Study, run: ModelRun) -> int:
    """Peak bytes when compute.memory_gb leaves room for one layer at a time."""
    assert run.shape is not None
    return train_memory(study, run.shape, 1)


def workers_of(study: Study, workers: int | None) -> int:
    """Local processes of a run, as far as it can be told without torch."""
    if workers is not None:
        return workers
    return max(1, (os.cpu_count() or 1) // study.compute.threads) if device_of(study) == "cpu" else 1


class Forecast(NamedTuple):
    """What a study amounts to on this machine."""

    rows: list[tuple[ModelRun, Cost | None]]
    units: list[Units]
    rates: Rates
    workers: int
    states: int = 0  # bytes on the disk of the trainings at work, at most; gone when they are done

    @property
    def peak(self) -> int:
        """Bytes of the largest process."""
        return max((cost.memory for _, cost in self.rows if cost is not None), default=0)

    @property
    def disk(self) -> int:
        """Bytes of the run directory at its largest."""
        return sum(cost.disk for _, cost in self.rows if cost is not None) + self.states

    @property
    def seconds(self) -> float:
        return total(self.units, self.workers)


def forecast(study: Study, rates: Rates, workers: int) -> Forecast:
    """The cost of every model and the time of every stage.

    Raises:
        InputError: not even one layer fits compute.memory_gb; what `expand` raises.
    """
    memory = study.compute.memory_gb * 2**30 if study.compute.memory_gb is not None else float("inf")
    rows = summary(study, memory)
    runs = [run for run, _ in rows]
    return Forecast(rows, times(study, runs, rates, memory, workers), rates, workers, states_disk(study, runs, memory, workers))


STATES_KEPT = 2  # of a training; one of them is replaced at a time
PER_WEIGHT = 3  # itself and Adam's two moments


def states_disk(study: Study, runs: Sequence[ModelRun], memory: float, workers: int) -> int:
    """Bytes that the states of trainings take at most: those of the largest units of a stage that are at work at once."""
    if not study.compute.checkpoint_minutes:
        return 0
    models: list[int] = []
    choosing: list[int] = []
    chosen: list[int] = []
    for run in runs:
        if run.shape is None or run.layers is None:
            continue
        if isinstance(run.spec, PretrainModel) and run.lm == run.name:
            models.append(run.shape.n_params)
        n, d = study.sae.n_features(run.shape.d_model), run.shape.d_model
        cells, sae = len(run.checkpoints), (2 * n * d + n + d) * len(study.sae.seeds)
        choosers = cells if study.sae.lr_choice != "final" else int(run.control != "frozen_decoder")
        # Where groups are fewer than workers they are split, into parts that are no more together.
        for group in layer_groups(run.layers, d, lm_memory(study, run.shape, len(run.layers)), study.sae, memory):
            choosing += [sae * len(group) * len(study.sae.lr)] * choosers
            chosen += [sae * len(group)] * (cells - choosers)
    largest = max(sum(sorted(wave, reverse=True)[:workers]) for wave in (models, choosing, chosen))
    return STATES_KEPT * PER_WEIGHT * BYTES * largest


def known_rates(study: Study, workers: int) -> Rates | None:
    """Rates that an earlier calibration of this machine left; None where there was none."""
    return rates_of(cached(study, workers), 1e11, study)


def print_plan(
    study: Study, device_flops: float | None, console: Console, *, workers: int | None = None, calibrated: bool = False,
    out: Path | None = None,
) -> None:  # fmt: skip
    """Print what every model costs, what every stage takes, and what cannot fit.

    Args:
        device_flops: FLOP/s as stated; None: an earlier calibration's speed, else a short measurement of this CPU.
        calibrated: calibrate first (up to half a minute).
        out: run directory whose disk is looked at.
    """
    count = workers_of(study, workers)
    if calibrated:
        with console.status("calibrating: about half a minute"):
            calibrate(study, count)
    if device_flops is not None:
        rates = Rates(device_flops)
    else:
        rates = known_rates(study, count) or Rates(cpu_flops(), words="measured on this CPU for a moment")
    found = forecast(study, rates, count)
    console.print(_models(study, found))
    console.print(_stages(found))
    _explain(study, found, console)
    for line in warnings(study, found, out):
        console.print(line, style="yellow", markup=False)


def _models(study: Study, found: Forecast) -> Table:
    table = Table(title=f"{study.study.name}: k = {study.sae.k}, {study.sae.n_steps:,} SAE steps of "
                  f"{study.sae.batch_tokens:,} tokens", title_justify="left")  # fmt: skip
    for name in ("model", "control", "cells", "layers", "setups", "groups", "SAE n", "memory", "one layer", "disk", "FLOPs LM",
                 "FLOPs SAE", "a cell", "time"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "control") else "right")
    costs = [cost for _, cost in found.rows if cost is not None]
    for run, cost in found.rows:
        if cost is None:
            table.add_row(run.name, run.control, str(len(run.checkpoints)), *["?"] * 3, *[""] * 7, "size unknown")
            continue
        own = [u for u in found.units if u.model == run.name]
        cells = sum(u.count * u.seconds for u in own if u.stage in ("train", "features", "score")) / cost.cells
        n = study.sae.n_features(run.shape.d_model) if run.shape else 0
        table.add_row(
            run.name, run.control, str(cost.cells), str(len(run.known_layers())), f"{cost.setups:,}", str(cost.groups), f"{n:,}",
            describe_memory(cost.memory), describe_memory(one_layer(study, run)), describe_memory(cost.disk),
            f"{cost.lm_flops:.1e}", f"{cost.sae_flops:.1e}", describe_time(cells), describe_time(total(own, found.workers)),
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "total", "", f"{sum(c.cells for c in costs):,}", "", f"{sum(c.setups for c in costs):,}", "", "",
        describe_memory(found.peak), "", describe_memory(found.disk), f"{sum(c.lm_flops for c in costs):.1e}",
        f"{sum(c.sae_flops for c in costs):.1e}", "", describe_time(found.seconds),
    )  # fmt: skip
    return table


def _stages(found: Forecast) -> Table:
    table = Table(title=f"by stage, {found.workers} worker(s)", title_justify="left")
    for name in ("stage", "units", "longest unit", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in TIMED:
        if own := [u for u in found.units if u.stage == stage]:
            longest = describe_time(max(u.seconds for u in own))
            table.add_row(stage, f"{sum(u.count for u in own):,}", longest, describe_time(makespan(own, found.workers)))
    return table


def _explain(study: Study, found: Forecast, console: Console) -> None:
    if found.rates.is_measured:
        console.print("Time: from a calibration of this machine with the code that will run; free cores are taken for granted.")
    else:
        console.print(
            f"Time: at {found.rates.flops:.2e} FLOP/s ({found.rates.words}) and {EFFICIENCY:.0%} of it; a rough figure, within a "
            "factor of 2 or 3. `--calibrate` measures instead (half a minute)."
        )
    if study.compute.memory_gb is None:
        console.print(
            "Memory: peak of one process with all layers of a cell at once; with compute.memory_gb, layers go in groups that fit."
        )
    else:
        console.print("Memory: peak of one process; groups: language model passes of a cell, as many as compute.memory_gb needs.")
    if found.states:
        console.print(f"Disk: what stays; the total has {describe_memory(found.states)} more, for the states of trainings at work "
                      "(compute.checkpoint_minutes), which are gone when these are done.")  # fmt: skip


def warnings(study: Study, found: Forecast, out: Path | None) -> list[str]:
    """What cannot fit: memory of all processes, the accelerator's, and the disk of the run directory."""
    lines, have = [], machine_memory()
    known = [run for run, cost in found.rows if cost is not None]
    least = max((one_layer(study, run) for run in known), default=0)
    if least > have:
        lines.append(f"This machine has {describe_memory(have)} and one layer needs {describe_memory(least)}: lower sae.n or "
                     "sae.buffer_tokens, or take a larger machine.")  # fmt: skip
    elif found.peak > have and study.compute.memory_gb is None:
        lines.append(f"This machine has {describe_memory(have)}: set compute.memory_gb, and layers are trained in groups.")
    elif found.peak * found.workers > have:
        lines.append(f"{found.workers} workers need up to {describe_memory(found.peak * found.workers)} and this machine has "
                     f"{describe_memory(have)}: fewer --workers, or a lower compute.memory_gb.")  # fmt: skip
    if device_of(study) == "cuda" and (free := _gpu_memory()) is not None and least - PROCESS > free:
        lines.append(f"The GPU has {describe_memory(free)} free and one layer needs {describe_memory(least - PROCESS)}.")
    place = out or Path()
    while not place.exists():
        place = place.parent
    free, need = shutil.disk_usage(place).free, found.disk + downloads(study, known)
    if need > free:
        lines.append(f"The run directory grows to about {describe_memory(need)} and {place} has {describe_memory(free)} free: "
                     "choose another --out.")  # fmt: skip
    lines += _too_large(study, known)
    if any(cost is None for _, cost in found.rows):
        lines.append("Give [[models.shape]] of models whose size is unknown, or their weights, to see their cost.")
    return lines


def _hub_bytes(study: Study, run: ModelRun) -> int:
    """Bytes of one checkpoint of a hub, half precision assumed; 0 for others."""
    from_hub = isinstance(run.spec, CheckpointModel) and run.spec.hub_id is not None and run.shape is not None
    return run.shape.n_params * BYTES // 2 if from_hub and run.shape is not None else 0


def downloads(study: Study, runs: Sequence[ModelRun]) -> int:
    """Bytes that hub checkpoints take at the most."""
    sizes = [_hub_bytes(study, run) for run in runs]
    if study.compute.remove_downloads:
        return max(sizes, default=0)
    return sum(size * len(run.checkpoints) for size, run in zip(sizes, runs, strict=True))


def _too_large(study: Study, runs: Sequence[ModelRun]) -> list[str]:
    budget = study.compute.disk_gb
    if budget is None:
        return []
    if large := [run.name for run in runs if _hub_bytes(study, run) > budget * 1e9]:
        return [f"A checkpoint of {', '.join(large)} does not fit compute.disk_gb = {budget:g}: its cells will fail."]
    if not study.compute.remove_downloads and downloads(study, runs) > budget * 1e9:
        return [f"The checkpoints do not fit compute.disk_gb = {budget:g} together: set compute.remove_downloads = true."]
    return []


def _gpu_memory() -> int | None:
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def announce(study: Study, out: Path, workers: int | None, console: Console) -> None:
    """The first lines of a run: how long it will take where this machine was calibrated, and what cannot fit."""
    count = workers_of(study, workers)
    rates = known_rates(study, count)
    try:
        found = forecast(study, rates or Rates(1e11), count)
    except InputError:
        return  # said by the run itself
    if rates is not None and found.units:
        console.print(f"planned: {describe_time(found.seconds)} from nothing with {count} worker(s), "
                      f"{describe_memory(found.peak)} a process, {describe_memory(found.disk)} on disk")  # fmt: skip
    for line in warnings(study, found, out):
        if "whose size is unknown" not in line:
            console.print(line, style="yellow", markup=False)
