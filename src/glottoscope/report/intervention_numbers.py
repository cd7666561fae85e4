"""Numbers of the intervention in words: changes with their intervals, and what a rank among random draws is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from glottoscope.report.intervention_view import LOWER_IS_BETTER, Effect

FloatArray = npt.NDArray[np.float64]
LEVEL = 0.05
FEWEST_DRAWS = 19  # with fewer not even the best rank reaches the level
POOLS = {"random": "from all alive features", "random_other": "from outside the class"}


def signed(value: float, digits: int) -> str:
    """`+0.41`, `−0.30`: the sign is that of the number, also where rounding leaves zeros."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(value):.{digits}f}"


def digits_of(low: float, high: float, value: float) -> int:
    """Decimals that show two digits of an interval's width (three of the value where there is no interval)."""
    width = high - low if math.isfinite(high - low) and high > low else abs(value) / 10
    return 2 if width <= 0 else min(6, max(1, 1 - math.floor(math.log10(width))))


def change_words(effect: Effect) -> str:
    """`−0.41 [−0.52, −0.30]`."""
    digits = digits_of(effect.low, effect.high, effect.change)
    text = signed(effect.change, digits)
    if math.isfinite(effect.low + effect.high):
        text += f" [{signed(effect.low, digits)}, {signed(effect.high, digits)}]"
    return text


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def ranked(effect: Effect, pool: str) -> tuple[int | None, int | None]:
    """(rank, number of draws) of a part among one pool of draws."""
    return (effect.rank, effect.n_random) if pool == "random" else (effect.rank_other, effect.n_random_other)


def as_far_as(effect: Effect, pool: str, drawn: FloatArray) -> int:
    """How many draws of a pool do at least as much good as an effect does or, of harm, at least as much harm.

    Args:
        drawn: changes of the draws [n]; a tie counts against the effect, and for harm a rank does not show ties.
    """
    rank, n = ranked(effect, pool)
    assert rank is not None
    assert n is not None
    if effect.verdict != "worse":
        return rank - 1
    if len(drawn) == n:
        return int(np.sum(drawn >= effect.change if effect.metric in LOWER_IS_BETTER else drawn <= effect.change))
    return n - (rank - 1)


def beyond_pool(effect: Effect, pool: str, drawn: FloatArray) -> bool | None:
    """Whether an effect goes further than the draws of a pool (their changes), at LEVEL; None where that cannot be told."""
    rank, n = ranked(effect, pool)
    if rank is None or not n or effect.verdict not in ("better", "worse"):
        return None
    as_far = as_far_as(effect, pool, drawn)
    if as_far == 0 and n < FEWEST_DRAWS:
        return None
    return (as_far + 1) / (n + 1) <= LEVEL


def beyond_draws(effect: Effect, drawn: Mapping[str, FloatArray]) -> bool | None:
    """`beyond_pool` of both pools together: further than each that there is.

    Args:
        drawn: pool -> changes of its draws.
    """
    flags = [flag for pool in POOLS if (flag := beyond_pool(effect, pool, drawn[pool])) is not None]
    return all(flags) if flags else None
