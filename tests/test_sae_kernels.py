"""The step's gradients against dense autograd in float64. Shape suffixes: B rows, D d_model, N features, K top-k."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import glottoscope.sae
from glottoscope.errors import InputError
from glottoscope.sae import encoding
from glottoscope.sae.adam import Adam
from glottoscope.sae.encoding import CompiledSelector, TorchSelector, make_encoder, piece_width
from glottoscope.sae.kernels import KERNELS, Forward, Gradients, kernel_class, resolve_kernel
from glottoscope.sae.kernels.compiled import CompiledKernel
from glottoscope.sae.matmul import enable_fast_matmul
from glottoscope.sae.model import TENSOR_NAMES, TopKSAE
from glottoscope.sae.scratch import Scratch

SPARSE = ("compiled", "chunked")  # `triton` has tests of its own
EVERYWHERE = (*SPARSE, "reference")


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


def step(name: str, sae: TopKSAE, u_BD: Tensor, scratch: Scratch | None = None) -> tuple[Forward, Gradients]:
    kernel = kernel_class(name, sae)(sae, scratch=scratch)
    forward = kernel.forward(u_BD)
    return forward, kernel.gradients(forward)


def check(sae: TopKSAE, u_BD: Tensor, result: tuple[Forward, Gradients], tolerance: float, b_dec_tolerance: float) -> None:
    forward, gradients = result
    loss, exact, pre_BN = dense_float64(sae, u_BD, forward.indices_BK)
    best = pre_BN.topk(sae.k, dim=1).values.relu()
    scale = float(pre_BN.abs().max())
    assert torch.allclose(forward.values_BK.double(), best, rtol=0, atol=scale * tolerance * 5)  # a top K, descending
    assert all(len(set(row)) == sae.k for row in forward.indices_BK.tolist())
    assert forward.loss == pytest.approx(float(loss), rel=tolerance * 5)
    assert forward.n_active == int((forward.values_BK > 0).sum())
    for name, reference in exact.items():
        gradient = getattr(gradients, name)
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
@example(d=8, n=64, k=20, b=300, seed=0, bias=-1.5)
@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_gradients_are_exact_in_float64(kernel: str, d: int, n: int, k: int, b: int, seed: int, bias: float) -> None:
    sae = random_sae(d, n, min(k, n), seed, torch.float64, bias)
    u_BD = unit_rows(b, d, seed, torch.float64)
    check(sae, u_BD, step(kernel, sae, u_BD), 1e-12, 1e-11)


@pytest.mark.parametrize("kernel", SPARSE)
@pytest.mark.parametrize(
    ("d", "n", "k", "b"),
    # Dense top K; two stages with padded columns; many chunks with a partial last one; many feature blocks; more rows
    # than one piece.
    [(32, 48, 8, 64), (128, 192, 4, 1024), (64, 1600, 8, 1000), (48, 5000, 32, 777), (1024, 3000, 16, 300), (24, 900, 8, 4500)],
)
def test_float32_gradients(kernel: str, d: int, n: int, k: int, b: int) -> None:
    sae = random_sae(d, n, k, 3, torch.float32)
    u_BD = unit_rows(b, d, 4, torch.float32)
    check(sae, u_BD, step(kernel, sae, u_BD), 1e-6, 1e-5)


@pytest.mark.parametrize("kernel", SPARSE)
def test_zero_picks_and_duplicate_maxima_float32(kernel: str) -> None:
    sae = random_sae(16, 400, 12, 5, torch.float32, bias=-1.2)
    sae.W_enc[200:] = sae.W_enc[:200]  # every preactivation occurs twice
    sae.b_enc[200:] = sae.b_enc[:200]
    u_BD = unit_rows(700, 16, 6, torch.float32)
    result = step(kernel, sae, u_BD)
    values_BK = result[0].values_BK
    assert 0 < int((values_BK == 0).sum()) < values_BK.numel()
    check(sae, u_BD, result, 1e-6, 1e-5)


@pytest.mark.parametrize("kernel", SPARSE)
def test_inactive_picks_move_nothing(kernel: str) -> None:
    sae = random_sae(16, 64, 4, 5, torch.float32, bias=-50.0)
    forward, gradients = step(kernel, sae, unit_rows(32, 16, 6, torch.float32))
    assert float(forward.values_BK.abs().max()) == 0.0 and forward.n_active == 0
    assert gradients.W_dec is not None
    assert all(not g.any() for g in (gradients.W_enc, gradients.b_enc, gradients.W_dec))
    assert bool(gradients.b_dec.any())


@pytest.mark.parametrize("kernel", SPARSE)
def test_scratch_is_overwritten_whatever_it_held(kernel: str) -> None:
    sae, used = random_sae(16, 300, 4, 1, torch.float32), Scratch()
    step(kernel, sae, unit_rows(900, 16, 1, torch.float32), used)
    for b in (13, 900):  # a smaller batch, then a larger one again
        u_BD = unit_rows(b, 16, 2, torch.float32)
        fresh, again = step(kernel, sae, u_BD), step(kernel, sae, u_BD, used)
        for mine, theirs in zip((*again[0], *again[1]), (*fresh[0], *fresh[1]), strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_frozen_decoder_has_no_decoder_gradient(kernel: str) -> None:
    sae = random_sae(16, 300, 4, 1, torch.float32)
    u_BD = unit_rows(50, 16, 1, torch.float32)
    made = kernel_class(kernel, sae)(sae, frozen_decoder=True)
    frozen, free = made.gradients(made.forward(u_BD)), step(kernel, sae, u_BD)[1]
    assert frozen.W_dec is None
    assert torch.equal(frozen.W_enc, free.W_enc) and torch.equal(frozen.b_dec, free.b_dec)


@pytest.mark.parametrize("kernel", SPARSE)
@pytest.mark.parametrize("frozen", [False, True])
def test_update_is_adam_on_the_written_gradients(kernel: str, frozen: bool) -> None:
    """The update that never holds a gradient, against torch's Adam on the gradients of the same kernel."""
    sae, plain = (random_sae(40, 3000, 8, 1, torch.float64) for _ in range(2))
    names = [name for name in TENSOR_NAMES if not (frozen and name == "W_dec")]
    made = kernel_class(kernel, sae)(sae, frozen_decoder=frozen)
    adam = Adam({name: getattr(sae, name) for name in names}, (0.9, 0.999), 1e-9)
    optimizer = torch.optim.Adam([getattr(plain, name) for name in names], betas=(0.9, 0.999), eps=1e-9)
    for t in range(4):
        u_BD, lr = unit_rows(200, 40, t, torch.float64), 1e-2 / (t + 1)
        forward = made.forward(u_BD)
        adam.begin(lr)
        made.update(forward, adam)
        reference = step("reference", plain, u_BD)[1]
        for name in names:
            getattr(plain, name).grad = getattr(reference, name)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if not frozen:
            plain.W_dec.div_(plain.W_dec.norm(dim=1, keepdim=True))
        for name in TENSOR_NAMES:
            assert torch.allclose(getattr(sae, name), getattr(plain, name), rtol=1e-9, atol=1e-12), (name, t)


def test_threads_change_no_bit() -> None:
    """Sums run over fixed ranges. The dense product is the library's own: it is made once, for any number of threads."""
    sae = random_sae(24, 2000, 8, 1, torch.float32)
    centred_BD = unit_rows(700, 24, 2, torch.float32) - sae.b_dec
    product_BN = centred_BD @ sae.W_enc.T

    def encode(_: Tensor) -> encoding.Selected:
        select = CompiledSelector(2000, 8, Scratch())
        values, indices = select(700, lambda rows, features, out: out.copy_(product_BN[rows, features]), sae.b_enc)
        return encoding.Selected(values.relu_(), indices)

    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kernel = CompiledKernel(sae)
            kernel._encode = encode
            forward = kernel.forward(unit_rows(700, 24, 2, torch.float32))
            states.append((*forward, *kernel.gradients(forward)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*states, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(three))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    k=st.integers(1, 40),
    rows=st.integers(1, 20),
    levels=st.integers(2, 1000),
    seed=st.integers(0, 99),
    biased=st.booleans(),
)
@example(n=700, k=33, rows=3, levels=2, seed=0, biased=True)
def test_selectors_find_the_top_k(n: int, k: int, rows: int, levels: int, seed: int, biased: bool) -> None:
    """Also with many ties: preactivations on a few levels; and with pieces that end in the middle."""
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    product_RN = torch.randint(-levels, levels, (rows, n), generator=generator).float()
    bias_N = torch.randint(-levels, levels, (n,), generator=generator).float() * biased
    expected = (product_RN + bias_N).topk(k, dim=1).values

    def product(part: slice, features: slice, out: Tensor) -> None:
        out.copy_(product_RN[part, features])

    compiled = CompiledSelector(n, k, Scratch())
    compiled.PIECE, compiled.MAX_ROWS = 256 * rows, 7
    for selector in (compiled, TorchSelector(torch.device("cpu"), n, k, Scratch())):
        values, indices = selector(rows, product, bias_N)
        assert torch.equal(values, expected)
        assert torch.equal((product_RN + bias_N).gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())


def test_pieces_are_bounded() -> None:
    assert TorchSelector(torch.device("cpu"), 32768, 32, Scratch()).rows == 256
    assert piece_width(32768, 2048, CompiledSelector.PIECE) == 1024
    for n in (1, 192, 255, 300, 5000, 32768, 10**6):
        for rows in (1, 7, 2048):
            assert piece_width(n, rows, CompiledSelector.PIECE) * rows <= 1.5 * max(CompiledSelector.PIECE, 512 * rows)
    scratch = Scratch()
    make_encoder(TopKSAE(2, 32768, 32), scratch)(torch.randn(5000, 2))
    assert scratch.nbytes < 8 * 2**20 + 5000 * 32 * 12 + 2**16


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(2, 80), n=st.integers(100, 1500), k=st.integers(1, 20), rows=st.integers(1, 70), seed=st.integers(0, 99),
    spread=st.sampled_from([1.0, 0.01, 0.0]),
)  # fmt: skip
@pytest.mark.parametrize("compiled", [True, False])
def test_preselection_is_exact_and_counts_what_it_recomputes(
    compiled: bool, d: int, n: int, k: int, rows: int, seed: int, spread: float
) -> None:
    """`spread` near 0 makes encoder rows nearly equal: the bound cannot tell them apart and rows are recomputed."""
    sae = random_sae(d, n, k, seed, torch.float32)
    sae.W_enc.copy_(sae.W_enc[:1] + spread * (sae.W_enc - sae.W_enc[:1]))
    sae.b_enc.mul_(spread)
    centred_BD = unit_rows(rows, d, seed, torch.float32)
    exact = make_encoder(sae, compiled=compiled)(centred_BD)
    found = make_encoder(sae, compiled=compiled, preselection="bf16")(centred_BD)
    assert torch.allclose(found.values_BK, exact.values_BK, rtol=1e-5, atol=1e-6)
    pre_BN = centred_BD @ sae.W_enc.T + sae.b_enc
    assert torch.allclose(pre_BN.gather(1, found.indices_BK).relu(), found.values_BK, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == k for row in found.indices_BK.tolist())
    if spread == 0.0 and max(3 * k, k + 64) < n:
        positive = (pre_BN[:, 0] > 1e-3).sum()
        assert found.recomputed >= int(positive)


def test_a_bare_bf16_top_k_would_be_wrong_where_preselection_is_not() -> None:
    sae = random_sae(256, 8192, 32, 1, torch.float32)
    centred_BD = unit_rows(512, 256, 2, torch.float32)
    exact = make_encoder(sae)(centred_BD)
    indices_BK = exact.indices_BK.sort(1).values.clone()
    bare = (centred_BD.bfloat16() @ sae.W_enc.bfloat16().T).float().add_(sae.b_enc).topk(32, dim=1).indices.sort(1).values
    assert int((bare != indices_BK).any(1).sum()) > 50
    found = make_encoder(sae, preselection="bf16")(centred_BD)
    assert torch.equal(found.indices_BK.sort(1).values, indices_BK)
    assert found.recomputed < 50


def test_nan_in_a_preactivation_is_seen() -> None:
    for name in EVERYWHERE:
        sae = random_sae(16, 600, 4, 1, torch.float32)
        sae.b_enc[500] = torch.nan
        assert torch.tensor(step(name, sae, unit_rows(20, 16, 1, torch.float32))[0].loss).isnan(), name


def test_kernel_names() -> None:
    sae = TopKSAE(4, 8, 2)
    with pytest.raises(InputError, match="chunked, reference"):
        kernel_class("fast", sae)
    assert resolve_kernel("auto", "cpu") == "compiled"
    assert resolve_kernel("auto", "cpu", torch.bfloat16) == "chunked"
    assert resolve_kernel("auto", "mps") == "chunked"
    assert set(KERNELS) == {"compiled", "triton", "chunked", "reference"}
    with pytest.raises(InputError, match="float32 on a CPU"):
        half = TopKSAE(4, 8, 2, dtype=torch.bfloat16)
        kernel_class("compiled", half)(half)


def test_without_numba_plain_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "glottoscope.sae.loops", None)
    monkeypatch.setattr(glottoscope.sae, "loops", None)
    encoding.why_not_compiled.cache_clear()
    try:
        assert resolve_kernel("auto", "cpu") == "chunked"
        assert "numba" in str(encoding.why_not_compiled())
        sae = random_sae(16, 300, 4, 1, torch.float32)
        values, indices = sae.encode(unit_rows(20, 16, 1, torch.float32))
        assert values.shape == indices.shape == (20, 4)
        with pytest.raises(InputError, match=r'numba.*kernel = "auto"'):
            kernel_class("compiled", sae)(sae)
    finally:
        encoding.why_not_compiled.cache_clear()
    monkeypatch.undo()
    encoding.why_not_compiled.cache_clear()
    assert encoding.why_not_compiled() is None


def test_fast_matmul_is_kept_only_if_exact() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert not enable_fast_matmul(tolerance=0.0)
        assert torch.get_float32_matmul_precision() == before
        if enable_fast_matmul():
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
