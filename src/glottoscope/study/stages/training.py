"""Stage "train": one language model pass feeds the SAEs of all layers, learning rates and seeds of a cell."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
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
from glottoscope.sae.stream import Batch, Chunk, ShuffledActivations
from glottoscope.sae.trainer import SAETrainer
from glottoscope.study.metrics import POINTS, MetricsFile, Point
from glottoscope.study.plan import Cell, seed_for, unit_name
from glottoscope.study.stages.context import Context, bucketed, hidden_states
from glottoscope.study.stages.resuming import VERSION, Keeper, Waiting, newest, surroundings
from glottoscope.study.stages.states import states_in
from glottoscope.study.stages.tokenizing import read_json
from glottoscope.study.store import digest
from glottoscope.walking import listed

CURVE_POINTS = 200  # rows of a setup's loss curve

Key = tuple[int, float, int]  # layer, learning rate, SAE seed
Trainers = dict[Key, SAETrainer]


def missing_layers(context: Context, cell: Cell, layers: Sequence[int]) -> list[int]:
    """Layers of the cell with an SAE that is not trained yet (or was, with other settings)."""
    return [layer for layer in layers if context.missing_seeds("train", cell, layer)]


class CellTraining:
    """The trainers of some layers of one cell between two steps, and what is kept of how they got on."""

    def __init__(self, trainers: Trainers, total: int) -> None:
        self.trainers = trainers
        self.steps = 0
        self.curves: dict[Key, list[tuple[int, float, float, float]]] = {key: [] for key in trainers}
        self.recomputed = dict.fromkeys(trainers, 0)
        self.loss = float("nan")
        self._total, self._every = total, max(1, total // CURVE_POINTS)
        # A curve may have almost twice its points.
        self._shown = self._every * math.ceil(total / self._every / (POINTS + 1))

    def is_shown(self, n: int) -> bool:
        """Whether step n is a point of the metrics; it is one of the curves then."""
        return n % self._shown == 0 or n == self._total - 1

    def points(self, batch_tokens: int, first: int = 0) -> list[Point]:
        """Points for the metrics, of the steps made from `first` on."""
        found = [
            {"layer": layer, "sae_seed": seed, "grid_lr": lr, "step": n, "steps": self._total,
             "tokens": (n + 1) * batch_tokens, "loss": loss, "lr": rate, "l0": l0}
            for (layer, lr, seed), curve in self.curves.items()
            for n, loss, rate, l0 in (curve[-1:] if first == self.steps - 1 else curve)
            if n >= first and self.is_shown(n)
        ]  # fmt: skip
        return sorted(found, key=lambda point: point["step"])

    def step(self, batch: Batch) -> None:
        """One step of every trainer.

        Raises:
            NonFiniteError: names the layer.
        """
        n = self.steps
        for key, trainer in self.trainers.items():
            try:
                result = trainer.step(batch[key[0]])
            except NonFiniteError as error:
                raise NonFiniteError(f"layer {key[0]}: {error}") from None
            self.recomputed[key] += int(result["recomputed"])
            if n % self._every == 0 or n == self._total - 1:
                self.curves[key].append((n, result["loss"], result["lr"], result["l0"]))
                self.loss = result["loss"]
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        return {f"{_name(key)}/{name}": x for key, trainer in self.trainers.items() for name, x in trainer.tensors().items()}

    def notes(self) -> dict[str, Any]:
        return {_name(key): {"curve": self.curves[key], "recomputed": self.recomputed[key]} for key in self.trainers}

    def resume_at(self, steps: int, notes: dict[str, Any]) -> None:
        self.steps = steps
        for key, trainer in self.trainers.items():
            trainer.resume_at(steps)
            self.curves[key] = [tuple(row) for row in notes[_name(key)]["curve"]]
            self.recomputed[key] = notes[_name(key)]["recomputed"]
            self.loss = self.curves[key][-1][1]


def _part(layer: int, seed: int) -> str:
    return f"layer_{layer}/seed_{seed}"


def _name(key: Key) -> str:
    layer, lr, seed = key
    return f"{_part(layer, seed)}/lr_{lr}"


def missing_parts(context: Context, cell: Cell, layers: Sequence[int]) -> dict[str, str]:
    """Part of a training's state -> key of the SAE it is to become, for the SAEs that are not trained yet."""
    return {
        _part(layer, seed): digest(VERSION, context.train_key(cell, layer, seed))
        for layer in layers
        for seed in context.missing_seeds("train", cell, layer)
    }


def waiting(context: Context) -> list[Waiting]:
    """States of SAE trainings that were stopped, and whether a run would go on from them."""
    found = []
    for cell in context.cells:
        folders = listed(context.store.train_states_dir(cell.model.name, cell.checkpoint.step), "layers_*")
        missing = missing_parts(context, cell, cell.model.known_layers()) if folders else {}
        found += [Waiting(f, f"{cell.name} {f.name.replace('_', ' ')}", newest(f, missing), not missing) for f in folders]
    return found


def kept_together(context: Context, cell: Cell, layers: Sequence[int]) -> list[list[int]]:
    """Parts of a group of layers, each with all its layers in one state or in none: a training goes on from a state that holds
    all of it, and the groups of a run that was stopped may have been smaller."""
    folders = context.store.train_states_dir(cell.model.name, cell.checkpoint.step).glob("layers_*")
    states = sorted((s for folder in folders for s in states_in(folder)), key=lambda s: -s.steps)
    missing = missing_parts(context, cell, layers) if states else {}
    parts: list[list[int]] = []
    left = list(layers)
    for state in states:
        held = [layer for layer in left if (own := _of_layer(missing, layer)) and own.items() <= state.keys.items()]
        if held:
            parts.append(held)
            left = [layer for layer in left if layer not in held]
    return sorted([*parts, left] if left else parts)


def _of_layer(parts: dict[str, str], layer: int) -> dict[str, str]:
    return {part: key for part, key in parts.items() if part.startswith(f"layer_{layer}/")}


def train_cell(root: str, model: str, step: int, layers: tuple[int, ...], report: Any) -> None:
    """Train the SAEs of some layers of one cell and save the ones with the chosen learning rate.

    A training that was stopped goes on from its last state, to the same bytes.

    Raises:
        InputError: fewer tokens than a batch, a checkpoint that cannot be read.
        NonFiniteError: NaN or Inf in hidden states; names cell, layer and step, before any weight changes.
    """
    context = Context.open(root)
    cell = context.cell_of(model, step)
    study, sae, store = context.study, context.study.sae, context.store
    lm = context.load_lm(cell)
    n_rows, n_entries = embedding_module(lm).num_embeddings, context.token_info.vocab_size
    if n_rows < n_entries:
        raise InputError(
            f"cell {cell.name}: the tokenizer has {n_entries} entries, the model's embedding {n_rows}: they do not belong together"
        )
    rates = {layer: _grid(context, cell, layer) for layer in layers}
    seeds = {layer: context.missing_seeds("train", cell, layer) for layer in layers}
    training = CellTraining(_trainers(context, cell, rates, seeds), sae.n_steps)
    blocks = context.blocks("train")
    stream = ShuffledActivations(
        lambda epoch: _chunks(context, lm, cell, blocks, layers, _order(context, len(blocks.tokens), epoch)),
        batch_size=sae.batch_tokens, n_steps=sae.n_steps, buffer_tokens=max(sae.buffer_tokens, sae.batch_tokens),
        seed=seed_for(study, "stream"),
    )  # fmt: skip
    kernel = next(iter(training.trainers.values())).kernel.name
    keeper = Keeper(
        store.train_state_dir(model, step, layers), missing_parts(context, cell, layers),
        surroundings(context.device(), kernel=kernel), study.compute.checkpoint_minutes,
        listed(store.train_states_dir(model, step), "layers_*"),
    )  # fmt: skip
    unit = unit_name(cell, layers)
    metrics = MetricsFile(store.metrics_path(unit), {"stage": "train", "unit": unit, "model": model, "checkpoint": step})
    with keeper:
        keeper.restore(training)
        metrics.begin(training.points(sae.batch_tokens))
        for batch in _checked(stream.iterate_from(training.steps), training):
            with keeper.held():
                try:
                    training.step(batch)
                except NonFiniteError as error:
                    raise NonFiniteError(f"cell {cell.name}, {error}") from None
            keeper.tick()
            if training.is_shown(training.steps - 1):
                metrics.add(training.points(sae.batch_tokens, training.steps - 1))
            if (training.steps - 1) % 25 == 0:
                with keeper.calm():
                    report(training.steps - 1, sae.n_steps, f"loss {training.loss:.3f}{keeper.words}")
        with keeper.calm():
            report(sae.n_steps, sae.n_steps, "validation")
        validation = _validate(context, lm, cell, training.trainers, layers)
    for layer in layers:
        # The first seed chooses for all, so that seeds can be added later. It is saved last: until it is there, a run that
        # was stopped in between tries the whole grid again, for every seed.
        chooser = min(seeds[layer])
        chosen = min(rates[layer], key=lambda lr: (validation[layer, lr, chooser], lr))
        for seed in sorted(seeds[layer], reverse=True):
            losses = {lr: validation[layer, lr, seed] for lr in rates[layer]}
            _save(context, cell, training, (layer, chosen, seed), losses)
    keeper.done(missing_parts(context, cell, cell.model.known_layers()))


def _trainers(context: Context, cell: Cell, rates: dict[int, tuple[float, ...]], seeds: dict[int, list[int]]) -> Trainers:
    study, sae, shape = context.study, context.study.sae, cell.model.shape
    assert shape is not None
    scratch = Scratch()  # one for all: they take turns
    return {
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
        for layer in rates for lr in rates[layer] for seed in seeds[layer]
    }  # fmt: skip


def _save(context: Context, cell: Cell, training: CellTraining, key: Key, losses: dict[float, float]) -> None:
    """Save the SAE of a setup, with the validation loss of each learning rate tried, and mark it done."""
    (layer, chosen, seed), sae = key, context.study.sae
    trainer = training.trainers[key]
    model, step = cell.model.name, cell.checkpoint.step
    folder = context.store.setup_dir(model, step, layer, seed)
    wanted = context.train_key(cell, layer, seed)
    # An older SAE's features are worth nothing beside a new one's weights; beside a mended one they are what they were.
    if folder.exists() and not context.store.is_repair(folder, "train", wanted):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    grid = {str(lr): loss for lr, loss in losses.items()}
    extra = {
        "model": model, "step": step, "tokens_seen": cell.checkpoint.tokens_seen, "layer": layer, "sae_seed": seed,
        "lr": chosen, "grid": grid, "steps": sae.n_steps, "control": cell.model.control, "kernel": trainer.kernel.name,
    }  # fmt: skip
    if sae.preselection != "none":
        extra["preselection"] = {"kind": sae.preselection, "rows_recomputed": training.recomputed[key],
                                 "rows": sae.n_steps * sae.batch_tokens}  # fmt: skip
    trainer.sae.save(folder, extra)
    write_table(folder / "training.parquet", _curve(training.curves, layer, seed, list(losses), chosen))
    context.store.mark_done(
        folder, "train", wanted, {"lr": chosen, "grid": grid},
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


def _checked(stream: Iterable[Batch], training: CellTraining) -> Iterator[Batch]:
    """The batches; an error of the language model's pass says which SAE step it kept from being made."""
    try:
        yield from stream
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; found before SAE step {training.steps}, no weight has changed since") from None


def _order(context: Context, n_blocks: int, epoch: int) -> np.ndarray:
    """The order of blocks of one epoch: the same for every cell, so that checkpoints see the same batches."""
    return np.random.default_rng([seed_for(context.study, "blocks"), epoch]).permutation(n_blocks)


def _chunks(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], order: np.ndarray
) -> Iterator[Chunk]:
    """Hidden states at the positions that count, one chunk for each of the language model's batches."""
    special = context.token_info.special_ids
    for _, tokens, language in bucketed(blocks, order, context.study.compute.lm_batch):
        kept_M = torch.from_numpy(np.flatnonzero(position_mask(tokens, language, special)))
        yield Chunk(len(kept_M), partial(_states, lm, cell, layers, tokens, language, kept_M))


def _states(
    lm: Any, cell: Cell, layers: Sequence[int], tokens_BT: np.ndarray, language_BT: np.ndarray, kept_M: Tensor
) -> dict[int, Tensor]:
    states = hidden_states(lm, tokens_BT, attention_mask(language_BT), layers, cell)
    return {layer: x_BTD.flatten(0, 1).index_select(0, kept_M.to(x_BTD.device)) for layer, x_BTD in states.items()}


def _validate(context: Context, lm: Any, cell: Cell, trainers: Trainers, layers: Sequence[int]) -> dict[Key, float]:
    """Validation loss of every trainer: mean over positions of ||u - u_hat||^2, one LM pass for all."""
    shape = cell.model.shape
    assert shape is not None
    quality = {key: QualityAccumulator(shape.d_model, 1) for key in trainers}
    blocks = context.blocks("validation")
    for chunk in _chunks(context, lm, cell, blocks, layers, np.arange(len(blocks.tokens))):
        states = chunk.states()
        for key, trainer in trainers.items():
            x_MD = states[key[0]]
            values, indices = trainer.sae.encode(x_MD)
            l0 = (values > 0).sum(1)
            quality[key].update(trainer.sae.normalize(x_MD), trainer.sae.decode(values, indices), l0, torch.zeros(len(x_MD)))
    return {key: q.result().loss for key, q in quality.items()}


def _curve(curves: Any, layer: int, seed: int, rates: Sequence[float], chosen: float) -> pa.Table:
    """The loss curves of a setup, one row per point and learning rate tried."""
    rows = [(n, lr, loss, rate, l0, lr == chosen) for lr in rates for n, loss, rate, l0 in curves[layer, lr, seed]]
    names = ("step", "grid_lr", "loss", "lr", "l0", "chosen")
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
