"""From what was measured to rows: every condition against the baseline, with intervals, gap closed and rank among draws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from glottoscope.atomic import atomic_path, write_json, write_table
from glottoscope.intervention.conditions import Condition
from glottoscope.intervention.effects import nll_score, paired_effects, ppl_score, ranks
from glottoscope.intervention.perplexity import Measured, mean_norm
from glottoscope.intervention.scores import ratio
from glottoscope.study.plan import seed_for
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import (
    Experiment,
    all_experiments,
    dev_of,
    effects_key,
    present_comet_key,
    read_plan,
    texts,
)
from glottoscope.study.stages.intervene.losses import read_losses
from glottoscope.study.stages.intervene.measuring import load_losses
from glottoscope.study.stages.intervene.preparing import load_conditions
from glottoscope.study.stages.intervene.sentences import Task, tasks_of
from glottoscope.study.stages.intervene.texts import text_of
from glottoscope.study.stages.intervene.translating import dropped_words, load_statistics, metrics_of, translated_conditions
from glottoscope.study.store import digest, read_parquet

Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]
STRINGS = ("experiment", "control", "family", "model", "donor_model", "layers", "text", "arm", "part", "mode", "scale", "metric",
           "language", "signature", "note")  # fmt: skip
COLUMNS = (
    "experiment", "control", "family", "model", "d_model", "n_params", "lm_seed", "sae_seed", "layer", "layers", "base_step",
    "donor_model", "donor_step", "base_tokens", "donor_tokens", "text", "arm", "part", "draw", "mode", "scale", "alpha",
    "chosen", "metric", "language", "value", "change", "change_low", "change_high", "gap_closed", "gap_closed_low",
    "gap_closed_high", "added_norm", "change_per_norm", "mass", "n_features", "n_tokens", "n_units", "rank", "n_random",
    "rank_other", "n_random_other", "signature", "note",
)  # fmt: skip
FLOATS = {
    "alpha", "value", "change", "change_low", "change_high", "gap_closed", "gap_closed_low", "gap_closed_high", "added_norm",
    "change_per_norm", "mass",
}  # fmt: skip


def schema() -> pa.Schema:
    """Columns of tables/intervention.parquet, in order."""

    def kind(name: str) -> pa.DataType:
        if name in STRINGS:
            return pa.string()
        if name == "chosen":
            return pa.bool_()
        return pa.float64() if name in FLOATS else pa.int64()

    return pa.schema([(name, kind(name)) for name in COLUMNS])


class Measure(NamedTuple):
    """One number of every condition: sums per unit, and how they become a value."""

    text: str
    metric: str
    language: str
    better: str  # "lower" | "higher"
    score: Score
    conditions: list[int]  # numbers in the plan (dev: in its own list)
    totals: NDArray[np.float64]  # [S, U, C]
    group: NDArray[np.int64]  # [U]
    norms: NDArray[np.float64]  # [S] added norm on these units; NaN where nothing is added
    signature: str | None = None  # what computed it
    note: str | None = None  # what there is to say of all its rows


def make_effects(root: str, raw: dict[str, Any], report: Callable[..., None]) -> None:
    """Write intervention.parquet, the rows of one experiment, and experiment.json, which says what they are of."""
    context, experiment = Context.open(root), Experiment.parse(raw)
    folder = experiment.folder(context)
    key = effects_key(context, experiment)
    context.store.begin(folder, "effects")
    rows = []
    for n, measure in enumerate(_measures(context, experiment)):
        report(n, n + 1, f"{measure.text} {measure.metric} {measure.language}")
        rows += _rows(context, experiment, measure)
    rows += _empty(context, experiment)
    write_table(folder / "intervention.parquet", pa.Table.from_pylist(rows, schema()))
    write_json(folder / "experiment.json", experiment.dump())
    context.store.mark_done(folder, "effects", key, {}, ["intervention.parquet", "experiment.json"])


# ---- what was measured


def _measures(context: Context, experiment: Experiment) -> Iterator[Measure]:
    folder = experiment.folder(context)
    for name in dict.fromkeys(dev_of(context, text) for text in _told(context, experiment)):
        yield from _losses(context, experiment, name, read_losses(folder / f"{name}.npz"))
    for text in texts(context, experiment.config):
        yield from _losses(context, experiment, text, load_losses(context, experiment, text))
    if experiment.config.translation is not None:
        for task in tasks_of(context, experiment):
            yield from _translations(context, experiment, task)


def _told(context: Context, experiment: Experiment) -> list[str]:
    """The plan's texts that the settings ask for."""
    return texts(context, experiment.config) + (["translation"] if experiment.config.translation is not None else [])


def _losses(context: Context, experiment: Experiment, name: str, found: Measured) -> Iterator[Measure]:
    text = text_of(context, experiment.config, name)
    totals = np.stack([found.nll, np.broadcast_to(found.tokens, found.nll.shape).astype(np.float64)], axis=-1)
    conditions = list(range(len(found.nll)))
    for g, language in [*enumerate(context.study.languages), (None, "all")]:
        mine = np.flatnonzero((found.tokens > 0) & ((text.language == g) if g is not None else True))
        if len(mine):
            norms = mean_norm(found.added[:, mine], found.positions[:, mine])
            for metric, score in (("nll", nll_score), ("ppl", ppl_score)):
                yield Measure(name, metric, language, "lower", score, conditions, totals[:, mine], text.group[mine], norms)


def _translations(context: Context, experiment: Experiment, task: Task) -> Iterator[Measure]:
    direction = f"{task.source}-{task.target}"
    conditions, found = translated_conditions(context, experiment), load_statistics(context, experiment, direction)
    note = dropped_words(found.dropped_shots, len(task.shots))
    for metric in metrics_of(context, experiment, task):
        totals = found.sums[metric.name].astype(np.float64)
        yield Measure("translation", metric.name, direction, metric.better, metric.score, conditions, totals, task.article,
                      found.added_norm, found.signatures[metric.name], note)  # fmt: skip
    if present_comet_key(context, experiment) is not None:
        scores = comet_scores(experiment.folder(context) / "comet.parquet", direction, len(task.pairs))
        chosen = sorted(scores)
        totals = np.stack([np.stack([scores[c], np.ones(len(task.pairs))], axis=-1) for c in chosen])
        about = json.loads((experiment.folder(context) / "comet.json").read_text(encoding="utf-8"))
        signature = f"COMET|{about['model']}|{about['fingerprint']}"
        norms = found.added_norm[[conditions.index(i) for i in chosen]]
        yield Measure("translation", "comet", direction, "higher", ratio, chosen, totals, task.article, norms, signature, note)


def comet_scores(path: Path, direction: str, n_pairs: int) -> dict[int, NDArray[np.float64]]:
    """Condition -> COMET of every pair [P]."""
    result: dict[int, NDArray[np.float64]] = {}
    for row in read_parquet(path).to_pylist():
        if row["direction"] == direction:
            result.setdefault(row["condition"], np.full(n_pairs, np.nan))[row["pair"]] = row["score"]
    return result


# ---- rows


def _key(context: Context, experiment: Experiment) -> dict[str, Any]:
    base, donor = experiment.cells(context)
    run = base.model
    assert run.shape is not None
    return {
        "experiment": experiment.name, "control": run.control, "family": run.family, "model": run.name,
        "d_model": run.shape.d_model, "n_params": run.shape.n_params, "lm_seed": run.lm_seed, "sae_seed": experiment.seed,
        "layer": min(experiment.layers), "layers": "+".join(map(str, experiment.layers)), "base_step": experiment.base,
        "donor_model": experiment.donor_model, "donor_step": experiment.donor, "base_tokens": base.checkpoint.tokens_seen,
        "donor_tokens": donor.checkpoint.tokens_seen, "mode": experiment.config.mode, "scale": experiment.config.scale,
    }  # fmt: skip


def _dev_conditions(experiment: Experiment, chosen: float) -> list[Condition]:
    alphas = experiment.config.alphas
    return [
        Condition("baseline"), Condition("donor"),
        *(Condition("part", "all", alpha=a, chosen=a == chosen, features="all") for a in alphas),
    ]  # fmt: skip


def _rows(context: Context, experiment: Experiment, measure: Measure) -> list[dict[str, Any]]:
    folder = experiment.folder(context)
    plan = read_plan(folder)
    dev = measure.text.startswith("dev_")
    of_text = next(t for t in _told(context, experiment) if dev_of(context, t) == measure.text) if dev else measure.text
    every, sets = load_conditions(context, experiment, of_text)
    if dev:
        every = _dev_conditions(experiment, plan["texts"][of_text]["alpha"])
    conditions = [every[i] for i in measure.conditions]
    found = paired_effects(
        measure.totals, measure.score, baseline=_place(conditions, "baseline"), donor=_place(conditions, "donor"),
        groups=measure.group, n_boot=experiment.config.bootstrap, seed=seed_for(context.study, "effects", measure.text) % 2**32,
    )  # fmt: skip
    key = _key(context, experiment)
    rows = []
    for s, condition in enumerate(conditions):
        norm = float(measure.norms[s])
        change = float(found.change[s])
        strength = condition.arm in ("part", "random", "random_other", "self", "shuffled", "state")
        row = {
            **key, "text": measure.text, "arm": condition.arm, "part": condition.part, "draw": condition.draw,
            "alpha": condition.alpha if strength else None, "chosen": condition.chosen, "metric": measure.metric,
            "language": measure.language, "value": float(found.value[s]), "change": change,
            "change_low": float(found.change_low[s]), "change_high": float(found.change_high[s]),
            "gap_closed": float(found.gap_closed[s]), "gap_closed_low": float(found.gap_closed_low[s]),
            "gap_closed_high": float(found.gap_closed_high[s]), "added_norm": norm,
            "change_per_norm": change / norm if norm > 0 else math.nan,
            "mass": plan["mass"].get(condition.features), "n_features": _n_features(sets, condition),
            "n_tokens": None if measure.text == "translation" else int(measure.totals[s, :, 1].sum()),
            "n_units": len(np.unique(measure.group)), "signature": measure.signature,
            "note": plan["notes"].get(condition.part) if condition.part else None,
        }  # fmt: skip
        if condition.arm == "part" and condition.chosen:
            row |= _ranks(conditions, found.value, s, measure.better, plan["notes"])
        row["note"] = "; ".join(x for x in (measure.note, row["note"]) if x) or None
        rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return rows


def _place(conditions: Sequence[Condition], arm: str) -> int:
    return next(i for i, c in enumerate(conditions) if c.arm == arm)


def _n_features(sets: dict[int, dict[str, NDArray[np.bool_]]], condition: Condition) -> int | None:
    if condition.features is None:
        return None
    return int(sum(found[condition.features].sum() for found in sets.values()))


def _ranks(
    conditions: Sequence[Condition], values: NDArray[np.float64], s: int, better: Any, notes: dict[str, str]
) -> dict[str, Any]:
    """Ranks among both kinds of draws, and what there is to say about the draws."""
    result: dict[str, Any] = {}
    part = conditions[s].part
    said = [notes[part]] if part in notes else []
    for arm, ending in (("random", ""), ("random_other", "_other")):
        draws = np.array([values[i] for i, c in enumerate(conditions) if c.arm == arm and c.part == part])
        if len(draws):
            rank, n = ranks(float(values[s]), draws, better)
            result |= {f"rank{ending}": rank, f"n_random{ending}": n}
        if f"{arm}:{part}" in notes:
            said.append(f"{arm}: {notes[f'{arm}:{part}']}")
    return {**result, "note": "; ".join(said) or None}


def _empty(context: Context, experiment: Experiment) -> list[dict[str, Any]]:
    """A row without a value for every part that has no features: said, not left out."""
    notes, first = read_plan(experiment.folder(context))["notes"], texts(context, experiment.config)[0]
    return [
        {**_key(context, experiment), "text": first, "arm": "part", "part": part, "chosen": True, "metric": "nll",
         "language": "all", "n_features": 0, "note": note}
        for part, note in notes.items() if ":" not in part
    ]  # fmt: skip


# ---- the table


def table_key(context: Context) -> str:
    return digest("intervention", [[e.dump(), effects_key(context, e)] for e in all_experiments(context)])


def make_table(root: str, report: Callable[..., None]) -> None:
    """tables/intervention.parquet and .csv: the rows of every experiment that is complete."""
    context = Context.open(root)
    store = context.store
    store.begin(store.tables_dir, "intervention")
    key = table_key(context)
    parts = [read_parquet(e.folder(context) / "intervention.parquet") for e in all_experiments(context)]
    table = pa.concat_tables(parts) if parts else schema().empty_table()
    write_table(store.table_path("intervention"), table)
    with atomic_path(store.tables_dir / "intervention.csv") as temporary:
        pyarrow.csv.write_csv(table, temporary)
    store.mark_done(store.tables_dir, "intervention", key, {}, ["intervention.parquet", "intervention.csv"])
