"""Losses of an experiment's conditions, some conditions at a time: what a killed run has done stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glottoscope.errors import InputError
from glottoscope.intervention.conditions import edits_of
from glottoscope.intervention.perplexity import Measured, measure, other_windows
from glottoscope.study.plan import seed_for
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import Experiment, chunks, measure_key, read_plan, texts
from glottoscope.study.stages.intervene.losses import joined, read_losses, save_losses
from glottoscope.study.stages.intervene.preparing import load_conditions, open_scene
from glottoscope.study.stages.intervene.texts import text_of


def measured_name(text: str, chunk: int) -> str:
    return f"{text}-{chunk:03d}"


def missing_chunks(context: Context, experiment: Experiment) -> list[tuple[str, int]]:
    """(text, chunk) that are not measured yet with these settings."""
    folder = experiment.folder(context)
    return [
        (text, i)
        for text in texts(context, experiment.config)
        for i in range(len(chunks(folder, text)))
        if not context.store.is_done(folder, measured_name(text, i), measure_key(context, experiment, text))
    ]


def measure_chunk(root: str, raw: dict[str, Any], text: str, chunk: int, report: Callable[..., None]) -> None:
    """Losses of every unit of a text under one chunk of the conditions."""
    context, experiment = Context.open(root), Experiment.parse(raw)
    config, folder, name = experiment.config, experiment.folder(context), measured_name(text, chunk)
    conditions, sets = load_conditions(context, experiment, text)
    scene = open_scene(context, experiment)
    chosen = [conditions[i] for i in chunks(folder, text)[chunk]]
    pairs = [(c, edits_of(c, scene.readers, sets, config.mode, config.scale)) for c in chosen]
    windows, language, _ = text_of(context, config, text)
    found = measure(
        scene.base, scene.donor, windows, pairs, experiment.layers,
        special_ids=context.token_info.special_ids, batch=context.study.compute.lm_batch,
        other_W=other_windows(windows, language, seed_for(context.study, "other-text", text)), report=report,
    )  # fmt: skip
    context.store.begin(folder, name)
    save_losses(folder / f"{name}.npz", found)
    context.store.mark_done(folder, name, measure_key(context, experiment, text), {}, [f"{name}.npz"])


def load_losses(context: Context, experiment: Experiment, text: str) -> Measured:
    """All chunks of a text together, in the order of the plan's conditions.

    Raises:
        InputError: they are not those of the plan's conditions.
    """
    folder = experiment.folder(context)
    found = joined([read_losses(folder / f"{measured_name(text, i)}.npz") for i in range(len(chunks(folder, text)))])
    if len(found.nll) != (n := len(read_plan(folder)["texts"][text]["conditions"])):
        words = f"losses of {len(found.nll)} conditions on {text}, and the plan has {n}"
        raise InputError(f"{folder}: {words}: remove the folder and run again")
    return found
