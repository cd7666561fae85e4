"""The exact sparse step in plain torch, on any device, without a dense [batch, features] tensor.

Shape suffixes: B batch rows, R rows of one chunk, D d_model, N features, F features of one block, K top-k, A (row,
feature) pairs (B * K).

Only (row, feature) pairs picked by TopK carry gradient, so after the dense encoder product everything is a gather:
the decoder output and its gradient are bags of K decoder rows, and the two weight gradients are bags of batch rows
per feature, after one stable sort of the B * K indices. There is no second path with dense products for small n: timed
operation by operation at d = 128, n = 192, k = 4 they cost 2.5 to 20 times more, and would win only below some n = 8 k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glottoscope.sae.adam import Adam
from glottoscope.sae.encoding import make_encoder
from glottoscope.sae.kernels.base import Forward, Gradients, Kernel, accumulator, unit_norm

ROWS = 512  # rows decoded at a time


class _Block(NamedTuple):
    """Gradients of some features; `through_D` is their part of grad b_enc W_enc."""

    features: slice
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor | None
    through_D: Tensor


class ChunkedKernel(Kernel):
    """Rows in bounded chunks on the way forward, features in bounded blocks on the way back."""

    name = "chunked"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._encode = make_encoder(self.sae, self.scratch, compiled=False, preselection=self.preselection)

    def forward(self, u_BD: Tensor) -> Forward:
        sae, rows_total, wide = self.sae, len(u_BD), accumulator(u_BD)
        centred_BD = torch.sub(u_BD, sae.b_dec, out=self.scratch.like("centred", u_BD))
        residual_BD = self.scratch.like("residual", u_BD)
        values_BK, indices_BK, recomputed = self._encode(centred_BD)
        dvalues_BK = self.scratch.like("dvalues", values_BK)
        # Short sums in float32, sums of sums in float64: nothing of size [B, D] is widened.
        loss = torch.zeros((), dtype=wide, device=u_BD.device)
        residual_sum_D = torch.zeros(sae.d, dtype=wide, device=u_BD.device)
        for start in range(0, rows_total, ROWS):
            rows = slice(start, start + ROWS)
            # The gradient of a weighted bag by its weights is the K inner products <G_b, W_dec[i]>: torch has a fused
            # pass for it, reached through autograd, 3-5 times faster than gathering [R, K, D].
            with torch.enable_grad():
                leaf_RK = values_BK[rows].detach().requires_grad_()
                decoded_RD = F.embedding_bag(indices_BK[rows], sae.W_dec, per_sample_weights=leaf_RK, mode="sum")
            residual_RD = torch.sub(decoded_RD.detach(), centred_BD[rows], out=residual_BD[rows])
            loss += torch.linalg.vector_norm(residual_RD, dim=1).square().sum(dtype=wide)
            residual_RD.mul_(2.0 / rows_total)  # now G
            residual_sum_D += residual_RD.sum(0)
            (dvalues_RK,) = torch.autograd.grad(decoded_RD, leaf_RK, residual_RD)
            torch.mul(dvalues_RK, values_BK[rows] > 0, out=dvalues_BK[rows])
        return Forward(
            float(loss) / rows_total, int((values_BK > 0).sum()), recomputed, values_BK, indices_BK, dvalues_BK, centred_BD,
            residual_BD, residual_sum_D,
        )  # fmt: skip

    def gradients(self, forward: Forward) -> Gradients:
        sae = self.sae
        W_enc_ND, b_enc_N = torch.empty_like(sae.W_enc), torch.empty_like(sae.b_enc)
        W_dec_ND = None if self.frozen_decoder else torch.empty_like(sae.W_dec)
        through_D = torch.zeros_like(forward.residual_sum_D)
        for block in self._blocks(forward):
            W_enc_ND[block.features], b_enc_N[block.features] = block.W_enc_FD, block.b_enc_F
            if W_dec_ND is not None and block.W_dec_FD is not None:
                W_dec_ND[block.features] = block.W_dec_FD
            through_D += block.through_D
        return Gradients(W_enc_ND, b_enc_N, W_dec_ND, (forward.residual_sum_D - through_D).to(sae.b_dec.dtype))

    def update(self, forward: Forward, adam: Adam) -> None:
        through_D = torch.zeros_like(forward.residual_sum_D)
        for block in self._blocks(forward):
            through_D += block.through_D  # uses W_enc, so it comes before the update of these rows
            adam.apply("W_enc", block.W_enc_FD, block.features)
            adam.apply("b_enc", block.b_enc_F, block.features)
            if block.W_dec_FD is not None:
                adam.apply("W_dec", block.W_dec_FD, block.features)
                unit_norm(self.sae.W_dec[block.features])
        adam.apply("b_dec", (forward.residual_sum_D - through_D).to(self.sae.b_dec.dtype))

    def _blocks(self, forward: Forward) -> Iterator[_Block]:
        """The pairs' contributions summed per feature, one bag each, a few thousand features at a time."""
        sae, values_BK = self.sae, forward.values_BK
        n, d, wide = sae.n, sae.d, accumulator(values_BK)
        feature_A, order_A = forward.indices_BK.reshape(-1).sort(stable=True)
        row_A = order_A // sae.k
        counts_N = torch.bincount(feature_A, minlength=n)
        offsets_N = counts_N.cumsum(0) - counts_N
        values_A = values_BK.reshape(-1).index_select(0, order_A)
        dvalues_A = forward.dvalues_BK.reshape(-1).index_select(0, order_A)
        # Bags, not index_add: the order of summation is fixed on every device, so equal inputs give equal bits.
        bags = F.embedding_bag(order_A, forward.dvalues_BK.reshape(-1, 1).to(wide), offsets_N, mode="sum")
        b_enc_N = bags.view(-1).to(sae.b_enc.dtype)
        # 4 MB on a CPU, recycled by the allocator; on a GPU a quarter of a large SAE at a time.
        block = max(256, (2**20 if values_BK.device.type == "cpu" else 2**24) // d)
        bags_of = [(dvalues_A, forward.centred_BD), (values_A, forward.residual_BD)]
        if self.frozen_decoder:
            bags_of.pop()
        starts = range(0, n, block)
        edges = [0, len(feature_A)] if len(starts) == 1 else [*offsets_N[::block].tolist(), len(feature_A)]
        for start, low, high in zip(starts, edges[:-1], edges[1:], strict=True):
            features = slice(start, min(start + block, n))
            offsets = offsets_N[features] - low
            sums = [
                F.embedding_bag(row_A[low:high], source_BD, offsets, mode="sum", per_sample_weights=weights_A[low:high])
                for weights_A, source_BD in bags_of
            ]
            through_D = (b_enc_N[features] @ sae.W_enc[features]).to(wide)
            yield _Block(features, sums[0], b_enc_N[features], None if self.frozen_decoder else sums[1], through_D)
