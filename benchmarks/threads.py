"""Section: two cores for several SAEs: each product on both, or the layers shared out to two processes of one thread.

    python benchmarks/bench.py --only threads

A study does the second (`compute.threads` = 1, one process a core). A measurement runs as
`python benchmarks/threads.py '{"way": "processes", "shape": [512, 8192, 2048], ...}'`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from harness import Job, Options, Progress, Section, interleave, median_of, python_job, range_of, table, thread_env

SAES = 4  # layers trained on one stream
SHAPES = ((128, 192, 1024, 4), (512, 8192, 2048, 32), (768, 32768, 2048, 32))  # d, n, B, k
QUICK_SHAPES = SHAPES[:1]
SECONDS = 4.0
WAYS = {"product": "one process, every product on 2 threads", "processes": "2 processes of one thread, half the layers each"}


def train(task: dict[str, Any]) -> None:
    """Train `saes` SAEs in turn: a line when ready, then on a line of input a line {"seconds", "steps"}."""
    import torch

    from glottoscope.sae.matmul import enable_fast_matmul
    from glottoscope.sae.model import TopKSAE
    from glottoscope.sae.scratch import Scratch
    from glottoscope.sae.trainer import SAETrainer

    torch.set_num_threads(task["threads"])
    enable_fast_matmul()
    d, n, rows, k = task["shape"]
    scratch = Scratch()
    trainers = [SAETrainer(TopKSAE(d, n, k, seed), scratch=scratch) for seed in range(task["saes"])]
    x_BD = torch.randn(rows, d, generator=torch.Generator().manual_seed(0))
    for trainer in trainers:
        trainer.step(x_BD)
    print("ready", flush=True)
    sys.stdin.readline()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        for trainer in trainers:
            trainer.step(x_BD)
        steps += len(trainers)
    print(json.dumps({"seconds": time.perf_counter() - started, "steps": steps}), flush=True)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """SAE steps per second of all processes together, which start at the same moment."""
    count = 2 if task["way"] == "processes" else 1
    threads = 2 // count
    part = json.dumps({"part": True, "shape": task["shape"], "saes": SAES // count, "threads": threads})
    processes = [
        subprocess.Popen(
            (sys.executable, __file__, part), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **thread_env(threads)},
        )
        for _ in range(count)
    ]  # fmt: skip
    pipes = []
    for process in processes:
        assert process.stdin is not None and process.stdout is not None
        pipes.append((process.stdin, process.stdout))
    for _, output in pipes:
        assert output.readline().strip() == "ready"
    for stdin, _ in pipes:
        stdin.write("\n")
        stdin.flush()
    records = [json.loads(output.readline()) for _, output in pipes]
    for process in processes:
        process.wait()
    rate = sum(r["steps"] / r["seconds"] for r in records)
    return {"steps_per_second": rate, "tokens_per_second": rate * task["shape"][2], "words": f"{rate:.3g} steps/s"}


def run(options: Options) -> Section:
    """SAE steps per second of both ways at every shape."""
    jobs: list[Job] = []
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        for way in WAYS:
            name = f"threads/{shape[0]}x{shape[1]}/{way}"
            if options.selects("threads", name.removeprefix("threads/")):
                task = {"way": way, "shape": shape, "threads": 2}
                jobs.append(python_job(name, "threads.py", task, weight=1.0, rounds=options.rounds))
    results = interleave(jobs, options, Progress(jobs))
    rows = []
    for shape in SHAPES:
        base = median_of(results.get(f"threads/{shape[0]}x{shape[1]}/product"), "steps_per_second")
        for way, words in WAYS.items():
            records = results.get(f"threads/{shape[0]}x{shape[1]}/{way}", [])
            rate = median_of(records, "steps_per_second")
            if rate is None:
                continue
            ratio = f"{rate / base:.2f} x" if base and way != "product" else ""
            rows.append(
                [f"d {shape[0]}, n {shape[1]}, B {shape[2]}", words, f"{rate:.3g}", range_of(records, "steps_per_second"), ratio]
            )
    header = ("", "", "SAE steps/s", "lowest-highest", "against one process")
    return Section(f"{SAES} SAEs on two cores", table(header, rows), {"measurements": results})


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given.get("part"):
        train(given)
    else:
        print(json.dumps(measure(given)))
