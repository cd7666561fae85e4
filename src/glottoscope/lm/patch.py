"""Changing hidden states while a model runs: edits at chosen layers, with another model stepping along on the same ids.

An edit gets the state of a layer and a `Step` that says which positions may change and what the donor's states are
there. `patched` puts edits into an ordinary Hugging Face model by hooks, also while it generates with a cache;
`finish` runs the upper part of a pass whose lower part is known, which is what many edits on one text need.

Shape legend: B sequences, T positions of this pass, P positions of the cache before it, D d_model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.lm.capture import capture, forward_arguments, right_padded
from glottoscope.lm.layers import decoder_blocks, n_layers
from glottoscope.lm.llama_pass import knows, llama_finish


@dataclass(eq=False)
class Step:
    """What an edit is told about the pass it takes part in.

    Attributes:
        ids_BT: token ids of the pass.
        counted_BT: positions that may change: neither padding nor special tokens.
        donor: layer -> the donor's state [B, T, D] at the same positions; empty without a donor.
        source_BT: place in the donor's states, then of another text, from which each position's addition is taken; None:
            the position itself.
    """

    ids_BT: Tensor
    counted_BT: Tensor
    donor: Mapping[int, Tensor] = field(default_factory=dict)
    source_BT: Tensor | None = None


Edit = Callable[[Tensor, Step], Tensor]
"""(state [B, T, D], step) -> state [B, T, D] of the same dtype; must leave positions that are not counted as they are."""


def counted_positions(ids_BT: Tensor, attention_BT: Tensor, special_ids: Iterable[int]) -> Tensor:
    """bool [B, T]: the positions that an edit may change."""
    special = torch.tensor(sorted(special_ids), dtype=torch.long, device=ids_BT.device)
    return attention_BT.bool() & ~torch.isin(ids_BT, special)


class Donor:
    """A model that reads what the patched model reads, up to its highest wanted layer, with a cache of its own.

    Args:
        layers: whose states are wanted.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self.model, self.layers = model, tuple(layers)
        self._cache: DynamicCache | None = None

    def read(self, ids_BT: Tensor, attention: Tensor, past: int, *, cached: bool) -> dict[int, Tensor]:
        """States of the wanted layers at ids [B, T] that follow `past` positions read before.

        Args:
            attention: [B, P + T], nonzero at real tokens.
            cached: whether more ids may follow.

        Raises:
            InputError: the positions before were not read by this donor.
        """
        if past == 0:
            self._cache = None
        if not cached and past == 0:
            return capture(self.model, ids_BT, attention, self.layers)
        have = 0 if self._cache is None else int(self._cache.get_seq_length())
        if have != past:
            raise InputError(
                f"the cache holds {past} positions and the donor has read {have}: start the generation inside the patch"
            )
        if self._cache is None:
            self._cache = DynamicCache()
        return capture(self.model, ids_BT, attention, self.layers, cache=self._cache)

    def repeat(self, times: int) -> None:
        """Let every sequence read so far stand for `times` sequences that go on differently."""
        if self._cache is not None:
            self._cache.batch_repeat_interleave(times)

    def select(self, rows: Tensor) -> None:
        """Go on with these sequences only."""
        if self._cache is not None:
            self._cache.batch_select_indices(rows)


@contextlib.contextmanager
def patched(
    model: PreTrainedModel, edits: Mapping[int, Edit], *, special_ids: Iterable[int] = (), donor: Donor | None = None
) -> Iterator[None]:
    """Within the block every forward pass of `model` goes through the edits, with or without a cache.

    Args:
        edits: layer -> edit; 0 is the input of the first block, L the output of block L.
        special_ids: tokens whose positions stay as they are (BOS, padding ...); positions that the attention mask
            leaves out stay so, too.
        donor: is given the same ids; its states reach the edits.

    Raises:
        InputError: a layer beyond the model; within the block, a pass without token ids or with a mask that is not
            [B, P + T]. Beam search reorders a cache that the donor cannot see: with a donor, generate greedily or sample.
    """
    blocks = decoder_blocks(model)
    for layer in edits:
        if not 0 <= layer <= len(blocks):
            raise InputError(f"layer {layer} does not exist: the model has {len(blocks)} layers, use 0..{len(blocks)}")
    special = tuple(special_ids)
    step: Step | None = None

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal step
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InputError("a patched model needs token ids: it was given embeddings")
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        attention = kwargs.get("attention_mask")
        if attention is None:
            attention = ids.new_ones(ids.shape[0], past + ids.shape[1])
        if not isinstance(attention, Tensor) or attention.shape != (ids.shape[0], past + ids.shape[1]):
            raise InputError("a patched model needs an attention mask [batch, positions], or none")
        counted = counted_positions(ids, attention[:, past:], special)
        states = {}
        if donor is not None:
            use_cache = kwargs.get("use_cache")
            cached = cache is not None or bool(model.config.use_cache if use_cache is None else use_cache)
            states = donor.read(ids, attention, past, cached=cached)
        step = Step(ids, counted, states)

    def current() -> Step:
        assert step is not None  # the base model's own hook comes first
        return step

    handles = [model.base_model.register_forward_pre_hook(begin, with_kwargs=True)]
    try:
        for layer, edit in edits.items():
            if layer == 0:
                handles.append(blocks[0].register_forward_pre_hook(_input_hook(edit, current), with_kwargs=True))
            else:
                handles.append(blocks[layer - 1].register_forward_hook(_output_hook(edit, current)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def finish(
    model: PreTrainedModel, ids_BT: Tensor, attention_BT: Tensor, state: tuple[int, Tensor], edits: Mapping[int, Edit], step: Step,
) -> Tensor:  # fmt: skip
    """The state after the final norm [B, T, D] of a cache-free pass with edits, none of them below the state's layer.

    Args:
        state: (layer, state [B, T, D] there) of the same pass without edits. A plain Llama on a CPU goes on from it;
            any other model makes its whole pass again.
        step: what the edits are given.
    """
    layer, x_BTD = state
    if right_padded(attention_BT) and knows(model):
        return llama_finish(model, x_BTD, layer, {at: _bound(edit, step) for at, edit in edits.items()})
    blocks = decoder_blocks(model)
    handles = []
    try:
        for at, edit in edits.items():
            if at == 0:
                handles.append(blocks[0].register_forward_pre_hook(_input_hook(edit, lambda: step), with_kwargs=True))
            else:
                handles.append(blocks[at - 1].register_forward_hook(_output_hook(edit, lambda: step)))
        with torch.no_grad():
            return model.base_model(input_ids=ids_BT, **forward_arguments(model, attention_BT)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()


def check_pair(base: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], names: tuple[str, str]) -> None:
    """Whether a donor's states can be added to a base's.

    Raises:
        InputError: they differ in width or vocabulary, or one lacks a layer; says which.
    """
    widths = [int(m.config.get_text_config().hidden_size) for m in (base, donor)]
    if widths[0] != widths[1]:
        raise InputError(
            f"base {names[0]} has width {widths[0]} and donor {names[1]} has width {widths[1]}: "
            "a state can only be added to one of the same width"
        )
    sizes = [int(m.config.get_text_config().vocab_size) for m in (base, donor)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"base {names[0]} has a vocabulary of {sizes[0]:,} and donor {names[1]} one of {sizes[1]:,}: "
            "both must read the same token ids"
        )
    for model, name in zip((base, donor), names, strict=True):
        for layer in layers:
            if not 0 <= layer <= n_layers(model):
                raise InputError(f"layer {layer} does not exist in {name}: use 0..{n_layers(model)}")


def _bound(edit: Edit, step: Step) -> Callable[[Tensor], Tensor]:
    return lambda x_BTD: edit(x_BTD, step)


def _input_hook(edit: Edit, step: Callable[[], Step]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0], step()), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"], step())}

    return hook


def _output_hook(edit: Edit, step: Callable[[], Step]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> Tensor | tuple[Any, ...]:
        if isinstance(output, tuple):  # before transformers 5
            return (edit(output[0], step()), *output[1:])
        return edit(output, step())

    return hook
