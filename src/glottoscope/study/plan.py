"""What a study amounts to before anything runs: models, cells, setups, and what they cost.

Pure: reads at most a config.json or a folder listing, never weights, never a network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from glottoscope.errors import InputError
from glottoscope.study.config import CheckpointModel, PlantedCorpus, PretrainModel, SAEConfig, Shape, Study, TextCorpus

BYTES = 4  # fp32: SAE weights and Adam's moments
PROCESS = 650 * 2**20  # resident memory of Python with torch, transformers and compiled loops, measured on Linux


@dataclass(frozen=True)
class CheckpointRef:
    """Where one checkpoint lies; for models trained here `path` is None and the run directory knows."""

    step: int
    tokens_seen: int
    path: str | None = None
    revision: str | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class ModelRun:
    """One row group of the study: a language model with one seed, or a control made from it.

    Attributes:
        lm: name of the model whose weights are used (differs from `name` for controls made from a model).
        control: one of config.CONTROLS.
        checkpoints: ascending in tokens_seen; the last is `final`.
    """

    name: str
    lm: str
    family: str
    control: str
    lm_seed: int
    spec: PretrainModel | CheckpointModel
    shape: Shape | None
    checkpoints: tuple[CheckpointRef, ...]
    layers: tuple[int, ...] | None

    @property
    def final(self) -> CheckpointRef:
        return self.checkpoints[-1]

    def known_layers(self) -> tuple[int, ...]:
        if self.layers is None:
            raise InputError(f"model {self.name}: its size is not known yet: give [models.shape] in the study file")
        return self.layers

    @property
    def middle_layer(self) -> int:
        """The studied layer nearest to half the depth (the lower one on ties)."""
        layers = self.known_layers()
        depth = self.shape.n_layers if self.shape else max(layers)
        return min(layers, key=lambda x: (abs(x - depth / 2), x))


class Cell(NamedTuple):
    """One language model checkpoint of the study."""

    model: ModelRun
    checkpoint: CheckpointRef

    @property
    def name(self) -> str:
        return f"{self.model.name}@{self.checkpoint.step}"


def unit_name(cell: Cell, layers: Sequence[int]) -> str:
    """Name of the work on some layers of a cell."""
    every = cell.model.known_layers()
    return cell.name if len(layers) == len(every) else f"{cell.name} layers {layers[0]}-{layers[-1]}"


class Cost(NamedTuple):
    """What one model of a study costs. FLOPs count multiply-adds as two."""

    cells: int
    setups: int
    sae_parameters: int  # of one setup
    memory: int  # bytes, peak of one process
    disk: int  # bytes
    lm_flops: float
    sae_flops: float
    tokens: int  # through the SAE, one setup
    groups: int  # layer groups of one cell: language model passes over the stream


def expand(study: Study) -> tuple[ModelRun, ...]:
    """Every model of the study, one entry per LM seed, and the controls made from them.

    Raises:
        InputError: a layer beyond the model, checkpoints that cannot be found, a name used twice.
    """
    runs: list[ModelRun] = []
    for spec in study.models:
        if isinstance(spec, PretrainModel):
            for seed in spec.seeds:
                runs.append(_pretrained(study, spec, seed))
        else:
            runs.append(_checkpoints(study, spec))
    for run in list(runs):
        if run.control != "none":
            continue
        for control, wanted in (
            ("shuffled", study.controls.shuffled),
            ("frozen_decoder", study.controls.frozen_decoder),
        ):
            if wanted:
                name = f"{run.name}-{control}"
                runs.append(replace(run, name=name, control=control, checkpoints=(run.final,)))
    names = [r.name for r in runs]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"two models of the study are called {', '.join(twice)}: rename one")
    return tuple(runs)


def cells_of(runs: Sequence[ModelRun]) -> list[Cell]:
    """Cells in the order of work: the final checkpoint of each model first, since it chooses learning rates."""
    return [Cell(run, c) for run in runs for c in (run.final, *run.checkpoints[:-1])]


def _pretrained(study: Study, spec: PretrainModel, seed: int) -> ModelRun:
    name = spec.name if seed == 0 else f"{spec.name}-s{seed}"
    context = study.corpus.context_length
    vocabulary = _vocabulary(study)
    shape = llama_shape(spec.d_model, spec.n_layers, vocabulary)
    checkpoints = tuple(CheckpointRef(s, s * spec.batch_size * context) for s in spec.checkpoints)
    layers = _layers(spec.layers or study.layers, shape.n_layers, name)
    family = spec.family or study.study.name
    return ModelRun(name, name, family, spec.control, seed, spec, shape, checkpoints, layers)


def llama_shape(d_model: int, n_layers: int, vocabulary: int) -> Shape:
    """Size of an untied Llama as lm.pretrain builds it."""
    block = 4 * d_model * d_model + 3 * d_model * mlp_width(d_model) + 2 * d_model
    n_params = 2 * vocabulary * d_model + n_layers * block + d_model
    return Shape(n_layers=n_layers, d_model=d_model, vocab_size=vocabulary, n_params=n_params)


def mlp_width(d_model: int) -> int:
    """Width of the SwiGLU MLP: 8/3 d, rounded to a multiple of 8 (lm.pretrain's choice, stated here without torch)."""
    return max(8, 8 * round(d_model / 3))


@cache
def _planted_vocabulary(seed: int, shared_tokens: bool) -> int:
    from glottoscope.corpus.planted import PlantedWorld

    return len(PlantedWorld(seed, shared_tokens=shared_tokens).vocabulary)


def _vocabulary(study: Study) -> int:
    if isinstance(study.corpus, PlantedCorpus):
        return _planted_vocabulary(study.corpus.seed, study.corpus.shared_tokens)
    if study.corpus.tokenizer_training is not None:
        return study.corpus.tokenizer_training.vocab_size
    return 32_000  # a given tokenizer is only read when the study runs


def _checkpoints(study: Study, spec: CheckpointModel) -> ModelRun:
    refs = sorted(_checkpoint_refs(spec), key=lambda c: (c.tokens_seen, c.step))
    steps = [r.step for r in refs]
    if twice := sorted({s for s in steps if steps.count(s) > 1}):
        raise InputError(f"model {spec.name}: step {twice[0]} is given twice")
    shape = spec.shape or _shape_from_config(refs[-1])
    layers = None
    wanted = spec.layers or study.layers
    if shape is not None:
        layers = _layers(wanted, shape.n_layers, spec.name)
    elif wanted != "all":
        layers = tuple(sorted(set(wanted)))
    family = spec.family or study.study.name
    return ModelRun(spec.name, spec.name, family, spec.control, spec.seed, spec, shape, tuple(refs), layers)


def _checkpoint_refs(spec: CheckpointModel) -> list[CheckpointRef]:
    def located(step: int, path: str | None, revision: str | None, tokens: int | None, lr: float | None) -> CheckpointRef:
        seen = tokens if tokens is not None else step * int(spec.tokens_per_step or 0)
        if spec.hub_id is not None:
            return CheckpointRef(step, seen, spec.hub_id, revision or path, lr)
        base = Path(spec.root) if spec.root is not None else Path()
        return CheckpointRef(step, seen, str(base / path) if path is not None else str(base), revision, lr)

    if spec.checkpoints:
        return [
            located(c.step, c.path or (spec.pattern.format(step=c.step) if spec.pattern else None), c.revision,
                    c.tokens_seen, c.learning_rate)
            for c in spec.checkpoints
        ]  # fmt: skip
    if spec.pattern and spec.steps:
        return [located(s, spec.pattern.format(step=s), None, None, None) for s in spec.steps]
    base = Path(spec.root or ".")
    found: dict[int, Path] = {}
    for folder in sorted(p for p in base.glob(spec.glob or "*") if p.is_dir()):
        step = step_of(folder.name)
        if step is None:
            continue
        if step in found:
            raise InputError(
                f"model {spec.name}: {found[step]} and {folder} are both step {step}: narrow glob, or give checkpoints"
            )
        found[step] = folder
    if not found:
        raise InputError(
            f"model {spec.name}: no folder named like iter_0000010, step_10 or checkpoint-10 matches {base / (spec.glob or '*')}"
        )
    steps = spec.steps or tuple(sorted(found))
    if missing := [s for s in steps if s not in found]:
        raise InputError(f"model {spec.name}: no checkpoint of step {missing[0]} below {base}")
    return [located(s, str(found[s].relative_to(base)), None, None, None) for s in steps]


STEP_PATTERN = re.compile(r"(?:^|[_-])(?:iter|step|checkpoint|ckpt)[_-]?(\d+)$|^(\d+)$|(?:global_step|iter|step)(\d+)$")


def step_of(name: str) -> int | None:
    """The step in a checkpoint's folder name: iter_0000010, step_10, step10, checkpoint-10, global_step10, 10; else None."""
    found = STEP_PATTERN.search(name)
    return int(next(x for x in found.groups() if x is not None)) if found else None


def _shape_from_config(ref: CheckpointRef) -> Shape | None:
    path = Path(ref.path or "") / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    width = config.get("hidden_size", config.get("n_embd"))
    vocabulary = config.get("vocab_size")
    if not all(isinstance(x, int) and x > 0 for x in (layers, width, vocabulary)):
        raise InputError(f"{path}: needs num_hidden_layers, hidden_size and vocab_size; give [models.shape] instead")
    mlp = config.get("intermediate_size") or config.get("n_inner") or 4 * width
    # Two or three matrices of the MLP are not told apart here: an estimate for the plan, replaced by the count when loaded.
    return Shape(n_layers=layers, d_model=width, vocab_size=vocabulary,
                 n_params=2 * vocabulary * width + layers * (4 * width * width + 3 * width * mlp))  # fmt: skip


def _layers(wanted: tuple[int, ...] | str, n_layers: int, name: str) -> tuple[int, ...]:
    if isinstance(wanted, str):
        return tuple(range(1, n_layers + 1))
    if beyond := [x for x in wanted if x > n_layers]:
        raise InputError(f"layer {beyond[0]} is beyond model {name}, which has {n_layers}: use 0..{n_layers}")
    return tuple(sorted(set(wanted)))


# ---- cost


def sae_memory(d_model: int, sae: SAEConfig, trainers: int, layers: int, buffer_tokens: int) -> int:
    """Peak bytes of training `layers` x `trainers` SAEs on one stream: weights, Adam's moments, buffer, one step.

    The step's own memory exists once: trainers take turns. The reference kernel, which holds [batch, n], needs more.
    """
    n, rows = sae.n_features(d_model), sae.batch_tokens
    parameters = 2 * n * d_model + n + d_model
    state = 3 * BYTES * parameters * trainers * layers  # no gradient is ever held whole
    buffer = (min(buffer_tokens, sae.n_steps * rows) + rows) * d_model * BYTES * layers
    piece = min(rows, 2048) * min(n, max(256, 2**21 // min(rows, 2048))) * BYTES
    pairs = rows * sae.k * (5 * BYTES + 8)  # values, their gradients and features, and the pairs sorted by feature
    coarse = n * d_model * 2 + rows * max(3 * sae.k, sae.k + 64) * (2 * BYTES + 8) if sae.preselection != "none" else 0
    return state + buffer + 5 * rows * d_model * BYTES + piece + pairs + coarse


def lm_memory(study: Study, shape: Shape, layers: int) -> int:
    """Bytes of a process that passes text through a language model: its libraries, the weights, one batch's states."""
    tokens = study.compute.lm_batch * study.corpus.context_length
    # A block at work holds some 18 d_model numbers a token (norms, q, k, v, three of the MLP's width); every captured
    # layer its states and the counted ones of them.
    return PROCESS + shape.n_params * BYTES + tokens * shape.d_model * (18 + 2 * layers) * BYTES


def train_memory(study: Study, shape: Shape, layers: int) -> int:
    """Peak resident bytes of a process that trains the SAEs of `layers` layers of one cell."""
    sae = study.sae
    trainers = len(sae.lr) * len(sae.seeds)
    return lm_memory(study, shape, layers) + sae_memory(shape.d_model, sae, trainers, layers, sae.buffer_tokens)


class Room(NamedTuple):
    """Memory that one process may use, in bytes, and where the figure is from."""

    each: float  # groups of layers are as large as fit this
    most: float = math.inf  # where one layer alone does not fit `each`, it may take so much
    source: str = "compute.memory_gb"
    remedy: str = "raise compute.memory_gb"
    alone: float = math.inf  # what the remedy gives at most

    def advice(self, need: float) -> str:
        """What to do where one layer needs more than `most`."""
        return self.remedy if need <= self.alone else "take a larger machine"


def layer_groups(study: Study, shape: Shape, layers: Sequence[int], memory: float | Room) -> list[tuple[int, ...]]:
    """Split the layers of a cell into groups whose training fits the memory.

    Args:
        memory: a number of bytes, compute.memory_gb, is a room of which one layer may take no more.

    Raises:
        InputError: not even one layer fits.
    """
    room = memory if isinstance(memory, Room) else Room(memory, memory)
    size = len(layers)
    while size > 1 and train_memory(study, shape, size) > room.each:
        size -= 1
    if (need := train_memory(study, shape, size)) > max(room.each, room.most):
        raise InputError(
            f"one layer of width {shape.d_model} needs {describe_memory(need)} and a process may use {describe_memory(room.most)} "
            f"({room.source}): {room.advice(need)}, or lower sae.n, sae.buffer_tokens, sae.batch_tokens or the number of seeds"
        )
    return [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]


def split_layers(layers: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """A group of layers in at most `parts` parts of about one size."""
    size = -(-len(layers) // max(1, min(parts, len(layers))))
    return [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]


def parts_of(groups: int, workers: int) -> int:
    """Parts that a group is split into where groups are fewer than workers: an idle core costs more than another pass."""
    return max(1, workers // max(1, groups))


def groups_of(study: Study, run: ModelRun, memory: float | Room) -> list[tuple[int, ...]]:
    """Layer groups of every cell of a model whose size is known. Raises InputError where not even one layer fits."""
    assert run.shape is not None
    return layer_groups(study, run.shape, run.known_layers(), memory)


def choosing_cells(study: Study, run: ModelRun) -> int:
    """Cells of a model that try the whole grid of learning rates (METHOD 4); they train before the others."""
    if len(study.sae.lr) == 1 or study.sae.lr_choice == "setup":
        return len(run.checkpoints)
    return int(run.control != "frozen_decoder")


def cost_of(study: Study, run: ModelRun, memory: float | Room) -> Cost:
    """Cost of one model's rows of the study. Raises InputError where its size is not known."""
    if run.shape is None:
        raise InputError(f"model {run.name}: its size is not known: give [models.shape] (n_layers, d_model, n_params, vocab_size)")
    sae, shape, layers = study.sae, run.shape, run.known_layers()
    n = sae.n_features(shape.d_model)
    parameters = 2 * n * shape.d_model + n + shape.d_model
    tokens = sae.n_steps * sae.batch_tokens
    groups = groups_of(study, run, memory)
    cells, setups = len(run.checkpoints), len(run.checkpoints) * len(layers) * len(sae.seeds)
    body = shape.n_params - 2 * shape.vocab_size * shape.d_model  # blocks only: no head, embeddings are look-ups
    passes = len(groups)
    epoch = split_tokens(study, "train")
    train_pass = min(tokens, epoch) if epoch is not None and epoch <= sae.buffer_tokens else tokens
    test = split_tokens(study, "test") or tokens // 10
    lm_flops = 2.0 * body * (train_pass * passes + 2 * test) * cells
    if isinstance(run.spec, PretrainModel) and run.lm == run.name:
        lm_flops += (
            6.0
            * (shape.n_params - shape.vocab_size * shape.d_model)
            * run.spec.steps
            * run.spec.batch_size
            * (study.corpus.context_length)
        )
    # One dense encoder product per token, and gathers over k active features for decode and two gradients.
    per_token = 2.0 * n * shape.d_model + 8.0 * sae.k * shape.d_model
    grid = len(sae.lr) - 1 if sae.lr_choice == "final" else (len(sae.lr) - 1) * cells
    trainings = setups + grid * len(layers) * len(sae.seeds)
    sae_flops = per_token * tokens * trainings + 2.0 * n * shape.d_model * 2 * test * setups
    peak = max(train_memory(study, shape, len(g)) for g in groups)
    disk = setups * (parameters * BYTES + n * 400)
    if isinstance(run.spec, PretrainModel) and run.lm == run.name:
        disk += cells * shape.n_params * BYTES
    return Cost(cells, setups, parameters, peak, disk, lm_flops, sae_flops, tokens, passes)


def split_tokens(study: Study, split: str) -> int | None:
    """Tokens of a split, as far as the study says."""
    corpus = study.corpus
    if isinstance(corpus, TextCorpus):
        return getattr(corpus, f"{split}_tokens")
    return 2 * getattr(corpus, f"{split}_documents") * (corpus.context_length - 1)


def describe_memory(value: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def describe_time(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365.25:,.0f} y"


def summary(study: Study, memory: float | Room) -> list[tuple[ModelRun, Cost | None]]:
    """Every model of the study with its cost (None where its size is not known)."""
    rows: list[tuple[ModelRun, Cost | None]] = []
    for run in expand(study):
        rows.append((run, cost_of(study, run, memory) if run.shape is not None and run.layers is not None else None))
    return rows


def seed_for(study: Study, *purpose: Any) -> int:
    """A 63-bit seed for one purpose, drawn from the study's seed: independent streams without hidden state."""
    import hashlib

    text = json.dumps([study.study.seed, *purpose])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
