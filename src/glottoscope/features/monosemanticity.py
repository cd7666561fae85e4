"""How few meanings a feature has: the entropies and R_mono of the paper's second version (METHOD.md section 5).

f(v|i) is the share of token v among the positions of feature i, p(c|i) the sum of f over cluster c:
H_token = -sum f log f, H_semantic = -sum p log p, R_mono = 1 - H_semantic / H_token. Entropies are in nats.
Clusters come from `clustering`.

Shapes: N features, R rows of a histogram (feature, token).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.features.collect import Groups, group_counts, run_starts

Array = NDArray[Any]


class Monosemanticity(NamedTuple):
    """Entropies and scores of N features; nan where a feature has no positions."""

    h_token: Array  # float64, nats
    h_semantic: Array  # float64, nats
    r: Array  # float64 in [0, 1]; 1 where single_token
    single_token: Array  # bool: one distinct token, H_token = 0, R = 1 by convention

    @property
    def effective_tokens(self) -> Array:
        """exp(H_token): how many equally frequent tokens have this entropy."""
        return np.exp(self.h_token)

    @property
    def effective_meanings(self) -> Array:
        """exp(H_semantic)."""
        return np.exp(self.h_semantic)


def sum_by_feature(groups_feature: Array, values: Array, n_features: int, empty: float = 0.0) -> Array:
    """float64 [N]: `values` summed over the rows of each feature (sorted by feature), `empty` where it has none."""
    out = np.full(n_features, empty)
    if len(groups_feature):
        starts = run_starts(groups_feature)
        out[groups_feature[starts]] = np.add.reduceat(values, starts)
    return out


def entropies(groups: Groups, n_features: int) -> Array:
    """Entropy of each feature's groups in nats: float64 [N], nan without positions, exactly 0 with one group."""
    total = np.bincount(groups.feature, weights=groups.count, minlength=n_features)
    p = groups.count / total[groups.feature]
    # maximum: -1 log 1 is -0.0
    return np.maximum(sum_by_feature(groups.feature, -p * np.log(p), n_features, np.nan), 0.0)


def monosemanticity(tokens: Groups, labels: Array, n_features: int) -> Monosemanticity:
    """H_token, H_semantic, R_mono and the single-token flag of every feature.

    Args:
        tokens: `collect.tokens_of(histogram)`, R rows. labels [R]: cluster of each row, from `clustering.row_labels`.
    """
    h_token = entropies(tokens, n_features)
    h_semantic = entropies(group_counts(tokens.feature, labels, tokens.count), n_features)
    # Merging tokens cannot raise the entropy; summing in another order can, by one rounding.
    h_semantic = np.minimum(h_semantic, h_token)
    single = np.bincount(tokens.feature, minlength=n_features) == 1
    ratio = np.divide(h_semantic, h_token, out=np.zeros(n_features), where=h_token > 0)
    r = np.where(np.isnan(h_token), np.nan, 1 - ratio)
    return Monosemanticity(h_token, h_semantic, r, single)
