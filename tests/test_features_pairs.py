"""Pairs in which a feature fires on both sides: any batching = brute force."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.features.pairs import FiringPositions, PairSide, firing_positions, strongest_pairs

N, K, P = 6, 3, 5
THRESHOLD = np.array([0.0, 0.25, 1.0, 0.5, 0.5, np.inf])

Sentences = dict[tuple[int, int], list[tuple[int, float]]]  # (feature, sentence) -> (t, value), t rising


def random_side(rng: np.random.Generator, m: int) -> dict[str, np.ndarray]:
    """Positions of P sentences, in any order; values are multiples of 1/4, so ties and values at a threshold are common."""
    place = rng.permutation(P * 20)[:m]
    return {
        "values": (rng.integers(0, 9, (m, K)) / 4).astype(np.float32),
        "indices": np.argsort(rng.random((m, N)), axis=1)[:, :K],
        "sentence": place // 20,
        "t": place % 20,
        "counted": rng.random(m) < 0.8,
    }


def firing(side: dict[str, np.ndarray], rows: slice) -> FiringPositions:
    cut = {name: column[rows] for name, column in side.items()}
    return firing_positions(cut["values"], cut["indices"], cut["sentence"], cut["t"], THRESHOLD, cut["counted"])


def brute_force(side: dict[str, np.ndarray]) -> Sentences:
    found: Sentences = defaultdict(list)
    for m in np.lexsort((side["t"], side["sentence"])):
        for value, feature in zip(side["values"][m], side["indices"][m], strict=True):
            if side["counted"][m] and value > 0 and value > THRESHOLD[feature]:
                found[int(feature), int(side["sentence"][m])].append((int(side["t"][m]), float(value)))
    return found


def row_of(side: PairSide, row: int) -> tuple[float, list[tuple[int, float]]]:
    inside = slice(side.offsets[row], side.offsets[row + 1])
    return float(side.value[row]), list(zip(side.at[inside].tolist(), side.level[inside].tolist(), strict=True))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32), m=st.tuples(st.integers(0, 60), st.integers(0, 60)), n=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 60), max_size=3),
)  # fmt: skip
def test_pairs_equal_brute_force(seed: int, m: tuple[int, int], n: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    sides = [random_side(rng, x) for x in m]
    parts = []
    for side, size in zip(sides, m, strict=True):
        edges = [0, *sorted(min(c, size) for c in cuts), size]
        parts.append([firing(side, slice(a, b)) for a, b in pairwise(edges)])
    found = strongest_pairs(parts, n)

    a, b = (brute_force(side) for side in sides)
    expected = []
    for feature in range(N):
        strength = {p: min(max(v for _, v in x[feature, p]) for x in (a, b)) for f, p in a if f == feature and (f, p) in b}
        ordered = sorted(strength, key=lambda p: (-strength[p], p))[:n]
        expected += [(feature, rank, pair) for rank, pair in enumerate(ordered)]
    assert list(zip(found.feature.tolist(), found.rank.tolist(), found.pair.tolist(), strict=True)) == expected
    for row, (feature, _, pair) in enumerate(expected):
        for side, entries in zip(found.sides, (a, b), strict=True):
            where = entries[feature, pair]
            assert row_of(side, row) == (max(v for _, v in where), where)
    dtypes = [x.dtype for x in (found.feature, found.rank, found.pair, *found.sides[0])]
    assert dtypes == [np.int32] * 3 + [np.float32, np.int64, np.int32, np.float32]
