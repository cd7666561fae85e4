"""The time of a study by stage, from the amounts of work its units do and the rates of a machine. Pure: no torch."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glottoscope.study.config import InterventionConfig, PlantedCorpus, PretrainModel, Study
from glottoscope.study.plan import ModelRun, layer_groups, lm_memory, split_tokens
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


def times(study: Study, runs: Sequence[ModelRun], rates: Rates, memory: float, workers: int) -> list[Units]:
    """Units of every timed stage with their seconds on one worker; models of unknown size are left out."""
    known = [r for r in runs if r.shape is not None and r.layers is not None]
    found: list[Units] = []
    for run in known:
        found += _of_model(study, run, rates, memory, workers)
    if study.intervention is not None and known:
        found += _interventions(study, study.intervention, known, rates, workers)
    return found


def _of_model(study: Study, run: ModelRun, rates: Rates, memory: float, workers: int) -> Iterable[Units]:
    shape, layers, sae = run.shape, run.known_layers(), study.sae
    assert shape is not None
    if isinstance(run.spec, PretrainModel) and run.lm == run.name:
        tokens = run.spec.steps * run.spec.batch_size * study.corpus.context_length
        yield Units("pretrain", run.name, 1, UNIT_S + tokens * rates.seconds("pretrain", pretrain_work(shape)))
    d, n = shape.d_model, sae.n_features(shape.d_model)
    forward = rates.seconds("forward", forward_work(shape))
    step, collect = rates.seconds("sae", sae_work(d, n, sae.k)), rates.seconds("collect", collect_work(d, n, sae.k))
    groups = layer_groups(layers, d, lm_memory(study, shape, len(layers)), sae, memory)
    n_cells, n_groups = len(run.checkpoints), len(groups)
    positions = sae.n_steps * sae.batch_tokens
    epoch = split_tokens(study, "train")
    read = min(positions, epoch) if epoch is not None and epoch <= sae.buffer_tokens else positions
    validation = split_tokens(study, "validation") or positions // 10
    rates_tried = len(sae.lr)
    for chooses, cells in ((True, 1), (False, n_cells - 1)) if sae.lr_choice == "final" else ((True, n_cells),):
        if not cells:
            continue
        trainers = len(layers) * len(sae.seeds) * (rates_tried if chooses else 1)
        lm = n_groups * (read + validation) * forward
        whole = lm + trainers * (positions * step + validation * collect) + n_groups * UNIT_S
        yield Units("train", run.name, cells * n_groups, whole / n_groups)
    test, aligned = split_tokens(study, "test") or positions // 10, _aligned_tokens(study)
    setups = len(layers) * len(sae.seeds)
    # A second pass over the text for the examples, where codes are too many to be kept.
    again = 1 if test * sae.k * 12 * setups <= 256 * 2**20 else 2
    whole = n_groups * (again * test + aligned) * forward + setups * (again * test + aligned) * collect + n_groups * UNIT_S
    yield Units("features", run.name, n_cells * n_groups, whole / n_groups)
    yield Units("score", run.name, len(layers), n_cells * len(sae.seeds) * n * SCORE_FEATURE_S)


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


def _interventions(
    study: Study, config: InterventionConfig, runs: Sequence[ModelRun], rates: Rates, workers: int
) -> Iterable[Units]:
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
