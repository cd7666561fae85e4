"""The surface of the planted world: its vocabulary with the truth per word, and sentences in English and Japanese.

Shapes: M meanings, W word slots of a sentence (0 = empty slot), V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glottoscope.corpus import planted_lexicon as lx
from glottoscope.corpus.planted_grammar import EXISTENCE, PERSON, PLACE, Bools, Ints, Meanings, NounPhrase, Slots

ENGLISH, JAPANESE, NO_LANGUAGE = 0, 1, 255


class Surface:
    """Words of both languages and the realisation of meanings in them.

    Attributes:
        vocabulary: id -> word.
        language: uint8 [V], 0 English, 1 Japanese, 255 special or shared.
        concept: int32 [V], index into `planted_lexicon.CONCEPTS`, -1 for function words, specials and shared words.
        category: int32 [V], index into `planted_lexicon.CATEGORIES`, -1 as above.
        shared: bool [V], digits, names and punctuation of both languages.
    """

    def __init__(self, *, shared_tokens: bool) -> None:
        self.shared_tokens = shared_tokens
        rows: dict[str, tuple[int, int, bool]] = dict.fromkeys(lx.SPECIAL, (NO_LANGUAGE, -1, False))

        def add(words: tuple[str, ...], language: int, concept: int = -1, shared: bool = False) -> None:
            rows.update(dict.fromkeys(words, (language, concept, shared)))

        if shared_tokens:
            add(lx.SHARED_PUNCTUATION + lx.DIGITS + lx.NAMES, NO_LANGUAGE, shared=True)
            add((lx.YEAR_WORD,), JAPANESE)
        add(lx.ENGLISH_FUNCTION, ENGLISH)
        add(lx.JAPANESE_FUNCTION, JAPANESE)
        for index, concept in enumerate(lx.CONCEPTS):
            add(concept.english, ENGLISH, index)
            add((concept.japanese,), JAPANESE, index)
        self.vocabulary = list(rows)
        self.id_of = {word: i for i, word in enumerate(self.vocabulary)}
        self.language = np.array([row[0] for row in rows.values()], np.uint8)
        self.concept = np.array([row[1] for row in rows.values()], np.int32)
        self.shared = np.array([row[2] for row in rows.values()])
        of_concept = np.array([c.category for c in lx.CONCEPTS], np.int32)
        self.category = np.where(self.concept >= 0, of_concept[self.concept], np.int32(-1))
        self._make_tables()

    def _make_tables(self) -> None:
        # One row more than there are concepts, all zeros: concept -1 ("no such part") looks up the empty slot.
        def column(*words: str) -> NDArray[np.uint16]:
            return np.array([self.id_of[w] if w else 0 for w in (*words, "")], np.uint16)

        concepts = lx.CONCEPTS
        english = [(c.english + c.english[-1:] * 2)[:3] for c in concepts]
        self.base = column(*(e[0] for e in english))
        self.second_form = column(*(e[1] for e in english))  # plural of a noun, third person of a verb
        self.past = column(*(e[2] for e in english))
        self.japanese = column(*(c.japanese for c in concepts))
        self.preposition = column(*(c.preposition for c in concepts))
        self.counter = column(*(c.counter for c in concepts))
        self.linker = column(*(c.linker for c in concepts))
        time_in = column(*("in" if c.time_noun else "" for c in concepts))
        self.time_in, self.time_the = time_in, np.where(time_in > 0, self.id_of["the"], 0).astype(np.uint16)
        self.time_ni = np.where(time_in > 0, self.id_of["に"], 0).astype(np.uint16)
        self.mass = np.array([*(c.mass for c in concepts), False])
        self.animate = np.array([*(c.category in (lx.PERSON, lx.ANIMAL) for c in concepts), False])
        self.vowel = np.array([w[0] in "aeiou" for w in self.vocabulary])
        self.connectives = (column("", "and", "but", "so"), column("", "そして", "しかし", "だから"))
        if self.shared_tokens:
            self.digits, self.names = column(*lx.DIGITS), column(*lx.NAMES)

    def realise(self, meanings: Meanings, language: int) -> Slots:
        """Sentences [M, W] in `language`; the words are the non-zero slots in order."""
        columns = self._english(meanings) if language == ENGLISH else self._japanese(meanings)
        slots = np.empty((len(meanings.kind), len(columns)), np.uint16)
        for i, column in enumerate(columns):
            slots[:, i] = column
        return slots

    def _when(self, condition: Bools, word: str | NDArray[np.uint16]) -> Slots:
        ids = np.uint16(self.id_of[word]) if isinstance(word, str) else word
        return np.where(condition, ids, np.uint16(0))

    def _one_of(self, conditions: list[Bools], words: list[str]) -> Slots:
        """The word of the first condition that holds, else the empty slot."""
        out = np.zeros(len(conditions[0]), np.uint16)
        for condition, word in zip(reversed(conditions), reversed(words), strict=True):
            out = np.where(condition, np.uint16(self.id_of[word]), out)
        return out

    def _number(self, phrase: NounPhrase, second_digit: Ints, table: NDArray[np.uint16]) -> list[Slots]:
        words = table[phrase.number]
        if not self.shared_tokens:
            return [words]
        spelled = (phrase.number >= 0) & (second_digit >= 0)
        first_number = next(i for i, c in enumerate(lx.CONCEPTS) if c.category == lx.NUMBER)  # "two"
        value = np.where(spelled, phrase.number - first_number + 2, -1)
        return [np.where(spelled, self.digits[value], words), self.digits[np.where(spelled, second_digit, -1)]]

    # --- English: (time) (auxiliary) subject verb object (place) ---

    def _english_phrase(self, phrase: NounPhrase, second_digit: Ints) -> list[Slots]:
        noun = np.where(phrase.plural, self.second_form[phrase.noun], self.base[phrase.noun])
        adjective, number = self.base[phrase.adjective], self._number(phrase, second_digit, self.base)
        vowel = self.vowel[np.where(adjective > 0, adjective, noun)]
        there, one, two = phrase.noun >= 0, phrase.determiner == 1, phrase.determiner == 2
        some = phrase.plural | self.mass[phrase.noun]
        plural = phrase.plural
        determiner = self._one_of(
            [~there, one & ~plural, one, two & ~plural, two, phrase.known, phrase.number >= 0, some, vowel, there],
            ["<pad>", "this", "these", "that", "those", "the", "<pad>", "some", "an", "a"],
        )
        return [determiner, *number, adjective, noun]

    def _english(self, m: Meanings) -> list[Slots]:
        acts, plural = m.verb >= 0, m.subject.plural
        past, future = acts & (m.tense == 2), acts & (m.tense == 3)
        helper = acts & (m.question | m.negative)
        auxiliary = self._one_of(
            [~acts & plural, ~acts, future, ~helper, past, plural], ["are", "is", "will", "<pad>", "did", "do"]
        )
        auxiliary = np.where(helper & (auxiliary == 0), np.uint16(self.id_of["does"]), auxiliary)
        bare = helper | future
        verb = np.where(~past & ~plural, self.second_form[m.verb], self.base[m.verb])
        verb = np.where(past, self.past[m.verb], verb)
        verb = np.where(bare, self.base[m.verb], verb)
        exists = m.kind == EXISTENCE
        before = m.question & ~exists
        owner = m.possessor >= 0
        object_phrase = self._english_phrase(m.object, m.number_digit)
        owned = owner & (m.object.noun >= 0)
        object_phrase[0] = np.where(owned, np.uint16(0), object_phrase[0])  # "the teacher 's book"
        owner_article = self._one_of(
            [~owner, m.possessor_known, self.vowel[self.base[m.possessor]], owner], ["<pad>", "the", "an", "a"]
        )
        has_place = m.place >= 0
        subject = self._english_phrase(m.subject, m.number_digit)
        year, comma = self._year(m)
        return [
            self.connectives[ENGLISH][m.connective],
            *([self._when(m.year_digits[:, 0] >= 0, "in"), *year, comma] if year else []),
            self.time_in[m.time], self.time_the[m.time], self.base[m.time],
            self._when(exists, "there"), self._when(before | exists, auxiliary),
            *self._name(m), *subject,
            self._when(~before & ~exists, auxiliary), self._when(m.negative, "not"), verb,
            self._when(m.very, "very"), self.base[m.quality],
            owner_article, self.base[m.possessor], self._when(owned, "'s"), *object_phrase,
            self.preposition[m.place], self._when(has_place, "the"), self.base[m.place],
            *self._end(m),
        ]  # fmt: skip

    # --- Japanese: (time) subject (place) object verb ---

    def _japanese_phrase(self, phrase: NounPhrase, second_digit: Ints) -> list[Slots]:
        counted = phrase.number >= 0
        return [
            self._one_of([phrase.determiner == 1, phrase.determiner == 2], ["この", "その"]),
            *self._number(phrase, second_digit, self.japanese),
            self._when(counted, self.counter[phrase.noun]), self._when(counted, "の"),
            self.japanese[phrase.adjective], self.linker[phrase.adjective], self.japanese[phrase.noun],
        ]  # fmt: skip

    def _japanese(self, m: Meanings) -> list[Slots]:
        acts, exists = m.verb >= 0, m.kind == EXISTENCE
        is_there = exists | (m.kind == PLACE)
        named = m.name >= 0
        topic = ~exists & (m.subject.known | named | ~acts | (m.subject.determiner > 0))
        has_place, has_object = m.place >= 0, m.object.noun >= 0
        owner = m.possessor >= 0
        past, negative = acts & (m.tense == 2), m.negative
        place = [self.japanese[m.place], self._one_of([has_place & is_there, has_place], ["に", "で"])]
        predicate_noun = m.kind == PERSON
        year, comma = self._year(m)
        has_year = m.year_digits[:, 0] >= 0
        return [
            self.connectives[JAPANESE][m.connective],
            *([*year, self._when(has_year, lx.YEAR_WORD), self._when(has_year, "に"), comma] if year else []),
            self.japanese[m.time], self.time_ni[m.time],
            *(self._when(exists, word) for word in place),
            *self._name(m), *self._japanese_phrase(m.subject, m.number_digit),
            self._one_of([topic, topic | (m.subject.noun >= 0)], ["は", "が"]),
            *(self._when(~exists, word) for word in place),
            self.japanese[m.possessor], self._when(owner, "の"),
            *self._japanese_phrase(m.object, m.number_digit), self._when(has_object & ~predicate_noun, "を"),
            self._when(m.very, "とても"), self.japanese[m.quality],
            self.japanese[m.verb],
            self._one_of([is_there & self.animate[m.subject.noun], is_there], ["い", "あり"]),
            self._one_of([~acts & ~is_there, negative, past, acts | is_there], ["です", "ません", "ました", "ます"]),
            self._when(negative & past, "でした"),
            self._when(m.question, "か"),
            *self._end(m),
        ]  # fmt: skip

    # --- both languages ---

    def _name(self, m: Meanings) -> list[Slots]:
        return [self.names[m.name]] if self.shared_tokens else []

    def _year(self, m: Meanings) -> tuple[list[Slots], Slots]:
        if not self.shared_tokens:
            return [], np.zeros(0, np.uint16)
        return [self.digits[m.year_digits[:, i]] for i in range(4)], self._when(m.year_digits[:, 0] >= 0, ",")

    def _end(self, m: Meanings) -> list[Slots]:
        """Punctuation is planted with the shared tokens only: a full stop of each language would take features for nothing."""
        if not self.shared_tokens:
            return []
        return [self._one_of([m.question, m.exclaimed, np.ones(len(m.kind), bool)], ["?", "!", "."])]
