"""The time of a study by stage, from the amounts of work its units do and the rates of a machine. Pure: no torch."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from glottoscope.study.config import InterventionConfig, PlantedCorpus, PretrainModel, Study
from glottoscope.study.plan import ModelRun, Room, choosing_cells, groups_of, parts_of, split_layers, split_tokens
from glottoscope.study.rates import Rates, collect_work, forward_work, pretrain_work, sae_work

TIMED = ("pretrain", "train", "features", "score", "intervene")
# Measured once, on two cores of a virtual machine (docs/guide.md, "Planning"): what no FLOPs are counted for.
SCORE_FEATURE_S = 3e-4  # a feature of one setup, its ruler included
UNIT_S = 0.3  # a unit's own: opening the study, loading weights, writing
PLANTED_SENTENCE, TEXT_SENTENCE = 10, 40  # tokens of an aligned sentence, about
PAIRS = 1000  # of aligned sentences, where only their file knows
BOTTOM = 0.5  # the lower blocks are read once for many conditions: the middle layer leaves half


@dataclass(frozen=True)
class Units:
    """Units of one stage of one model that take about as long."""

    stage: str
    model: str
    count: int
    seconds: float  # each


class Wave(NamedTuple):
    """Cells of one model that are at work in one wave of a stage, and the layer groups of each: units of the run."""

    stage: str
    run: ModelRun
    chooses: bool  # of training: tries every learning rate
    cells: int
    groups: list[tuple[int, ...]]


def waves(study: Study, runs: Sequence[ModelRun], memory: float | Room, workers: int) -> Iterator[Wave]:
    """Training and features as a run from nothing makes their units, of models whose size is known.

    Raises:
        InputError: not even one layer fits.
    """
    known = [(run, choosing_cells(study, run), groups_of(study, run, memory)) for run in runs if run.shape and run.layers]
    for stage, chooses in (("train", True), ("train", False), ("features", None)):
        wave = [
            (run, n, groups)
            for run, choosing, groups in known
            if (n := {True: choosing, False: len(run.checkpoints) - choosing, None: len(run.checkpoints)}[chooses])
        ]
        parts = parts_of(sum(n * len(groups) for _, n, groups in wave), workers)
        for run, n, groups in wave:
            yield Wave(stage, run, bool(chooses), n, [part for group in groups for part in split_layers(group, parts)])


def times(study: Study, runs: Sequence[ModelRun], rates: Rates, memory: float | Room, workers: int) -> list[Units]:
    """Units of every timed stage with their seconds on one worker; models of unknown size are left out."""
    known = [r for r in runs if r.shape is not None and r.layers is not None]
    found: list[Units] = []
    for run in known:
        found += _of_model(study, run, rates)
    for wave in waves(study, known, memory, workers):
        found += _of_wave(study, wave, rates)
    if study.intervention is not None and known:
        found += _interventions(study, study.intervention, known, rates)
    return found


def _of_model(study: Study, run: ModelRun, rates: Rates) -> Iterable[Units]:
    shape, layers, sae = run.shape, run.known_layers(), study.sae
    assert shape is not None
    if isinstance(run.spec, PretrainModel) and run.lm == run.name:
        tokens = run.spec.steps * run.spec.batch_size * study.corpus.context_length
        yield Units("pretrain", run.name, 1, UNIT_S + tokens * rates.seconds("pretrain", pretrain_work(shape)))
    n = sae.n_features(shape.d_model)
    yield Units("score", run.name, len(layers), len(run.checkpoints) * len(sae.seeds) * n * SCORE_FEATURE_S)


def _of_wave(study: Study, wave: Wave, rates: Rates) -> Iterable[Units]:
    run, sae = wave.run, study.sae
    shape = run.shape
    assert shape is not None
    d, n = shape.d_model, sae.n_features(shape.d_model)
    forward = rates.seconds("forward", forward_work(shape))
    step, collect = rates.seconds("sae", sae_work(d, n, sae.k)), rates.seconds("collect", collect_work(d, n, sae.k))
    positions, seeds = sae.n_steps * sae.batch_tokens, len(sae.seeds)
    if wave.stage == "train":
        epoch = split_tokens(study, "train")
        read = min(positions, epoch) if epoch is not None and epoch <= sae.buffer_tokens else positions
        validation = split_tokens(study, "validation") or positions // 10
        trainers = seeds * (len(sae.lr) if wave.chooses else 1)
        lm, layer = (read + validation) * forward, trainers * (positions * step + validation * collect)
    else:
        test, aligned = split_tokens(study, "test") or positions // 10, _aligned_tokens(study)
        # A second pass over the text for the examples, where codes are too many to be kept.
        again = 1 if test * sae.k * 12 * len(run.known_layers()) * seeds <= 256 * 2**20 else 2
        lm, layer = (again * test + aligned) * forward, seeds * (again * test + aligned) * collect
    for size, count in Counter(map(len, wave.groups)).items():
        yield Units(wave.stage, run.name, wave.cells * count, UNIT_S + lm + size * layer)


def _aligned_tokens(study: Study) -> int:
    corpus = study.corpus
    if isinstance(corpus, PlantedCorpus):
        return 2 * corpus.aligned_pairs * PLANTED_SENTENCE
    if corpus.aligned is None or corpus.aligned.test is None:
        return 0
    return 2 * (corpus.aligned.limit or PAIRS) * min(TEXT_SENTENCE, corpus.aligned.max_length)


def conditions(study: Study, config: InterventionConfig) -> int:
    """How often a text is read in one experiment: arms, parts, strengths and draws from two pools."""
    pairs = isinstance(study.corpus, PlantedCorpus) or _aligned_tokens(study) > 0
    default = [*study.languages, "mixed", *(["bilingual"] if pairs else []), "bilingual_paper", "all", *config.features]
    parts = list(dict.fromkeys(config.parts or default))
    drawn = sum(p != "all" for p in parts)
    return 6 + len(parts) * (len(config.alphas) + 2) + 2 * config.draws * drawn


def _interventions(study: Study, config: InterventionConfig, runs: Sequence[ModelRun], rates: Rates) -> Iterable[Units]:
    names = config.models or (max((r for r in runs if r.control == "none"), key=_size, default=runs[0]).name,)
    n_bases = 1 if config.bases == "half" else len(config.bases)
    for run in (r for r in runs if r.name in names):
        assert run.shape is not None
        layers = run.known_layers() if config.layers != "middle" else (run.middle_layer,)
        wanted = [x for x in layers if config.layers == "middle" or x in config.layers]
        experiments = n_bases * (1 if config.together or config.layers == "middle" else len(wanted))
        documents = min(config.tokens, split_tokens(study, "test") or config.tokens)
        sentences = min(config.tokens, _aligned_tokens(study))
        tokens = sum({"documents": documents, "sentences": sentences}[t] for t in config.texts)
        head = 2.0 * run.shape.vocab_size * run.shape.d_model
        work = BOTTOM * forward_work(run.shape) + head
        seconds = conditions(study, config) * tokens * rates.seconds("forward", work)
        chunks = max(1, conditions(study, config) // 96) * len(config.texts) * experiments
        yield Units("intervene", run.name, chunks, UNIT_S + experiments * seconds / chunks)


def _size(run: ModelRun) -> int:
    return run.shape.n_params if run.shape is not None else 0


def makespan(units: Sequence[Units], workers: int) -> float:
    """Seconds until workers that take the longest unit first are done with all of them."""
    ends = [0.0] * max(1, workers)
    for seconds in sorted((u.seconds for u in units for _ in range(u.count)), reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def total(units: Sequence[Units], workers: int) -> float:
    """Seconds of all stages, one after another."""
    return sum(makespan([u for u in units if u.stage == stage], workers) for stage in TIMED)
