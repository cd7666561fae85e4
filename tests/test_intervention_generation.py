"""Greedy decoding with a patched model: equal to a loop without caches and batches, and to Hugging Face's own.

Shapes: R rows, T positions, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_intervention_parts import WEIGHT, sae_of
from test_lm_patch import BOS, PAD, SPECIAL, grouped, logits_of, model_of, no_hooks
from transformers import PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.intervention.generation import greedy
from glottoscope.intervention.parts import Injection, Reader
from glottoscope.lm.layers import decoder_blocks
from glottoscope.lm.llama_pass import knows
from glottoscope.lm.patch import Donor, patched

NEW = 6
PREFIX = [BOS, 11, 2, 30]  # with a special token within
LENGTHS = (3, 1, 6, 4, 6, 2, 5, 3)


@cache
def lively(kind: str, seed: int) -> PreTrainedModel:
    """A random model that does not write one token again and again: a head of its own, and nothing that favours a token."""
    model: Any = deepcopy(grouped(seed) if kind == "grouped" else model_of(kind, seed))
    head = torch.randn(50, 16, generator=torch.Generator().manual_seed(seed))
    model.set_output_embeddings(torch.nn.Linear(16, 50, bias=False))
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    for name, parameter in model.base_model.named_parameters():
        if name in ("ln_f.bias", "final_layer_norm.bias"):
            parameter.data.zero_()
    return model.eval()


def pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return lively(kind, 0), lively(kind, 1)


def texts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, 50, n).tolist() for n in LENGTHS]


def padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    length = np.array([len(row) for row in rows])
    result = np.full((len(rows), length.max()), PAD)
    for i, row in enumerate(rows):
        result[i, len(result[i]) - len(row) :] = row
    return result, length


def injection(layer: int, **changed: Any) -> Injection:
    return Injection(Reader(sae_of()), layer, own=Reader(sae_of()), **{"weight_N": WEIGHT, "alpha": 0.8, **changed})


EDITS: dict[str, Callable[[], dict[int, Injection]]] = {
    "nothing": dict,
    "part": lambda: {2: injection(2)},
    "replace at two layers": lambda: {layer: injection(layer, mode="replace") for layer in (1, 3)},
    "layer 0": lambda: {0: injection(0, scale="raw")},
    "own part": lambda: {1: injection(1, kind="self")},
    "reconstruction": lambda: {3: injection(3, kind="reconstruction", weight_N=None)},
}


@cache
def without_a_cache(kind: str, edits: str) -> list[list[int]]:
    """One row at a time; base and donor read all of it again for every new token."""
    base, donor = pair(kind)
    found, result = EDITS[edits](), []
    with patched(base, found, special_ids=SPECIAL, donor=Donor(donor, list(found)) if found else None):
        for text in texts():
            ids = PREFIX + text
            for _ in range(NEW):
                ids.append(int(logits_of(base, torch.tensor([ids]))[0, -1].argmax()))
            result.append(ids[-NEW:])
    return result


def cut(outputs: Iterable[list[int]], stops: Iterable[int]) -> list[list[int]]:
    return [row[: next((i for i, token in enumerate(row) if token in set(stops)), len(row))] for row in outputs]


def some_stops(outputs: list[list[int]]) -> list[set[int]]:
    """Sets of tokens at which rows end: none, one token, some early and late, and many."""
    return [set(), {outputs[2][1]}, {outputs[0][0], outputs[4][3]}, {row[2] for row in outputs[:5]}]


# (stops, batch, prefix shared): every two of them meet.
RUNS = [(0, 3, True), (0, 100, False), (1, 1, False), (1, 100, True), (2, 1, True), (2, 3, False), (3, 3, True), (3, 100, False)]


@pytest.mark.parametrize(("kind", "edits"), [
    *((kind, edits) for kind in ("llama", "gpt2") for edits in EDITS), ("grouped", "part"), ("gpt_neox", "replace at two layers"),
])  # fmt: skip
def test_greedy_equals_a_loop_without_a_cache(kind: str, edits: str) -> None:
    base, donor = pair(kind)
    expected = without_a_cache(kind, edits)
    assert knows(base) == (kind in ("llama", "grouped"))
    stops = some_stops(expected)
    for which, batch, shared in RUNS:
        rows, length = padded(texts() if shared else [PREFIX + text for text in texts()])
        found = greedy(
            base, PREFIX if shared else [], rows, length, max_new_tokens=NEW, stop_ids=stops[which], batch=batch,
            edits=EDITS[edits](), donor=donor, special_ids=SPECIAL,
        )  # fmt: skip
        assert found == cut(expected, stops[which])
    assert no_hooks(base) and no_hooks(donor)


def test_the_edits_matter_and_rows_end_at_unlike_times() -> None:
    for kind in ("llama", "gpt2"):
        outputs = [without_a_cache(kind, edits) for edits in EDITS]
        assert len({str(output) for output in outputs}) == len(outputs)
        for found in outputs:
            ends = [len(row) for stops in some_stops(found) for row in cut(found, stops)]
            assert {0, 1, NEW} <= set(ends) and len(set(ends)) > 3


@pytest.mark.parametrize("edits", ["part", "replace at two layers", "layer 0"])
def test_a_llama_with_hooks_of_others_is_read_through_them(edits: str) -> None:
    base, donor = pair("llama")
    expected, (rows, length) = without_a_cache("llama", edits), padded(texts())
    seen: list[int] = []
    handle = decoder_blocks(donor)[0].register_forward_hook(lambda _module, _args, output: seen.append(output.shape[1]))
    try:
        arguments: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": {expected[0][2]}, "batch": 3, "special_ids": SPECIAL}
        found = greedy(base, PREFIX, rows, length, edits=EDITS[edits](), donor=donor, **arguments)
    finally:
        handle.remove()
    assert found == cut(expected, {expected[0][2]})
    assert bool(seen) == (edits != "layer 0")  # what enters the first block is known without it


@pytest.mark.parametrize("edits", ["nothing", "part", "replace at two layers", "layer 0"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hugging_face_generates_the_same_within_a_patch(kind: str, edits: str) -> None:
    base, donor = pair(kind)
    expected, found = without_a_cache(kind, edits), EDITS[edits]()
    rows, length = padded([PREFIX + text for text in texts()])
    ids = torch.from_numpy(rows)
    mask = torch.from_numpy((np.arange(rows.shape[1]) >= rows.shape[1] - length[:, None]).astype(np.int64))
    stops = {expected[0][2], expected[3][4]}
    generate: Any = base.generate
    with patched(base, found, special_ids=SPECIAL, donor=Donor(donor, list(found)) if found else None):
        for use_cache in (True, False, True):  # a new generation begins anew
            output = generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=sorted(stops),
                pad_token_id=PAD, use_cache=use_cache,
            )  # fmt: skip
            assert cut(output[:, rows.shape[1] :].tolist(), stops) == cut(expected, stops)
    assert no_hooks(base)


def test_several_samples_of_a_prompt_are_read_by_the_donor_as_well() -> None:
    """`generate` repeats the rows before it reads them: sampling all but greedily gives every sample the greedy text."""
    base, donor = pair("gpt2")
    expected = without_a_cache("gpt2", "part")[:2]
    rows, length = padded([PREFIX + text for text in texts()[:2]])
    mask = torch.from_numpy((np.arange(rows.shape[1]) >= rows.shape[1] - length[:, None]).astype(np.int64))
    with patched(base, EDITS["part"](), special_ids=SPECIAL, donor=Donor(donor, [2])):
        generate: Any = base.generate
        output = generate(
            input_ids=torch.from_numpy(rows), attention_mask=mask, do_sample=True, temperature=1e-4, num_return_sequences=3,
            max_new_tokens=NEW, eos_token_id=None, pad_token_id=PAD,
        )  # fmt: skip
    assert output[:, rows.shape[1] :].tolist() == [row for row in expected for _ in range(3)]


def sizes(lengths: list[int]) -> list[int]:
    """Rows that every step reads: once a quarter of them have ended, only the others; none after all have."""
    result = [len(lengths)]
    for n in range(NEW - 1):
        if not (going := sum(length > n for length in lengths)):
            break
        result.append(going if going <= 0.75 * result[-1] else result[-1])
    return result


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_is_read_after_the_last_row_has_ended(kind: str) -> None:
    """A row that has ended and is still carried along may go on for ever: nobody waits for it."""
    base, _ = pair(kind)
    outputs, (rows, length) = without_a_cache(kind, "nothing"), padded(texts())
    steps: list[int] = []
    head = base.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_hook(lambda _module, _args, output: steps.append(len(output)))
    try:
        for stops in ({a, b} for a in {row[0] for row in outputs} for b in {row[1] for row in outputs}):
            steps.clear()
            found = greedy(base, PREFIX, rows, length, max_new_tokens=NEW, stop_ids=stops, batch=len(rows))
            assert found == cut(outputs, stops)
            assert steps == sizes([len(row) for row in found])
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_that_is_its_own_donor_writes_what_it_would_have_written(kind: str) -> None:
    base, _ = pair(kind)
    rows, length = padded(texts())
    for name in ("replace at two layers", "nothing"):
        found = greedy(
            base, PREFIX, rows, length, max_new_tokens=NEW, stop_ids=(), batch=3, edits=EDITS[name](), donor=base,
            special_ids=SPECIAL,
        )  # fmt: skip
        assert found == without_a_cache(kind, "nothing")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_keeps_the_token_that_is_its_last(kind: str) -> None:
    base, donor = pair(kind)
    expected, (rows, length) = without_a_cache(kind, "part"), padded(texts())
    for stops, lasts in ((some_stops(expected)[1], some_stops(expected)[2]), (set(), some_stops(expected)[3])):
        for batch in (1, 3, 100):
            found = greedy(
                base, PREFIX, rows, length, max_new_tokens=NEW, stop_ids=stops, last_ids=lasts, batch=batch,
                edits=EDITS["part"](), donor=donor, special_ids=SPECIAL,
            )  # fmt: skip
            kept = [row[: len(short) + 1] for row, short in zip(expected, cut(expected, lasts), strict=True)]
            assert found == cut(kept, stops)
            assert any(row and row[-1] in lasts and len(row) < NEW for row in found)


@pytest.mark.parametrize("edits", ["part", "replace at two layers", "own part"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_added_norm_is_that_of_what_every_row_reads_whatever_the_batch(kind: str, edits: str) -> None:
    """By hand: a pass of each prompt with what was written, up to the token that ended the row."""
    base, donor = pair(kind)
    expected = without_a_cache(kind, edits)
    stops = some_stops(expected)[2]
    outputs, by_hand = cut(expected, stops), EDITS[edits]()
    with patched(base, by_hand, special_ids=SPECIAL, donor=Donor(donor, list(by_hand))):
        for text, output in zip(texts(), outputs, strict=True):
            # The last of the longest outputs is written and not read.
            logits_of(base, torch.tensor([PREFIX + text + output[: NEW - 1]]))
    for batch, shared in ((1, True), (3, True), (100, True), (3, False)):
        rows, length = padded(texts() if shared else [PREFIX + text for text in texts()])
        found = EDITS[edits]()
        greedy(
            base, PREFIX if shared else [], rows, length, max_new_tokens=NEW, stop_ids=stops, batch=batch, edits=found,
            donor=donor, special_ids=SPECIAL,
        )  # fmt: skip
        for layer, edit in found.items():
            assert edit.positions == by_hand[layer].positions
            assert edit.added == pytest.approx(by_hand[layer].added, rel=1e-4)


def test_progress_is_reported_in_rows() -> None:
    base, _ = pair("llama")
    rows, length = padded(texts())
    reports: list[tuple[float, float, str]] = []
    greedy(base, PREFIX, rows, length, max_new_tokens=1, stop_ids=(), batch=3, report=lambda *report: reports.append(report))
    assert reports == [(n, 8, "sentences") for n in (3, 6, 8)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_greedy_refuses(kind: str) -> None:
    base, donor = pair(kind)
    rows, length = padded(texts())

    def run(edits: Mapping[int, Injection]) -> None:
        greedy(base, PREFIX, rows, length, max_new_tokens=1, stop_ids=(), batch=3, edits=edits, donor=donor)

    for layer in (4, -1):
        with pytest.raises(InputError, match=rf"layer {layer} does not exist: the model has 3 layers, use 0\.\.3"):
            run({layer: injection(layer)})
    with pytest.raises(InputError, match="the SAE reads states of width 24, the model's have width 16"):
        run({2: Injection(Reader(sae_of(width=24)), 2, weight_N=WEIGHT)})
    assert no_hooks(base)
