"""Stage "score": from collected activations to the feature table, the evolution table and their sweeps; no language model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from glottoscope.atomic import write_json, write_table
from glottoscope.features import v1
from glottoscope.features.bilingual import is_bilingual, supportable
from glottoscope.features.clustering import (
    Clustering,
    cluster_at,
    cosine_thresholds,
    row_labels,
)
from glottoscope.features.coherence import coherence
from glottoscope.features.collect import Groups, TokenHistogram, group_counts, tokens_of
from glottoscope.features.evolution import evolution_row
from glottoscope.features.granularity import join_labels, read_labels
from glottoscope.features.language import classify
from glottoscope.features.monosemanticity import Monosemanticity, monosemanticity
from glottoscope.features.truth import auc, planted_truth
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import Context, key_columns, with_key
from glottoscope.study.stages.rulers import Ruler, load_ruler
from glottoscope.study.stages.tokenizing import read_json
from glottoscope.study.store import read_parquet

PHI_SWEEP = (0.2, 0.3, 0.4, 0.5, 0.6)
R_SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7)
LANGUAGE_SWEEP = (0.8, 0.85, 0.9, 0.95)
THETA_SWEEP = (95.0, 97.5, 99.0, 99.5)  # percentiles of the cosine of pairs of tokens

QUALITY = ("fvu", "cosine", "l0")


FILES = ("features.parquet", "row.json")


def missing_setups(context: Context, cell: Cell) -> list[tuple[int, int]]:
    store = context.store
    return [
        (layer, seed)
        for layer, seed in context.setups(cell)
        if not store.is_done(
            store.setup_dir(cell.model.name, cell.checkpoint.step, layer, seed), "score",
            context.score_key(cell, layer, seed),
        )
    ]  # fmt: skip


def score_layer(root: str, model: str, layer: int, cells: tuple[tuple[int, int], ...], report: Any) -> None:
    """Feature table and evolution row of all (step, SAE seed) of one layer of a model: they share their rulers."""
    context = Context.open(root)
    run = context.run_of(model)
    ruler_run = context.ruler_run(run)
    embeddings = load_ruler(context, ruler_run, "embeddings")
    hidden = load_ruler(context, ruler_run, f"hidden_layer_{layer:02d}")
    for n, (step, seed) in enumerate(cells):
        report(n, len(cells), f"step {step}")
        cell = context.cell_of(model, step)
        folder = context.store.setup_dir(model, step, layer, seed)
        scored = _score(context, cell, layer, seed, folder, embeddings, hidden)
        key = key_columns(context, cell, layer, seed)
        table = with_key(scored.table, key)
        for path in context.study.features.labels:
            table, _ = _labelled(table, path)
        context.store.begin(folder, "score")
        write_table(folder / "features.parquet", table)
        write_json(folder / "row.json", {**key, **scored.row})
        context.store.mark_done(folder, "score", context.score_key(cell, layer, seed), {}, list(FILES))


class Scored(NamedTuple):
    """Feature table (without key columns) and evolution row of one setup, with its sweeps and truth."""

    table: pa.Table
    row: dict[str, Any]


def _score(context: Context, cell: Cell, layer: int, seed: int, folder: Path, embeddings: Ruler, hidden: Ruler) -> Scored:
    features, languages = context.study.features, context.token_info.languages
    collected, quality = read_parquet(folder / "collected.parquet"), read_json(folder / "quality.json")
    columns: dict[str, Any] = {name: collected[name].to_numpy(zero_copy_only=False) for name in collected.column_names}
    n = collected.num_rows
    alive, exposure = columns["alive"].astype(bool), np.asarray(quality["exposure"])

    def classes(share: float, suffix: str = "") -> Any:
        n_lang = np.stack([columns[f"n_{x}{suffix}"] for x in languages], axis=1)
        n_neutral = columns[f"n_neutral{suffix}"]
        return classify(n_lang, n_neutral, exposure, alive, languages, min_count=features.min_count, share=share)

    found = classes(features.language_share)
    language = found.language
    if features.rule == "v1":
        language = v1.v1_classify(np.stack([columns["n_en"], columns["n_ja"]], axis=1), alive)

    h = read_parquet(folder / "histogram.parquet")
    histogram = TokenHistogram(*(h[c].to_numpy().astype(np.int64) for c in ("feature", "token", "language", "count")))
    tokens = tokens_of(histogram)
    labels, unclustered = row_labels(embeddings.clustering, tokens, n)
    mono = monosemanticity(tokens, labels, n)
    hidden_labels, _ = row_labels(hidden.clustering, tokens, n)
    mono_hidden = monosemanticity(tokens, hidden_labels, n)
    clusters = coherence(group_counts(tokens.feature, hidden_labels, tokens.count), n, draws=features.coherence_draws)
    words = coherence(tokens, n, draws=features.coherence_draws)

    phi, phi_null = (columns.get(name) for name in ("phi", "phi_null"))
    flag, support = None, None
    if phi is not None and phi_null is not None:
        pairs = columns["n_pairs_a"], columns["n_pairs_b"]
        flag = is_bilingual(language, phi, phi_null, *pairs, threshold=features.phi_threshold,
                            min_firings=features.min_firings)  # fmt: skip
        support = supportable(*pairs, features.min_firings)
    paper = (language == "mixed") & ~mono.single_token & (mono.r >= features.paper_threshold)
    table = pa.table({
        "feature": collected["feature"], "alive": alive, "density": columns["density"],
        "max_activation": columns["max_activation"], "n_positions": columns["n_positions"],
        **{f"n_{x}": columns[f"n_{x}"] for x in languages}, "n_neutral": columns["n_neutral"],
        "language": language.tolist(), "share": _nullable(found.share), "share_low": _nullable(found.share_low),
        "share_high": _nullable(found.share_high), "h_token": _nullable(mono.h_token),
        "h_semantic": _nullable(mono.h_semantic), "monosemanticity": _nullable(mono.r),
        "monosemanticity_hidden": _nullable(mono_hidden.r), "unclustered": _nullable(unclustered),
        "coherence": _nullable(clusters.value), "coherence_token": _nullable(words.value),
        "coherence_short": words.short, "single_token": mono.single_token,
        "phi": _nullable(phi, n), "phi_null": _nullable(phi_null, n),
        "n_pairs_a": _integers(columns.get("n_pairs_a"), n), "n_pairs_b": _integers(columns.get("n_pairs_b"), n),
        "supportable": pa.array(support if support is not None else [None] * n, pa.bool_()),
        "bilingual": pa.array(flag if flag is not None else [None] * n, pa.bool_()),
        "bilingual_paper": paper, "granularity": pa.array([None] * n, pa.int8()),
    })  # fmt: skip
    # Intervals hold for one SAE's features; the draws are the same for every setup, so that setups compare.
    row: dict[str, Any] = dict(evolution_row(
        {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}, languages,
        n_boot=features.bootstrap, seed=seed_for(context.study, "bootstrap") % 2**32,
    ))  # fmt: skip
    row |= _facts(context, cell, layer, seed, quality, folder)
    row |= _floors(tokens, n, alive, embeddings, hidden, features.coherence_draws)
    row["theta"] = embeddings.clustering.theta
    row["theta_hidden"] = hidden.clustering.theta
    row |= _pair_controls(columns, language, features)
    truth = context.vocabulary.concept
    if truth is not None:
        row |= _truth(histogram, truth, n, alive, exposure, context, phi, phi_null, flag, language)
    row["sweeps"] = _sweeps(context, columns, classes, language, mono, tokens, n, alive, embeddings)
    return Scored(table, row)


def _nullable(values: NDArray[Any] | None, n: int = 0) -> pa.Array:
    """Floats with NaN as null; all null where there are none."""
    if values is None:
        return pa.nulls(n, pa.float64())
    return pa.array(np.asarray(values, np.float64), from_pandas=True)


def _integers(values: NDArray[Any] | None, n: int) -> pa.Array:
    return pa.nulls(n, pa.int64()) if values is None else pa.array(values.astype(np.int64))


def _mean(values: NDArray[Any], chosen: NDArray[np.bool_]) -> float | None:
    kept = np.asarray(values, np.float64)[chosen]
    kept = kept[np.isfinite(kept)]
    return float(kept.mean()) if len(kept) else None


def _facts(context: Context, cell: Cell, layer: int, seed: int, quality: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the evolution row says of the SAE and the language model."""
    store, languages = context.store, context.token_info.languages
    facts = {name: quality.get(name) for name in (*QUALITY, *(f"fvu_{x}" for x in languages))}
    facts |= {name: quality.get(name) for name in ("alignment", "alignment_low", "alignment_high", "alignment_truth")}
    record = read_json(store.cell_dir(cell.model.name, cell.checkpoint.step) / "cell.json")
    facts |= {f"lm_loss_{x}": record.get(f"lm_loss_{x}") for x in languages}
    facts["lm_learning_rate"] = lm_learning_rate(context, cell)
    facts["sae_learning_rate"] = float(read_json(folder / "cfg.json")["lr"])
    return facts


def lm_learning_rate(context: Context, cell: Cell) -> float | None:
    """The language model's learning rate at a checkpoint, where it is known."""
    if cell.checkpoint.path is not None:
        return cell.checkpoint.learning_rate
    record = context.store.done(context.store.checkpoint_dir(cell.model.lm, cell.checkpoint.step)).get("pretrain", {})
    return record.get("settings", {}).get("learning_rate")


def _floors(tokens: Groups, n: int, alive: NDArray[np.bool_], embeddings: Ruler, hidden: Ruler, draws: int) -> dict[str, Any]:
    """What R and coherence are without meaning: cluster labels shuffled within classes of frequency, random vectors."""
    floors: dict[str, Any] = {}
    assert embeddings.random is not None
    for name, clustering in (("shuffled", embeddings.shuffled), ("random", embeddings.random)):
        labels, _ = row_labels(clustering, tokens, n)
        floors[f"monosemanticity_floor_{name}"] = _mean(monosemanticity(tokens, labels, n).r, alive)
    labels, _ = row_labels(hidden.shuffled, tokens, n)
    groups = group_counts(tokens.feature, labels, tokens.count)
    floors["monosemanticity_hidden_floor_shuffled"] = _mean(monosemanticity(tokens, labels, n).r, alive)
    floors["coherence_floor_shuffled"] = _mean(coherence(groups, n, draws=draws).value, alive)
    return floors


def _pair_controls(columns: dict[str, Any], language: NDArray[Any], features: Any) -> dict[str, Any]:
    """How many features would pass as bilingual with the wrong sentences: shuffled ones, and the next ones."""
    if "phi" not in columns:
        return {"n_bilingual_shuffled": None, "n_bilingual_next": None}
    pairs = columns["n_pairs_a"], columns["n_pairs_b"]
    return {
        f"n_bilingual_{name}": int(
            is_bilingual(language, columns[f"phi_{name}"], columns["phi_null"], *pairs,
                         threshold=features.phi_threshold, min_firings=features.min_firings).sum()
        )
        for name in ("shuffled", "next")
    }  # fmt: skip


def _truth(
    histogram: TokenHistogram, concept: NDArray[np.int32], n: int, alive: NDArray[np.bool_], exposure: NDArray[Any],
    context: Context, phi: Any, phi_null: Any, flag: Any, language: NDArray[Any],
) -> dict[str, Any]:  # fmt: skip
    """Agreement with the planted truth, over alive features."""
    truth = planted_truth(
        histogram.feature, histogram.token, histogram.language, histogram.count, concept, n_features=n,
        exposure=exposure, neutral=context.neutral(),
    )  # fmt: skip
    bilingual = np.asarray(truth.bilingual)[alive]
    record: dict[str, Any] = {"truth_n_bilingual": int(bilingual.sum()), "truth_n_alive": int(alive.sum())}
    if phi is not None and flag is not None:
        record["truth_auc_phi"] = auc((phi - phi_null)[alive], bilingual)
        record["truth_auc_flag"] = auc(flag[alive], bilingual)
        record["truth_auc_mixed"] = auc((language == "mixed")[alive], bilingual)
    return record


def _sweeps(
    context: Context, columns: dict[str, Any], classes: Any, language: NDArray[Any], mono: Monosemanticity,
    tokens: Groups, n: int, alive: NDArray[np.bool_], embeddings: Ruler,
) -> list[list[Any]]:  # fmt: skip
    """What other thresholds would have given: rows of (sweep, value, measure, result)."""
    features = context.study.features
    total = max(1, int(alive.sum()))
    rows: list[list[Any]] = []
    if "phi_dev" in columns:
        # Thresholds are judged on dev, collected at the final checkpoint only: test stays untouched.
        pairs = columns["n_pairs_a_dev"], columns["n_pairs_b_dev"]
        for value in PHI_SWEEP:
            flag = is_bilingual(
                language, columns["phi_dev"], columns["phi_null_dev"], *pairs, threshold=value, min_firings=features.min_firings
            )
            rows.append(["phi", value, "share_bilingual", int(flag.sum()) / total])
    for value in R_SWEEP:
        paper = (language == "mixed") & ~mono.single_token & (mono.r >= value)
        rows.append(["monosemanticity", value, "share_bilingual_paper", int((paper & alive).sum()) / total])
    if features.rule == "document":
        for suffix in ("", *(x.removeprefix("n_neutral") for x in columns if x.startswith("n_neutral_at_"))):
            value = features.threshold if not suffix else int(suffix.removeprefix("_at_")) / 100
            mixed = classes(features.language_share, suffix).language == "mixed"
            rows.append(["threshold", value, "share_mixed", int(mixed.sum()) / total])
    if features.rule != "v1":
        for value in LANGUAGE_SWEEP:
            rows.append(["language_share", value, "share_mixed", int((classes(value).language == "mixed").sum()) / total])
    if embeddings.clustering.labels is not None:
        for percentile, clustering in zip(THETA_SWEEP, _theta_sweep(context, embeddings), strict=True):
            r = monosemanticity(tokens, row_labels(clustering, tokens, n)[0], n).r
            rows.append(["theta", percentile, "monosemanticity", _mean(r, alive)])
    return rows


def _theta_sweep(context: Context, ruler: Ruler) -> list[Clustering]:
    """The clusters cut at the percentiles of THETA_SWEEP; kept, since every setup asks for them."""
    cache: dict[int, list[Clustering]] = context.__dict__.setdefault("_theta_sweep", {})
    key = id(ruler.clustering)
    if key not in cache:
        unit, seed = ruler.clustering.vectors, seed_for(context.study, "theta-sweep")
        cache[key] = cluster_at(unit, ruler.weights, cosine_thresholds(unit, ruler.weights, THETA_SWEEP, seed=seed))
    return cache[key]


def _labelled(table: pa.Table, path: str) -> tuple[pa.Table, int]:
    """Join human granularity labels; files that say nothing of this setup leave it as it is."""
    from glottoscope.errors import InputError

    labels = read_labels(path)
    try:
        return join_labels(table, labels)
    except InputError as error:
        if "match" in str(error):
            return table, labels.num_rows
        raise
