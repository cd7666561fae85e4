"""Where the layers of a language model are. Layer 0 is the input of the first decoder block (embeddings, with learned
position embeddings where the model adds them there), layer L = 1..n the output of block L, before the final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from glottoscope.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_NAMES = ("layers", "h", "blocks", "decoder.layers")  # Llama, NeoX, Qwen2, OLMo | GPT-2 | MPT | OPT


def n_layers(model: PreTrainedModel) -> int:
    """Number of decoder blocks, from the model's own configuration."""
    return int(model.config.get_text_config().num_hidden_layers)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks in order.

    Known names are looked up in the base model first; otherwise the one ModuleList with `num_hidden_layers` entries is
    taken.

    Raises:
        InputError: no such list, or more than one.
    """
    base = model.base_model
    expected = n_layers(model)
    for name in BLOCK_NAMES:
        found: object = base
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList) and len(found) == expected:
            return found
    candidates = {name: m for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    named = ", ".join(candidates) or "none"
    raise InputError(
        f"cannot find the {expected} decoder blocks of {type(model).__name__} (lists of that length: {named}):"
        " supported are Llama, GPT-2, GPT-NeoX, Qwen2, OLMo and models built like them"
    )


def embedding_module(model: PreTrainedModel) -> nn.Embedding:
    """The token embedding [V, D].

    Raises:
        InputError: the model has no ordinary token embedding.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"{type(model).__name__} has no token embedding to read (found {type(embedding).__name__})")
    return embedding
