"""The forward pass of pre-training: the arithmetic of `LlamaForCausalLM`, over that model's own parameters, without
its machinery.

A small Llama on one core spends as much time between its matrix products as in them: masks rebuilt at every call,
RMSNorm in six passes, attention kernels made for large tensors. The functions below compute the same logits and
gradients (tests hold them to the Hugging Face model) with hand-written backward passes. What they need: no dropout, no
biases, as many key heads as query heads, SiLU, padding on the right only (a causal model's real positions never see
it).

Shape legend: B blocks, T positions, M = B * T positions, D d_model, H heads, E head width, F MLP width, V vocabulary,
S one stack of B * H heads; C = one chunk of positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IGNORED = -100  # target of a position that carries no loss (cross_entropy's own convention)
LOGITS_PER_CHUNK = 1 << 21  # 8 MiB of float32: the logits of one chunk stay in the last-level cache


class Rotary(NamedTuple):
    """Position tables of one sequence length, made once: cos_TE and sin_TE of the rotary embedding, additive causal
    mask_TT."""

    cos_TE: Tensor
    sin_TE: Tensor
    mask_TT: Tensor


def rotary_tables(model: LlamaForCausalLM, length: int, dtype: torch.dtype) -> Rotary:
    """Tables for sequences of `length` tokens, computed by the model's own rotary embedding (any `rope` setting)."""
    device = model.lm_head.weight.device
    cos_1TE, sin_1TE = model.model.rotary_emb(torch.zeros(1, dtype=dtype, device=device), torch.arange(length, device=device)[None])
    mask_TT = torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu(1)
    return Rotary(cos_1TE[0].to(dtype), sin_1TE[0].to(dtype), mask_TT)


class _RMSNorm(Function):
    """y = x / rms(x) * w, computed in x's dtype and returned in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale_M1 = (x_MD.square().mean(-1, keepdim=True)).add_(eps).rsqrt_()
        unit_MD = x_MD * scale_M1
        ctx.save_for_backward(unit_MD, scale_M1, weight_D)
        return (unit_MD * weight_D).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        unit_MD, scale_M1, weight_D = ctx.saved_tensors
        grad_MD = grads[0].to(unit_MD.dtype)
        product_MD = grad_MD * unit_MD
        grad_weight_D = product_MD.sum(0)
        mean_M1 = torch.mv(product_MD, weight_D).div_(unit_MD.shape[1]).unsqueeze(1)
        grad_x_MD = (grad_MD * weight_D).addcmul_(unit_MD, mean_M1, value=-1).mul_(scale_M1)
        return grad_x_MD, grad_weight_D, None, None


class _SwiGLU(Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor) -> Tensor:
        silu_MF = F.silu(gate_MF)
        ctx.save_for_backward(gate_MF, up_MF, silu_MF)
        return silu_MF * up_MF

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate_MF, up_MF, silu_MF = ctx.saved_tensors
        grad_gate_MF = torch.ops.aten.silu_backward(up_MF.mul_(grads[0]), gate_MF)  # up is not needed again
        return grad_gate_MF, silu_MF.mul_(grads[0])


def _rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos_TE).addcmul_(torch.cat((-second, first), dim=-1), sin_TE)


class _CausalAttention(Function):
    """softmax(q k^T / sqrt(E) + mask) v with rotary q and k, on batched products: 1.3 (float32) to 6 times (bfloat16)
    as fast as `scaled_dot_product_attention` on a CPU at T = 64, and the [S, T, T] weights are small there."""

    @staticmethod
    def forward(ctx: Any, qkv_MD3: Tensor, tables: Rotary, n_heads: int) -> Tensor:
        length, width = tables.cos_TE.shape
        n_blocks = qkv_MD3.shape[0] // length
        qkv_3BHTE = qkv_MD3.view(n_blocks, length, 3, n_heads, width).permute(2, 0, 3, 1, 4)
        qk_2BHTE = _rotate(qkv_3BHTE[:2].contiguous(), tables.cos_TE, tables.sin_TE)
        q_STE, k_STE = qk_2BHTE.view(2, -1, length, width).unbind(0)
        v_STE = qkv_3BHTE[2].reshape(-1, length, width)
        weights_STT = torch.baddbmm(tables.mask_TT, q_STE, k_STE.transpose(1, 2), alpha=width**-0.5).softmax(-1)
        ctx.save_for_backward(q_STE, k_STE, v_STE, weights_STT)
        ctx.tables = tables
        mixed_BHTE = torch.bmm(weights_STT, v_STE).view(n_blocks, n_heads, length, width)
        return mixed_BHTE.transpose(1, 2).reshape(n_blocks * length, n_heads * width)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q_STE, k_STE, v_STE, weights_STT = ctx.saved_tensors
        tables: Rotary = ctx.tables
        length, width = tables.cos_TE.shape
        n_heads = grads[0].shape[1] // width
        n_blocks = q_STE.shape[0] // n_heads
        grad_STE = grads[0].view(n_blocks, length, n_heads, width).transpose(1, 2).reshape(-1, length, width)
        grad_weights_STT = torch.bmm(grad_STE, v_STE.transpose(1, 2))
        # d softmax: p * (g - sum(p g)); sum(p g) over keys is computed by the library's own kernel.
        grad_scores_STT = torch.ops.aten._softmax_backward_data(grad_weights_STT, weights_STT, -1, weights_STT.dtype)
        grad_scores_STT.mul_(width**-0.5)
        grad_qkv = q_STE.new_empty(n_blocks, length, 3, n_heads, width)
        grad_qkv_3BHTE = grad_qkv.permute(2, 0, 3, 1, 4)
        grad_qk_2STE = q_STE.new_empty(2, *q_STE.shape)
        torch.bmm(grad_scores_STT, k_STE, out=grad_qk_2STE[0])
        torch.bmm(grad_scores_STT.transpose(1, 2), q_STE, out=grad_qk_2STE[1])
        # The inverse of a rotation is the rotation by the opposite angle.
        grad_qkv_3BHTE[:2] = _rotate(grad_qk_2STE, tables.cos_TE, -tables.sin_TE).view(2, n_blocks, n_heads, length, width)
        grad_qkv_3BHTE[2] = torch.bmm(weights_STT.transpose(1, 2), grad_STE).view(n_blocks, n_heads, length, width)
        return grad_qkv.view(n_blocks * length, -1), None, None


class _HeadLoss(Function):
    """Mean cross entropy of the head's logits, with its gradient, in chunks of positions: the logits never exist as a
    whole."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, target_M: Tensor) -> Tensor:
        n_rows = max(1, LOGITS_PER_CHUNK // head_VD.shape[0])
        weight_M = (target_M != IGNORED).to(torch.float32)
        weight_M /= weight_M.sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        for start in range(0, hidden_MD.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            weight_C1 = weight_M[rows, None]
            index_C1 = target_M[rows, None].clamp_min(0)
            log_p_CV = F.linear(hidden_MD[rows], head_VD).float().log_softmax(-1)
            total -= (log_p_CV.gather(1, index_C1) * weight_C1).sum()
            grad_CV = log_p_CV.exp_().mul_(weight_C1).scatter_add_(1, index_C1, -weight_C1).to(head_VD.dtype)
            torch.mm(grad_CV, head_VD, out=grad_hidden_MD[rows])
            grad_head_VD += grad_CV.T @ hidden_MD[rows]
        ctx.save_for_backward(grad_hidden_MD, grad_head_VD.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden_MD, grad_head_VD = ctx.saved_tensors
        return grad_hidden_MD * grads[0], grad_head_VD * grads[0], None


def last_hidden(model: LlamaForCausalLM, tokens_BT: Tensor, tables: Rotary) -> Tensor:
    """States after the final norm, [B * T, D], in the dtype of `tables` (the dtype of the matrix products)."""
    dtype = tables.cos_TE.dtype
    eps = float(model.config.rms_norm_eps)
    n_heads = int(model.config.num_attention_heads)
    x_MD = F.embedding(tokens_BT.reshape(-1), model.model.embed_tokens.weight)
    for block in model.model.layers:
        attention: Any = block.self_attn
        mlp: Any = block.mlp
        norms: Any = block
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).to(dtype)
        u_MD = _RMSNorm.apply(x_MD, norms.input_layernorm.weight, eps, dtype)
        mixed_MD = _CausalAttention.apply(F.linear(u_MD, qkv), tables, n_heads)
        x_MD = x_MD + F.linear(mixed_MD, attention.o_proj.weight.to(dtype))
        u_MD = _RMSNorm.apply(x_MD, norms.post_attention_layernorm.weight, eps, dtype)
        gate_MF = F.linear(u_MD, mlp.gate_proj.weight.to(dtype))
        up_MF = F.linear(u_MD, mlp.up_proj.weight.to(dtype))
        x_MD = x_MD + F.linear(_SwiGLU.apply(gate_MF, up_MF), mlp.down_proj.weight.to(dtype))
    return _RMSNorm.apply(x_MD, model.model.norm.weight, eps, dtype)


def next_token_loss(model: LlamaForCausalLM, tokens_BT: Tensor, tables: Rotary, pad_id: int | None) -> Tensor:
    """Mean cross entropy (nats) of the next token over all targets that are not `pad_id`; 0-d float32, differentiable.

    `tables` are `rotary_tables(model, T, dtype)`; dtype bfloat16 gives bfloat16 products over a float32 residual
    stream, softmax statistics and loss, as autocast does.
    """
    target_BT = tokens_BT.roll(-1, dims=1)
    if pad_id is not None:
        target_BT = target_BT.masked_fill(target_BT == pad_id, IGNORED)
    target_BT[:, -1] = IGNORED
    hidden_MD = last_hidden(model, tokens_BT, tables)
    head_VD = model.lm_head.weight.to(hidden_MD.dtype)
    return _HeadLoss.apply(hidden_MD, head_VD, target_BT.reshape(-1))  # type: ignore[no-any-return]
