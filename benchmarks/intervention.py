"""Section: interventions (`glottoscope.intervention`) beside the way a user of Hugging Face models would write them.

    python benchmarks/bench.py --only intervention

Losses: `measure` reads a batch once up to the patched layer and goes on from there for every condition. The plain way makes,
for every condition and batch, a pass of the donor cut at the layer and a full pass of the base model with a hook.
Translation: `greedy` reads what all prompts begin with once and drops sentences that have ended. The plain way is `generate`
of the patched model on whole prompts. Both ways get the same batches, SAE, threads and float32 product, and their results
are compared. A measurement runs as `python benchmarks/intervention.py '{"kind": "losses", "way": "plain", "case": ...}'`.

Shape legend: B sequences, T positions, D d_model, N features, M scored targets, S conditions, U units (documents).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from harness import (
    MB, Job, Options, Progress, Section, Verdict, interleave, median_of, peak_memory, python_job, range_of, reset_peak, table,
)  # fmt: skip

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import LlamaForCausalLM

    from glottoscope.intervention.conditions import Condition
    from glottoscope.intervention.parts import Injection
    from glottoscope.intervention.perplexity import Windows
    from glottoscope.sae.model import TopKSAE


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
    new_tokens: int

    @property
    def layer(self) -> int:
        return self.layers // 2

    def __str__(self) -> str:
        return f"d {self.d}, {self.layers} layers, vocabulary {self.vocabulary:,}"


CASES = {
    "d128": Case(128, 4, 4, 480, 192, 4, 4096, 32, 256, 32),  # the largest of the embedded study
    "d512": Case(512, 8, 8, 8000, 8192, 32, 2048, 16, 64, 32),
}
QUICK_CASES = {"quick": Case(128, 4, 4, 480, 192, 4, 1536, 4, 24, 12)}
WAYS = {"ours": "glottoscope", "plain": "plain Hugging Face"}
BATCH, WINDOW, STRIDE, ALPHA = 16, 128, 64, 0.5
PROMPTS, SHARED, QUERY = 64, 128, (8, 24)  # prompts of a batch, tokens they begin with, tokens of their own
PAD, BOS = 0, 1
SPECIAL = (PAD, BOS)
ENDS = 16  # one token id in so many ends a sentence
SAME = 1e-4  # nats per token by which losses of the two ways may differ
GROWTH = 1.1  # peak memory of twice the text over that of the text


class Scene(NamedTuple):
    """What both ways are given."""

    case: Case
    base: LlamaForCausalLM
    donor: LlamaForCausalLM
    sae: TopKSAE


def scene_of(case: Case) -> Scene:
    """Models and SAE of a case, always the same."""
    from glottoscope.sae.model import TopKSAE

    return Scene(case, random_llama(case, 0), random_llama(case, 1), TopKSAE(case.d, case.n, case.k))


def random_llama(case: Case, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, large enough that its outputs depend on all of the text: with the usual ones (0.02) every
    token is about as likely as every other, and greedy decoding repeats itself."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=case.d, intermediate_size=case.d * 43 // 16, num_hidden_layers=case.layers, num_attention_heads=case.heads,
        num_key_value_heads=case.heads, vocab_size=case.vocabulary, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            gain = 3.0 if module is model.lm_head else 1.5
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
    nn.init.normal_(model.model.embed_tokens.weight)
    return model


def text_of(case: Case, times: int) -> Windows:
    """Windows of random documents of 100 to 500 tokens; `times` copies of them."""
    from glottoscope.intervention.perplexity import windows

    rng = np.random.default_rng(0)
    lengths = []
    while (left := case.tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.integers(100, 500))))
    tokens = rng.integers(len(SPECIAL), case.vocabulary, case.tokens)
    return windows(np.tile(tokens, times), np.tile(lengths, times), window=WINDOW, stride=STRIDE, bos_id=BOS)


def chosen_features(case: Case) -> NDArray[np.bool_]:
    """bool [S, N]: a random third of the features for every condition."""
    return np.random.default_rng(1).random((case.conditions, case.n)) < 1 / 3


def parts_of(scene: Scene, chosen_SN: NDArray[np.bool_]) -> list[tuple[Condition, dict[int, Injection]]]:
    """One condition, with its edit, for every row of `chosen_SN`."""
    from glottoscope.intervention.conditions import Condition, Readers, edits_of

    layer, readers = scene.case.layer, Readers.of(scene.sae, None)
    names = [f"features {i}" for i in range(len(chosen_SN))]
    sets = {layer: dict(zip(names, chosen_SN, strict=True))}
    conditions = [Condition("part", name, alpha=ALPHA, features=name) for name in names]
    return [(c, edits_of(c, {layer: readers}, sets, "add", "matched")) for c in conditions]


# Losses


def losses_ours(scene: Scene, text: Windows, chosen_SN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Nats per token of every unit under every condition [S, U]."""
    from glottoscope.intervention.perplexity import measure

    parts = parts_of(scene, chosen_SN)
    found = measure(scene.base, scene.donor, text, parts, [scene.case.layer], special_ids=SPECIAL, batch=BATCH)
    return found.nll / found.tokens


def losses_plain(scene: Scene, text: Windows, chosen_SN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The same [S, U], every condition for itself."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    donor = scene.donor.model
    donor.layers, donor.norm = donor.layers[: scene.case.layer], nn.Identity()  # its last state is now the layer's
    n_units = int(text.unit.max()) + 1
    nll_SU, tokens_SU = np.zeros((2, len(chosen_SN), n_units))
    for s, chosen_N in enumerate(torch.from_numpy(chosen_SN)):
        for ids_BT, real_BT, scored_BT, unit_BT in batches(text):
            counted_BT = real_BT & ~torch.isin(ids_BT, torch.tensor(SPECIAL))
            logits_BTV = patched_logits(scene, ids_BT, real_BT, counted_BT, chosen_N)
            scored = (scored_BT & counted_BT)[:, 1:]
            nll_M = F.cross_entropy(logits_BTV[:, :-1][scored], ids_BT[:, 1:][scored], reduction="none")
            unit_M = unit_BT[:, 1:][scored].numpy()
            nll_SU[s] += np.bincount(unit_M, nll_M.double().numpy(), n_units)
            tokens_SU[s] += np.bincount(unit_M, minlength=n_units)
    return nll_SU / tokens_SU


def patched_logits(scene: Scene, ids_BT: Tensor, real_BT: Tensor, counted_BT: Tensor, chosen_N: Tensor) -> Tensor:
    """[B, T, V] of the base model, with the chosen features of the donor, which is cut at the layer."""
    import torch

    arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": real_BT.long(), "use_cache": False}

    def patch(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h_BTD, sae = args[0], scene.sae
        values, indices = sae.encode(theirs_BTD)
        part_BTD = sae.decode(values * chosen_N[indices], indices) - sae.b_dec
        moved_BTD = h_BTD + ALPHA * torch.linalg.vector_norm(h_BTD, dim=-1, keepdim=True) * part_BTD
        return (torch.where(counted_BT[..., None], moved_BTD, h_BTD), *args[1:])

    with torch.no_grad():
        theirs_BTD = scene.donor.model(**arguments).last_hidden_state
        # The state of a layer is what the next block is given.
        handle = scene.base.model.layers[scene.case.layer].register_forward_pre_hook(patch)
        try:
            return scene.base(**arguments).logits
        finally:
            handle.remove()


def batches(text: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Ids, real positions, positions from the first scored one on, and units, all [B, T]: the batches of `measure`."""
    import torch

    order = np.argsort(text.length, kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        place = np.arange(int(text.length[rows].max()))
        ids = torch.from_numpy(text.tokens[rows, : len(place)].astype(np.int64))
        real, scored = place < text.length[rows][:, None], place >= text.first[rows][:, None]
        unit = torch.from_numpy(text.unit[rows])[:, None].expand(ids.shape)
        yield ids, torch.from_numpy(real), torch.from_numpy(scored), unit


LOSSES: dict[str, Callable[[Scene, Windows, NDArray[np.bool_]], NDArray[np.float64]]] = {
    "ours": losses_ours, "plain": losses_plain,
}  # fmt: skip


def measure_losses(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds per condition, the losses, and the peak above what the process held after a batch as warm-up."""
    from glottoscope.intervention.perplexity import Windows

    case = Case(*task["case"])
    scene, text, chosen_SN = scene_of(case), text_of(case, task["times"]), chosen_features(case)[: task["conditions"]]
    losses = LOSSES[task["way"]]
    losses(scene, Windows(*(rows[:BATCH] for rows in text)), chosen_SN[:1])
    reset_peak()
    before, start = peak_memory(), time.perf_counter()
    found_SU = losses(scene, text, chosen_SN)
    seconds = (time.perf_counter() - start) / len(found_SU)
    peak, positions = peak_memory() - before, int(text.length.sum())
    words = f"{seconds:.3g} s per condition, {peak / MB:.0f} MB"
    return {"seconds": seconds, "peak": peak, "positions": positions, "losses": found_SU.tolist(), "words": words}


# Translation


class Asked(NamedTuple):
    """Prompts, of which all have the same beginning, and the ids that end an output."""

    prefix: list[int]
    rows: NDArray[np.int64]  # padded on the left
    length: NDArray[np.int64]
    stops: list[int]


def ask(case: Case) -> Asked:
    """Random prompts of a case."""
    rng = np.random.default_rng(2)
    prefix = [BOS, *rng.integers(len(SPECIAL), case.vocabulary, SHARED - 1).tolist()]
    length = rng.integers(QUERY[0], QUERY[1] + 1, case.sentences)
    rows = rng.integers(len(SPECIAL), case.vocabulary, (case.sentences, QUERY[1]))
    rows[np.arange(QUERY[1]) < QUERY[1] - length[:, None]] = PAD
    ends = rng.choice(np.arange(len(SPECIAL), case.vocabulary), case.vocabulary // ENDS, replace=False)
    return Asked(prefix, rows, length, sorted({*SPECIAL, *ends.tolist()}))


def translate_ours(scene: Scene, asked: Asked, edits: dict[int, Injection], new_tokens: int) -> list[list[int]]:
    """New ids of every prompt, without the one that ends them."""
    from glottoscope.intervention.generation import greedy

    return greedy(
        scene.base, asked.prefix, asked.rows, asked.length, max_new_tokens=new_tokens, stop_ids=asked.stops, batch=PROMPTS,
        edits=edits, donor=scene.donor, special_ids=SPECIAL,
    )  # fmt: skip


def translate_plain(scene: Scene, asked: Asked, edits: dict[int, Injection], new_tokens: int) -> list[list[int]]:
    """The same by `generate`, with the batches that `greedy` makes."""
    import torch

    from glottoscope.lm.patch import Donor, patched

    result: list[list[int]] = [[] for _ in asked.rows]
    order = np.argsort(asked.length, kind="stable")
    for start in range(0, len(order), PROMPTS):
        chosen = order[start : start + PROMPTS].tolist()
        prompts = [asked.prefix + asked.rows[i, -asked.length[i] :].tolist() for i in chosen]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with patched(scene.base, edits, special_ids=SPECIAL, donor=Donor(scene.donor, list(edits))):
            whole = scene.base.generate(
                ids, attention_mask=real, do_sample=False, num_beams=1, max_new_tokens=new_tokens, pad_token_id=PAD,
                eos_token_id=asked.stops,
            )  # fmt: skip
        assert isinstance(whole, torch.Tensor)
        for i, new in zip(chosen, whole[:, longest:].tolist(), strict=True):
            ends = (place for place, token in enumerate(new) if token in asked.stops)
            result[i] = new[: next(ends, len(new))]
    return result


TRANSLATE: dict[str, Callable[[Scene, Asked, dict[int, Injection], int], list[list[int]]]] = {
    "ours": translate_ours, "plain": translate_plain,
}  # fmt: skip


def measure_translation(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all sentences after a few words of some as warm-up, and the outputs; ours also without the patch."""
    case = Case(*task["case"])
    scene, asked = scene_of(case), ask(case)
    ((_, edits),) = parts_of(scene, chosen_features(case)[:1])
    translate = TRANSLATE[task["way"]]
    translate(scene, Asked(asked.prefix, asked.rows[:4], asked.length[:4], asked.stops), edits, 3)
    start = time.perf_counter()
    outputs = translate(scene, asked, edits, case.new_tokens)
    seconds = time.perf_counter() - start
    unpatched = translate(scene, asked, {}, case.new_tokens) if task["way"] == "ours" else []
    return {"seconds": seconds, "outputs": outputs, "unpatched": unpatched, "words": f"{seconds:.3g} s"}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One way of one thing."""
    import torch

    from glottoscope.sae.matmul import enable_fast_matmul

    torch.set_num_threads(task["threads"])
    enable_fast_matmul()
    return measure_translation(task) if task["kind"] == "translation" else measure_losses(task)


# The page

Records = list[dict[str, Any]]


def jobs_of(options: Options) -> list[Job]:
    """All measurements, the two that are compared one after the other."""
    jobs = []
    for name, case in cases_of(options).items():
        for threads in options.thread_counts:
            tasks = {
                f"{kind}/{name}/t{threads}/{way}": {"kind": kind, "way": way, "times": 1, "conditions": case.conditions}
                for kind in ("losses", "translation")
                for way in WAYS
            }
            for times in (1, 2):
                tasks[f"memory/{name}/t{threads}/x{times}"] = {"kind": "memory", "way": "ours", "times": times, "conditions": 2}
            for measurement, task in tasks.items():
                if options.selects("intervention", measurement):
                    task |= {"case": case, "threads": threads}
                    weight = 0.3 if task["kind"] == "memory" else 3.0 if task["way"] == "plain" else 1.0
                    job_name = f"intervention/{measurement}"
                    jobs.append(python_job(job_name, "intervention.py", task, weight=weight, rounds=options.rounds))
    return jobs


def cases_of(options: Options) -> dict[str, Case]:
    return QUICK_CASES if options.quick else CASES


def run(options: Options) -> Section:
    """Seconds of both ways, their ratio, and whether they agree; the peak of ours against the size of the text."""
    jobs = jobs_of(options)
    results = interleave(jobs, options, Progress(jobs))
    cases = cases_of(options)
    losses, memory, translations, verdicts = [], [], [], []
    for name, case in cases.items():
        for threads in options.thread_counts:
            about, where = [str(case), str(threads)], f"{name}/t{threads}"
            ours, plain = (results.get(f"intervention/losses/{where}/{way}", []) for way in WAYS)
            if ours or plain:
                peaks = [cell(records, "peak", 1 / MB) for records in (ours, plain)]
                losses.append([*about, *times(ours, plain), *difference(ours, plain), *peaks])
            ours, plain = (results.get(f"intervention/translation/{where}/{way}", []) for way in WAYS)
            if ours or plain:
                translations.append([*about, *times(ours, plain), *outputs(ours, plain, case)])
            once, twice = (results.get(f"intervention/memory/{where}/x{n}", []) for n in (1, 2))
            growth = ratio(twice, once, "peak")
            if once or twice:
                sizes = [
                    cell(records, key, unit) for records in (once, twice) for key, unit in (("positions", 1), ("peak", 1 / MB))
                ]
                memory.append([*about, *sizes, "" if growth is None else f"{growth:.2f} x"])
            target = f"losses, {case}: peak memory with twice the text <= {GROWTH} x"
            verdicts.append(Verdict(target, threads, growth, GROWTH, at_least=False))
    for record in (record for records in results.values() for record in records):
        for key in ("losses", "outputs", "unpatched"):
            record.pop(key, None)  # compared above, and too long to keep
    sizes = "; ".join(f"{c}: {c.tokens:,} tokens, {c.conditions} conditions, {c.sentences} sentences, SAE of {c.n:,} features, "
                      f"{c.k} active" for c in cases.values())  # fmt: skip
    about, seconds = ("", "threads"), tuple(WAYS.values())
    markdown = (
        "Llamas with random weights, drawn larger than usual so that every output depends on the text before it. The middle layer "
        "is patched: a random third of the features of the donor's SAE, at the base's norm. Plain Hugging Face gets the same "
        f"batches, sorted by length, and the same SAE code. {sizes}.\n\n"
        f"Seconds per condition, in windows of {WINDOW} tokens, stride {STRIDE}, {BATCH} a batch. Difference: the largest of any "
        "document's loss under any condition, in nats per token; spread: how far the conditions lie apart, median over documents. "
        "Peak: above what the process held after one batch.\n\n"
    )
    header = (*about, *seconds, "faster by", "difference", "spread", *(f"peak MB, {way}" for way in seconds))
    markdown += table(header, losses) + "\n\n"
    markdown += "Peak memory of `measure` with two conditions, on a text and on twice that text.\n\n"
    header = (*about, "positions", "peak MB", "positions", "peak MB", "grows by")
    markdown += table(header, memory) + "\n\n"
    markdown += (
        f"Seconds for all sentences: prompts of {SHARED} shared tokens and {QUERY[0]} to {QUERY[1]} of their own, {PROMPTS} a batch, "
        f"one donor and one part. One token id in {ENDS} ends an output.\n\n"
    )
    header = (
        *about, *seconds, "faster by", "identical outputs", "tokens an output", "at most", "different outputs",
        "pairs of tokens not repeated", "changed by the patch",
    )  # fmt: skip
    return Section("Interventions", markdown + table(header, translations), {"measurements": results}, verdicts)


def cell(records: Records, key: str, unit: float = 1.0) -> str:
    """Median over rounds, or why there is none."""
    value = median_of(records, key)
    if value is None:
        return f"failed: {records[-1]['error']}" if records and "error" in records[-1] else ""
    return f"{value * unit:,.0f}" if key in ("peak", "positions") else f"{value:.3g}"


def ratio(above: Records, below: Records, key: str) -> float | None:
    """Of medians; None where one is missing."""
    a, b = median_of(above, key), median_of(below, key)
    return a / b if a is not None and b else None


def times(ours: Records, plain: Records) -> list[str]:
    """Both ways' seconds, and their ratio with its range over rounds."""
    of_rounds = [b["seconds"] / a["seconds"] for a, b in together(ours, plain)]
    median = ratio(plain, ours, "seconds")
    words = "" if median is None else f"{median:.2f} x"
    if len(of_rounds) > 1:
        words += f" ({min(of_rounds):.2f}-{max(of_rounds):.2f})"
    return [cell(ours, "seconds"), cell(plain, "seconds"), words]


def together(ours: Records, plain: Records) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Records of the same rounds, of those that did not fail."""
    return [(a, b) for a, b in zip(ours, plain, strict=False) if "error" not in a and "error" not in b]


def difference(ours: Records, plain: Records) -> list[str]:
    """Largest difference of the losses, and how far the conditions lie apart."""
    pairs = [np.array([a["losses"], b["losses"]]) for a, b in together(ours, plain)]
    if not pairs:
        return ["", ""]
    largest = max(float(np.abs(own - other).max()) for own, other in pairs)
    return [f"{largest:.1e}" + ("" if largest <= SAME else " **DIFFER**"), f"{np.median(np.ptp(pairs[0][0], axis=0)):.2g}"]


def outputs(ours: Records, plain: Records, case: Case) -> list[str]:
    """Share of identical outputs, and what shows that they are not trivial."""
    pairs = together(ours, plain)
    if not pairs:
        return [""] * 6
    same = np.mean([own == other for a, b in pairs for own, other in zip(a["outputs"], b["outputs"], strict=True)])
    found = pairs[0][0]["outputs"]
    bigrams = [list(zip(output, output[1:], strict=False)) for output in found]
    fresh = sum(len(set(b)) for b in bigrams) / max(1, sum(map(len, bigrams)))
    changed = np.mean([own != other for own, other in zip(found, pairs[0][0]["unpatched"], strict=True)])
    length = np.mean([len(output) for output in found])
    return [
        f"{same:.1%}", f"{length:.1f}", str(case.new_tokens), f"{len(set(map(tuple, found))) / len(found):.0%}", f"{fresh:.0%}",
        f"{changed:.0%}",
    ]  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
