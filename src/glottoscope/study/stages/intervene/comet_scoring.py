"""COMET of an experiment's translations, in COMET's own environment; each different output is scored once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from glottoscope.atomic import write_json, write_table
from glottoscope.intervention import comet
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import Experiment, comet_key
from glottoscope.study.stages.intervene.sentences import tasks_of
from glottoscope.study.stages.intervene.translating import load_translations

SCHEMA = pa.schema([("direction", pa.string()), ("condition", pa.int64()), ("pair", pa.int64()), ("score", pa.float64())])


def score_comet(
    context: Context, experiment: Experiment, model: Path, environment: Path | None, gpus: int, batch_size: int, console: Console
) -> None:
    """Write comet.parquet (direction, condition, pair, score) and comet.json, which says what scored; nothing where both
    are there for this model and these translations.

    Raises:
        InputError: COMET cannot be run; says what to do.
    """
    folder, fingerprint = experiment.folder(context), comet.fingerprint(model)
    key = comet_key(context, experiment, fingerprint)
    if context.store.is_done(folder, "comet", key):
        return
    rows: list[tuple[str, int, int]] = []
    wanted: dict[tuple[str, str, str], int] = {}
    places: list[int] = []
    for task in tasks_of(context, experiment):
        direction = f"{task.source}-{task.target}"
        for condition, texts in load_translations(context, experiment, direction).items():
            for pair, (text, (source, reference)) in enumerate(zip(texts, task.pairs, strict=True)):
                rows.append((direction, condition, pair))
                places.append(wanted.setdefault((source, text, reference), len(wanted)))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"COMET {experiment.title}", total=len(wanted))
        sources, outputs, references = (list(x) for x in zip(*wanted, strict=True))
        scores = comet.score(
            model, sources, outputs, references, environment=environment, batch_size=batch_size, gpus=gpus,
            report=lambda done, _total: progress.update(bar, completed=done),
        )  # fmt: skip
    columns = list(zip(*rows, strict=True))
    table = pa.table([*columns, [scores[i] for i in places]], schema=SCHEMA)
    context.store.begin(folder, "comet")
    write_table(folder / "comet.parquet", table)
    about = {"model": model.name, "fingerprint": fingerprint, "versions": comet.versions(environment)}
    write_json(folder / "comet.json", {"key": key, **about})
    context.store.mark_done(folder, "comet", key, about, ["comet.parquet", "comet.json"])
