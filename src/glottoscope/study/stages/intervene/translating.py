"""Translations of an experiment's conditions: the prompts, and greedy decoding of some conditions at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.atomic import atomic_path, write_table
from glottoscope.corpus.tokens import encoder
from glottoscope.errors import InputError
from glottoscope.intervention.conditions import Condition, added_norm, edits_of
from glottoscope.intervention.generation import greedy
from glottoscope.intervention.prompts import Prompts, build_prompts, cut_output, fit_prompts, stop_token_ids
from glottoscope.intervention.scores import Bleu, ChrF, ConceptRecall, ExactMatch, SentenceMetric
from glottoscope.study.config import PlantedCorpus, TextCorpus, Translation
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import TRANSLATED_CHUNK, Experiment, stored_signatures, translate_key
from glottoscope.study.stages.intervene.preparing import load_conditions, open_scene
from glottoscope.study.stages.intervene.sentences import Task, language_names, read_files, shots_of, tasks, tasks_of, template_of
from glottoscope.study.stages.tokenizing import load_run_tokenizer
from glottoscope.study.store import read_parquet


def check_translation(context: Context, translation: Translation) -> None:
    """Raise what is wrong with the template, the tokenizer of BLEU and, of text, with sentences and prompts; needs no result.

    Raises:
        InputError: as `tasks_of`, `Template`, `build_prompts` and `Bleu`.
    """
    template = template_of(context, translation)
    for language in context.study.languages[:2]:
        metrics(context, translation, language)
    if isinstance(corpus := context.study.corpus, PlantedCorpus):
        read_files(translation, (context.study.languages[0], context.study.languages[1]))
        wanted, have = shots_of(context, translation), corpus.aligned_pairs
        if not translation.files and wanted > have:
            raise InputError(f"translation needs {wanted} examples and has {have}: lower intervention.translation.shots")
        return  # its sentences are made later
    for task in tasks(context, translation):
        build_prompts(template, task.shots, [s for s, _ in task.pairs[:1]], instruction=task.instruction, **language_names(task))


PROMPTS = "prompts: "  # begins a note on all translations of a direction


class Asked(NamedTuple):
    """A task as the models see it."""

    prompts: Prompts
    stop_ids: set[int]  # end a translation and are not part of it
    last_ids: set[int]  # end it, and hold the text at which it is cut
    stop: str


def ask(context: Context, experiment: Experiment, task: Task, tokenizer: Any, max_length: int | None) -> Asked:
    """Prompts of a task, and what ends a translation.

    Raises:
        InputError: a prompt that does not fit the model; says which.
    """
    translation, info = experiment.config.translation, context.token_info
    assert translation is not None
    template = template_of(context, translation)
    corpus = context.study.corpus
    bos = None if isinstance(corpus, TextCorpus) and corpus.bos == "none" else info.bos_id
    prompts = fit_prompts(
        encoder(tokenizer), template, task.shots, [s for s, _ in task.pairs],
        instruction=task.instruction, bos_id=bos, max_length=max_length, new_tokens=longest(context, translation),
        **language_names(task),
    )  # fmt: skip
    # Words of the planted world have no spaces of their own; in real text the spaces of a stop are part of it.
    stop = (template.stop.strip() or template.stop) if isinstance(corpus, PlantedCorpus) else template.stop
    special = set(info.special_ids)
    return Asked(prompts, special, stop_token_ids(context.vocabulary.piece, stop) - special, template.stop)


def translated_conditions(context: Context, experiment: Experiment) -> list[int]:
    """Which of the plan's conditions are translated: everything at the chosen strength, and the first draws.

    Positions are not shuffled: while a sentence is written there is one position at a time. Draws come from all alive
    features only.
    """
    translation = experiment.config.translation
    assert translation is not None
    conditions, _ = load_conditions(context, experiment, "translation")

    def wanted(c: Condition) -> bool:
        if c.arm in ("baseline", "donor", "self", "reconstruction", "state", "state_replaced"):
            return True
        if c.arm == "part":
            return c.chosen
        drawn = translation.drawn is None or c.part in translation.drawn
        return c.arm == "random" and drawn and (c.draw or 0) < translation.draws

    return [i for i, c in enumerate(conditions) if wanted(c)]


def translated_chunks(context: Context, experiment: Experiment) -> list[list[int]]:
    chosen = translated_conditions(context, experiment)
    return [chosen[i : i + TRANSLATED_CHUNK] for i in range(0, len(chosen), TRANSLATED_CHUNK)]


def translated_name(task: str, chunk: int) -> str:
    return f"translation-{task}-{chunk:03d}"


def missing_translations(context: Context, experiment: Experiment) -> list[tuple[str, int]]:
    """(direction, chunk) that are not translated yet with these settings."""
    if experiment.config.translation is None:
        return []
    folder, key = experiment.folder(context), translate_key(context, experiment)
    n, stored = len(translated_chunks(context, experiment)), stored_signatures(context, experiment)
    result = []
    for task in tasks_of(context, experiment):
        direction, today = f"{task.source}-{task.target}", signatures(context, experiment, task)
        names = [translated_name(direction, i) for i in range(n)]
        done = [context.store.is_done(folder, name, key) and stored.get(name) == today for name in names]
        result += [(direction, i) for i, there in enumerate(done) if not there]
    return result


def translate_chunk(root: str, raw: dict[str, Any], direction: str, chunk: int, report: Callable[..., None]) -> None:
    """Translations of one chunk of the conditions (condition, pair, text), and their scores.

    What was translated with these settings and scored otherwise (by another version, or by another tokenizer of BLEU) is
    only scored again.
    """
    context, experiment = Context.open(root), Experiment.parse(raw)
    folder, name, key = experiment.folder(context), translated_name(direction, chunk), translate_key(context, experiment)
    task = next(t for t in tasks_of(context, experiment) if f"{t.source}-{t.target}" == direction)
    chosen = translated_chunks(context, experiment)[chunk]
    if context.store.is_done(folder, name, key):
        found = _stored(context, folder, name)
    else:
        found = _translated(context, experiment, task, chosen, report)
    context.store.begin(folder, name)
    # Counting n-grams takes a while: done here, where the conditions are spread over the workers.
    statistics = scored(context, experiment, task, [[t for c, _, t in found.rows if c == i] for i in chosen])
    with atomic_path(folder / f"{name}.npz") as temporary, open(temporary, "wb") as handle:
        np.savez(handle, added_norm=found.norms, **statistics)  # pyright: ignore[reportArgumentType]
    columns = list(zip(*found.rows, strict=True))
    table = pa.table({"condition": pa.array(columns[0], pa.int64()), "pair": pa.array(columns[1], pa.int64()), "text": columns[2]})
    write_table(folder / f"{name}.parquet", table)
    settings = {"dropped_shots": found.dropped, "signatures": signatures(context, experiment, task)}
    context.store.mark_done(folder, name, key, settings, [f"{name}.parquet", f"{name}.npz"])


class _Found(NamedTuple):
    rows: list[tuple[int, int, str]]  # condition, pair, text
    norms: NDArray[np.float64]  # by condition
    dropped: int  # examples that did not fit


def _stored(context: Context, folder: Path, name: str) -> _Found:
    columns = read_parquet(folder / f"{name}.parquet").select(["condition", "pair", "text"]).to_pydict().values()
    with np.load(folder / f"{name}.npz") as arrays:
        norms = arrays["added_norm"]
    dropped = context.store.done(folder)[name]["settings"]["dropped_shots"]
    return _Found(list(zip(*columns, strict=True)), norms, dropped)


def _translated(context: Context, experiment: Experiment, task: Task, chosen: list[int], report: Callable[..., None]) -> _Found:
    config = experiment.config
    assert config.translation is not None
    conditions, sets = load_conditions(context, experiment, "translation")
    scene, tokenizer = open_scene(context, experiment), load_run_tokenizer(context)
    asked = ask(context, experiment, task, tokenizer, _positions(scene.base))
    decode, planted = _decoder(context, tokenizer, asked.stop), isinstance(context.study.corpus, PlantedCorpus)
    rows: list[tuple[int, int, str]] = []
    norms: list[float] = []
    for n, i in enumerate(chosen):
        condition = conditions[i]
        edits = edits_of(condition, scene.readers, sets, config.mode, config.scale)
        found = greedy(
            scene.donor if condition.arm == "donor" else scene.base, asked.prompts.prefix, asked.prompts.rows,
            asked.prompts.length, max_new_tokens=longest(context, config.translation), stop_ids=asked.stop_ids,
            last_ids=asked.last_ids, batch=config.translation.batch or (250 if planted else 64),
            edits=edits, donor=scene.donor, special_ids=context.token_info.special_ids,
            report=lambda done, total, _words, n=n: report(n + done / total, len(chosen), "conditions"),
        )  # fmt: skip
        rows += [(i, p, decode(ids)) for p, ids in enumerate(found)]
        norm = added_norm(list(edits.values()))
        norms.append(np.nan if norm is None else norm)
    return _Found(rows, np.array(norms), asked.prompts.dropped)


def metrics_of(context: Context, experiment: Experiment, task: Task) -> list[SentenceMetric[Any]]:
    """The scores of a direction; on the planted world words are what its tokens are, and concepts are known."""
    assert experiment.config.translation is not None
    return metrics(context, experiment.config.translation, task.target)


def signatures(context: Context, experiment: Experiment, task: Task) -> dict[str, str]:
    """Metric -> what computes it here and now."""
    return {metric.name: metric.signature for metric in metrics_of(context, experiment, task)}


def metrics(context: Context, translation: Translation, target: str) -> list[SentenceMetric[Any]]:
    """The scores of translations into a language."""
    planted = isinstance(context.study.corpus, PlantedCorpus)
    tokenize = "none" if planted and translation.bleu_tokenize == "auto" else translation.bleu_tokenize
    found: list[SentenceMetric[Any]] = [ChrF(), Bleu(target, tokenize), ExactMatch()]
    return [*found, ConceptRecall()] if planted else found


def scored(context: Context, experiment: Experiment, task: Task, outputs: list[list[str]]) -> dict[str, NDArray[np.int64]]:
    """Metric -> sums per condition and sentence [S, P, C]. A text that several conditions give is counted once."""
    references = [reference for _, reference in task.pairs]
    numbers: dict[tuple[int, str], int] = {}
    place = np.array([[numbers.setdefault((p, t), len(numbers)) for p, t in enumerate(texts)] for texts in outputs])
    different = [text for _, text in numbers]
    against = [references[p] for p, _ in numbers]
    result = {}
    for metric in metrics_of(context, experiment, task):
        if metric.name == ConceptRecall.name:
            concepts = concept_reader(context)
            sums = metric.statistics([concepts(t) for t in different], [concepts(t) for t in against])
        else:
            sums = metric.statistics(different, against)
        result[metric.name] = np.asarray(sums)[place]
    return result


def concept_reader(context: Context) -> Callable[[str], list[int]]:
    """Concepts of a planted text's words, in order."""
    concept = context.vocabulary.concept
    assert concept is not None
    of_word = {word.strip(): int(c) for word, c in zip(context.vocabulary.text, concept, strict=True) if c >= 0}
    return lambda text: [of_word[word] for word in text.split() if word in of_word]


def longest(context: Context, translation: Translation) -> int:
    """Tokens of the longest translation."""
    # The planted world's longest sentence has 11 words, and the separator ends it.
    return translation.max_new_tokens or (12 if isinstance(context.study.corpus, PlantedCorpus) else 128)


def _positions(model: Any) -> int | None:
    """Positions the model knows; one with rotary embeddings goes on beyond them badly, so they are a limit, too."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _decoder(context: Context, tokenizer: Any, stop: str) -> Callable[[list[int]], str]:
    """From generated ids to the translation; the planted world's words have no spaces of their own."""
    if isinstance(context.study.corpus, PlantedCorpus):
        world = context.world()
        # A stop may begin with the space that the first word lacks.
        return lambda ids: cut_output(" " + world.text(np.array(ids, np.int64)), stop)
    return lambda ids: cut_output(tokenizer.decode(ids, skip_special_tokens=True), stop)


class Statistics(NamedTuple):
    """What was found in one direction, as `translated_conditions` orders the conditions."""

    sums: dict[str, NDArray[Any]]  # metric -> [S, P, C], sums per condition and sentence
    added_norm: NDArray[np.float64]  # [S]
    signatures: dict[str, str]  # metric -> what computed the sums
    dropped_shots: int


def load_statistics(context: Context, experiment: Experiment, direction: str) -> Statistics:
    """All chunks of a direction together.

    Raises:
        InputError: they are not those of the plan's conditions, or were not scored alike.
    """
    folder, wanted = experiment.folder(context), translated_conditions(context, experiment)
    names = [translated_name(direction, i) for i in range(len(translated_chunks(context, experiment)))]
    arrays: dict[str, list[NDArray[Any]]] = {}
    for name in names:
        with np.load(folder / f"{name}.npz") as part:
            for key in part.files:
                arrays.setdefault(key, []).append(part[key])
    sums = {key: np.concatenate(found) for key, found in arrays.items()}
    if any(len(found) != len(wanted) for found in sums.values()):
        raise InputError(
            f"{folder}: translations {direction} are not of the {len(wanted)} conditions of its plan: remove it and run again"
        )
    first, *others = [context.store.done(folder)[name]["settings"] for name in names]
    if any(other != first for other in others):
        raise InputError(f"{folder}: translations {direction} were not scored alike ({first}; {others}): remove it and run again")
    return Statistics(sums, sums.pop("added_norm"), first["signatures"], first["dropped_shots"])


def dropped_words(dropped: int, shots: int) -> str | None:
    """What to say of examples that did not fit; None where all did."""
    if not dropped:
        return None
    return f"{PROMPTS}{dropped} of {shots} examples left out, with which the longest sentence does not fit the model"


def load_translations(context: Context, experiment: Experiment, direction: str) -> dict[int, list[str]]:
    """Condition -> texts in the order of the pairs."""
    folder = experiment.folder(context)
    result: dict[int, list[str]] = {}
    for i in range(len(translated_chunks(context, experiment))):
        table = read_parquet(folder / f"{translated_name(direction, i)}.parquet")
        for condition, text in zip(table["condition"].to_pylist(), table["text"].to_pylist(), strict=True):
            result.setdefault(condition, []).append(text)
    return result
