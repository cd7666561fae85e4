"""Bootstrap over the features of one SAE: shares and means are ratios of sums, resampled together.

Every measure is sum(numerator) / sum(denominator) over features, so one weights matrix [R, N] times two column matrices
[N, C] resamples all of them at once. The weights are multinomial, drawn in chunks: memory does not grow with R x N.

Shapes: N features, C measures, R bootstrap draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_CHUNK_ENTRIES = 4_000_000  # float64 weights in memory at a time: 32 MB
_DRAWN_ENTRIES = 65_536  # drawn and counted at a time: 0.5 MB, which stays in cache


class Resampled(NamedTuple):
    """value [C] of the data and draws [C, R] of the bootstrap; NaN where the denominator is 0."""

    value: FloatArray
    draws: FloatArray


def resample_ratios(numerator: FloatArray, denominator: FloatArray, *, n_boot: int, seed: int) -> Resampled:
    """Bootstrap of sum_i numerator / sum_i denominator for columns [N, C], features resampled with replacement.

    Columns share their draws, so differences between them may be taken draw by draw. The draws depend on `seed`, N
    and `n_boot` only.
    """
    n, n_columns = numerator.shape
    columns_NC2 = np.concatenate([numerator, denominator], axis=1)
    value = _divide(numerator.sum(axis=0), denominator.sum(axis=0))
    rng = np.random.default_rng(seed)
    draws_RC = np.full((n_boot, n_columns), np.nan)
    if n:
        chunk = max(1, _CHUNK_ENTRIES // n)
        for start in range(0, n_boot, chunk):
            sums = multinomial_weights(rng, min(chunk, n_boot - start), n) @ columns_NC2
            draws_RC[start : start + chunk] = _divide(sums[:, :n_columns], sums[:, n_columns:])
    return Resampled(value, draws_RC.T.copy())


def multinomial_weights(rng: np.random.Generator, n_draws: int, n: int) -> FloatArray:
    """[n_draws, n] how often each of n items is drawn in n draws with replacement.

    Counting uniform integers is the same multinomial as `Generator.multinomial`, an order of magnitude faster for
    n = 32,768.
    """
    weights = np.empty((n_draws, n))
    step = max(1, _DRAWN_ENTRIES // n)
    for first in range(0, n_draws, step):
        rows = min(step, n_draws - first)
        drawn = rng.integers(0, n, size=(rows, n))
        drawn += np.arange(rows)[:, None] * n
        weights[first : first + rows] = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
    return weights


def percentile_interval(draws: npt.NDArray[np.float64], level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of draws [R] without the undefined ones; None when all are."""
    defined = draws[np.isfinite(draws)]
    if not len(defined):
        return None
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def _divide(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
