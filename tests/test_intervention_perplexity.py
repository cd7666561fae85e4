"""Losses under many conditions: equal to a plain Hugging Face loss and to one sequence at a time, whatever the batches.

Shapes: W windows, T positions, U units, S conditions, V vocabulary, N features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_intervention_parts import ACTIVE, FEATURES, WEIGHT, sae_of
from test_lm_patch import BOS, SPECIAL, logits_of, model_of, no_hooks, rows_of
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.intervention.conditions import Condition, Readers, edits_of
from glottoscope.intervention.parts import Injection, Mode, Reader
from glottoscope.intervention.perplexity import Windows, describe, masses, mean_norm, measure, other_windows, windows
from glottoscope.lm.capture import capture
from glottoscope.lm.losses import lm_loss
from glottoscope.lm.patch import Donor, Step, counted_positions, patched

# Windows


def cut_by_hand(text: list[int], window: int, stride: int, bos: int | None) -> list[tuple[list[int], int]]:
    """(ids, first place scored) of every window of one text."""
    prefix, start, done, result = [] if bos is None else [bos], 0, 0, []
    while True:
        piece = text[start : start + window - len(prefix)]
        first = done - start + len(prefix)
        result.append((prefix + piece, max(first, 1)))
        done = start + len(piece)
        if done == len(text):
            return result
        start += stride


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_target_is_scored_once_with_the_context_stated(data: st.DataObject) -> None:
    bos = data.draw(st.sampled_from([None, BOS]))
    window = data.draw(st.integers(2 if bos is None else 3, 12))
    stride = data.draw(st.integers(1, window - 1))
    lengths = data.draw(st.lists(st.integers(1, 40), max_size=6))
    tokens = np.arange(100, 100 + sum(lengths), dtype=np.uint32)  # every token tells its place
    texts = [x.tolist() for x in np.split(tokens, np.cumsum(lengths)[:-1])] if lengths else []
    found = windows(tokens, np.array(lengths), window=window, stride=stride, bos_id=bos)
    rows = [(unit, *row) for unit, text in enumerate(texts) for row in cut_by_hand(text, window, stride, bos)]
    assert found.tokens.dtype == np.uint32 and len(found.tokens) == len(rows)
    scored: Counter[int] = Counter()
    for i, (unit, ids, first) in enumerate(rows):
        assert found.unit[i] == unit and found.length[i] == len(ids) <= window and found.first[i] == first
        assert found.tokens[i, : len(ids)].tolist() == ids and not found.tokens[i, len(ids) :].any()
        for place in range(first, len(ids)):
            scored[ids[place]] += 1
            # The text's own tokens before it in this window: all there are, or what windows overlap by.
            own = place - (bos is not None)
            assert own >= min(ids[place] - texts[unit][0], window - (bos is not None) - stride)
    expected = [token for text in texts for token in (text if bos is not None else text[1:])]
    assert scored == Counter(expected)


def test_windows_out_of_range() -> None:
    tokens, lengths = np.arange(10), np.array([10])
    for window, stride, bos, message in (
        (4, 0, None, "window = 4 and stride = 0: give a window of at least 2 tokens and a stride from 1 to 3"),
        # Without BOS the first token of a window has no prediction: it must be scored in the window before.
        (4, 4, None, "window = 4 and stride = 4: give a window of at least 2 tokens and a stride from 1 to 3"),
        (4, 4, BOS, "window = 4 and stride = 4: give a window of at least 3 tokens and a stride from 1 to 3"),
        (2, 1, BOS, "window = 2 and stride = 1: give a window of at least 3 tokens and a stride from 1 to 1"),
        (1, 1, None, "window = 1 and stride = 1: give a window of at least 2 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            windows(tokens, lengths, window=window, stride=stride, bos_id=bos)
    assert len(windows(tokens, lengths, window=4, stride=3, bos_id=None).tokens) == 3


# The baseline is a Hugging Face loss


def text_of(lengths: Sequence[int], seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.random.default_rng(seed).integers(3, 50, sum(lengths)), np.array(lengths)


BASELINE: list[tuple[Condition, Mapping[int, Injection]]] = [(Condition("baseline"), {})]


@torch.no_grad()
def hugging_face_loss(model: PreTrainedModel, ids: Sequence[int], first: int) -> float:
    """Sum in nats over the tokens from `first` on, by the model's own `labels`."""
    input_ids = torch.tensor([list(ids)], dtype=torch.long)
    labels = input_ids.clone()
    labels[0, :first] = -100
    return float(model(input_ids=input_ids, labels=labels).loss) * (len(ids) - first)


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmo2"])
def test_the_baseline_is_the_hugging_face_loss(kind: str, bos: int | None) -> None:
    model, prefix = model_of(kind), [] if bos is None else [bos]
    tokens, lengths = text_of([9, 20, 2, 13])
    whole = windows(tokens, lengths, window=22, stride=5, bos_id=bos)  # every text in one window
    short = windows(tokens, lengths, window=8, stride=3, bos_id=bos)
    texts = [x.tolist() for x in np.split(tokens, np.cumsum(lengths)[:-1])]
    expected = {
        "whole": [hugging_face_loss(model, prefix + text, 1) for text in texts],
        "short": [sum(hugging_face_loss(model, ids, first) for ids, first in cut_by_hand(t, 8, 3, bos)) for t in texts],
    }
    n_U = lengths - (bos is None)
    for name, cut in (("whole", whole), ("short", short)):
        for batch in (1, 3, 100):
            found = measure(model, None, cut, BASELINE, [2], special_ids=SPECIAL, batch=batch)
            assert found.tokens.tolist() == n_U.tolist() and np.isnan(mean_norm(found.added, found.positions)).all()
            np.testing.assert_allclose(found.nll[0] / n_U, np.array(expected[name]) / n_U, rtol=0, atol=1e-5)


def test_special_tokens_are_read_and_not_scored() -> None:
    model = model_of("llama")
    tokens, lengths = text_of([9, 5])
    tokens[4] = tokens[10] = 2
    cut = windows(tokens, lengths, window=12, stride=6, bos_id=BOS)
    found = measure(model, None, cut, BASELINE, [1], special_ids=SPECIAL, batch=2)
    assert found.tokens.tolist() == [8, 4]
    for unit, text in enumerate((tokens[:9], tokens[9:])):
        log_p = logits_of(model, torch.tensor([[BOS, *text]]))[0].log_softmax(-1)
        expected = -sum(float(log_p[t, token]) for t, token in enumerate(text) if token not in SPECIAL)
        assert found.nll[0, unit] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_side_of_the_padding_does_not_matter(kind: str) -> None:
    model, nothing = model_of(kind), torch.zeros(3, 9, dtype=torch.long)
    losses = []
    for side in ("left", "right"):
        ids, mask = rows_of((9, 4, 6), side)
        count = counted_positions(ids, mask, SPECIAL)
        row = torch.arange(3)[:, None].expand(3, 9)
        nll, n = lm_loss(model, ids, mask, count, row, 3)
        pooled, _ = lm_loss(model, ids, mask, count, nothing, 1)
        assert n.tolist() == [8, 3, 5] and pooled[0] == pytest.approx(nll.sum(), rel=1e-6)
        losses.append(nll / n)
        alone = [hugging_face_loss(model, ids[i][mask[i].bool()].tolist(), 1) for i in range(3)]
        np.testing.assert_allclose(nll / n, np.array(alone) / n, rtol=0, atol=1e-5)
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


# Every condition is the patched model's loss, one window at a time


def all_conditions(layers: Sequence[int], mode: Mode) -> list[tuple[Condition, dict[int, Injection]]]:
    readers = {layer: Readers.of(sae_of(), sae_of(seed=1)) for layer in layers}
    sets = {layer: {"mixed": WEIGHT.bool().numpy()} for layer in layers}
    conditions = [
        Condition("baseline"), Condition("donor"), Condition("identity"), Condition("part", "all", alpha=0.0),
        Condition("part", "mixed", alpha=0.5, features="mixed"), Condition("self", "mixed", alpha=0.5, features="mixed"),
        Condition("shuffled", "mixed", alpha=0.5, features="mixed"), Condition("part", "all", alpha=0.2),
        Condition("reconstruction"), Condition("state", alpha=0.5), Condition("state_replaced"),
    ]  # fmt: skip
    return [(c, edits_of(c, readers, sets, mode, "matched")) for c in conditions]


def places_by_hand(counted_T: list[bool], other_T: list[bool]) -> list[int]:
    """The j-th counted position takes the j-th of the other window, which starts again at its end."""
    theirs = [t for t, counted in enumerate(other_T) if counted]
    return [theirs[sum(counted_T[:t]) % len(theirs)] if counted else 0 for t, counted in enumerate(counted_T)]


def patched_loss(
    base: PreTrainedModel, donor: PreTrainedModel, cut: Windows, w: int, condition: Condition, edits: dict[int, Injection],
    other: int,
) -> float:  # fmt: skip
    """Sum over a window's scored tokens, from a pass of this window alone through the hooks."""
    ids, theirs = (torch.from_numpy(cut.tokens[i : i + 1, : cut.length[i]].astype(np.int64)) for i in (w, other))
    target = ids[0, 1:]
    scored = torch.tensor([t >= cut.first[w] and int(ids[0, t]) not in SPECIAL for t in range(1, len(ids[0]))])
    if condition.arm == "donor":
        logits = logits_of(donor, ids)
    elif condition.arm == "shuffled":
        counted, there = (counted_positions(x, torch.ones_like(x), SPECIAL) for x in (ids, theirs))
        source = torch.tensor([places_by_hand(counted[0].tolist(), there[0].tolist())])
        step = Step(ids, counted, capture(donor, theirs, torch.ones_like(theirs), list(edits)), source)
        with patched(base, {layer: lambda h, _, edit=edit: edit(h, step) for layer, edit in edits.items()}):
            logits = logits_of(base, ids)
    else:
        with patched(base, edits, special_ids=SPECIAL, donor=Donor(donor, list(edits))):
            logits = logits_of(base, ids)
    return float(F.cross_entropy(logits[0, :-1][scored], target[scored], reduction="sum")) if bool(scored.any()) else 0.0


WHERE: list[tuple[str, tuple[int, ...], Mode]] = [
    ("llama", (2,), "add"), ("llama", (0, 3), "replace"), ("llama", (1, 2), "add"), ("gpt2", (1,), "replace"),
    ("gpt2", (0, 2), "add"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "layers", "mode"), WHERE)
def test_conditions_equal_one_window_at_a_time_whatever_the_batch(kind: str, layers: tuple[int, ...], mode: Mode) -> None:
    base, donor = model_of(kind), model_of(kind, 1)
    tokens, lengths = text_of([9, 15, 2, 7])
    tokens[3] = 2
    cut = windows(tokens, lengths, window=10, stride=4, bos_id=BOS)
    other = other_windows(cut, np.array([0, 1, 0, 1]), seed=0)
    reference = all_conditions(layers, mode)
    expected, added, positions = np.zeros((3, len(reference), len(lengths)))
    for s, (condition, edits) in enumerate(reference):
        for w, unit in enumerate(cut.unit):
            before = [(e.added, e.positions) for e in edits.values()]
            expected[s, unit] += patched_loss(base, donor, cut, w, condition, edits, other[w])
            for (had, n), edit in zip(before, edits.values(), strict=True):
                added[s, unit] += edit.added - had
                positions[s, unit] += edit.positions - n
    assert len(set((added[4] / positions[4]).round(3))) == len(lengths)  # units differ in it
    for batch in (1, 3, 100):
        conditions = all_conditions(layers, mode)
        reports: list[tuple[float, float, str]] = []
        found = measure(
            base, donor, cut, conditions, layers, special_ids=SPECIAL, batch=batch, other_W=other,
            report=lambda *done, reports=reports: reports.append(done),
        )  # fmt: skip
        n_U = found.tokens
        assert n_U.tolist() == [8, 15, 2, 7]
        np.testing.assert_allclose(found.nll / n_U, expected / n_U, rtol=0, atol=2e-5)
        assert reports[-1] == (len(cut.unit), len(cut.unit), "11 conditions") and len(reports) == -(-len(cut.unit) // batch)
        by_arm = {(c.arm, c.part, c.alpha): s for s, (c, _) in enumerate(conditions)}
        baseline = found.nll[by_arm["baseline", None, None]]
        assert np.array_equal(found.nll[by_arm["part", "all", 0.0]], baseline)  # to the bit
        np.testing.assert_allclose(found.nll[by_arm["identity", None, None]] / n_U, baseline / n_U, rtol=0, atol=1e-5)
        assert abs(found.nll[4:].sum(1) - baseline.sum()).min() > 1e-3  # everything else changes something
        norm_S = mean_norm(found.added, found.positions)
        for s, (_, edits) in enumerate(reference):
            assert norm_S[s] == pytest.approx(
                sum(e.added for e in edits.values()) / sum(e.positions for e in edits.values()) if edits else np.nan,
                rel=1e-4, abs=1e-6, nan_ok=True,
            )  # fmt: skip
            np.testing.assert_allclose(found.added[s], added[s], rtol=1e-4, atol=1e-5)  # each unit's own
            assert found.positions[s].tolist() == positions[s].tolist()
    assert no_hooks(base) and no_hooks(donor)


def test_a_base_that_is_its_own_donor() -> None:
    base = model_of("llama")
    cut = windows(*text_of([9, 12]), window=10, stride=4, bos_id=BOS)
    for mode in ("add", "replace"):
        for _, edits in all_conditions([1, 2], mode)[4:5]:
            pairs = [*BASELINE, (Condition("part", "mixed", alpha=0.5), edits), (Condition("donor"), {})]
            found = measure(base, base, cut, pairs, [1, 2], special_ids=SPECIAL, batch=4)
            assert found.nll[2] == pytest.approx(found.nll[0], rel=1e-6)
            if mode == "replace":
                assert found.nll[1] == pytest.approx(found.nll[0], rel=1e-6) and found.added[1].sum() == pytest.approx(0, abs=1e-5)
            else:
                assert abs(found.nll[1] - found.nll[0]).min() > 1e-3


def test_a_loss_that_is_not_finite_names_the_condition() -> None:
    base, donor = model_of("llama"), model_of("llama", 1)
    cut = windows(*text_of([9]), window=10, stride=4, bos_id=BOS)
    edit = Injection(Reader(sae_of()), 1, "part", WEIGHT, 1e38)
    conditions = [*BASELINE, (Condition("part", "mixed", alpha=1e38), {1: edit})]
    with pytest.raises(InputError, match=r"^condition part mixed alpha 1e\+38: the loss is not finite; take a smaller alpha$"):
        measure(base, donor, cut, conditions, [1], special_ids=SPECIAL, batch=1)
    broken = Gemma2ForCausalLM(_gemma()).eval()
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"^condition baseline: the loss is not finite; check the model's weights$"):
        measure(broken, None, cut, BASELINE, [1], special_ids=SPECIAL, batch=1)
    with pytest.raises(InputError, match="Gemma2ForCausalLM changes its logits"):
        measure(Gemma2ForCausalLM(_gemma(final_logit_softcapping=30.0)), None, cut, BASELINE, [1], special_ids=SPECIAL, batch=1)
    with pytest.raises(InputError, match="Gemma2ForCausalLM changes its logits"):
        capped = Gemma2ForCausalLM(_gemma(final_logit_softcapping=30.0))
        measure(base, capped, cut, BASELINE, [1], special_ids=SPECIAL, batch=1)


def _gemma(final_logit_softcapping: float | None = None) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, final_logit_softcapping=final_logit_softcapping,
    )  # fmt: skip


def test_a_condition_in_words() -> None:
    assert describe(Condition("baseline")) == "baseline"
    assert describe(Condition("random", "mixed", draw=3, alpha=0.2)) == "random mixed draw 3 alpha 0.2"
    assert describe(Condition("random", "mixed", draw=0, alpha=0.0)) == "random mixed draw 0 alpha 0"


# Partners of the shuffled control


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=12), st.integers(0, 2**32))
def test_partners_are_of_the_same_language_and_of_another_text(units: list[tuple[int, int]], seed: int) -> None:
    unit_W = np.repeat(np.arange(len(units)), [n for _, n in units])
    language_U = np.array([language for language, _ in units])
    cut = Windows(np.zeros((len(unit_W), 3), np.uint32), np.full(len(unit_W), 3), np.ones(len(unit_W), np.int64), unit_W)
    other = other_windows(cut, language_U, seed)
    assert sorted(other) == list(range(len(unit_W)))  # each is taken once
    language_W = language_U[unit_W]
    assert (language_W[other] == language_W).all()
    for language in set(language_W.tolist()):
        mine = np.flatnonzero(language_W == language)
        if len(mine) == 1:
            assert other[mine[0]] == mine[0]
            continue
        assert (other[mine] != mine).all()
        # No text takes its own windows, or, where one text has more than half of them, as few as there can be.
        largest = np.bincount(unit_W[mine]).max()
        assert (unit_W[other[mine]] == unit_W[mine]).sum() == max(0, 2 * largest - len(mine))
    assert np.array_equal(other, other_windows(cut, language_U, seed))


def test_partners_are_drawn_by_the_seed() -> None:
    cut = windows(*text_of([5] * 30), window=10, stride=4, bos_id=BOS)
    drawn = {other_windows(cut, np.zeros(30, np.int64), seed).tobytes() for seed in range(5)}
    assert len(drawn) == 5


# Activation mass


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_masses_equal_a_loop(batch: int) -> None:
    donor, saes = model_of("llama"), {1: sae_of(), 3: sae_of("none", seed=2)}
    tokens, lengths = text_of([9, 12, 3])
    tokens[3] = 2
    cut = windows(tokens, lengths, window=10, stride=9, bos_id=BOS)  # no overlap: every position counts once
    expected = {layer: np.zeros(FEATURES) for layer in saes}
    for ids_T, length in zip(cut.tokens.astype(np.int64), cut.length, strict=True):
        ids = torch.from_numpy(ids_T[None, :length])
        states = capture(donor, ids, torch.ones_like(ids), list(saes))
        for layer, sae in saes.items():
            for t, token in enumerate(ids[0].tolist()):
                if token in SPECIAL:
                    continue
                z_N = torch.relu(sae.W_enc @ (_unit(states[layer][0, t], sae.normalization) - sae.b_dec) + sae.b_enc)
                for i in z_N.topk(ACTIVE).indices.tolist():
                    expected[layer][i] += float(z_N[i])
    found = masses(donor, cut, {layer: Reader(sae) for layer, sae in saes.items()}, special_ids=SPECIAL, batch=batch)
    assert list(found) == [1, 3]
    for layer in saes:
        assert found[layer].dtype == np.float64
        np.testing.assert_allclose(found[layer], expected[layer], rtol=1e-4, atol=1e-5)


def _unit(x_D: Tensor, normalization: str) -> Tensor:
    return x_D / x_D.norm() if normalization == "unit" else x_D
