"""Pre-training: the fast forward pass is the model's own, schedule and groups are as said, runs are reproducible."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.lm import training_forward
from glottoscope.lm.pretrain import (
    LlamaShape,
    Pretraining,
    PretrainSettings,
    build_model,
    learning_rate,
    make_optimizer,
    pretrain,
)
from glottoscope.lm.training_forward import last_hidden, next_token_loss, rotary_tables

SHAPE = LlamaShape(d_model=32, vocab_size=40, context_length=16, n_layers=2, bos_id=1, pad_id=0)
SETTINGS = PretrainSettings(steps=60, lr=1e-2, warmup_steps=5, batch_size=8, checkpoint_steps=(0, 1, 10, 60))


def planted_batch(step: int) -> np.ndarray:
    """Counting: the next token is the one before plus a stride that the first two tokens show."""
    rng = np.random.default_rng([7, step])
    start, stride = rng.integers(2, 40, (8, 1)), rng.integers(1, 4, (8, 1))
    return ((start - 2 + stride * np.arange(16)) % 38 + 2).astype(np.uint32)


def model_and_tokens(shape: LlamaShape = SHAPE, *, padded: bool = False) -> tuple[LlamaForCausalLM, torch.Tensor]:
    model = build_model(shape, replace(SETTINGS, seed=3, init_std=0.2))  # large weights, so that nothing is near zero
    tokens = torch.randint(1, shape.vocab_size, (4, 13), generator=torch.Generator().manual_seed(1))
    if padded:
        tokens[1, 6:] = 0
        tokens[3, 1:] = 0
    return model, tokens


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("logits_per_chunk", [1 << 21, 40 * 7])
def test_loss_and_gradients_equal_hugging_face(
    tie: bool, padded: bool, logits_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_forward, "LOGITS_PER_CHUNK", logits_per_chunk)
    model, tokens = model_and_tokens(replace(SHAPE, tie=tie), padded=padded)
    labels = tokens.masked_fill(tokens == 0, -100)
    expected = model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = next_token_loss(model, tokens, rotary_tables(model, 13, torch.float32), pad_id=0)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4), name


def test_states_equal_hugging_face_at_float64() -> None:
    model, tokens = model_and_tokens()
    model = model.double()
    with torch.no_grad():
        expected = model.model(input_ids=tokens).last_hidden_state
        found = last_hidden(model, tokens, rotary_tables(model, 13, torch.float64)).view_as(expected)
    # Hugging Face computes the rotary angles and the norms in float32 whatever the weights.
    assert (found - expected).abs().max() < 1e-5


def test_hand_written_backward_passes_are_exact() -> None:
    tables = rotary_tables(build_model(replace(SHAPE, d_model=8), SETTINGS), 3, torch.float64)
    tables = tables._replace(cos_TE=tables.cos_TE.double(), sin_TE=tables.sin_TE.double())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3 * 8, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: training_forward._CausalAttention.apply(x, tables, 2), (x,))
    y = torch.randn(6, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.rand(8, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: training_forward._RMSNorm.apply(y, w, 1e-6, torch.float64), (y, w))
    g = torch.randn(6, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    out = training_forward._SwiGLU.apply(g, y.clone())
    out.square().sum().backward()
    expected = torch.autograd.grad((F.silu(g) * y).square().sum(), (g, y))
    assert torch.allclose(g.grad, expected[0]) and torch.allclose(y.grad, expected[1])  # type: ignore[arg-type]


def test_bfloat16_is_close() -> None:
    model, tokens = model_and_tokens()
    full = next_token_loss(model, tokens, rotary_tables(model, 13, torch.float32), 0)
    half = next_token_loss(model, tokens, rotary_tables(model, 13, torch.bfloat16), 0)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.03)


def test_padding_carries_no_loss() -> None:
    model, tokens = model_and_tokens(padded=True)
    short = next_token_loss(model, tokens[1:2, :6], rotary_tables(model, 6, torch.float32), 0)
    padded = next_token_loss(model, tokens[1:2], rotary_tables(model, 13, torch.float32), 0)
    assert padded.item() == pytest.approx(short.item(), abs=1e-5)


def test_schedule() -> None:
    settings = PretrainSettings(steps=110, lr=1.0, warmup_steps=10)
    assert learning_rate(settings, 0) == pytest.approx(0.1)
    assert learning_rate(settings, 9) == pytest.approx(1.0)
    assert learning_rate(settings, 59) == pytest.approx(0.55)  # halfway down the cosine
    assert learning_rate(settings, 109) == pytest.approx(0.1)
    assert all(learning_rate(settings, s) >= learning_rate(settings, s + 1) for s in range(9, 109))


@pytest.mark.parametrize("tie", [False, True])
def test_optimizer_groups(tie: bool) -> None:
    model = build_model(replace(SHAPE, tie=tie), SETTINGS)
    groups = make_optimizer(model, SETTINGS).param_groups
    for group in groups:
        for parameter in group["params"]:
            is_embedding = parameter is model.model.embed_tokens.weight
            assert group["lr_scale"] == (2.0 if is_embedding else 1.0)
            assert group["weight_decay"] == (0.0 if is_embedding or parameter.ndim == 1 else 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_initial_weights() -> None:
    state = torch.get_rng_state()
    model = build_model(replace(SHAPE, vocab_size=4000), SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    assert model.model.embed_tokens.weight[1:].std().item() == pytest.approx(0.1, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.model.embed_tokens.weight[0].abs().sum() == 0
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert (SHAPE.heads, SHAPE.mlp, LlamaShape(128, 480, 64).heads, LlamaShape(128, 480, 64).mlp) == (2, 88, 4, 344)


def run(settings: PretrainSettings) -> tuple[dict[int, dict[str, torch.Tensor]], dict[int, float], dict[str, list]]:
    weights: dict[int, dict[str, torch.Tensor]] = {}
    rates: dict[int, float] = {}

    def save(step: int, model: LlamaForCausalLM, lr: float) -> None:
        assert not model.training
        weights[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rates[step] = lr

    log = pretrain(SHAPE, settings, planted_batch, save, evaluate=lambda model: {"lm_loss_en": 1.5})
    return weights, rates, log.to_pydict()


def test_training_learns_and_logs() -> None:
    torch.set_num_threads(1)
    steps_seen: list[int] = []
    weights, rates, log = run(SETTINGS)
    assert list(weights) == [0, 1, 10, 60]
    initial = build_model(SHAPE, SETTINGS).state_dict()
    assert all(torch.equal(weights[0][name], initial[name]) for name in initial)
    assert rates[0] == 0.0 and rates[1] == pytest.approx(2e-3) and rates[60] == pytest.approx(1e-3)
    assert log["step"] == list(range(61)) and log["tokens_seen"] == [128 * s for s in range(61)]
    assert log["loss"][0] is None and log["loss"][1] > 3.5 and log["loss"][60] < 0.6 * log["loss"][1]
    assert [s for s in log["step"] if log["lm_loss_en"][s] is not None] == [0, 1, 10, 60]
    assert log["lr"][1] == rates[1] and log["grad_norm"][1] > 0
    pretrain(
        SHAPE,
        replace(SETTINGS, steps=3, checkpoint_steps=()),
        planted_batch,
        lambda *_: None,
        None,
        lambda s, _: steps_seen.append(s),
    )
    assert steps_seen == [1, 2, 3]


def test_same_seed_same_bytes() -> None:
    torch.set_num_threads(1)
    settings = replace(SETTINGS, steps=12, checkpoint_steps=(12,))
    torch.manual_seed(1)
    first, _, log = run(settings)
    torch.manual_seed(2)
    second, _, log_again = run(settings)
    assert all(torch.equal(first[12][name], second[12][name]) for name in first[12])
    assert log == log_again
    other, _, _ = run(replace(settings, seed=1))
    assert not torch.equal(first[12]["lm_head.weight"], other[12]["lm_head.weight"])


class Memory:
    """Keeps a copy of the training before every update, and gives one back."""

    def __init__(self, start: Memory | None = None, step: int = 0) -> None:
        self.start, self.step = start, step
        self.kept: dict[int, tuple[dict[str, torch.Tensor], str]] = {}
        self.training: Pretraining | None = None

    def restore(self, training: Pretraining) -> None:
        self.training = training
        if self.start is not None:
            tensors, notes = self.start.kept[self.step]
            for name, tensor in training.tensors().items():
                tensor.copy_(tensors[name])
            training.resume_at(self.step, json.loads(notes))

    def tick(self) -> None:
        assert self.training is not None
        copies = {name: tensor.clone() for name, tensor in self.training.tensors().items()}
        self.kept[self.training.steps] = copies, json.dumps(self.training.notes())

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize(("tie", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_goes_on_from_any_step_to_the_same_bytes(tie: bool, dtype: str) -> None:
    settings = replace(SETTINGS, steps=20, checkpoint_steps=(0, 8, 20), dtype=dtype)

    def run_from(keeper: Memory | None) -> tuple[dict[int, dict[str, torch.Tensor]], pa.Table]:
        saved: dict[int, dict[str, torch.Tensor]] = {}

        def save(step: int, model: LlamaForCausalLM, lr: float) -> None:
            saved[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        shape = replace(SHAPE, tie=tie)
        log = pretrain(shape, settings, planted_batch, save, lambda model: {"lm_loss_en": math.nan}, keeper=keeper)
        return saved, log

    plain, log = run_from(None)
    keeper = Memory()
    run_from(keeper)
    assert list(keeper.kept) == list(range(20))
    for step in (0, 1, 8, 13, 19):
        saved, log_again = run_from(Memory(keeper, step))
        assert list(saved) == [s for s in (0, 8, 20) if s >= step]
        assert all(torch.equal(plain[s][name], saved[s][name]) for s in saved for name in plain[s])
        assert str(log_again.to_pylist()) == str(log.to_pylist())  # NaN is not equal to itself


def test_first_update_scales_the_embedding_rate() -> None:
    """Adam's first update moves each weight by its group's learning rate: embeddings by twice as much."""
    weights, rates, _ = run(replace(SETTINGS, weight_decay=0.5, steps=60, checkpoint_steps=(0, 1)))

    def moved(name: str) -> torch.Tensor:
        return (weights[1][name] - weights[0][name]).abs()

    assert moved("model.embed_tokens.weight").max().item() == pytest.approx(2 * rates[1], rel=1e-2)
    assert moved("model.norm.weight").max().item() == pytest.approx(rates[1], rel=1e-2)


def test_nan_stops_before_anything_is_saved() -> None:
    saved: list[int] = []
    settings = replace(SETTINGS, lr=1e30, warmup_steps=1, checkpoint_steps=(0, 60))
    with pytest.raises(NonFiniteError, match=r"d_model 32: (loss|grad_norm) is (nan|inf) at update \d+ of 60"):
        pretrain(SHAPE, settings, planted_batch, lambda step, *_: saved.append(step))
    assert saved == [0]


def test_bad_input() -> None:
    with pytest.raises(InputError, match="d_model 33"):
        LlamaShape(33, 10, 8)
    with pytest.raises(InputError, match="float8"):
        replace(SETTINGS, dtype="float8")
    with pytest.raises(InputError, match=r"checkpoint step 61 lies outside 0\.\.60"):
        replace(SETTINGS, checkpoint_steps=(61,))
    with pytest.raises(InputError, match="token id 99"):
        pretrain(SHAPE, SETTINGS, lambda step: np.full((2, 8), 99), lambda *_: None)
    with pytest.raises(InputError, match="17 positions"):
        pretrain(SHAPE, SETTINGS, lambda step: np.full((2, 17), 2), lambda *_: None)


def test_saved_model_is_an_ordinary_llama(tmp_path) -> None:
    def save(step: int, model: LlamaForCausalLM, lr: float) -> None:
        model.save_pretrained(tmp_path / f"step_{step}")

    pretrain(SHAPE, replace(SETTINGS, steps=2, checkpoint_steps=(2,)), planted_batch, save)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "step_2")
    assert loaded.config.pad_token_id == 0 and loaded.config.num_hidden_layers == 2
