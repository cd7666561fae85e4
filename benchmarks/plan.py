"""What `glottoscope plan` predicts beside what a finished run took: time by stage, and the peak memory of its processes.

    glottoscope demo --full --out runs/planted-full --workers 2
    python benchmarks/plan.py runs/planted-full --workers 2

Calibrates first (half a minute, on an idle machine), unless --no-calibrate; then reads log.jsonl. The run must have been made
from nothing with the same number of workers. A process does several units, so its peak is that of the largest so far: the
largest predicted unit is held against the largest peak.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import table

from glottoscope.study.calibration import calibrate
from glottoscope.study.planning import Forecast, cpu_flops, forecast, known_rates
from glottoscope.study.rates import Rates
from glottoscope.study.store import RunStore
from glottoscope.study.times import TIMED, makespan


def predicted(root: Path, workers: int, calibrated: bool) -> Forecast:
    """The plan of a run's study, with groups as that run made them."""
    study = RunStore(root).study()
    if calibrated:
        calibrate(study, workers)
    return forecast(study, known_rates(study, workers) or Rates(cpu_flops()), workers)


def measured(root: Path) -> tuple[dict[str, float], int]:
    """Seconds of every stage, and the largest peak of a process, in bytes (0: the run kept none)."""
    seconds: dict[str, float] = {}
    peak = 0
    for line in RunStore(root).log_path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
        if row["stage"] in ("train", "features"):
            peak = max([peak, *(int(memory) for _, memory in row.get("units", {}).values())])
    return seconds, peak


def main() -> None:
    """Print a table of ratios, predicted / measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--workers", type=int, default=2, help="that the run was made with")
    parser.add_argument("--no-calibrate", action="store_true", help="use what an earlier calibration left")
    options = parser.parse_args()
    found = predicted(options.run, options.workers, not options.no_calibrate)
    seconds, peak = measured(options.run)
    rows = []
    for stage in (s for s in TIMED if seconds.get(s)):
        guess = makespan([u for u in found.units if u.stage == stage], options.workers)
        rows.append([stage, f"{guess:,.0f} s", f"{seconds[stage]:,.0f} s", f"{guess / seconds[stage]:.2f}"])
    whole = sum(seconds.values())
    rows.append(["total, with tokens and report", f"{found.seconds:,.0f} s", f"{whole:,.0f} s", f"{found.seconds / whole:.2f}"])
    if peak:
        rows.append(["peak memory", f"{found.peak / 2**20:,.0f} MiB", f"{peak / 2**20:,.0f} MiB", f"{found.peak / peak:.2f}"])
    print(table(("", "predicted", "measured", "predicted / measured"), rows))


if __name__ == "__main__":
    main()
