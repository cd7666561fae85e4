"""A Llama that reads on: the same states as the whole sequence at once, with padding, a shared beginning and rows dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from glottoscope.lm.capture import capture_and_finish
from glottoscope.lm.llama_pass import knows
from glottoscope.lm.llama_steps import ROOM, LlamaSteps

LAYERS = (0, 1, 2, 3)


def make(key_heads: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=key_heads,
            intermediate_size=24, max_position_embeddings=128,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # far from the near-linear network of the usual initialisation
            parameter.data += 0.2 * torch.randn_like(parameter)
    assert knows(model.eval())
    return model


def sequences(rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and where they are real, padded on the left by different amounts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (rows, longest), generator=generator)
    real = torch.arange(longest) >= torch.randint(0, longest - 1, (rows, 1), generator=generator)
    real[0] = True
    return ids, real


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("pieces", [(9,), (4, 5), (3, *[1] * 6)])
def test_read_in_pieces_is_the_whole_sequence(key_heads: int, pieces: tuple[int, ...]) -> None:
    model = make(key_heads)
    ids, real = sequences(5, 9)
    # Padding is only at the beginning of what is read first: the first piece holds all of it.
    real[:, pieces[0] - 1 :] = True
    expected, last = capture_and_finish(model, ids, real.long(), LAYERS)
    steps, place = LlamaSteps(model), 0
    found: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    ends = []
    for n in pieces:
        states, end = steps.read(ids[:, place : place + n], real[:, place : place + n])
        assert end is not None
        ends.append(end)
        for layer in LAYERS:
            found[layer].append(states[layer])
        place += n
    torch.testing.assert_close(torch.cat(ends, dim=1)[real], last[real], atol=2e-5, rtol=1e-5)
    for layer in LAYERS:
        torch.testing.assert_close(torch.cat(found[layer], dim=1)[real], expected[layer][real], atol=2e-5, rtol=1e-5)


def test_shared_beginning_dropped_rows_and_more_room() -> None:
    model = make(2)
    n_new = ROOM + 5
    prefix = torch.arange(3, 10)[None]
    ids, real = sequences(6, 4)
    more = torch.randint(3, 60, (6, n_new), generator=torch.Generator().manual_seed(2))
    kept = torch.tensor([1, 2, 5])
    steps = LlamaSteps(model)
    steps.read(prefix, torch.ones_like(prefix, dtype=torch.bool))
    steps.repeat(6)
    steps.read(ids, real)
    steps.read(more[:, :1], torch.ones(6, 1, dtype=torch.bool))
    steps.select(kept)
    last = None
    for i in range(1, n_new):
        _, last = steps.read(more[kept, i : i + 1], torch.ones(3, 1, dtype=torch.bool))
    for row, j in enumerate(kept.tolist()):
        whole = torch.cat([prefix[0], ids[j][real[j]], more[j]])[None]
        _, expected = capture_and_finish(model, whole, torch.ones_like(whole), [3])
        assert last is not None
        torch.testing.assert_close(last[row, -1], expected[0, -1], atol=2e-5, rtol=1e-5)


def test_edits_reach_what_follows_and_depth_ends_early() -> None:
    model = make(4)
    ids, real = sequences(3, 6)
    real[:] = True
    direction = torch.linspace(-1, 1, 16)
    edits = {1: lambda x: x + direction, 3: lambda x: 2 * x}
    steps = LlamaSteps(model)
    first, _ = steps.read(ids[:, :4], real[:, :4], edits)
    second, last = steps.read(ids[:, 4:], real[:, 4:], edits)

    def hook(edit):
        return lambda _module, _args, output: (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handles = [model.model.layers[layer - 1].register_forward_hook(hook(edit)) for layer, edit in edits.items()]
    try:
        with torch.no_grad():
            expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    assert last is not None
    torch.testing.assert_close(last, expected[:, 4:], atol=2e-5, rtol=1e-5)
    short, nothing = LlamaSteps(model, 1).read(ids, real)
    assert nothing is None
    assert set(short) == {0, 1}
    torch.testing.assert_close(short[1], torch.cat([first[1], second[1]], dim=1), atol=2e-5, rtol=1e-5)
