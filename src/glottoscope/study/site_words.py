"""The words of the site: what its numbers are called, what is said about the study, who owns its text."""

from __future__ import annotations

from collections.abc import Mapping

from glottoscope.report.browser.source import Measure
from glottoscope.study.columns import EVOLUTION, FEATURES, INTERVAL, Column
from glottoscope.study.config import LANGUAGE_NAMES, PlantedCorpus, Study, TextCorpus
from glottoscope.study.stages.context import TokenInfo

CONTROL_NAMES = {
    "none": "trained model",
    "negative": "negative control: no cross-lingual signal in its text",
    "no_switching": "control: trained without code switching",
    "shuffled": "control: final model with shuffled weights",
    "frozen_decoder": "control: SAE with a frozen decoder",
    "embeddings": "control: SAE on the embeddings",
}
KYOTO = (
    "Japanese-English Bilingual Corpus of Wikipedia's Kyoto Articles",
    "CC BY-SA 3.0",
    "National Institute of Information and Communications Technology (NICT); text of Wikipedia's contributors",
)
PLANTED = (
    "The text is a planted world with word-level truth; its default was chosen after trials, so it shows that the "
    "instrument can see and verify the effect and is no independent evidence for the paper."
)
# Column -> (label, decimals shown). Units and meanings are those of the tables.
_FEATURE_LABELS = {
    "share": ("language share", 2), "share_low": ("language share, low", 2), "share_high": ("language share, high", 2),
    "density": ("density", 5), "max_activation": ("maximum activation", 3), "n_positions": ("positions", 0),
    "n_{lang}": ("{lang} positions", 0), "n_neutral": ("neutral positions", 0), "h_token": ("token entropy", 2),
    "h_semantic": ("cluster entropy", 2), "monosemanticity": ("R", 2), "monosemanticity_hidden": ("R, hidden states", 2),
    "coherence": ("coherence", 2), "coherence_token": ("coherence of tokens", 2), "phi": ("phi", 2),
    "phi_null": ("phi by chance", 2), "n_pairs_a": ("firing sentences, first language", 0),
    "n_pairs_b": ("firing sentences, second language", 0), "single_token": ("single token", 0),
    "supportable": ("enough firing sentences", 0), "bilingual": ("bilingual", 0),
    "bilingual_paper": ("bilingual by the paper's rule", 0), "granularity": ("granularity", 0), "alive": ("alive", 2),
}  # fmt: skip
_SETUP_LABELS = {
    "share_{lang}": ("{lang} share", 2), "share_mixed": ("mixed share", 2), "share_bilingual": ("bilingual share", 2),
    "share_bilingual_paper": ("bilingual share by the paper's rule", 2), "share_supportable": ("supportable share", 2),
    "share_unclassified": ("unclassified share", 2), "share_neutral": ("neutral share", 2), "alive": ("alive share", 2),
    "monosemanticity": ("R", 2), "monosemanticity_multi": ("R without single-token features", 2),
    "monosemanticity_pooled": ("R, pooled", 2), "monosemanticity_hidden": ("R, hidden states", 2),
    "coherence": ("coherence", 2), "coherence_token": ("coherence of tokens", 2), "alignment": ("alignment", 2),
    "alignment_truth": ("alignment, planted truth", 2), "fvu": ("unexplained variance", 3), "cosine": ("reconstruction cosine", 3),
    "l0": ("active features per token", 1), "fvu_{lang}": ("unexplained variance, {lang}", 3),
    "lm_loss_{lang}": ("LM loss, {lang}", 2), "lm_learning_rate": ("LM learning rate", 6),
    "sae_learning_rate": ("SAE learning rate", 6), "theta": ("cluster threshold", 2),
    "theta_hidden": ("cluster threshold, hidden states", 2),
    "monosemanticity_floor_shuffled": ("R by chance (shuffled clusters)", 2),
    "monosemanticity_floor_random": ("R by chance (random vectors)", 2),
    "monosemanticity_hidden_floor_shuffled": ("R, hidden states, by chance", 2),
    "coherence_floor_shuffled": ("coherence by chance", 2), "truth_auc_phi": ("AUC of phi against the truth", 2),
    "truth_auc_flag": ("AUC of the bilingual flag against the truth", 2),
    "truth_auc_mixed": ("AUC of mixed against the truth", 2),
    "n_bilingual_shuffled": ("bilingual with shuffled sentences", 0),
    "n_bilingual_next": ("bilingual with the next sentence", 0),
}  # fmt: skip


def measures_of(languages: tuple[str, ...]) -> tuple[Measure, ...]:
    """Labels, units and meanings of the columns: of features first, then what only setups have."""
    of_setups = {name: _spread(name, label, languages, EVOLUTION) for name, label in _SETUP_LABELS.items()}
    found: dict[str, Measure] = {}
    for name, label in _FEATURE_LABELS.items():
        for measure in _spread(name, label, languages, FEATURES):
            setup = next((m for m in of_setups.get(name, ()) if m.name == measure.name), None)
            found[measure.name] = measure._replace(setup_meaning=setup.meaning if setup else None)
    for measures in of_setups.values():
        for measure in measures:
            found.setdefault(measure.name, measure)
    return tuple(found.values())


def _spread(name: str, label: tuple[str, int], languages: tuple[str, ...], columns: Mapping[str, Column]) -> list[Measure]:
    column = columns.get(name) or columns[name + INTERVAL]
    words, digits = label
    if "{lang}" not in name:
        return [Measure(name, words, column.unit, column.meaning, digits)]
    return [
        Measure(name.format(lang=x), words.format(lang=LANGUAGE_NAMES.get(x, x)), column.unit, column.meaning, digits)
        for x in languages
    ]


def notes_of(study: Study, info: TokenInfo) -> tuple[str, ...]:
    """What a reader should know of the study, one sentence or more each."""
    notes = [*info.notes, *([study.study.notes] if study.study.notes else [])]
    if isinstance(study.corpus, PlantedCorpus):
        notes.append(PLANTED)
    if not info.aligned:
        notes.append("There are no aligned sentences: phi and bilingual are not known, and no sentence pairs are shown.")
    elif len(info.languages) > 2:
        notes.append(f"phi and alignment compare {info.languages[0]} with {info.languages[1]} only.")
    return tuple(notes)


def licences_of(study: Study) -> tuple[tuple[str, str, str], ...]:
    """Who owns the text that the site shows."""
    rows = [(line, "", "") for line in study.report.licences]
    corpus = study.corpus
    if isinstance(corpus, PlantedCorpus):
        rows.append(("Planted world", "part of glottoscope, Apache-2.0", ""))
    elif isinstance(corpus, TextCorpus) and any(s.format == "kyoto-xml" for s in corpus.sources):
        rows.append(KYOTO)
    elif not rows:
        rows.append(("Text of this study", "not stated", "state it in report.licences of the study file"))
    return tuple(rows)
