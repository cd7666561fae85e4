"""Changes, gaps and their intervals: equal to plain loops over the same resamples, paired to the last bit, and honest.

Shapes: S conditions, U units, C statistics of a unit, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.intervention import effects
from glottoscope.intervention.effects import Effects, nll_score, paired_effects, ppl_score, ranks, resample_weights
from glottoscope.intervention.scores import ChrF, ratio

SEEDS = st.integers(0, 2**32 - 1)


def losses(rng: np.random.Generator, n_conditions: int, n_units: int) -> np.ndarray:
    """[S, U, 2] (nats, tokens): the same tokens under every condition, a donor (last) that is clearly better."""
    tokens_U = rng.integers(1, 60, size=n_units)
    shift_S = np.linspace(0, -1, n_conditions)
    per_token_SU = 4 + shift_S[:, None] + rng.normal(size=n_units) + 0.2 * rng.normal(size=(n_conditions, n_units))
    return np.stack([per_token_SU * tokens_U, np.broadcast_to(tokens_U, per_token_SU.shape)], axis=-1)


def weights_of(groups: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    return np.concatenate(list(resample_weights(groups, n_boot=n_boot, seed=seed)))


def plain_perplexity(totals_UC: np.ndarray, weights: np.ndarray) -> float:
    nats = sum(w * float(row[0]) for w, row in zip(weights, totals_UC, strict=True))
    tokens = sum(w * float(row[1]) for w, row in zip(weights, totals_UC, strict=True))
    return math.exp(nats / tokens) if tokens else math.nan


def percentiles(values: list[float]) -> tuple[float, float]:
    defined = [x for x in values if not math.isnan(x)]
    return (float(np.percentile(defined, 2.5)), float(np.percentile(defined, 97.5))) if defined else (math.nan, math.nan)


def brute_force(totals: np.ndarray, baseline: int, donor: int, groups: np.ndarray, n_boot: int, seed: int) -> list[list[float]]:
    """One row per condition, in the order of the fields of `Effects`, by loops."""
    ones, weights_RU = np.ones(len(groups)), weights_of(groups, n_boot, seed)
    base, gap = (plain_perplexity(totals[i], ones) for i in (baseline, donor))
    gap -= base
    gaps = [plain_perplexity(totals[donor], w) - plain_perplexity(totals[baseline], w) for w in weights_RU]
    sure = sum(not x * gap > 0 for x in gaps) <= 0.025 * n_boot
    rows = []
    for totals_UC in totals:
        value = plain_perplexity(totals_UC, ones)
        changes = [plain_perplexity(totals_UC, w) - plain_perplexity(totals[baseline], w) for w in weights_RU]
        closed = [change / one for change, one in zip(changes, gaps, strict=True) if one] if sure else []
        rows.append([value, value - base, *percentiles(changes), (value - base) / gap if gap else math.nan, *percentiles(closed)])
    return rows


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 5), st.integers(2, 25), st.integers(1, 4))
def test_effects_equal_loops_over_the_same_resamples(seed: int, n_conditions: int, n_units: int, per_group: int) -> None:
    rng = np.random.default_rng(seed)
    totals = losses(rng, n_conditions, n_units)
    groups = rng.permutation(np.arange(n_units) // per_group) * 7 - 3
    got = paired_effects(totals, ppl_score, baseline=0, donor=n_conditions - 1, groups=groups, n_boot=60, seed=seed)
    expected = np.array(brute_force(totals, 0, n_conditions - 1, groups, 60, seed)).T
    if len(np.unique(groups)) < 2:
        expected[[2, 3, 5, 6]] = np.nan
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-9, atol=1e-9)


def test_a_score_of_many_statistics_is_resampled_as_the_texts_themselves() -> None:
    metric = ChrF()
    references = ["the cat sat on the mat", "a dog barks", "rain falls in autumn", "he reads a book", "no", "snow on the hill"]
    hypotheses = [
        ["the cat", "a dog", "rain", "he", "no", "snow"],
        ["the cat sat", "dogs bark", "it rains", "he reads", "", "the hill"],
    ]
    statistics_SUC = np.stack([metric.statistics(row, references) for row in hypotheses])
    got = paired_effects(statistics_SUC, metric.score, baseline=0, donor=None, groups=np.arange(6), n_boot=40, seed=5)
    changes = []
    for weights_U in weights_of(np.arange(6), 40, 5).astype(int):
        drawn = [u for u, n in enumerate(weights_U) for _ in range(n)]
        rows = [metric.statistics([row[u] for u in drawn], [references[u] for u in drawn]).sum(axis=0) for row in hypotheses]
        scores = metric.score(np.stack(rows))
        changes.append(float(scores[1] - scores[0]))
    np.testing.assert_allclose([got.change_low[1], got.change_high[1]], percentiles(changes), rtol=1e-12)
    assert np.isnan(got.gap_closed).all() and np.isnan(got.gap_closed_low).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 200), st.integers(1, 5))
def test_the_size_of_chunks_changes_nothing(seed: int, n_units: int, entries: int, per_group: int) -> None:
    rng = np.random.default_rng(seed)
    totals, groups = losses(rng, 4, n_units), np.arange(n_units) // per_group

    def both() -> tuple[np.ndarray, Effects]:
        found = paired_effects(totals, nll_score, baseline=1, donor=3, groups=groups, n_boot=50, seed=seed)
        return weights_of(groups, 50, seed), found

    weights, whole = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "_ENTRIES", entries)
        patch.setattr(effects, "_DRAWN_ENTRIES", max(1, entries // 3))
        assert len(next(resample_weights(groups, n_boot=50, seed=seed))) == max(1, min(50, entries // n_units))
        weights_in_chunks, in_chunks = both()
    np.testing.assert_array_equal(weights_in_chunks, weights)
    np.testing.assert_allclose(np.stack(in_chunks), np.stack(whole), rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.permutations(range(5)))
def test_the_order_of_conditions_changes_nothing(seed: int, order: list[int]) -> None:
    totals, groups = losses(np.random.default_rng(seed), 5, 12), np.arange(12) // 2
    straight = paired_effects(totals, ppl_score, baseline=0, donor=4, groups=groups, n_boot=50, seed=1)
    moved = paired_effects(
        totals[order], ppl_score, baseline=order.index(0), donor=order.index(4), groups=groups, n_boot=50, seed=1
    )
    np.testing.assert_allclose(np.stack(moved), np.stack(straight)[:, order], rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 300), st.integers(2, 40), st.sampled_from([nll_score, ppl_score]))
def test_an_equal_condition_changes_by_exactly_nothing(
    seed: int, n_units: int, n_conditions: int, score: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Copies of the baseline anywhere among the conditions, in every chunk: zeros to the bit, intervals without width."""
    rng = np.random.default_rng(seed)
    totals = losses(rng, n_conditions, n_units)
    copies = rng.random(n_conditions - 1) < 0.5
    totals[:-1][copies] = totals[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "_ENTRIES", 2_000)
        got = paired_effects(totals, score, baseline=0, donor=n_conditions - 1, groups=np.arange(n_units), n_boot=30, seed=seed)
    for field in (got.change, got.change_low, got.change_high, got.gap_closed):
        assert (field[:-1][copies] == 0).all() and field[0] == 0
    assert got.gap_closed[-1] == 1
    assert np.isnan(got.gap_closed_low[-1]) or got.gap_closed_low[-1] == got.gap_closed_high[-1] == 1


def test_weights_draw_whole_groups_with_replacement() -> None:
    groups = np.array([4, 4, -1, 9, 9, 9])
    weights_RU = weights_of(groups, 3000, 8)
    assert weights_RU.shape == (3000, 6)
    for group in (4, -1, 9):
        assert (np.ptp(weights_RU[:, groups == group], axis=1) == 0).all()
    per_group = weights_RU[:, [0, 2, 3]]
    assert (per_group.sum(axis=1) == 3).all()
    # Multinomial of 3 draws from 3 groups: mean 1, variance 3 * 1/3 * 2/3.
    np.testing.assert_allclose(per_group.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(per_group.var(axis=0), 2 / 3, atol=0.06)
    np.testing.assert_array_equal(weights_of(groups, 10, 8), weights_RU[:10])
    assert (weights_of(groups, 10, 9) != weights_RU[:10]).any()


def test_intervals_cover_a_known_difference() -> None:
    """200 data sets whose true change is -0.3: the 95 % interval holds it in 90 to 99 % of them."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        tokens_U = rng.integers(10, 50, size=80)
        noise_U = rng.standard_t(5, size=80)
        per_token = np.stack([4 + noise_U, 3.7 + noise_U + 0.5 * rng.normal(size=80)])
        totals = np.stack([per_token * tokens_U, np.broadcast_to(tokens_U, per_token.shape)], axis=-1)
        got = paired_effects(totals, nll_score, baseline=0, donor=None, groups=np.arange(80), n_boot=300, seed=seed)
        covered += bool(got.change_low[1] <= -0.3 <= got.change_high[1])
    assert 180 <= covered <= 198


def test_units_that_go_together_widen_the_interval() -> None:
    """The change differs between articles, not within them: sentences alone would look five times as many."""
    rng = np.random.default_rng(3)
    article_U = np.repeat(np.arange(40), 10)
    change_U = rng.normal(size=40)[article_U] + 0.1 * rng.normal(size=400)
    totals = np.stack([np.stack([x, np.ones(400)], axis=-1) for x in (np.full(400, 5.0), 5 + change_U)])
    width = []
    for groups in (article_U, np.arange(400)):
        got = paired_effects(totals, nll_score, baseline=0, donor=None, groups=groups, n_boot=1000, seed=1)
        width.append(got.change_high[1] - got.change_low[1])
    assert width[0] > 2 * width[1]


def test_a_shared_resample_cancels_what_both_conditions_share() -> None:
    """Documents differ by far more than the condition does; the change keeps its narrow interval."""
    rng = np.random.default_rng(4)
    level_U = 5 + 2 * rng.normal(size=60)
    totals = np.stack([np.stack([x, np.ones(60)], axis=-1) for x in (level_U, level_U - 0.01)])
    got = paired_effects(totals, nll_score, baseline=0, donor=None, groups=np.arange(60), n_boot=500, seed=2)
    np.testing.assert_allclose([got.change_low[1], got.change_high[1]], -0.01, atol=1e-9)


def test_a_gap_that_may_be_nothing_has_a_share_without_an_interval() -> None:
    rng = np.random.default_rng(5)
    baseline, part = np.ones(50), np.ones(50) - 0.2
    noise = rng.normal(size=50)
    donor = baseline - 0.01 + noise - noise.mean()
    totals = np.stack([np.stack([x, np.ones(50)], axis=-1) for x in (baseline, part, donor)])
    got = paired_effects(totals, nll_score, baseline=0, donor=2, groups=np.arange(50), seed=1)
    assert got.change_low[2] < 0 < got.change_high[2]
    assert np.isfinite(got.gap_closed).all()
    assert np.isnan(got.gap_closed_low).all() and np.isnan(got.gap_closed_high).all()
    assert np.isfinite(got.change_low).all()


def test_a_gap_that_hardly_ever_changes_sign_keeps_its_interval() -> None:
    rng = np.random.default_rng(5)
    noise = rng.normal(size=50)
    noise = (noise - noise.mean()) / noise.std()
    baseline = np.full(50, 3.0)
    donor = baseline - 2.4 / np.sqrt(50) + noise  # 2.4 standard errors: the other sign in some 1 % of the resamples
    totals = np.stack([np.stack([x, np.ones(50)], axis=-1) for x in (baseline, baseline + noise - 0.5, donor)])
    weights_RU = weights_of(np.arange(50), 1000, 1)
    flipped = np.mean(weights_RU @ (donor - baseline) >= 0)
    assert 0 < flipped < 0.025
    got = paired_effects(totals, nll_score, baseline=0, donor=2, groups=np.arange(50), seed=1)
    closed_R = weights_RU @ (noise - 0.5) / (weights_RU @ (donor - baseline))
    np.testing.assert_allclose([got.gap_closed_low[1], got.gap_closed_high[1]], np.percentile(closed_R, [2.5, 97.5]))


def test_no_gap_has_no_share() -> None:
    totals = losses(np.random.default_rng(6), 3, 20)
    totals[2] = totals[0] * [1 + 5e-13, 1]
    got = paired_effects(totals, nll_score, baseline=0, donor=2, groups=np.arange(20), n_boot=50, seed=1)
    assert np.isnan(got.gap_closed).all()
    assert np.isnan(got.gap_closed_low).all() and np.isnan(got.gap_closed_high).all()
    assert np.isfinite(got.change_high).all()


def test_nothing_is_said_without_units_or_from_one_group() -> None:
    totals = losses(np.random.default_rng(7), 3, 8)
    none = paired_effects(totals[:, :0], nll_score, baseline=0, donor=2, groups=np.arange(0), n_boot=20, seed=1)
    assert np.isnan(np.stack(none)).all()
    one = paired_effects(totals, nll_score, baseline=0, donor=2, groups=np.zeros(8, np.int64), n_boot=20, seed=1)
    assert np.isfinite([one.value, one.change, one.gap_closed]).all()
    assert np.isnan([one.change_low, one.change_high, one.gap_closed_low, one.gap_closed_high]).all()
    with pytest.raises(ValueError, match="7 groups for 8 units"):
        paired_effects(totals, nll_score, baseline=0, donor=2, groups=np.arange(7), n_boot=20, seed=1)


def test_an_undefined_condition_leaves_the_others_alone() -> None:
    totals = losses(np.random.default_rng(8), 4, 20)
    clean = paired_effects(totals, ppl_score, baseline=0, donor=3, groups=np.arange(20), n_boot=50, seed=1)
    for bad in (np.nan, np.inf, 1e300):  # the last is a perplexity beyond float64
        totals[1, 4, 0] = bad
        got = np.stack(paired_effects(totals, ppl_score, baseline=0, donor=3, groups=np.arange(20), n_boot=50, seed=1))
        assert np.isnan(got[[0, 1, 4], 1]).all()
        np.testing.assert_array_equal(got[:, [0, 2, 3]], np.stack(clean)[:, [0, 2, 3]])


def test_resamples_without_a_single_token_are_left_out() -> None:
    """Two documents of four are empty in this language: one resample in sixteen draws only them."""
    tokens_U = np.array([10, 0, 20, 0])
    totals = np.stack([np.stack([nats * tokens_U, tokens_U], axis=-1) for nats in (3.0, 2.5)])
    got = paired_effects(totals, ratio, baseline=0, donor=1, groups=np.arange(4), n_boot=500, seed=1)
    np.testing.assert_allclose([got.change[1], got.change_low[1], got.change_high[1]], -0.5)
    assert np.isnan(got.gap_closed_low).all()  # the gap is undefined in more than 2.5 % of the resamples


def test_scores_of_losses() -> None:
    totals = np.array([[[6.0, 3.0], [0.0, 0.0]], [[5.0, 2.0], [1e6, 1.0]]])
    np.testing.assert_array_equal(nll_score(totals), [[2.0, np.nan], [2.5, 1e6]])
    np.testing.assert_array_equal(ppl_score(totals), [[np.exp(2.0), np.nan], [np.exp(2.5), np.inf]])


def test_ranks_count_ties_against_the_value() -> None:
    assert ranks(1.0, [2.0, 3.0, 0.5], "lower") == (2, 3)
    assert ranks(1.0, [2.0, 3.0, 0.5], "higher") == (3, 3)
    assert ranks(1.0, [1.0, np.nan, 2.0], "lower") == (2, 2)
    assert ranks(1.0, [1.0, np.nan, 0.0], "higher") == (2, 2)
    assert ranks(-1.0, [], "lower") == (None, 0)
    assert ranks(math.nan, [1.0, 2.0], "lower") == (None, 2)
    assert ranks(1.0, [math.nan], "lower") == (None, 0)


@settings(max_examples=50)
@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20), st.integers(-3, 3).map(float))
def test_ranks_of_both_directions_add_up(draws: list[float], value: float) -> None:
    low, n = ranks(value, draws, "lower")
    high, _ = ranks(value, draws, "higher")
    assert low is not None and high is not None and n == len(draws)
    assert low + high == n + 2 + draws.count(value)
    assert ranks(-value, [-x for x in draws], "higher") == (low, n)
