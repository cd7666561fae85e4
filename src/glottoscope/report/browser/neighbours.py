"""Nearest decoder directions: within a setup, and between the checkpoints of one SAE.

Dead features are left out on both sides: they have nothing to show. A cosine is computed in float32 to find the
candidates and again in float64, in one order, for those within SLACK of the best: so the answer depends neither on the
block in which a row was computed nor on the number of threads.

Shapes: N features of a setup, D width, Q rows asked for, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from glottoscope.errors import InputError
from glottoscope.report.browser.cache import Cache
from glottoscope.report.browser.index import Setup

NEAR = 10
SLACK = 1e-5  # well above the rounding of a float32 dot product of unit vectors
BLOCK_BYTES = 64 * 2**20  # of cosines at a time
DECODER_BYTES = 1.5 * 2**30  # of decoders kept
PAIRS_KEPT = 256
GROUP = 32


class Decoder(NamedTuple):
    """Directions of the alive features of a setup."""

    feature: NDArray[np.int64]  # [N]
    unit: NDArray[np.float32]  # [N, D], rows of norm 1


class Best(NamedTuple):
    """The best counterpart of each row of one decoder in another."""

    place: NDArray[np.int64]  # [Q] row of the other decoder
    cosine: NDArray[np.float64]  # [Q]


@dataclass(frozen=True, eq=False, slots=True)
class Near:
    """Up to NEAR neighbours of each row asked for, nearest first; -1 where there are fewer."""

    place: NDArray[np.int64]  # [Q, NEAR]
    cosine: NDArray[np.float64]  # [Q, NEAR]


class Neighbours:
    """Neighbours of features, from the decoders on disk; results for whole setups are kept once `prepare` made them."""

    def __init__(
        self,
        alive: Callable[[Setup], NDArray[np.bool_]],
        language: Callable[[Setup], tuple[NDArray[np.int64], NDArray[np.bool_], int]] | None = None,
    ) -> None:
        """`language` gives of each feature the index of its language (-1: of none), whether it is mixed; and how many there are."""
        self._alive = alive
        self._language = language
        self._decoders: Cache[Decoder | None] = Cache(DECODER_BYTES, lambda d: d.unit.nbytes if d is not None else 1)
        self._near: Cache[Near] = Cache(4)
        self._pairs: Cache[tuple[Best, Best]] = Cache(PAIRS_KEPT)

    def decoder(self, setup: Setup) -> Decoder | None:
        """Directions of a setup's alive features; None where its SAE is not there."""
        return self._decoders.get(setup.id, lambda: read_decoder(setup, self._alive(setup)))

    def prepare(self, setup: Setup, others: list[Setup]) -> None:
        """Compute the neighbours of all features of a setup at once, and its counterparts in both directions."""
        own = self.decoder(setup)
        if own is None:
            return
        self._near.get(setup.id, lambda: nearest(own.unit, np.arange(len(own.unit))))
        for other in others:
            theirs = self.decoder(other)
            if theirs is not None:
                first, second = sorted((setup.id, other.id))
                a, b = (own, theirs) if first == setup.id else (theirs, own)
                self._pairs.get((first, second), lambda a=a, b=b: both_ways(a.unit, b.unit))

    def near(self, setup: Setup, features: NDArray[np.int64]) -> list[list[list[float]] | None]:
        """[feature, cosine] of the nearest directions in the same setup, for each feature asked for."""
        own = self.decoder(setup)
        if own is None:
            return [None] * len(features)
        rows, known = _rows_of(own, features)
        whole = self._near.peek(setup.id)
        found = nearest(own.unit, rows[known]) if whole is None else Near(whole.place[rows[known]], whole.cosine[rows[known]])
        names = np.where(found.place >= 0, own.feature[found.place], -1).tolist()
        values = np.round(found.cosine, 4).tolist()
        result: list[list[list[float]] | None] = [[] for _ in features]
        for place, f, c in zip(np.flatnonzero(known).tolist(), names, values, strict=True):
            result[place] = [[x, y + 0.0] for x, y in zip(f, c, strict=True) if x >= 0]
        return result

    def over(self, setup: Setup, other: Setup, features: NDArray[np.int64]) -> list[list[Any] | None]:
        """[feature, cosine, back] of each feature's best counterpart in another setup; None where there is none.

        `back` is 1 where the counterpart's own best counterpart in `setup` is the feature. Of a mixed feature there is a
        fourth entry, [feature, cosine] of the nearest feature of each language's class (null where it has none): one
        sees what an English and a Japanese feature became.
        """
        own, theirs = self.decoder(setup), self.decoder(other)
        result: list[list[Any] | None] = [None] * len(features)
        if own is None or theirs is None or not len(theirs.unit):
            return result
        rows, known = _rows_of(own, features)
        rows = rows[known]
        first, second = sorted((setup.id, other.id))
        kept = self._pairs.peek((first, second))
        if kept is not None:
            there, back = kept if first == setup.id else kept[::-1]
            place, cosine = there.place[rows], there.cosine[rows]
            returns = back.place[place] == rows
        else:
            place, cosine = best_of(own.unit[rows], theirs.unit)
            returns = best_of(theirs.unit[place], own.unit).place == rows
        names, values = theirs.feature[place].tolist(), np.round(cosine, 4).tolist()
        for n, f, c, r in zip(np.flatnonzero(known).tolist(), names, values, returns.tolist(), strict=True):
            result[n] = [f, c + 0.0, int(r)]
        self._add_languages(setup, other, features, rows, np.flatnonzero(known), result)
        return result

    def _add_languages(
        self,
        setup: Setup,
        other: Setup,
        features: NDArray[np.int64],
        rows: NDArray[np.int64],
        known: NDArray[np.int64],
        result: list[list[Any] | None],
    ) -> None:
        """Append the nearest feature of each language to the entries of mixed features."""
        own, theirs = self.decoder(setup), self.decoder(other)
        if self._language is None or own is None or theirs is None:
            return
        _, mixed, _ = self._language(setup)
        wanted = mixed[features[known]]
        language, _, n_languages = self._language(other)
        found = best_of_each(own.unit[rows[wanted]], theirs.unit, language[theirs.feature], n_languages)
        names = [theirs.feature[best.place] for best in found]
        for n, place in enumerate(known[wanted].tolist()):
            entry = result[place]
            assert entry is not None
            entry.append(
                [
                    [int(names[g][n]), float(np.round(best.cosine[n], 4)) + 0.0] if best.cosine[n] > -2 else None
                    for g, best in enumerate(found)
                ]
            )


def read_decoder(setup: Setup, alive: NDArray[np.bool_]) -> Decoder | None:
    """The alive rows of W_dec, of norm 1; rows without a direction are left out. None where there is no SAE.

    Raises:
        InputError: a damaged file, or one of another size.
    """
    path = setup.folder / "sae.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            weights_ND = file.get_tensor("W_dec").astype(np.float32, copy=False)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and run the study again") from None
    if len(weights_ND) != len(alive):
        raise InputError(f"{path} has {len(weights_ND)} features, the list has {len(alive)}: run the study again")
    norm_N = np.linalg.norm(weights_ND, axis=1)
    feature = np.flatnonzero(alive & (norm_N > 0) & np.isfinite(norm_N))
    return Decoder(feature, weights_ND[feature] / norm_N[feature, None])


def _rows_of(decoder: Decoder, features: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Row of each feature in the decoder, and whether it has one."""
    rows = np.searchsorted(decoder.feature, features)
    inside = np.minimum(rows, max(0, len(decoder.feature) - 1))
    known = np.zeros(len(features), bool) if not len(decoder.feature) else decoder.feature[inside] == features
    return rows, known


def _block(columns: int) -> int:
    return max(1, BLOCK_BYTES // (4 * max(1, columns)))


def _exact(a: NDArray[np.float32], b: NDArray[np.float32], i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cosines of the pairs (i, j), summed in float64 in one order."""
    step = max(1, BLOCK_BYTES // (16 * a.shape[1]))
    parts = [
        np.einsum("cd,cd->c", a[i[n : n + step]].astype(np.float64), b[j[n : n + step]].astype(np.float64))
        for n in range(0, len(i), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _first_of(key: NDArray[np.int64], value: NDArray[np.float64], name: NDArray[np.int64]) -> NDArray[np.int64]:
    """The entry of each key with the largest value (ties: smallest name), in order of the keys."""
    order = np.lexsort((name, -value, key))
    return order[np.diff(key[order], prepend=-1) != 0]


def best_of(asked_QD: NDArray[np.float32], other_ND: NDArray[np.float32]) -> Best:
    """The row of `other` with the largest cosine to each row asked for (ties: the first). `other` has rows."""
    place, cosine = np.zeros(len(asked_QD), np.int64), np.zeros(len(asked_QD))
    step = _block(len(other_ND))
    for first in range(0, len(asked_QD), step):
        rows = asked_QD[first : first + step]
        cosine_QN = rows @ other_ND.T
        i, j = np.nonzero(cosine_QN >= cosine_QN.max(axis=1, keepdims=True) - SLACK)
        exact = _exact(rows, other_ND, i, j)
        chosen = _first_of(i, exact, j)
        place[first : first + step], cosine[first : first + step] = j[chosen], exact[chosen]
    return Best(place, cosine)


def best_of_each(
    asked_QD: NDArray[np.float32], other_ND: NDArray[np.float32], group_N: NDArray[np.int64], n_groups: int
) -> list[Best]:
    """`best_of` among the rows of `other` of each group 0 .. n_groups - 1; cosine -inf where a group has no row."""
    members = [np.flatnonzero(group_N == group) for group in range(n_groups)]
    result = [Best(np.zeros(len(asked_QD), np.int64), np.full(len(asked_QD), -np.inf)) for _ in members]
    step = _block(len(other_ND))
    for first in range(0, len(asked_QD), step):
        rows = asked_QD[first : first + step]
        # One product for all groups: to pick a group's rows out first would copy them for every few rows asked for.
        cosine_QN = rows @ other_ND.T
        for columns, best in zip(members, result, strict=True):
            if len(columns):
                own_QM = cosine_QN[:, columns]
                i, m = np.nonzero(own_QM >= own_QM.max(axis=1, keepdims=True) - SLACK)
                exact = _exact(rows, other_ND, i, columns[m])
                chosen = _first_of(i, exact, m)
                best.place[first : first + step], best.cosine[first : first + step] = columns[m[chosen]], exact[chosen]
    return result


def both_ways(a_MD: NDArray[np.float32], b_ND: NDArray[np.float32]) -> tuple[Best, Best]:
    """`best_of` from a to b and from b to a, from one product."""
    if not len(a_MD) or not len(b_ND):
        none = Best(np.zeros(0, np.int64), np.zeros(0))
        return none, none
    there, best_N = [], np.full(len(b_ND), -np.inf, np.float32)
    back: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    step = _block(len(b_ND))
    for first in range(0, len(a_MD), step):
        rows = a_MD[first : first + step]
        cosine_MN = rows @ b_ND.T
        i, j = np.nonzero(cosine_MN >= cosine_MN.max(axis=1, keepdims=True) - SLACK)
        exact = _exact(rows, b_ND, i, j)
        chosen = _first_of(i, exact, j)
        there.append((j[chosen], exact[chosen]))
        np.maximum(best_N, cosine_MN.max(axis=0), out=best_N)
        # Candidates so far: few, since a column's maximum rises only now and then.
        i, j = np.nonzero(cosine_MN >= best_N - SLACK)
        back.append((i + first, j, cosine_MN[i, j]))
    i, j, value = (np.concatenate(column) for column in zip(*back, strict=True))
    left = value >= best_N[j] - SLACK
    i, j = i[left], j[left]
    exact = _exact(a_MD, b_ND, i, j)
    chosen = _first_of(j, exact, i)
    place, cosine = (np.concatenate(column) for column in zip(*there, strict=True))
    return Best(place, cosine), Best(i[chosen], exact[chosen])


def nearest(unit_ND: NDArray[np.float32], rows: NDArray[np.int64]) -> Near:
    """The NEAR nearest other rows of each row asked for (ties: the first)."""
    n = len(unit_ND)
    place = np.full((len(rows), NEAR), -1, np.int64)
    cosine = np.zeros((len(rows), NEAR))
    wanted = min(NEAR, n - 1)
    step = _block(n)
    for first in range(0, len(rows) if wanted > 0 else 0, step):
        own = rows[first : first + step]
        cosine_QN = unit_ND[own] @ unit_ND.T
        cosine_QN[np.arange(len(own)), own] = -np.inf
        i, j = np.nonzero(cosine_QN >= _lower_bound(cosine_QN, wanted)[:, None] - SLACK)
        exact = _exact(unit_ND, unit_ND, own[i], j)
        order = np.lexsort((j, -exact, i))
        i, j, exact = i[order], j[order], exact[order]
        rank = np.arange(len(i)) - np.searchsorted(i, i)
        kept = rank < wanted
        place[first + i[kept], rank[kept]], cosine[first + i[kept], rank[kept]] = j[kept], exact[kept]
    return Near(place, cosine)


def _lower_bound(values_QN: NDArray[np.float32], wanted: int) -> NDArray[np.float32]:
    """A bound [Q] that at least `wanted` values of each row reach: the wanted-th largest of the maxima of groups."""
    q, n = values_QN.shape
    groups = n // GROUP
    if groups < 4 * wanted:
        return np.partition(values_QN, n - wanted, axis=1)[:, n - wanted]
    maxima = values_QN[:, : groups * GROUP].reshape(q, groups, GROUP).max(axis=2)
    return np.partition(maxima, groups - wanted, axis=1)[:, groups - wanted]
