"""Translations of an experiment's conditions: the sentences, the prompts, and greedy decoding of some conditions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.atomic import atomic_path, write_table
from glottoscope.corpus.llm_jp_eval import read_translation, shots_file
from glottoscope.corpus.readers import AlignedPair, read_aligned
from glottoscope.corpus.tokens import encoder, read_aligned_tokens
from glottoscope.errors import InputError
from glottoscope.intervention.conditions import Condition, added_norm, edits_of
from glottoscope.intervention.generation import greedy
from glottoscope.intervention.prompts import Prompts, Template, cut_output, fit_prompts, stop_token_ids
from glottoscope.intervention.scores import Bleu, ChrF, ConceptRecall, ExactMatch, SentenceMetric
from glottoscope.study.config import LANGUAGE_NAMES, PlantedCorpus, TextCorpus, Translation
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import TRANSLATED_CHUNK, Experiment, translate_key
from glottoscope.study.stages.intervene.preparing import load_conditions, open_scene
from glottoscope.study.stages.tokenizing import aligned_pairs, load_run_tokenizer
from glottoscope.study.store import read_parquet


class Task(NamedTuple):
    """Sentences to translate in one direction."""

    source: str
    target: str
    pairs: list[tuple[str, str]]
    article: NDArray[np.int64]  # what a bootstrap resamples
    shots: list[tuple[str, str]]
    instruction: str | None  # of a file that has one


# (source, target) -> (source text, target text, article) of each pair, and examples where the file has some
Given = dict[tuple[str, str], tuple[list[tuple[str, str, str]], list[tuple[str, str]]]]


def tasks_of(context: Context, experiment: Experiment) -> list[Task]:
    """Both directions between the first two languages, with their sentences and examples.

    Raises:
        InputError: sentences without a direction, or none; from the readers.
    """
    translation = experiment.config.translation
    assert translation is not None
    a, b = context.study.languages[:2]
    given: Given = {}
    instructions: dict[tuple[str, str], str | None] = {}
    for path in translation.files:
        if path.endswith(".json"):
            found, beside = read_translation(path), shots_file(path)
            shots = read_translation(beside).pairs if not found.shots and beside is not None else found.shots
            rows = [(s, t, str(i)) for i, (s, t) in enumerate(found.pairs)]  # its samples name no article
            instructions[found.direction] = found.instruction
            more = {found.direction: (rows, shots)}
        else:
            more = _both_ways(read_aligned(path, languages=(a, b), limit=translation.pairs), (a, b))
        if twice := [way for way in more if way in given]:
            raise InputError(
                f"{path}: there is another file with sentences from {twice[0][0]} to {twice[0][1]} in "
                "intervention.translation.files: give one for each direction"
            )
        given |= more
    if not translation.files:
        given = _both_ways(_aligned(context, "test"), (a, b))
    tasks = []
    for (source, target), (rows, shots) in given.items():
        if (source, target) not in ((a, b), (b, a)):
            raise InputError(f"translation from {source} to {target}: the study's languages are {a} and {b}")
        if not shots and translation.shots:
            dev = _aligned(context, "dev")
            side = (0, 1) if source == a else (1, 0)
            # Of different articles where there are enough, so that the examples are not one text.
            shots = [(p.texts[side[0]], p.texts[side[1]]) for p in _spread(dev, translation.shots)]
        if len(shots) < translation.shots:
            raise InputError(
                f"translation needs {translation.shots} examples and has {len(shots)}: "
                "give corpus.aligned.dev, or lower intervention.translation.shots"
            )
        rows = rows[: translation.pairs]
        _, article = np.unique([r[2] for r in rows], return_inverse=True)
        pairs, instruction = [(s, t) for s, t, _ in rows], instructions.get((source, target))
        tasks.append(Task(source, target, pairs, article.astype(np.int64), shots[: translation.shots], instruction))
    return tasks


def _both_ways(pairs: list[AlignedPair], languages: tuple[str, str]) -> Given:
    a, b = languages
    if not pairs:
        raise InputError("there are no sentences to translate: give intervention.translation.files or corpus.aligned.test")
    return {
        (source, target): ([(p.texts[i], p.texts[j], p.article) for p in pairs], [])
        for source, target, i, j in ((a, b, 0, 1), (b, a, 1, 0))
    }


def _spread(pairs: list[AlignedPair], n: int) -> list[AlignedPair]:
    first = list({p.article: p for p in reversed(pairs)}.values())[::-1]
    return first[:n] if len(first) >= n else pairs[:n]


def _aligned(context: Context, which: str) -> list[AlignedPair]:
    """Aligned sentences as text; the planted world's from its tokens."""
    if which not in context.token_info.aligned:
        return []
    if isinstance(context.study.corpus, TextCorpus):
        return aligned_pairs(context.study.corpus, which)
    aligned, words = read_aligned_tokens(context.store.aligned_dir, which), context.world()
    texts = [
        [words.text(row[1:length]) for row, length in zip(side, lengths, strict=True)]
        for side, lengths in zip(aligned.tokens, aligned.length, strict=True)
    ]
    return [AlignedPair(i, str(g), pair) for i, g, pair in zip(aligned.ids, aligned.article, zip(*texts, strict=True), strict=True)]


def template_of(context: Context, experiment: Experiment) -> Template:
    """The study's template, or the default of its corpus."""
    translation = experiment.config.translation
    assert translation is not None
    if isinstance(context.study.corpus, PlantedCorpus):
        shot, query, stop = "{source} <sep> {target} <sep> ", "{source} <sep>", " <sep>"
    else:
        shot, query, stop = "{source_name}: {source}\n{target_name}: {target}\n\n", "{source_name}: {source}\n{target_name}:", "\n"
    return Template(translation.shot or shot, translation.query or query, translation.stop or stop, translation.intro)


class Asked(NamedTuple):
    """A task as the models see it."""

    prompts: Prompts
    stop_ids: set[int]
    stop: str


def ask(context: Context, experiment: Experiment, task: Task, tokenizer: Any, max_length: int | None) -> Asked:
    """Prompts of a task, and what ends a translation.

    Raises:
        InputError: a prompt that does not fit the model; says which.
    """
    translation, template, info = experiment.config.translation, template_of(context, experiment), context.token_info
    assert translation is not None
    corpus = context.study.corpus
    bos = None if isinstance(corpus, TextCorpus) and corpus.bos == "none" else info.bos_id
    prompts = fit_prompts(
        encoder(tokenizer), template, task.shots, [s for s, _ in task.pairs],
        source_name=LANGUAGE_NAMES.get(task.source, task.source), target_name=LANGUAGE_NAMES.get(task.target, task.target),
        instruction=task.instruction, bos_id=bos, max_length=max_length, new_tokens=longest(context, translation),
    )  # fmt: skip
    pieces = context.vocabulary.piece
    ends = stop_token_ids(pieces, template.stop) | stop_token_ids(pieces, template.stop.strip() or template.stop)
    return Asked(prompts, ends | set(info.special_ids), template.stop)


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


def directions(context: Context, experiment: Experiment) -> list[str]:
    return [f"{t.source}-{t.target}" for t in tasks_of(context, experiment)]


def missing_translations(context: Context, experiment: Experiment) -> list[tuple[str, int]]:
    """(direction, chunk) that are not translated yet with these settings."""
    if experiment.config.translation is None:
        return []
    folder, key = experiment.folder(context), translate_key(context, experiment)
    n = len(translated_chunks(context, experiment))
    return [
        (direction, i)
        for direction in directions(context, experiment)
        for i in range(n)
        if not context.store.is_done(folder, translated_name(direction, i), key)
    ]


def translate_chunk(root: str, raw: dict[str, Any], direction: str, chunk: int, report: Callable[..., None]) -> None:
    """Translations of one chunk of the conditions: condition, pair, text."""
    context, experiment = Context.open(root), Experiment.parse(raw)
    config, folder, name = experiment.config, experiment.folder(context), translated_name(direction, chunk)
    assert config.translation is not None
    task = next(t for t in tasks_of(context, experiment) if f"{t.source}-{t.target}" == direction)
    conditions, sets = load_conditions(context, experiment, "translation")
    scene, tokenizer = open_scene(context, experiment), load_run_tokenizer(context)
    asked = ask(context, experiment, task, tokenizer, _positions(scene.base))
    decode, planted = _decoder(context, tokenizer, asked.stop), isinstance(context.study.corpus, PlantedCorpus)
    rows: list[tuple[int, int, str]] = []
    norms: list[float] = []
    chosen = translated_chunks(context, experiment)[chunk]
    for n, i in enumerate(chosen):
        condition = conditions[i]
        edits = edits_of(condition, scene.readers, sets, config.mode, config.scale)
        found = greedy(
            scene.donor if condition.arm == "donor" else scene.base, asked.prompts.prefix, asked.prompts.rows,
            asked.prompts.length, max_new_tokens=longest(context, config.translation), stop_ids=asked.stop_ids,
            batch=config.translation.batch or (250 if planted else 64),
            edits=edits, donor=scene.donor, special_ids=context.token_info.special_ids,
            report=lambda done, total, _words, n=n: report(n + done / total, len(chosen), "conditions"),
        )  # fmt: skip
        rows += [(i, p, decode(ids)) for p, ids in enumerate(found)]
        norm = added_norm(list(edits.values()))
        norms.append(np.nan if norm is None else norm)
    context.store.begin(folder, name)
    # Counting n-grams takes a while: done here, where the conditions are spread over the workers.
    statistics = scored(context, experiment, task, [[t for c, _, t in rows if c == i] for i in chosen])
    with atomic_path(folder / f"{name}.npz") as temporary, open(temporary, "wb") as handle:
        np.savez(handle, added_norm=np.array(norms), **statistics)  # pyright: ignore[reportArgumentType]
    columns = list(zip(*rows, strict=True))
    table = pa.table({"condition": pa.array(columns[0], pa.int64()), "pair": pa.array(columns[1], pa.int64()), "text": columns[2]})
    write_table(folder / f"{name}.parquet", table)
    context.store.mark_done(
        folder,
        name,
        translate_key(context, experiment),
        {"dropped_shots": asked.prompts.dropped},
        [f"{name}.parquet", f"{name}.npz"],
    )


def metrics_of(context: Context, experiment: Experiment, task: Task) -> list[SentenceMetric[Any]]:
    """The scores of a direction; on the planted world words are what its tokens are, and concepts are known."""
    translation = experiment.config.translation
    assert translation is not None
    planted = isinstance(context.study.corpus, PlantedCorpus)
    tokenize = "none" if planted and translation.bleu_tokenize == "auto" else translation.bleu_tokenize
    found: list[SentenceMetric[Any]] = [ChrF(), Bleu(task.target, tokenize), ExactMatch()]
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
    return translation.max_new_tokens or (16 if isinstance(context.study.corpus, PlantedCorpus) else 128)


def _positions(model: Any) -> int | None:
    """Positions the model knows; one with rotary embeddings goes on beyond them badly, so they are a limit, too."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _decoder(context: Context, tokenizer: Any, stop: str) -> Callable[[list[int]], str]:
    """From generated ids to the translation; the planted world's words have no spaces of their own."""
    if isinstance(context.study.corpus, PlantedCorpus):
        world = context.world()
        return lambda ids: cut_output(world.text(np.array(ids, np.int64)), stop)
    return lambda ids: cut_output(tokenizer.decode(ids, skip_special_tokens=True), stop)


def load_statistics(context: Context, experiment: Experiment, direction: str) -> dict[str, NDArray[Any]]:
    """Metric -> sums per condition and sentence [S, P, C], and added_norm [S], as `translated_conditions` orders them."""
    folder, n = experiment.folder(context), len(translated_chunks(context, experiment))
    parts = [np.load(folder / f"{translated_name(direction, i)}.npz") for i in range(n)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}


def load_translations(context: Context, experiment: Experiment, direction: str) -> dict[int, list[str]]:
    """Condition -> texts in the order of the pairs."""
    folder = experiment.folder(context)
    result: dict[int, list[str]] = {}
    for i in range(len(translated_chunks(context, experiment))):
        table = read_parquet(folder / f"{translated_name(direction, i)}.parquet")
        for condition, text in zip(table["condition"].to_pylist(), table["text"].to_pylist(), strict=True):
            result.setdefault(condition, []).append(text)
    return result
