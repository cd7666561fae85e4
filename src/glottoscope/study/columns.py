"""Every column of every Parquet file of a run directory: type, unit and meaning. docs/tables.md is made from it.

A name in braces stands for several columns: `{lang}` for each language code of the study, `{,_low,_high}` for the
listed endings. A test holds this list against the files of a run, both ways.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

INTERVAL = "{,_low,_high}"
BAND = "{_min,_mean,_max}"


class Column(NamedTuple):
    """Arrow type, unit ("" where there is none) and meaning."""

    type: str
    unit: str
    meaning: str


class Table(NamedTuple):
    """Where a file lies in the run directory, what one row is, and its columns."""

    path: str
    row: str
    columns: dict[str, Column]


_NAT, _SHARE, _POS, _PAIRS, _TOKENS, _FEATURES = "nats", "0-1", "positions", "sentences", "tokens", "features"


def _text(meaning: str) -> Column:
    return Column("string", "", meaning)


def _flag(meaning: str) -> Column:
    return Column("bool", "", meaning)


def _int(unit: str, meaning: str) -> Column:
    return Column("int64", unit, meaning)


def _real(unit: str, meaning: str) -> Column:
    return Column("double", unit, meaning)


KEY: dict[str, Column] = {
    "control": _text("What the model controls for: none, negative, no_switching, shuffled or frozen_decoder."),
    "family": _text("Models of one family are compared over sizes."),
    "model": _text("Name of the model; LM seed S > 0 ends in -sS, a control in its own name."),
    "d_model": _int("", "Width of the residual stream."),
    "n_params": _int("parameters", "Parameters of the language model, embeddings included."),
    "step": _int("steps", "Optimiser step of the checkpoint; 0 is the model before training."),
    "tokens_seen": _int(_TOKENS, "Tokens that the language model had read there."),
    "layer": _int("", "0 = embeddings, L = output of decoder block L, before the final norm."),
    "lm_seed": _int("", "Seed of the language model."),
    "sae_seed": _int("", "Seed of the SAE."),
}

_POSITIONS: dict[str, Column] = {
    "feature": Column("int32", "", "Number of the feature in its SAE; it means nothing in another SAE."),
    "alive": _flag("Active at least once on the test split."),
    "density": _real(_SHARE, "Share of the counted test positions at which the feature is active."),
    "max_activation": Column("float", "activation", "Maximum on the test split, after TopK, for unit-norm input."),
    "n_positions": _int(_POS, "Test positions above features.threshold x the maximum, neutral ones included."),
    "n_{lang}": _int(_POS, "Those that count for the language (rule v1: examples instead of positions)."),
    "n_neutral": _int(_POS, "Those whose token counts for no language (rule v1: always 0)."),
}

_PHI: dict[str, Column] = {
    "phi": _real("-1-1", "Phi coefficient of firing in a sentence and in its translation; null where undefined or without pairs."),
    "phi_null": _real("-1-1", "Expected phi of wrong pairs of like length; null as phi."),
    "n_pairs_a": _int(_PAIRS, "Aligned test sentences of the first language in which the feature fires."),
    "n_pairs_b": _int(_PAIRS, "The same for the second language."),
}

FEATURES: dict[str, Column] = {
    **KEY,
    **_POSITIONS,
    "language": _text("Class: a language code, mixed, neutral, unclassified or dead."),
    "share": _real(_SHARE, "Largest language's share of the rates n_LANG / exposure; null without counted positions."),
    "share_low": _real(_SHARE, "Wilson 95 % interval of share, lower end."),
    "share_high": _real(_SHARE, "Upper end."),
    "h_token": _real(_NAT, "Entropy of the tokens at the counted positions; null for dead features."),
    "h_semantic": _real(_NAT, "Entropy of their clusters in the final checkpoint's input embeddings."),
    "monosemanticity": _real(_SHARE, "R_mono = 1 - h_semantic / h_token; 1 where h_token is 0 (see single_token)."),
    "monosemanticity_hidden": _real(_SHARE, "The same with clusters of the final checkpoint's mean hidden states at this layer."),
    "unclustered": _real(_SHARE, "Share of positions whose token was left out of clustering (0 with one global clustering)."),
    "coherence": _real(_SHARE, "1 - E[H of the clusters of 50 positions] / log 50; hidden-state clusters; null below 10."),
    "coherence_token": _real(_SHARE, "The same on tokens, without any clustering."),
    "coherence_short": _flag("10 to 49 positions: coherence is over all n of them, divided by log n."),
    "single_token": _flag("All counted positions hold one token."),
    **_PHI,
    "supportable": _flag("Enough firing sentences on both sides for the pairs to decide; null without pairs."),
    "bilingual": _flag("mixed, phi - phi_null at the threshold, and supportable; null without pairs."),
    "bilingual_paper": _flag("mixed, not single_token, and monosemanticity at features.paper_threshold."),
    "granularity": Column("int8", "1-4", "Human label where given: 1 uninterpretable, 2 and 3 concept, 4 token-level."),
}

_ALIVE = "share of alive features"
_MEASURES: dict[str, Column] = {
    "share_{lang}": _real(_SHARE, f"Language's {_ALIVE}."),
    "share_mixed": _real(_SHARE, f"Mixed {_ALIVE}. Mixed is not bilingual."),
    "share_bilingual": _real(_SHARE, f"Bilingual {_ALIVE}; null without aligned sentences."),
    "share_bilingual_paper": _real(_SHARE, f"bilingual_paper {_ALIVE}."),
    "share_supportable": _real(_SHARE, f"Supportable {_ALIVE}; null without aligned sentences."),
    "share_unclassified": _real(_SHARE, f"Unclassified {_ALIVE}."),
    "share_neutral": _real(_SHARE, f"Neutral {_ALIVE}."),
    "alive": _real(_SHARE, "Alive share of all features of the SAE."),
    "monosemanticity": _real(_SHARE, "Mean R_mono of alive features, input embeddings."),
    "monosemanticity_multi": _real(_SHARE, "The same without single-token features."),
    "monosemanticity_pooled": _real(_SHARE, "1 - sum h_semantic / sum h_token over alive features."),
    "monosemanticity_hidden": _real(_SHARE, "Mean R_mono of alive features, hidden states."),
    "coherence": _real(_SHARE, "Mean coherence of alive features that have one."),
    "coherence_token": _real(_SHARE, "Mean coherence_token of those."),
    "alignment": _real("cosine", "Mean cosine of aligned sentences' mean states minus that of other pairs; no SAE."),
}
_QUALITY: dict[str, Column] = {
    "fvu": _real("", "Fraction of variance unexplained on the test split, one mean for all positions."),
    "cosine": _real("cosine", "Mean cosine of a state and its reconstruction."),
    "l0": _real(_FEATURES, "Mean active features per position."),
}
_LM_LOSS: dict[str, Column] = {"lm_loss_{lang}": _real("nats per token", "The language model's loss on test text.")}

EVOLUTION: dict[str, Column] = {
    **KEY,
    **{name + INTERVAL: column for name, column in _MEASURES.items()},
    "n_features": _int(_FEATURES, "Features of the SAE."),
    "n_alive": _int(_FEATURES, "Alive ones: the denominator of the shares."),
    "n_bilingual": _int(_FEATURES, "Bilingual ones; null without aligned sentences."),
    "count_{lang}": _int(_FEATURES, "Features of the language."),
    "count_{mixed,unclassified,neutral,dead}": _int(_FEATURES, "Features of the class."),
    "count_bilingual_paper": _int(_FEATURES, "Alive features with the flag."),
    "count_supportable": _int(_FEATURES, "Alive features with the flag; null without aligned sentences."),
    "alignment_truth": _real("cosine", "Planted world: the same measure on concept means; null elsewhere."),
    **_QUALITY,
    "fvu_{lang}": _real("", "The same for one language, about its own mean."),
    **_LM_LOSS,
    "lm_learning_rate": _real("", "The language model's learning rate at the checkpoint; null where not known."),
    "sae_learning_rate": _real("", "Peak learning rate of the SAE, chosen by validation loss."),
    "theta": _real("cosine", "Merge threshold of the clusters of input embeddings."),
    "theta_hidden": _real("cosine", "Merge threshold of the clusters of hidden states."),
    "monosemanticity_floor_shuffled": _real(_SHARE, "Mean R_mono with cluster labels shuffled among tokens of like frequency."),
    "monosemanticity_floor_random": _real(_SHARE, "Mean R_mono with clusters of random token vectors."),
    "monosemanticity_hidden_floor_shuffled": _real(_SHARE, "The shuffled floor in the space of hidden states."),
    "coherence_floor_shuffled": _real(_SHARE, "Mean coherence with shuffled labels, hidden states."),
    "truth_auc_phi": _real("AUC", "Planted world: phi - phi_null against the truth, alive features; null where all are alike."),
    "truth_auc_flag": _real("AUC", "Planted world: the bilingual flag against the truth (its balanced accuracy)."),
    "truth_auc_mixed": _real("AUC", "Planted world: the class mixed against the truth."),
    "n_bilingual_shuffled": _int(_FEATURES, "Control: features that pass as bilingual with shuffled sentences."),
    "n_bilingual_next": _int(_FEATURES, "Control: with the next sentence of the article instead of the translation."),
    "truth_n_bilingual": _int(_FEATURES, "Planted world: alive features that are bilingual in truth; null elsewhere."),
    "truth_n_alive": _int(_FEATURES, "Planted world: alive features; null elsewhere."),
}

EVOLUTION_SEEDS: dict[str, Column] = {
    **{name: column for name, column in KEY.items() if not name.endswith("_seed")},
    "n": _int("rows", "Rows of evolution.parquet behind the band."),
    "n_lm_seeds": _int("seeds", "Different LM seeds among them."),
    "n_sae_seeds": _int("seeds", "Different SAE seeds among them."),
    **{name + BAND: column for name, column in {**_MEASURES, **_QUALITY, **_LM_LOSS}.items()},
}

SWEEPS: dict[str, Column] = {
    **KEY,
    "sweep": _text("What is varied: threshold (of activation), language_share, phi, monosemanticity (of bilingual_paper), theta."),
    "value": _real("", "Its value; theta as a percentile of the cosine of token pairs; phi on dev pairs at the final checkpoint."),
    "measure": _text("What it moves: share_bilingual, share_bilingual_paper, share_mixed or monosemanticity."),
    "result": _real(_SHARE, "The measure at that value."),
}

_SCORE = "of the metric"
INTERVENTION: dict[str, Column] = {
    "experiment": _text("study for what the study file asks for, else the --name of `glottoscope intervene`."),
    **{name: KEY[name] for name in ("control", "family", "model", "d_model", "n_params", "lm_seed", "sae_seed")},
    "layer": _int("", "Patched layer, the lowest where several are patched together."),
    "layers": _text("All layers patched together: 2, or 1+2+3."),
    "base_step": _int("steps", "Checkpoint that is patched."),
    "donor_model": _text("Model of the donor."),
    "donor_step": _int("steps", "Checkpoint whose part is added."),
    "base_tokens": _int(_TOKENS, "Tokens that the base had read."),
    "donor_tokens": _int(_TOKENS, "Tokens that the donor had read."),
    "text": _text("documents, sentences, translation, dev_documents or dev_sentences (what alpha was chosen on)."),
    "arm": _text(
        "baseline, donor, part, random and random_other (draws from all alive features and from those outside the part), self "
        "(the base's own SAE and features), shuffled (the donor's part of another text), identity, and the ceilings "
        "reconstruction, state, state_replaced."
    ),
    "part": _text("Class or name of the features; of a draw: what it is matched to; null where the arm takes none."),
    "draw": _int("", "Number of the random draw; null for other arms."),
    "mode": _text("add or replace."),
    "scale": _text("matched (to the base's norm) or raw."),
    "alpha": _real("", "Strength; null where there is none."),
    "chosen": _flag("The strength chosen on dev text of the same kind, or an arm without a strength."),
    "metric": _text("nll (nats per token) and ppl: lower is better; chrf, bleu, exact, recall, comet: higher is better."),
    "language": _text("Language of the text, all (pooled over tokens), or SOURCE-TARGET for translation."),
    "value": _real(_SCORE, "The metric; null with a note where the part has no features."),
    "change" + INTERVAL: _real(_SCORE, "value - baseline; paired bootstrap over documents or articles."),
    "gap_closed" + INTERVAL: _real(
        "share", "change / (donor - baseline); the interval is null where the gap's sign is not certain."
    ),
    "added_norm": _real("share", "Mean ||h' - h|| / ||h|| over patched positions; null where nothing is added."),
    "change_per_norm": _real(_SCORE, "change / added_norm."),
    "mass": _real(_SHARE, "Share of the donor SAE's activation mass on dev documents that the features hold."),
    "n_features": _int(_FEATURES, "Features added; null where the arm takes none."),
    "n_tokens": _int(_TOKENS, "Tokens scored; null for translation."),
    "n_units": _int("", "Documents or articles that the bootstrap resamples."),
    "rank": _int("", "1 + random draws that do at least as well; of the part at the chosen strength only."),
    "n_random": _int("", "Random draws from all alive features."),
    "rank_other": _int("", "rank among the draws from outside the part."),
    "n_random_other": _int("", "How many of these."),
    "signature": _text("What computed a translation score: sacrebleu's signature, the COMET model; null for nll and ppl."),
    "note": _text("Why a value is null, or what is not as it should be with the draws."),
}

TRANSLATIONS: dict[str, Column] = {
    "condition": _int("", "Number of the condition in plan.json, texts.translation.conditions, from 0."),
    "pair": _int("", "Number of the sentence pair, from 0."),
    "text": _text("What the model wrote, cut at the stop."),
}

COMET: dict[str, Column] = {
    "direction": _text("SOURCE-TARGET."),
    **{name: TRANSLATIONS[name] for name in ("condition", "pair")},
    "score": _real("", "COMET of the sentence."),
}

EXAMPLES: dict[str, Column] = {
    "feature": _POSITIONS["feature"],
    "rank": Column("int32", "", "0 is the strongest example (rule v1: the first in order)."),
    "document": _text("Id of the document."),
    "language": _text("Language of the document."),
    "block": _int("", "Row of the test split's token blocks."),
    "position": Column("int32", "", "Position in the block where the feature is strongest."),
    "window_start": Column("int32", "", "Position in the block of the first token shown."),
    "value": Column("float", "activation", "Activation at the position."),
    "tokens": Column("list<element: uint32>", "token ids", "Tokens of the window."),
    "activations": Column("list<element: float>", "activation", "Activation at each of them; 0 where not in the TopK."),
    "text": _text("The window as text; bytes that form no character are U+FFFD."),
}

TRAINING: dict[str, Column] = {
    "step": _int("steps", "Optimiser step of the SAE, from 0."),
    "grid_lr": _real("", "Learning rate of the grid that the row belongs to."),
    "loss": _real("", "Mean over the batch of ||u - u_hat||^2, before the update."),
    "lr": _real("", "Learning rate of the step, warm-up included."),
    "l0": _real(_FEATURES, "Mean active features per position of the batch."),
    "chosen": _flag("The learning rate that validation loss chose; these weights are the ones kept."),
}

COLLECTED: dict[str, Column] = {
    **_POSITIONS,
    "n_{lang}{_at_80,_at_90}": _int(_POS, "n_LANG had the threshold been .8 or .9; rule document, thresholds above the study's."),
    "n_neutral{_at_80,_at_90}": _int(_POS, "n_neutral had the threshold been .8 or .9."),
    **_PHI,
    **{f"{name}_dev": Column(c.type, c.unit, "The same on the dev pairs; final checkpoint only.") for name, c in _PHI.items()},
    "phi_shuffled": _real("-1-1", "Control: phi with the test sentences shuffled."),
    "phi_next": _real("-1-1", "Control: phi with the next sentence of the article."),
}

HISTOGRAM: dict[str, Column] = {
    "feature": _POSITIONS["feature"],
    "token": Column("int32", "token id", "Token at counted positions of the feature."),
    "language": Column("uint8", "", "Index of the document's language in the study's order."),
    "count": _int(_POS, "Counted positions with this token in documents of this language."),
}

ACTIVATIONS: dict[str, Column] = {
    "feature": _POSITIONS["feature"],
    "language": HISTOGRAM["language"],
    "bin": Column(
        "int8",
        "",
        "Half octave of the activation, 0 to 35: from 2^(B/2 - 12) up where the bin B is even, from 1.5 x 2^((B - 1)/2 - 12) where "
        "it is odd, to where the next one starts; 0 takes all that is weaker, 35 all from 48 on.",
    ),
    "count": _int(_POS, "Positions of the test split at which the feature is active, above the threshold or not; never 0."),
}

PAIRS: dict[str, Column] = {
    "feature": _POSITIONS["feature"],
    "rank": Column("int32", "", "0 is the pair whose weaker side is strongest; at most 8 of a feature."),
    "pair": Column("int32", "", "Row of the aligned test sentences (tokens/aligned/test)."),
    "value_{a,b}": Column("float", "activation", "Strongest firing position of the first (a) and the second language (b)."),
    "at_a": Column("list<element: int32>", "", "Where the feature fires in the first language: position in the row, BOS included."),
    "level_a": Column("list<element: float>", "activation", "Activation at each of them, above phi_firing x the maximum."),
    "at_b": Column("list<element: int32>", "", "The same for the second language."),
    "level_b": Column("list<element: float>", "activation", "Activation at each of them."),
}

VOCABULARY: dict[str, Column] = {
    "token": _int("token id", "Row number."),
    "bytes": Column("binary", "", "The bytes that the token stands for; part of a character is possible."),
    "text": _text("The same as text, invalid bytes as U+FFFD."),
    "has_letters": _flag("Holds a letter, or is part of a character; tokens without letters are neutral."),
    "count_{lang}": _int(_POS, "Occurrences in the train split's documents of the language: decides what is neutral."),
    "language": Column("uint8", "", "Planted world only: the true language's index, 255 for special and shared tokens."),
    "concept": Column("int32", "", "Planted world only: the true concept, -1 for none."),
    "category": Column("int32", "", "Planted world only: the concept's category, -1 for none."),
    "shared": _flag("Planted world only: a digit, name or mark that both languages use."),
}

DOCUMENTS: dict[str, Column] = {
    "id": _text("Id of the document; translations of each other may share it."),
    "language": _text("Language code."),
    "split": _text("train, validation or test."),
    "row": _int("", "Number by which the token store refers to the document."),
}

LOG: dict[str, Column] = {
    "step": _int("steps", "Updates done; 0 is the model before training."),
    "tokens_seen": _int(_TOKENS, "Tokens read up to there, padding left out."),
    "loss": _real("nats per token", "Training loss of the batch of the update that led to this step; null at 0."),
    "lr": _real("", "Learning rate of that update."),
    "grad_norm": _real("", "Norm of its gradient before clipping; null at 0."),
    "loss_{lang}": _real("nats per token", "Loss on validation text of the language; null between checkpoints."),
}

_EXPERIMENT = "interventions/NAME/MODEL@BASE+MODEL@DONOR/layers_LL-MODE-SCALE/seed_S"
_SETUP = "cells/MODEL@STEP/layer_LL/seed_S"
TABLES: dict[str, Table] = {
    "features": Table("tables/features.parquet", "One feature of one setup.", FEATURES),
    "evolution": Table("tables/evolution.parquet", "One setup: model x checkpoint x layer x SAE seed.", EVOLUTION),
    "evolution_seeds": Table(
        "tables/evolution_seeds.parquet",
        "One model x checkpoint x layer: least, mean, most over LM and SAE seeds.",
        EVOLUTION_SEEDS,
    ),
    "sweeps": Table("tables/sweeps.parquet", "One other threshold for one setup.", SWEEPS),
    "intervention": Table(
        "tables/intervention.parquet", "One condition x text x language x metric (.csv: the same as text).", INTERVENTION
    ),
    "translations": Table(f"{_EXPERIMENT}/translation-A-B-NNN.parquet", "One sentence under one condition.", TRANSLATIONS),
    "comet": Table(f"{_EXPERIMENT}/comet.parquet", "One COMET score.", COMET),
    "examples": Table(f"{_SETUP}/examples.parquet", "One example of a feature, at most one per block.", EXAMPLES),
    "training": Table(f"{_SETUP}/training.parquet", "One point of a loss curve of the SAE's training.", TRAINING),
    "collected": Table(f"{_SETUP}/collected.parquet", "One feature, before it is judged: what `score` starts from.", COLLECTED),
    "histogram": Table(f"{_SETUP}/histogram.parquet", "One token of one feature in one language.", HISTOGRAM),
    "activations": Table(f"{_SETUP}/activations.parquet", "One bin of activations of one feature in one language.", ACTIVATIONS),
    "pairs": Table(
        f"{_SETUP}/pairs.parquet",
        "One aligned test pair in which a feature fires on both sides, as for phi; features with examples only. "
        "Not there without aligned test sentences.",
        PAIRS,
    ),
    "vocabulary": Table("tokens/vocabulary.parquet", "One entry of the tokenizer.", VOCABULARY),
    "documents": Table("tokens/documents.parquet", "One document.", DOCUMENTS),
    "log": Table("models/MODEL/log.parquet", "One optimiser step of a model trained here.", LOG),
}
# What `glottoscope measure` adds to the columns of features.parquet, and what it leaves out of them.
MEASURE_ONLY: dict[str, Column] = {
    "n_examples": _int("examples", "Examples of the feature in the file."),
    "published_{lang}": _int("examples", "The file's own count for the language; null where it has none."),
}
NOT_IN_MEASURE = (*KEY, "unclustered", "n_pairs_a", "n_pairs_b", "supportable")


def expand(name: str, languages: Sequence[str]) -> list[str]:
    """The columns that a name with braces stands for: `share_{lang}{,_low}` -> share_en, share_en_low, share_ja, ..."""
    parts = re.split(r"\{([^{}]*)\}", name)
    choices = [[p] if i % 2 == 0 else list(languages) if p == "lang" else p.split(",") for i, p in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def columns_of(table: str, languages: Sequence[str]) -> dict[str, Column]:
    """Every column of a table of a study in `languages`."""
    return {full: column for name, column in TABLES[table].columns.items() for full in expand(name, languages)}
