"""Alignment of two languages in the hidden states themselves, without any SAE.

alignment = mean cosine of aligned sentences' mean states at one layer, each language centred, minus the mean cosine of
sentences that are not translations of each other. Ours; it is the control that no SAE setting can bend.

Shapes: P aligned pairs, D d_model, A articles, R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

CHUNK_ENTRIES = 4_000_000  # weights in memory at a time: 32 MB


class Interval(NamedTuple):
    """A value with its 95 % interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


def alignment(
    mean_states_a: npt.ArrayLike,
    mean_states_b: npt.ArrayLike,
    article: npt.ArrayLike | None = None,
    *,
    n_boot: int = 1000,
    seed: int,
) -> Interval:
    """Mean cosine of the pairs minus that of shuffled pairs, with a 95 % bootstrap interval over articles.

    The shuffled term is its expectation, the mean over all sentences i != j, so `seed` moves the interval alone. The
    centring is that of the whole sample in every draw.

    Args:
        mean_states_a, mean_states_b: [P, D] mean hidden states, row p of one translates row p of the other.
        article: [P] the article of each pair; None resamples single pairs.

    Returns: nulls for fewer than two pairs; a null interval for a single article.
    """
    n = len(np.asarray(mean_states_a))
    if n < 2:
        return Interval(None, None, None)
    a_PD, b_PD = (_unit(_centre(np.asarray(x, dtype=np.float64))) for x in (mean_states_a, mean_states_b))
    cosine_P = np.einsum("pd,pd->p", a_PD, b_PD)
    group_P = np.arange(n) if article is None else np.unique(np.asarray(article), return_inverse=True)[1]
    n_groups = int(group_P.max()) + 1
    size_A = np.bincount(group_P).astype(np.float64)
    cosine_A = np.bincount(group_P, weights=cosine_P)
    order = np.argsort(group_P, kind="stable")
    starts = np.concatenate([[0], np.cumsum(size_A)[:-1]]).astype(np.int64)
    a_AD, b_AD = (np.add.reduceat(x[order], starts, axis=0) for x in (a_PD, b_PD))

    def statistic(weights_RA: FloatArray) -> FloatArray:
        total_R = weights_RA @ size_A
        # Copies of one sentence are not shuffled pairs of each other: w_i^2 terms leave the double sum.
        same_R = (weights_RA**2) @ size_A
        cross_R = np.einsum("rd,rd->r", weights_RA @ a_AD, weights_RA @ b_AD) - (weights_RA**2) @ cosine_A
        n_cross_R = total_R**2 - same_R
        shuffled_R = np.divide(cross_R, n_cross_R, out=np.full(len(total_R), np.nan), where=n_cross_R > 0)
        return weights_RA @ cosine_A / total_R - shuffled_R

    value = float(statistic(np.ones((1, n_groups)))[0])
    if n_groups < 2:
        return Interval(value, None, None)
    draws_R = np.concatenate([statistic(weights_RA) for weights_RA in _weights(n_groups, n_boot, seed)])
    draws_R = draws_R[np.isfinite(draws_R)]
    if not len(draws_R):
        return Interval(value, None, None)
    low, high = np.percentile(draws_R, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _weights(n_groups: int, n_boot: int, seed: int) -> Iterator[FloatArray]:
    """How often each group is in each bootstrap draw, [R, A] a chunk."""
    if n_groups * n_boot <= CHUNK_ENTRIES:
        yield _drawn(n_groups, n_boot, seed)
        return
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK_ENTRIES // n_groups)
    for start in range(0, n_boot, size):
        yield _draw(rng, n_groups, min(size, n_boot - start))


@lru_cache(maxsize=2)
def _drawn(n_groups: int, n_boot: int, seed: int) -> FloatArray:
    """Kept: all setups of a study have the same pairs, and the draws take longer than what is done with them."""
    weights_RA = _draw(np.random.default_rng(seed), n_groups, n_boot)
    weights_RA.flags.writeable = False
    return weights_RA


def _draw(rng: np.random.Generator, n_groups: int, n_draws: int) -> FloatArray:
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), n_draws).astype(np.float64)


def _centre(x_PD: FloatArray) -> FloatArray:
    return x_PD - x_PD.mean(axis=0)


def _unit(x_PD: FloatArray) -> FloatArray:
    """Rows of unit norm; a zero row stays zero."""
    norm_P1 = np.linalg.norm(x_PD, axis=1, keepdims=True)
    return np.divide(x_PD, norm_P1, out=np.zeros_like(x_PD), where=norm_P1 > 0)
