"""`glottoscope plan`: the cost of a study, printed before anything runs, and warnings where it cannot fit."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from glottoscope.errors import InputError
from glottoscope.study import machine
from glottoscope.study.calibration import cached, calibrate, kinds_of, rates_of
from glottoscope.study.config import CheckpointModel, PretrainModel, Study
from glottoscope.study.machine import device_of, room_for, visible_gpus, workers_of
from glottoscope.study.plan import (
    BYTES,
    PROCESS,
    Cost,
    ModelRun,
    Room,
    choosing_cells,
    describe_memory,
    describe_time,
    groups_of,
    summary,
    train_memory,
)
from glottoscope.study.rates import EFFICIENCY, Rates
from glottoscope.study.store import RunStore, tree_size
from glottoscope.study.times import TIMED, Units, makespan, times, total, waves


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


class Forecast(NamedTuple):
    """What a study amounts to on this machine."""

    rows: list[tuple[ModelRun, Cost | None]]
    units: list[Units]
    rates: Rates
    workers: int
    room: Room  # of one process
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


def forecast(study: Study, rates: Rates, workers: int, room: Room | None = None) -> Forecast:
    """The cost of every model and the time of every stage.

    Args:
        room: what one process may use. Default: as `workers` local processes have it. Where not even one layer fits, the
            forecast is of one at a time all the same.

    Raises:
        InputError: what `expand` raises.
    """
    room = room or room_for(study, workers)
    wide = room._replace(most=math.inf)
    rows = summary(study, wide)
    runs = [run for run, _ in rows]
    rows = _with_peaks(study, rows, wide, workers)
    return Forecast(rows, times(study, runs, rates, wide, workers), rates, workers, room, states_disk(study, runs, wide, workers))


def _with_peaks(
    study: Study, rows: list[tuple[ModelRun, Cost | None]], room: Room, workers: int
) -> list[tuple[ModelRun, Cost | None]]:
    """Memory of the units that are made: where they are fewer than workers, groups of layers are shared out."""
    peaks: dict[str, int] = {}
    for wave in waves(study, [run for run, _ in rows], room, workers):
        assert wave.run.shape is not None
        most = train_memory(study, wave.run.shape, max(map(len, wave.groups)))
        peaks[wave.run.name] = max(most, peaks.get(wave.run.name, 0))
    return [(run, cost and cost._replace(memory=peaks.get(run.name, cost.memory))) for run, cost in rows]


STATES_KEPT = 2  # of a training; one of them is replaced at a time
PER_WEIGHT = 3  # itself and Adam's two moments


def states_disk(study: Study, runs: Sequence[ModelRun], memory: float | Room, workers: int) -> int:
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
        choosers = choosing_cells(study, run)
        # Where groups are fewer than workers they are split, into parts that are no more together.
        for group in groups_of(study, run, memory):
            choosing += [sae * len(group) * len(study.sae.lr)] * choosers
            chosen += [sae * len(group)] * (cells - choosers)
    largest = max(sum(sorted(wave, reverse=True)[:workers]) for wave in (models, choosing, chosen))
    return STATES_KEPT * PER_WEIGHT * BYTES * largest


def known_rates(study: Study, workers: int) -> Rates | None:
    """Rates that an earlier calibration of this machine left; None where there was none.

    Kinds of work that it left out follow a short measurement of this CPU, which is made only then.
    """
    found = rates_of(cached(study, workers), 1e11, study)
    if found is None or not found.unmeasured(kinds_of(study)):
        return found
    return replace(found, flops=cpu_flops())


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
    known = [(run, cost, study.sae.n_features(run.shape.d_model)) for run, cost in found.rows if run.shape and cost]
    widths = {n for _, _, n in known}
    one_n = f", n = {next(iter(widths)):,}" if len(widths) == 1 else ""
    table = Table(title=f"{study.study.name}: k = {study.sae.k}{one_n}, {study.sae.n_steps:,} SAE steps of "
                  f"{study.sae.batch_tokens:,} tokens", title_justify="left")  # fmt: skip
    # What is the same in all rows takes no column: the table is to fit a terminal of 120.
    shown = ["model", "control", "cells", "layers", "setups", "groups", "SAE n", "memory", "disk", "LM FLOPs", "SAE FLOPs"]
    shown += ["a cell", "time"]
    if all(run.control == "none" for run, _ in found.rows):
        shown.remove("control")
    if len(widths) == 1:
        shown.remove("SAE n")
    for name in shown:
        table.add_column(name.replace(" FLOPs", "\nFLOPs"), justify="left" if name in ("model", "control") else "right")

    def add(values: dict[str, str]) -> None:
        table.add_row(*(values.get(name, "") for name in shown))

    for run, cost in found.rows:
        if cost is None:
            unknown = dict.fromkeys(("layers", "setups", "groups"), "?")
            add({"model": run.name, "control": run.control, "cells": str(len(run.checkpoints)), **unknown, "time": "size unknown"})
    for run, cost, n in known:
        own = [u for u in found.units if u.model == run.name]
        cells = sum(u.count * u.seconds for u in own if u.stage in ("train", "features", "score")) / cost.cells
        add({
            "model": run.name, "control": run.control, "cells": str(cost.cells), "layers": str(len(run.known_layers())),
            "setups": f"{cost.setups:,}", "groups": str(cost.groups), "SAE n": f"{n:,}", "memory": describe_memory(cost.memory),
            "disk": describe_memory(cost.disk), "LM FLOPs": f"{cost.lm_flops:.1e}", "SAE FLOPs": f"{cost.sae_flops:.1e}",
            "a cell": describe_time(cells), "time": describe_time(total(own, found.workers)),
        })  # fmt: skip
    table.add_section()
    costs = [cost for _, cost, _ in known]
    add({
        "model": "total", "cells": f"{sum(c.cells for c in costs):,}", "setups": f"{sum(c.setups for c in costs):,}",
        "memory": describe_memory(found.peak), "disk": describe_memory(found.disk),
        "LM FLOPs": f"{sum(c.lm_flops for c in costs):.1e}", "SAE FLOPs": f"{sum(c.sae_flops for c in costs):.1e}",
        "time": describe_time(found.seconds),
    })  # fmt: skip
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
    rates, room = found.rates, found.room
    guess = f"{rates.flops:.2e} FLOP/s ({rates.words}) and {EFFICIENCY:.0%} of it"
    if not rates.is_measured:
        console.print(
            f"Time: at {guess}; a rough figure, within a factor of 2 or 3. `--calibrate` measures instead (half a minute)."
        )
    else:
        console.print("Time: from a calibration of this machine with the code that will run; free cores are taken for granted.")
        if missing := rates.unmeasured(kinds_of(study)):
            console.print(f"Not measured, since too large for half a minute here: {', '.join(missing)}; "
                          f"at {guess.replace(rates.words, 'measured on this CPU for a moment')}.")  # fmt: skip
    if math.isinf(room.each):
        console.print(f"Memory: of the largest process, with all layers of a cell at once: {room.source}. Set compute.memory_gb to "
                      "what one process may use there, and layers go in groups that fit.")  # fmt: skip
    else:
        console.print(f"Memory: of the largest process. Each may use {describe_memory(room.each)} ({room.source}): the layers of a "
                      "cell go in groups that fit, each with a language model pass of its own.")  # fmt: skip
        if study.compute.memory_gb is None:
            console.print("For another machine: --workers N --set compute.memory_gb=GB.")
    if found.states:
        console.print(f"Disk: what stays; the total has {describe_memory(found.states)} more, for the states of trainings at work "
                      "(compute.checkpoint_minutes), which are gone when these are done.")  # fmt: skip


def warnings(study: Study, found: Forecast, out: Path | None) -> list[str]:
    """What cannot fit: memory of all processes, the accelerator's, and the disk of the run directory."""
    lines = [*_memory_warnings(study, found), *_disk_warnings(study, found, out)]
    if any(cost is None for _, cost in found.rows):
        lines.append("Give [[models.shape]] of models whose size is unknown, or their weights, to see their cost.")
    return lines


def _memory_warnings(study: Study, found: Forecast) -> list[str]:
    room = found.room
    least = {run.name: train_memory(study, run.shape, 1) for run, cost in found.rows if cost is not None and run.shape}
    if large := [name for name, need in least.items() if need > room.most]:
        need = max(least.values())
        return [f"One layer of {', '.join(large)} needs up to {describe_memory(need)} and a process may use "
                f"{describe_memory(room.most)} ({room.source}): {room.advice(need)}, or lower sae.n or sae.buffer_tokens. "
                "The run will not start."]  # fmt: skip
    if study.compute.memory_gb is None:
        return []  # the room is this machine's
    if device_of(study) == "cuda":
        free, sharing = machine.gpu_memory(), -(-found.workers // max(1, len(visible_gpus())))
        if free is not None and (need := (found.peak - PROCESS) * sharing) > free:
            return [f"The GPU has {describe_memory(free)} free and {sharing} process(es) on it need up to {describe_memory(need)}: "
                    "a lower compute.memory_gb."]  # fmt: skip
    elif (need := found.peak * found.workers) > (have := machine.machine_memory()):
        return [f"{found.workers} worker(s) need up to {describe_memory(need)} and this machine has {describe_memory(have)}: "
                "fewer --workers, or a lower compute.memory_gb."]  # fmt: skip
    return []


def _disk_warnings(study: Study, found: Forecast, out: Path | None) -> list[str]:
    known = [run for run, cost in found.rows if cost is not None]
    place = out or Path()
    while not place.exists():
        place = place.parent
    free, need, lying = shutil.disk_usage(place).free, found.disk + downloads(study, known), 0
    if need > free and out is not None and place == out:
        # What lies there already is not written again; the text and models of --scale are not in the plan.
        lying = tree_size(out) - tree_size(RunStore(out).scaled_dir)
        need -= lying
    lines = []
    if need > free:
        more = "by about" if lying else "to about"
        lines.append(f"The run directory grows {more} {describe_memory(need)} and {place} has {describe_memory(free)} free: "
                     "choose another --out.")  # fmt: skip
    return lines + _too_large(study, known)


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


def announce(study: Study, out: Path, workers: int, room: Room, console: Console, *, nodes: bool) -> None:
    """The first lines of a run: how long it will take where this machine was calibrated, and what cannot fit.

    Args:
        workers: units at once, as the engine has it.
        room: memory of one, as the engine has it.
        nodes: they run on machines of which this one knows nothing.
    """
    rates = known_rates(study, workers)
    try:
        found = forecast(study, rates or Rates(1e11), workers, room)
    except InputError:
        return  # said by the run itself
    if rates is not None and found.units:
        console.print(f"planned: {describe_time(found.seconds)} from nothing with {workers} worker(s), "
                      f"{describe_memory(found.peak)} a process, {describe_memory(found.disk)} on disk")  # fmt: skip
    for line in [*([] if nodes else _memory_warnings(study, found)), *_disk_warnings(study, found, out)]:
        console.print(line, style="yellow", markup=False)
