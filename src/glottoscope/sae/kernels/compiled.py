"""The exact sparse step on a CPU with compiled loops: no gradient tensor exists, parameters and moments are passed once.

Shape suffixes: B batch rows, D d_model, N features, K top-k, A (row, feature) pairs (B * K at most).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.sae.adam import Adam
from glottoscope.sae.encoding import compiled_can, make_encoder, why_not_compiled
from glottoscope.sae.kernels.base import Forward, Gradients, Kernel


class CompiledKernel(Kernel):
    """`ChunkedKernel`'s mathematics in loops that numba compiles (`sae.loops`); float32 and float64 on a CPU.

    Raises:
        InputError: numba is missing, or the SAE is on another device or of another dtype.
    """

    name = "compiled"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        weight = self.sae.W_enc
        if not compiled_can(weight.device, weight.dtype):
            reason = why_not_compiled() or f"the SAE is {weight.dtype} on {weight.device}, the loops need float32 on a CPU"
            raise InputError(f'SAE kernel \'compiled\' cannot be used: {reason}; use kernel = "auto" or "chunked"')
        from glottoscope.sae import loops

        self._loops = loops
        self._encode = make_encoder(self.sae, self.scratch, compiled=True, preselection=self.preselection)

    def _take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Any:
        return self.scratch.take(name, shape, dtype or self.sae.W_enc.dtype).numpy()

    def normalise(self, x_BD: Tensor) -> tuple[Tensor, int]:
        if self.sae.normalization == "none":
            return super().normalise(x_BD)
        x_BD = x_BD.contiguous()
        u_BD, bad_B = self.scratch.like("unit", x_BD), self._take("bad", len(x_BD), dtype=torch.uint8)
        self._loops.split(self._loops.unit_rows, len(x_BD), 256, x_BD.numpy(), u_BD.numpy(), bad_B)
        return u_BD, int(bad_B.sum())

    def forward(self, u_BD: Tensor) -> Forward:
        sae, loops, rows = self.sae, self._loops, len(u_BD)
        centred_BD = torch.sub(u_BD, sae.b_dec, out=self.scratch.like("centred", u_BD))
        values_BK, indices_BK, recomputed = self._encode(centred_BD)
        residual_BD, dvalues_BK = self.scratch.like("residual", u_BD), self.scratch.like("dvalues", values_BK)
        squares_B = self._take("squares", rows)
        sums_PD = self._take("sums", -(-rows // loops.ROW_BLOCK), sae.d)
        loops.split(
            loops.decode_and_differentiate, rows, loops.ROW_BLOCK, values_BK.numpy(), indices_BK.numpy(), sae.W_dec.numpy(),
            centred_BD.numpy(), self._scalar(2 / rows), residual_BD.numpy(), dvalues_BK.numpy(), squares_B, sums_PD,
        )  # fmt: skip
        return Forward(
            float(squares_B.sum(dtype=np.float64)) / rows, int(np.count_nonzero(values_BK.numpy())), recomputed, values_BK,
            indices_BK, dvalues_BK, centred_BD, residual_BD, torch.from_numpy(sums_PD.sum(axis=0, dtype=np.float64)),
        )  # fmt: skip

    def gradients(self, forward: Forward) -> Gradients:
        sae, loops = self.sae, self._loops
        W_enc_ND, b_enc_N, W_dec_ND = (torch.empty_like(p) for p in (sae.W_enc, sae.b_enc, sae.W_dec))
        through_PD = self._through()
        loops.split(
            loops.write_gradients, sae.n, loops.FEATURE_BLOCK, *self._pairs(forward), sae.W_enc.numpy(), W_enc_ND.numpy(),
            b_enc_N.numpy(), W_dec_ND.numpy(), through_PD,
        )  # fmt: skip
        b_dec_D = (forward.residual_sum_D - torch.from_numpy(through_PD.sum(axis=0))).to(sae.b_dec.dtype)
        return Gradients(W_enc_ND, b_enc_N, None if self.frozen_decoder else W_dec_ND, b_dec_D)

    def update(self, forward: Forward, adam: Adam) -> None:
        sae, loops = self.sae, self._loops
        rule = np.array(adam.rule, self.sae.W_enc.numpy().dtype)
        through_PD = self._through()
        weights = [p.numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec)]
        # A frozen decoder has no moments; the loop never looks at what stands in their place.
        names = ("W_enc", "b_enc", "W_enc" if self.frozen_decoder else "W_dec")
        moments = [m[name].numpy() for name in names for m in (adam.first, adam.second)]
        loops.split(
            loops.update_features, sae.n, loops.FEATURE_BLOCK, *self._pairs(forward), *weights, *moments, rule,
            not self.frozen_decoder, through_PD,
        )  # fmt: skip
        b_dec_D = (forward.residual_sum_D.numpy() - through_PD.sum(axis=0)).astype(rule.dtype)
        loops.adam_row(sae.b_dec.numpy(), b_dec_D, adam.first["b_dec"].numpy(), adam.second["b_dec"].numpy(), rule)

    def _scalar(self, value: float) -> Any:
        return self.sae.W_enc.numpy().dtype.type(value)

    def _through(self) -> Any:
        return self._take("through", -(-self.sae.n // self._loops.FEATURE_BLOCK), self.sae.d, dtype=torch.float64)

    def _pairs(self, forward: Forward) -> tuple[Any, ...]:
        """Active pairs by feature, and the rows they point to: what both loops over features begin with."""
        sae, pairs = self.sae, forward.values_BK.numel()
        offsets_N1 = self._take("offsets", sae.n + 1, dtype=torch.int64)
        cursor_N = self._take("cursor", sae.n, dtype=torch.int64)
        row_A = self._take("rows", pairs, dtype=torch.int32)
        value_A, dvalue_A = self._take("pair_values", pairs), self._take("pair_dvalues", pairs)
        self._loops.sort_pairs(
            forward.values_BK.numpy(), forward.indices_BK.numpy(), forward.dvalues_BK.numpy(), offsets_N1, cursor_N, row_A,
            value_A, dvalue_A,
        )  # fmt: skip
        return offsets_N1, row_A, value_A, dvalue_A, forward.centred_BD.numpy(), forward.residual_BD.numpy()
