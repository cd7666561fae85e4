"""Stage "train": one language model pass feeds the SAEs of all layers, learning rates and seeds of a cell."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from glottoscope.atomic import write_table
from glottoscope.corpus.tokens import TokenBlocks, attention_mask, position_mask
from glottoscope.errors import InputError, NonFiniteError
from glottoscope.lm.layers import embedding_module
from glottoscope.sae.model import TopKSAE
from glottoscope.sae.quality import QualityAccumulator
from glottoscope.sae.scratch import Scratch
from glottoscope.sae.stream import ShuffledActivations
from glottoscope.sae.trainer import SAETrainer
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import Context, bucketed, hidden_states
from glottoscope.study.stages.tokenizing import read_json

CURVE_POINTS = 200  # rows of a setup's loss curve

Trainers = dict[tuple[int, float, int], SAETrainer]  # (layer, learning rate, SAE seed)


def missing_layers(context: Context, cell: Cell, layers: Sequence[int]) -> list[int]:
    """Layers of the cell with an SAE that is not trained yet (or was, with other settings)."""
    return [layer for layer in layers if context.missing_seeds("train", cell, layer)]


def train_cell(root: str, model: str, step: int, layers: tuple[int, ...], report: Any) -> None:
    """Train the SAEs of some layers of one cell and save the ones with the chosen learning rate.

    Raises:
        InputError: fewer tokens than a batch, a checkpoint that cannot be read.
        NonFiniteError: NaN or Inf in hidden states; names cell, layer and step, before any weight changes.
    """
    context = Context.open(root)
    cell = context.cell_of(model, step)
    study, sae = context.study, context.study.sae
    lm = context.load_lm(cell)
    shape = cell.model.shape
    assert shape is not None
    n_rows, n_entries = embedding_module(lm).num_embeddings, context.token_info.vocab_size
    if n_rows < n_entries:
        raise InputError(
            f"cell {cell.name}: the tokenizer has {n_entries} entries, the model's embedding {n_rows}: they do not belong together"
        )
    rates = {layer: _grid(context, cell, layer) for layer in layers}
    seeds = {layer: context.missing_seeds("train", cell, layer) for layer in layers}
    scratch = Scratch()  # one for all: they take turns
    trainers: Trainers = {
        (layer, lr, seed): SAETrainer(
            # The same start for every checkpoint of a layer removes one source of difference between them.
            TopKSAE(
                shape.d_model, sae.n_features(shape.d_model), sae.k, seed_for(study, "sae", layer, seed),
                normalization=sae.normalization, device=str(context.device()),
            ),
            lr, sae.warmup_steps, eps=sae.eps, betas=sae.betas,
            frozen_decoder=cell.model.control == "frozen_decoder", kernel=sae.kernel, preselection=sae.preselection,
            scratch=scratch,
        )
        for layer in layers for lr in rates[layer] for seed in seeds[layer]
    }  # fmt: skip
    blocks = context.blocks("train")
    stream = ShuffledActivations(
        lambda epoch: _chunks(context, lm, cell, blocks, layers, _order(context, len(blocks.tokens), epoch)),
        batch_size=sae.batch_tokens, n_steps=sae.n_steps, buffer_tokens=max(sae.buffer_tokens, sae.batch_tokens),
        seed=seed_for(study, "stream"),
    )  # fmt: skip
    every = max(1, sae.n_steps // CURVE_POINTS)
    curves: dict[tuple[int, float, int], list[tuple[int, float, float, float]]] = {key: [] for key in trainers}
    loss = float("nan")
    recomputed = dict.fromkeys(trainers, 0)
    for n, batch in _numbered(stream):
        for key, trainer in trainers.items():
            try:
                result = trainer.step(batch[key[0]])
            except NonFiniteError as error:
                raise NonFiniteError(f"cell {cell.name}, layer {key[0]}: {error}") from None
            recomputed[key] += int(result["recomputed"])
            if n % every == 0 or n == sae.n_steps - 1:
                curves[key].append((n, result["loss"], result["lr"], result["l0"]))
                loss = result["loss"]
        if n % 25 == 0:
            report(n, sae.n_steps, f"loss {loss:.3f}")
    report(sae.n_steps, sae.n_steps, "validation")
    validation = _validate(context, lm, cell, trainers, layers)
    for layer in layers:
        # The first seed chooses for all, so that seeds can be added later.
        chooser = min(seeds[layer])
        chosen = min(rates[layer], key=lambda lr: (validation[layer, lr, chooser], lr))
        for seed in seeds[layer]:
            losses = {str(lr): validation[layer, lr, seed] for lr in rates[layer]}
            folder = context.store.setup_dir(model, step, layer, seed)
            # An older SAE's features are worth nothing beside a new one's weights.
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            extra = {
                "model": model, "step": step, "tokens_seen": cell.checkpoint.tokens_seen, "layer": layer,
                "sae_seed": seed, "lr": chosen, "grid": losses, "steps": sae.n_steps, "control": cell.model.control,
                "kernel": trainers[layer, chosen, seed].kernel.name,
            }  # fmt: skip
            if sae.preselection != "none":
                extra["preselection"] = {"kind": sae.preselection, "rows_recomputed": recomputed[layer, chosen, seed],
                                         "rows": sae.n_steps * sae.batch_tokens}  # fmt: skip
            trainers[layer, chosen, seed].sae.save(folder, extra)
            write_table(folder / "training.parquet", _curve(curves, layer, seed, rates[layer], chosen))
            context.store.mark_done(
                folder, "train", context.train_key(cell, layer, seed), {"lr": chosen, "grid": losses},
                ["sae.safetensors", "cfg.json", "training.parquet"],
            )  # fmt: skip


def chosen_lr(context: Context, cell: Cell, layer: int) -> float:
    """The learning rate that validation loss chose for a layer of a cell."""
    folder = context.store.setup_dir(cell.model.name, cell.checkpoint.step, layer, min(context.study.sae.seeds))
    if not (folder / "cfg.json").exists():
        raise InputError(f"{folder} is not trained yet: it chooses the learning rate of layer {layer}")
    return float(read_json(folder / "cfg.json")["lr"])


def _grid(context: Context, cell: Cell, layer: int) -> tuple[float, ...]:
    """Learning rates to try: the grid where this cell is to choose, else the one that was chosen."""
    lr = context.study.sae.lr
    if len(lr) == 1:
        return lr
    if not context.chooses_lr(cell):
        return (chosen_lr(context, context.chooser_of(cell), layer),)
    chooses = min(context.study.sae.seeds) in context.missing_seeds("train", cell, layer)
    return lr if chooses else (chosen_lr(context, cell, layer),)


def _numbered(stream: Iterable[dict[int, Tensor]]) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """(SAE step, batch); an error of the language model's pass says which step it kept from being made."""
    n = 0
    try:
        for batch in stream:
            yield n, batch
            n += 1
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; found before SAE step {n}, no weight has changed since") from None


def _order(context: Context, n_blocks: int, epoch: int) -> np.ndarray:
    """The order of blocks of one epoch: the same for every cell, so that checkpoints see the same batches."""
    return np.random.default_rng([seed_for(context.study, "blocks"), epoch]).permutation(n_blocks)


def _chunks(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], order: np.ndarray
) -> Iterator[dict[int, Tensor]]:
    """Hidden states at the positions that count, batch by batch: layer -> [M, D]."""
    special = context.token_info.special_ids
    for _, tokens, language in bucketed(blocks, order, context.study.compute.lm_batch):
        mask = torch.from_numpy(position_mask(tokens, language, special)).flatten()
        states = hidden_states(lm, tokens, attention_mask(language), layers, cell)
        kept = torch.nonzero(mask).flatten()
        yield {layer: x_BTD.flatten(0, 1).index_select(0, kept.to(x_BTD.device)) for layer, x_BTD in states.items()}


def _validate(
    context: Context, lm: Any, cell: Cell, trainers: Trainers, layers: Sequence[int]
) -> dict[tuple[int, float, int], float]:
    """Validation loss of every trainer: mean over positions of ||u - u_hat||^2, one LM pass for all."""
    shape = cell.model.shape
    assert shape is not None
    quality = {key: QualityAccumulator(shape.d_model, 1) for key in trainers}
    blocks = context.blocks("validation")
    for chunk in _chunks(context, lm, cell, blocks, layers, np.arange(len(blocks.tokens))):
        for key, trainer in trainers.items():
            x_MD = chunk[key[0]]
            values, indices = trainer.sae.encode(x_MD)
            l0 = (values > 0).sum(1)
            quality[key].update(trainer.sae.normalize(x_MD), trainer.sae.decode(values, indices), l0, torch.zeros(len(x_MD)))
    return {key: q.result().loss for key, q in quality.items()}


def _curve(curves: Any, layer: int, seed: int, rates: Sequence[float], chosen: float) -> pa.Table:
    """The loss curves of a setup, one row per point and learning rate tried."""
    rows = [(n, lr, loss, rate, l0, lr == chosen) for lr in rates for n, loss, rate, l0 in curves[layer, lr, seed]]
    names = ("step", "grid_lr", "loss", "lr", "l0", "chosen")
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
