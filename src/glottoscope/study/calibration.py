"""`plan --calibrate`: the speed of this machine at a study's own shapes, measured with the code that will run.

As many processes measure at once as workers will work at once, since they share memory and caches. Results are kept in
the user's cache folder, by machine, threads, workers and versions, and later plans and runs find them there.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import glottoscope
from glottoscope.atomic import write_json
from glottoscope.errors import InputError
from glottoscope.study.config import PretrainModel, Study
from glottoscope.study.machine import device_of, gpu_memory, visible_gpus
from glottoscope.study.plan import ModelRun, expand, mlp_width
from glottoscope.study.rates import KINDS, Kind, Point, Rates, collect_work, forward_work, pretrain_work, sae_work
from glottoscope.study.store import digest

BUDGET_S = 30.0  # of the whole calibration
START_S = 7.0  # of it, for starting processes and compiling loops
MAX_ROWS = 4096  # positions of one SAE step: more take longer in proportion
MAX_BYTES = 2**30  # of weights and moments of one measurement on a CPU
GPU_SHARE = 0.4  # of what is free on a GPU, for the same


# ---- what is measured


def tasks_of(study: Study) -> list[dict[str, Any]]:
    """The study's smallest and largest shape for every kind of work, as plain values."""
    runs = sorted((r for r in expand(study) if r.shape is not None), key=lambda r: r.shape.n_params if r.shape else 0)
    if not runs:
        raise InputError("no size of a model is known: give [models.shape], or calibrate a study of models trained here")
    found: list[dict[str, Any]] = []
    for run in dict.fromkeys((runs[0].name, runs[-1].name)):
        found += _tasks(study, next(r for r in runs if r.name == run))
    trained = [r for r in runs if isinstance(r.spec, PretrainModel)]
    for name in dict.fromkeys((trained[0].name, trained[-1].name) if trained else ()):
        found.append(_pretrain_task(study, next(r for r in trained if r.name == name)))
    return found


def _tasks(study: Study, run: ModelRun) -> list[dict[str, Any]]:
    shape, sae, compute = run.shape, study.sae, study.compute
    assert shape is not None
    n = sae.n_features(shape.d_model)
    model = {
        "d_model": shape.d_model, "n_layers": shape.n_layers, "mlp": _mlp(run), "context": study.corpus.context_length,
        "batch": compute.lm_batch, "dtype": compute.dtype, "layers": list(run.known_layers()),
    }  # fmt: skip
    one = {
        "d": shape.d_model, "n": n, "k": sae.k, "rows": min(sae.batch_tokens, MAX_ROWS), "kernel": sae.kernel,
        "preselection": sae.preselection, "normalization": sae.normalization,
    }  # fmt: skip
    return [
        {"kind": "forward", "work": forward_work(shape), **model},
        {"kind": "sae", "work": sae_work(shape.d_model, n, sae.k), **one},
        {"kind": "collect", "work": collect_work(shape.d_model, n, sae.k), **one, "threshold": study.features.threshold},
    ]


def _mlp(run: ModelRun) -> int:
    """Width of a SwiGLU MLP that gives the model its parameters."""
    assert run.shape is not None
    d = run.shape.d_model
    if isinstance(run.spec, PretrainModel):
        return mlp_width(d)
    block = (run.shape.n_params - 2 * run.shape.vocab_size * d) / run.shape.n_layers
    return max(8, round((block - 4 * d * d) / (3 * d)))


def _pretrain_task(study: Study, run: ModelRun) -> dict[str, Any]:
    spec, shape = run.spec, run.shape
    assert isinstance(spec, PretrainModel)
    assert shape is not None
    return {
        "kind": "pretrain", "work": pretrain_work(shape), "d_model": shape.d_model, "n_layers": shape.n_layers,
        "n_heads": spec.n_heads, "vocab": shape.vocab_size, "context": study.corpus.context_length, "batch": spec.batch_size,
        "dtype": spec.dtype,
    }  # fmt: skip


# ---- measuring, in a process of its own


def measure(task: dict[str, Any], seconds: float, device: str, threads: int = 1, most_bytes: float = MAX_BYTES) -> float | None:
    """Seconds a token of one task; None where it does not fit the time or `most_bytes` of memory."""
    make = {"forward": _forward, "pretrain": _pretrain, "sae": _sae, "collect": _collect}[task["kind"]]
    prepared = make(task, device, seconds, most_bytes)
    if prepared is None:
        return None
    once, tokens, scale = prepared
    # Of one thread the time it had the core: what others do on the machine now says nothing of when the study runs.
    clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
    once()  # compiles, allocates, initialises
    spent: list[float] = []
    limit = time.perf_counter() + seconds
    while not spent or (time.perf_counter() < limit and len(spent) < 200):
        started = clock()
        once()
        _wait(device)
        spent.append(clock() - started)
    return scale * statistics.median(spent) / tokens


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


Prepared = tuple[Callable[[], object], int, float]


def _fits(work: float, seconds: float, device: str) -> bool:
    # Guessed at a slow core's speed; an accelerator is faster than any guess that matters here.
    return device != "cpu" or work < seconds * 1.5e10


def _forward(task: dict[str, Any], device: str, seconds: float, most_bytes: float) -> Prepared | None:
    import torch

    from glottoscope.lm.capture import capture
    from glottoscope.lm.checkpoints import DTYPES

    # Blocks cost the same each: a deep model is measured by as many as fit the time.
    context, batch, depth = task["context"], task["batch"], task["n_layers"]
    while batch > 1 and not _fits(task["work"] * batch * context, seconds, device):
        batch = -(-batch // 2)
    while depth > 1 and not _fits(task["work"] * batch * context * depth / task["n_layers"], seconds, device):
        depth = -(-depth // 2)
    d = task["d_model"]
    if 4 * depth * (4 * d * d + 3 * d * task["mlp"]) > most_bytes:
        return None
    model: Any = _llama(d, depth, task["mlp"], context).to(device, DTYPES[task["dtype"]])
    tokens_BT = torch.randint(1, 256, (batch, context), device=device)
    mask_BT = torch.ones_like(tokens_BT)
    layers = [x for x in task["layers"] if x < depth] + [depth]

    def once() -> None:
        with torch.no_grad():
            for x in capture(model, tokens_BT, mask_BT, layers).values():
                x.float().sum()

    return once, batch * context, task["n_layers"] / depth


def _llama(d: int, depth: int, mlp: int, context: int) -> Any:
    from glottoscope.lm.pretrain import LlamaShape, PretrainSettings, build_model

    heads = next((h for h in (max(2, d // 128), max(2, d // 32), 2, 1) if d % h == 0 and d // h % 2 == 0), 1)
    shape = LlamaShape(d_model=d, n_layers=depth, n_heads=heads, mlp_width=mlp, vocab_size=256, context_length=context)
    return build_model(shape, PretrainSettings(steps=1, lr=1e-3, warmup_steps=0)).eval()


def _pretrain(task: dict[str, Any], device: str, seconds: float, most_bytes: float) -> Prepared | None:
    import numpy as np

    from glottoscope.lm.pretrain import LlamaShape, Pretraining, PretrainSettings

    shape = LlamaShape(
        d_model=task["d_model"], n_layers=task["n_layers"], n_heads=task["n_heads"], vocab_size=task["vocab"],
        context_length=task["context"],
    )  # fmt: skip
    batch = task["batch"]
    while batch > 1 and not _fits(task["work"] * batch * task["context"], seconds, device):
        batch = -(-batch // 2)
    if not _fits(task["work"] * batch * task["context"], 2 * seconds, device):
        return None
    settings = PretrainSettings(steps=10**6, lr=1e-4, warmup_steps=0, batch_size=batch, dtype=task["dtype"])
    training = Pretraining(shape, settings, device)
    tokens = np.random.default_rng(0).integers(1, task["vocab"], (batch, task["context"])).astype(np.uint32)
    return lambda: training.update(tokens), tokens.size, 1.0


def _sae_rows(task: dict[str, Any], device: str, seconds: float, most_bytes: float) -> int | None:
    if 12 * 2 * task["d"] * task["n"] > 2 * most_bytes:
        return None
    rows = task["rows"]
    while rows > 128 and not _fits(task["work"] * rows, seconds / 2, device):
        rows //= 2
    return rows if _fits(task["work"] * rows, 2 * seconds, device) else None


def _states(rows: int, d: int, device: str) -> Any:
    import torch

    return torch.randn(rows, d, generator=torch.Generator().manual_seed(0)).to(device)


def _sae(task: dict[str, Any], device: str, seconds: float, most_bytes: float) -> Prepared | None:
    from glottoscope.sae.model import TopKSAE
    from glottoscope.sae.trainer import SAETrainer

    rows = _sae_rows(task, device, seconds, most_bytes)
    if rows is None:
        return None
    sae = TopKSAE(task["d"], task["n"], task["k"], 0, normalization=task["normalization"], device=device)
    trainer = SAETrainer(sae, 1e-4, 0, kernel=task["kernel"], preselection=task["preselection"])
    x_BD = _states(rows, task["d"], device)
    return lambda: trainer.step(x_BD), rows, 1.0


def _collect(task: dict[str, Any], device: str, seconds: float, most_bytes: float) -> Prepared | None:
    import numpy as np
    import torch

    from glottoscope.features.collect import FeatureCollector
    from glottoscope.sae.model import TopKSAE
    from glottoscope.sae.quality import QualityAccumulator

    rows = _sae_rows(task, device, seconds, most_bytes)
    if rows is None:
        return None
    sae = TopKSAE(task["d"], task["n"], task["k"], 0, normalization=task["normalization"], device=device)
    collector = FeatureCollector(task["n"], 2, 256, threshold=task["threshold"])
    quality = QualityAccumulator(task["d"], 2)
    x_BD, n = _states(rows, task["d"], device), [0]
    token = np.arange(rows) % 256
    language = (token % 2).astype(np.uint8)

    def once() -> None:
        values, indices = sae.encode(x_BD)
        position = np.arange(n[0], n[0] + rows)
        n[0] += rows
        collector.update(values.cpu().numpy(), indices.cpu().numpy(), position, token, language)
        quality.update(
            sae.normalize(x_BD), sae.decode(values, indices), (values > 0).sum(1), torch.from_numpy(language.astype(np.int64))
        )

    return once, rows, 1.0


# ---- the cache


def machine(threads: int, workers: int, device: str) -> dict[str, Any]:
    """What a measurement holds for: another machine, number of processes or version measures anew."""
    return {
        "processor": _processor(), "cores": os.cpu_count(), "device": device, "threads": threads, "workers": workers,
        "torch": version("torch"), "glottoscope": glottoscope.__version__,
    }  # fmt: skip


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_path(study: Study, workers: int) -> Path:
    """The file in the user's cache folder that holds this machine's measurements."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = cache if cache.is_absolute() else Path.home() / ".cache"  # the XDG specification has relative paths ignored
    key = digest(machine(study.compute.threads, workers, device_of(study)))
    return base / "glottoscope" / "calibration" / f"{key}.json"


def cached(study: Study, workers: int) -> dict[str, float]:
    """Task (as JSON) -> seconds a token, as measured before; empty where nothing was, or there is no place for it."""
    try:
        found = json.loads(cache_path(study, workers).read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return {k: float(v) for k, v in found.items()} if isinstance(found, dict) else {}


def rates_of(measured: dict[str, float], flops: float, study: Study) -> Rates | None:
    """Rates from measurements of settings like the study's; None where there are none."""
    points: dict[Kind, list[Point]] = {kind: [] for kind in KINDS}
    wanted = {json.dumps(t, sort_keys=True) for t in _safely(study)}
    like = {_form(json.loads(t)) for t in wanted}
    for text, seconds in measured.items():
        task = json.loads(text)
        # What was measured for other studies serves where nothing but the size differs.
        if text in wanted or _form(task) in like:
            points[task["kind"]].append(Point(task["work"], seconds))
    points = {kind: _merged(found) for kind, found in points.items() if found}
    return Rates(flops, points, "calibrated on this machine") if points else None


def kinds_of(study: Study) -> list[Kind]:
    """The kinds of work that a study is made of."""
    found = {task["kind"] for task in _safely(study)}
    return [kind for kind in KINDS if kind in found]


def _safely(study: Study) -> list[dict[str, Any]]:
    try:
        return tasks_of(study)
    except InputError:
        return []


def _form(task: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(task.get(x) for x in ("kind", "dtype", "kernel", "preselection", "k", "n", "context", "batch", "rows"))


def _merged(points: Sequence[Point]) -> list[Point]:
    by_work: dict[float, list[float]] = {}
    for point in points:
        by_work.setdefault(point.work, []).append(point.seconds)
    return [Point(work, sum(s) / len(s)) for work, s in sorted(by_work.items())]


def calibrate(study: Study, workers: int, *, budget: float = BUDGET_S) -> dict[str, float]:
    """Measure what the study needs and keep it in the cache; returns all that is known of this machine.

    Raises:
        InputError: no size of a model is known, or a measuring process failed.
    """
    tasks = tasks_of(study)
    try:
        path = cache_path(study, workers)
    except RuntimeError:
        raise InputError("there is no home to keep the calibration in: set XDG_CACHE_HOME to a folder") from None
    # A first call of each task compiles and allocates: it takes about as long again.
    each = max(0.2, (budget - START_S) / len(tasks) / 2)
    gpus = visible_gpus() if device_of(study) == "cuda" else []
    job = {
        "tasks": tasks, "seconds": each, "threads": study.compute.threads, "device": device_of(study),
        "sharing": -(-workers // max(1, len(gpus))),
    }  # fmt: skip
    command = [sys.executable, "-m", "glottoscope.study.calibration", json.dumps(job)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for environment in _environments(workers, gpus)
    ]
    results = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=20 * budget)
            if process.returncode:
                last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                raise InputError(f"calibration failed: {last}; plan without --calibrate, or give --device-flops")
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    measured = cached(study, workers)
    for i, task in enumerate(tasks):
        seconds = [r[i] for r in results if r[i] is not None]
        if seconds:
            measured[json.dumps(task, sort_keys=True)] = sum(seconds) / len(seconds)
    write_json(path, {"machine": machine(study.compute.threads, workers, device_of(study)), "measured": measured})
    return measured


def _environments(workers: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Of every measuring process: as workers have it, each with one GPU, in turn."""
    own = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(workers)]
    return [{**os.environ, **changes} for changes in own]


def _main() -> None:
    from glottoscope.lm.checkpoints import choose_device
    from glottoscope.study.engine import prepare_process

    job = json.loads(sys.argv[1])
    device = choose_device("auto" if job["device"] == "cuda" else job["device"])
    prepare_process(job["threads"], device == "cpu")
    free = gpu_memory() if device == "cuda" else None
    most = MAX_BYTES if free is None else GPU_SHARE * free / job["sharing"]
    print(json.dumps([measure(task, job["seconds"], device, job["threads"], most) for task in job["tasks"]]))


if __name__ == "__main__":
    _main()
