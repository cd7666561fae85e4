"""One measurement of the section `intervention`: losses or translations, by glottoscope or by plain Hugging Face.

    python benchmarks/intervention_ways.py '{"kind": "losses", "way": "plain", "case": [128, 4, ...], "threads": 1, ...}'

Shape legend: B sequences, T positions, D d_model, N features, V vocabulary, M scored targets, S conditions, U units.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from harness import MB, peak_memory, reset_peak
from intervention import BATCH, ENDS, PROMPTS, QUERY, SHARED, STRIDE, WINDOW, Case
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from glottoscope.intervention.conditions import Condition, Readers, edits_of
from glottoscope.intervention.generation import greedy
from glottoscope.intervention.parts import Injection
from glottoscope.intervention.perplexity import Windows, measure, windows
from glottoscope.lm.patch import Donor, patched
from glottoscope.sae.matmul import enable_fast_matmul
from glottoscope.sae.model import TopKSAE

ALPHA = 0.5
PAD, BOS = 0, 1
SPECIAL = (PAD, BOS)
Pair = tuple[Condition, dict[int, Injection]]


class Scene(NamedTuple):
    """What both ways are given."""

    case: Case
    base: LlamaForCausalLM
    donor: LlamaForCausalLM
    sae: TopKSAE


def scene_of(case: Case) -> Scene:
    """Models and SAE of a case, always the same."""
    return Scene(case, random_llama(case, 0), random_llama(case, 1), TopKSAE(case.d, case.n, case.k))


def random_llama(case: Case, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, large enough that its outputs depend on all of the text.

    With the usual ones (standard deviation 0.02) every token is about as likely as every other.
    """
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


def chosen_features(case: Case) -> NDArray[np.bool_]:
    """bool [S, N]: a random third of the features for every condition."""
    return np.random.default_rng(1).random((case.conditions, case.n)) < 1 / 3


def parts_of(scene: Scene, chosen_SN: NDArray[np.bool_]) -> list[Pair]:
    """One condition, with its edit, for every row of `chosen_SN`."""
    layer = scene.case.layer
    readers = {layer: Readers.of(scene.sae, None)}
    names = [f"features {i}" for i in range(len(chosen_SN))]
    sets = {layer: dict(zip(names, chosen_SN, strict=True))}
    conditions = [Condition("part", name, alpha=ALPHA, features=name) for name in names]
    return [(c, edits_of(c, readers, sets, "add", "matched")) for c in conditions]


# Losses


def text_of(case: Case, times: int) -> Windows:
    """Windows of random documents of 100 to 500 tokens; `times` copies of them."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := case.tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.integers(100, 500))))
    tokens = rng.integers(len(SPECIAL), case.vocabulary, case.tokens)
    return windows(np.tile(tokens, times), np.tile(lengths, times), window=WINDOW, stride=STRIDE, bos_id=BOS)


def losses_ours(scene: Scene, text: Windows, chosen_SN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Nats per token of every unit under every condition [S, U]."""
    parts = parts_of(scene, chosen_SN)
    found = measure(scene.base, scene.donor, text, parts, [scene.case.layer], special_ids=SPECIAL, batch=BATCH)
    return found.nll / found.tokens


def losses_plain(scene: Scene, text: Windows, chosen_SN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The same [S, U], every condition for itself."""
    donor: Any = scene.donor.model
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
    """[B, T, V] of the base model, with the chosen features of the donor, which ends at the layer."""
    arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": real_BT.long(), "use_cache": False}

    def patch(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
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
    order = np.argsort(text.length, kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        place = np.arange(int(text.length[rows].max()))
        ids = torch.from_numpy(text.tokens[rows, : len(place)].astype(np.int64))
        real, scored = place < text.length[rows][:, None], place >= text.first[rows][:, None]
        unit = torch.from_numpy(text.unit[rows])[:, None].expand(ids.shape)
        yield ids, torch.from_numpy(real), torch.from_numpy(scored), unit


def measure_losses(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds per condition, the losses, and the peak above what the process held after reading a window as warm-up."""
    case = Case(*task["case"])
    scene, text, chosen_SN = scene_of(case), text_of(case, task["times"]), chosen_features(case)[: task["conditions"]]
    losses = losses_ours if task["way"] == "ours" else losses_plain
    losses(scene, Windows(text.tokens[:1], text.length[:1], text.first[:1], text.unit[:1]), chosen_SN[:1])
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
    return greedy(
        scene.base, asked.prefix, asked.rows, asked.length, max_new_tokens=new_tokens, stop_ids=asked.stops, batch=PROMPTS,
        edits=edits, donor=scene.donor, special_ids=SPECIAL,
    )  # fmt: skip


def translate_plain(scene: Scene, asked: Asked, edits: dict[int, Injection], new_tokens: int) -> list[list[int]]:
    """The same by `generate`, with the batches that `greedy` makes."""
    base: Any = scene.base
    result: list[list[int]] = [[] for _ in asked.rows]
    order = np.argsort(asked.length, kind="stable")
    for start in range(0, len(order), PROMPTS):
        chosen = order[start : start + PROMPTS].tolist()
        prompts = [asked.prefix + asked.rows[i, -asked.length[i] :].tolist() for i in chosen]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with patched(base, edits, special_ids=SPECIAL, donor=Donor(scene.donor, list(edits))):
            whole = base.generate(
                ids, attention_mask=real, do_sample=False, num_beams=1, max_new_tokens=new_tokens, pad_token_id=PAD,
                eos_token_id=asked.stops,
            )  # fmt: skip
        for i, new in zip(chosen, whole[:, longest:].tolist(), strict=True):
            ends = (place for place, token in enumerate(new) if token in asked.stops)
            result[i] = new[: next(ends, len(new))]
    return result


def measure_translation(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all sentences after a few words of some as warm-up, and the outputs; ours also without the patch."""
    case = Case(*task["case"])
    scene, asked = scene_of(case), ask(case)
    ((_, edits),) = parts_of(scene, chosen_features(case)[:1])
    translate = translate_ours if task["way"] == "ours" else translate_plain
    translate(scene, Asked(asked.prefix, asked.rows[:4], asked.length[:4], asked.stops), edits, 3)
    start = time.perf_counter()
    outputs = translate(scene, asked, edits, case.new_tokens)
    seconds = time.perf_counter() - start
    unpatched = translate(scene, asked, {}, case.new_tokens) if task["way"] == "ours" else []
    return {"seconds": seconds, "outputs": outputs, "unpatched": unpatched, "words": f"{seconds:.3g} s"}


def main(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    enable_fast_matmul()
    return measure_translation(task) if task["kind"] == "translation" else measure_losses(task)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
