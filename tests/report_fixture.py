"""A made-up study for the report's tests: no measurement stands behind these numbers."""

from __future__ import annotations

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
    }
    return ReportData(**(fields | changes))
