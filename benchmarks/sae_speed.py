"""Section: SAE training step, encode and memory beside the peers, at several shapes and thread counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from harness import Job, Options, Progress, Section, Shape, Verdict, interleave, median_of, python_job, range_of, table

PEERS = ("sparsify", "saelens", "dictionary_learning")
NAMES = {"sparsify": "sparsify", "saelens": "SAELens", "dictionary_learning": "dictionary_learning", "glottoscope": "glottoscope"}
MAIN, WIDE = Shape(768, 32768, 2048), Shape(2048, 32768, 1024)  # the shapes that have targets
# Expected time of one step in encoder products, for the estimate of the time left.
WEIGHTS = {"train": {"glottoscope": 1.6, "sparsify": 3, "saelens": 8, "dictionary_learning": 8}, "encode": {"glottoscope": 1.3}}

NOTE = """\
One training step is forward, backward, Adam, unit norm of the decoder rows, zero_grad, timed inside each library's own loop
from one request for a batch to the next; float32, K = {k}, lr 1e-3, betas 0.9 and 0.999, eps 6.25e-10, the same batches (Gaussian,
coordinate j with standard deviation j^-1/2, rows of unit norm; glottoscope gets them unscaled and scales them itself).
Each number is the median over {rounds} rounds of the median of {steps} steps (two where one takes over 8 s) in a fresh process,
after one warm-up step. Memory: peak above what the process held after its imports and a step of a tiny SAE.

- glottoscope: `SAETrainer.step` on `TopKSAE`; the product as `enable_fast_matmul` chooses it, as in every study.
- sparsify: `Trainer.fit` with `optimizer="adam"`, no W&B, defaults otherwise (auxk off, gradient parallel to the decoder removed,
  eager decoder: Triton's does not run on a CPU; fit sets the matmul precision "high").
- SAELens: `SAETrainer.fit` with `TopKTrainingSAE`, `aux_loss_coefficient=0`, no W&B; dense activations and scaling by decoder norms
  in place of unit norm are its defaults, as are gradient clipping and firing statistics.
- dictionary_learning: `TopKTrainer.update` with `auxk_alpha=0`; gradient clipping and removal of the parallel gradient are its own.
- fast: the same with `torch.set_float32_matmul_precision("medium")`; the two dense peers once, not in every round.
- No auxiliary loss would act in these steps in any case: no feature is dead yet.
- Encode only: `encode` of the inference class on normalised rows, under no_grad; SAELens and dictionary_learning return a dense
  [B, n] tensor, sparsify and glottoscope the K values and ids."""


class Entry(NamedTuple):
    """One contestant of a table."""

    key: str  # name of the measurement within its block
    label: str
    contestant: str
    fast: bool
    kernel: str = "auto"


def entries(what: str, kernels: Sequence[str]) -> list[Entry]:
    """Contestants in the order in which a round meets them."""
    found = [Entry("glottoscope", "**glottoscope**", "glottoscope", True)]
    found += [Entry(peer, NAMES[peer], peer, False) for peer in PEERS]
    if what == "train":
        found += [Entry(f"glottoscope:{name}", f"glottoscope, kernel {name}", "glottoscope", True, name) for name in kernels]
    found.append(Entry("glottoscope-default", "glottoscope, torch's default product", "glottoscope", False))
    found += [Entry(f"{peer}-fast", f"{NAMES[peer]}, fast", peer, True) for peer in PEERS]
    return found


def block_jobs(shape: Shape, threads: int, options: Options) -> list[Job]:
    """All measurements of one shape and thread count; the dense peers on the fast product have no target and run once."""
    base = {"d": shape.d, "n": shape.n, "B": shape.B, "k": options.k, "threads": threads, "steps": options.steps}
    product = 2e-9 * shape.B * shape.n * shape.d / (60 * threads)  # seconds, roughly
    jobs = []

    def add(what: str, entry: Entry, factor: float, rounds: int) -> None:
        name = f"{what}/{shape}/t{threads}/{entry.key}"
        if options.selects("sae", name):
            task = {**base, "what": what, "contestant": entry.contestant, "fast": entry.fast, "kernel": entry.kernel}
            weight = 6 + factor * product * (1 + options.steps)
            jobs.append(python_job(name, "contestants.py", task, weight=weight, rounds=rounds))

    for fast in (True, False):
        key = "product" if fast else "product-default"
        add("product", Entry(key, key, "product", fast), 3.2, options.rounds)
    for what in ("train", "encode"):
        for entry in entries(what, options.kernels):
            once = entry.fast and entry.contestant in ("saelens", "dictionary_learning")
            factor = WEIGHTS[what].get(entry.contestant, 1.6)
            add(what, entry, factor, 1 if once else options.rounds)
    return jobs


Results = dict[str, list[dict[str, Any]]]


def render(what: str, shape: Shape, threads: int, results: Results, options: Options) -> str:
    """The table of one kind of measurement, shape and thread count; "" where nothing was measured."""
    prefix = f"{what}/{shape}/t{threads}/"
    own_speed = median_of(results.get(prefix + "glottoscope"), "tokens_per_second")
    peers = [median_of(results.get(prefix + peer), "memory_mb") for peer in PEERS]
    least = min((memory for memory in peers if memory is not None), default=None)
    rows = []
    for entry in entries(what, options.kernels):
        records = results.get(prefix + entry.key)
        if records is None:
            continue
        speed, memory = median_of(records, "tokens_per_second"), median_of(records, "memory_mb")
        seconds, peak = median_of(records, "seconds"), median_of(records, "peak_mb")
        if speed is None or memory is None or seconds is None or peak is None:
            rows.append([entry.label, f"failed: {records[-1].get('error')}", "", "", "", "", "", ""])
            continue
        ratio = f"{own_speed / speed:.2f} x" if own_speed and entry.key != "glottoscope" else ""
        share = f"{memory / least:.0%}" if least else ""
        label = entry.label + (f" ({records[-1]['kernel']})" if "kernel" in records[-1] else "")
        rows.append(
            [label, f"{speed:,.0f}", f"{seconds:.3f}", range_of(records, "seconds"), ratio, f"{memory:,.0f}", share, f"{peak:,.0f}"]
        )
    if not rows:
        return ""
    header = (
        "", "tokens/s", "s", "s, lowest-highest", "glottoscope is faster by", "peak MB above imports", "share of the best peer's",
        "peak MB",
    )  # fmt: skip
    words = {"train": "Training step", "encode": "Encode only"}[what]
    return f"### {words}, d = {shape.d}, n = {shape.n:,}, B = {shape.B:,}, {_threads(threads)}\n\n{table(header, rows)}\n"


def render_products(shapes: Sequence[Shape], options: Options, results: Results) -> str:
    """Step time in bare encoder products."""
    rows, gains = [], []
    for threads in options.thread_counts:
        for shape in shapes:
            records = results.get(f"product/{shape}/t{threads}/product")
            floor, step = median_of(records, "seconds"), median_of(results.get(f"train/{shape}/t{threads}/glottoscope"), "seconds")
            if not records or floor is None:
                continue
            speed = median_of(records, "gflops")
            default = median_of(results.get(f"product/{shape}/t{threads}/product-default"), "gflops")
            gains += [speed / default] if speed and default else []
            best = min(records[-1]["chunks"], key=records[-1]["chunks"].get)
            encode = median_of(results.get(f"encode/{shape}/t{threads}/glottoscope"), "seconds")
            rows.append(
                [str(shape), str(threads), f"{floor:.3f}", best, f"{speed:,.0f}" if speed else "",
                 f"{default:,.0f}" if default else "", records[-1]["matmul"], f"{step / floor:.2f}" if step else "",
                 f"{encode / floor:.2f}" if encode else ""]
            )  # fmt: skip
    if not rows:
        return ""
    header = (
        "d x n x B", "threads", "product, s", "best chunk, rows", "GFLOP/s", "GFLOP/s, torch's default", "product in use",
        "step / product", "encode / product",
    )  # fmt: skip
    words = ""
    if gains and max(gains) < 1.1:
        words = "On this CPU the fast setting selects no faster product: the rows marked fast repeat the others.\n\n"
    return f"### Training step and encode in bare encoder products\n\n{words}{table(header, rows)}\n"


def judge(options: Options, results: Results) -> list[Verdict]:
    """The project's targets at each thread count; a number that was not measured makes its target "not measured"."""

    def number(key: str, threads: int, field: str, shape: Shape = MAIN, what: str = "train") -> float | None:
        return median_of(results.get(f"{what}/{shape}/t{threads}/{key}"), field)

    def faster(peer: str, threads: int, shape: Shape = MAIN, what: str = "train") -> float | None:
        own, other = (number(key, threads, "seconds", shape, what) for key in ("glottoscope", peer))
        return other / own if own and other else None

    found = []
    for t in options.thread_counts:
        for peer, words, least in (
            ("dictionary_learning", "dictionary_learning", 10.0), ("saelens", "SAELens", 10.0),
            ("sparsify", "sparsify's default", 3.0), ("sparsify-fast", "sparsify on the fast product", 2.2),
        ):  # fmt: skip
            found.append(Verdict(f"step at {MAIN}: >= {least:g} x {words}", t, faster(peer, t), least))
        step, floor = number("glottoscope", t, "seconds"), number("product", t, "seconds", what="product")
        in_products = step / floor if step and floor else None
        found.append(Verdict(f"step at {MAIN}: <= 1.5 x the bare encoder product", t, in_products, 1.5, False))
        encode = _least(faster(peer, t, what="encode") for peer in PEERS)
        found.append(Verdict(f"encode at {MAIN}: >= 2 x the best peer's default", t, encode, 2.0))
        own, least = number("glottoscope", t, "memory_mb"), _least(number(peer, t, "memory_mb") for peer in PEERS)
        share = own / least if own and least else None
        found.append(Verdict(f"peak memory of the step at {MAIN}: <= 65 % of the best peer's", t, share, 0.65, False))
        found.append(Verdict(f"step at {WIDE}: >= 2.5 x sparsify's default", t, faster("sparsify", t, WIDE), 2.5))
        pairs = [
            (number("glottoscope", t, "memory_mb", shape, what), number(peer, t, "memory_mb", shape, what))
            for what in ("train", "encode") for shape in options.shapes for peer in ("saelens", "dictionary_learning")
        ]  # fmt: skip
        known = [own / other for own, other in pairs if own and other]
        largest = max(known) if known and len(known) == len(pairs) else None
        found.append(Verdict("peak memory below the dense peers': largest share of all", t, largest, 1.0, False))
    return found


def _least(values: Iterable[float | None]) -> float | None:
    """The least value, None where one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return min(known) if known and len(known) == len(found) else None


def _threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def run(options: Options) -> Section:
    """Measure, block by block (shape and thread count), each block in interleaved rounds."""
    blocks = [block_jobs(shape, threads, options) for threads in options.thread_counts for shape in options.shapes]
    progress = Progress([job for jobs in blocks for job in jobs])
    results: Results = {}
    for jobs in blocks:
        results |= interleave(jobs, options, progress)
    parts = [NOTE.format(k=options.k, rounds=options.rounds, steps=options.steps) + "\n"]
    for threads in options.thread_counts:
        for shape in options.shapes:
            parts += [render(what, shape, threads, results, options) for what in ("train", "encode")]
    parts.append(render_products(options.shapes, options, results))
    return Section(
        "SAE training step, encode and memory", "\n".join(filter(None, parts)), {"measurements": results}, judge(options, results)
    )
