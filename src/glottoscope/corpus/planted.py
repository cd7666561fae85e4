"""A bilingual world with planted truth: unlimited English and Japanese text in which every token's concept is known.

One semantic grammar (concepts in categories, topics that make context predict concepts) is realised in English (SVO,
articles, plurals) and in Japanese (SOV, particles). Because the truth is known, it shows whether the instrument sees
bilingual features when they are there, and, with `negative=True`, whether it sees none when they cannot be.

Shapes: D documents, T positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from glottoscope.corpus import planted_lexicon as lx
from glottoscope.corpus.planted_grammar import MIN_WORDS, Ints, Semantics, Slots
from glottoscope.corpus.planted_surface import ENGLISH, JAPANESE, Surface
from glottoscope.errors import InputError

# One stream of random numbers per use, so that language-model text, statistics and pairs never share a draw.
_LM, _DOCUMENTS, _PAIRS = range(3)
_CHUNK = 1024  # documents drawn at once: large enough that numpy's cost per call vanishes
_PAIRS_PER_DOCUMENT = 8


class Truth(TypedDict):
    """What is planted, per vocabulary entry."""

    language: NDArray[np.uint8]  # [V] index into `languages`; 255 = special or shared
    concept: NDArray[np.int32]  # [V] index into `concepts`; -1 = none
    category: NDArray[np.int32]  # [V] index into `categories`; -1 = none
    shared: NDArray[np.bool_]  # [V] occurs in both languages: digits, names, punctuation


class PlantedWorld:
    """The planted world: documents, translation pairs, vocabulary, truth and tokenizer.

    Args:
        seed: of all draws; the grammar itself never changes.
        negative: no cross-lingual signal: neither parallel nor code-switched documents for the language model.
        shared_tokens: also plant digits, proper names and punctuation that are the same token in both languages.
        context_length: T, tokens of a document with its BOS.
        parallel_share: share of language-model documents that are sentence, separator, translation, and so on.
        switched_share: share of the monolingual language-model documents that are code-switched.
        switch_probability: how often a content word of such a document is swapped for its translation.
        topic_probability: how often a content word comes from the document's topic.
        memory_probability: how often a noun repeats an earlier one of its category in its document.

    Raises:
        InputError: a probability outside [0, 1], or a context shorter than 8.
    """

    languages: tuple[str, str] = ("en", "ja")

    def __init__(
        self,
        seed: int = 0,
        *,
        negative: bool = False,
        shared_tokens: bool = False,
        context_length: int = 64,
        parallel_share: float = 0.4,
        switched_share: float = 0.3,
        switch_probability: float = 0.3,
        topic_probability: float = 0.85,
        memory_probability: float = 0.5,
    ) -> None:
        probabilities = {
            "parallel_share": parallel_share,
            "switched_share": switched_share,
            "switch_probability": switch_probability,
            "topic_probability": topic_probability,
            "memory_probability": memory_probability,
        }
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise InputError(f"planted world: {name} is {value}; give a number from 0 to 1")
        if context_length < 8:
            raise InputError(f"planted world: context_length is {context_length}; use 8 or more")
        self.seed = seed
        self.negative = negative
        self.shared_tokens = shared_tokens
        self.context_length = context_length
        self.parallel_share = 0.0 if negative else parallel_share
        self.switched_share = 0.0 if negative else switched_share
        self.switch_probability = switch_probability
        self.concepts = [c.name for c in lx.CONCEPTS]
        self.categories = list(lx.CATEGORIES)
        self.topics = list(lx.TOPICS)
        self._semantics = Semantics(
            shared_tokens=shared_tokens, topic_probability=topic_probability, memory_probability=memory_probability
        )
        self._surface = Surface(shared_tokens=shared_tokens)
        self.vocabulary = self._surface.vocabulary
        self.truth: Truth = {
            "language": self._surface.language,
            "concept": self._surface.concept,
            "category": self._surface.category,
            "shared": self._surface.shared,
        }
        self.pad_id, self.bos_id, self.eos_id, self.separator_id, self.unk_id = range(len(lx.SPECIAL))
        self.special_ids = tuple(range(len(lx.SPECIAL)))
        self._translations, self._n_translations = self._translation_table()
        self._lm_chunk: tuple[tuple[int, int, int], NDArray[np.uint32]] | None = None

    def lm_batch(self, step: int, batch_size: int = 16, *, split_seed: int = 0) -> NDArray[np.uint32]:
        """Language-model training documents [batch_size, T], decided by (seed, split_seed, batch_size, step) alone.

        `split_seed` separates streams that must not repeat each other, such as training and held-out text.
        """
        steps = max(1, _CHUNK // batch_size)
        chunk, offset = divmod(step, steps)
        key = (split_seed, batch_size, chunk)
        if self._lm_chunk is None or self._lm_chunk[0] != key:
            rng = np.random.default_rng([self.seed, _LM, *key])
            self._lm_chunk = key, self._lm_documents(rng, steps * batch_size)
        return self._lm_chunk[1][offset * batch_size : (offset + 1) * batch_size].copy()

    def documents(self, n_per_language: int, *, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Monolingual, unswitched documents, alternating English and Japanese, without padding.

        The first documents of a seed are the same however many are asked for.

        Returns:
            tokens [2 * n_per_language, T], BOS first, and the language of each position, same shape (BOS has its
            document's language).
        """
        half = _CHUNK // 2
        tokens = np.empty((2 * n_per_language, self.context_length), np.uint32)
        for chunk, start in enumerate(range(0, n_per_language, half)):
            rng = np.random.default_rng([self.seed, _DOCUMENTS, seed, chunk])
            for language in (ENGLISH, JAPANESE):
                rows = self._monolingual(rng, half, language)[: n_per_language - start]
                tokens[2 * start + language : 2 * (start + half) : 2] = rows
        language = np.broadcast_to((np.arange(2 * n_per_language) % 2).astype(np.uint8)[:, None], tokens.shape)
        return tokens, language.copy()

    def sentence_pairs(self, n: int, *, seed: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Sentences and their translations, as token ids without BOS.

        Eight consecutive pairs come from one document (pair i belongs to document i // 8), so that repeated nouns
        are worded as in running text.

        Returns:
            English sentences, Japanese sentences, and the concepts of each pair in the order of the English words.
        """
        rng = np.random.default_rng([self.seed, _PAIRS, seed])
        topic = rng.integers(0, len(lx.TOPICS), -(-n // _PAIRS_PER_DOCUMENT))
        meanings = self._semantics.draw(rng, topic, _PAIRS_PER_DOCUMENT)
        english, japanese = (_sentences(self._surface.realise(meanings, g))[:n] for g in (ENGLISH, JAPANESE))
        concept = self.truth["concept"].tolist()
        return english, japanese, [[concept[t] for t in sentence if concept[t] >= 0] for sentence in english]

    def text(self, tokens: NDArray[np.integer]) -> str:
        """Words of `tokens` [T], joined by single spaces: what the tokenizer of `tokenizer_files` reads back."""
        return " ".join(self.vocabulary[t] for t in tokens.tolist())

    def tokenizer_files(self, directory: Path | str) -> None:
        """Write an ordinary Hugging Face tokenizer (one word, one token; words separated by spaces)."""
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(self.vocabulary)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]  (settable property)
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            sep_token="<sep>",
            unk_token="<unk>",
            model_max_length=self.context_length,
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(str(directory))

    def _monolingual(self, rng: np.random.Generator, n: int, language: int) -> NDArray[np.uint32]:
        topic = rng.integers(0, len(lx.TOPICS), n)
        n_sentences = -(-(self.context_length - 1) // MIN_WORDS)
        slots = self._surface.realise(self._semantics.draw(rng, topic, n_sentences), language)
        return self._pack(slots.reshape(n, -1))

    def _parallel(self, rng: np.random.Generator, n: int) -> NDArray[np.uint32]:
        """Sentence, separator, translation, separator, next sentence ...; one direction and topic a document."""
        topic = rng.integers(0, len(lx.TOPICS), n)
        n_pairs = -(-(self.context_length - 1) // (2 * MIN_WORDS + 2))
        meanings = self._semantics.draw(rng, topic, n_pairs)
        sides = [self._surface.realise(meanings, g) for g in (ENGLISH, JAPANESE)]
        separator = np.full((n * n_pairs, 1), self.separator_id, np.uint16)
        tokens = [
            self._pack(np.hstack([sides[first], separator, sides[1 - first], separator]).reshape(n, -1))
            for first in (ENGLISH, JAPANESE)
        ]
        return np.where(rng.random((n, 1)) < 0.5, tokens[0], tokens[1])

    def _lm_documents(self, rng: np.random.Generator, n: int) -> NDArray[np.uint32]:
        kind = rng.random(n)
        parallel = kind < self.parallel_share
        english = ~parallel & (rng.random(n) < 0.5)
        japanese = ~parallel & ~english
        tokens = np.empty((n, self.context_length), np.uint32)
        if parallel.any():
            tokens[parallel] = self._parallel(rng, int(parallel.sum()))
        for language, mask in ((ENGLISH, english), (JAPANESE, japanese)):
            if mask.any():
                tokens[mask] = self._monolingual(rng, int(mask.sum()), language)
        switched = ~parallel & (rng.random(n) < self.switched_share)
        tokens[switched] = self._switch(rng, tokens[switched])
        return tokens

    def _switch(self, rng: np.random.Generator, tokens: NDArray[np.uint32]) -> NDArray[np.uint32]:
        choices = self._n_translations[tokens]
        drawn = (rng.random(tokens.shape, dtype=np.float32) * choices).astype(np.int64)
        swap = (choices > 0) & (rng.random(tokens.shape, dtype=np.float32) < self.switch_probability)
        return np.where(swap, self._translations[tokens, drawn], tokens)

    def _translation_table(self) -> tuple[NDArray[np.uint32], Ints]:
        """Words of the same concept in the other language: ids [V, 3] and how many there are [V]."""
        id_of = self._surface.id_of
        table = np.zeros((len(self.vocabulary), 3), np.uint32)
        count = np.zeros(len(self.vocabulary), np.int64)
        for concept in lx.CONCEPTS:
            english = [id_of[w] for w in dict.fromkeys(concept.english)]
            japanese = id_of[concept.japanese]
            table[english, 0], count[english] = japanese, 1
            table[japanese, : len(english)], count[japanese] = english, len(english)
        return table, count

    def _pack(self, slots: Slots) -> NDArray[np.uint32]:
        """Drop the empty slots of documents [D, S * W]; BOS and the first T - 1 words: [D, T]."""
        filled = slots > 0
        words = slots[filled]
        length = filled.sum(1)
        start = np.cumsum(length) - length
        tokens = np.empty((len(slots), self.context_length), np.uint32)
        tokens[:, 0] = self.bos_id
        tokens[:, 1:] = words[start[:, None] + np.arange(self.context_length - 1)]
        return tokens


def _sentences(slots: Slots) -> list[list[int]]:
    filled = slots > 0
    ends = np.cumsum(filled.sum(1))[:-1]
    return [part.tolist() for part in np.split(slots[filled], ends)]
