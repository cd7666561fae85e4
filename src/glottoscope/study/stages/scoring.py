"""Stage "score": from collected activations to the feature table, the evolution table and their sweeps; no language model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glottoscope.atomic import atomic_path, write_json, write_table
from glottoscope.features import v1
from glottoscope.features.bilingual import is_bilingual, supportable
from glottoscope.features.clustering import (
    Clustering,
    centre_by_language,
    cluster_tokens,
    cosine_threshold,
    random_floor,
    row_labels,
    shuffled_floor,
    unit_rows,
)
from glottoscope.features.coherence import coherence
from glottoscope.features.collect import Groups, TokenHistogram, group_counts, tokens_of
from glottoscope.features.evolution import evolution_fields, evolution_row, seeds_band
from glottoscope.features.granularity import join_labels, read_labels
from glottoscope.features.language import classify, token_language
from glottoscope.features.monosemanticity import Monosemanticity, monosemanticity
from glottoscope.features.truth import auc, planted_truth
from glottoscope.study.plan import Cell, ModelRun, seed_for
from glottoscope.study.stages.context import KEY_COLUMNS, Context, key_columns, with_key
from glottoscope.study.stages.tokenizing import read_json
from glottoscope.study.store import digest, read_parquet

PHI_SWEEP = (0.2, 0.3, 0.4, 0.5, 0.6)
R_SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7)
LANGUAGE_SWEEP = (0.8, 0.85, 0.9, 0.95)
THETA_SWEEP = (95.0, 97.5, 99.0, 99.5)  # percentiles of the cosine of pairs of tokens
CENTRED_STRATA = 10  # of frequency, for the matched null of R

QUALITY = ("fvu", "cosine", "l0")


# ---- rulers: the token spaces in which monosemanticity is measured


class Ruler(NamedTuple):
    """A token space, its clusters and its floors."""

    clustering: Clustering
    shuffled: Clustering
    random: Clustering
    weights: NDArray[np.int64]


def ruler_names(run: ModelRun) -> list[str]:
    """Token spaces of a model: the input embeddings and one per studied layer."""
    return ["embeddings", *(f"hidden_layer_{x:02d}" for x in run.known_layers())]


def missing_rulers(context: Context, run: ModelRun) -> list[str]:
    store = context.store
    key = context.rulers_key(run)
    return [n for n in ruler_names(run) if not store.is_done(store.ruler_dir(run.name), f"clusters_{n}", key)]


def make_rulers(root: str, model: str, names: tuple[str, ...], report: Any) -> None:
    """Cluster the tokens of some of a model's spaces."""
    context = Context.open(root)
    run = context.run_of(model)
    folder, key = context.store.ruler_dir(model), context.rulers_key(run)
    for n, name in enumerate(names):
        report(n, len(names), name)
        vectors, weights = _vectors(context, folder, name)
        features, seed = context.study.features, seed_for(context.study, "ruler", name)
        theta = features.theta
        if theta is None:
            theta = cosine_threshold(unit_rows(vectors), weights, seed=seed, percentile=features.theta_percentile)
        clustering = cluster_tokens(vectors, weights, seed=seed, theta=theta, max_tokens=features.cluster_tokens)
        tensors = {"theta": np.array([clustering.theta])}
        if clustering.labels is not None:
            tensors["labels"] = clustering.labels
        with atomic_path(folder / f"clusters_{name}.safetensors") as temporary:
            import torch

            save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, temporary)
        facts = {
            "theta": float(clustering.theta),
            "n_clusters": clustering.n_clusters,
            "tokens": int((weights > 0).sum()),
        }
        context.store.mark_done(folder, f"clusters_{name}", key, facts, [f"clusters_{name}.safetensors"])


def _vectors(context: Context, folder: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Token vectors [V, D] of a space, hidden states with each language centred, and how often each token occurs."""
    tensors = load_file(folder / f"{name}.safetensors")
    vectors, weights = tensors["vectors"].numpy(), tensors["counts"].numpy().copy()
    weights[list(context.token_info.special_ids)] = 0
    if name != "embeddings":
        counts = context.vocabulary.counts
        language = token_language(counts, counts.sum(axis=0), context.neutral())
        vectors = centre_by_language(vectors, language, weights > 0)
    return vectors, weights


def load_ruler(context: Context, run: ModelRun, name: str) -> Ruler:
    """A clustered space with its floors: labels shuffled over tokens of like frequency, and random vectors."""
    folder = context.store.ruler_dir(run.name)
    vectors, weights = _vectors(context, folder, name)
    with safe_open(folder / f"clusters_{name}.safetensors", "numpy") as handle:
        theta = float(handle.get_tensor("theta")[0])
        labels = handle.get_tensor("labels") if "labels" in handle.keys() else None  # noqa: SIM118 - not a mapping
    n_clusters = len(np.unique(labels[weights > 0])) if labels is not None else None
    clustering = Clustering(unit_rows(vectors), weights > 0, theta, labels, n_clusters)
    seed = seed_for(context.study, "floors", name)
    shuffled = shuffled_floor(clustering, weights, seed=seed, n_strata=CENTRED_STRATA)
    random = random_floor(clustering, weights, seed=seed, max_tokens=context.study.features.cluster_tokens)
    return Ruler(clustering, shuffled, random, weights)


# ---- scores of one cell


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
    if "phi" in columns:
        # Thresholds are judged on dev where it was collected (the final checkpoint), so that test stays untouched.
        dev = "_dev" if "phi_dev" in columns else ""
        pairs = columns[f"n_pairs_a{dev}"], columns[f"n_pairs_b{dev}"]
        for value in PHI_SWEEP:
            flag = is_bilingual(language, columns[f"phi{dev}"], columns[f"phi_null{dev}"], *pairs, threshold=value,
                                min_firings=features.min_firings)  # fmt: skip
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
        for percentile in THETA_SWEEP:
            rows.append(["theta", percentile, "monosemanticity", _theta(context, embeddings, tokens, n, alive, percentile)])
    return rows


def _theta(context: Context, ruler: Ruler, tokens: Groups, n: int, alive: NDArray[np.bool_], percentile: float) -> float | None:
    """Mean R with the clusters cut at another percentile; the clustering is kept, since every setup asks for it."""
    cache: dict[tuple[int, float], Clustering] = context.__dict__.setdefault("_theta_sweep", {})
    key = (id(ruler.clustering), percentile)
    if key not in cache:
        seed = seed_for(context.study, "theta-sweep")
        theta = cosine_threshold(ruler.clustering.vectors, ruler.weights, seed=seed, percentile=percentile)
        cache[key] = cluster_tokens(ruler.clustering.vectors, ruler.weights, seed=seed, theta=theta)
    labels, _ = row_labels(cache[key], tokens, n)
    return _mean(monosemanticity(tokens, labels, n).r, alive)


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


# ---- tables of the whole study


def tables_key(context: Context) -> str:
    return digest("tables", [context.score_key(c, x, s) for c in _ordered(context) for x, s in context.setups(c)])


def _ordered(context: Context) -> list[Cell]:
    return [Cell(run, c) for run in context.runs for c in run.checkpoints]


def _rows(context: Context) -> Iterator[tuple[dict[str, Any], Path]]:
    for cell in _ordered(context):
        for layer, seed in context.setups(cell):
            folder = context.store.setup_dir(cell.model.name, cell.checkpoint.step, layer, seed)
            yield read_json(folder / "row.json"), folder


def make_tables(root: str, report: Any) -> None:
    """tables/features, evolution, evolution_seeds and sweeps: one place for all setups, rows in a fixed order."""
    context = Context.open(root)
    store, languages = context.store, context.token_info.languages
    rows, sweeps = [], []
    writer = None
    with atomic_path(store.table_path("features")) as temporary:
        for n, (row, folder) in enumerate(_rows(context)):
            report(n, 1, f"{n} setups")
            key = {k: row[k] for k in KEY_COLUMNS}
            sweeps += [{**key, **dict(zip(("sweep", "value", "measure", "result"), s, strict=True))} for s in row.pop("sweeps")]
            rows.append(row)
            table = read_parquet(folder / "features.parquet")
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
    evolution = pa.Table.from_pylist(rows, evolution_schema(languages))
    files = ["features.parquet"]
    tables = {"evolution": evolution, "sweeps": pa.Table.from_pylist(sweeps, _sweep_schema())}
    if bands := seeds_band(rows):
        tables["evolution_seeds"] = pa.Table.from_pylist([_plain(b) for b in bands], _band_schema(bands))
    for name, table in tables.items():
        write_table(store.table_path(name), table)
        files.append(f"{name}.parquet")
    with atomic_path(store.tables_dir / "evolution.csv") as temporary:
        pyarrow.csv.write_csv(evolution, temporary)
    store.mark_done(store.tables_dir, "tables", tables_key(context), {}, [*files, "evolution.csv"])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _band_schema(bands: list[dict[str, Any]]) -> pa.Schema:
    """Key columns and counts are what they are; measures are floats, also where every one is null."""
    known = dict(key_fields())
    counts = ("n", "n_lm_seeds", "n_sae_seeds")
    return pa.schema([(k, known.get(k, pa.int64() if k in counts else pa.float64())) for k in bands[0]])


def key_fields() -> list[tuple[str, pa.DataType]]:
    return [(k, pa.string() if k in ("control", "family", "model") else pa.int64()) for k in KEY_COLUMNS]


def _sweep_schema() -> pa.Schema:
    return pa.schema(
        [
            *key_fields(),
            ("sweep", pa.string()),
            ("value", pa.float64()),
            ("measure", pa.string()),
            ("result", pa.float64()),
        ]
    )


def evolution_schema(languages: tuple[str, ...]) -> pa.Schema:
    """Columns of tables/evolution.parquet, in order."""
    floats = ["alignment", "alignment_low", "alignment_high", "alignment_truth", *QUALITY]
    floats += [f"fvu_{x}" for x in languages] + [f"lm_loss_{x}" for x in languages]
    floats += ["lm_learning_rate", "sae_learning_rate", "theta", "theta_hidden"]
    floats += ["monosemanticity_floor_shuffled", "monosemanticity_floor_random"]
    floats += ["monosemanticity_hidden_floor_shuffled", "coherence_floor_shuffled"]
    floats += ["truth_auc_phi", "truth_auc_flag", "truth_auc_mixed"]
    integers = ["n_bilingual_shuffled", "n_bilingual_next", "truth_n_bilingual", "truth_n_alive"]
    return pa.schema(
        key_fields() + evolution_fields(languages) + [(x, pa.float64()) for x in floats] + [(x, pa.int64()) for x in integers]
    )
