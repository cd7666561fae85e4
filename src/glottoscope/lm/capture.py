"""Hidden states of chosen layers in one forward pass, by hooks that accept what any transformers version hands over.

`output_hidden_states` is never used: its last entry is post-norm, and it keeps every layer.
Shape legend: B sequences, T positions, D d_model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.lm.layers import decoder_blocks
from glottoscope.lm.llama_pass import knows, llama_states

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class _AllCaptured(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


def capture(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int], *, stop: bool = True,
    cache: Cache | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """Hidden states of `layers`: 0 the input of the first block, L the output of block L, before the final norm.

    Args:
        input_ids: LongTensor [B, T].
        attention_mask: [B, T], nonzero at real tokens; padding may be on either side and never changes the states of
            real tokens.
        stop: end the pass after the highest layer asked for (the same states, less work).
        cache: positions read before, to which these are added; attention_mask is then [B, P + T]. A cache that has
            seen passes ended at a layer is of use only for passes that end there.

    Returns:
        layer -> [B, T, D] in the model's dtype, without gradient; states at padding mean nothing.

    Raises:
        InputError: a layer beyond the model.
    """
    return _capture(model, input_ids, attention_mask, layers, stop=stop, cache=cache)[0]


def capture_and_finish(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """`capture` in a pass that goes on to the end: also the base model's last hidden state [B, T, D], after the final
    norm, from which the head makes its logits."""
    states, last_BTD = _capture(model, input_ids, attention_mask, layers, stop=False)
    assert last_BTD is not None
    return states, last_BTD


def _capture(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int], *, stop: bool,
    cache: Cache | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:  # fmt: skip
    blocks = decoder_blocks(model)
    outside = [layer for layer in layers if not 0 <= layer <= len(blocks)]
    if outside:
        raise InputError(f"layer {outside[0]} does not exist: the model has {len(blocks)} layers, use 0..{len(blocks)}")
    if not layers and stop:
        return {}, None
    if cache is None and right_padded(attention_mask) and knows(model):
        return llama_states(model, input_ids, layers, finish=not stop)
    last, output = max(layers, default=0), None
    states: dict[int, Tensor] = {}

    def keep(layer: int, state: Tensor) -> None:
        states[layer] = state
        if stop and layer == last:
            raise _AllCaptured

    handles = []
    try:
        for layer in sorted(set(layers)):
            if layer == 0:
                handles.append(blocks[0].register_forward_pre_hook(_input_hook(keep), with_kwargs=True))
            else:
                handles.append(blocks[layer - 1].register_forward_hook(_output_hook(keep, layer)))
        if cache is None:
            arguments = forward_arguments(model, attention_mask)
        else:
            arguments = cached_arguments(model, attention_mask, input_ids.shape[1]) | {"past_key_values": cache}
        with torch.no_grad(), contextlib.suppress(_AllCaptured):
            output = model.base_model(input_ids=input_ids, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: states[layer] for layer in layers}, None if output is None else output.last_hidden_state


def forward_arguments(model: PreTrainedModel, attention_mask: Tensor) -> dict[str, Any]:
    """Keyword arguments of a cache-free forward pass of the base model.

    Positions count real tokens only, as `generate` counts them, so that left padding does not shift them; models
    without `position_ids` (ALiBi) derive them from the mask themselves. Padding on the right only needs no mask where
    the model is causal: its real positions never see it, and attention without a mask does less.
    """
    if bool(attention_mask.bool().all()) or (right_padded(attention_mask) and is_causal(model)):
        return {"use_cache": False}
    arguments: dict[str, Any] = {"attention_mask": attention_mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        arguments["position_ids"] = (arguments["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return arguments


def cached_arguments(model: PreTrainedModel, attention_mask: Tensor, new: int) -> dict[str, Any]:
    """Keyword arguments of a pass with a cache: the mask of all positions [B, P + T], and the places of the `new` ones.

    Positions count real tokens only, so that left padding does not shift them.
    """
    arguments: dict[str, Any] = {"attention_mask": attention_mask.long(), "use_cache": True}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        arguments["position_ids"] = (arguments["attention_mask"].cumsum(-1) - 1).clamp_min(0)[:, -new:]
    return arguments


def right_padded(attention_mask: Tensor) -> bool:
    """Whether no padding [B, T] stands before a real token."""
    real = attention_mask.bool()
    return not bool((real[:, 1:] & ~real[:, :-1]).any())


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the attention of every block says that it is causal; a model that says nothing gets its mask."""
    found = [m.is_causal for m in model.base_model.modules() if hasattr(m, "is_causal")]
    return bool(found) and all(found) and getattr(model.config, "is_causal", True) is not False


def _input_hook(keep: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _output_hook(keep: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        keep(layer, output[0] if isinstance(output, tuple) else output)  # a tuple before transformers 5

    return hook
