"""A Llama on a CPU in float32 that reads on: the arithmetic of `lm.llama_pass` with keys and values kept.

What all rows of a batch begin with is kept once and read once per step, and room for new positions is taken in advance:
with a cache that is copied at every step and for every row, small models spend more time on copying than on products.

Shape legend: B rows, T new positions, S positions of the rows so far, P shared positions before them, H heads, G key
heads, E head width, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glottoscope.lm.llama_pass import rms_norm, rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 32  # positions taken in advance


class LlamaSteps:
    """Rows that a plain Llama (`llama_pass.knows`) reads, some positions at a time.

    Args:
        depth: layers to run; None: all, and the final norm.
    """

    def __init__(self, model: PreTrainedModel, depth: int | None = None) -> None:
        self._base: Any = model.base_model
        self._finish = depth is None
        self._blocks = list(self._base.layers)[:depth]
        self._shared: list[tuple[Tensor, Tensor]] | None = None  # keys, values [G, P, E] of every block
        self._own: list[tuple[Tensor, Tensor]] = []  # [B, G, room, E]
        self._real_BS = torch.zeros(0, 0, dtype=torch.bool)
        self._next_B1 = torch.zeros(0, 1, dtype=torch.long)  # place of each row's next position, padding not counted

    @torch.no_grad()
    def read(
        self, ids_BT: Tensor, real_BT: Tensor, edits: Mapping[int, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Read new positions of every row; padding, where `real_BT` is False, is on the left and only at the beginning.

        Args:
            edits: layer -> function of the state [B, T, D] there; what follows reads the edited state.

        Returns:
            layer -> state [B, T, D] before its edit, and the state after the final norm [B, T, D] (None with a depth).
        """
        base, edits = self._base, edits or {}
        n_rows, length = ids_BT.shape
        if not self._own:
            self._real_BS, self._next_B1 = torch.zeros(n_rows, 0, dtype=torch.bool), torch.zeros(n_rows, 1, dtype=torch.long)
        before = self._real_BS.shape[1]
        self._real_BS = torch.cat([self._real_BS, real_BT.bool()], dim=1)
        place_BT = (self._next_B1 + real_BT.long().cumsum(1) - 1).clamp_min(0)
        self._next_B1 = self._next_B1 + real_BT.long().sum(1, keepdim=True)
        x_BTD = F.embedding(ids_BT, base.embed_tokens.weight)
        cos_BTE, sin_BTE = base.rotary_emb(x_BTD, place_BT)
        half = cos_BTE.shape[-1] // 2
        tables = cos_BTE[:, :, None, :half], sin_BTE[:, :, None, :half]
        bias_BTS = self._bias(before, length)
        states = {0: x_BTD}
        for number, block in enumerate(self._blocks):
            if number in edits:
                x_BTD = edits[number](x_BTD)
            x_BTD = self._block(number, block, x_BTD, tables, bias_BTS, before)
            states[number + 1] = x_BTD
        if (top := len(self._blocks)) in edits:
            x_BTD = edits[top](x_BTD)
        last = rms_norm(x_BTD.reshape(n_rows * length, -1), base.norm).view(n_rows, length, -1) if self._finish else None
        return states, last

    def repeat(self, times: int) -> None:
        """Let the one row read so far, which has no padding, be what `times` rows begin with."""
        length = self._real_BS.shape[1]
        self._shared = [(k[0, :, :length].contiguous(), v[0, :, :length].contiguous()) for k, v in self._own]
        self._own = [(k.new_empty(times, *k.shape[1:]), v.new_empty(times, *v.shape[1:])) for k, v in self._own]
        self._real_BS = torch.zeros(times, 0, dtype=torch.bool)
        self._next_B1 = self._next_B1.expand(times, 1)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._own = [(k[rows], v[rows]) for k, v in self._own]
        self._real_BS, self._next_B1 = self._real_BS[rows], self._next_B1[rows]

    def _bias(self, before: int, length: int) -> Tensor:
        """[B, T, S]: 0 where a new position reads a row's own one, else -inf. Padding reads itself: a row of nothing
        would be NaN."""
        total = before + length
        query_T1, key_1S = before + torch.arange(length)[:, None], torch.arange(total)[None]
        seen_BTS = (self._real_BS[:, None] & (key_1S <= query_T1)) | (key_1S == query_T1)
        return torch.zeros(seen_BTS.shape).masked_fill_(~seen_BTS, -torch.inf)

    def _block(
        self, number: int, block: Any, x_BTD: Tensor, tables: tuple[Tensor, Tensor], bias_BTS: Tensor, before: int
    ) -> Tensor:
        attention, mlp, config = block.self_attn, block.mlp, self._base.config
        n_rows, length, _ = x_BTD.shape
        n_heads, n_key_heads = config.num_attention_heads, config.num_key_value_heads
        x_MD = x_BTD.reshape(n_rows * length, -1)
        u_MD = rms_norm(x_MD, block.input_layernorm)
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        qkv_BTHE = (u_MD @ weight.T).view(n_rows, length, n_heads + 2 * n_key_heads, -1)
        rotate(qkv_BTHE[:, :, : n_heads + n_key_heads], *tables)
        q_BTHE, k_BTGE, v_BTGE = qkv_BTHE.split([n_heads, n_key_heads, n_key_heads], dim=2)
        keys, values = self._room(number, n_rows, before + length, k_BTGE)
        keys[:, :, before : before + length] = k_BTGE.transpose(1, 2)
        values[:, :, before : before + length] = v_BTGE.transpose(1, 2)
        mixed = self._attend(
            number, q_BTHE, keys[:, :, : before + length], values[:, :, : before + length], bias_BTS, attention.scaling
        )
        x_MD = torch.addmm(x_MD, mixed.reshape(n_rows * length, -1), attention.o_proj.weight.T)
        u_MD = rms_norm(x_MD, block.post_attention_layernorm)
        gate_MF, up_MF = u_MD @ mlp.gate_proj.weight.T, u_MD @ mlp.up_proj.weight.T
        x_MD.addmm_(F.silu(gate_MF, inplace=True).mul_(up_MF), mlp.down_proj.weight.T)
        return x_MD.view(n_rows, length, -1)

    def _room(self, number: int, n_rows: int, needed: int, like_BTGE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block [B, G, room, E] with room for `needed` positions."""
        groups, width = like_BTGE.shape[2:]
        if number == len(self._own):
            self._own.append((like_BTGE.new_empty(n_rows, groups, 0, width), like_BTGE.new_empty(n_rows, groups, 0, width)))
        have = self._own[number][0].shape[2]
        if have < needed:
            grown = []
            for old in self._own[number]:
                new = like_BTGE.new_empty(n_rows, groups, needed + ROOM, width)
                new[:, :, :have] = old
                grown.append(new)
            self._own[number] = (grown[0], grown[1])
        return self._own[number]

    def _attend(self, number: int, q_BTHE: Tensor, keys: Tensor, values: Tensor, bias_BTS: Tensor, scale: float) -> Tensor:
        """Attention over the shared positions and the row's own ones: [B, T, H, E]."""
        n_rows, length, n_heads, width = q_BTHE.shape
        groups = keys.shape[1]
        each = n_heads // groups  # query heads per key head
        # [B, G, R * T, E] with R = H / G: one product per row and key head
        q = q_BTHE.view(n_rows, length, groups, each, width).permute(0, 2, 3, 1, 4).reshape(n_rows, groups, each * length, width)
        q = q * scale
        own = (q @ keys.transpose(2, 3)).view(n_rows, groups, each, length, -1) + bias_BTS[:, None, None]
        own = own.view(n_rows, groups, each * length, -1)
        if self._shared is None:
            out = own.softmax(-1) @ values
        else:
            shared_keys, shared_values = self._shared[number]
            q_GXE = q.transpose(0, 1).reshape(groups, -1, width)
            shared = (q_GXE @ shared_keys.transpose(1, 2)).view(groups, n_rows, each * length, -1).transpose(0, 1)
            weights = torch.cat([shared, own], dim=-1).softmax(-1)
            n_shared = shared_keys.shape[1]
            first = weights[..., :n_shared].transpose(0, 1).reshape(groups, -1, n_shared) @ shared_values
            out = first.view(groups, n_rows, each * length, width).transpose(0, 1) + weights[..., n_shared:] @ values
        return out.view(n_rows, groups, each, length, width).permute(0, 3, 1, 2, 4).reshape(n_rows, length, n_heads, width)
