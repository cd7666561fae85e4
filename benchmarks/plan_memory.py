"""Section: the memory that `glottoscope plan` predicts beside the memory that training takes.

    python benchmarks/bench.py --only memory

A measurement trains the SAEs of all layers of one small random model for a few steps in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from harness import MB, Job, Options, Progress, Section, Verdict, interleave, median_of, peak_memory, python_job, table

CASES: dict[str, dict[str, Any]] = {
    "the embedded study, d 128": {"d": 128, "sae": {"n": 192, "k": 4, "batch_tokens": 1024, "lr": [1e-3]}},
    "d 256, n 16,384, B 2,048": {"d": 256, "sae": {"n": 16_384, "k": 32, "batch_tokens": 2048, "lr": [1e-3]}},
    "d 256, n 16,384, B 8,192, three learning rates": {
        "d": 256, "sae": {"n": 16_384, "k": 32, "batch_tokens": 8192, "lr": [1e-4, 1e-3, 3e-3]},
    },
    "d 512, n 32,768, B 2,048": {"d": 512, "sae": {"n": 32_768, "k": 32, "batch_tokens": 2048, "lr": [1e-3]}},
}  # fmt: skip
QUICK = ("the embedded study, d 128",)
STEPS = 12


def study_of(case: dict[str, Any], folder: Path) -> Path:
    """A study file: the quick embedded study with one untrained model of the case's width and its SAE."""
    import tomli_w

    from glottoscope.study.load import preset_text

    raw = tomllib.loads(preset_text("planted"))
    raw["models"] = raw["models"][:1]
    raw["models"][0] |= {"d_model": case["d"], "steps": 1, "warmup_steps": 0, "checkpoints": [0]}
    raw["sae"] |= {**case["sae"], "steps": STEPS, "buffer_tokens": 50_000}
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return path


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Predicted and highest resident bytes of a process that trains the SAEs of one cell."""
    from glottoscope.study.engine import prepare_process
    from glottoscope.study.load import load_study
    from glottoscope.study.plan import expand, train_memory
    from glottoscope.study.stages.training import train_cell

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = study_of(CASES[task["case"]], folder)
        # The stages before leave nothing in this process.
        command = (sys.executable, "-m", "glottoscope.cli", "run", str(path), "--out", str(folder / "run"), "--until", "tokens")
        subprocess.run(command, check=True, capture_output=True)
        study = load_study(path)
        (run, *_) = expand(study)
        assert run.shape is not None
        layers = run.known_layers()
        prepare_process(1, True)
        train_cell(str(folder / "run"), run.name, 0, layers, lambda *_: None)
        predicted = train_memory(study, run.shape, len(layers))
    measured = peak_memory()
    words = f"{predicted / MB:,.0f} MiB predicted, {measured / MB:,.0f} taken"
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured, "words": words}


def run(options: Options) -> Section:
    """Predicted and measured peak of every case, and whether the worst is within a quarter."""
    jobs: list[Job] = []
    for case in QUICK if options.quick else CASES:
        name = f"memory/{case}"
        if options.selects("memory", case):
            jobs.append(python_job(name, "plan_memory.py", {"case": case, "threads": 1}, weight=1.0, rounds=1))
    results = interleave(jobs, options, Progress(jobs))
    rows, worst = [], []
    for name, records in results.items():
        ratio = median_of(records, "ratio")
        if ratio is None:
            rows.append([name.removeprefix("memory/"), f"failed: {records[-1]['error']}", "", ""])
            continue
        worst.append(max(ratio, 1 / ratio))
        predicted, measured = (f"{records[-1][key] / MB:,.0f}" for key in ("predicted", "measured"))
        rows.append([name.removeprefix("memory/"), predicted, measured, f"{ratio:.2f}"])
    header = ("", "predicted, MiB", "measured, MiB", "predicted / measured")
    complete = len(worst) == len(CASES)
    verdict = Verdict(
        "plan: predicted peak memory within 25 %, worst case", 1, max(worst) if complete else None, 1.25, at_least=False
    )
    return Section("Memory: the plan and the peak", table(header, rows), {"measurements": results}, (verdict,))


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
