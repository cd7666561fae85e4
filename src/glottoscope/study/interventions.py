"""`glottoscope intervene`: experiments beside those of the study file, in a run that is there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import tomli_w
from rich.console import Console
from rich.table import Table

from glottoscope.errors import InputError
from glottoscope.intervention import comet as comet_room
from glottoscope.study.config import NAME_PATTERN, InterventionConfig
from glottoscope.study.engine import Failure
from glottoscope.study.engines import LOCAL, Machines, open_engine
from glottoscope.study.load import parse_study
from glottoscope.study.runner import explain, reach_machines, remake_report_locked
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene import units
from glottoscope.study.stages.intervene.comet_scoring import score_comet
from glottoscope.study.stages.intervene.experiments import STUDY_NAME, Experiment, experiments
from glottoscope.study.stages.intervene.sentences import tasks_of
from glottoscope.study.stages.intervene.translating import PROMPTS, check_translation
from glottoscope.study.store import RunStore


class Comet(NamedTuple):
    """Where a COMET model and its environment lie on this machine."""

    model: Path
    environment: Path | None
    gpus: int
    batch_size: int


def settings_of(store: RunStore, changes: Mapping[str, Any], overrides: Sequence[str]) -> InterventionConfig:
    """The study's intervention (or the defaults) with changes.

    Args:
        changes: fields of [intervention]; translation = None leaves it out, {} takes its defaults. Named features are
            added to the parts, unless these are given, too.
        overrides: `intervention.tokens=1000` and the like.

    Raises:
        InputError: as a study file's.
    """
    study = store.study()
    raw = study.dump()
    given = dict(raw.get("intervention") or {})
    for name, value in changes.items():
        if value is None:
            given.pop(name, None)
        elif isinstance(value, Mapping):
            given[name] = {**(given.get(name) or {}), **value}
        else:
            given[name] = value
    raw["intervention"] = given
    if changes.get("features") and "parts" not in changes and "parts" in given:
        given["parts"] = [*given["parts"], *changes["features"]]  # new parts beside those of the study file
    ours = [x if x.split("=")[0].strip().startswith("intervention.") else f"intervention.{x}" for x in overrides]
    changed = parse_study(tomli_w.dumps(raw), name="intervention", folder=Path.cwd(), overrides=ours).intervention
    assert changed is not None
    return changed


def intervene(
    root: Path, config: InterventionConfig, *, name: str, workers: int | None, console: Console, comet: Comet | None = None,
    machines: Machines = LOCAL,
) -> list[Failure]:  # fmt: skip
    """Make the experiments of `config`, the table of interventions and the report; complete ones are not made again.

    Raises:
        InputError: bad input found before anything runs.
    """
    store = RunStore(root.resolve())  # workers on other machines start elsewhere
    store.manifest()
    if name == STUDY_NAME:
        raise InputError(f"--name {name}: that is the name of the study file's own interventions; choose another")
    if not re.match(NAME_PATTERN, name):
        raise InputError(f"--name {name!r}: use letters, digits, dots, hyphens and underscores, as in --name second")
    if comet is not None:
        _check_comet(config, comet)
    reach_machines(machines)
    with store.lock():
        for path in store.leftovers():
            store.remove(path)
        context = Context.open(store.root)
        store.table("features")  # says what to do where the study is not complete
        wanted = experiments(context, config, name)
        if config.translation is not None:
            # What is wrong with the sentences is said now.
            tasks_of(context, wanted[0])
            check_translation(context, config.translation)
        with open_engine(context.study, store, console, workers, machines) as engine:
            for stage in (units.prepare_units, units.measure_units):
                outcome = engine.run("intervene", stage(context, wanted))
                if outcome.failures:
                    explain(console, outcome, "intervene")
                    return outcome.failures
            if comet is not None:
                for experiment in wanted:
                    score_comet(context, experiment, comet.model, comet.environment, comet.gpus, comet.batch_size, console)
            for missing in (units.effect_units(context, wanted), None):
                outcome = engine.run("intervene", units.table_units(context) if missing is None else missing)
                if outcome.failures:
                    explain(console, outcome, "intervene")
                    return outcome.failures
        remake_report_locked(store.root, console)
    return []


def _check_comet(config: InterventionConfig, comet: Comet) -> None:
    """Raise before anything runs where COMET could not score in the end."""
    if config.translation is None:
        raise InputError("--comet scores translations: add --translate")
    comet_room.checkpoint_file(comet.model)
    comet_room.versions(comet.environment)


def make_comet_environment(folder: Path | None, python: str, extra_index: str | None) -> Path:
    """`glottoscope comet setup`: its interpreter."""
    return comet_room.setup(folder or comet_room.default_environment(), python=python, extra_index=extra_index)


def print_effects(root: Path, config: InterventionConfig, name: str, console: Console) -> None:
    """What was found, in the terminal: pooled perplexity and scores of translation, by part."""
    context = Context.open(root)
    table = context.store.table("intervention")
    for experiment in experiments(context, config, name):
        rows = _of(table, experiment)
        for text in dict.fromkeys(rows["text"].to_pylist()):
            if not text.startswith("dev_"):
                _print(rows.filter(pc.field("text") == text), experiment, text, console)


def _of(table: pa.Table, experiment: Experiment) -> pa.Table:
    wanted = {
        "experiment": experiment.name, "model": experiment.model, "base_step": experiment.base, "donor_step": experiment.donor,
        "layers": "+".join(map(str, experiment.layers)), "donor_model": experiment.donor_model,
        "mode": experiment.config.mode, "scale": experiment.config.scale,
    }  # fmt: skip
    for column, value in wanted.items():
        table = table.filter(pc.field(column) == value)
    return table


def _print(rows: pa.Table, experiment: Experiment, text: str, console: Console) -> None:
    shown = Table("part", "alpha", title=f"{experiment.title}, {text}", title_justify="left")
    measures = list(dict.fromkeys(zip(rows["metric"].to_pylist(), rows["language"].to_pylist(), strict=True)))
    measures = [m for m in measures if m[0] in ("ppl", "chrf", "comet")]
    for metric, language in measures:
        shown.add_column(f"{metric} {language}")
    shown.add_column("rank among it and its draws")
    # What holds for all rows is said once, beneath.
    found = [row | {"note": _without(row["note"], PROMPTS)} for row in rows.to_pylist()]
    prompts = {row["language"]: said for row in rows.to_pylist() if (said := _only(row["note"], PROMPTS))}
    # The other controls are in the table and the report: here is what a reader looks for first.
    first = ("baseline", "donor", "part", "reconstruction", "state_replaced")
    lines = dict.fromkeys((r["arm"], r["part"], r["alpha"]) for r in found if r["arm"] in first and r["chosen"])
    for arm, part, alpha in lines:
        mine = {(r["metric"], r["language"]): r for r in found if (r["arm"], r["part"], r["alpha"]) == (arm, part, alpha)}
        cells = [_cell(mine.get(m)) for m in measures]
        ranked = [mine[m] for m in ([("ppl", "all")] if text != "translation" else measures) if m in mine]
        rank = ", ".join(f"{r['rank']} of {r['n_random'] + 1}" for r in ranked if r["rank"] is not None)
        note = next((r["note"] for r in mine.values() if r["note"]), None)
        words = part if arm == "part" else f"{arm} {part or ''}".strip()
        shown.add_row(words, "" if alpha is None else f"{alpha:g}", *cells, rank or note or "")
    console.print(shown)
    for direction, said in prompts.items():
        console.print(f"{direction}: {said.removeprefix(PROMPTS)}", highlight=False)


def _only(note: str | None, start: str) -> str | None:
    return next((piece for piece in (note or "").split("; ") if piece.startswith(start)), None)


def _without(note: str | None, start: str) -> str | None:
    return "; ".join(piece for piece in (note or "").split("; ") if not piece.startswith(start)) or None


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None or not math.isfinite(row["value"]):
        return ""
    if row["arm"] == "baseline" or row["change_low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}])"
