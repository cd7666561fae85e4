"""Pre-training of a small Llama from scratch, with checkpoints at chosen steps: one story from the first weight to the
log.

The recipe is nanoGPT's (AdamW (0.9, 0.95), warm-up, cosine to a tenth, clipping, no decay on embeddings and norms)
with two settings of the embedded study: embeddings start at std 0.1 and learn at twice the rate, or the residual
stream of so small a model overwrites them and nothing aligns. The model is an ordinary `LlamaForCausalLM` all the way;
only its forward pass is taken over while training (`training_forward`, same mathematics).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.lm.training_forward import Rotary, next_token_loss, rotary_tables

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Architecture of the model to train.

    Raises:
        InputError: the width is no multiple of the number of heads, or the head width is odd (rotary embeddings pair
            dimensions).
    """

    d_model: int
    vocab_size: int
    context_length: int
    n_layers: int = 4
    n_heads: int | None = None  # None: max(2, d_model // 32)
    mlp_width: int | None = None  # None: 8/3 d_model, rounded to a multiple of 8 (Llama's ratio)
    tie: bool = False  # LLM-jp-3 unties embeddings and head
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None  # as a target it carries no loss; only right padding is allowed

    def __post_init__(self) -> None:
        if self.d_model % self.heads or self.d_model // self.heads % 2:
            raise InputError(f"d_model {self.d_model} with n_heads {self.heads}: choose an even multiple of the number of heads")

    @property
    def heads(self) -> int:
        return self.n_heads if self.n_heads is not None else max(2, self.d_model // 32)

    @property
    def mlp(self) -> int:
        return self.mlp_width if self.mlp_width is not None else max(8, 8 * round(self.d_model / 3))


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """Optimisation. A checkpoint at step s is the model after s updates; 0 is the initial model."""

    steps: int
    lr: float
    warmup_steps: int
    batch_size: int = 16  # sequences per update
    min_lr_ratio: float = 0.1  # the cosine ends there
    weight_decay: float = 0.1  # none on embeddings and norms
    clip: float = 1.0  # largest gradient norm
    betas: tuple[float, float] = (0.9, 0.95)
    embedding_init_std: float = 0.1
    embedding_lr_scale: float = 2.0
    init_std: float = 0.02
    dtype: str = "float32"  # "bfloat16": matrix products only; weights, residual stream and loss stay float32
    checkpoint_steps: tuple[int, ...] = ()  # () saves the initial and the last model
    seed: int = 0  # of the initial weights; the data have their own

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"pretrain dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        beyond = [step for step in self.checkpoint_steps if not 0 <= step <= self.steps]
        if beyond:
            raise InputError(f"checkpoint step {beyond[0]} lies outside 0..{self.steps} (steps = {self.steps})")

    @property
    def saved_steps(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.checkpoint_steps))) or tuple(sorted({0, self.steps}))


def learning_rate(settings: PretrainSettings, update: int) -> float:
    """Learning rate of update `update` (0-based): linear warm-up, then a cosine to `min_lr_ratio` at the last
    update."""
    if update < settings.warmup_steps:
        return settings.lr * (update + 1) / settings.warmup_steps
    done = (update - settings.warmup_steps + 1) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def build_model(shape: LlamaShape, settings: PretrainSettings) -> LlamaForCausalLM:
    """The initial model: every weight drawn from `settings.seed`; torch's global generator is neither used nor
    moved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=shape.tie,
        bos_token_id=shape.bos_id,
        eos_token_id=shape.eos_id,
        pad_token_id=shape.pad_id,
        initializer_range=settings.init_std,
        attention_dropout=0.0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                is_embedding = parameter is model.model.embed_tokens.weight
                std = settings.embedding_init_std if is_embedding else settings.init_std
                parameter.normal_(0.0, std, generator=generator)
        if shape.pad_id is not None:
            model.model.embed_tokens.weight[shape.pad_id] = 0.0
    return model


def make_optimizer(model: LlamaForCausalLM, settings: PretrainSettings) -> torch.optim.AdamW:
    """AdamW with three groups: matrices (decayed), norms, embeddings; a group's `lr_scale` multiplies the schedule."""
    embedding = model.model.embed_tokens.weight
    others = [p for p in model.parameters() if p is not embedding]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": settings.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": [embedding], "weight_decay": 0.0, "lr_scale": settings.embedding_lr_scale},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


class Pretraining:
    """A pre-training between two updates: model, optimizer and log after `steps` updates.

    The model stays in eval mode: training goes through `training_forward`, which knows no dropout.
    """

    def __init__(self, shape: LlamaShape, settings: PretrainSettings, device: str = "cpu") -> None:
        self.shape, self.settings = shape, settings
        self.model = build_model(shape, settings).eval()
        self.model.to(torch.device(device))  # type: ignore[arg-type]
        self.optimizer = make_optimizer(self.model, settings)
        self.steps, self.tokens_seen = 0, 0
        self.rows: list[dict[str, float | None]] = [
            {"step": 0, "tokens_seen": 0, "loss": None, "lr": 0.0, "grad_norm": None},
        ]  # fmt: skip
        self._parameters = dict(self.model.named_parameters())
        self._tables: Rotary | None = None

    def update(self, batch: np.ndarray, held: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """One update on token ids [B, T], and its row of the log.

        Args:
            held: a context entered while parameters and counters change.
        """
        shape, settings, model = self.shape, self.settings, self.model
        dtype, device = DTYPES[settings.dtype], model.model.embed_tokens.weight.device
        tokens_BT = _checked_batch(batch, shape, self.steps).to(device)
        if self._tables is None or self._tables.cos_TE.shape[0] != tokens_BT.shape[1]:
            self._tables = rotary_tables(model, tokens_BT.shape[1], dtype)
        n_tokens = int((tokens_BT != shape.pad_id).sum()) if shape.pad_id is not None else tokens_BT.numel()
        lr = learning_rate(settings, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss = next_token_loss(model, tokens_BT, self._tables, shape.pad_id)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), settings.clip)
        measured = {"loss": loss.item(), "grad_norm": grad_norm.item()}
        for name, value in measured.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"pre-training d_model {shape.d_model}: {name} is {value} at update {self.steps + 1} of {settings.steps}"
                    f" (lr {lr:.2g}); lower pretrain lr or raise warmup_steps"
                )
        with held():
            self.optimizer.step()
            self.steps += 1
            self.tokens_seen += n_tokens
            self.rows.append({"step": self.steps, "tokens_seen": self.tokens_seen, "lr": lr, **measured})

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and AdamW's state by name: the tensors themselves, no copies."""
        found = {name: parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if not self.optimizer.state[parameter]:  # as AdamW makes it at its first step
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
                }  # fmt: skip
            found |= {f"{name}/{kind}": tensor for kind, tensor in self.optimizer.state[parameter].items()}
        return found

    def notes(self) -> dict[str, Any]:
        """What `resume_at` needs besides the tensors, as plain values."""
        return {"tokens_seen": self.tokens_seen, "rows": self.rows}

    def resume_at(self, steps: int, notes: dict[str, Any]) -> None:
        """Take `tensors` for those after `steps` updates."""
        self.steps, self.tokens_seen, self.rows = steps, notes["tokens_seen"], list(notes["rows"])


class Keeper(Protocol):
    """Keeps the state of a training so that a killed one can go on."""

    def restore(self, training: Pretraining) -> None:
        """Called once, before the first update: may put the training where an earlier one was."""
        ...

    def tick(self) -> None:
        """Called before every update."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Entered while parameters and counters change."""
        ...


def pretrain(
    shape: LlamaShape,
    settings: PretrainSettings,
    batch_at: Callable[[int], np.ndarray],
    save: Callable[[int, LlamaForCausalLM, float], None],
    evaluate: Callable[[LlamaForCausalLM], dict[str, float]] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    *,
    device: str = "cpu",
    keeper: Keeper | None = None,
) -> pa.Table:
    """Train a Llama from scratch and save it at `settings.saved_steps`.

    Args:
        batch_at: token ids [batch_size, T <= context_length] of update s (0-based), right-padded with `shape.pad_id`
            if at all; a function of s alone.
        save: called as save(step, model, learning rate of the last update; 0.0 at step 0); the model is in eval mode.
        evaluate: losses by name, measured at every saved step and logged as columns; the model is in eval mode, under
            no_grad.
        progress: called after every update with (updates done, the log row).
        keeper: keeps states, from which a training goes on to the same bytes; the step it goes on from is saved,
            evaluated and told of again.

    Returns:
        The training log, one row per step 0..steps: step, tokens_seen (positions that are not padding), loss (nats per
        token, of the batch of the update that led to this step; null at 0), lr and grad_norm (before clipping) of that
        update (lr 0.0, grad_norm null at 0), and the names `evaluate` gave (null between saved steps).

    Raises:
        NonFiniteError: the loss or the gradient is NaN or Inf; raised before the update, nothing is saved for that
            step.
        InputError: a batch holds a token id outside the vocabulary, or is longer than the context.
    """
    training = Pretraining(shape, settings, device)
    if keeper is not None:
        keeper.restore(training)
    while True:  # one turn: keep the model after `steps` updates, then make the next update
        step, row = training.steps, training.rows[-1]
        if step in settings.saved_steps:
            if evaluate is not None:
                with torch.no_grad():
                    row.update(evaluate(training.model))
            save(step, training.model, float(row["lr"] or 0.0))
        if progress is not None and step:
            progress(step, {name: value for name, value in row.items() if value is not None})
        if step == settings.steps:
            return _log_table(training.rows)
        if keeper is None:
            training.update(batch_at(step))
        else:
            keeper.tick()
            training.update(batch_at(step), keeper.held)


def _checked_batch(batch: np.ndarray, shape: LlamaShape, step: int) -> torch.Tensor:
    if batch.shape[1] > shape.context_length:
        raise InputError(f"batch {step} has {batch.shape[1]} positions, the context_length is {shape.context_length}")
    largest = int(batch.max())
    if largest >= shape.vocab_size:
        raise InputError(f"batch {step} holds token id {largest}, the vocab_size is {shape.vocab_size}: wrong tokenizer?")
    return torch.from_numpy(batch.astype(np.int64))


def _log_table(rows: list[dict[str, float | None]]) -> pa.Table:
    evaluated = sorted({name for row in rows for name in row} - {"step", "tokens_seen", "loss", "lr", "grad_norm"})
    columns: dict[str, pa.Array] = {}
    for name in ("step", "tokens_seen", "loss", "lr", "grad_norm", *evaluated):
        kind = pa.int64() if name in ("step", "tokens_seen") else pa.float64()
        columns[name] = pa.array([row.get(name) for row in rows], kind)
    return pa.table(columns)
