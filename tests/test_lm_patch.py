"""Edits of hidden states while a model runs: where they act, what they leave alone, and the donor that reads along.

Shapes: B sequences, T positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from test_lm_capture import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.lm.capture import capture
from glottoscope.lm.layers import decoder_blocks
from glottoscope.lm.llama_pass import knows
from glottoscope.lm.patch import Donor, Edit, Step, check_pair, counted_positions, finish, patched

PAD, BOS, SPECIAL = 0, 1, (0, 1, 2)
KINDS = list(CONFIGS)


@cache
def model_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of three layers, width 16 and 50 tokens; tests share it and leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="sdpa")
        for parameter in model.parameters():  # far from the near-linear network of the usual initialisation
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().to(dtype)


def rows_of(lengths: tuple[int, ...], side: str = "right", seed: int = 4) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T]: BOS and random tokens, padded on one side."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, place] = torch.cat([torch.tensor([BOS]), torch.randint(3, 50, (n - 1,), generator=generator)])
        mask[row, place] = 1
    return ids, mask


def places(mask_BT: Tensor) -> Tensor:
    """Position ids [B, T] that count real tokens only, as `generate` makes them."""
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """A plain Hugging Face pass without a cache."""
    mask = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    return model(input_ids=ids_BT, attention_mask=mask, position_ids=places(mask), use_cache=False).logits


def towards(layer: int, share: float) -> Edit:
    """An edit that goes a share of the way to the donor's state, at counted positions."""

    def edit(h_BTD: Tensor, step: Step) -> Tensor:
        return torch.where(step.counted_BT[..., None], h_BTD + share * (step.donor[layer] - h_BTD), h_BTD)

    return edit


def no_hooks(model: PreTrainedModel) -> bool:
    return all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# Where an edit acts


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_another_text_gives_the_other_texts_logits(kind: str, layer: int) -> None:
    model = model_of(kind)
    ids, other = (torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    theirs = capture(model, other, torch.ones_like(other), [layer])[layer]
    with patched(model, {layer: lambda _h, _step: theirs}):
        found = logits_of(model, ids)
    torch.testing.assert_close(found, logits_of(model, other), atol=3e-5, rtol=1e-5)
    assert not torch.allclose(found, logits_of(model, ids), atol=1e-2)
    assert no_hooks(model)


def test_edits_act_in_order_of_layers_and_patches_add_up() -> None:
    model, seen = model_of("llama"), []
    ids, mask = rows_of((5, 5))

    def shift(name: str, size: float) -> Edit:
        def edit(h_BTD: Tensor, _step: Step) -> Tensor:
            seen.append(name)
            return h_BTD + size

        return edit

    with patched(model, {3: shift("3", 0.5), 0: shift("0", 0.1), 1: shift("1", 0.25)}):
        together = logits_of(model, ids, mask)
    assert seen == ["0", "1", "3"]
    with patched(model, {1: shift("1", 0.25), 0: shift("0", 0.1)}), patched(model, {3: shift("3", 0.5)}):
        assert torch.equal(logits_of(model, ids, mask), together)
    assert no_hooks(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_is_told_the_ids_and_what_may_change(kind: str) -> None:
    model, steps = model_of(kind), []

    def note(h_BTD: Tensor, step: Step) -> Tensor:
        steps.append((h_BTD.shape[:2], step))
        return h_BTD

    ids, mask = rows_of((5, 3), "left")
    ids[0, 2] = 2  # a special token within the text
    cache = DynamicCache()
    with patched(model, {1: note}, special_ids=SPECIAL), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        later = torch.cat([mask, torch.tensor([[1, 1], [1, 0]])], dim=1)
        model(input_ids=torch.tensor([[7, 2], [8, 9]]), attention_mask=later, past_key_values=cache, use_cache=True)
        model(input_ids=ids)
    expected = [
        [[False, True, False, True, True], [False, False, False, True, True]],
        [[True, False], [True, False]],
        [[False, True, False, True, True], [False, False, False, True, True]],  # no mask: padding is a special token, too
    ]
    assert [step.counted_BT.tolist() for _, step in steps] == expected
    assert [tuple(shape) for shape, _ in steps] == [(2, 5), (2, 2), (2, 5)]
    assert steps[1][1].ids_BT.tolist() == [[7, 2], [8, 9]] and all(not step.donor for _, step in steps)


def test_a_mask_given_by_place_counts() -> None:
    model, counted = model_of("llama"), []
    ids, mask = rows_of((4, 2))

    def note(h_BTD: Tensor, step: Step) -> Tensor:
        counted.append(step.counted_BT)
        return h_BTD

    with patched(model, {1: note}), torch.no_grad():
        model.base_model(ids, mask)
        model.base_model(ids, attention_mask=mask)
    assert torch.equal(counted[0], mask.bool()) and torch.equal(counted[1], mask.bool())


def test_counted_positions() -> None:
    ids, mask = torch.tensor([[1, 5, 2, 6, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    assert counted_positions(ids, mask, {0, 1, 2}).tolist() == [[False, True, False, True, False]]
    assert counted_positions(ids, mask, ()).tolist() == [[True, True, True, True, False]]


# The donor


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_donor_reads_in_pieces_what_it_reads_at_once(kind: str, layer: int) -> None:
    """One row read first and shared by three, pieces of unlike length, padding between, and rows that leave."""
    model = model_of(kind, 1)
    prefix, (ids, mask) = torch.tensor([[BOS, 9, 4]]), rows_of((6, 4, 5), "left")
    whole_ids, whole_mask = torch.cat([prefix.expand(3, -1), ids], 1), torch.cat([torch.ones(3, 3, dtype=torch.long), mask], 1)
    expected = capture(model, whole_ids, whole_mask, [layer])[layer]
    donor = Donor(model, [layer])
    found = [donor.read(prefix, torch.ones(1, 3), 0, cached=True)[layer].expand(3, -1, -1)]
    donor.repeat(3)
    found.append(donor.read(ids[:, :4], whole_mask[:, :7], 3, cached=True)[layer])
    keep = torch.tensor([2, 0])
    donor.select(keep)
    found.append(donor.read(ids[keep, 4:5], whole_mask[keep, :8], 7, cached=True)[layer])
    found.append(donor.read(ids[keep, 5:], whole_mask[keep], 8, cached=True)[layer])
    early, late = torch.cat(found[:2], 1), torch.cat(found[2:], 1)
    real = whole_mask.bool()
    torch.testing.assert_close(early[real[:, :7]], expected[:, :7][real[:, :7]], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(late, expected[keep, 7:], atol=3e-5, rtol=1e-4)
    again = donor.read(ids[:, :2], mask[:, :2], 0, cached=True)[layer]  # a new text: what was read is forgotten
    fresh = capture(model, ids[:, :2], mask[:, :2], [layer])[layer]
    torch.testing.assert_close(again[mask[:, :2].bool()], fresh[mask[:, :2].bool()], atol=3e-5, rtol=1e-4)


def test_a_donor_says_when_it_has_not_read_the_past() -> None:
    model, donor = model_of("llama"), Donor(model_of("llama", 1), [1])
    ids, mask = rows_of((6,))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        with (
            patched(model, {1: towards(1, 0.5)}, donor=donor),
            pytest.raises(InputError, match="the cache holds 4 positions and the donor has read 0: start the generation inside"),
        ):
            model(input_ids=ids[:, 4:5], past_key_values=cache, use_cache=True)
    donor.read(ids, mask, 0, cached=True)
    with pytest.raises(InputError, match="the cache holds 5 positions and the donor has read 6"):
        donor.read(ids[:, :1], mask, 5, cached=True)
    donor.read(ids, mask, 0, cached=False)  # a pass without a cache leaves nothing to go on from
    with pytest.raises(InputError, match="the cache holds 6 positions and the donor has read 0"):
        donor.read(ids[:, :1], mask, 6, cached=True)
    assert no_hooks(model) and no_hooks(donor.model)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_may_be_its_own_donor(kind: str, layer: int) -> None:
    """It reads unpatched: going to its own state goes nowhere, and to the state without another edit undoes that edit."""
    model = model_of(kind)
    ids, mask = rows_of((6, 4), "left")
    plain = logits_of(model, ids, mask)
    with patched(model, {layer: towards(layer, 0.5)}, donor=Donor(model, [layer]), special_ids=SPECIAL):
        own = logits_of(model, ids, mask)
    torch.testing.assert_close(own[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-5)
    with patched(model, {0: lambda h, _: h + 1, 3: lambda _h, step: step.donor[3]}, donor=Donor(model, [3])):
        undone = logits_of(model, ids, mask)
    torch.testing.assert_close(undone[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-5)


# Going on from a known layer


def after_edits(model: PreTrainedModel, ids: Tensor, mask: Tensor, edits: Mapping[int, Edit], donor: PreTrainedModel) -> Tensor:
    """The state after the final norm [B, T, D] of a whole pass with hooks."""
    with patched(model, edits, special_ids=SPECIAL, donor=Donor(donor, sorted(edits))), torch.no_grad():
        return model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False
        ).last_hidden_state  # fmt: skip


@pytest.mark.parametrize(("known", "layers"), [(0, (0,)), (0, (1, 3)), (1, (1,)), (1, (1, 2, 3)), (2, (3,)), (3, (3,)), (2, ())])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "grouped", "gpt2", "gpt_neox"])
def test_finish_is_the_whole_pass(kind: str, side: str, known: int, layers: tuple[int, ...]) -> None:
    base, donor = (grouped(seed) if kind == "grouped" else model_of(kind, seed) for seed in (0, 1))
    ids, mask = rows_of((7, 4, 6), side)
    edits = {layer: towards(layer, 0.3) for layer in layers}
    step = Step(ids, counted_positions(ids, mask, SPECIAL), capture(donor, ids, mask, layers))
    state = capture(base, ids, mask, [known])[known]
    before = state.clone()
    found = finish(base, ids, mask, (known, state), edits, step)
    expected = after_edits(base, ids, mask, edits, donor)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
    assert torch.equal(state, before)  # other conditions go on from it, too
    assert knows(base) == (kind in ("llama", "grouped")) and no_hooks(base)


@cache
def grouped(seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: Any = {**CONFIGS["llama"].to_dict(), "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("at", [0, 2])
def test_a_model_with_hooks_of_others_goes_the_ordinary_way(at: int) -> None:
    """Their hook changes a state below or above the known layer: the pass must hold it, and its caller must see it run."""
    base, donor = model_of("llama"), model_of("llama", 1)
    ids, mask = rows_of((7, 4))
    edits, ran = {1: towards(1, 0.3)}, []

    def theirs(_module: Any, _args: Any, output: Tensor) -> Tensor:
        ran.append(output.shape)
        return output.roll(1, dims=-1)

    step = Step(ids, counted_positions(ids, mask, SPECIAL), capture(donor, ids, mask, [1]))
    plain = finish(base, ids, mask, (1, capture(base, ids, mask, [1])[1]), edits, step)
    handle = decoder_blocks(base)[at].register_forward_hook(theirs)
    try:
        assert not knows(base)
        found = finish(base, ids, mask, (1, capture(base, ids, mask, [1])[1]), edits, step)
        assert ran
        expected = after_edits(base, ids, mask, edits, donor)
    finally:
        handle.remove()
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert no_hooks(base)


# Bad input


def test_what_a_patched_model_refuses() -> None:
    model = model_of("llama")
    ids, mask = rows_of((5, 3))
    for layer in (-1, 4):
        with pytest.raises(InputError, match=rf"layer {layer} does not exist: the model has 3 layers, use 0\.\.3"), \
                patched(model, {layer: lambda h, _: h}):  # fmt: skip
            pass
    with patched(model, {1: lambda h, _: h}), torch.no_grad():
        with pytest.raises(InputError, match="needs token ids: it was given embeddings"):
            model(inputs_embeds=torch.zeros(2, 5, 16))
        for wrong in (mask[:, :3], mask[:1], mask[:, None, None, :].float()):
            with pytest.raises(InputError, match=r"needs an attention mask \[batch, positions\], or none"):
                model(input_ids=ids, attention_mask=wrong)
        cache = DynamicCache()
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="needs an attention mask"):  # of the new position alone
            model(input_ids=ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache, use_cache=True)

    def broken(_h: Tensor, _step: Step) -> Tensor:
        raise ValueError("an edit that fails")

    plain = logits_of(model, ids, mask)
    with pytest.raises(ValueError, match="an edit that fails"), patched(model, {0: broken, 2: broken}):
        logits_of(model, ids, mask)
    assert no_hooks(model) and torch.equal(logits_of(model, ids, mask), plain)


def test_pairs_that_do_not_fit() -> None:
    def llama(**changed: int) -> PreTrainedModel:
        return LlamaForCausalLM(LlamaConfig(**{**CONFIGS["llama"].to_dict(), **changed}))

    base, names = model_of("llama"), ("half@300", "full@600")
    check_pair(base, llama(), [0, 3], names)
    check_pair(base, model_of("gpt2"), [0, 3], names)  # another architecture of the same width is no error
    with pytest.raises(InputError, match="base half@300 has width 16 and donor full@600 has width 24: a state can only be added"):
        check_pair(base, llama(hidden_size=24), [1], names)
    with pytest.raises(InputError, match="base half@300 has a vocabulary of 50 and donor full@600 one of 1,051: both must read"):
        check_pair(base, llama(vocab_size=1051), [1], names)
    with pytest.raises(InputError, match=r"layer 3 does not exist in full@600: use 0\.\.2"):
        check_pair(base, llama(num_hidden_layers=2), [1, 3], names)
    with pytest.raises(InputError, match=r"layer 3 does not exist in half@300: use 0\.\.2"):
        check_pair(llama(num_hidden_layers=2), base, [3], names)
