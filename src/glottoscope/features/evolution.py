"""One row of the evolution table: what became of the features of one setup, with intervals over its features.

Shares are over alive features, unclassified and neutral ones in the denominator; `alive` is over all. Intervals are
95 % percentile bootstraps over the features of one SAE and hold for that LM and SAE only; `seeds_band` stands beside
them where there are several seeds. Undefined is None (null in Parquet), never NaN.

Shapes: N features, R bootstrap draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from glottoscope.features.bootstrap import FloatArray, Resampled, percentile_interval, resample_ratios

CLASSES_OF_ANY_PAIR = ("mixed", "unclassified", "neutral")
FLAGS = ("bilingual", "bilingual_paper", "supportable")
MEANS = ("monosemanticity", "monosemanticity_hidden", "coherence", "coherence_token")
SEED_KEYS = ("control", "family", "model", "d_model", "n_params", "step", "tokens_seen", "layer")

Table = Mapping[str, npt.ArrayLike | None]


def measures(languages: Sequence[str]) -> tuple[str, ...]:
    """Names of the measures of one evolution row, each with `_low` and `_high`, in the order of the table."""
    shares = [f"share_{name}" for name in (*languages, "mixed", *FLAGS, "unclassified", "neutral")]
    return (
        *shares, "alive", "monosemanticity", "monosemanticity_multi", "monosemanticity_pooled",
        "monosemanticity_hidden", "coherence", "coherence_token",
    )  # fmt: skip


def counts(languages: Sequence[str]) -> tuple[str, ...]:
    """Names of the counts of one evolution row."""
    classes = [f"count_{name}" for name in (*languages, *CLASSES_OF_ANY_PAIR, "dead", "bilingual_paper", "supportable")]
    return ("n_features", "n_alive", "n_bilingual", *classes)


def evolution_fields(languages: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    """Arrow names and types of everything `evolution_row` returns, so that an all-null column keeps its type."""
    floats = [name + suffix for name in measures(languages) for suffix in ("", "_low", "_high")]
    return [(name, pa.float64()) for name in floats] + [(name, pa.int64()) for name in counts(languages)]


def evolution_row(table: Table, languages: Sequence[str], *, n_boot: int = 1000, seed: int) -> dict[str, float | int | None]:
    """Shares, means and counts of one setup with `_low` and `_high`.

    Args:
        table: columns [N] of one setup. Needed: `language` (class names) and `alive`. Optional, absent or None means
            undefined: `bilingual`, `bilingual_paper`, `supportable` (boolean), `monosemanticity`,
            `monosemanticity_hidden`, `coherence`, `coherence_token`, `h_token`, `h_semantic` (None or NaN: undefined
            for that feature), `single_token` (default none).
        languages: codes, in the study's order.

    Returns: for each of `measures(languages)` the value, `_low` and `_high`, then `counts(languages)`.
    """
    resampled = resample_measures(table, languages, n_boot=n_boot, seed=seed)
    row: dict[str, float | int | None] = {}
    for index, name in enumerate(measures(languages)):
        value = resampled.value[index]
        interval = percentile_interval(resampled.draws[index]) if np.isfinite(value) else None
        row[name] = float(value) if np.isfinite(value) else None
        row[f"{name}_low"], row[f"{name}_high"] = interval if interval else (None, None)
    return row | _counts(table, languages)


def resample_measures(table: Table, languages: Sequence[str], *, n_boot: int = 1000, seed: int) -> Resampled:
    """Values [C] and bootstrap draws [C, R] of `measures(languages)`; arguments as `evolution_row`.

    All measures share their draws. `turning_step` takes the draws of one measure at every step.
    """
    alive = np.asarray(table["alive"], dtype=bool)
    classes = np.asarray(table["language"])
    multi = alive if table.get("single_token") is None else alive & ~np.asarray(table["single_token"], dtype=bool)
    nothing = np.zeros(len(alive))
    pairs: dict[str, tuple[FloatArray, FloatArray]] = {"alive": (_float(alive), np.ones(len(alive)))}
    for name in (*languages, *CLASSES_OF_ANY_PAIR):
        pairs[f"share_{name}"] = (_float(alive & (classes == name)), _float(alive))
    for name in FLAGS:
        flag = boolean_column(table.get(name))
        pairs[f"share_{name}"] = (nothing, nothing) if flag is None else (_float(alive & flag), _float(alive))
    for name in MEANS:
        pairs[name] = _mean_columns(table.get(name), alive, nothing)
    pairs["monosemanticity_multi"] = _mean_columns(table.get("monosemanticity"), multi, nothing)
    pairs["monosemanticity_pooled"] = _pooled_columns(table, alive, nothing)
    numerator, denominator = (np.stack([pairs[name][i] for name in measures(languages)], axis=1) for i in (0, 1))
    return resample_ratios(numerator, denominator, n_boot=n_boot, seed=seed)


def boolean_column(column: npt.ArrayLike | None) -> npt.NDArray[np.bool_] | None:
    """A nullable flag as booleans, null counting as False; None when the whole column is null."""
    values = np.asarray(column, dtype=object) if column is not None else np.asarray([], dtype=object)
    null = values == None  # noqa: E711  (elementwise)
    return None if null.all() else np.where(null, False, values).astype(bool)


def _float(x: npt.NDArray[np.bool_]) -> FloatArray:
    return x.astype(np.float64)


def _mean_columns(
    column: npt.ArrayLike | None, chosen: npt.NDArray[np.bool_], nothing: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Numerator and denominator of the mean over the chosen features that have a value."""
    if column is None:
        return nothing, nothing
    values = np.asarray(column, dtype=np.float64)
    defined = chosen & np.isfinite(values)
    return np.where(defined, values, 0.0), _float(defined)


def _pooled_columns(table: Table, alive: npt.NDArray[np.bool_], nothing: FloatArray) -> tuple[FloatArray, FloatArray]:
    """1 - sum H_semantic / sum H_token as a ratio of sums; a single-token feature (H_token = 0) adds nothing."""
    if table.get("h_token") is None or table.get("h_semantic") is None:
        return nothing, nothing
    h_token = np.asarray(table["h_token"], dtype=np.float64)
    h_semantic = np.asarray(table["h_semantic"], dtype=np.float64)
    defined = alive & np.isfinite(h_token) & np.isfinite(h_semantic)
    return np.where(defined, h_token - h_semantic, 0.0), np.where(defined, h_token, 0.0)


def _counts(table: Table, languages: Sequence[str]) -> dict[str, float | int | None]:
    alive = np.asarray(table["alive"], dtype=bool)
    classes = np.asarray(table["language"])
    out: dict[str, float | int | None] = {"n_features": len(alive), "n_alive": int(alive.sum())}
    for name in FLAGS:
        flag = boolean_column(table.get(name))
        key = "n_bilingual" if name == "bilingual" else f"count_{name}"
        out[key] = None if flag is None else int((alive & flag).sum())
    for name in (*languages, *CLASSES_OF_ANY_PAIR):
        out[f"count_{name}"] = int((alive & (classes == name)).sum())
    out["count_dead"] = int((~alive).sum())
    return {name: out[name] for name in counts(languages)}


class Turning(NamedTuple):
    """Where a measure turns, and how far it falls to there and rises after; intervals are 95 %.

    The intervals of `fall` (first - minimum) and `rise` (last - minimum) hold the turning step fixed; choosing the
    lowest of several noisy values makes both a little too large, most where the curve is flat.
    """

    step: int
    step_low: int
    step_high: int
    minimum: float
    fall: float
    fall_low: float
    fall_high: float
    rise: float
    rise_low: float
    rise_high: float


def turning_step(steps: npt.ArrayLike, values: npt.ArrayLike, draws: npt.ArrayLike) -> Turning | None:
    """The step at which a measure (the mixed share) is lowest, the earliest on ties, with a bootstrap interval.

    Args:
        steps: [S] in any order; values: [S], NaN where undefined (left out); draws: [S, R] independent between steps,
            such as `resample_measures(...).draws` of one measure at each step, or `draws_from_intervals`.

    Returns: None for fewer than two defined steps.
    """
    values_S, draws_SR = np.asarray(values, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    order = np.argsort(np.asarray(steps), kind="stable")
    order = order[np.isfinite(values_S[order])]
    if len(order) < 2:
        return None
    steps_S, values_S, draws_SR = np.asarray(steps)[order], values_S[order], draws_SR[order]
    lowest = int(np.argmin(values_S))
    lowest_R = np.argmin(np.where(np.isfinite(draws_SR), draws_SR, np.inf), axis=0)
    # Quantiles of positions, not of step numbers: an end of the interval is a step that was measured.
    first_R, last_R = np.quantile(lowest_R, 0.025, method="lower"), np.quantile(lowest_R, 0.975, method="higher")
    fall_low, fall_high = percentile_interval(draws_SR[0] - draws_SR[lowest]) or (np.nan, np.nan)
    rise_low, rise_high = percentile_interval(draws_SR[-1] - draws_SR[lowest]) or (np.nan, np.nan)
    return Turning(
        step=int(steps_S[lowest]), step_low=int(steps_S[int(first_R)]), step_high=int(steps_S[int(last_R)]),
        minimum=float(values_S[lowest]),
        fall=float(values_S[0] - values_S[lowest]), fall_low=fall_low, fall_high=fall_high,
        rise=float(values_S[-1] - values_S[lowest]), rise_low=rise_low, rise_high=rise_high,
    )  # fmt: skip


def draws_from_intervals(
    values: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, *, n_boot: int = 1000, seed: int
) -> FloatArray:
    """[S, R] normal draws around values [S] with the standard error that a 95 % interval implies.

    For a table read from disk, where the bootstrap draws themselves are gone.
    """
    error_S = _standard_errors(low, high)
    noise_SR = np.random.default_rng(seed).standard_normal((len(error_S), n_boot))
    return np.asarray(values, dtype=np.float64)[:, None] + error_S[:, None] * noise_SR


def _standard_errors(low: npt.ArrayLike, high: npt.ArrayLike) -> FloatArray:
    width = np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)
    return width / (2 * 1.959963984540054)


def base_model(row: Mapping[str, Any]) -> str:
    """The model's name without its LM seed: "d128-s1", "d128_seed1" and "d128-lm_seed1" of LM seed 1 are "d128"."""
    return re.sub(rf"[-_.](?:lm[-_]?)?s(?:eed)?[-_]?{row.get('lm_seed')}$", "", str(row["model"]))


def seeds_band(
    rows: Sequence[Mapping[str, Any]], *, name_of: Callable[[Mapping[str, Any]], str] = base_model
) -> list[dict[str, Any]]:
    """Rows of evolution_seeds: minimum, mean and maximum of every measure over LM and SAE seeds.

    One row for each (control, family, model without seed, d_model, n_params, step, tokens_seen, layer), in that order,
    with `<measure>_min`, `_mean`, `_max` (None where no seed has a value), `n` rows, `n_lm_seeds` and `n_sae_seeds`.
    The measures are the columns with a `_low` and `_high`, and fvu, cosine, l0 and `lm_loss_*`.

    Args:
        name_of: gives a row's model name without its LM seed.
    """
    names = _band_measures(rows)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_seed_key(row, name_of), []).append(row)
    out: list[dict[str, Any]] = []
    for key in sorted(groups, key=lambda parts: tuple((part is None, part) for part in parts)):
        members = groups[key]
        band: dict[str, Any] = dict(zip(SEED_KEYS, key, strict=True))
        band["n"] = len(members)
        band["n_lm_seeds"] = len({row.get("lm_seed") for row in members})
        band["n_sae_seeds"] = len({row.get("sae_seed") for row in members})
        for name in names:
            values = [row[name] for row in members if row.get(name) is not None]
            band[f"{name}_min"] = min(values) if values else None
            band[f"{name}_mean"] = float(np.mean(values)) if values else None
            band[f"{name}_max"] = max(values) if values else None
        out.append(band)
    return out


def _seed_key(row: Mapping[str, Any], name_of: Callable[[Mapping[str, Any]], str]) -> tuple[Any, ...]:
    return tuple(name_of(row) if name == "model" else row.get(name) for name in SEED_KEYS)


def _band_measures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = dict.fromkeys(name for row in rows for name in row)
    return [name for name in columns if f"{name}_low" in columns or name in ("fvu", "cosine", "l0") or name.startswith("lm_loss_")]


class DetectableDifference(NamedTuple):
    """Smallest difference between two setups that this study finds with 80 % power at 5 %, two-sided.

    features: from the bootstrap errors over features alone, for one LM and SAE; None without intervals.
    seeds: from the spread over seeds, for means over `n_seeds` seeds; None where no setup has two.
    seed_kind: "lm_seed" or "sae_seed", the one that varies; freedom: degrees of freedom of the pooled variance.
    """

    features: float | None
    seeds: float | None
    seed_kind: str | None
    n_seeds: int | None
    freedom: int | None


def smallest_detectable_difference(
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    name_of: Callable[[Mapping[str, Any]], str] = base_model,
) -> DetectableDifference:
    """What difference of `measure` between two rows of the evolution table could have been detected.

    From features: (z_{1-alpha/2} + z_power) sqrt(2) SE with SE the root mean square of the rows' bootstrap errors.
    From seeds: (t_{1-alpha/2} + t_power) s sqrt(2 / n), s the standard deviation over seeds pooled over the table's
    setups and t of its degrees of freedom. SAE seeds of one LM are averaged before LM seeds are compared: they are no
    independent LMs.
    """
    from scipy import stats  # it takes a second to import

    known = [row for row in rows if row.get(f"{measure}_low") is not None and row.get(f"{measure}_high") is not None]
    by_features = None
    if known:
        error = _standard_errors([row[f"{measure}_low"] for row in known], [row[f"{measure}_high"] for row in known])
        quantiles = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
        by_features = float(quantiles * np.sqrt(2 * np.mean(error**2)))
    for kind in ("lm_seed", "sae_seed"):
        groups = [group for group in _replicates(rows, measure, kind, name_of) if len(group) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        if freedom:
            variance = sum(np.var(group, ddof=1) * (len(group) - 1) for group in groups) / freedom
            n = min(len(group) for group in groups)
            quantiles = stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(power, freedom)
            by_seeds = float(quantiles * np.sqrt(variance * 2 / n))
            return DetectableDifference(by_features, by_seeds, kind, n, freedom)
    return DetectableDifference(by_features, None, None, None, None)


def _replicates(
    rows: Sequence[Mapping[str, Any]], measure: str, kind: str, name_of: Callable[[Mapping[str, Any]], str]
) -> list[list[float]]:
    """Values that differ in the seed `kind` only, group by group; the mean over what else varies below it."""
    groups: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for row in rows:
        if row.get(measure) is not None:
            fixed = () if kind == "lm_seed" else (row.get("lm_seed"),)
            groups.setdefault((*_seed_key(row, name_of), *fixed), {}).setdefault(row.get(kind), []).append(row[measure])
    return [[float(np.mean(values)) for values in group.values()] for group in groups.values()]
