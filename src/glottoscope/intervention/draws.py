"""Random sets of features that hold as much activation mass as a class: what any set of this weight would do.

Features come in random order and the set is cut where its mass is nearest to the class's; an order that jumps over the
target is thrown away. So among sets of one size all that fit are about equally likely, with heavy features as with
light ones. Filling up with whatever still fits would prefer light features. Only where no order fits (few or heavy
features) is one feature of the set exchanged: evenly from all exchanges that reach the target, else the one that comes nearest.

Shapes: N features of one SAE, P features of the pool that have mass, in ascending order of mass, D draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_ORDERS = 16  # random orders before features are exchanged
_EXCHANGES = 24  # further random orders, each with an exchange
_SAID = 0.05  # a draw further from the target is said to be so
_ALIKE = 0.9  # two draws that each take this share of the pool share about as much


class Draws(NamedTuple):
    """Random sets of features.

    Attributes:
        members: [D, N]; no row where the note says why there is no draw.
        target: activation mass of the class.
        reached: [D] activation mass of each set.
        note: why there is no draw, or what is wrong with the draws; None where all is well.
    """

    members: BoolArray
    target: float
    reached: FloatArray
    note: str | None


def matched_draws(
    mass_N: FloatArray, member_N: BoolArray, pool_N: BoolArray, *, n_draws: int, seed: int, tolerance: float = 0.02
) -> Draws:
    """Sets of pool features whose mass is the class's, within `tolerance` of it where that can be had.

    All sets differ from each other and from the class itself. Draw i has its own generator, seeded (seed, i): it does
    not depend on how many draws follow. All or none: where not enough different sets are found there is no draw, and
    a note. So there is where the pool holds less than (1 - tolerance) of the class's mass, or the class has no feature.
    Where draws are further than 5 % from the target (single features are too heavy) the nearest sets that were met are
    kept, and noted. Noted are also draws that each take more than 0.9 of the pool's mass, which are much alike.

    Args:
        mass_N: summed activation of each feature over the dev positions. Features without mass are never drawn.
        member_N: the class.
        pool_N: what may be drawn; may hold features of the class.
        tolerance: share of the class's mass.

    Raises:
        ValueError: arrays of different shape, or a mass that is negative or not finite.
    """
    mass_N = np.asarray(mass_N, dtype=np.float64)
    if not mass_N.shape == member_N.shape == pool_N.shape:
        raise ValueError(f"mass {mass_N.shape}, class {member_N.shape} and pool {pool_N.shape} differ in shape")
    if not (np.isfinite(mass_N) & (mass_N >= 0)).all():
        raise ValueError("a feature has an activation mass that is negative or not finite")
    target = float(mass_N[member_N].sum())
    features_P = np.flatnonzero(pool_N & (mass_N > 0))
    features_P = features_P[np.argsort(mass_N[features_P], kind="stable")]
    mass_P = mass_N[features_P]
    if note := _why_none(member_N, target, float(mass_P.sum()), tolerance):
        return _no_draws(len(mass_N), target, note)
    in_class = member_N & (mass_N > 0)
    taken = {in_class[features_P].tobytes()} if not (in_class & ~pool_N).any() else set()
    members_DN = np.zeros((n_draws, len(mass_N)), bool)
    for i in range(n_draws):
        set_P = _draw(np.random.default_rng([seed, i]), mass_P, target, tolerance, taken)
        if set_P is None:
            note = (
                f"too few different sets of features match the part's activation mass: {i} of {n_draws} found "
                f"(the pool holds {mass_P.sum() / target:.3g} of the part's activation mass)"
            )
            return _no_draws(len(mass_N), target, note)
        taken.add(set_P.tobytes())
        members_DN[i, features_P[set_P]] = True
    reached_D = np.array([mass_N[row].sum() for row in members_DN], dtype=np.float64)
    return Draws(members_DN, target, reached_D, _what_is_wrong(reached_D, target, float(mass_P.sum())))


def _why_none(member_N: BoolArray, target: float, pool: float, tolerance: float) -> str | None:
    if not member_N.any():
        return "empty class"
    if target == 0:
        return "the part has no activation mass"
    if pool < target * (1 - tolerance):
        return f"the pool holds {pool / target:.3g} of the part's activation mass"
    return None


def _what_is_wrong(reached_D: FloatArray, target: float, pool: float) -> str | None:
    if not len(reached_D):
        return None
    ratio_D = reached_D / target
    worst = float(ratio_D[np.argmax(np.abs(ratio_D - 1))])
    if abs(worst - 1) > _SAID:
        return (
            "the part's activation mass is not matched closely (single features are too heavy, or too few sets fit): "
            f"the worst draw holds {worst:.3g} of it"
        )
    share = float(reached_D.mean()) / pool
    if share > _ALIKE:
        return f"each draw takes {share:.2f} of the pool's activation mass: the draws are much alike"
    return None


def _no_draws(n_features: int, target: float, note: str) -> Draws:
    return Draws(np.zeros((0, n_features), bool), target, np.zeros(0), note)


def _draw(rng: np.random.Generator, mass_P: FloatArray, target: float, tolerance: float, taken: set[bytes]) -> BoolArray | None:
    """A set that is not in `taken`: the first within tolerance, else the nearest that was met; None without any."""
    best_P, nearest = None, np.inf
    for attempt in range(_ORDERS + _EXCHANGES):
        set_P = _cut(rng, mass_P, target)
        tried = [set_P] if attempt < _ORDERS else [set_P, _exchange(rng, mass_P, set_P, target, tolerance)]
        for set_P in tried:
            off = abs(float(mass_P[set_P].sum()) - target)
            if off < nearest and set_P.tobytes() not in taken:
                best_P, nearest = set_P, off
        if nearest <= tolerance * target:
            break
    return best_P


def _cut(rng: np.random.Generator, mass_P: FloatArray, target: float) -> BoolArray:
    """The start of a random order whose mass is nearest to the target; at least one feature."""
    order_P = rng.permutation(len(mass_P))
    sums_P = np.cumsum(mass_P[order_P])
    size = int(np.searchsorted(sums_P, target)) + 1
    if size > len(sums_P) or (size > 1 and target - sums_P[size - 2] < sums_P[size - 1] - target):
        size -= 1
    set_P = np.zeros(len(mass_P), bool)
    set_P[order_P[:size]] = True
    return set_P


def _exchange(rng: np.random.Generator, mass_P: FloatArray, set_P: BoolArray, target: float, tolerance: float) -> BoolArray:
    """Put one feature in place of another, add one or drop one: drawn evenly from all that bring the mass within
    tolerance, else the one that brings it nearest. A set that is within tolerance stays as it is."""
    lacking = target - float(mass_P[set_P].sum())
    slack = tolerance * target
    # "None" (-1, mass 0, so still in ascending order) in exchange for a feature: adding and dropping.
    leaving, coming = np.append(-1, np.flatnonzero(set_P)), np.flatnonzero(~set_P)
    if len(leaving) > 2:
        coming = np.append(-1, coming)  # the last feature is never dropped
    if abs(lacking) <= slack or not len(coming):
        return set_P
    out, into = (np.where(x < 0, 0.0, mass_P[x]) for x in (leaving, coming))
    low = np.searchsorted(into, out + lacking - slack, side="left")
    high = np.searchsorted(into, out + lacking + slack, side="right")
    ends = np.cumsum(high - low)
    if ends[-1] > 0:
        drawn = int(rng.integers(ends[-1]))
        i = int(np.searchsorted(ends, drawn, side="right"))
        j = int(high[i] - (ends[i] - drawn))
    else:
        after = np.minimum(np.searchsorted(into, out + lacking), len(into) - 1)
        near_2 = np.stack([np.maximum(after - 1, 0), after])
        off_2 = np.abs(into[near_2] - out - lacking)
        side, i = np.unravel_index(int(np.argmin(off_2)), off_2.shape)
        j = int(near_2[side, i])
    set_P = set_P.copy()
    for index, inside in ((leaving[i], False), (coming[j], True)):
        if index >= 0:
            set_P[index] = inside
    return set_P
