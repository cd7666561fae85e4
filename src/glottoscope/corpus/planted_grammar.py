"""The shared semantic grammar of the planted world: meanings drawn once, realised in English and in Japanese.

Shapes: D documents, S sentences of a document, M = D * S meanings, W word slots of a sentence, V vocabulary. A slot
that a sentence leaves empty holds 0 (the id of the padding), so a document is its non-empty slots in order.
Everything is table look-ups over whole arrays: no Python loop over sentences.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.corpus import planted_lexicon as lx

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Slots = NDArray[np.uint16]

MIN_WORDS = 3  # of a sentence, in either language: documents rely on it to draw enough sentences
_ANY_TOPIC = len(lx.TOPICS)

# Kinds of sentence: "the dog sleeps", "the dog eats a fish", "the dog is big", "the dog is in the house",
# "there are two dogs in the house", "the woman is a doctor".
ACTIVITY, ACTION, QUALITY, PLACE, EXISTENCE, PERSON = range(6)
_WEIGHT = (0.2, 0.64, 0.05, 0.05, 0.01, 0.05)
_WORDS = ((4, 5), (6, 7), (5, 5), (7, 7), (8, 10), (6, 5))  # (English, Japanese) without any extra
_FLAGS = (
    "adjective", "number", "demonstrative", "object_adjective", "object_number", "possessor",
    "place", "time", "negative", "question", "connective", "very", "year", "name",
)  # fmt: skip
# Mostly content: with much grammar, so small an SAE spends its features on grammar, which is each language's own.
_PROBABILITY = (0.4, 0.1, 0.01, 0.4, 0.1, 0.01, 0.4, 0.4, 0.01, 0.01, 0.01, 0.01, 0.25, 0.3)
_EXTRA_WORDS = (
    (1, 2), (1, 3), (0, 1), (1, 2), (1, 3), (2, 2), (3, 2), (3, 2), (2, 1), (1, 1), (1, 1), (1, 1), (6, 6), (0, 0),
)  # fmt: skip
_ALLOWED = {
    ACTIVITY: {"adjective", "number", "demonstrative", "place", "time", "negative", "question", "connective", "year"},
    ACTION: set(_FLAGS) - {"very", "year"},
    QUALITY: {"demonstrative", "question", "connective", "very"},
    PLACE: {"adjective", "demonstrative", "question", "connective"},
    EXISTENCE: {"adjective", "connective"},
    PERSON: {"adjective", "demonstrative", "object_adjective", "question", "connective"},
}
_EXCLUSIVE = (
    {"number", "demonstrative"}, {"negative", "question"}, {"time", "connective"}, {"time", "year"},
    {"year", "connective"}, {"connective", "question"}, {"object_number", "possessor"},
    {"name", "adjective"}, {"name", "number"}, {"name", "demonstrative"},
)  # fmt: skip


class Frames(NamedTuple):
    """Every admissible combination of a kind and its extras, with its cumulative probability."""

    kind: Ints
    flags: dict[str, Bools]
    cumulative: NDArray[np.float64]


def make_frames(*, shared_tokens: bool, max_words: int = 12) -> Frames:
    """Enumerate the sentence frames of at most `max_words` words in either language."""
    limit = max_words + 2 * shared_tokens  # room for a year of four digits
    rows: list[tuple[int, tuple[bool, ...], float]] = []
    for kind, allowed in _ALLOWED.items():
        usable = [f in allowed and (shared_tokens or f not in ("year", "name")) for f in _FLAGS]
        for on in product(*((False, True) if use else (False,) for use in usable)):
            names = {f for f, flag in zip(_FLAGS, on, strict=True) if flag}
            words = [sum(w[g] for w, o in zip(_EXTRA_WORDS, on, strict=True) if o) + _WORDS[kind][g] for g in (0, 1)]
            if max(words) > limit or any(pair <= names for pair in _EXCLUSIVE):
                continue
            odds = [p if o else 1 - p for p, o, u in zip(_PROBABILITY, on, usable, strict=True) if u]
            rows.append((kind, on, float(np.prod(odds))))
    kinds = np.array([kind for kind, _, _ in rows])
    weights = np.array([weight for _, _, weight in rows])
    weights *= (np.array(_WEIGHT) / np.bincount(kinds, weights))[kinds]
    flags = {f: np.array([on[i] for _, on, _ in rows]) for i, f in enumerate(_FLAGS)}
    return Frames(kinds, flags, np.cumsum(weights) / weights.sum())


class NounPhrase(NamedTuple):
    """Arrays [M]: noun concept (-1 none), adjective concept (-1 none), number concept (-1 none), and flags."""

    noun: Ints
    adjective: Ints
    number: Ints
    plural: Bools
    known: Bools  # repeated from earlier in the document: definite in English, topic は in Japanese
    determiner: Ints  # 0 article, 1 "this", 2 "that"


class Meanings(NamedTuple):
    """Arrays [M]; -1 means the sentence has no such part. `tense`: 1 present, 2 past, 3 future."""

    kind: Ints
    subject: NounPhrase
    object: NounPhrase
    possessor: Ints
    possessor_known: Bools
    verb: Ints
    quality: Ints
    place: Ints
    time: Ints
    tense: Ints
    negative: Bools
    question: Bools
    very: Bools
    connective: Ints  # 0 none, 1..3
    year_digits: Ints  # [M, 4], -1 none
    name: Ints  # -1 none, else which name stands for the subject
    number_digit: Ints  # a second, spelled-out digit after the subject's or object's number; -1 none
    exclaimed: Bools


class Semantics:
    """Tables over concepts, and the draw of meanings from them.

    Args:
        shared_tokens: also draw years, counts in digits, and proper names.
        topic_probability: share of the content drawn from the document's topic; the rest from all concepts.
        memory_probability: how often a noun repeats an earlier noun of its category in the same document.
    """

    def __init__(self, *, shared_tokens: bool, topic_probability: float, memory_probability: float) -> None:
        concepts = lx.CONCEPTS
        self.shared_tokens = shared_tokens
        self.topic_probability = topic_probability
        self.memory_probability = memory_probability
        self.frames = make_frames(shared_tokens=shared_tokens)
        self.category = np.array([c.category for c in concepts])
        self.mass = np.array([c.mass for c in concepts])
        self.animals_can = np.array([c.animals_can for c in concepts])
        self.forced_tense = np.array([lx.TENSES.index(c.tense) for c in concepts])
        self.pool, self.pool_size = _padded([self._pool(t, c) for t in (*lx.TOPICS, None) for c in range(13)])
        by_name = {c.name: i for i, c in enumerate(concepts)}
        # What a verb takes: -1 - category for "any noun of it", or one concept.
        objects = [[-1 - lx.CATEGORIES.index(o) if o in lx.CATEGORIES else by_name[o] for o in c.objects] or [0] for c in concepts]
        self.objects, self.n_objects = _padded(objects)

    @staticmethod
    def _pool(topic: str | None, category: int) -> list[int]:
        """Concepts of a category that belong to a topic: those that name it first, else second, and so on.

        A topic without, say, drinks of its own has two of them all the same: context predicts every content word.
        """
        members = [i for i, c in enumerate(lx.CONCEPTS) if c.category == category]
        if topic is None:
            return members
        for rank in range(4):
            if found := [i for i in members if lx.CONCEPTS[i].topics[rank : rank + 1] == (topic,)]:
                return found
        first = 2 * lx.TOPICS.index(topic)
        return [members[(first + i) % len(members)] for i in range(2)]

    def _pick(self, topic: Ints, category: Ints | int, uniform: NDArray[np.float32]) -> Ints:
        """Concepts of `category`, of the topic with `topic_probability`; one uniform number decides both."""
        p = self.topic_probability
        inside = uniform < p
        rest = np.where(inside, uniform / np.float32(p or 1), (uniform - np.float32(p)) / np.float32(1 - p or 1))
        row = np.where(inside, topic, _ANY_TOPIC) * 13 + category
        size = self.pool_size[row]
        return self.pool[row, np.minimum((rest * size).astype(np.int64), size - 1)]

    def draw(self, rng: np.random.Generator, topic_D: Ints, n_sentences: int) -> Meanings:
        """Draw `n_sentences` meanings for each document of topics `topic_D`; M is document-major."""
        topic = np.repeat(topic_D, n_sentences)
        n = len(topic)
        uniform = iter(rng.random((28, n), dtype=np.float32))
        frame = np.searchsorted(self.frames.cumulative, rng.random(n) * (1 - 1e-12), side="right")
        kind = self.frames.kind[frame]
        flag = {name: table[frame] for name, table in self.frames.flags.items()}
        acts = (kind == ACTIVITY) | (kind == ACTION)

        # A document has a favourite verb, adjective and time, to which it comes back as it does to its nouns.
        favourites = np.stack(
            [
                np.repeat(self._pick(topic_D, c, u_D), n_sentences)
                for c, u_D in enumerate(rng.random((13, len(topic_D)), np.float32))
            ]
        )

        def favoured(category: Ints | int) -> Ints:
            again = rng.random(n, dtype=np.float32) < self.memory_probability
            return np.where(again, favourites[category, np.arange(n)], self._pick(topic, category, next(uniform)))

        verb = favoured(np.where(kind == ACTION, lx.ACTION, lx.ACTIVITY))
        # Actors are people or animals; what is somewhere may be anything but a place, what is big also a place.
        nouns = np.array([lx.PERSON, *range(lx.PLACE), *range(lx.PLACE + 1, lx.NATURE + 1), lx.PLACE])
        mixed = nouns[(next(uniform) * np.where(kind == QUALITY, len(nouns), len(nouns) - 1)).astype(np.int64)]
        actor = np.where(self.animals_can[verb] & (next(uniform) < 0.45) & ~flag["name"], lx.ANIMAL, lx.PERSON)
        subject_category = np.where(acts, actor, np.where(kind == PERSON, lx.PERSON, mixed))
        choice = self.objects[verb, (next(uniform) * self.n_objects[verb]).astype(np.int64)]
        choice = np.where(kind == PERSON, -1 - lx.PERSON, choice)
        object_category = np.where(choice < 0, -1 - choice, self.category[choice])

        has_object = (kind == ACTION) | (kind == PERSON)
        has_place = flag["place"] | (kind == PLACE) | (kind == EXISTENCE)
        categories = np.stack([subject_category, object_category, np.full(n, lx.PLACE), np.full(n, lx.PERSON)], axis=1)  # [M, 4]
        used = np.stack([~flag["name"], has_object, has_place, flag["possessor"]], axis=1)
        fresh = np.stack([self._pick(topic, categories[:, i], next(uniform)) for i in range(4)], axis=1)
        fresh[:, 1] = np.where(choice >= 0, choice, fresh[:, 1])
        repeatable = used & (rng.random((n, 4), dtype=np.float32) < self.memory_probability)
        repeatable[:, 1] &= choice < 0  # a verb that wants a letter gets a letter
        document = np.repeat(np.arange(n) // n_sentences, 4).reshape(n, 4)
        noun, known = _remember(rng, fresh, categories, used, repeatable, document)
        # Nobody sees, owns or is itself: the later mention becomes any noun of its category.
        for later, earlier in ((1, 0), (2, 1), (3, 0), (3, 1)):
            same = used[:, later] & used[:, earlier] & (noun[:, later] == noun[:, earlier])
            anything = self._pick(np.full(n, _ANY_TOPIC), categories[:, later], next(uniform))
            noun[same, later], known[same, later] = anything[same], False

        second_digit = np.full(n, -1)
        if self.shared_tokens:
            second_digit = np.where(next(uniform) < 0.35, (next(uniform) * 10).astype(np.int64), -1)
        phrases = []
        for i, prefix in ((0, ""), (1, "object_")):
            present = used[:, i]
            counted = flag[f"{prefix}number"] | ((kind == EXISTENCE) if i == 0 else False)
            counted = counted & present & ~self.mass[noun[:, i]]
            number = np.where(counted, self._pick(topic, lx.NUMBER, next(uniform)), -1)
            plural = counted | ((next(uniform) < 0.1) & ~self.mass[noun[:, i]])
            plural &= (kind != PERSON) & present  # "the woman is a doctor" stays singular on both sides
            adjective = np.where(flag[f"{prefix}adjective"] & present, favoured(lx.QUALITY), -1)
            demonstrative = 1 + (next(uniform) < 0.5).astype(np.int64)
            determiner = np.where(flag["demonstrative"] & (i == 0), demonstrative, 0)
            # "there is" introduces: always indefinite; so is the doctor that a woman is.
            definite = known[:, i] & (kind != (EXISTENCE if i == 0 else PERSON))
            phrases.append(NounPhrase(np.where(present, noun[:, i], -1), adjective, number, plural, definite, determiner))

        time = np.where(flag["time"], favoured(lx.TIME), -1)
        tense = np.where(flag["time"], self.forced_tense[time], 0)
        free = np.where((next(uniform) < 0.02) | flag["year"], 2, 1)
        tense = np.where(acts, np.where(tense == 0, free, tense), 1)
        quality = np.where(kind == QUALITY, favoured(lx.QUALITY), -1)
        years = np.full((n, 4), -1)
        name = np.full(n, -1)
        exclaimed = np.zeros(n, bool)
        if self.shared_tokens:
            drawn = rng.integers(0, 10, (n, 4))
            drawn[:, 0] = rng.integers(1, 3, n)
            years = np.where(flag["year"][:, None], drawn, -1)
            name = np.where(flag["name"], rng.integers(0, len(lx.NAMES), n), -1)
            exclaimed = rng.random(n, dtype=np.float32) < 0.1
        return Meanings(
            kind=kind,
            subject=phrases[0],
            object=phrases[1],
            possessor=np.where(flag["possessor"], noun[:, 3], -1),
            possessor_known=known[:, 3],
            verb=np.where(acts, verb, -1),
            quality=quality,
            place=np.where(has_place, noun[:, 2], -1),
            time=time,
            tense=tense,
            negative=flag["negative"],
            question=flag["question"],
            very=flag["very"],
            connective=np.where(flag["connective"], 1 + (next(uniform) * 3).astype(np.int64), 0),
            year_digits=years,
            name=name,
            number_digit=second_digit,
            exclaimed=exclaimed,
        )


def _padded(lists: list[list[int]]) -> tuple[Ints, Ints]:
    width = max(map(len, lists))
    return np.array([row + [row[0]] * (width - len(row)) for row in lists]), np.array([len(row) for row in lists])


def _remember(
    rng: np.random.Generator, fresh: Ints, category: Ints, used: Bools, repeat: Bools, document: Ints
) -> tuple[Ints, Bools]:
    """Let nouns repeat an earlier one of their document and category; all arrays [M, 4] in reading order.

    A repeating noun points at a uniformly drawn earlier mention, which may itself point further back; pointer
    doubling follows all the chains at once. Returns the nouns and which of them were repeated.
    """
    mention = np.flatnonzero(used)
    key = (document.ravel()[mention] * 16 + category.ravel()[mention]) * (used.size + 1) + mention
    order = np.argsort(key)  # groups mentions by document and category, in reading order within a group
    mention = mention[order]
    group = document.ravel()[mention] * 16 + category.ravel()[mention]
    n = len(mention)
    index = np.arange(n)
    starts = np.maximum.accumulate(np.where(np.r_[True, group[1:] != group[:-1]], index, 0))
    rank = index - starts
    repeated = repeat.ravel()[mention] & (rank > 0)
    earlier = starts + np.minimum((rng.random(n, dtype=np.float32) * rank).astype(np.int64), np.maximum(rank - 1, 0))
    pointer = np.where(repeated, earlier, index)
    while True:
        further = pointer[pointer]
        if np.array_equal(further, pointer):
            break
        pointer = further
    noun, known = fresh.copy(), np.zeros_like(used)
    noun.ravel()[mention] = fresh.ravel()[mention][pointer]
    known.ravel()[mention] = repeated
    return noun, known
