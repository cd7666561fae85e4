"""Loss per language: equal to a loop over positions, whatever the chunks; padding and uncounted targets stay out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from glottoscope.errors import InputError
from glottoscope.lm import losses
from glottoscope.lm.losses import lm_loss

LLAMA = LlamaConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 30, (4, 12), generator=generator)
    attention = torch.ones_like(tokens)
    attention[1, 7:] = 0
    count = attention.bool().clone()
    count[:, 0] = False
    count[2, 5] = False
    language = torch.randint(0, 3, (4, 12), generator=generator).to(torch.uint8)
    language[attention == 0] = 255
    return tokens, attention, count, language


@pytest.mark.parametrize("logits_per_chunk", [1, 30 * 7, 1 << 23])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_equals_a_loop(kind: str, logits_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", logits_per_chunk)
    gpt2 = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (LlamaForCausalLM(LLAMA) if kind == "llama" else GPT2LMHeadModel(gpt2)).eval()
    tokens, attention, count, language = batch()
    nll_sum, n = lm_loss(model, tokens, attention, count, language, 3)
    expected, expected_n = np.zeros(3), np.zeros(3, int)
    with torch.no_grad():
        log_p = model(input_ids=tokens, attention_mask=attention).logits.log_softmax(-1)
    for b, t in zip(*np.nonzero(count.numpy()), strict=True):
        expected[language[b, t]] -= log_p[b, t - 1, tokens[b, t]].item()
        expected_n[language[b, t]] += 1
    assert n.tolist() == expected_n.tolist() and n.dtype == np.int64
    assert nll_sum == pytest.approx(expected, rel=1e-5) and nll_sum.dtype == np.float64
    assert nll_sum.sum() / n.sum() == pytest.approx(math.log(30), rel=0.1)


def test_nothing_counted() -> None:
    tokens, attention, count, language = batch()
    nll_sum, n = lm_loss(LlamaForCausalLM(LLAMA).eval(), tokens, attention, torch.zeros_like(count), language, 2)
    assert nll_sum.tolist() == [0.0, 0.0] and n.tolist() == [0, 0]


def test_softcapped_heads_are_refused() -> None:
    config = Gemma2Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, final_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(InputError, match="final_logit_softcapping"):
        lm_loss(Gemma2ForCausalLM(config).eval(), *batch(), 3)
