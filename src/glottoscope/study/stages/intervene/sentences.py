"""What is translated: sentences in both directions, the examples before them, and the template of a prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.corpus.llm_jp_eval import read_translation, shots_file
from glottoscope.corpus.readers import AlignedPair, read_aligned
from glottoscope.corpus.tokens import read_aligned_tokens
from glottoscope.errors import InputError
from glottoscope.intervention.prompts import Template
from glottoscope.study.config import LANGUAGE_NAMES, PlantedCorpus, TextCorpus, Translation
from glottoscope.study.load import corpus_path
from glottoscope.study.stages.context import Context, _hash_tree
from glottoscope.study.stages.intervene.experiments import Experiment
from glottoscope.study.stages.tokenizing import aligned_pairs


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
    assert experiment.config.translation is not None
    return tasks(context, experiment.config.translation)


def tasks(context: Context, translation: Translation) -> list[Task]:
    """`tasks_of` of settings; of text they need no result of the study."""
    wanted = shots_of(context, translation)
    a, b = context.study.languages[:2]
    given, instructions = read_files(translation, (a, b))
    if not translation.files:
        given = _both_ways(_aligned(context, "test"), (a, b))
    result = []
    for (source, target), (rows, shots) in given.items():
        if not shots and wanted:
            dev = _aligned(context, "dev")
            side = (0, 1) if source == a else (1, 0)
            # Of different articles where there are enough, so that the examples are not one text.
            shots = [(p.texts[side[0]], p.texts[side[1]]) for p in _spread(dev, wanted)]
        if len(shots) < wanted:
            raise InputError(
                f"translation needs {wanted} examples and has {len(shots)}: "
                "give corpus.aligned.dev, or lower intervention.translation.shots"
            )
        rows = rows[: translation.pairs]
        _, article = np.unique([r[2] for r in rows], return_inverse=True)
        pairs, instruction = [(s, t) for s, t, _ in rows], instructions.get((source, target))
        result.append(Task(source, target, pairs, article.astype(np.int64), shots[:wanted], instruction))
    return result


def read_files(translation: Translation, languages: tuple[str, str]) -> tuple[Given, dict[tuple[str, str], str | None]]:
    """Sentences and examples of the given files, and their instructions, by (source, target).

    Raises:
        InputError: a file that cannot be read, a direction that is given twice or is not between the two languages.
    """
    a, b = languages
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
    for source, target in given:
        if (source, target) not in ((a, b), (b, a)):
            raise InputError(f"translation from {source} to {target}: the study's languages are {a} and {b}")
    return given, instructions


def shots_of(context: Context, translation: Translation) -> int:
    """Examples in a prompt."""
    if translation.shots is not None:
        return translation.shots
    return 2 if isinstance(context.study.corpus, PlantedCorpus) else 4


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
    """Aligned sentences as text; the planted world's from its tokens.

    Raises:
        InputError: the file is no longer the one that the run has read.
    """
    corpus = context.study.corpus
    if isinstance(corpus, TextCorpus):
        _check_unchanged(context, corpus, which)
        return aligned_pairs(corpus, which)
    aligned, words = read_aligned_tokens(context.store.aligned_dir, which), context.world()
    texts = [
        [words.text(row[1:length]) for row, length in zip(side, lengths, strict=True)]
        for side, lengths in zip(aligned.tokens, aligned.length, strict=True)
    ]
    return [AlignedPair(i, str(g), pair) for i, g, pair in zip(aligned.ids, aligned.article, zip(*texts, strict=True), strict=True)]


def _check_unchanged(context: Context, corpus: TextCorpus, which: str) -> None:
    # Tokens, classes and keys are those of the file as the run read it: another text would be translated under their name.
    name = getattr(corpus.aligned, which) if corpus.aligned is not None else None
    if name is None or not context.recorded:
        return
    path = corpus_path(corpus, name)
    if _hash_tree(path) != context.source_hashes[name]:
        raise InputError(f"{path}: is not the file that the run has read: put it back, or `glottoscope run` the study again")


def template_of(context: Context, translation: Translation) -> Template:
    """The study's template, or the default of its corpus."""
    if isinstance(context.study.corpus, PlantedCorpus):
        shot, query, stop = "{source} <sep> {target} <sep> ", "{source} <sep>", " <sep>"
    else:
        shot, query, stop = "{source_name}: {source}\n{target_name}: {target}\n\n", "{source_name}: {source}\n{target_name}:", "\n"
    return Template(translation.shot or shot, translation.query or query, translation.stop or stop, translation.intro)


def language_names(task: Task) -> dict[str, Any]:
    """The languages as a prompt calls them."""
    names = {"source_name": task.source, "target_name": task.target}
    return {field: LANGUAGE_NAMES.get(code, code) for field, code in names.items()}
