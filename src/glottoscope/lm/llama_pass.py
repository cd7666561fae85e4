"""Hidden states of a Llama on a CPU in float32: the arithmetic of `LlamaModel`, over its own parameters, in fewer passes.

A small model spends much of a forward pass between its matrix products. Here q, k and v are one product, residuals are
added by the product that makes them, and rotation and gating write in place. The states agree with the Hugging Face
model's to rounding (tests). Anything this module does not know goes the ordinary way (`lm.capture`).

Shape legend: B sequences, T positions, M = B * T positions, D d_model, H heads, G key heads, E head width, F MLP width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@functools.cache
def _plain() -> tuple[frozenset[type], type]:
    """The modules of a plain Llama, and its activation's. Looked up when first asked: they take seconds to import."""
    from transformers.activations import ACT2FN
    from transformers.models.llama import modeling_llama as llama

    return frozenset({
        llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm,
        llama.LlamaRotaryEmbedding, nn.Linear, nn.Embedding, nn.ModuleList,
    }), type(ACT2FN["silu"])  # fmt: skip


def knows(model: PreTrainedModel) -> bool:
    """Whether `llama_states` computes what this model computes: a plain Llama in float32 on a CPU, no hooks."""
    base: Any = model.base_model
    if type(base).__name__ != "LlamaModel" or base.training:
        return False
    classes, silu = _plain()
    config = base.config
    plain = config.hidden_act == "silu" and getattr(config, "is_causal", True) is not False
    if not plain or config._attn_implementation not in ("eager", "sdpa"):
        return False
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in base.parameters()):
        return False
    # A module put in another's place (adapters, quantised weights) is not what its name says, and whoever hooks or
    # replaces a forward (steering, patching, offloading) must see it called.
    return all(
        (type(module) in classes or isinstance(module, silu))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        and getattr(module, "bias", None) is None
        for module in base.modules()
    )


@torch.no_grad()
def llama_states(
    model: PreTrainedModel, ids_BT: Tensor, layers: Sequence[int], *, finish: bool
) -> tuple[dict[int, Tensor], Tensor | None]:
    """States of `layers` (0: embeddings, L: output of block L) and, with `finish`, the state after the final norm.

    Args:
        ids_BT: LongTensor; padding, if any, on the right.

    Returns:
        layer -> [B, T, D], and [B, T, D] or None. Blocks above the highest layer are left out unless `finish`.
    """
    base: Any = model.base_model
    n_rows, length = ids_BT.shape
    x_MD = F.embedding(ids_BT.reshape(-1), base.embed_tokens.weight)
    states: dict[int, Tensor] = {0: x_MD} if 0 in layers else {}
    depth = len(base.layers) if finish else max(layers, default=0)
    x_MD = _blocks(base, x_MD, n_rows, 0, depth, states, layers)
    last_MD = rms_norm(x_MD, base.norm) if finish else None
    shape = (n_rows, length, -1)
    return {layer: states[layer].view(shape) for layer in layers}, None if last_MD is None else last_MD.view(shape)


@torch.no_grad()
def llama_finish(model: PreTrainedModel, x_BTD: Tensor, layer: int, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """The state after the final norm [B, T, D] of a pass that goes on from `x_BTD`, the state at `layer`.

    Args:
        x_BTD: padding, if any, on the right; never written to.
        edits: layer -> function of the state [B, T, D] there, for layers >= `layer`.
    """
    base: Any = model.base_model
    n_rows, length, _ = x_BTD.shape
    stops = sorted({layer, *edits, len(base.layers)})
    for here, stop in zip(stops, [*stops[1:], len(base.layers)], strict=True):
        if here in edits:
            x_BTD = edits[here](x_BTD)
        x_BTD = _blocks(base, x_BTD.reshape(n_rows * length, -1), n_rows, here, stop).view(n_rows, length, -1)
    return rms_norm(x_BTD.reshape(n_rows * length, -1), base.norm).view(n_rows, length, -1)


def _blocks(
    base: Any, x_MD: Tensor, n_rows: int, start: int, stop: int, states: dict[int, Tensor] | None = None, layers: Sequence[int] = ()
) -> Tensor:
    """The state [M, D] at layer `stop` from the one at `start`; those of `layers` in between are put into `states`."""
    if start == stop:
        return x_MD
    config = base.config
    length = len(x_MD) // n_rows
    n_heads, n_key_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    position_1T = torch.arange(length)[None]
    cos_1TE, sin_1TE = base.rotary_emb(x_MD, position_1T)
    half = width // 2
    tables = cos_1TE[0, :, None, :half], sin_1TE[0, :, None, :half]
    for number, block in enumerate(base.layers[start:stop], start=start + 1):
        attention, mlp = block.self_attn, block.mlp
        qkv_weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        u_MD = rms_norm(x_MD, block.input_layernorm)
        qkv_BTHE = (u_MD @ qkv_weight.T).view(n_rows, length, n_heads + 2 * n_key_heads, width)
        rotate(qkv_BTHE[:, :, : n_heads + n_key_heads], *tables)
        q_BHTE, k_BGTE, v_BGTE = qkv_BTHE.transpose(1, 2).split([n_heads, n_key_heads, n_key_heads], dim=1)
        mixed_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BGTE, v_BGTE, is_causal=True, scale=attention.scaling, enable_gqa=n_key_heads != n_heads
        )
        mixed_MX = mixed_BHTE.transpose(1, 2).reshape(n_rows * length, n_heads * width)
        # Out of place: the state before may be one that was asked for.
        x_MD = torch.addmm(x_MD, mixed_MX, attention.o_proj.weight.T)
        u_MD = rms_norm(x_MD, block.post_attention_layernorm)
        gate_MF, up_MF = u_MD @ mlp.gate_proj.weight.T, u_MD @ mlp.up_proj.weight.T
        x_MD.addmm_(F.silu(gate_MF, inplace=True).mul_(up_MF), mlp.down_proj.weight.T)
        if states is not None and number in layers:
            states[number] = x_MD
    return x_MD


def rms_norm(x_MD: Tensor, norm: Any) -> Tensor:
    mean_M1 = torch.linalg.vector_norm(x_MD, dim=1, keepdim=True).square_().div_(x_MD.shape[1])
    return (x_MD * mean_M1.add_(norm.variance_epsilon).rsqrt_()).mul_(norm.weight)


def rotate(x_BTHE: Tensor, cos_T1e: Tensor, sin_T1e: Tensor) -> None:
    """Rotary embedding in place: the first half of a head's numbers with the second."""
    first, second = x_BTHE.chunk(2, dim=-1)
    kept = first.clone()
    first.mul_(cos_T1e).addcmul_(second, sin_T1e, value=-1)
    second.mul_(cos_T1e).addcmul_(kept, sin_T1e)
