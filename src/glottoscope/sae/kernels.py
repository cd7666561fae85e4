"""Loss and exact gradients of one TopK-SAE training step, without a dense [batch, features] tensor.

Shape suffixes: B batch rows, R rows of one chunk, D d_model, N features, K top-k, P preactivation columns (N padded),
A (row, feature) pairs (B * K).

Only (row, feature) pairs picked by TopK carry gradient, so after the dense encoder product everything is a gather:
the decoder output and its gradient are bags of K decoder rows, and the two weight gradients are bags of batch rows
per feature, after one stable sort of the B * K indices. There is no second path with dense products for small n: timed
operation by operation at d = 128, n = 192, k = 4 they cost 2.5 to 20 times more, and would win only below some n = 8 k.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glottoscope.errors import InputError

if TYPE_CHECKING:
    from glottoscope.sae.model import TopKSAE


class StepGradients(NamedTuple):
    """What a kernel returns; tensors may live in the buffers and hold until the next step only."""

    loss: Tensor  # 0-d: mean over rows of ||u - u_hat||^2
    W_enc: Tensor  # [N, D]
    b_enc: Tensor  # [N]
    W_dec: Tensor | None  # [N, D]; None where the decoder is frozen
    b_dec: Tensor  # [D]
    values: Tensor  # [B, K], ReLU'd
    indices: Tensor  # [B, K] int64


class StepBuffers:
    """Gradient tensors and scratch space of one trainer, allocated once and overwritten by every step.

    Fresh tensors of 100 MB cost 40 ms of page faults each, so nothing of that size is allocated inside a step.
    """

    def __init__(self, sae: TopKSAE, *, frozen_decoder: bool = False) -> None:
        self.W_enc = torch.zeros_like(sae.W_enc)
        self.b_enc = torch.zeros_like(sae.b_enc)
        self.W_dec = None if frozen_decoder else torch.zeros_like(sae.W_dec)
        self.b_dec = torch.zeros_like(sae.b_dec)
        self._scratch: dict[str, Tensor] = {}
        self._workspace: EncoderWorkspace | None = None

    def scratch(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised tensor of the shape, dtype and device of `like`, the same memory at every call."""
        kept = self._scratch.get(name)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._scratch[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return kept

    def workspace(self, sae: TopKSAE, rows: int) -> EncoderWorkspace:
        """The encoder's workspace with room for `rows` rows or one chunk, whichever is less."""
        kept = self._workspace
        if kept is None or kept.rows < min(rows, kept.rows_limit):
            kept = self._workspace = EncoderWorkspace(sae, rows)
        return kept


class Kernel(Protocol):
    """One training step's loss and gradients at u [B, D] (already normalised), written into `buffers`."""

    def __call__(self, sae: TopKSAE, u_BD: Tensor, buffers: StepBuffers) -> StepGradients: ...


class EncoderWorkspace:
    """A bounded chunk of preactivations and the exact two-stage TopK over it.

    torch.topk scans each row's N values at some 1.6 ns each. Taking the maxima of G strided groups first (a vectorised
    reduction), then the K best groups, then TopK among their members is the same result: an entry of the top K
    lies in one of the K groups with the largest maxima. 2-4 times faster.
    """

    def __init__(self, sae: TopKSAE, rows: int) -> None:
        n, k = sae.n, sae.k
        size = min(16, round(math.sqrt(n / k)))  # members per group: balances the two TopK passes
        groups = math.ceil(n / size / 16) * 16 if size > 1 else n  # whole vector registers
        self.two_stage = k <= groups < n
        self.groups = groups
        members = math.ceil(n / groups)
        width = groups * members if self.two_stage else n
        # 1 MB of preactivations stays in a CPU core's cache; below 256 rows the matrix product loses speed.
        self.rows_limit = max(256, (2**18 if sae.W_enc.device.type == "cpu" else 2**26) // width)
        self.rows = max(1, min(rows, self.rows_limit))
        self.n, self.k = n, k
        # Columns n..P are never written: -inf keeps them out of every top K (k <= n).
        self.pre_RP = torch.full((self.rows, width), -torch.inf, device=sae.W_enc.device, dtype=sae.W_enc.dtype)
        self.member_offsets = torch.arange(members, device=sae.W_enc.device) * groups

    def preactivations(self, centred_RD: Tensor, W_enc_ND: Tensor, b_enc_N: Tensor) -> Tensor:
        """W_enc (u - b_dec) + b_enc as [R, P] with -inf in columns n..P; R <= rows. Overwritten by the next call."""
        pre_RP = self.pre_RP[: len(centred_RD)]
        torch.addmm(b_enc_N, centred_RD, W_enc_ND.T, out=pre_RP[:, : self.n])
        return pre_RP

    def top_k(self, pre_RP: Tensor) -> tuple[Tensor, Tensor]:
        """ReLU'd values [R, K] in descending order and feature ids [R, K]: relu after TopK is TopK after relu."""
        if not self.two_stage:
            values, indices = pre_RP.topk(self.k, dim=1)
            return values.relu_(), indices
        rows = len(pre_RP)
        maxima_RG = pre_RP.view(rows, -1, self.groups).amax(1)
        best_RK = maxima_RG.topk(self.k, dim=1, sorted=False).indices
        candidates = (best_RK.unsqueeze(2) + self.member_offsets).view(rows, -1)
        values, places = pre_RP.gather(1, candidates).topk(self.k, dim=1)
        return values.relu_(), candidates.gather(1, places)


def _accumulator(tensor: Tensor) -> torch.dtype:
    """float64, which keeps long sums exact whatever the chunking; Apple GPUs have none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def chunked_step(sae: TopKSAE, u_BD: Tensor, buffers: StepBuffers) -> StepGradients:
    """Exact gradients in bounded row chunks and feature blocks: the default kernel.

    With G = 2 (u_hat - u) / B, v the values and dv_bk = <G_b, W_dec[i_bk]> where v_bk > 0, else 0 (ReLU'(0) = 0):
    grad W_dec[i] = sum v_b G_b, grad W_enc[i] = sum dv_b (u_b - b_dec), grad b_enc[i] = sum dv_b over the rows b that
    picked i; grad b_dec = sum_b G_b - grad b_enc W_enc, a matrix-vector product in place of a third full one.
    """
    rows_total, wide = len(u_BD), _accumulator(u_BD)
    workspace = buffers.workspace(sae, rows_total)
    centred_BD = torch.sub(u_BD, sae.b_dec, out=buffers.scratch("centred", u_BD))
    residual_BD = buffers.scratch("residual", u_BD)
    values_list, indices_list, dvalues_list = [], [], []
    # Short sums in float32, sums of sums in float64: nothing of size [B, D] is widened.
    loss = torch.zeros((), dtype=wide, device=u_BD.device)
    residual_sum_D = torch.zeros(sae.d, dtype=wide, device=u_BD.device)
    for start in range(0, rows_total, workspace.rows):
        rows = slice(start, start + workspace.rows)
        pre_RP = workspace.preactivations(centred_BD[rows], sae.W_enc, sae.b_enc)
        values_RK, indices_RK = workspace.top_k(pre_RP)
        # The gradient of a weighted bag by its weights is the K inner products <G_b, W_dec[i]>: torch has a fused
        # pass for it, reached through autograd, 3-5 times faster than gathering [R, K, D].
        with torch.enable_grad():
            leaf_RK = values_RK.detach().requires_grad_()
            decoded_RD = F.embedding_bag(indices_RK, sae.W_dec, per_sample_weights=leaf_RK, mode="sum")
        residual_RD = torch.sub(decoded_RD.detach(), centred_BD[rows], out=residual_BD[rows])
        loss += torch.linalg.vector_norm(residual_RD, dim=1).square().sum(dtype=wide)
        residual_RD.mul_(2.0 / rows_total)  # now G
        residual_sum_D += residual_RD.sum(0)
        (dvalues_RK,) = torch.autograd.grad(decoded_RD, leaf_RK, residual_RD)
        values_list.append(values_RK)
        indices_list.append(indices_RK)
        dvalues_list.append(dvalues_RK * (values_RK > 0))
    values_BK, indices_BK, dvalues_BK = (
        parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (values_list, indices_list, dvalues_list)
    )
    through_encoder_D = _accumulate_by_feature(sae, values_BK, indices_BK, dvalues_BK, centred_BD, residual_BD, buffers)
    buffers.b_dec.copy_(residual_sum_D - through_encoder_D)
    return StepGradients(
        (loss / rows_total).to(u_BD.dtype),
        buffers.W_enc,
        buffers.b_enc,
        buffers.W_dec,
        buffers.b_dec,
        values_BK,
        indices_BK,
    )


def _accumulate_by_feature(
    sae: TopKSAE,
    values_BK: Tensor,
    indices_BK: Tensor,
    dvalues_BK: Tensor,
    centred_BD: Tensor,
    residual_BD: Tensor,
    buffers: StepBuffers,
) -> Tensor:
    """Sum the pairs' contributions into the gradients of `buffers`, one bag per feature; returns grad b_enc W_enc."""
    n, d, wide = sae.n, sae.d, _accumulator(values_BK)
    feature_A, order_A = indices_BK.reshape(-1).sort(stable=True)
    row_A = order_A // sae.k
    counts_N = torch.bincount(feature_A, minlength=n)
    offsets_N = counts_N.cumsum(0) - counts_N
    values_A = values_BK.reshape(-1).index_select(0, order_A)
    dvalues_A = dvalues_BK.reshape(-1).index_select(0, order_A)
    # Bags, not index_add: the order of summation is fixed on every device, so equal inputs give equal bits.
    bags = F.embedding_bag(order_A, dvalues_BK.reshape(-1, 1).to(wide), offsets_N, mode="sum")
    buffers.b_enc.copy_(bags.view(-1))
    through_encoder_D = torch.zeros(d, dtype=wide, device=values_BK.device)
    block = n if values_BK.device.type != "cpu" else max(256, 2**20 // d)  # 4 MB outputs, recycled by the allocator
    starts = range(0, n, block)
    edges = [0, len(feature_A)] if len(starts) == 1 else [*offsets_N[::block].tolist(), len(feature_A)]
    for start, low, high in zip(starts, edges[:-1], edges[1:], strict=True):
        features = slice(start, start + block)
        offsets = offsets_N[features] - low
        through_encoder_D += (buffers.b_enc[features] @ sae.W_enc[features]).to(wide)
        pairs = ((buffers.W_enc, dvalues_A, centred_BD), (buffers.W_dec, values_A, residual_BD))
        for gradient, weights_A, source_BD in pairs:
            if gradient is not None:
                gradient[features] = F.embedding_bag(
                    row_A[low:high], source_BD, offsets, mode="sum", per_sample_weights=weights_A[low:high]
                )
    return through_encoder_D


def reference_step(sae: TopKSAE, u_BD: Tensor, buffers: StepBuffers) -> StepGradients:
    """The same step by plain dense autograd: holds [B, N], for tests and for checking new kernels."""
    with torch.enable_grad():
        leaves = [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
        W_enc_ND, b_enc_N, W_dec_ND, b_dec_D = leaves
        pre_BN = (u_BD - b_dec_D) @ W_enc_ND.T + b_enc_N
        values_BK, indices_BK = pre_BN.topk(sae.k, dim=1)
        values_BK = values_BK.relu()
        z_BN = torch.zeros_like(pre_BN).scatter(1, indices_BK, values_BK)
        loss = (z_BN @ W_dec_ND + b_dec_D - u_BD).square().sum(1).mean()
        gradients = torch.autograd.grad(loss, leaves)
    for target, gradient in zip((buffers.W_enc, buffers.b_enc, buffers.W_dec, buffers.b_dec), gradients, strict=True):
        if target is not None:
            target.copy_(gradient)
    return StepGradients(loss.detach(), buffers.W_enc, buffers.b_enc, buffers.W_dec, buffers.b_dec, values_BK.detach(), indices_BK)


KERNELS: dict[str, Kernel] = {"chunked": chunked_step, "reference": reference_step}


def get_kernel(name: str) -> Kernel:
    """The kernel registered as `name`.

    Raises:
        InputError: no kernel has this name.
    """
    if name not in KERNELS:
        raise InputError(f"unknown SAE kernel {name!r}: use one of {', '.join(sorted(KERNELS))}")
    return KERNELS[name]


def enable_fast_matmul(tolerance: float = 5e-6) -> bool:
    """Let this process use oneDNN's faster fp32 matrix product on the CPU, if it is true fp32 on this machine.

    `torch.set_float32_matmul_precision("medium")` selects it; on CPUs with AMX the same setting means bfloat16, so
    the error against float64 is measured (relative to the largest entry) and the setting is put back when it exceeds
    `tolerance`. A process-wide switch: for the program's entry point, never called from within the library.
    """
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 768, generator=generator), torch.randn(768, 1024, generator=generator)
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = ((a @ b).double() - exact).abs().max() / exact.abs().max()
    if float(error) <= tolerance:
        return True
    torch.set_float32_matmul_precision(before)
    return False
