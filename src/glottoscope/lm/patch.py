"""Changing hidden states while a model runs: edits at chosen layers, with another model stepping along on the same ids.

An edit gets the state of a layer and a `Step` that says which positions may change and what the donor's states are
there. `patched` puts edits into an ordinary Hugging Face model by hooks, also while it generates with a cache;
`finish` runs the upper part of a pass whose lower part is known, which is what many edits on one text need.

Shape legend: B sequences, T positions of this pass, P positions of the cache before it, D d_model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glottoscope.errors import InputError
from glottoscope.lm.capture import capture, forward_arguments, right_padded
from glottoscope.lm.layers import decoder_blocks, n_layers
from glottoscope.lm.llama_pass import knows, llama_finish

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


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
Change = Callable[[Tensor], Tensor]


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
        self._have = 0  # positions read; the cache of a pass that ends at the first block holds none

    def read(self, ids_BT: Tensor, attention: Tensor, past: int, *, cached: bool) -> dict[int, Tensor]:
        """States of the wanted layers at ids [B, T] that follow `past` positions read before.

        Args:
            attention: [B, P + T], nonzero at real tokens.
            cached: whether more ids may follow.

        Raises:
            InputError: the positions before were not read by this donor.
        """
        if past == 0:
            self._cache, self._have = None, 0
        if not cached and past == 0:
            return capture(self.model, ids_BT, attention, self.layers)
        if self._have != past:
            raise InputError(
                f"the cache holds {past} positions and the donor has read {self._have}: start the generation inside the patch"
            )
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache()
        self._have += ids_BT.shape[1]
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
        donor: is given the same ids; its states reach the edits. It may be `model` itself, which then reads unpatched.

    Raises:
        InputError: a layer beyond the model; within the block, a pass without token ids or with a mask that is not
            [B, P + T].

    With a donor, generate greedily or sample. Beam search reorders a cache that the donor cannot see, which is not noticed.
    """
    check_layers(model, edits)
    special = tuple(special_ids)
    names = list(inspect.signature(model.base_model.forward).parameters)
    step: Step | None = None
    reading = False

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal step, reading
        if reading:
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if ids is None:
            raise InputError("a patched model needs token ids: it was given embeddings")
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        attention = given.get("attention_mask")
        if attention is None:
            attention = ids.new_ones(ids.shape[0], past + ids.shape[1])
        if not isinstance(attention, Tensor) or attention.shape != (ids.shape[0], past + ids.shape[1]):
            raise InputError("a patched model needs an attention mask [batch, positions], or none")
        counted = counted_positions(ids, attention[:, past:], special)
        states = {}
        if donor is not None:
            use_cache = given.get("use_cache")
            cached = cache is not None or bool(model.config.use_cache if use_cache is None else use_cache)
            reading = True
            try:
                states = donor.read(ids, attention, past, cached=cached)
            finally:
                reading = False
        step = Step(ids, counted, states)

    def change(edit: Edit, x_BTD: Tensor) -> Tensor:
        if reading:
            return x_BTD
        assert step is not None  # the base model's own hook comes first
        return edit(x_BTD, step)

    handle = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with _hooked(model, {layer: partial(change, edit) for layer, edit in edits.items()}):
            yield
    finally:
        handle.remove()


def finish(
    model: PreTrainedModel, ids_BT: Tensor, attention_BT: Tensor, state: tuple[int, Tensor], edits: Mapping[int, Edit], step: Step,
) -> Tensor:  # fmt: skip
    """The state after the final norm [B, T, D] of a cache-free pass with edits, none of them below the state's layer.

    Args:
        state: (layer, state [B, T, D] there) of the same pass without edits. A plain Llama on a CPU goes on from it;
            any other model makes its whole pass again.
        step: what the edits are given.

    Raises:
        InputError: a layer beyond the model.
    """
    layer, x_BTD = state
    check_layers(model, edits)
    assert all(at >= layer for at in edits)  # what is known would not hold them
    changes: dict[int, Change] = {at: _bound(edit, step) for at, edit in edits.items()}
    if right_padded(attention_BT) and knows(model):
        return llama_finish(model, x_BTD, layer, changes)
    with _hooked(model, changes), torch.no_grad():
        return model.base_model(input_ids=ids_BT, **forward_arguments(model, attention_BT)).last_hidden_state


def check_layers(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Raises InputError where the model has no such layer."""
    n = n_layers(model)
    for layer in layers:
        if not 0 <= layer <= n:
            raise InputError(f"layer {layer} does not exist: the model has {n} layers, use 0..{n}")


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


def _bound(edit: Edit, step: Step) -> Change:
    return lambda x_BTD: edit(x_BTD, step)


@contextlib.contextmanager
def _hooked(model: PreTrainedModel, changes: Mapping[int, Change]) -> Iterator[None]:
    """Within the block the state of every layer named goes through its function."""
    blocks = decoder_blocks(model)
    handles = []
    try:
        for layer, change in changes.items():
            if layer == 0:
                handles.append(blocks[0].register_forward_pre_hook(_input_hook(change), with_kwargs=True))
            else:
                handles.append(blocks[layer - 1].register_forward_hook(_output_hook(change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(change: Change) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _output_hook(change: Change) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> Tensor | tuple[Any, ...]:
        if isinstance(output, tuple):  # before transformers 5
            return (change(output[0]), *output[1:])
        return change(output)

    return hook
