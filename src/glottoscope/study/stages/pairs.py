"""Aligned sentences: which features fire in which sentence, phi with its null and controls, pairs to show, mean states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from glottoscope.corpus.tokens import (
    AlignedTokens,
    position_mask,
)
from glottoscope.features.bilingual import (
    firing_sentences,
    firing_threshold,
    length_strata,
    merge_firings,
    permute_sentences,
    phi,
    phi_null_exact,
    shift_to_next_sentence,
)
from glottoscope.features.collect import Collected, Examples
from glottoscope.features.pairs import firing_positions, strongest_pairs
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import Context, batches, hidden_states
from glottoscope.study.stages.passes import Collecting, Setup

SENTENCES = 256  # aligned sentences of one forward pass
SHOWN = 8  # pairs kept of a feature, for a reader to look at


def aligned_pass(
    context: Context, lm: Any, cell: Cell, pairs: AlignedTokens, layers: Sequence[int], which: str,
    setups: dict[Setup, Collecting], collected: dict[Setup, Collected], shown: dict[Setup, Examples],
    neutral: NDArray[np.bool_],
) -> dict[int, NDArray[np.float32]]:  # fmt: skip
    """Which features fire in which sentence (kept in the setups), and mean states: layer -> [2, P, D].

    Of the test sentences it is also kept where features with examples (`shown`) fire.
    """
    info, fraction = context.token_info, context.study.features.phi_firing
    n_pairs = pairs.tokens.shape[1]
    threshold = {key: firing_threshold(c.max_activation, fraction) for key, c in collected.items()}
    has_examples = {key: np.bincount(shown[key].feature, minlength=c.n_features) > 0 for key, c in collected.items()}
    means: dict[int, NDArray[np.float32]] = {}
    for side in (0, 1):
        # Sentences of like length share a batch, so that little of it is padding; the order changes no result.
        order = np.argsort(pairs.length[side], kind="stable")
        for rows in batches(order, SENTENCES):
            longest = int(pairs.length[side, rows].max())
            tokens = np.asarray(pairs.tokens[side, rows, :longest])
            attention = np.arange(longest) < pairs.length[side, rows][:, None]
            language = np.where(attention, np.uint8(side), np.uint8(255))
            mask = position_mask(tokens, language, info.special_ids)
            states = hidden_states(lm, tokens, attention, layers, cell)
            kept = torch.from_numpy(np.flatnonzero(mask))
            sentence = np.broadcast_to(rows[:, None], tokens.shape)[mask]
            t = np.broadcast_to(np.arange(longest), tokens.shape)[mask]
            counted = ~neutral[tokens[mask]]
            weight = torch.from_numpy(mask).to(next(iter(states.values())).device)[..., None]
            for layer, x_BTD in states.items():
                means.setdefault(layer, np.zeros((2, n_pairs, x_BTD.shape[2]), np.float32))
                mean_BD = torch.where(weight, x_BTD, 0.0).sum(1) / weight.sum(1).clamp_min(1)
                means[layer][side, rows] = mean_BD.cpu().numpy()
            for key, setup in setups.items():
                x_MD = states[key[0]].flatten(0, 1)
                values, indices = setup.sae.encode(x_MD.index_select(0, kept.to(x_MD.device)))
                fired = firing_positions(values.cpu().numpy(), indices.cpu().numpy(), sentence, t, threshold[key], counted)
                setup.firings.setdefault((which, side), []).append(firing_sentences(fired, len(threshold[key]), n_pairs))
                if which == "test":
                    setup.fired[side].append(fired.take(has_examples[key][fired.feature]))
    return means


def with_phi(context: Context, table: pa.Table, setup: Collecting, pairs: AlignedTokens, which: str) -> pa.Table:
    """Translation-pair consistency of every feature, its null and its controls; the test pairs carry the plain names."""
    a, b = (merge_firings(setup.firings[which, side]) for side in (0, 1))
    found = phi(a, b)
    null = phi_null_exact(a, b, length_strata(pairs.length[0], pairs.length[1]))
    suffix = "" if which == "test" else f"_{which}"
    columns: dict[str, Any] = {
        f"phi{suffix}": found.phi, f"phi_null{suffix}": null, f"n_pairs_a{suffix}": found.n_a,
        f"n_pairs_b{suffix}": found.n_b,
    }  # fmt: skip
    if which == "test":
        rng = np.random.default_rng(seed_for(context.study, "shuffled-pairs"))
        columns["phi_shuffled"] = phi(a, permute_sentences(b, rng)).phi
        columns["phi_next"] = phi(a, shift_to_next_sentence(b, pairs.article)).phi
    for name, values in columns.items():
        array = pa.array(values, from_pandas=True) if values.dtype.kind == "f" else pa.array(values)
        table = table.append_column(name, array)
    return table


def pairs_table(setup: Collecting) -> pa.Table:
    """The aligned test pairs that show a feature firing on both sides, with every position at which it does."""
    found = strongest_pairs(setup.fired, SHOWN)
    columns: dict[str, Any] = {"feature": found.feature, "rank": found.rank, "pair": found.pair}
    columns |= {f"value_{x}": side.value for x, side in zip("ab", found.sides, strict=True)}
    for x, side in zip("ab", found.sides, strict=True):
        offsets = pa.array(side.offsets.astype(np.int32))
        columns[f"at_{x}"] = pa.ListArray.from_arrays(offsets, pa.array(side.at))
        columns[f"level_{x}"] = pa.ListArray.from_arrays(offsets, pa.array(side.level))
    return pa.table(columns)
