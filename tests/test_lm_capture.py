"""Hidden states: the right positions in the network, whatever the architecture, the output type and the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    OlmoConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from glottoscope.errors import InputError
from glottoscope.lm.capture import capture, capture_and_finish, forward_arguments
from glottoscope.lm.layers import decoder_blocks, embedding_module, n_layers
from glottoscope.lm.llama_pass import knows

COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "qwen2": Qwen2Config(num_key_value_heads=1, **COMMON),
    "olmo": OlmoConfig(**COMMON),
    "olmo2": Olmo2Config(**COMMON),
}
ALL_LAYERS = (0, 1, 2, 3)


def make(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
        for parameter in model.parameters():  # far from the near-linear network of the usual initialisation
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


def tokens(n: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, 50, (n, length), generator=torch.Generator().manual_seed(4))


def test_layers_equal_a_manual_forward(model: PreTrainedModel) -> None:
    """Layer 0 by hand from the embedding tables; layers 1..n by calling the blocks one after the other."""
    ids = tokens()
    states = capture(model, ids, torch.ones_like(ids), ALL_LAYERS)
    base: Any = model.base_model
    with torch.no_grad():
        expected = embedding_module(model)(ids)
        if model.config.model_type == "gpt2":
            expected = expected + base.wpe(torch.arange(9))[None]
        torch.testing.assert_close(states[0], expected)
        causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None].expand(3, 1, 9, 9)
        position_ids = torch.arange(9)[None]
        arguments: dict[str, Any] = {"attention_mask": causal}
        if hasattr(base, "rotary_emb"):
            arguments |= {"position_ids": position_ids, "position_embeddings": base.rotary_emb(expected, position_ids)}
        for layer, block in enumerate(decoder_blocks(model), start=1):
            output = block(expected, **arguments)
            expected = output[0] if isinstance(output, tuple) else output
            torch.testing.assert_close(states[layer], expected, atol=2e-5, rtol=1e-4)


def test_layers_equal_output_hidden_states_but_for_the_last(model: PreTrainedModel) -> None:
    ids = tokens()
    states = capture(model, ids, torch.ones_like(ids), ALL_LAYERS)
    with torch.no_grad():
        entries = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(3):
        torch.testing.assert_close(states[layer], entries[layer])
    assert not torch.allclose(states[3], entries[3], atol=1e-2)  # the last entry is post-norm
    base: Any = model.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    with torch.no_grad():
        torch.testing.assert_close(norm(states[3]), entries[3])


class TupleBlock(nn.Module):
    """A block as transformers 4 returns it: (hidden states, something else)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
        output = self.block(*args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output), "weights"


def test_tuple_outputs_are_accepted(model: PreTrainedModel) -> None:
    """The last block returns a tuple, whose first entry is the state, and runs last: the model never sees the tuple."""
    ids = tokens()
    expected = capture(model, ids, torch.ones_like(ids), ALL_LAYERS)
    blocks = decoder_blocks(model)
    blocks[2] = TupleBlock(blocks[2])
    found = capture(model, ids, torch.ones_like(ids), ALL_LAYERS)
    for layer in ALL_LAYERS:
        torch.testing.assert_close(found[layer], expected[layer])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_padding_does_not_change_real_positions(kind: str, side: str, attention: str) -> None:
    model = make(kind, attention)
    ids, lengths = tokens(), (9, 6, 2)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    places = [slice(0, n) if side == "right" else slice(9 - n, 9) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        padded[row, place] = ids[row, :n]
        mask[row, place] = 1
    states = capture(model, padded, mask, ALL_LAYERS)
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        alone = capture(model, ids[row : row + 1, :n], torch.ones(1, n), ALL_LAYERS)
        for layer in ALL_LAYERS:
            torch.testing.assert_close(states[layer][row, place], alone[layer][0], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [(0,), (1,), (2, 0), (3,), (1, 1)])
def test_early_stop_equals_full_run(model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    ids = tokens()
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(decoder_blocks(model), 1)]
    stopped = capture(model, ids, torch.ones_like(ids), layers)
    assert ran == list(range(1, max(layers) + 1))
    full = capture(model, ids, torch.ones_like(ids), layers, stop=False)
    assert len(ran) == max(layers) + 3
    for handle in handles:
        handle.remove()
    assert set(stopped) == set(full) == set(layers)
    for layer in layers:
        assert torch.equal(stopped[layer], full[layer])
        assert not full[layer].requires_grad


def test_bfloat16(model: PreTrainedModel) -> None:
    ids = tokens()
    full = capture(model, ids, torch.ones_like(ids), (2,))[2]
    half = capture(model.bfloat16(), ids, torch.ones_like(ids), (2,))[2]
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), full, dim=-1).min() > 0.99


def test_hooks_are_removed_and_bad_layers_refused(model: PreTrainedModel) -> None:
    ids = tokens()
    blocks = decoder_blocks(model)
    with pytest.raises(InputError, match=r"layer 30 does not exist: the model has 3 layers, use 0\.\.3"):
        capture(model, ids, torch.ones_like(ids), (1, 30))
    with pytest.raises(InputError, match="layer -1"):
        capture(model, ids, torch.ones_like(ids), (-1,))
    with pytest.raises(IndexError):
        capture(model, ids + 1000, torch.ones_like(ids), (0, 2))
    capture(model, ids, torch.ones_like(ids), (0, 2))
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in blocks)
    assert capture(model, ids, torch.ones_like(ids), ()) == {}


class OddNames(nn.Module):
    def __init__(self, n_lists: int) -> None:
        super().__init__()
        self.config = CONFIGS["llama"]
        self.base_model = nn.Module()
        for i in range(n_lists):
            setattr(self.base_model, f"stack_{i}", nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))


def test_unknown_architectures() -> None:
    odd: Any = OddNames(1)
    assert decoder_blocks(odd) is odd.base_model.stack_0
    assert n_layers(odd) == 3
    for n_lists in (0, 2):
        ambiguous: Any = OddNames(n_lists)
        with pytest.raises(InputError, match="cannot find the 3 decoder blocks of OddNames"):
            decoder_blocks(ambiguous)


LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 12},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        }
    },
    "bias": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("kind", list(LLAMAS))
def test_the_short_pass_of_a_llama_is_its_ordinary_pass(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**COMMON, **LLAMAS[kind]})).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    ids = tokens()
    assert knows(model) == (kind != "bias")
    states, last = capture_and_finish(model, ids, torch.ones_like(ids), ALL_LAYERS)
    few = capture(model, ids, torch.ones_like(ids), (2, 0))
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)  # a hook: the ordinary way
    assert not knows(model)
    expected, ordinary_last = capture_and_finish(model, ids, torch.ones_like(ids), ALL_LAYERS)
    handle.remove()
    for layer in ALL_LAYERS:
        torch.testing.assert_close(states[layer], expected[layer], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(last, ordinary_last, rtol=2e-5, atol=2e-5)
    assert list(few) == [2, 0] and all(torch.equal(few[layer], states[layer]) for layer in few)


def test_a_module_in_anothers_place_is_called() -> None:
    model: Any = make("llama")
    ids = tokens()
    before = capture(model, ids, torch.ones_like(ids), [3])[3]

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    old = model.model.layers[0].mlp.up_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight.data = old.weight.data / 2
    model.model.layers[0].mlp.up_proj = new
    torch.testing.assert_close(capture(model, ids, torch.ones_like(ids), [3])[3], before)
    new.weight.data = old.weight.data
    assert not torch.allclose(capture(model, ids, torch.ones_like(ids), [3])[3], before, atol=1e-2)


def test_a_mask_is_left_out_only_where_it_changes_nothing() -> None:
    full, right = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    left, hole = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    model = make("llama")
    masked = ["attention_mask" in forward_arguments(model, m) for m in (full, right, left, hole)]
    assert masked == [False, False, True, True]
    both_ways = BertLMHeadModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    assert "attention_mask" in forward_arguments(both_ways, right)
