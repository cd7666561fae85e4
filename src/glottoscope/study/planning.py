"""`glottoscope plan`: the cost of a study, printed before anything runs."""

from __future__ import annotations

import os
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from glottoscope.study.config import Study
from glottoscope.study.plan import Cost, ModelRun, describe_memory, describe_time, summary, train_memory

# Share of the speed of a large matrix product that training reached when it was measured on a CPU: a rough figure.
EFFICIENCY = 0.4


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


def print_plan(study: Study, device_flops: float | None, console: Console) -> None:
    """Print cells, setups, memory, disk, FLOPs and time of every model, and of the whole study."""
    memory = study.compute.memory_gb * 2**30 if study.compute.memory_gb is not None else float("inf")
    rows = summary(study, memory)
    speed = device_flops or cpu_flops()
    table = Table(title=f"{study.study.name}: k = {study.sae.k}, {study.sae.n_steps:,} SAE steps of "
                  f"{study.sae.batch_tokens:,} tokens", title_justify="left")  # fmt: skip
    for name in (
        "model",
        "control",
        "cells",
        "layers",
        "setups",
        "SAE n",
        "memory",
        "one layer",
        "disk",
        "FLOPs LM",
        "FLOPs SAE",
        "time",
    ):
        table.add_column(name, justify="left" if name in ("model", "control") else "right")
    totals = [0, 0, 0, 0.0, 0.0]
    peak = 0
    for run, cost in rows:
        if cost is None:
            table.add_row(run.name, run.control, str(len(run.checkpoints)), "?", "?", "", "", "", "", "", "", "size unknown")
            continue
        seconds = (cost.lm_flops + cost.sae_flops) / (speed * EFFICIENCY)
        n = study.sae.n_features(run.shape.d_model) if run.shape else 0
        table.add_row(
            run.name, run.control, str(cost.cells), str(len(run.known_layers())), f"{cost.setups:,}", f"{n:,}",
            describe_memory(cost.memory), describe_memory(one_layer(study, run)), describe_memory(cost.disk),
            f"{cost.lm_flops:.1e}", f"{cost.sae_flops:.1e}",
            describe_time(seconds),
        )  # fmt: skip
        totals = [t + v for t, v in zip(totals, (cost.cells, cost.setups, cost.disk, cost.lm_flops, cost.sae_flops), strict=True)]
        peak = max(peak, cost.memory)
    seconds = (totals[3] + totals[4]) / (speed * EFFICIENCY)
    table.add_section()
    table.add_row("total", "", f"{totals[0]:,}", "", f"{totals[1]:,}", "", describe_memory(peak), "", describe_memory(totals[2]),
                  f"{totals[3]:.1e}", f"{totals[4]:.1e}", describe_time(seconds))  # fmt: skip
    console.print(table)
    source = "as stated" if device_flops else "measured on this CPU, one process on all its cores"
    console.print(f"Time: at {speed:.2e} FLOP/s ({source}) and {EFFICIENCY:.0%} of it; a rough figure, within a factor of 2 or 3.")
    console.print(
        "Memory: peak of one process with all layers of a cell at once; with compute.memory_gb, layers go in groups that fit."
    )
    _warn(rows, peak, study, console)


def _warn(rows: list[tuple[ModelRun, Cost | None]], peak: int, study: Study, console: Console) -> None:
    have = machine_memory()
    if peak > have and study.compute.memory_gb is None:
        console.print(
            f"[yellow]This machine has {describe_memory(have)}: set compute.memory_gb, and layers are trained in groups.[/yellow]"
        )
    if any(cost is None for _, cost in rows):
        console.print(
            "[yellow]Give [[models.shape]] of models whose size is unknown, or their weights, to see their cost.[/yellow]"
        )
