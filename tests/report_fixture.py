"""A made-up study for the report's tests: no measurement stands behind these numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from glottoscope.report.data import PatternExample, ReportData

STEPS = (0, 10, 30, 100, 200, 300, 600, 1000, 1500)
MIXED = (0.31, 0.14, 0.05, 0.08, 0.11, 0.16, 0.21, 0.25, 0.28)
BILINGUAL = (0.01, 0.0, 0.0, 0.03, 0.07, 0.12, 0.14, 0.19, 0.25)
N = 192


def evolution_rows(
    model: str,
    control: str,
    *,
    n_params: int = 1_200_000,
    steps: tuple[int, ...] = STEPS,
    layers: tuple[int, ...] = (0, 1, 2, 3, 4),
    languages: tuple[str, ...] = ("en", "ja"),
    lm_seed: int = 0,
    sae_seed: int = 0,
    scale: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of the evolution table with every column of the contract."""
    rng = np.random.default_rng([seed, lm_seed, sae_seed])
    rows = []
    for step in steps:
        at = STEPS.index(step) if step in STEPS else len(STEPS) - 1
        for layer in layers:
            depth = max(0.0, 1 - abs(layer - 2) / 3.2)
            n_alive = int(N * (0.95 - 0.5 * (0 < at < 4)))
            mixed = float(np.clip(MIXED[at] * (1 if control == "none" else 0.55) + rng.normal(0, 0.008), 0.01, 0.6))
            bilingual = BILINGUAL[at] * depth * scale if control == "none" else 0.0
            n_mixed, n_bilingual = round(mixed * n_alive), round(bilingual * n_alive)
            row: dict[str, Any] = {
                "control": control,
                "family": "toy",
                "model": model,
                "d_model": 128,
                "n_params": n_params,
                "step": step,
                "tokens_seen": step * 1024,
                "layer": layer,
                "lm_seed": lm_seed,
                "sae_seed": sae_seed,
                "n_features": N,
                "n_alive": n_alive,
                "count_mixed": n_mixed,
                "n_bilingual": n_bilingual,
                "n_supportable": int(0.8 * n_alive),
                "count_dead": N - n_alive,
                "count_neutral": 3,
                "count_unclassified": 9,
                "fvu": 0.5 - 0.2 * mixed,
                "cosine": 0.8,
                "l0": 3.9,
                "lm_learning_rate": 0.003 * min(1.0, (step + 1) / 31),
                "sae_learning_rate": 1e-3,
                "monosemanticity_floor_shuffled": 0.21,
                "monosemanticity_floor_random": 0.19,
                "coherence_floor_shuffled": 0.12,
            }
            measures = {
                "share_mixed": n_mixed / n_alive,
                "share_bilingual": n_bilingual / n_alive,
                "share_bilingual_paper": 0.8 * n_mixed / n_alive,
                "share_neutral": 3 / n_alive,
                "share_unclassified": 9 / n_alive,
                "alive": n_alive / N,
                "monosemanticity": 0.42 + 0.045 * at,
                "monosemanticity_multi": 0.4 + 0.04 * at,
                "monosemanticity_pooled": 0.38 + 0.04 * at,
                "monosemanticity_hidden": 0.45 + 0.042 * at,
                "coherence": 0.3 + 0.05 * at,
                "coherence_token": 0.25 + 0.05 * at,
                "alignment": 0.08 * at * depth if control == "none" else 0.0,
            }
            rest = 1 - measures["share_mixed"] - 12 / n_alive
            for i, code in enumerate(languages):
                weight = 1 / len(languages) + 0.08 * (i == 0) - 0.08 * (i == 1)
                measures[f"share_{code}"] = rest * weight
                row[f"count_{code}"] = round(rest * weight * n_alive)
                row[f"lm_loss_{code}"] = 6.1 * np.exp(-0.28 * at) + 1.2 + 0.1 * i
                row[f"fvu_{code}"] = row["fvu"] + 0.01 * i
            for name, value in measures.items():
                half = 1.96 * np.sqrt(max(value * (1 - value), 0) / n_alive)
                row |= {name: value, f"{name}_low": max(value - half, 0.0), f"{name}_high": min(value + half, 1.0)}
            rows.append(row)
    return rows


@dataclass(frozen=True)
class PartEffect:
    """A made-up effect of one part at the chosen alpha: change of pooled log perplexity, and its controls."""

    change: float | None  # None: no value, with the note
    half: float = 0.004  # half width of every interval
    draws: tuple[float, float] | None = (0.0, 0.004)  # mean and spread of the random draws' changes; None: no draws
    outside: tuple[float, float] | None = (0.0, 0.004)  # of the draws from outside the class
    own: float | None = 0.0  # self-injection
    shuffled: float | None = 0.03
    translation: float = 0.0  # change of chrF
    lean: float = 0.0  # > 0: more on the first language, less on the second
    note: str | None = None  # why the value, or a pool of draws, is missing, in the stage's words


PARTS = {
    "en": PartEffect(-0.02, lean=0.8, draws=(-0.012, 0.006)),
    "ja": PartEffect(-0.015, lean=-0.9, draws=(-0.011, 0.006), shuffled=0.01),
    "mixed": PartEffect(-0.05, draws=(-0.015, 0.006), outside=(-0.01, 0.005), translation=1.9),
    "bilingual": PartEffect(-0.03, own=None, outside=(-0.004, 0.004), translation=0.6),
    "bilingual_paper": PartEffect(0.009, draws=(0.0, 0.003), translation=-1.6),
    "all": PartEffect(-0.08, draws=None, outside=None),
}
EMPTY = PartEffect(None, draws=None, outside=None, own=None, shuffled=None, note="empty class")
POOL_NOTE = "random_other: pool too small"
CEILINGS = {"identity": 0.0, "reconstruction": -0.5, "state": -0.2, "state_replaced": -1.0}
NLL = {"en": 3.4, "ja": 3.9, "all": 3.65}
GAP = 1.3  # nats between base and donor
ALPHAS = (0.1, 0.2, 0.4, 0.8, 1.0)


def intervention_rows(
    parts: dict[str, PartEffect],
    *,
    model: str = "toy-128",
    control: str = "none",
    base_step: int = 300,
    donor_step: int = 1500,
    layers: str = "2",
    sae_seed: int = 0,
    mode: str = "add",
    scale: str = "matched",
    alphas: tuple[float, ...] = ALPHAS,
    chosen: float = 0.4,
    dev: bool = True,
    texts: tuple[str, ...] = ("documents", "sentences"),
    translation: tuple[str, ...] = ("chrf", "bleu", "exact", "recall"),
    n_random: int = 32,
    strength: float = 1.0,
) -> list[dict[str, Any]]:
    """Rows of the intervention table for one setting, with every column of the contract."""
    rng = np.random.default_rng([base_step, len(layers), n_random])
    setting = {
        **{"experiment": "study", "control": control, "family": "toy", "model": model, "d_model": 128, "n_params": 1_200_000},
        **{"lm_seed": 0, "sae_seed": sae_seed, "layer": int(layers.split("+")[0]), "layers": layers},
        **{
            "base_step": base_step,
            "donor_model": model,
            "donor_step": donor_step,
            "base_tokens": base_step * 1024,
            "donor_tokens": donor_step * 1024,
        },
    }
    undefined = "part draw mode scale alpha value change change_low change_high gap_closed gap_closed_low gap_closed_high "
    undefined += "added_norm change_per_norm mass n_features rank n_random rank_other n_random_other note"
    empty = dict.fromkeys(undefined.split())
    way = {"mode": mode, "scale": scale}

    def lean(effect: PartEffect, language: str) -> float:
        return {"all": 1.0, "en": 1 + effect.lean, "ja": 1 - effect.lean}[language]

    def measures(text: str, language: str, change: float, half: float, norm: float | None) -> Iterator[dict[str, Any]]:
        """nll and ppl of one condition."""
        start = NLL[language] + 0.3 * (text == "sentences")
        for metric, f in (("nll", float), ("ppl", math.exp)):
            values = [f(start + c) - f(start) for c in (change, change - half, change + half)]
            span, n_units = f(start - GAP) - f(start), {"documents": 240, "sentences": 90, "dev_documents": 60}[text]
            row = {**setting, **empty, **way, "text": text, "metric": metric, "language": language, "n_units": n_units}
            row |= dict(zip(("change", "change_low", "change_high"), values, strict=True)) | {"value": f(start) + values[0]}
            row |= {"gap_closed": values[0] / span, "gap_closed_low": values[2] / span, "gap_closed_high": values[1] / span}
            if norm:
                row |= {"added_norm": norm, "change_per_norm": values[0] / norm}
            yield row

    def curve(alpha: float) -> float:
        r = alpha / chosen
        return 2 * r - r * r

    def translated(metric: str, direction: str, change: float, half: float) -> dict[str, Any]:
        size = {"chrf": 1.0, "bleu": 0.5, "exact": 0.004, "recall": 0.01, "comet": 0.3}[metric]
        start = {"chrf": 21.4, "bleu": 4.2, "exact": 0.03, "recall": 0.22, "comet": 56.4}[metric] + size * (direction == "en-ja")
        row = {**setting, **empty, **way, "text": "translation", "metric": metric, "language": direction, "n_units": 80}
        ends = {"change": change, "change_low": change - half, "change_high": change + half}
        row |= {name: size * value for name, value in ends.items()} | {"value": start + size * change}
        return row | {name.replace("change", "gap_closed"): value / 20 for name, value in ends.items()}

    rows: list[dict[str, Any]] = []
    for text in texts:
        for language in NLL:
            for arm, change in {"baseline": 0.0, "donor": -GAP, **CEILINGS}.items():
                alpha = {"alpha": chosen if arm == "state" else None, "chosen": True}
                for row in measures(text, language, change * strength if arm in CEILINGS else change, 0.02, None):
                    if arm in ("baseline", "donor"):
                        row |= {"change_low": row["change"], "change_high": row["change"]}
                    rows.append(row | {"arm": arm} | alpha)
    for index, (part, effect) in enumerate(parts.items()):
        held = {"part": part, "mass": 0.1 + 0.05 * index, "n_features": 20 + 3 * index, "note": effect.note}
        if effect.change is None:  # one row says so
            row = {**setting, **empty, **way, "text": texts[0] if texts else "translation", "metric": "nll", "language": "all"}
            rows.append(row | held | {"arm": "part", "chosen": True, "mass": None, "n_features": 0})
            continue
        for text in (*texts, *(("dev_documents",) if dev and part == "all" else ())):
            for language in NLL:
                for alpha in alphas:
                    at = {**held, "alpha": alpha, "chosen": alpha == chosen}
                    change = effect.change * strength * lean(effect, language) * curve(alpha)
                    best = alpha == chosen and text != "dev_documents"
                    ranks: dict[str, Any] = {}
                    pools = (
                        ("random", effect.draws, "rank", "n_random"),
                        ("random_other", effect.outside, "rank_other", "n_random_other"),
                    )
                    for arm, spread, rank, n in pools:
                        if not best or spread is None:
                            continue
                        draws = strength * lean(effect, language) * rng.normal(*spread, n_random)
                        for draw, value in enumerate(draws):
                            made = measures(text, language, float(value), effect.half, None)
                            rows += [row | at | {"arm": arm, "draw": draw} for row in made]
                        ranks |= {rank: 1 + int((draws < change).sum()), n: n_random}
                    rows += [row | at | ranks | {"arm": "part"} for row in measures(text, language, change, effect.half, alpha / 8)]
                    for arm, value in (("self", effect.own), ("shuffled", effect.shuffled)):
                        if best and value is not None:
                            made = measures(text, language, value * strength, effect.half, alpha / 9)
                            rows += [row | at | {"arm": arm} for row in made]
    for metric in translation:
        for direction in ("en-ja", "ja-en"):
            rows.append(translated(metric, direction, 0.0, 0.0) | {"arm": "baseline", "chosen": True})
            rows.append(translated(metric, direction, 20.0, 2.0) | {"arm": "donor", "chosen": True})
            for part, effect in parts.items():
                if effect.change is None:
                    continue
                at = {"part": part, "alpha": chosen, "chosen": True, "n_features": 20, "note": effect.note}
                change = effect.translation * (1.2 if direction == "en-ja" else 0.8)
                row = translated(metric, direction, change, 1.1) | at | {"arm": "part"}
                if effect.draws is not None:
                    draws = rng.normal(0.2, 0.4, n_random)
                    row |= {"rank": 1 + int((draws > change).sum()), "n_random": n_random}
                    rows += [translated(metric, direction, d, 1.1) | at | {"arm": "random", "draw": i} for i, d in enumerate(draws)]
                rows.append(row)
    return rows


def intervention_table(*parts: list[dict[str, Any]]) -> pa.Table:
    """The rows as a table whose all-null columns keep a type, as the stage writes it."""
    rows = [row for part in parts for row in part]
    texts = (
        "experiment",
        "donor_model",
        "control",
        "family",
        "model",
        "layers",
        "text",
        "arm",
        "part",
        "mode",
        "scale",
        "metric",
        "language",
        "note",
    )
    whole = ("d_model", "n_params", "lm_seed", "sae_seed", "layer", "base_step", "donor_step", "base_tokens", "donor_tokens")
    whole += ("draw", "n_features", "n_units", "rank", "n_random", "rank_other", "n_random_other")
    types = dict.fromkeys(texts, pa.string()) | dict.fromkeys(whole, pa.int64()) | {"chosen": pa.bool_()}
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, types.get(name, pa.float64())) for name in rows[0]]))


def patterns() -> list[PatternExample]:
    """An early noise feature, a middle monolingual one, a late bilingual one; hostile text among them."""
    english = [("the ", 0.0), ("old ", 0.1), ("river ", 0.97), ("was ", 0.3), ("cold", 0.05)]
    japanese = [("その", 0.02), ("古い", 0.12), ("川", 0.93), ("は", 0.2), ("冷たかった", 0.06)]
    hostile = [
        ("<script>alert(1)</script>", 0.9),
        ("\u202eevil\x00", 0.8),
        ("$x^2$ & \ud800", 0.4),
        ("\U0001f600", 0.2),
    ]
    long = [(f"word{i} ", 0.01) for i in range(60)] + [("peak ", 1.0)] + [(f"after{i} ", 0.02) for i in range(60)]
    return [
        PatternExample("toy-128", 0, 2, "early", 13, "mixed", False, 0.02, [("en", english), ("ja", japanese), ("en", hostile)]),
        PatternExample("toy-128", 300, 2, "middle", 44, "en", None, None, [("en", english), ("en", long)]),
        PatternExample("toy-128", 1500, 2, "last", 7, "mixed", True, 0.71, [("en", english), ("ja", japanese)] * 2),
    ]


def report_data(**changes: Any) -> ReportData:
    """Two models, 9 steps, 5 layers, the negative control, two extra SAE seeds; `changes` replace fields."""
    rows = evolution_rows("toy-128", "none") + evolution_rows("toy-64", "none", n_params=400_000, scale=0.7, seed=1)
    rows += evolution_rows("toy-128", "none", sae_seed=1, layers=(2,))
    rows += evolution_rows("toy-128-negative", "negative", seed=2)
    rows += evolution_rows("toy-128", "frozen_decoder", steps=(1500,), layers=(2,), seed=3)
    rows += evolution_rows("toy-128-shuffled", "shuffled", steps=(1500,), layers=(2,), seed=4)
    key = ("control", "family", "model", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed", "sae_seed")
    main = [row for row in rows if row["layer"] == 2 and row["control"] in ("none", "negative") and row["sae_seed"] == 0]
    sweeps = [
        {
            **{k: row[k] for k in key},
            "sweep": kind,
            "value": value,
            "measure": measure,
            "result": row[measure] * 1.2 * (1 - value),
        }
        for row in main
        if row["step"] == 1500
        for kind, measure in (
            ("phi", "share_bilingual"),
            ("threshold", "share_mixed"),
            ("threshold", "share_bilingual"),
            ("theta", "monosemanticity"),
        )
        for value in (0.1, 0.3, 0.5, 0.7)
    ]
    truth = [
        {
            **{k: row[k] for k in key},
            "auc_phi": 0.9,
            "auc_flag": 0.88,
            "n_truth_bilingual": 30,
            "n_alive": row["n_alive"],
        }
        for row in main
    ]
    features = [
        {
            **{k: main[8][k] for k in key},
            "feature": i,
            "language": ("en", "ja", "mixed", "dead")[i % 4],
            "phi": None if i % 4 == 3 else 0.1 * (i % 10),
            "bilingual": i % 8 == 2,
        }
        for i in range(N)
    ]
    log = [
        {
            "model": m,
            "step": s,
            "tokens_seen": s * 1024,
            "loss": 7 * 0.999**s,
            "lr": 0.003 * min(1, (s + 1) / 31),
            "loss_en": None,
            "loss_ja": None,
        }
        for m in ("toy-128", "toy-64")
        for s in range(0, 1501, 10)
    ]
    fields: dict[str, Any] = {
        "name": "planted <demo>",
        "evolution": pa.Table.from_pylist(rows),
        "features": pa.Table.from_pylist(features),
        "sweeps": pa.Table.from_pylist(sweeps),
        "truth": pa.Table.from_pylist(truth),
        "pretrain_log": pa.Table.from_pylist(log),
        "languages": ["en", "ja"],
        "language_names": {"en": "English", "ja": "Japanese"},
        "k": 4,
        "patterns": patterns(),
        "settings": {"sae": {"n": N, "k": 4, "lr": 1e-3}, "models": [{"name": "toy-128", "d": 128}]},
        "manifest": {"versions": {"torch": "2.x", "numpy": "2.x"}, "threads": 1, "seeds": [0]},
        "notes": ["The planted world is a toy: nothing here is evidence about real models."],
        "choices": [("activation threshold on", "after TopK", "not known to us")],
        "detectable": {"share_mixed": 0.09, "how": "two SAEs with 180 alive features, 80 % power"},
        "turning": [
            {
                "model": "toy-128",
                "layer": 2,
                "step": 30,
                "low": 30,
                "high": 100,
                "fall": 0.26,
                "fall_low": 0.17,
                "fall_high": 0.34,
                "rise": 0.23,
                "rise_low": 0.15,
                "rise_high": 0.31,
            }
        ],
        "licences": [("planted world", "made by glottoscope", "none")],
        "intervention": intervention_table(
            intervention_rows(PARTS | {"bilingual": EMPTY}), intervention_rows(PARTS, base_step=600, strength=0.6)
        ),
    }
    return ReportData(**(fields | changes))
