"""The units of stage "intervene": what is missing of some experiments, each asked for when the one before is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glottoscope.study.engine import Unit
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene import effects, measuring, preparing, translating
from glottoscope.study.stages.intervene.experiments import (
    Experiment,
    all_experiments,
    chunks,
    effects_key,
    experiments,
    prepare_key,
)


def of_study(context: Context) -> list[Experiment]:
    """What the study file asks for."""
    return [] if context.study.intervention is None else experiments(context, context.study.intervention)


def prepare_units(context: Context, wanted: Sequence[Experiment]) -> list[Unit]:
    root = str(context.store.root)
    return [
        Unit(f"{e.title}: plan", preparing.prepare, (root, e.dump()))
        for e in wanted
        if not context.store.is_done(e.folder(context), "prepare", prepare_key(context, e))
    ]


def measure_units(context: Context, wanted: Sequence[Experiment]) -> list[Unit]:
    """Losses and translations, the longest first: workers then end at about the same time."""
    root, units = str(context.store.root), []
    for e in wanted:
        if not context.store.is_done(e.folder(context), "prepare", prepare_key(context, e)):
            continue  # what there is to measure is not known yet
        for text, i in measuring.missing_chunks(context, e):
            every = chunks(e.folder(context), text)
            name = f"{e.title}: {text} {i + 1}/{len(every)}"
            units.append(Unit(name, measuring.measure_chunk, (root, e.dump(), text, i), len(every[i])))
        for direction, i in translating.missing_translations(context, e):
            n = len(translating.translated_chunks(context, e))
            name = f"{e.title}: {direction} {i + 1}/{n}"
            # One translated condition takes about as long as eight losses on the same sentences.
            units.append(
                Unit(name, translating.translate_chunk, (root, e.dump(), direction, i), 8.0 * translating.TRANSLATED_CHUNK)
            )
    return sorted(units, key=lambda u: -u.weight)


def effect_units(context: Context, wanted: Sequence[Experiment]) -> list[Unit]:
    root = str(context.store.root)
    return [
        Unit(f"{e.title}: effects", effects.make_effects, (root, e.dump()))
        for e in wanted
        if not context.store.is_done(e.folder(context), "effects", effects_key(context, e))
    ]


def table_units(context: Context) -> list[Unit]:
    store = context.store
    if not store.table_path("intervention").exists() and not any(True for _ in all_experiments(context)):
        return []
    if store.is_done(store.tables_dir, "intervention", effects.table_key(context)):
        return []
    return [Unit("table of interventions", effects.make_table, (str(store.root),))]


def stale_folders(context: Context, wanted: Sequence[Experiment]) -> Iterator[str]:
    """Folders of experiments that neither the study asks for nor its present models and settings fit."""
    kept = {e.folder(context) for e in [*all_experiments(context), *wanted]}
    for path in sorted(context.store.interventions_dir.glob("*/*/*/*")):
        if path.is_dir() and path not in kept:
            yield str(path)
