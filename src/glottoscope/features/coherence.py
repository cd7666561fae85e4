"""Coherence: monosemanticity that does not depend on how many positions a feature has (METHOD.md section 5, ours).

coherence = 1 - E[H of 50 positions drawn without replacement] / log 50. The expectation is exact: of a group with c of
the feature's n positions, the number in the draw is hypergeometric, and E[H] is the sum over groups of
E[-(X/50) log(X/50)]. With clusters as groups this is `coherence`, with tokens `coherence_token`.

Shapes: N features, R rows (feature, group), U distinct (n, c).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

from glottoscope.features.collect import Groups
from glottoscope.features.monosemanticity import entropies, sum_by_feature

Array = NDArray[Any]

DRAWS = 50
MIN_POSITIONS = 10
CHUNK_ROWS = 65_536


class Coherence(NamedTuple):
    """Coherence of N features."""

    value: Array  # float64 in [0, 1]; nan below `min_positions`
    short: Array  # bool: fewer than `draws` positions, so 1 - H / log n over all n of them


def coherence(groups: Groups, n_features: int, *, draws: int = DRAWS, min_positions: int = MIN_POSITIONS) -> Coherence:
    """Coherence of every feature over its groups.

    Args:
        groups: `collect.tokens_of(histogram)`, or those merged by cluster with `collect.group_counts`.
        draws: positions drawn; a feature with `min_positions` <= n < draws uses its n positions and log n (`short`).
    """
    n_positions = np.bincount(groups.feature, weights=groups.count, minlength=n_features).astype(np.int64)
    short = (n_positions >= min_positions) & (n_positions < draws)
    value = np.full(n_features, np.nan)
    value[short] = 1 - entropies(groups, n_features)[short] / np.log(n_positions[short])

    enough = n_positions[groups.feature] >= draws
    feature, count = groups.feature[enough], groups.count[enough]
    terms = expected_entropy_terms(n_positions[feature], count, draws)
    expected = sum_by_feature(feature, terms, n_features, np.nan)
    long = n_positions >= draws
    value[long] = 1 - expected[long] / np.log(draws)
    return Coherence(np.clip(value, 0, 1), short)


def expected_entropy_terms(n: Array, c: Array, draws: int) -> Array:
    """E[-(X/m) log(X/m)] in nats, X ~ Hypergeometric(n, c, m = draws): float64, one for each row of (n, c).

    Args:
        n: int, population, n >= draws. c: int, members of the group in it, 1 <= c <= n.
    """
    if not len(n):
        return np.empty(0)
    span = int(n.max()) + 1
    distinct, inverse = np.unique(n.astype(np.int64) * span + c, return_inverse=True)
    n_U, c_U = np.divmod(distinct, span)
    out = np.empty(len(distinct))
    for first in range(0, len(distinct), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        out[rows] = _terms(n_U[rows], c_U[rows], draws)
    return out[inverse]


def _terms(n_U: Array, c_U: Array, draws: int) -> Array:
    x = np.arange(draws + 1)
    log_choose = gammaln(draws + 1) - gammaln(x + 1) - gammaln(draws - x + 1)
    inside = _log_falling(c_U, draws)
    outside = _log_falling(n_U - c_U, draws)[:, ::-1]
    total = _log_falling(n_U, draws)[:, -1:]
    # P(X = x) = C(m, x) (c)_x (n - c)_(m - x) / (n)_m. Falling factorials of at most `draws` factors keep their
    # precision at any n, where differences of log-gamma lose it.
    probability = np.exp(log_choose + inside + outside - total)
    share = x / draws
    return probability @ -xlogy(share, share)


def _log_falling(a: Array, draws: int) -> Array:
    """log a (a - 1) ... (a - x + 1) for x = 0 .. draws: float64 [U, draws + 1]; -inf where a factor is 0."""
    distinct, inverse = np.unique(a, return_inverse=True)
    factors = distinct[:, None] - np.arange(draws)
    logs = np.full(factors.shape, -np.inf)
    np.log(factors, out=logs, where=factors > 0)
    table = np.concatenate((np.zeros((len(distinct), 1)), np.cumsum(logs, axis=1)), axis=1)
    return table[inverse]
