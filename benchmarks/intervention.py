"""Section: interventions (`glottoscope.intervention`) beside the way a user of Hugging Face models would write them.

    python benchmarks/bench.py --only intervention

Losses: `measure` reads a batch once up to the patched layer and goes on from there for every condition. The plain way makes,
for every condition and batch, a pass of the donor up to the layer and a full pass of the base model with a hook.
Translation: `greedy` reads what all prompts begin with once and drops sentences that have ended. The plain way is `generate`
of the patched model on whole prompts. Both ways get the same batches, SAE, threads and float32 product, and their results
are compared. A measurement is a process of intervention_ways.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from harness import MB, Job, Options, Progress, Section, Verdict, interleave, median_of, python_job, table


class Case(NamedTuple):
    """Models, SAE and how much is read and written with them; the middle layer is patched."""

    d: int
    layers: int
    heads: int
    vocabulary: int
    n: int
    k: int
    tokens: int  # of the text whose losses are measured
    conditions: int
    sentences: int
    new_tokens: int  # of an output at most

    @property
    def layer(self) -> int:
        return self.layers // 2

    def __str__(self) -> str:
        return f"d {self.d}, {self.layers} layers, vocabulary {self.vocabulary:,}"

    def sizes(self) -> str:
        return (
            f"{self}: SAE of {self.n:,} features, {self.k} active; {self.tokens:,} tokens, {self.conditions} conditions; "
            f"{self.sentences} sentences, at most {self.new_tokens} new tokens"
        )


CASES = {
    "d128": Case(128, 4, 4, 480, 192, 4, 4096, 32, 256, 32),  # the largest of the embedded study
    "d512": Case(512, 8, 8, 8000, 8192, 32, 2048, 16, 64, 32),
}
QUICK_CASES = {"quick": Case(128, 4, 4, 480, 192, 4, 1536, 4, 24, 12)}
WAYS = {"ours": "glottoscope", "plain": "plain Hugging Face"}
BATCH, WINDOW, STRIDE = 16, 128, 64
PROMPTS, SHARED, QUERY = 64, 128, (8, 24)  # prompts of a batch, tokens they begin with, tokens of their own
ENDS = 16  # one token id in so many ends an output
MEMORY = (("ours", 2), ("ours", 4), ("plain", 2))  # copies of the text; from 2 to 4 the peak of ours must not grow
SAME = 1e-4  # nats per token by which losses of the two ways may differ
GROWTH = 0.5  # of one layer's states of the added text: less than anything that is kept of every position
# glibc gives every block above 64 KB back at once: what is resident is what is in use, not what was used before.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Records = list[dict[str, Any]]


def jobs_of(options: Options) -> list[Job]:
    """All measurements, the two that are compared one after the other."""
    jobs = []
    for name, case in cases_of(options).items():
        for threads in options.thread_counts:
            tasks: dict[str, dict[str, Any]] = {
                f"{kind}/{name}/t{threads}/{way}": {"kind": kind, "way": way, "times": 1, "conditions": case.conditions}
                for kind in ("losses", "translation")
                for way in WAYS
            }
            for way, times in MEMORY:
                tasks[f"memory/{name}/t{threads}/{way}-x{times}"] = {"kind": "losses", "way": way, "times": times, "conditions": 1}
            for measurement, task in tasks.items():
                if options.selects("intervention", measurement):
                    task |= {"case": case, "threads": threads}
                    weight, full_name = 3.0 if task["way"] == "plain" else 1.0, f"intervention/{measurement}"
                    job = python_job(full_name, "intervention_ways.py", task, weight=weight, rounds=options.rounds)
                    if measurement.startswith("memory/"):
                        job = replace(job, env={**job.env, **EXACT}, rounds=1)  # its time is not shown
                    jobs.append(job)
    return jobs


def cases_of(options: Options) -> dict[str, Case]:
    return QUICK_CASES if options.quick else CASES


def run(options: Options) -> Section:
    """Seconds of both ways, their ratio, and whether they agree; the peak of ours against the size of the text."""
    jobs = jobs_of(options)
    results = interleave(jobs, options, Progress(jobs))
    losses, memory, translations, verdicts = [], [], [], []
    for name, case in cases_of(options).items():
        for threads in options.thread_counts:
            about, where = [str(case), str(threads)], f"{name}/t{threads}"
            ours, plain = (results.get(f"intervention/losses/{where}/{way}", []) for way in WAYS)
            if ours or plain:
                losses.append([*about, *seconds_of(ours, plain), *difference(ours, plain)])
            once, twice, plain = (results.get(f"intervention/memory/{where}/{way}-x{times}", []) for way, times in MEMORY)
            kept = share_kept(once, twice, case)
            if once or twice or plain:
                sizes = [cell(records, key) for records in (once, twice) for key in ("positions", "peak")]
                memory.append([*about, *sizes, "" if kept is None else f"{kept:.2f}", cell(plain, "peak")])
            target = f"losses, {case}: growth of the peak with the text <= {GROWTH} of one layer's states"
            verdicts.append(Verdict(target, threads, kept, GROWTH, at_least=False))
            ours, plain = (results.get(f"intervention/translation/{where}/{way}", []) for way in WAYS)
            if ours or plain:
                translations.append([*about, *seconds_of(ours, plain), *outputs(ours, plain)])
    for records in results.values():
        for record in records:
            for key in ("losses", "outputs", "unpatched"):
                record.pop(key, None)  # compared above, and too long to keep
    markdown = page([case.sizes() for case in cases_of(options).values()], losses, memory, translations)
    return Section("Interventions", markdown, {"measurements": results}, verdicts)


def page(sizes: list[str], losses: list[list[str]], memory: list[list[str]], translations: list[list[str]]) -> str:
    """The three tables and what they need to be read."""
    seconds = ("", "threads", *(f"{way}, s" for way in WAYS.values()), "glottoscope is faster by")
    facts = ("tokens an output", "different outputs", "pairs of tokens not repeated", "changed by the part")
    parts = [
        "Llamas with random weights, drawn larger than usual so that every output depends on the text before it. The middle layer "
        "is patched: a random third of the features of the donor's SAE, at the base's norm. Plain Hugging Face gets the same "
        "batches, sorted by length, and the same SAE code.",
        "\n".join(f"- {words}." for words in sizes),
        f"Losses, seconds per condition: windows of {WINDOW} tokens, stride {STRIDE}, {BATCH} a batch. Difference: the largest of "
        "any document's loss under any condition, nats per token. Spread: how far the conditions lie apart, median over "
        "documents.",
        table((*seconds, "difference", "spread"), losses),
        "Peak memory of losses, one condition, on a text and on twice that text: above what the process held after reading one "
        "window. Growth: as a share of one layer's states at the added positions (4 d bytes each). Plain Hugging Face: on the "
        "shorter text.",
        table(("", "threads", "positions", "peak MB", "positions", "peak MB", "growth", "plain Hugging Face, peak MB"), memory),
        f"Translation, seconds for all sentences: prompts of {SHARED} shared tokens and {QUERY[0]} to {QUERY[1]} of their own, "
        f"{PROMPTS} a batch, one donor and one part. One token id in {ENDS} ends an output.",
        table((*seconds, "identical outputs", *facts), translations),
    ]  # fmt: skip
    return "\n\n".join(parts)


def cell(records: Records, key: str) -> str:
    """Median over rounds, or why there is none."""
    value = median_of(records, key)
    if value is None:
        return f"failed: {records[-1]['error']}" if records and "error" in records[-1] else ""
    return {"peak": f"{value / MB:,.0f}", "positions": f"{value:,.0f}"}.get(key, f"{value:.3g}")


def together(ours: Records, plain: Records) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Records of the same rounds, of those that did not fail."""
    return [(a, b) for a, b in zip(ours, plain, strict=False) if "error" not in a and "error" not in b]


def seconds_of(ours: Records, plain: Records) -> list[str]:
    """Both ways' seconds, and the ratio of the medians with its range over rounds."""
    own, other = median_of(ours, "seconds"), median_of(plain, "seconds")
    words = f"{other / own:.2f} x" if own and other else ""
    ratios = [b["seconds"] / a["seconds"] for a, b in together(ours, plain)]
    if len(ratios) > 1:
        words += f" ({min(ratios):.2f}-{max(ratios):.2f})"
    return [cell(ours, "seconds"), cell(plain, "seconds"), words]


def difference(ours: Records, plain: Records) -> list[str]:
    """Largest difference of the losses, and how far the conditions lie apart."""
    pairs = [np.array([a["losses"], b["losses"]]) for a, b in together(ours, plain)]
    if not pairs:
        return ["", ""]
    largest = max(float(np.abs(own - other).max()) for own, other in pairs)
    return [f"{largest:.1e}" + ("" if largest <= SAME else " **DIFFER**"), f"{np.median(np.ptp(pairs[0][0], axis=0)):.2g}"]


def share_kept(once: Records, twice: Records, case: Case) -> float | None:
    """Growth of the peak over the size of one layer's states at the added positions; None where it was not measured."""
    peaks, positions = ([median_of(records, key) for records in (once, twice)] for key in ("peak", "positions"))
    if peaks[0] is None or peaks[1] is None or positions[0] is None or positions[1] is None:
        return None
    return (peaks[1] - peaks[0]) / ((positions[1] - positions[0]) * 4 * case.d)


def outputs(ours: Records, plain: Records) -> list[str]:
    """Share of identical outputs, and what shows that they are not trivial."""
    pairs = together(ours, plain)
    if not pairs:
        return [""] * 5
    same = np.mean([own == other for a, b in pairs for own, other in zip(a["outputs"], b["outputs"], strict=True)])
    found, unpatched = pairs[0][0]["outputs"], pairs[0][0]["unpatched"]
    neighbours = [list(pairwise(output)) for output in found]
    fresh = sum(len(set(n)) for n in neighbours) / max(1, sum(map(len, neighbours)))
    changed = np.mean([own != other for own, other in zip(found, unpatched, strict=True)])
    different = len(set(map(tuple, found))) / len(found)
    return [f"{same:.1%}", f"{np.mean([*map(len, found)]):.1f}", f"{different:.0%}", f"{fresh:.0%}", f"{changed:.0%}"]
