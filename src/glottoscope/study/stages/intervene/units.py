"""The units of stage "intervene": what is missing of some experiments, each asked for when the one before is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glottoscope.study.config import Study
from glottoscope.study.engine import Unit
from glottoscope.study.machine import reading_memory
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene import effects, experiments, measuring, preparing, translating
from glottoscope.study.stages.intervene.experiments import Experiment, all_experiments, chunks, effects_key, prepare_key
from glottoscope.study.store import RunStore
from glottoscope.walking import listed


def of_study(context: Context) -> list[Experiment]:
    """What the study file asks for."""
    return [] if context.study.intervention is None else experiments.experiments(context, context.study.intervention)


def check(study: Study) -> None:
    """Raise what is wrong with the interventions of a study that has no results yet.

    Raises:
        InputError: a model, step, layer, part or sentence that is not there; a template or prompt that cannot be made.
    """
    config = study.intervention
    assert config is not None
    context = Context(study, RunStore(""))  # nothing of a run is read
    experiments.check(context, config)
    if config.translation is not None:
        translating.check_translation(context, config.translation)


def prepare_units(context: Context, wanted: Sequence[Experiment]) -> list[Unit]:
    root = str(context.store.root)
    return [
        Unit(f"{e.title}: plan", preparing.prepare, (root, e.dump()), memory=_memory(context, e))
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
            arguments = (root, e.dump(), text, i)
            units.append(Unit(name, measuring.measure_chunk, arguments, len(every[i]), _memory(context, e)))
        for direction, i in translating.missing_translations(context, e):
            n = len(translating.translated_chunks(context, e))
            name = f"{e.title}: {direction} {i + 1}/{n}"
            # One translated condition takes about as long as eight losses on the same sentences.
            weight = 8.0 * translating.TRANSLATED_CHUNK
            units.append(Unit(name, translating.translate_chunk, (root, e.dump(), direction, i), weight, _memory(context, e)))
    return sorted(units, key=lambda u: -u.weight)


def _memory(context: Context, e: Experiment) -> int:
    """Of both models, and the SAEs of the donor's and the base's layers."""
    models = [context.run_of(e.model), context.run_of(e.donor_model)]
    return reading_memory(context.study, models, len(e.layers), 2 * len(e.layers))


def effect_units(context: Context, wanted: Sequence[Experiment]) -> list[Unit]:
    """Effects of the experiments that are measured: where something of one failed, the others are finished."""
    root = str(context.store.root)
    return [
        Unit(f"{e.title}: effects", effects.make_effects, (root, e.dump()))
        for e in wanted
        if _is_measured(context, e) and not context.store.is_done(e.folder(context), "effects", effects_key(context, e))
    ]


def _is_measured(context: Context, e: Experiment) -> bool:
    if not context.store.is_done(e.folder(context), "prepare", prepare_key(context, e)):
        return False
    return not measuring.missing_chunks(context, e) and not translating.missing_translations(context, e)


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
    for path in listed(context.store.interventions_dir, "*/*/*/*"):
        if path.is_dir() and path not in kept:
            yield str(path)
