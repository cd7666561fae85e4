"""The exact sparse step on a CUDA device: products and TopK by torch, everything sparse in Triton (`sae.triton_loops`).

Shape suffixes: B batch rows, D d_model, N features, K top-k, A (row, feature) pairs (B * K), C whole chunks of sorted
pairs, P partial sums.

The encoder product is torch's, in float32. PyTorch's default, `torch.backends.cuda.matmul.allow_tf32 = False`, keeps it
exact; nothing here reads or changes that flag, and no Triton loop uses tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.sae.adam import Adam
from glottoscope.sae.encoding import make_encoder
from glottoscope.sae.kernels.base import Forward, Gradients, Kernel

MAX_D = 8192  # a row of this width still fits the registers of one program
LEAST_CAPABILITY = 80  # what Triton's makers support; 8.0 is Ampere
ROWS = 64  # rows summed in float32 before they enter a float64 sum


def why_not_triton() -> str | None:
    """None where the Triton kernels can run: a GPU that Triton reaches, or its interpreter; else the reason in words."""
    try:
        from triton.runtime import driver

        from glottoscope.sae.triton_loops import INTERPRETED
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    try:
        target: Any = driver.active.get_current_target()
    except Exception as error:  # no C compiler, no Python headers, no libcuda: each raises something else
        return f"Triton cannot use the CUDA device ({type(error).__name__}: {error})"
    if target.backend == "cuda" and target.arch < LEAST_CAPABILITY:
        return f"the GPU has compute capability {target.arch / 10}, Triton needs {LEAST_CAPABILITY / 10}"
    return None


class _Pairs(NamedTuple):
    """Pairs by feature, and what the loops over features read beside them."""

    feature_A: Tensor  # int32, sorted; n for pairs without a value
    offsets_N1: Tensor
    sums: tuple[Tensor, ...]  # order, values, dvalues, centred, residual
    chunks: tuple[Tensor, Tensor]  # gradients of whole chunks: encoder, decoder


class TritonKernel(Kernel):
    """`ChunkedKernel`'s mathematics with one Triton program a batch row, then one a feature; float32, d up to 8192.

    No gradient tensor of a weight matrix exists in `update`: parameters and moments are passed once. Results are
    deterministic wherever torch's products are. Sums run pair by pair in float32; of a feature with many pairs, runs of
    `CHUNK` are summed by programs of their own first, so that one feature active everywhere does not hold up the rest.

    Raises:
        InputError: Triton cannot run here, or the SAE is too wide, not float32, or on another device.
    """

    name = "triton"
    CHUNK: int = 256  # pairs
    FEATURES: int = 64  # features of one partial sum of grad b_enc W_enc
    PAIRS: int = 128  # pairs of one feature read at once where only dvalues are summed

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        sae = self.sae
        reason = why_not_triton()
        if reason is None:
            from glottoscope.sae import triton_loops

            self._loops = triton_loops
            device = sae.W_enc.device.type
            if sae.W_enc.dtype != torch.float32 or not (device == "cuda" or (device == "cpu" and triton_loops.INTERPRETED)):
                reason = f"the SAE is {sae.W_enc.dtype} on {sae.W_enc.device}, the kernels need float32 on a CUDA device"
            elif sae.d > MAX_D:
                reason = f"the SAE has d = {sae.d}, the kernels keep rows of at most {MAX_D} in registers"
        if reason is not None:
            raise InputError(f'SAE kernel "triton" cannot be used: {reason}; use kernel = "chunked"')
        self._encode = make_encoder(sae, self.scratch, compiled=False, preselection=self.preselection)
        self._block = max(32, 1 << (sae.d - 1).bit_length())
        self._warps = warps_of(self._block)
        self._starts_N1 = torch.arange(sae.n + 1, dtype=torch.int32, device=sae.W_enc.device)

    def forward(self, u_BD: Tensor) -> Forward:
        sae, rows = self.sae, len(u_BD)
        centred_BD = torch.sub(u_BD, sae.b_dec, out=self.scratch.like("centred", u_BD))
        values_BK, indices_BK, recomputed = self._encode(centred_BD)
        residual_BD, dvalues_BK = self.scratch.like("residual", u_BD), self.scratch.like("dvalues", values_BK)
        squares_B = self._take("squares", rows)
        self._launch(
            self._loops.decode_and_differentiate, rows, values_BK, indices_BK, sae.W_dec, centred_BD, 2.0 / rows, residual_BD,
            dvalues_BK, squares_B, sae.d, K=sae.k,
        )  # fmt: skip
        # Both numbers come in one transfer: the GPU is waited for once.
        totals = torch.stack([squares_B.sum(dtype=torch.float64), (values_BK > 0).sum(dtype=torch.float64)])
        square, n_active = totals.tolist()
        return Forward(
            square / rows, int(n_active), recomputed, values_BK, indices_BK, dvalues_BK, centred_BD, residual_BD,
            _sum_rows(residual_BD),
        )  # fmt: skip

    def gradients(self, forward: Forward) -> Gradients:
        sae, learned = self.sae, not self.frozen_decoder
        pairs = self._pairs(forward)
        W_enc_ND, b_enc_N = torch.empty_like(sae.W_enc), torch.empty_like(sae.b_enc)
        W_dec_ND = torch.empty_like(sae.W_dec) if learned else None
        b_dec_D = self._bias_gradients(forward, pairs, b_enc_N)
        self._launch(
            self._loops.write_gradients, sae.n, pairs.offsets_N1, *pairs.sums, *pairs.chunks, W_enc_ND,
            W_enc_ND if W_dec_ND is None else W_dec_ND, sae.d, K=sae.k, CHUNK=self.CHUNK, DECODER=learned,
        )  # fmt: skip
        return Gradients(W_enc_ND, b_enc_N, W_dec_ND, b_dec_D)

    def update(self, forward: Forward, adam: Adam) -> None:
        sae, learned = self.sae, not self.frozen_decoder
        pairs = self._pairs(forward)
        b_enc_N = self._take("bias", sae.n)
        b_dec_D = self._bias_gradients(forward, pairs, b_enc_N)  # uses W_enc, so it comes before the update
        weights: list[Tensor] = []
        # A frozen decoder has no moments; the loop never looks at what stands in their place.
        for name, moments in (("W_enc", "W_enc"), ("W_dec", "W_dec" if learned else "W_enc")):
            weights += [getattr(sae, name), adam.first[moments], adam.second[moments]]
        self._launch(
            self._loops.update_features, sae.n, pairs.offsets_N1, *pairs.sums, *pairs.chunks, *weights, *adam.rule, sae.d, K=sae.k,
            CHUNK=self.CHUNK, DECODER=learned,
        )  # fmt: skip
        adam.apply("b_enc", b_enc_N)
        adam.apply("b_dec", b_dec_D)

    def _pairs(self, forward: Forward) -> _Pairs:
        sae = self.sae
        key_BK = torch.where(forward.values_BK > 0, forward.indices_BK, sae.n).to(torch.int32)
        feature_A, order_A = key_BK.view(-1).sort(stable=True)
        offsets_N1 = torch.searchsorted(feature_A, self._starts_N1)
        sums = (order_A, forward.values_BK, forward.dvalues_BK, forward.centred_BD, forward.residual_BD)
        chunks = len(order_A) // self.CHUNK
        enc_CD = self._take("chunks_enc", max(1, chunks), sae.d)
        dec_CD = enc_CD if self.frozen_decoder else self._take("chunks_dec", max(1, chunks), sae.d)
        if chunks:
            self._launch(
                self._loops.sum_whole_chunks, chunks, feature_A, *sums, enc_CD, dec_CD, sae.n, sae.d, K=sae.k, CHUNK=self.CHUNK,
                DECODER=not self.frozen_decoder,
            )  # fmt: skip
        return _Pairs(feature_A, offsets_N1, sums, (enc_CD, dec_CD))

    def _bias_gradients(self, forward: Forward, pairs: _Pairs, b_enc_N: Tensor) -> Tensor:
        """Fills grad b_enc; returns grad b_dec."""
        sae = self.sae
        blocks = -(-sae.n // self.FEATURES)
        through_PD = self._take("through", blocks, sae.d)
        self._launch(
            self._loops.bias_gradients, blocks, pairs.sums[0], pairs.offsets_N1, forward.dvalues_BK, sae.W_enc, b_enc_N, through_PD,
            sae.n, sae.d, FEATURES=self.FEATURES, PAIRS=self.PAIRS,
        )  # fmt: skip
        return (forward.residual_sum_D - _sum_rows(through_PD)).to(sae.b_dec.dtype)

    def _take(self, name: str, *shape: int) -> Tensor:
        return self.scratch.take(name, shape, torch.float32, self.sae.W_enc.device)

    def _launch(self, loop: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        with torch.cuda.device_of(self.sae.W_enc):  # Triton launches on the current device
            loop[(programs,)](*arguments, BLOCK_D=self._block, num_warps=self._warps, **constants)


def warps_of(block: int) -> int:
    """Warps of a program whose row has `block` entries: 8 entries a thread, 16 in the widest."""
    return min(16, max(1, block // 256))


def _sum_rows(rows_XD: Tensor) -> Tensor:
    """Sum over rows, as float64 [D]: short sums in float32, sums of sums in float64, and nothing of size [X, D] widened."""
    blocks = len(rows_XD) // ROWS
    whole = rows_XD[: blocks * ROWS].view(blocks, ROWS, rows_XD.shape[1]).sum(1)
    return whole.sum(0, dtype=torch.float64) + rows_XD[blocks * ROWS :].sum(0, dtype=torch.float64)
