"""The step's gradients against dense autograd in float64. Shape suffixes: B rows, D d_model, N features, K top-k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.sae.kernels import (
    EncoderWorkspace,
    StepBuffers,
    StepGradients,
    enable_fast_matmul,
    get_kernel,
)
from glottoscope.sae.model import TopKSAE


def random_sae(d: int, n: int, k: int, seed: int, dtype: torch.dtype, bias: float = 0.0) -> TopKSAE:
    sae = TopKSAE(d, n, k, seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):  # leave the symmetric initial point
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(dtype))
    sae.b_enc.add_(bias)
    return sae


def unit_rows(b: int, d: int, seed: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(b, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return rows / rows.norm(dim=1, keepdim=True)


def dense_float64(sae: TopKSAE, u_BD: Tensor, indices_BK: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients and preactivations by dense autograd in float64, with the same features picked."""
    leaves = {name: getattr(sae, name).double().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    u_BD = u_BD.double()
    pre_BN = (u_BD - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"]
    picked_BN = torch.zeros_like(pre_BN).scatter(1, indices_BK, 1.0)
    loss = ((pre_BN.relu() * picked_BN) @ leaves["W_dec"] + leaves["b_dec"] - u_BD).square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True)), pre_BN.detach()


def check(sae: TopKSAE, u_BD: Tensor, result: StepGradients, tolerance: float, b_dec_tolerance: float) -> None:
    loss, exact, pre_BN = dense_float64(sae, u_BD, result.indices)
    best = pre_BN.topk(sae.k, dim=1).values.relu()
    scale = float(pre_BN.abs().max())
    assert torch.allclose(result.values.double(), best, rtol=0, atol=scale * tolerance * 5)  # a top K, descending
    assert all(len(set(row)) == sae.k for row in result.indices.tolist())
    assert float(result.loss) == pytest.approx(float(loss), rel=tolerance * 5)
    for name, reference in exact.items():
        gradient = getattr(result, name)
        allowed = b_dec_tolerance if name == "b_dec" else tolerance
        error = (gradient.double() - reference).norm()
        assert float(error) <= allowed * float(reference.norm()) + 1e-30, name


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(4, 24),
    n=st.integers(1, 700),
    k=st.integers(1, 20),
    b=st.integers(1, 600),
    seed=st.integers(0, 1000),
    bias=st.sampled_from([0.0, -0.5, -1.5, -50.0]),  # -1.5: K above the number of positives; -50: none at all
)
@example(d=8, n=600, k=5, b=1, seed=0, bias=0.0)
@example(d=8, n=600, k=5, b=513, seed=0, bias=0.0)
@example(d=8, n=4, k=4, b=7, seed=0, bias=0.0)
@pytest.mark.parametrize("kernel", ["chunked", "reference"])
def test_gradients_are_exact_in_float64(kernel: str, d: int, n: int, k: int, b: int, seed: int, bias: float) -> None:
    sae = random_sae(d, n, min(k, n), seed, torch.float64, bias)
    u_BD = unit_rows(b, d, seed, torch.float64)
    result = get_kernel(kernel)(sae, u_BD, StepBuffers(sae))
    check(sae, u_BD, result, 1e-12, 1e-11)


@pytest.mark.parametrize(
    ("d", "n", "k", "b"),
    # Dense top K; two stages with padded columns; many chunks with a partial last one; many feature blocks.
    [(32, 48, 8, 64), (128, 192, 4, 1024), (64, 1600, 8, 1000), (48, 5000, 32, 777), (1024, 3000, 16, 300)],
)
def test_float32_gradients(d: int, n: int, k: int, b: int) -> None:
    sae = random_sae(d, n, k, 3, torch.float32)
    u_BD = unit_rows(b, d, 4, torch.float32)
    result = get_kernel("chunked")(sae, u_BD, StepBuffers(sae))
    check(sae, u_BD, result, 1e-6, 1e-5)


def test_zero_picks_and_duplicate_maxima_float32() -> None:
    sae = random_sae(16, 400, 12, 5, torch.float32, bias=-1.2)
    sae.W_enc[200:] = sae.W_enc[:200]  # every preactivation occurs twice
    sae.b_enc[200:] = sae.b_enc[:200]
    u_BD = unit_rows(700, 16, 6, torch.float32)
    result = get_kernel("chunked")(sae, u_BD, StepBuffers(sae))
    assert 0 < int((result.values == 0).sum()) < result.values.numel()
    check(sae, u_BD, result, 1e-6, 1e-5)


def test_inactive_picks_move_nothing() -> None:
    sae = random_sae(16, 64, 4, 5, torch.float32, bias=-50.0)
    result = get_kernel("chunked")(sae, unit_rows(32, 16, 6, torch.float32), StepBuffers(sae))
    assert float(result.values.abs().max()) == 0.0
    assert result.W_dec is not None
    assert all(not g.any() for g in (result.W_enc, result.b_enc, result.W_dec))
    assert bool(result.b_dec.any())


def test_buffers_are_overwritten_whatever_they_held() -> None:
    sae = random_sae(16, 300, 4, 1, torch.float32)
    kernel, used = get_kernel("chunked"), StepBuffers(sae)
    kernel(sae, unit_rows(900, 16, 1, torch.float32), used)
    for b in (13, 900):  # a smaller batch, then a larger one again
        u_BD = unit_rows(b, 16, 2, torch.float32)
        fresh = kernel(sae, u_BD, StepBuffers(sae))
        for mine, theirs in zip(kernel(sae, u_BD, used), fresh, strict=True):
            assert mine is not None and theirs is not None and torch.equal(mine, theirs)


def test_frozen_decoder_has_no_decoder_gradient() -> None:
    sae = random_sae(16, 300, 4, 1, torch.float32)
    u_BD = unit_rows(50, 16, 1, torch.float32)
    for name in ("chunked", "reference"):
        frozen = get_kernel(name)(sae, u_BD, StepBuffers(sae, frozen_decoder=True))
        free = get_kernel(name)(sae, u_BD, StepBuffers(sae))
        assert frozen.W_dec is None
        assert torch.equal(frozen.W_enc, free.W_enc) and torch.equal(frozen.b_dec, free.b_dec)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    k=st.integers(1, 40),
    rows=st.integers(1, 20),
    levels=st.integers(2, 1000),
    seed=st.integers(0, 99),
)
def test_two_stage_top_k(n: int, k: int, rows: int, levels: int, seed: int) -> None:
    """Also with many ties: preactivations on a few levels."""
    sae = TopKSAE(2, n, min(k, n), 0)
    workspace = EncoderWorkspace(sae, rows)
    pre_RN = torch.randint(-levels, levels, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
    pre_RP = workspace.pre_RP[:rows]
    pre_RP[:, :n] = pre_RN
    values, indices = workspace.top_k(pre_RP)
    assert torch.equal(values, pre_RN.topk(sae.k, dim=1).values.relu())
    assert torch.equal(pre_RN.gather(1, indices).relu(), values)
    assert all(len(set(row)) == sae.k for row in indices.tolist())


def test_preactivations_stay_in_a_bounded_chunk() -> None:
    assert EncoderWorkspace(TopKSAE(2, 32768, 32), 10**6).pre_RP.shape == (256, 32768)
    assert EncoderWorkspace(TopKSAE(2, 192, 4), 10**6).pre_RP.numel() <= 2**18


def test_unknown_kernel() -> None:
    with pytest.raises(InputError, match="chunked, reference"):
        get_kernel("triton")


def test_fast_matmul_is_kept_only_if_exact() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert not enable_fast_matmul(tolerance=0.0)
        assert torch.get_float32_matmul_precision() == before
        if enable_fast_matmul():
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
