"""Section: the embedded study end to end, seconds per stage, alone or beside another commit's source tree.

    git worktree add ../before COMMIT
    python benchmarks/bench.py --only study --full --baseline ../before --rounds 2

A measurement runs `glottoscope demo` of one tree (PYTHONPATH=TREE/src) in a temporary folder; stage times come from the log
that the run writes. With a baseline the trees take turns: A B A B.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import HERE, ROOT, Job, Options, Progress, Section, Verdict, git_state, interleave, median_of, range_of, table

TREES = {"current": "this tree", "baseline": "baseline"}
FASTER = {"train": 1.5, "features": 1.5, "whole study": 1.0}  # what the full study must gain over the baseline


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every stage of one demo, of all of it, and the largest process's peak memory in MB."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder is removed then, too
    source = str(Path(task["tree"]).resolve() / "src")
    env = {**os.environ, "PYTHONPATH": source}
    where = subprocess.run(
        (sys.executable, "-c", "import glottoscope; print(glottoscope.__file__)"), env=env, capture_output=True, text=True
    ).stdout.strip()
    if not where.startswith(source):
        raise SystemExit(f"{task['tree']}: not a glottoscope source tree (got {where or 'no glottoscope'})")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "glottoscope.cli", "demo", "--out", str(out), *(["--full"] if task["full"] else [])]
        started = time.monotonic()
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        whole = time.monotonic() - started
        if done.returncode != 0:
            raise SystemExit((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        if task["keep"] and not Path(task["keep"]).exists():
            shutil.copytree(out, task["keep"])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    stages: dict[str, float] = {}
    for line in lines:
        stages[line["stage"]] = stages.get(line["stage"], 0.0) + line["seconds"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return {**stages, "whole study": whole, "peak_mb": peak, "stages": list(stages), "words": f"{whole:.0f} s"}


def run(options: Options) -> Section:
    """Seconds per stage; with a baseline the ratio of the medians, and for the full study what it must gain."""
    trees = {"current": ROOT} | ({"baseline": options.baseline} if options.baseline else {})
    jobs = []
    for name, tree in trees.items():
        keep = str(options.keep) if options.keep is not None and name == "current" else None
        task = json.dumps({"tree": str(tree), "full": options.full, "keep": keep})
        jobs.append(Job(f"study/{name}", (sys.executable, str(HERE / "study.py"), task), rounds=options.rounds))
    results = interleave(jobs, options, Progress(jobs))
    commits = {name: git_state(Path(tree)) for name, tree in trees.items()}
    record = {"full": options.full, "trees": commits, "measurements": results}
    failed = [f"{TREES[name]} failed: {r['error']}" for name in trees for r in results.get(f"study/{name}", []) if "error" in r]
    current, baseline = ([r for r in results.get(f"study/{name}", []) if "error" not in r] for name in ("current", "baseline"))
    header = ["stage"] + [f"{TREES[name]}, s{extra}" for name in trees for extra in ("", ", lowest-highest")]
    header += ["baseline / this tree"] if options.baseline else []
    rows, ratios = [], {}
    for stage in [*current[0]["stages"], "whole study"] if current else []:
        row, medians = [stage], [median_of(records, stage) for records in (current, baseline)]
        for median, records in zip(medians[: len(trees)], (current, baseline), strict=False):
            row += [f"{median:.2f}" if median is not None else "", range_of(records, stage)]
        if options.baseline:
            ratios[stage] = medians[1] / medians[0] if medians[0] and medians[1] else None
            row.append(f"{ratios[stage]:.2f}" if ratios[stage] else "")
        rows.append(row)
    which = "`glottoscope demo --full`" if options.full else "`glottoscope demo`"
    names = ", ".join(f"{TREES[name]} {state['commit']}" + _changed(state) for name, state in commits.items())
    markdown = f"{which}, default workers; {names}.\n\n" + "\n".join([*failed, "", table(header, rows)])
    verdicts = []
    if options.full and options.baseline:
        for stage, least in FASTER.items():
            verdicts.append(Verdict(f"full study, {stage}: >= {least:g} x the baseline", None, ratios.get(stage), least))
    return Section("The embedded study end to end", markdown, record, verdicts)


def _changed(state: dict[str, Any]) -> str:
    return f" with {state['changed_files']} changed files" if state["changed_files"] else ""


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
