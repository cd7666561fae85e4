"""What a condition changed, with 95 % intervals from a paired bootstrap, and its rank among random draws.

Every score is a function of sums over units (documents, or articles of aligned sentences). A resample is one row of
weights, shared by all conditions: the noise of the text cancels in a difference. Sums over a group are taken first, so
the products cost (conditions x groups), however many units a group has.

Shapes: S conditions, U units, G groups, C statistics of a unit, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Totals = npt.NDArray[np.float64 | np.int64]
Score = Callable[[FloatArray], npt.ArrayLike]

_ENTRIES = 4_000_000  # of weights, of totals and of sums in memory at a time: 32 MB each
_DRAWN_ENTRIES = 65_536  # groups drawn and counted at a time: 0.5 MB, which stays in cache
_FLIPPED = 0.025  # share of resamples in which the gap to the donor may have the other sign
_NO_GAP = 1e-12  # a gap below this share of the values is rounding


class Effects(NamedTuple):
    """One number per condition, each [S]; NaN where undefined.

    Attributes:
        value: the score of the sums over all units.
        change: value minus that of the baseline.
        gap_closed: change over the donor's change. 0 for the baseline, 1 for the donor.
    """

    value: FloatArray
    change: FloatArray
    change_low: FloatArray
    change_high: FloatArray
    gap_closed: FloatArray
    gap_closed_low: FloatArray
    gap_closed_high: FloatArray


def resample_weights(unit_group: IntArray, *, n_boot: int, seed: int) -> Iterator[FloatArray]:
    """Chunks [r, U] of the weights [n_boot, U] of a bootstrap over groups.

    As many groups as there are get drawn with replacement, and every unit of a group gets the group's multiplicity.
    The weights depend on `seed`, the groups and `n_boot` only; the first rows do not depend on `n_boot` either.

    Args:
        unit_group: [U] the group of each unit, any integers.
    """
    group_U, n_groups = _groups(unit_group)
    for weights_RG in _group_weights(n_groups, _rows(max(n_groups, len(group_U)), n_boot), n_boot, seed):
        yield weights_RG[:, group_U]


def paired_effects(
    totals_SUC: Totals,
    score: Score,
    *,
    baseline: int,
    donor: int | None,
    groups: IntArray,
    n_boot: int = 1000,
    seed: int,
) -> Effects:
    """Value, change and closed share of the gap for every condition, with 95 % percentile intervals.

    Value and change come from the sums over all units, the intervals from `resample_weights`: a condition and the
    baseline always share their resample, so a condition with the baseline's totals changes by exactly 0 in each.
    Resamples with an undefined score are left out. With fewer than two groups no interval is defined; with few
    groups (some 10 or less) percentile intervals are known to be too narrow.

    `gap_closed` is a ratio, taken resample by resample for its interval. It is NaN where baseline and donor score the
    same. Its interval is NaN too where the gap itself is not sure: where it is 0, undefined or of the other sign in
    more than 2.5 % of the resamples.

    Args:
        totals_SUC: statistics of each unit under each condition, the baseline and the donor among them.
        score: sums of statistics [M, C] to scores [M]. A score that is not finite counts as undefined.
        baseline: index of the unpatched model in S.
        donor: index of the other end of the gap; None where there is none, gap_closed is then NaN.
        groups: [U] what is resampled together.
    """
    n_conditions, n_units, _ = totals_SUC.shape
    if len(groups) != n_units:
        raise ValueError(f"{len(groups)} groups for {n_units} units")
    value_S = _scores(score, totals_SUC.sum(axis=1, dtype=np.float64))
    change_S = value_S - value_S[baseline]
    undefined_S = np.full(n_conditions, np.nan)
    gap_closed_S, low_S, high_S, gap_low_S, gap_high_S = (undefined_S.copy() for _ in range(5))
    gap = np.nan if donor is None else change_S[donor]
    if donor is not None and abs(gap) > _NO_GAP * max(abs(value_S[donor]), abs(value_S[baseline])):
        gap_closed_S = change_S / gap
    if len(np.unique(groups)) > 1:
        draws_SR = _resampled(totals_SUC, score, baseline, groups, n_boot, seed)
        change_SR = draws_SR - draws_SR[baseline]
        low_S, high_S = _interval(change_SR)
        if donor is not None and np.mean(np.sign(change_SR[donor]) != np.sign(gap)) <= _FLIPPED:
            gap_R = np.where(change_SR[donor] == 0, np.nan, change_SR[donor])
            gap_low_S, gap_high_S = _interval(change_SR / gap_R)
            # Rounding may pass the test of signs where baseline and donor are one model.
            gap_low_S, gap_high_S = (np.where(np.isnan(gap_closed_S), np.nan, x) for x in (gap_low_S, gap_high_S))
    return Effects(value_S, change_S, low_S, high_S, gap_closed_S, gap_low_S, gap_high_S)


def nll_score(totals: FloatArray) -> FloatArray:
    """Nats per token [...] of sums (nats, tokens) [..., 2]; NaN without tokens."""
    nats, tokens = totals[..., 0], totals[..., 1]
    return np.divide(nats, tokens, out=np.full(nats.shape, np.nan), where=tokens > 0)


def ppl_score(totals: FloatArray) -> FloatArray:
    """Perplexity [...] of sums (nats, tokens) [..., 2]; NaN without tokens."""
    with np.errstate(over="ignore"):
        return np.exp(nll_score(totals))


def ranks(value: float, draws: npt.ArrayLike, better: Literal["lower", "higher"]) -> tuple[int | None, int]:
    """Rank of a value among random draws, 1 the best, and how many draws have a value.

    The rank is 1 + the draws that do at least as well: a tie counts against the value, so rank / (draws + 1) never
    understates how often a random set looks as good. NaN draws are left out.

    Returns:
        (rank, n): rank is None where the value is NaN or no draw is left.
    """
    draws_N = np.asarray(draws, dtype=np.float64)
    draws_N = draws_N[~np.isnan(draws_N)]
    if np.isnan(value) or not len(draws_N):
        return None, len(draws_N)
    ahead_N = draws_N <= value if better == "lower" else draws_N >= value
    return 1 + int(ahead_N.sum()), len(draws_N)


def _resampled(
    totals_SUC: Totals,
    score: Score,
    baseline: int,
    groups: IntArray,
    n_boot: int,
    seed: int,
) -> FloatArray:
    """[S, R] scores of every resample.

    What is resampled is each condition's difference to the baseline: zeros stay zeros in any matrix product, while
    equal columns need not give equal sums.
    """
    n_conditions, n_units, n_statistics = totals_SUC.shape
    group_U, n_groups = _groups(groups)
    order_U = np.argsort(group_U, kind="stable")
    starts_G = np.searchsorted(group_U[order_U], np.arange(n_groups))
    rows = _rows(n_groups, n_boot)
    base_UC = totals_SUC[baseline][order_U].astype(np.float64)
    base_GC = np.add.reduceat(base_UC, starts_G, axis=0)
    draws_SR = np.empty((n_conditions, n_boot))
    step = max(1, _ENTRIES // (max(n_units, rows) * n_statistics))
    with np.errstate(invalid="ignore"):
        base_RC = np.concatenate([weights_RG @ base_GC for weights_RG in _group_weights(n_groups, rows, n_boot, seed)])
        for first in range(0, n_conditions, step):
            excess = totals_SUC[first : first + step].transpose(1, 0, 2)[order_U].astype(np.float64, copy=False)
            excess -= base_UC[:, None]
            if n_groups < n_units:
                excess = np.add.reduceat(excess, starts_G, axis=0)
            excess = np.ascontiguousarray(excess).reshape(n_groups, -1)
            done = 0
            for weights_RG in _group_weights(n_groups, rows, n_boot, seed):
                part = slice(done, done + len(weights_RG))
                sums_RSC = (weights_RG @ excess).reshape(len(weights_RG), -1, n_statistics)
                sums_RSC += base_RC[part, None]
                scores = _scores(score, sums_RSC.reshape(-1, n_statistics))
                draws_SR[first : first + step, part] = scores.reshape(sums_RSC.shape[:2]).T
                done = part.stop
    return draws_SR


def _groups(unit_group: IntArray) -> tuple[IntArray, int]:
    """[U] groups renumbered from 0, and their number."""
    names, group_U = np.unique(unit_group, return_inverse=True)
    return group_U.reshape(-1).astype(np.int64), len(names)


def _rows(width: int, n_boot: int) -> int:
    """Resamples at a time, for weights of this width."""
    return max(1, min(n_boot, _ENTRIES // max(width, 1)))


def _group_weights(n_groups: int, rows: int, n_boot: int, seed: int) -> Iterator[FloatArray]:
    """Chunks [rows, G] of how often each group is drawn in G draws with replacement.

    Counting uniform integers is the same multinomial as `Generator.multinomial`, much faster, and the stream of
    integers is the same however it is cut.
    """
    rng = np.random.default_rng(seed)
    for first in range(0, n_boot, rows):
        weights_RG = np.empty((min(rows, n_boot - first), n_groups))
        step = max(1, _DRAWN_ENTRIES // max(n_groups, 1))
        for start in range(0, len(weights_RG), step):
            n = min(step, len(weights_RG) - start)
            drawn = rng.integers(0, max(n_groups, 1), size=(n, n_groups)) + np.arange(n)[:, None] * n_groups
            weights_RG[start : start + n] = np.bincount(drawn.ravel(), minlength=n * n_groups).reshape(n, n_groups)
        yield weights_RG


def _scores(score: Score, totals_MC: FloatArray) -> FloatArray:
    """[M] scores, NaN where not finite."""
    scores_M = np.asarray(score(totals_MC), dtype=np.float64)
    return np.where(np.isfinite(scores_M), scores_M, np.nan)


def _interval(draws_SR: FloatArray) -> tuple[FloatArray, FloatArray]:
    """95 % percentile interval of each row without its NaN; NaN for a row of NaN."""
    low_S, high_S = np.full((2, len(draws_SR)), np.nan)
    whole_S = ~np.isnan(draws_SR).any(axis=1)
    some_S = ~whole_S & ~np.isnan(draws_SR).all(axis=1)
    for rows_S, percentile in ((whole_S, np.percentile), (some_S, np.nanpercentile)):
        if rows_S.any():
            low_S[rows_S], high_S[rows_S] = percentile(draws_SR[rows_S], [2.5, 97.5], axis=1)
    return low_S, high_S
