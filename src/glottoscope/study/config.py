"""The study file: what is studied, as frozen models read from TOML.

A study says which models and checkpoints are looked at, on which text, with which SAEs, and how features are judged.
It never says where results go or how many processes work on it: those are arguments of a run, so that the same file
gives the same numbers anywhere. Every field carries its reason as its description; docs/configuration.md is made
from them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCHEMA = 1
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LANGUAGE_PATTERN = r"^[a-z]{2,3}(-[A-Za-z0-9]+)?$"
# What a feature can be besides a language; a language code may not be one of these.
CLASS_NAMES = ("mixed", "neutral", "unclassified", "dead", "bilingual", "all")
LANGUAGE_NAMES = {
    "en": "English", "ja": "Japanese", "de": "German", "fr": "French", "zh": "Chinese", "ko": "Korean",
    "es": "Spanish", "it": "Italian", "ru": "Russian", "pt": "Portuguese", "nl": "Dutch", "ar": "Arabic",
}  # fmt: skip
CONTROLS = ("none", "negative", "shuffled", "frozen_decoder", "embeddings", "no_switching")
STAGES = ("pretrain", "tokens", "train", "features", "score", "intervene", "report")

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Part(BaseModel):
    """A table of the study file: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class StudyInfo(Part):
    """What the study is called, and the seed from which every other seed is drawn."""

    name: Name = Field(description="Identity of the run directory: a run directory belongs to one study name.")
    seed: NonNegativeInt = Field(default=0, description="Seed of everything random; each purpose draws its own generator.")
    notes: str = Field(default="", description="Free text, shown in the report.")


class Compute(Part):
    """Settings of the machine that can change the last bits of a number, so they belong to the study."""

    threads: PositiveInt = Field(default=1, description="Torch threads of one process, whatever the number of workers.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: cuda, then mps, then cpu.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Precision of the language model's pass.")
    lm_batch: PositiveInt = Field(default=16, description="Sequences per language model forward pass.")
    memory_gb: PositiveFloat | None = Field(
        default=None, description="Memory for one process; layers are trained in groups that fit. Default: what is free."
    )
    gpus_per_unit: PositiveFloat = Field(
        default=1.0, description="Ray: GPUs that a unit asks for where there are any; a fraction lets units share one."
    )
    checkpoint_minutes: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=10.0,
        description="A training's state is saved this often, from which a killed run goes on to the same bytes; 0: never. "
        "It changes no number.",
    )
    hub: str | None = Field(
        default=None,
        description="Folder that stands for the hub of hub_id: OWNER/NAME/REVISION/ with the files. Default: the public one.",
    )
    remove_downloads: bool = Field(
        default=False, description="Hub checkpoints are fetched for each unit that reads them, and removed once they are loaded."
    )
    disk_gb: PositiveFloat | None = Field(
        default=None,
        description="Hub checkpoints on disk at one time, in 10^9 bytes; what does not fit is not fetched. Default: what is free.",
    )

    @field_validator("gpus_per_unit")
    @classmethod
    def _whole_or_shared(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"gpus_per_unit = {value:g}: a fraction below 1, or a whole number")
        return value


class Source(Part):
    """Documents of one language."""

    language: str = Field(description="Language code of these documents.")
    path: str = Field(description="File, folder or glob; relative to corpus.root, else to the study file.")
    format: Literal["auto", "jsonl", "text", "parquet", "datasets", "kyoto-xml"] = Field(
        default="auto", description="auto decides by suffix and folder content."
    )
    text_field: str = Field(default="text", description="Field or column that holds the text.")
    id_field: str = Field(default="id", description="Field with the document id; translations that share it share a split.")
    limit: PositiveInt | None = Field(default=None, description="Read at most this many documents.")


class Aligned(Part):
    """Aligned sentences: their own input, never part of the SAE's stream."""

    train: str | None = Field(default=None, description="Pairs for pre-training and the mined dictionary.")
    dev: str | None = Field(default=None, description="Pairs for thresholds and alpha.")
    test: str | None = Field(default=None, description="Pairs for phi, alignment and translation (>= 1,000 advised).")
    format: Literal["auto", "jsonl", "parquet", "datasets", "kyoto-xml", "tsv"] = Field(default="auto", description="As above.")
    fields: dict[str, str] = Field(default_factory=dict, description="Language -> field; default: the code itself.")
    id_field: str = Field(default="id", description="ARTICLE.SENTENCE: articles are resampled, not sentences.")
    max_length: PositiveInt = Field(default=128, description="Longer sentences are cut at this many tokens, and counted.")
    limit: PositiveInt | None = Field(default=None, description="Read at most this many pairs of each file.")


class TokenizerTraining(Part):
    """A BPE tokenizer trained on the train split, for models pre-trained here."""

    vocab_size: Annotated[int, Field(ge=300)] = Field(default=8000, description="Entries, special tokens and bytes included.")


class PlantedCorpus(Part):
    """The planted bilingual world: a corpus whose truth is known token by token."""

    kind: Literal["planted"]
    seed: NonNegativeInt = Field(default=0, description="Seed of the world's documents (fresh text, same grammar).")
    context_length: PositiveInt = Field(default=64, description="Tokens of a document, BOS included.")
    train_documents: PositiveInt = Field(default=800, description="Documents per language for the SAEs.")
    validation_documents: PositiveInt = Field(default=100, description="Documents per language for the learning rate.")
    test_documents: PositiveInt = Field(default=400, description="Documents per language for statistics.")
    aligned_pairs: PositiveInt = Field(default=1000, description="Aligned sentence pairs for dev and for test, each.")
    shared_tokens: bool = Field(default=False, description="Plant digits, names and punctuation that both languages share.")

    @property
    def languages(self) -> tuple[str, ...]:
        return ("en", "ja")


class TextCorpus(Part):
    """Real text in two or more languages."""

    kind: Literal["text"]
    languages: tuple[Annotated[str, Field(pattern=LANGUAGE_PATTERN)], ...] = Field(description="Two or more codes.")
    root: str | None = Field(default=None, description="Folder that relative paths of sources and aligned files start from.")
    sources: tuple[Source, ...] = Field(description="At least one source for each language.")
    aligned: Aligned | None = Field(default=None, description="Aligned sentences, if there are any.")
    tokenizer: str | None = Field(
        default=None, description="Folder, SentencePiece file or hub id; default: the first model's, or a trained one."
    )
    tokenizer_training: TokenizerTraining | None = Field(default=None, description="Train a tokenizer on the train split.")
    context_length: PositiveInt = Field(default=64, description="Tokens per sequence (document_start: after BOS).")
    mode: Literal["blocks", "document_start"] = Field(
        default="document_start", description="v1: the first tokens of each document; v2: fixed-length blocks."
    )
    drop_short: bool = Field(default=True, description="document_start: drop documents shorter than the context, as v1 does.")
    bos: Literal["document", "block", "none"] = Field(default="document", description="Where a BOS token is put.")
    split: tuple[float, float, float] = Field(default=(0.8, 0.1, 0.1), description="Train, validation, test, by document id.")
    train_tokens: PositiveInt | None = Field(default=None, description="At most this many train tokens over all languages.")
    validation_tokens: PositiveInt | None = Field(default=None, description="The same for validation.")
    test_tokens: PositiveInt | None = Field(default=None, description="The same for test.")
    split_seed: NonNegativeInt = Field(default=0, description="Seed of the split; kept apart so that new seeds keep the test.")

    @model_validator(mode="after")
    def _languages_and_sources(self) -> TextCorpus:
        if len(set(self.languages)) < 2:
            raise ValueError(f"languages = {list(self.languages)}: a study needs two or more different languages")
        for language in self.languages:
            if language in CLASS_NAMES:
                raise ValueError(f"language code {language!r} is also a class name; use another code")
        have = {s.language for s in self.sources}
        if missing := [x for x in self.languages if x not in have]:
            raise ValueError(f"no source for language {', '.join(missing)}: add [[corpus.sources]] with language")
        if unknown := sorted(have - set(self.languages)):
            raise ValueError(f"sources name languages that corpus.languages lacks: {', '.join(unknown)}")
        if abs(sum(self.split) - 1) > 1e-6 or min(self.split) <= 0:
            raise ValueError(f"split = {list(self.split)}: three positive shares that add up to 1")
        return self


class Mixture(Part):
    """What a language model pre-trained here reads."""

    parallel_share: Share = Field(default=0.4, description="Share of documents that hold sentences with their translations.")
    switched_share: Share = Field(
        default=0.3,
        description="Share of documents with code switching (planted world: of the monolingual ones; text: of all).",
    )
    switch_probability: Share = Field(default=0.3, description="Probability that a word of such a document is swapped.")
    dictionary_phi: Share = Field(default=0.25, description="Text: least sentence co-occurrence phi of a mined pair.")


class PretrainModel(Part):
    """A small bilingual Llama trained here from scratch, with log-spaced checkpoints."""

    source: Literal["pretrain"]
    name: Name = Field(description="Name of the model in every table and path.")
    family: str | None = Field(default=None, description="Models of one family are compared over sizes. Default: study name.")
    control: Literal["none", "negative", "no_switching"] = Field(
        default="none",
        description="negative: no cross-lingual signal at all; no_switching: parallel documents, no code switching.",
    )
    d_model: PositiveInt = Field(description="Width of the residual stream.")
    n_layers: PositiveInt = Field(default=4, description="Decoder blocks.")
    n_heads: PositiveInt | None = Field(default=None, description="Default: max(2, d_model / 32).")
    steps: PositiveInt = Field(default=1500, description="Optimiser steps.")
    batch_size: PositiveInt = Field(default=16, description="Sequences per step.")
    lr: PositiveFloat = Field(default=3e-3, description="Peak learning rate (AdamW, cosine to min_lr_ratio of it).")
    warmup_steps: NonNegativeInt = Field(default=30, description="Linear warm-up.")
    min_lr_ratio: Share = Field(default=0.1, description="Last learning rate over peak.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="None on embeddings and norms.")
    clip: PositiveFloat = Field(default=1.0, description="Gradient norm.")
    embedding_init_std: PositiveFloat = Field(
        default=0.1, description="With the usual 0.02 the residual stream overwrites the embedding and nothing aligns."
    )
    embedding_lr_scale: PositiveFloat = Field(default=2.0, description="Learning rate of the embeddings over lr.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Autocast of the training pass.")
    checkpoints: tuple[NonNegativeInt, ...] = Field(
        default=(0, 10, 30, 100, 200, 300, 600, 1000, 1500), description="Steps saved and studied; 0 is the random model."
    )
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), description="One model per seed (name, then name-s1 for seed 1).")
    layers: tuple[NonNegativeInt, ...] | Literal["all"] | None = Field(default=None, description="Overrides study layers.")
    mixture: Mixture = Field(default_factory=Mixture, description="What it reads.")

    @field_validator("checkpoints", "seeds")
    @classmethod
    def _sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("needs at least one entry, none twice")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _steps(self) -> PretrainModel:
        if self.checkpoints[-1] > self.steps:
            raise ValueError(f"checkpoint {self.checkpoints[-1]} lies beyond steps = {self.steps}")
        return self


class CheckpointEntry(Part):
    """One checkpoint of a model trained elsewhere."""

    step: NonNegativeInt = Field(description="Optimiser step.")
    tokens_seen: NonNegativeInt | None = Field(default=None, description="Default: step * tokens_per_step.")
    path: str | None = Field(default=None, description="Folder, relative to root; default: from pattern.")
    revision: str | None = Field(default=None, description="Hub revision.")
    learning_rate: float | None = Field(default=None, description="The model's learning rate there, for the lane of the plots.")


class Shape(Part):
    """A model's size, stated so that `plan` needs no weights and no network."""

    n_layers: PositiveInt = Field(description="Decoder blocks.")
    d_model: PositiveInt = Field(description="Width of the residual stream.")
    n_params: PositiveInt = Field(description="Parameters, embeddings included.")
    vocab_size: PositiveInt = Field(description="Rows of the embedding.")


class CheckpointModel(Part):
    """A model trained elsewhere: local folders or a hub id with revisions."""

    source: Literal["checkpoints"]
    name: Name = Field(description="Name of the model in every table and path.")
    family: str | None = Field(default=None, description="Models of one family are compared over sizes. Default: study name.")
    control: Literal["none", "negative", "no_switching"] = Field(default="none", description="What this model controls for.")
    root: str | None = Field(default=None, description="Folder that holds the checkpoints, relative to the study file.")
    hub_id: str | None = Field(default=None, description="Hub id, when the checkpoints are revisions of one repository.")
    glob: str | None = Field(default=None, description="Glob below root; the step is the number in the folder's name.")
    pattern: str | None = Field(default=None, description="Folder (or revision) of a step, such as iter_{step:07d}.")
    steps: tuple[NonNegativeInt, ...] = Field(default=(), description="Steps, with pattern; or which of the glob's to take.")
    checkpoints: tuple[CheckpointEntry, ...] = Field(default=(), description="Checkpoints one by one.")
    tokens_per_step: PositiveInt | None = Field(default=None, description="Tokens of one optimiser step.")
    tokenizer: str | None = Field(default=None, description="Default: beside the weights.")
    shape: Shape | None = Field(default=None, description="Stated size; read from config.json when absent.")
    seed: NonNegativeInt = Field(default=0, description="The LM's own seed, where several are studied.")
    layers: tuple[NonNegativeInt, ...] | Literal["all"] | None = Field(default=None, description="Overrides study layers.")

    @model_validator(mode="after")
    def _where(self) -> CheckpointModel:
        if not (self.checkpoints or self.glob or (self.pattern and self.steps)):
            raise ValueError("give checkpoints, or glob, or pattern with steps")
        if self.glob is not None and self.hub_id is not None:
            raise ValueError("glob looks through a folder and hub_id names a hub: give pattern with steps instead of glob")
        if self.root is None and self.hub_id is None and not all(c.path for c in self.checkpoints):
            raise ValueError("give root (a folder) or hub_id")
        if self.tokens_per_step is None and any(c.tokens_seen is None for c in self.checkpoints):
            raise ValueError("give tokens_per_step, or tokens_seen for every checkpoint")
        if self.tokens_per_step is None and not self.checkpoints:
            raise ValueError("give tokens_per_step: tokens_seen = step * tokens_per_step")
        if self.pattern is not None:
            try:
                self.pattern.format(step=1)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"pattern {self.pattern!r} must use {{step}}, as in iter_{{step:07d}}") from error
        return self


Model = Annotated[PretrainModel | CheckpointModel, Field(discriminator="source")]


class SAEConfig(Part):
    """The paper's TopK-SAE and recipe (METHOD 4), every choice a field."""

    n: PositiveInt | None = Field(default=None, description="Features. The paper: 32,768 at every width.")
    expansion: PositiveFloat | None = Field(default=None, description="Instead of n: features per dimension.")
    k: PositiveInt = Field(default=32, description="Active features per token.")
    normalization: Literal["unit", "none"] = Field(default="unit", description="unit: x / ||x||, as the paper does.")
    lr: tuple[PositiveFloat, ...] = Field(default=(1e-4, 3e-4, 1e-3, 3e-3), description="Grid; the paper's is not known.")
    lr_choice: Literal["final", "setup"] = Field(
        default="final",
        description="final: once per model and layer at the last checkpoint, so that it cannot bend a curve; setup: at each.",
    )
    warmup_steps: NonNegativeInt = Field(default=1000, description="Linear warm-up, then constant.")
    batch_tokens: PositiveInt = Field(default=32768, description="Tokens per step.")
    steps: PositiveInt | None = Field(default=None, description="Optimiser steps.")
    train_tokens: PositiveInt | None = Field(default=None, description="Instead of steps: tokens seen by the SAE.")
    eps: PositiveFloat = Field(default=6.25e-10, description="Adam's epsilon.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's betas.")
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), description="SAE seeds; two or more give a band.")
    buffer_tokens: PositiveInt = Field(
        default=131_072, description="Positions shuffled together. An epoch that fits is kept in memory and not recomputed."
    )
    kernel: Literal["auto", "compiled", "triton", "chunked", "reference"] = Field(
        default="auto",
        description="auto: compiled loops on a CPU, Triton on a CUDA device where they run, else chunked (plain torch). "
        "reference: plain autograd, slow.",
    )
    preselection: Literal["none", "bf16"] = Field(
        default="none",
        description="bf16: a bfloat16 product proposes candidates and float32 decides; a row whose bound does not hold is "
        "computed again. The same result; for machines whose bfloat16 product is much faster than the float32 one.",
    )

    @model_validator(mode="after")
    def _size_and_length(self) -> SAEConfig:
        if (self.n is None) == (self.expansion is None):
            raise ValueError("give exactly one of n and expansion")
        if (self.steps is None) == (self.train_tokens is None):
            raise ValueError("give exactly one of steps and train_tokens")
        if self.kernel == "reference" and self.preselection != "none":
            raise ValueError('kernel "reference" preselects nothing: take another kernel, or preselection = "none"')
        if self.n is not None and self.k > self.n:
            raise ValueError(f"k = {self.k} is larger than n = {self.n}: k active features need at least k features")
        if not self.lr or not self.seeds or len(set(self.lr)) != len(self.lr) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("lr and seeds need at least one entry, none twice")
        return self

    def n_features(self, d_model: int) -> int:
        """Features of an SAE on a residual stream of width `d_model`."""
        return self.n if self.n is not None else math.ceil(float(self.expansion or 0) * d_model)

    @property
    def n_steps(self) -> int:
        """Optimiser steps."""
        return self.steps if self.steps is not None else max(1, int(self.train_tokens or 0) // self.batch_tokens)


class FeaturesConfig(Part):
    """How features are collected, classed and scored (METHOD 5)."""

    rule: Literal["document", "script", "v1"] = Field(default="document", description="Which language a position counts for.")
    threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.7,
        description="A position counts above this share of the feature's maximum; it moves levels, so it is printed.",
    )
    language_share: Annotated[float, Field(gt=0.5, lt=1)] = Field(default=0.9, description="Above it a feature is one language's.")
    min_count: PositiveInt = Field(default=20, description="Fewer counted positions: unclassified.")
    neutral_ratio: Share = Field(default=0.1, description="Tokens whose rarer rate reaches this share of the other are neutral.")
    neutral_min_count: PositiveInt = Field(default=10, description="... with this many occurrences in each of two languages.")
    top_examples: PositiveInt = Field(default=20, description="Examples kept per feature, at most one per sequence.")
    language_examples: NonNegativeInt = Field(
        default=5, description="As many of each language are among them, beyond top_examples where need be (not under rule v1)."
    )
    example_window: PositiveInt = Field(default=64, description="Tokens shown of an example, around its strongest position.")
    example_features: PositiveInt | None = Field(default=None, description="Keep examples of this many features per setup.")
    theta: Annotated[float, Field(gt=-1, lt=1)] | None = Field(
        default=None, description="Clusters merge while their mean cosine is at least theta; default: 99th percentile."
    )
    theta_percentile: Annotated[float, Field(gt=50, lt=100)] = Field(default=99.0, description="Of pairs of distinct tokens.")
    cluster_tokens: PositiveInt = Field(default=20_000, description="One global clustering up to this many tokens.")
    coherence_draws: PositiveInt = Field(default=50, description="Positions drawn without replacement for coherence.")
    phi_threshold: Share = Field(default=0.4, description="bilingual: phi - phi_null at least this.")
    phi_firing: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="A sentence fires above this share of the maximum."
    )
    min_firings: PositiveInt = Field(default=10, description="Firing sentences needed on each side.")
    paper_threshold: Share = Field(default=0.5, description="bilingual_paper: mixed, not single_token and R_mono at least this.")
    bootstrap: PositiveInt = Field(default=1000, description="Resamples of a 95 % interval.")
    lm_loss_tokens: PositiveInt = Field(default=200_000, description="Test tokens for the LM's loss per language.")
    labels: tuple[str, ...] = Field(default=(), description="CSV or JSONL files with granularity labels 1-4, where there are any.")


class Controls(Part):
    """Rows of every table that a careful reader asks for; each at the final checkpoint, under its own model name."""

    shuffled: bool = Field(default=False, description="The final model with the entries of every weight matrix permuted.")
    frozen_decoder: bool = Field(default=False, description="SAEs whose decoder never leaves its random start.")


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Translation(Part):
    """Translation before and after: few-shot prompts, greedy decoding, scores (METHOD 6)."""

    pairs: PositiveInt = Field(default=1000, description="Sentence pairs; below 1,000 differences drown in noise.")
    files: tuple[str, ...] = Field(
        default=(),
        description="LLM-jp-eval's ALT or WikiCorpus JSON, or aligned JSONL or TSV, relative to the study file. "
        "Default: the aligned test sentences.",
    )
    shots: NonNegativeInt | None = Field(
        default=None, description="Examples in the prompt, from the file or aligned dev sentences. Default: 4; planted world: 2."
    )
    intro: str = Field(default="", description="Text before the examples; {instruction} is that of an LLM-jp-eval file.")
    shot: str | None = Field(
        default=None,
        description="An example, with {source}, {target}, {source_name}, {target_name}. "
        "Default: two named lines; planted world: sentence, separator, translation, separator.",
    )
    query: str | None = Field(
        default=None, description="What the model goes on from, with {source}. Default: shot, cut at the target."
    )
    stop: str | None = Field(default=None, description="Text that ends a translation. Default: line break; planted: separator.")
    max_new_tokens: PositiveInt | None = Field(default=None, description="Longest translation. Default: 128; planted world: 12.")
    batch: PositiveInt | None = Field(
        default=None, description="Sentences translated together; it changes rounding only. Default: 64; planted world: 250."
    )
    draws: NonNegativeInt = Field(default=32, description="Random draws translated for each part; fewer than 19 decide nothing.")
    drawn: tuple[str, ...] | None = Field(default=None, description="Parts whose draws are translated. Default: all.")
    bleu_tokenize: str = Field(
        default="auto", description="sacrebleu's tokenizer; auto: ja-mecab for Japanese where MeCab is installed, else char; 13a."
    )


class InterventionConfig(Part):
    """The causal test (METHOD 6): a part of the donor's state added to the base's, with controls."""

    models: tuple[Name, ...] | None = Field(default=None, description="Which models. Default: the largest that is no control.")
    bases: tuple[NonNegativeInt, ...] | Literal["half"] = Field(
        default="half", description="Steps of the base; half: the first at which half of the fall in log perplexity is done."
    )
    donor: NonNegativeInt | Literal["final"] = Field(default="final", description="Step of the donor.")
    donor_model: Name | None = Field(default=None, description="Model of the donor, of the same width. Default: the base's own.")
    layers: tuple[NonNegativeInt, ...] | Literal["middle"] = Field(
        default="middle", description="Studied layers, each an experiment of its own; middle: that of the report's curves."
    )
    together: bool = Field(default=False, description="Patch all these layers at once, as one experiment.")
    parts: tuple[str, ...] | None = Field(
        default=None, description="Default: each language, mixed, bilingual, bilingual_paper, all, and the names of features."
    )
    features: dict[Name, tuple[NonNegativeInt, ...] | str] = Field(
        default_factory=dict,
        description="Parts of your own: name = [feature ids] of the donor's SAE, or a condition on the feature table in SQL, "
        'such as "phi > 0.6 and density < 0.01".',
    )
    mode: Literal["add", "replace"] = Field(
        default="add", description="replace: the base's own part, read by the same SAE, is taken out."
    )
    scale: Literal["matched", "raw"] = Field(
        default="matched", description="matched: what is added has the base's norm; raw: the donor's own."
    )
    alphas: tuple[Finite, ...] = Field(
        default=(0.1, 0.2, 0.4, 0.8, 1.0),
        description="Strengths, all reported on test; the best for `all` on dev text of the same kind is chosen, and has controls.",
    )
    draws: NonNegativeInt = Field(default=32, description="Random draws of matched activation mass per part and pool; 19 or more.")
    texts: tuple[Literal["documents", "sentences"], ...] = Field(
        default=("documents", "sentences"), description="Held-out text: documents of the test split, aligned test sentences alone."
    )
    tokens: PositiveInt = Field(default=200_000, description="At most this many tokens of each text, over all languages.")
    window: Annotated[int, Field(ge=3)] | None = Field(
        default=None, description="Tokens of one pass; longer documents are cut into windows. Default: the length of a block."
    )
    stride: PositiveInt | None = Field(default=None, description="New tokens of each later window. Default: half a window.")
    bootstrap: PositiveInt = Field(default=1000, description="Resamples of documents or articles for a 95 % interval.")
    translation: Translation | None = Field(default=None, description="Translate, too.")

    @model_validator(mode="after")
    def _sense(self) -> InterventionConfig:
        if not self.alphas or len(set(self.alphas)) != len(self.alphas):
            raise ValueError("alphas needs at least one strength, none twice")
        if self.bases == () or self.layers == () or self.texts == () or self.parts == ():
            raise ValueError("bases, layers, texts and parts need at least one entry where they are given")
        if taken := [name for name in self.features if name in CLASS_NAMES or name == "bilingual_paper"]:
            raise ValueError(f"features.{taken[0]}: that is the name of a class; choose another")
        return self


class ReportConfig(Part):
    """What the report shows first."""

    layer: NonNegativeInt | Literal["middle"] = Field(default="middle", description="Layer of the curves over training.")
    pattern_features: PositiveInt = Field(default=6, description="Features shown per checkpoint in the activation patterns.")
    pattern_examples: PositiveInt = Field(default=4, description="Examples shown per feature.")
    licences: tuple[str, ...] = Field(default=(), description="Licence and attribution of the data, one line each.")


class WandbConfig(Part):
    """Where on Weights & Biases. The key of your account is none of the study's: it comes from `wandb login` or WANDB_API_KEY."""

    project: Annotated[str, Field(min_length=1)] = Field(description="Project; it is made where there is none of that name.")
    entity: str | None = Field(default=None, description="User or team. Default: the account's own.")
    group: str | None = Field(default=None, description="Group of the runs, one for each unit. Default: the study's name.")
    tags: tuple[str, ...] = Field(default=(), description="Tags of every run.")
    mode: Literal["online", "offline"] | None = Field(
        default=None, description="offline: files for `wandb sync`, below RUN/metrics/wandb. Default: WANDB_MODE, else online."
    )


class LoggingConfig(Part):
    """Who is told of the metrics besides RUN/metrics: no part of the study's identity, of any key or result."""

    tensorboard: bool = Field(default=False, description="Event files below RUN/metrics/tensorboard (extra tensorboard).")
    wandb: WandbConfig | None = Field(default=None, description="Runs on Weights & Biases (extra wandb).")


class Study(Part):
    """A study: models x checkpoints x layers x SAE settings on a corpus in two or more languages."""

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema", description="Version of this file format.")
    study: StudyInfo = Field(description="Name and seed.")
    compute: Compute = Field(default_factory=Compute, description="Threads, device, precision.")
    corpus: Annotated[PlantedCorpus | TextCorpus, Field(discriminator="kind")] = Field(description="The text.")
    layers: tuple[NonNegativeInt, ...] | Literal["all"] = Field(
        default="all", description="0 = embeddings, L = output of decoder block L; all = 1..n."
    )
    models: tuple[Model, ...] = Field(min_length=1, description="The language models.")
    sae: SAEConfig = Field(description="The sparse autoencoders.")
    features: FeaturesConfig = Field(default_factory=FeaturesConfig, description="The measures.")
    controls: Controls = Field(default_factory=Controls, description="Control rows.")
    intervention: InterventionConfig | None = Field(default=None, description="The causal test; left out: none is made.")
    report: ReportConfig = Field(default_factory=ReportConfig, description="The report.")
    logging: LoggingConfig | None = Field(default=None, description="Loggers of metrics; left out: none.")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = [m.name for m in self.models]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two models are called {', '.join(twice)}")
        if self.corpus.kind == "planted" and any(m.source == "checkpoints" for m in self.models):
            raise ValueError("models from checkpoints need corpus.kind = 'text': the planted world has its own vocabulary")
        if isinstance(self.corpus, TextCorpus):
            pretrained = [m.name for m in self.models if m.source == "pretrain"]
            trained_elsewhere = len(pretrained) < len(self.models)
            if pretrained and self.corpus.tokenizer is None and self.corpus.tokenizer_training is None:
                raise ValueError("models trained here need corpus.tokenizer or [corpus.tokenizer_training]")
            if trained_elsewhere and self.corpus.tokenizer_training is not None:
                raise ValueError("corpus.tokenizer_training is for models trained here; checkpoints bring their tokenizer")
            if self.features.rule == "v1" and set(self.corpus.languages) != {"en", "ja"}:
                raise ValueError("features.rule = 'v1' knows English and Japanese only")
        if self.layers == () or any(m.layers == () for m in self.models):
            raise ValueError("layers = []: name at least one layer, or 'all'")
        for model in self.models:
            if isinstance(model, PretrainModel):
                limit, chosen = model.n_layers, model.layers or self.layers
            elif model.shape is not None:
                limit, chosen = model.shape.n_layers, model.layers or self.layers
            else:
                continue
            if chosen != "all" and (beyond := [x for x in chosen if x > limit]):
                raise ValueError(f"layer {beyond[0]} is beyond model {model.name}, which has {limit}: use 0..{limit}")
        return self

    @model_validator(mode="after")
    def _report_layer(self) -> Study:
        wanted = self.report.layer
        chosen = [m.layers or self.layers for m in self.models]
        if isinstance(wanted, int) and all(not isinstance(x, str) and wanted not in x for x in chosen):
            raise ValueError(f"report.layer = {wanted} is not among the studied layers: choose one of them, or 'middle'")
        return self

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes in the order of every table."""
        return self.corpus.languages

    def dump(self) -> dict[str, Any]:
        """The study as plain values, ready for TOML or a hash."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def identity(self) -> dict[str, Any]:
        """What of `dump` belongs to the study: who is told of a run's metrics does not."""
        return {name: value for name, value in self.dump().items() if name != "logging"}
