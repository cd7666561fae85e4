"""FVU, cosine and L0 over chunks. Shape suffixes: B positions, D d_model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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


@settings(max_examples=40, deadline=None)
@given(b=st.integers(4, 200), seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_against_the_formula_whatever_the_chunking(b: int, seed: int, cuts: list[int]) -> None:
    u, language = data(b, seed)
    u_hat = u + 0.1 * torch.randn(b, D, generator=torch.Generator().manual_seed(seed + 1))
    l0 = torch.arange(b) % 5
    found = measure(u, u_hat, language, l0, tuple(min(c, b) for c in cuts))
    v, v_hat = u.double(), u_hat.double()
    assert found.fvu == pytest.approx(float((v - v_hat).square().sum() / (v - v.mean(0)).square().sum()), rel=1e-10)
    for g in (0, 1):
        own, own_hat = v[language == g], v_hat[language == g]
        if len(own) > 1:
            expected = float((own - own_hat).square().sum() / (own - own.mean(0)).square().sum())
            assert found.fvu_language[g] == pytest.approx(expected, rel=1e-9)
    cosine = torch.nn.functional.cosine_similarity(v, v_hat, dim=1).mean()
    assert found.cosine == pytest.approx(float(cosine), rel=1e-10)
    assert found.l0 == pytest.approx(float(l0.double().mean()))
    assert found.loss == pytest.approx(float((v - v_hat).square().sum(1).mean()), rel=1e-10)
    assert found.n_positions == b


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
    assert measure(u, torch.zeros_like(u), language).cosine == 0.0
    assert measure(u.bfloat16(), u.bfloat16(), language).fvu == 0.0


def test_offsets_far_from_zero_lose_nothing() -> None:
    u, language = data(100, 2)
    u, u_hat = u.double(), u.double() + 0.05
    near, far = measure(u, u_hat, language, cuts=(30,)), measure(u + 1e5, u_hat + 1e5, language, cuts=(30, 71))
    assert far.fvu == pytest.approx(near.fvu, rel=1e-7)
