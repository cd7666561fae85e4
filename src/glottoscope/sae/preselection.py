"""A bfloat16 product that proposes candidates, float32 that decides, and a bound that says where this is exact.

Shape suffixes: B batch rows, D d_model, N features, K top-k, C candidates.

Let w' and c' be the bfloat16 roundings of a feature's encoder row w and of a centred state c. Then
|<w, c> - <w', c'>| <= ||w - w'|| ||c|| + ||w'|| ||c - c'||, norms that are computed, not assumed. A feature outside the
C candidates had a coarse value of at most the C-th best t, so its true value is at most t + this bound + the roundings
of the coarse product and its sum. Where the float32 value of the K-th best candidate is above that, or that is not
above 0, the row's TopK is the exact one; other rows are computed again with the dense float32 product, and counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.sae.encoding import Encoder, Selected, compiled_can, make_selector
from glottoscope.sae.scratch import Scratch

if TYPE_CHECKING:
    from glottoscope.sae.model import TopKSAE

BF16_ROUNDING = 1.01 * 2.0**-8  # of the coarse product; its unit roundoff, and what the product exceeds its rounding by
FLOAT32_ROUNDING = 2.0**-24
ROWS = 4096  # encoder rows whose rounding error is computed at a time


def check_bound_holds(weight: Tensor) -> None:
    """Raises InputError where products are rounded in ways that the bound does not know."""
    reason = None
    if weight.dtype not in (torch.float32, torch.float64):
        reason = f"the SAE is {weight.dtype}, and its own products are as coarse as the preselection"
    elif weight.device.type == "cuda":
        if torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction:
            reason = "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is on: set it to False"
        elif torch.get_float32_matmul_precision() != "highest":
            reason = "float32 products may be rounded to TF32: torch.set_float32_matmul_precision('highest') forbids it"
    if reason is not None:
        raise InputError(f'preselection = "bf16" cannot be certified: {reason}')


class PreselectingEncoder:
    """`exact`, with most of its work done in bfloat16: for machines whose bfloat16 product is much faster."""

    def __init__(self, sae: TopKSAE, exact: Encoder, scratch: Scratch, *, compiled: bool | None = None) -> None:
        check_bound_holds(sae.W_enc)
        self._sae, self._exact, self._scratch = sae, exact, scratch
        self.candidates = min(sae.n, max(3 * sae.k, sae.k + 64))
        self._compiled = compiled_can(sae.W_enc.device, sae.W_enc.dtype) if compiled is None else compiled
        self._select = make_selector(sae.W_enc, sae.n, self.candidates, scratch, compiled=self._compiled, name="coarse_")

    def __call__(self, centred_BD: Tensor) -> Selected:
        sae, scratch = self._sae, self._scratch
        if self.candidates >= sae.n:
            return self._exact(centred_BD)
        W_coarse_ND = scratch.take("W_bf16", (sae.n, sae.d), torch.bfloat16, sae.W_enc.device)
        row_error, row_norm = self._round_encoder(W_coarse_ND)
        coarse_BD = centred_BD.to(torch.bfloat16)

        def product(rows: slice, features: slice, out_RC: Tensor) -> None:
            out_RC.copy_(coarse_BD[rows] @ W_coarse_ND[features].T)

        coarse_BC, candidates_BC = self._select(len(centred_BD), product, sae.b_enc)
        values_BC = self._rescore(centred_BD, candidates_BC)
        values_BK, places_BK = values_BC.topk(sae.k, dim=1)
        indices_BK = candidates_BC.gather(1, places_BK)

        least_B = coarse_BC[:, -1]
        norm_B = torch.linalg.vector_norm(centred_BD, dim=1)
        error_B = row_error * norm_B + row_norm * torch.linalg.vector_norm(centred_BD - coarse_BD.to(centred_BD.dtype), dim=1)
        error_B = error_B + BF16_ROUNDING * (least_B.abs() + sae.b_enc.abs().max())
        # Both float32 sums of d terms, and the few roundings after them.
        error_B = error_B + (4 * sae.d + 16) * FLOAT32_ROUNDING * (row_norm * norm_B + sae.b_enc.abs().max())
        limit_B = least_B + error_B
        certain_B = (values_BK[:, -1] >= limit_B) | (limit_B <= 0)  # False where anything is NaN
        values_BK = values_BK.relu_()
        again_A = torch.nonzero(~certain_B).flatten()
        if len(again_A):
            exact = self._exact(centred_BD.index_select(0, again_A))
            values_BK[again_A], indices_BK[again_A] = exact.values_BK, exact.indices_BK
        return Selected(values_BK, indices_BK, len(again_A))

    def _round_encoder(self, W_coarse_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Fill W_coarse; returns the largest ||w - w'|| and the largest ||w'||, both 0-d."""
        W_enc_ND = self._sae.W_enc
        errors, norms = [], []
        for start in range(0, len(W_enc_ND), ROWS):
            rows_RD = W_enc_ND[start : start + ROWS]
            W_coarse_ND[start : start + ROWS] = rows_RD
            back_RD = W_coarse_ND[start : start + ROWS].to(W_enc_ND.dtype)
            norms.append(torch.linalg.vector_norm(back_RD, dim=1).max())
            errors.append(torch.linalg.vector_norm(rows_RD - back_RD, dim=1).max())
        return torch.stack(errors).max(), torch.stack(norms).max()

    def _rescore(self, centred_BD: Tensor, candidates_BC: Tensor) -> Tensor:
        sae = self._sae
        values_BC = self._scratch.take("rescored", tuple(candidates_BC.shape), centred_BD.dtype, centred_BD.device)
        if self._compiled:
            from glottoscope.sae import loops

            arrays = (t.numpy() for t in (centred_BD, sae.W_enc, sae.b_enc, candidates_BC, values_BC))
            loops.split(loops.rescore, len(centred_BD), 64, *arrays)
            return values_BC
        step = max(1, 2**23 // (candidates_BC.shape[1] * sae.d))
        for start in range(0, len(centred_BD), step):
            rows = slice(start, start + step)
            gathered_RCD = sae.W_enc[candidates_BC[rows]]
            values_BC[rows] = torch.bmm(gathered_RCD, centred_BD[rows].unsqueeze(2)).squeeze(2) + sae.b_enc[candidates_BC[rows]]
        return values_BC
