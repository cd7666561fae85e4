"""Evolution rows against brute force; turning step, seeds and detectable differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from glottoscope.features import bootstrap
from glottoscope.features.bootstrap import multinomial_weights, resample_ratios
from glottoscope.features.evolution import (
    base_model,
    boolean_column,
    draws_from_intervals,
    evolution_fields,
    evolution_row,
    measures,
    resample_measures,
    seeds_band,
    smallest_detectable_difference,
    turning_step,
)

LANGUAGES = ("en", "ja")
CLASSES = np.array(["en", "ja", "mixed", "neutral", "unclassified", "dead"])


def feature_table(n: int = 400, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    language = CLASSES[rng.integers(0, 6, n)]
    single = rng.random(n) < 0.1
    h_token = np.where(single, 0.0, rng.random(n) * 3)
    h_semantic = h_token * rng.random(n)
    r = np.where(single, 1.0, 1 - h_semantic / np.where(single, 1, h_token))
    r[language == "dead"] = np.nan
    coherence = np.where(rng.random(n) < 0.3, np.nan, rng.random(n))
    return {
        "language": language, "alive": language != "dead", "single_token": single, "h_token": h_token,
        "h_semantic": h_semantic, "monosemanticity": r, "coherence": coherence, "coherence_token": None,
        "bilingual": (language == "mixed") & (rng.random(n) < 0.5),
        "bilingual_paper": (language == "mixed") & (r > 0.5),
    }  # fmt: skip


def test_row_is_brute_force() -> None:
    table = feature_table()
    row = evolution_row(table, LANGUAGES, n_boot=200, seed=0)
    alive, language = table["alive"], table["language"]
    assert row["alive"] == pytest.approx(alive.mean()) and row["n_alive"] == alive.sum() and row["n_features"] == 400
    for name in ("en", "ja", "mixed", "neutral", "unclassified"):
        assert row[f"share_{name}"] == pytest.approx(np.mean(language[alive] == name))
        assert row[f"count_{name}"] == np.sum(language == name)
    total = sum(float(row[f"share_{name}"] or 0) for name in ("en", "ja", "mixed", "neutral", "unclassified"))
    assert total == pytest.approx(1)
    assert row["share_bilingual"] == pytest.approx(table["bilingual"].sum() / alive.sum())
    assert row["n_bilingual"] == table["bilingual"].sum() and row["count_dead"] == np.sum(~alive)
    r, multi = table["monosemanticity"], alive & ~table["single_token"]
    assert row["monosemanticity"] == pytest.approx(np.nanmean(r[alive]))
    assert row["monosemanticity_multi"] == pytest.approx(np.nanmean(r[multi]))
    pooled = 1 - table["h_semantic"][alive].sum() / table["h_token"][alive].sum()
    assert row["monosemanticity_pooled"] == pytest.approx(pooled)
    assert row["coherence"] == pytest.approx(np.nanmean(table["coherence"][alive]))
    for name in measures(LANGUAGES):
        if row[name] is not None:
            assert float(row[f"{name}_low"] or 0) <= float(row[name] or 0) <= float(row[f"{name}_high"] or 0)


def test_undefined_is_null_and_never_nan() -> None:
    table = feature_table() | {"bilingual": None, "monosemanticity": np.full(400, np.nan)}
    row = evolution_row(table, LANGUAGES, n_boot=50, seed=0)
    for name in ("share_bilingual", "share_supportable", "monosemanticity", "coherence_token"):
        assert row[name] is None and row[f"{name}_low"] is None and row[f"{name}_high"] is None
    assert row["n_bilingual"] is None and row["count_bilingual_paper"] is not None
    dead = {"language": np.array(["dead"] * 5), "alive": np.zeros(5, bool)}
    nothing = evolution_row(dead, LANGUAGES, n_boot=50, seed=0)
    assert nothing["alive"] == nothing["alive_high"] == 0
    assert nothing["share_mixed"] is None and nothing["count_mixed"] == 0
    assert not any(isinstance(x, float) and np.isnan(x) for r in (row, nothing) for x in r.values())
    fields = evolution_fields(LANGUAGES)
    assert sorted(name for name, _ in fields) == sorted(row)
    assert pa.Table.from_pylist([nothing], schema=pa.schema(fields)).num_rows == 1


def test_nullable_flags() -> None:
    assert boolean_column(None) is None and boolean_column([None, None]) is None  # type: ignore[list-item]
    column = boolean_column(pa.array([True, None, False]).to_numpy(zero_copy_only=False))
    assert column is not None and column.tolist() == [True, False, False]


def test_intervals_are_reproducible_and_cover() -> None:
    table = feature_table()
    assert evolution_row(table, LANGUAGES, seed=1) == evolution_row(table, LANGUAGES, seed=1)
    assert evolution_row(table, LANGUAGES, seed=1) != evolution_row(table, LANGUAGES, seed=2)
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        mixed = rng.random(300) < 0.2
        alone = {"language": np.where(mixed, "mixed", "en"), "alive": np.ones(300, bool)}
        row = evolution_row(alone, LANGUAGES, n_boot=300, seed=trial)
        hits += float(row["share_mixed_low"] or 0) <= 0.2 <= float(row["share_mixed_high"] or 0)
    assert 180 <= hits <= 199


def test_bootstrap_error_is_that_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 1))
    result = resample_ratios(x, np.ones_like(x), n_boot=2000, seed=0)
    assert result.value[0] == pytest.approx(x.mean())
    assert result.draws[0].std() == pytest.approx(x.std() / np.sqrt(5000), rel=0.06)
    weights = multinomial_weights(np.random.default_rng(0), 50, 7)
    assert weights.shape == (50, 7) and (weights.sum(axis=1) == 7).all()


def test_bootstrap_weights_count_the_draws_however_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(3).integers(0, 13, size=(40, 13))
    expected = np.stack([np.bincount(row, minlength=13) for row in drawn])
    for at_once in (1, 13 * 7, 10**6):
        monkeypatch.setattr(bootstrap, "_DRAWN_ENTRIES", at_once)
        np.testing.assert_array_equal(multinomial_weights(np.random.default_rng(3), 40, 13), expected)


def test_turning_step_falls_and_rises() -> None:
    shares = [0.45, 0.20, 0.05, 0.15, 0.30]
    tables = []
    for i, share in enumerate(shares):
        mixed = np.arange(800) < share * 800
        table = {"language": np.where(mixed, "mixed", "en"), "alive": np.ones(800, bool)}
        tables.append(resample_measures(table, LANGUAGES, seed=i))
    column = measures(LANGUAGES).index("share_mixed")
    values = [t.value[column] for t in tables]
    draws = np.stack([t.draws[column] for t in tables])
    turning = turning_step([0, 10, 100, 1000, 9000], values, draws)
    assert turning is not None and (turning.step, turning.step_low, turning.step_high) == (100, 100, 100)
    assert turning.fall == pytest.approx(0.40) and turning.fall_low < 0.40 < turning.fall_high
    assert turning.rise == pytest.approx(0.25) and 0.2 < turning.rise_low < 0.25 < turning.rise_high < 0.3
    shuffled = turning_step([1000, 0, 9000, 100, 10], np.array(values)[[3, 0, 4, 2, 1]], draws[[3, 0, 4, 2, 1]])
    assert shuffled == turning


def test_a_flat_curve_has_a_wide_turning_interval() -> None:
    draws = draws_from_intervals([0.2, 0.2, 0.19, 0.2], [0.15] * 4, [0.25] * 4, seed=0)
    turning = turning_step([0, 1, 2, 3], [0.2, 0.2, 0.19, 0.2], draws)
    assert turning is not None and turning.step == 2 and (turning.step_low, turning.step_high) == (0, 3)
    assert turning.rise_low < 0 < turning.rise_high
    assert draws.std(axis=1) == pytest.approx(0.1 / 3.92, rel=0.1)
    gap = turning_step([0, 1, 2, 3], [0.2, np.nan, 0.19, 0.2], np.where(np.arange(4)[:, None] == 1, np.nan, draws))
    assert gap is not None and gap.step == 2
    assert turning_step([0], [0.1], draws[:1]) is None


def evolution(seeds: dict[tuple[int, int], float], d_model: int = 64, step: int = 10) -> list[dict[str, Any]]:
    return [
        {
            "control": "none", "family": "planted", "model": f"d{d_model}-s{lm}", "d_model": d_model, "n_params": 1000,
            "step": step, "tokens_seen": step * 1024, "layer": 2, "lm_seed": lm, "sae_seed": sae, "share_mixed": value,
            "share_mixed_low": value - 0.049, "share_mixed_high": value + 0.049, "fvu": 0.5, "share_bilingual": None,
            "share_bilingual_low": None, "share_bilingual_high": None,
        }
        for (lm, sae), value in seeds.items()
    ]  # fmt: skip


def test_seeds_band() -> None:
    rows = evolution({(0, 0): 0.1, (1, 0): 0.3, (1, 1): 0.2}) + evolution({(0, 0): 0.6}, step=2)
    bands = seeds_band(rows)
    assert [(b["model"], b["step"], b["n"]) for b in bands] == [("d64", 2, 1), ("d64", 10, 3)]
    band = bands[1]
    assert [band[f"share_mixed_{x}"] for x in ("min", "mean", "max")] == [0.1, pytest.approx(0.2), 0.3]
    assert band["n_lm_seeds"] == 2 and band["n_sae_seeds"] == 2 and band["fvu_mean"] == 0.5
    assert band["share_bilingual_min"] is None and "lm_seed" not in band
    assert seeds_band([]) == []


@pytest.mark.parametrize("name", ["d64", "d64-s3", "d64_seed3", "d64-lm_seed3", "d64.seed-3"])
def test_model_names_without_their_seed(name: str) -> None:
    assert base_model({"model": name, "lm_seed": 3}) == "d64"


def test_model_names_that_only_look_like_a_seed() -> None:
    assert base_model({"model": "tiny-s30", "lm_seed": 0}) == "tiny-s30"
    assert base_model({"model": "tiny-s3", "lm_seed": 1}) == "tiny-s3"


def test_smallest_detectable_difference() -> None:
    single = smallest_detectable_difference(evolution({(0, 0): 0.1}), "share_mixed")
    assert single.seeds is None and single.seed_kind is None
    error = 0.098 / (2 * stats.norm.ppf(0.975))
    assert single.features == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * np.sqrt(2) * error)
    rows = evolution({(0, 0): 0.1, (1, 0): 0.3}) + evolution({(0, 0): 0.2, (1, 0): 0.2}, step=20)
    pooled = np.sqrt((0.02 + 0.0) / 2)
    quantiles = stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)
    result = smallest_detectable_difference(rows, "share_mixed")
    assert result.seeds == pytest.approx(quantiles * pooled)
    assert (result.seed_kind, result.n_seeds, result.freedom) == ("lm_seed", 2, 2)
    # SAE seeds of one LM are no LM seeds: they are averaged first, and used alone only where the LM seed never varies.
    four = evolution({(0, 0): 0.1, (0, 1): 0.1, (1, 0): 0.2, (1, 1): 0.4})
    nested = smallest_detectable_difference(four, "share_mixed")
    assert nested.seed_kind == "lm_seed" and nested.freedom == 1
    sae = smallest_detectable_difference(evolution({(0, 0): 0.1, (0, 1): 0.2}), "share_mixed")
    assert (sae.seed_kind, sae.freedom) == ("sae_seed", 1)
    assert smallest_detectable_difference(rows, "share_bilingual").features is None


def test_the_detectable_difference_is_detected_in_four_of_five() -> None:
    rng = np.random.default_rng(0)
    error = 0.02
    rows = evolution({(0, 0): 0.2})
    rows[0] |= {"share_mixed_low": 0.2 - 1.96 * error, "share_mixed_high": 0.2 + 1.96 * error}
    difference = smallest_detectable_difference(rows, "share_mixed").features
    assert difference is not None
    z = (difference + error * rng.standard_normal(20_000) - error * rng.standard_normal(20_000)) / (error * np.sqrt(2))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.01)
