"""Random sets of matched activation mass: they fit, they differ, and they look like the pool.

Shapes: N features, P features of the pool, D draws.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.intervention.draws import Draws, _exchange, matched_draws

SEEDS = st.integers(0, 2**32 - 1)


def problem(seed: int, n: int, size: int, spread: float, silent: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masses (log-normal, some 0), a class, and a pool of most features."""
    rng = np.random.default_rng(seed)
    mass_N = rng.lognormal(0, spread, n) * (rng.random(n) >= silent)
    member_N = np.zeros(n, bool)
    member_N[rng.choice(n, size, replace=False)] = True
    return mass_N, member_N, rng.random(n) < 0.9


def subsets(n: int) -> np.ndarray:
    """[2^n - 1, n] every set of n features but the empty one."""
    return ((np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1).astype(bool)


def off(draws: Draws) -> np.ndarray:
    return np.abs(draws.reached / draws.target - 1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 400), st.floats(0, 1), st.floats(0, 2), st.integers(0, 6))
def test_draws_hold_what_they_promise(seed: int, n: int, share: float, spread: float, n_draws: int) -> None:
    mass_N, member_N, pool_N = problem(seed, n, round(share * n), spread)
    draws = matched_draws(mass_N, member_N, pool_N, n_draws=n_draws, seed=seed)
    assert draws.members.dtype == bool and draws.members.shape == (len(draws.reached), n)
    assert len(draws.members) in (0, n_draws)
    assert draws.target == mass_N[member_N].sum()
    assert not draws.members[:, ~pool_N | (mass_N == 0)].any()
    assert draws.members.any(axis=1).all()
    assert len({row.tobytes() for row in draws.members}) == len(draws.members)
    in_class = member_N & (mass_N > 0)
    assert not (draws.members == in_class).all(axis=1).any()
    np.testing.assert_allclose(draws.reached, draws.members @ mass_N)
    if len(draws.members) < n_draws:
        assert draws.note
    elif n_draws and off(draws).max() > 0.05:
        worst = draws.reached[np.argmax(off(draws))] / draws.target
        assert draws.note and f"holds {worst:.3g} of it" in draws.note
    pool = mass_N[pool_N].sum()
    if draws.target and pool < 0.98 * draws.target:
        assert draws.note == f"the pool holds {pool / draws.target:.3g} of the part's activation mass"


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(20, 300), st.integers(1, 5), st.integers(1, 5))
def test_a_draw_depends_on_its_number_only(seed: int, n: int, few: int, more: int) -> None:
    mass_N, member_N, pool_N = problem(seed, n, n // 5, 1.0)
    first = matched_draws(mass_N, member_N, pool_N, n_draws=few, seed=seed)
    longer = matched_draws(mass_N, member_N, pool_N, n_draws=few + more, seed=seed)
    if len(longer.members):
        np.testing.assert_array_equal(longer.members[:few], first.members)
        np.testing.assert_array_equal(longer.reached[:few], first.reached)
    again = matched_draws(mass_N, member_N, pool_N, n_draws=few, seed=seed)
    np.testing.assert_array_equal(again.members, first.members)


def test_another_seed_draws_other_sets() -> None:
    mass_N, member_N, pool_N = problem(0, 300, 60, 1.0)
    one, two = (matched_draws(mass_N, member_N, pool_N, n_draws=8, seed=seed) for seed in (1, 2))
    assert not {row.tobytes() for row in one.members} & {row.tobytes() for row in two.members}


@pytest.mark.parametrize("size", [1, 3, 30, 300, 2000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_a_large_pool_is_matched_within_tolerance(size: int, spread: float) -> None:
    mass_N, member_N, _ = problem(size, 5000, size, spread, silent=0)
    for pool_N in (np.ones(5000, bool), ~member_N):
        for tolerance in (0.02, 0.002):
            draws = matched_draws(mass_N, member_N, pool_N, n_draws=8, seed=size, tolerance=tolerance)
            if mass_N[member_N].sum() < np.sort(mass_N)[1] or (size == 1 and tolerance == 0.002):
                continue  # nothing is light enough, or hardly any feature
            assert len(draws.members) == 8 and off(draws).max() <= tolerance * (1 + 1e-9)
            assert draws.note is None


def fitting(mass_N: np.ndarray, member_N: np.ndarray) -> np.ndarray:
    """Every set but the class within 2 % of its mass, by enumeration."""
    sets = subsets(len(mass_N))
    target = mass_N[member_N].sum()
    return sets[(np.abs(sets @ mass_N - target) <= 0.02 * target) & ~(sets == member_N).all(axis=1)]


def test_tiny_pools_against_every_set() -> None:
    """A draw fits where any set does (all but a few of the hard cases), and never where none does."""
    feasible = found = 0
    for seed in range(300):
        mass_N, member_N, _ = problem(seed, 4 + seed % 5, 2, 1.0, silent=0)
        fits = fitting(mass_N, member_N)
        draws = matched_draws(mass_N, member_N, np.ones(len(mass_N), bool), n_draws=1, seed=seed)
        assert len(draws.members) == 1
        fitted = bool(off(draws)[0] <= 0.02 * (1 + 1e-9))
        assert fitted == any((draws.members[0] == row).all() for row in fits)
        feasible += bool(len(fits))
        found += fitted
    assert feasible > 50 and found >= 0.98 * feasible


@pytest.mark.parametrize("lightest", [1.5, 2.5])  # beyond 2 the empty set would be the nearest of all
def test_the_nearest_sets_are_kept_where_none_fits(lightest: float) -> None:
    """Against enumeration: single heavy features, one of two draws is the nearest set of all."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        mass_N = rng.uniform(lightest, 4, size=8)
        mass_N[0] = 1
        member_N = np.arange(8) == 0
        draws = matched_draws(mass_N, member_N, ~member_N, n_draws=2, seed=seed)
        nearest = np.sort(np.abs(subsets(7) @ mass_N[1:] - 1))
        assert len(draws.members) == 2 and draws.members.any(axis=1).all()
        assert np.abs(draws.reached - 1).min() <= nearest[0] + 1e-12
        assert draws.note and "too heavy" in draws.note


def test_sets_of_one_size_are_equally_likely() -> None:
    """Three of seven nearly equal features: 35 sets fit, one is the class; a first draw is each other one as often."""
    mass_N = np.linspace(1, 1.006, 7)
    member_N = np.array([0, 1, 0, 1, 0, 0, 1], bool)
    drawn = Counter(
        matched_draws(mass_N, member_N, np.ones(7, bool), n_draws=1, seed=seed).members[0].tobytes() for seed in range(3400)
    )
    assert len(drawn) == 34 and member_N.tobytes() not in drawn
    counts = np.array(list(drawn.values()))
    assert ((counts - 100) ** 2 / 100).sum() < 64  # chi-square with 33 degrees of freedom: beyond it in 1 of 1,000


def test_unequal_features_are_drawn_evenly_too() -> None:
    """Eight of 165 sets of three weigh what the class does, with a feature of 4.5 or only up to 1.7: each as often."""
    rng = np.random.default_rng(2)
    mass_N = np.sort(rng.lognormal(0, 0.8, 11))
    member_N = np.zeros(11, bool)
    member_N[rng.choice(11, 4, replace=False)] = True
    three = [row for row in fitting(mass_N, member_N) if row.sum() == 3]
    assert len(three) == 8
    drawn = Counter(
        matched_draws(mass_N, member_N, np.ones(11, bool), n_draws=1, seed=seed).members[0].tobytes() for seed in range(2000)
    )
    counts = np.array([drawn[row.tobytes()] for row in three])
    assert counts.std() < 0.25 * counts.mean()


def test_an_exchange_is_drawn_evenly_from_all_that_fit() -> None:
    mass_P = np.arange(1.0, 11.0)
    set_P = np.isin(mass_P, [2.0, 4.0, 7.0])  # 13, where 16 +- 2 is wanted: exchanges and additions that bring 1 to 5
    every = set()
    for row in subsets(10):
        added, dropped = (row & ~set_P).sum(), (set_P & ~row).sum()
        if abs(row @ mass_P - 16) <= 2.1 and added <= 1 and dropped <= 1:
            every.add(row.tobytes())
    drawn = Counter(_exchange(np.random.default_rng(i), mass_P, set_P, 16, 2.1 / 16).tobytes() for i in range(100 * len(every)))
    assert set(drawn) == every and len(every) == 13
    counts = np.array(list(drawn.values()))
    assert ((counts - 100) ** 2 / 100).sum() < 33  # chi-square with 12 degrees of freedom: beyond it in 1 of 1,000


def ranks_of_members(mass_N: np.ndarray, draws: Draws) -> np.ndarray:
    """Where each drawn feature stands in the pool by mass, 0 the lightest and 1 the heaviest."""
    place_N = np.argsort(np.argsort(mass_N)) / (len(mass_N) - 1)
    return np.concatenate([place_N[row] for row in draws.members])


@pytest.mark.parametrize("heavy", [False, True])
def test_drawn_features_weigh_what_the_pool_weighs(heavy: bool) -> None:
    """Whatever the class is made of. Filling up with what still fits would bring light features in."""
    rng = np.random.default_rng(1)
    mass_N = rng.lognormal(0, 1.2, 6000)
    member_N = np.zeros(6000, bool)
    member_N[np.argsort(mass_N)[-60:] if heavy else rng.choice(6000, 300, replace=False)] = True
    draws = matched_draws(mass_N, member_N, np.ones(6000, bool), n_draws=32, seed=2)
    place = ranks_of_members(mass_N, draws)
    error = 1 / np.sqrt(12 * len(place))
    assert abs(place.mean() - 0.5) < 4 * error
    np.testing.assert_allclose(np.quantile(place, [0.1, 0.25, 0.75, 0.9]), [0.1, 0.25, 0.75, 0.9], atol=0.02)
    assert abs(draws.reached.sum() / draws.members.sum() / mass_N.mean() - 1) < 0.05
    assert draws.note is None


def test_repaired_sets_weigh_what_the_pool_weighs() -> None:
    """So tight a tolerance that no order fits by itself: the exchange must not favour light features either."""
    rng = np.random.default_rng(3)
    mass_N = rng.uniform(0.5, 1.5, 2000)
    member_N = rng.permutation(np.arange(2000) < 40)
    draws = matched_draws(mass_N, member_N, ~member_N, n_draws=40, seed=4, tolerance=1e-5)
    assert off(draws).max() <= 1e-5
    place = ranks_of_members(mass_N[~member_N], draws._replace(members=draws.members[:, ~member_N]))
    assert abs(place.mean() - 0.5) < 4 / np.sqrt(12 * len(place))


def test_no_draw_where_nothing_can_be_drawn() -> None:
    mass_N = np.array([1.0, 2.0, 3.0, 0.0, 0.0])
    everything, silent = np.ones(5, bool), np.array([0, 0, 0, 1, 0], bool)
    two = np.array([0, 1, 1, 0, 0], bool)
    notes = {
        "empty class": (np.zeros(5, bool), everything),
        "the part has no activation mass": (silent, everything),
        "the pool holds 0.2 of the part's activation mass": (two, ~two),
        "the pool holds 0 of the part's activation mass": (two, silent),
    }
    for note, (member_N, pool_N) in notes.items():
        draws = matched_draws(mass_N, member_N, pool_N, n_draws=3, seed=0)
        assert draws.note == note and draws.members.shape == (0, 5) and not len(draws.reached)


def test_a_pool_that_is_used_up_gives_no_draws() -> None:
    """Every alive feature from every alive feature is the class again; from as much mass outside, one set."""
    mass_N, everything = np.linspace(1, 2, 40), np.ones(40, bool)
    draws = matched_draws(mass_N, everything, everything, n_draws=3, seed=0, tolerance=1e-3)
    assert not len(draws.members)
    assert draws.note and draws.note.startswith("too few different sets") and "0 of 3 found" in draws.note
    half = np.arange(4) < 2
    twice = matched_draws(np.array([1.0, 2.0, 1.0, 2.0]), half, ~half, n_draws=4, seed=0)
    assert not len(twice.members) and twice.note and "of 4 found" in twice.note
    once = matched_draws(np.array([1.0, 2.0, 1.0, 2.0]), half, ~half, n_draws=1, seed=0)
    np.testing.assert_array_equal(once.members, [~half])


def test_draws_that_are_much_alike_are_said_to_be() -> None:
    mass_N = np.ones(200)
    member_N = np.arange(200) < 98
    draws = matched_draws(mass_N, member_N, ~member_N, n_draws=5, seed=0)
    assert len(draws.members) == 5
    assert draws.note == "each draw takes 0.96 of the pool's activation mass: the draws are much alike"


def test_bad_arrays() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        matched_draws(np.ones(3), np.ones(2, bool), np.ones(3, bool), n_draws=1, seed=0)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="negative or not finite"):
            matched_draws(np.array([1.0, bad]), np.ones(2, bool), np.ones(2, bool), n_draws=1, seed=0)
