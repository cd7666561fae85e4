"""Batches of like length, the loss from the pass that collects features, and units for idle workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_fixture import planted, run

from glottoscope.corpus.tokens import PADDING, TokenBlocks, attention_mask, position_mask
from glottoscope.lm.losses import lm_loss
from glottoscope.study.runner import stages
from glottoscope.study.stages.context import BUCKET, Context, bucketed
from glottoscope.study.stages.passes import LMLosses, positions
from glottoscope.study.store import RunStore


def blocks_of(lengths: list[int], width: int) -> TokenBlocks:
    language = np.full((len(lengths), width), PADDING, np.uint8)
    for row, length in enumerate(lengths):
        language[row, :length] = row % 2
    tokens = np.arange(len(lengths) * width, dtype=np.uint32).reshape(len(lengths), width)
    return TokenBlocks(tokens, language, *(np.zeros_like(tokens) for _ in range(len(TokenBlocks._fields) - 2)))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_bucketed_batches_hold_every_block_once_and_every_real_token(size: int) -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(0, 21, 150).tolist(), 0, 20]  # two of them without a token, or full
    blocks, order = blocks_of(lengths, 20), rng.permutation(152)
    found = list(bucketed(blocks, order, size))
    assert np.array_equal(np.sort(np.concatenate([b.rows for b in found])), np.arange(152))
    windows = np.concatenate([b.rows for b in found])
    for start in range(0, 152, size * BUCKET):  # blocks move within a few batches only
        assert set(windows[start : start + size * BUCKET]) == set(order[start : start + size * BUCKET])
    padding = 0
    for batch in found:
        width = batch.tokens.shape[1]
        assert np.array_equal(batch.tokens, blocks.tokens[batch.rows, :width])
        assert np.array_equal(batch.language, blocks.language[batch.rows, :width])
        assert (blocks.language[batch.rows, width:] == PADDING).all()
        padding += int((batch.language == PADDING).sum())
    everything = int((blocks.language == PADDING).sum())
    assert padding < everything if size > 1 else padding <= lengths.count(0)


@pytest.fixture(scope="module")
def tokens_made(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return run(planted(), tmp_path_factory.mktemp("passes") / "run", until="tokens")


def test_the_loss_of_the_collecting_pass_is_that_of_a_pass_of_its_own(tokens_made: RunStore) -> None:
    context = Context.open(tokens_made.root)
    cell, blocks = context.cell_of("m", 20), context.blocks("test")
    width, languages = blocks.tokens.shape[1], context.token_info.languages
    wanted = 27  # not a multiple of the batch
    context.study = context.study.model_copy(
        update={
            "features": context.study.features.model_copy(update={"lm_loss_tokens": wanted * width}),
            "compute": context.study.compute.model_copy(update={"lm_batch": 8}),
        }
    )
    lm: Any = context.load_lm(cell)
    losses = LMLosses(context, lm, blocks)
    for _ in positions(context, lm, cell, blocks, (1,), np.arange(len(blocks.tokens)), losses):
        pass
    tokens, language = np.asarray(blocks.tokens[:wanted]), np.asarray(blocks.language[:wanted])
    mask, attention = position_mask(tokens, language, context.token_info.special_ids), attention_mask(language)
    arrays = (tokens.astype(np.int64), attention.astype(np.int64), mask, np.where(attention, language, 0).astype(np.int64))
    ids, attended, counted, code = (torch.from_numpy(a) for a in arrays)
    nll, n = lm_loss(lm, ids, attended, counted, code, len(languages))
    result = losses.result()
    for g, name in enumerate(languages):
        assert result[f"lm_loss_{name}"] == pytest.approx(nll[g] / n[g], rel=1e-5)


@pytest.mark.parametrize(("workers", "units"), [(1, 2), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_idle_workers_get_layers_of_their_own(tokens_made: RunStore, workers: int, units: int) -> None:
    """Two cells of two layers: shared out only where every part finds a worker."""
    context = Context.open(tokens_made.root)
    made = [unit for stage, list_units in stages(context, float("inf"), workers) if stage == "train" for unit in list_units()]
    assert len(made) == units
    layers = [(u.arguments[2], layer) for u in made for layer in u.arguments[3]]
    assert sorted(layers) == [(step, layer) for step in (0, 20) for layer in (0, 1)]


def test_shared_out_layers_give_the_same_tables(tokens_made: RunStore, tmp_path: Path) -> None:
    one = run(planted(), tmp_path / "one", until="score", workers=1)
    four = run(planted(), tmp_path / "four", until="score", workers=4)
    for name in ("features", "evolution"):
        assert one.table(name).equals(four.table(name))
