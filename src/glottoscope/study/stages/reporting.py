"""Stage "report": what the report room shows, gathered from the run directory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glottoscope.corpus.display import merge_spans
from glottoscope.features.evolution import draws_from_intervals, smallest_detectable_difference, turning_step
from glottoscope.report.data import PatternExample, ReportData
from glottoscope.report.page import build_report
from glottoscope.study.config import LANGUAGE_NAMES, PlantedCorpus, TextCorpus
from glottoscope.study.plan import ModelRun, seed_for
from glottoscope.study.site_words import KYOTO, PLANTED
from glottoscope.study.stages.context import KEY_COLUMNS, Context
from glottoscope.study.stages.intervene.effects import table_key
from glottoscope.study.stages.pretraining import lm_facts, lm_log, pretrained_runs
from glottoscope.study.store import RunStore, digest, read_parquet

NOT_KNOWN = "not known to us"


def report_key(context: Context, tables_key: str) -> str:
    from glottoscope.study.stages.context import VERSIONS

    report = context.study.report.model_dump(mode="json")
    return digest("report", VERSIONS["report"], tables_key, table_key(context), report, context.study.study.notes)


def make_report(root: str, key: str, report: Any) -> None:
    """Write report/index.html and its figures from the tables."""
    context = Context.open(root)
    report(0, 1, "figures")
    store = context.store
    data = gather(context)
    build_report(data, store.report_dir)
    files = sorted(
        str(p.relative_to(store.report_dir)) for p in store.report_dir.rglob("*") if p.is_file() and p.name != "done.json"
    )
    store.mark_done(store.report_dir, "report", key, {}, files)


def gather(context: Context) -> ReportData:
    """Everything that the report shows."""
    study, store, info = context.study, context.store, context.token_info
    names = _report_names(context)
    evolution = _renamed(store.table("evolution"), names)
    sweeps = store.table_or_none("sweeps")
    features = study.features
    return ReportData(
        name=study.study.name,
        evolution=evolution,
        languages=list(info.languages),
        k=study.sae.k,
        activation_threshold=features.threshold,
        phi_threshold=features.phi_threshold,
        monosemanticity_threshold=features.paper_threshold,
        language_share=features.language_share,
        theta_percentile=features.theta_percentile if features.theta is None else None,
        features=_renamed(store.table("features"), names),
        evolution_seeds=store.table_or_none("evolution_seeds"),
        sweeps=_renamed(sweeps, names) if sweeps is not None else None,
        truth=_truth(evolution),
        intervention=_interventions(store, names),
        patterns=_patterns(context),
        pretrain_log=_logs(context),
        settings=study.identity(),
        manifest=store.manifest(),
        language_names={x: LANGUAGE_NAMES.get(x, x) for x in info.languages},
        notes=[*_notes(context), *_pair_control_notes(context, evolution)],
        choices=choices(context),
        detectable=_detectable(context, evolution),
        turning=_turning(context, evolution),
        licences=_licences(context),
        middle_layers={names[run.name]: _layer(context, run) for run in _first_seeds(context)},
    )


def _report_names(context: Context) -> dict[str, str]:
    """Name of each model in the report: one for all seeds of a model, which the column lm_seed tells apart."""
    return {r.name: r.spec.name if r.lm == r.name else f"{r.spec.name}-{r.control}" for r in context.runs}


def _renamed(table: pa.Table, names: dict[str, str], column: str = "model") -> pa.Table:
    if all(name == shown for name, shown in names.items()):
        return table
    index = table.schema.get_field_index(column)
    return table.set_column(index, column, pa.array([names[x] for x in table[column].to_pylist()], pa.string()))


def _interventions(store: RunStore, names: dict[str, str]) -> pa.Table | None:
    """Rows of every intervention; the report shows the study file's first."""
    table = store.table_or_none("intervention")
    if table is None or table.num_rows == 0:
        return None
    return _renamed(_renamed(table, names), names, "donor_model")


def _first_seeds(context: Context) -> list[ModelRun]:
    """The runs that the report's curves follow: the smallest seed of each model."""
    names = _report_names(context)
    first: dict[str, ModelRun] = {}
    for run in context.runs:
        shown = names[run.name]
        if shown not in first or run.lm_seed < first[shown].lm_seed:
            first[shown] = run
    return list(first.values())


def _layer(context: Context, run: ModelRun) -> int:
    wanted = context.study.report.layer
    if isinstance(wanted, int) and wanted in run.known_layers():
        return wanted
    return run.middle_layer


def _truth(evolution: pa.Table) -> pa.Table | None:
    """Agreement with the planted truth per setup, under the report's names."""
    if evolution["truth_n_alive"].null_count == evolution.num_rows:
        return None
    names = {"truth_auc_phi": "auc_phi", "truth_auc_flag": "auc_flag", "truth_n_bilingual": "n_truth_bilingual",
             "truth_n_alive": "n_alive"}  # fmt: skip
    keys = list(KEY_COLUMNS)
    table = evolution.select([*keys, *names])
    return table.rename_columns([*keys, *names.values()])


def _logs(context: Context) -> pa.Table | None:
    tables, names = [], _report_names(context)
    followed = {run.name for run in _first_seeds(context)}
    for run in pretrained_runs(context):
        log = lm_log(context, run.name)
        if log is not None and run.name in followed:
            tables.append(log.append_column("model", pa.array([names[run.name]] * log.num_rows)))
    return pa.concat_tables(tables, promote_options="default") if tables else None


# ---- figure 4: activation patterns


def _patterns(context: Context) -> list[PatternExample]:
    """The strongest features of each class at an early, a middle and the last checkpoint of the main model."""
    followed = _first_seeds(context)
    runs = [r for r in followed if r.control == "none"] or followed
    run = max(runs, key=lambda r: (r.shape.n_params if r.shape else 0, -followed.index(r)))
    layer, seed = _layer(context, run), min(context.study.sae.seeds)
    middle = len(run.checkpoints) // 2
    chosen: dict[str, Any] = {"last": run.final}
    if len(run.checkpoints) > 1:
        chosen = {"early": run.checkpoints[0], **chosen}
    if len(run.checkpoints) > 2:
        chosen = {"early": chosen["early"], "middle": run.checkpoints[middle], "last": run.final}
    result = []
    for role, checkpoint in chosen.items():
        folder = context.store.setup_dir(run.name, checkpoint.step, layer, seed)
        features, examples = read_parquet(folder / "features.parquet"), read_parquet(folder / "examples.parquet")
        for feature in _picked(context, features, examples):
            row = features.filter(pc.field("feature") == feature).to_pylist()[0]
            shown = examples.filter(pc.field("feature") == feature).slice(0, 200)
            result.append(
                PatternExample(
                    model=_report_names(context)[run.name], step=checkpoint.step, layer=layer, role=role, feature=feature,  # pyright: ignore[reportArgumentType]
                    language=row["language"], bilingual=row["bilingual"], phi=row["phi"],
                    examples=_example_spans(context, shown, row["max_activation"]),
                )
            )  # fmt: skip
    return result


def _picked(context: Context, features: pa.Table, examples: pa.Table) -> list[int]:
    """Features to show of one setup: in turn bilingual, mixed and each language's, drawn by the study's seed.

    Drawn, not the best ones: a reader should see what a feature of the class looks like.
    """
    shown = set(examples["feature"].to_pylist())
    rng = np.random.default_rng(seed_for(context.study, "patterns"))
    rows = [r for r in features.select(["feature", "language", "bilingual"]).to_pylist() if r["feature"] in shown]
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault("bilingual" if row["bilingual"] else row["language"], []).append(row["feature"])
    order = ["bilingual", "mixed", *context.token_info.languages]
    queues = [list(rng.permutation(groups.get(name, []))) for name in order]
    picked: list[int] = []
    while len(picked) < context.study.report.pattern_features and any(queues):
        for queue in queues:
            if queue and len(picked) < context.study.report.pattern_features:
                picked.append(int(queue.pop(0)))
    return picked


def _example_spans(context: Context, examples: pa.Table, maximum: float) -> list[tuple[str, list[tuple[str, float]]]]:
    """Strongest examples, the languages in turn where the feature is in both, as byte-safe spans with activations."""
    rows = examples.sort_by("rank").to_pylist()
    by_language: dict[str, list[Any]] = {}
    for row in rows:
        by_language.setdefault(row["language"], []).append(row)
    queues, chosen = list(by_language.values()), []
    while len(chosen) < context.study.report.pattern_examples and any(queues):
        for queue in queues:
            if queue and len(chosen) < context.study.report.pattern_examples:
                chosen.append(queue.pop(0))
    pieces, special = context.vocabulary.piece, set(context.token_info.special_ids)
    planted = isinstance(context.study.corpus, PlantedCorpus)
    result = []
    for row in chosen:
        pairs = [(t, a) for t, a in zip(row["tokens"], row["activations"], strict=True) if t not in special]
        # Words of the planted world have no spaces of their own.
        tokens = [pieces[t] if not planted else b" " + pieces[t].strip() for t, _ in pairs]
        spans = [(s.text, max(a for _, a in pairs[s.start : s.end]) / maximum if maximum else 0.0) for s in merge_spans(tokens)]
        result.append((row["language"], spans))
    return result


# ---- words


def _notes(context: Context) -> list[str]:
    study, info = context.study, context.token_info
    notes = list(info.notes)
    if study.study.notes:
        notes.append(study.study.notes)
    if isinstance(study.corpus, PlantedCorpus):
        notes.append(PLANTED)
    for run in pretrained_runs(context):
        facts = lm_facts(context, run.name)
        if not facts:
            continue
        words = f"{run.name} read {facts['parallel_share']:.0%} parallel documents"
        if facts["switched_share"]:
            words += f"; code switching in {facts['switched_share']:.0%} of the documents"
        if facts.get("dictionary_pairs"):
            shown = ", ".join(f"{a}|{b}" for a, b in facts["dictionary_examples"][:8])
            words += (
                f" swapped words with probability {facts['switch_probability']:.2f} by a dictionary of "
                f"{facts['dictionary_pairs']:,} pairs mined from the training pairs ({shown}, ...). This injects "
                "cross-lingual signal: what is bilingual here is real text with dictionary code switching, and does not "
                "emerge from bilingual text alone"
            )
        elif isinstance(study.corpus, TextCorpus):
            words += "; no words were switched"
        notes.append(words + ".")
    for which, facts in info.aligned.items():
        words = f"Aligned sentences ({which}): {facts['pairs']:,} pairs from {facts['articles']:,} articles"
        if facts["truncated"]:
            words += f"; {facts['truncated']} sentences were cut"
        if which == "test" and facts["pairs"] < 1000:
            words += "; fewer than 1,000 pairs make phi coarse"
        notes.append(words + ".")
    if not info.aligned:
        notes.append(
            "There are no aligned sentences: phi and `bilingual` are null, and `bilingual_paper` (mixed and monosemantic) "
            "is shown by that name; it also counts features without any cross-lingual meaning."
        )
    elif len(info.languages) > 2:
        notes.append(f"phi and alignment compare {info.languages[0]} with {info.languages[1]} only.")
    return notes


def _pair_control_notes(context: Context, evolution: pa.Table) -> list[str]:
    """What would have passed as bilingual with the wrong sentences, at the last checkpoint of each model's curve."""
    notes, names = [], _report_names(context)
    for run in _first_seeds(context):
        place = (names[run.name], run.lm_seed, run.final.step, _layer(context, run))
        rows = [
            r
            for r in evolution.to_pylist()
            if (r["model"], r["lm_seed"], r["step"], r["layer"]) == place and r["n_bilingual"] is not None
        ]
        if rows:
            row = rows[0]
            notes.append(
                f"Controls of the pairs, {run.name} at its last checkpoint, layer {row['layer']}: {row['n_bilingual']} features "
                f"pass with the translations, {row['n_bilingual_next']} with the next sentence of the article instead, "
                f"{row['n_bilingual_shuffled']} with shuffled pairs; {row['count_supportable']} of {row['n_alive']} alive "
                "features fire in enough sentences on both sides to pass at all."
            )
    return notes


def choices(context: Context) -> list[tuple[str, str, str]]:
    """Choices of METHOD that are ours: (what, ours, the paper's)."""
    study = context.study
    sae, features = study.sae, study.features
    ruler = "clusters of the final checkpoint's input embeddings; average linkage on 1 - cosine"
    theta = f"{features.theta}" if features.theta is not None else f"{features.theta_percentile:g}th percentile of pairs"
    rows = [
        ("which checkpoints", "log-spaced, matched by tokens", NOT_KNOWN),
        ("learning rate of the SAEs", f"grid {[float(x) for x in sae.lr]}, by validation loss, chosen "
         + ("once per model and layer at the last checkpoint" if sae.lr_choice == "final" else "per setup"),
         "grid search; the grid is " + NOT_KNOWN),
        ("ratio of languages", "1:1 by tokens, interleaved", "1:1; in which unit is " + NOT_KNOWN),
        ("language of a feature", f"rule {features.rule}: positions above {features.threshold} of the maximum after TopK, "
         f"by the document's language; neutral tokens out; at least {features.min_count} positions; rates, share > "
         f"{features.language_share}" if features.rule == "document" else f"rule {features.rule}",
         "v1: the first 50 examples by the script of the strongest token, maxima before TopK; v2: " + NOT_KNOWN),
        ("token clusters", f"{ruler}; merged while the mean cosine is at least theta = {theta}", NOT_KNOWN),
        ("token space over training", "that of the final checkpoint at every step", NOT_KNOWN),
        ("bilingual", f"mixed and phi - phi_null >= {features.phi_threshold} over aligned sentences, at least "
         f"{features.min_firings} firing sentences on each side", "no such measure; mixed and monosemantic stands beside it"),
        ("phi_null", "exact mean over permutations within strata of about 10 pairs of like length", "no such measure"),
        ("neutral tokens", "without letters, or frequent in both languages on the train split; counted for no language",
         "v1 counts them as Japanese; v2: " + NOT_KNOWN),
        ("initial SAE weights", "the same for every checkpoint of a layer", NOT_KNOWN),
        ("b_dec", "geometric median of the first batch (Weiszfeld with the step of Vardi and Zhang)", "geometric median"),
        ("coherence", f"1 - expected entropy of {features.coherence_draws} positions / log {features.coherence_draws}, on "
         "clusters of the final checkpoint's mean hidden states", "not used"),
        ("intervals", f"95 % bootstrap over the features of one SAE, {features.bootstrap} resamples; they hold for that "
         "language model and that SAE only", NOT_KNOWN),
    ]  # fmt: skip
    return rows


def _licences(context: Context) -> list[tuple[str, str, str]]:
    rows = [(line, "", "") for line in context.study.report.licences]
    corpus = context.study.corpus
    if isinstance(corpus, PlantedCorpus):
        rows.append(("Planted world", "part of glottoscope, Apache-2.0", ""))
    elif any(s.format == "kyoto-xml" for s in corpus.sources):
        rows.append(KYOTO)
    elif not rows:
        rows.append(("Text of this study", "not stated", "state it in report.licences of the study file"))
    return rows


def _detectable(context: Context, evolution: pa.Table) -> dict[str, Any]:
    """The smallest difference between two setups that this study could have seen, for the headline shares."""
    result: dict[str, Any] = {}
    names = _report_names(context)
    layers = {names[run.name]: _layer(context, run) for run in _first_seeds(context)}
    rows = [r for r in evolution.to_pylist() if r["layer"] == layers[r["model"]] and r["control"] == "none"]
    for measure in ("share_mixed", "share_bilingual", "monosemanticity"):
        found = smallest_detectable_difference(rows, measure)
        result[measure] = found._asdict()
    return result


def _turning(context: Context, evolution: pa.Table) -> list[dict[str, Any]]:
    """When mixed turns, how far it falls and rises, per model at the layer of the curves."""
    result, names = [], _report_names(context)
    for run in _first_seeds(context):
        if len(run.checkpoints) < 3:
            continue
        layer = _layer(context, run)
        rows = [
            r for r in evolution.to_pylist()
            if r["model"] == names[run.name] and r["lm_seed"] == run.lm_seed and r["layer"] == layer
            and r["sae_seed"] == min(context.study.sae.seeds)
        ]  # fmt: skip
        values = [r["share_mixed"] for r in rows]
        if any(v is None for v in values):
            continue
        low, high = ([r[f"share_mixed_{x}"] for r in rows] for x in ("low", "high"))
        draws = draws_from_intervals(values, low, high, n_boot=1000, seed=seed_for(context.study, "turning") % 2**32)
        turning = turning_step([r["step"] for r in rows], values, draws)
        if turning is not None:
            record = turning._asdict()
            record["low"], record["high"] = record.pop("step_low"), record.pop("step_high")
            result.append({"model": names[run.name], "layer": layer, **record})
    return result
