"""What scheduling and the store cost per cell, and what a second worker gains.

    python benchmarks/engine.py                    1,000 cells that do nothing but write an artefact: one and two workers
    python benchmarks/engine.py --ray              the same through Ray, too (pip install 'glottoscope[ray]')
    python benchmarks/engine.py --study            `glottoscope demo` with one worker and with two (minutes)

Workers are started before the clock is. "beyond" is what is left of a cell's time without the writing itself, which is
measured in a plain loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from harness import ROOT, table
from rich.console import Console

from glottoscope.atomic import write_text
from glottoscope.study.engine import Engine, Unit
from glottoscope.study.load import parse_study, preset_text
from glottoscope.study.local import LocalEngine
from glottoscope.study.ray_engine import RayEngine
from glottoscope.study.store import RunStore, digest

REST, WHOLE = "start, between stages", "whole command"


def write_cell(root: str, n: int, report: Any) -> None:
    """A cell whose result is one small file and its record."""
    store = RunStore(root)
    folder = store.setup_dir("m", n, 0, 0)
    write_text(folder / "result.txt", str(n))
    store.mark_done(folder, "train", digest(n), {}, ["result.txt"])
    report(1, 1, "written")


def nothing(root: str, report: Any) -> None:
    """What a worker does before the clock starts."""


def new_store(folder: str, name: str) -> RunStore:
    store = RunStore(Path(folder) / name)
    store.create(parse_study(preset_text("planted"), name="planted", folder=Path(folder)), {})
    return store


def in_a_loop(store: RunStore, cells: int) -> list[float]:
    """Seconds of each cell, written one after the other without an engine."""
    seconds = []
    for n in range(cells):
        started = time.perf_counter()
        write_cell(str(store.root), n, lambda *_: None)
        seconds.append(time.perf_counter() - started)
    return seconds


def through(engine: Engine, cells: int) -> float:
    """Seconds for all cells through an engine whose workers are there."""
    root = str(engine.store.root)
    with engine:
        engine.run("warm", [Unit(f"warm {i}", nothing, (root,)) for i in range(4 * engine.slots)])
        units = [Unit(f"m@{n}", write_cell, (root, n)) for n in range(cells)]
        started = time.perf_counter()
        outcome = engine.run("train", units)
        seconds = time.perf_counter() - started
    if outcome.failures:
        raise SystemExit(outcome.failures[0].message)
    return seconds


def overheads(cells: int, with_ray: bool) -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        alone = in_a_loop(new_store(folder, "loop"), cells)
        each = sum(alone) / cells
        rows.append(["no engine", f"{1000 * each:.2f}", ""])
        engines: dict[str, Any] = {
            "local, 1 worker": lambda s: LocalEngine(s, 1, 1, Console(file=StringIO())),
            "local, 2 workers": lambda s: LocalEngine(s, 2, 1, Console(file=StringIO())),
        }
        if with_ray:
            here = str(Path(__file__).parent)
            os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
            engines["Ray, 2 CPUs"] = lambda s: RayEngine(s, 1, Console(file=StringIO()), workers=2)
        for n, (name, make) in enumerate(engines.items()):
            seconds = through(make(new_store(folder, f"run{n}")), cells)
            beyond = seconds / cells - each / (1 if name.endswith("1 worker") else 2)
            rows.append([name, f"{1000 * seconds / cells:.2f}", f"{1000 * beyond:.2f}"])
        last = RunStore(Path(folder) / "loop")
        hundred = min(100, cells // 2)
        looks = []
        for part in (range(hundred), range(cells - hundred, cells)):
            started = time.perf_counter()
            for i in part:
                assert last.is_done(last.setup_dir("m", i, 0, 0), "train", digest(i))
            looks.append((time.perf_counter() - started) / hundred)
    first, end = statistics.median(alone[:hundred]), statistics.median(alone[-hundred:])
    constant = (
        f"One cell written: median {1000 * first:.2f} ms among the first {hundred}, {1000 * end:.2f} ms among the last; "
        f"looked up among {cells:,}: {1000 * looks[0]:.3f} and {1000 * looks[1]:.3f} ms."
    )
    return table([f"{cells:,} cells", "ms per cell", "beyond the writing, ms"], rows) + "\n\n" + constant


def second_worker(workers: Sequence[int] = (1, 2)) -> str:
    """The whole command and its stages, of which some have one unit only."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    seconds: dict[str, list[float]] = {}
    for count in workers:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "glottoscope.cli", "demo", "--workers", str(count), "--out", f"{folder}/run"]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
            whole = time.perf_counter() - started
            for stage, spent in of_stages(RunStore(Path(folder) / "run")).items():
                seconds.setdefault(stage, []).append(spent)
        stages = sum(spent[-1] for name, spent in seconds.items() if name not in (REST, WHOLE))
        seconds.setdefault(REST, []).append(whole - stages)
        seconds.setdefault(WHOLE, []).append(whole)
    rows = [[name, *(f"{s:.1f}" for s in spent), f"{spent[0] / max(spent[-1], 1e-3):.2f}"] for name, spent in seconds.items()]
    return table(["", *(f"{n} worker{'s' * (n > 1)}, s" for n in workers), "times one worker"], rows)


def of_stages(store: RunStore) -> dict[str, float]:
    """Seconds of every stage of a finished run."""
    seconds: dict[str, float] = {}
    for line in store.log_path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--ray", action="store_true", help="through Ray, too")
    parser.add_argument("--study", action="store_true", help="one worker and two on the embedded study, instead")
    options = parser.parse_args()
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    print(second_worker() if options.study else overheads(options.cells, options.ray))


if __name__ == "__main__":
    main()
