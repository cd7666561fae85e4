"""FVU, cosine and L0 over chunks. Shape suffixes: B positions, D d_model."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glottoscope.sae import quality
from glottoscope.sae.quality import Quality, QualityAccumulator

D = 7


def data(b: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    language = torch.randint(0, 2, (b,), generator=generator).to(torch.uint8)
    u = torch.randn(b, D, generator=generator) + 3.0 * language[:, None]
    return u / u.norm(dim=1, keepdim=True), language


def measure(u: Tensor, u_hat: Tensor, language: Tensor, l0: Tensor | None = None, cuts: tuple[int, ...] = ()) -> Quality:
    accumulator = QualityAccumulator(D, 2)
    l0 = torch.full((len(u),), 4) if l0 is None else l0
    edges = [0, *sorted(cuts), len(u)]
    for low, high in itertools.pairwise(edges):
        accumulator.update(u[low:high], u_hat[low:high], l0[low:high], language[low:high])
    return accumulator.result()


def expected_quality(u: Tensor, u_hat: Tensor, language: Tensor) -> tuple[float, list[float], float, float]:
    """fvu, fvu of each language, cosine and loss by their formulas, in float64 at once."""
    v, v_hat = u.double(), u_hat.double()
    errors, own = (v - v_hat).square().sum(1), []
    for g in (0, 1):
        x = v[language == g]
        own.append(float(errors[language == g].sum() / (x - x.mean(0)).square().sum()) if len(x) > 1 else math.nan)
    fvu = float(errors.sum() / (v - v.mean(0)).square().sum())
    cosine = torch.nn.functional.cosine_similarity(v, v_hat, dim=1, eps=1e-300).mean()
    return fvu, own, float(cosine), float(errors.mean())


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(4, 200),
    seed=st.integers(0, 999),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    longest=st.integers(1, 60),
    of_a_run=st.sampled_from([1, 10**9]),
    sort=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_against_the_formula_whatever_the_chunking(
    b: int, seed: int, cuts: list[int], longest: int, of_a_run: int, sort: bool, dtype: torch.dtype
) -> None:
    u, language = data(b, seed)
    if sort:  # long runs of one language; else they take turns
        u, language = u[language.argsort()], language.sort().values
    u = u.to(dtype)
    u_hat = u + 0.1 * torch.randn(b, D, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    l0 = torch.arange(b) % 5
    with mock.patch.multiple(quality, CPU_ELEMENTS=longest * D, ELEMENTS_OF_A_RUN=of_a_run):
        found = measure(u, u_hat, language, l0, tuple(min(c, b) for c in cuts))
    fvu, own, cosine, loss = expected_quality(u, u_hat, language)
    rel = 1e-6 if dtype == torch.float32 else 1e-10
    assert found.fvu == pytest.approx(fvu, rel=rel)
    for g in (0, 1):
        if int((language == g).sum()) > 1:
            assert found.fvu_language[g] == pytest.approx(own[g], rel=rel)
    assert found.cosine == pytest.approx(cosine, rel=rel)
    assert found.l0 == pytest.approx(float(l0.double().mean()))
    assert found.loss == pytest.approx(loss, rel=rel)
    assert found.n_positions == b


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_float32_states_with_little_variance_about_a_large_mean(spread: float) -> None:
    """Hidden states often share most of their direction: the variance must not drown in the mean's square."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 256, generator=generator)
    language = torch.arange(3000) // 100 % 2
    u = torch.nn.functional.normalize(means[language] + spread * torch.randn(3000, 256, generator=generator), dim=1)
    u_hat = u + 0.3 * spread / 16 * torch.randn(3000, 256, generator=generator)
    fvu, own, cosine, loss = expected_quality(u, u_hat, language)
    for cuts in ((), (1, 2, 700, 1111), tuple(range(50, 3000, 50))):
        accumulator = QualityAccumulator(256, 2)
        for low, high in itertools.pairwise([0, *cuts, 3000]):
            accumulator.update(u[low:high], u_hat[low:high], torch.ones(high - low), language[low:high])
        found = accumulator.result()
        assert (found.fvu, *found.fvu_language) == pytest.approx((fvu, *own), rel=1e-6)
        assert (found.cosine, found.loss) == pytest.approx((cosine, loss), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(b=st.integers(10, 300), seed=st.integers(0, 999))
def test_mean_predictor_is_1_and_perfect_is_0(b: int, seed: int) -> None:
    u, language = data(b, seed)
    u = u.double()
    assert measure(u, u, language, cuts=(3,)).fvu == 0.0
    assert measure(u, u.mean(0).expand_as(u), language, cuts=(3, 7)).fvu == pytest.approx(1.0, rel=1e-12)
    own_mean = torch.stack([u[language == g].mean(0) for g in (0, 1)])[language.long()]
    if min(int((language == g).sum()) for g in (0, 1)) > 1:
        by_language = measure(u, own_mean, language, cuts=(5,))
        assert by_language.fvu_language == pytest.approx((1.0, 1.0), rel=1e-10)
        assert by_language.fvu < 1.0  # the pooled mean explains less than each language's own


def test_padding_and_absent_languages() -> None:
    u, _ = data(20, 0)
    language = torch.zeros(20, dtype=torch.uint8)
    language[10:] = 255
    found = measure(u, u * 0.5, language)
    alone = measure(u[:10], u[:10] * 0.5, language[:10])
    assert (found.fvu, found.cosine, found.l0, found.loss) == (alone.fvu, alone.cosine, alone.l0, alone.loss)
    assert found.n_positions == 10 and math.isnan(found.fvu_language[1])


def test_nothing_constant_and_zero_vectors() -> None:
    empty = QualityAccumulator(D, 2).result()
    assert math.isnan(empty.fvu) and math.isnan(empty.cosine) and empty.n_positions == 0
    u, language = data(8, 1)
    assert measure(u[:0], u[:0], language[:0]).n_positions == 0
    assert measure(u, torch.zeros_like(u), language).cosine == 0.0
    assert measure(u.bfloat16(), u.bfloat16(), language).fvu == 0.0


def test_offsets_far_from_zero_lose_nothing() -> None:
    u, language = data(100, 2)
    u, u_hat = u.double(), u.double() + 0.05
    near, far = measure(u, u_hat, language, cuts=(30,)), measure(u + 1e5, u_hat + 1e5, language, cuts=(30, 71))
    assert far.fvu == pytest.approx(near.fvu, rel=1e-7)
