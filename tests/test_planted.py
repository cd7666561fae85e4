"""The planted bilingual world: determinism, shape, truth, translation, negative control, shared tokens, tokenizer."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from glottoscope.corpus import planted_lexicon as lx
from glottoscope.corpus.planted import PlantedWorld
from glottoscope.errors import InputError

ENGLISH, JAPANESE, NO_LANGUAGE = 0, 1, 255


@pytest.fixture(scope="module")
def world() -> PlantedWorld:
    return PlantedWorld(0)


@pytest.fixture(scope="module")
def shared_world() -> PlantedWorld:
    return PlantedWorld(0, shared_tokens=True)


def test_vocabulary_and_truth(world: PlantedWorld) -> None:
    truth = world.truth
    assert 460 <= len(world.vocabulary) <= 500
    assert 130 <= len(world.concepts) <= 160
    assert len(world.categories) == 13
    assert len(world.topics) == 12
    assert len(set(world.vocabulary)) == len(world.vocabulary)
    for name, dtype in (("language", np.uint8), ("concept", np.int32), ("category", np.int32), ("shared", np.bool_)):
        assert truth[name].shape == (len(world.vocabulary),)
        assert truth[name].dtype == dtype
    assert not truth["shared"].any()
    assert np.flatnonzero(truth["language"] == NO_LANGUAGE).tolist() == list(world.special_ids)
    content = truth["concept"] >= 0
    assert ((truth["category"] >= 0) == content).all()
    japanese = np.bincount(truth["concept"][content & (truth["language"] == JAPANESE)], minlength=len(world.concepts))
    english = np.bincount(truth["concept"][content & (truth["language"] == ENGLISH)], minlength=len(world.concepts))
    assert (japanese == 1).all()
    assert ((english >= 1) & (english <= 3)).all()


def test_no_surface_form_has_two_meanings() -> None:
    words = [w for c in lx.CONCEPTS for w in (*dict.fromkeys(c.english), c.japanese)]
    words += [*lx.ENGLISH_FUNCTION, *lx.JAPANESE_FUNCTION, *lx.SPECIAL, *lx.SHARED_PUNCTUATION, *lx.DIGITS, *lx.NAMES]
    assert [w for w, n in Counter(words).items() if n > 1] == []
    assert all(c.topics and set(c.topics) <= set(lx.TOPICS) for c in lx.CONCEPTS)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), step=st.integers(0, 10_000), shared=st.booleans(), negative=st.booleans())
def test_lm_batches_depend_on_seed_and_step_alone(seed: int, step: int, shared: bool, negative: bool) -> None:
    first = PlantedWorld(seed, shared_tokens=shared, negative=negative)
    second = PlantedWorld(seed, shared_tokens=shared, negative=negative)
    second.lm_batch(step + 100)  # other steps before must not matter
    batch = first.lm_batch(step)
    np.testing.assert_array_equal(batch, second.lm_batch(step))
    assert batch.shape == (16, 64) and batch.dtype == np.uint32
    assert (batch[:, 0] == first.bos_id).all()
    body = batch[:, 1:]
    assert not np.isin(body, [first.pad_id, first.bos_id, first.eos_id, first.unk_id]).any()
    assert body.max() < len(first.vocabulary)
    assert not np.array_equal(batch, first.lm_batch(step + 1))
    assert not np.array_equal(batch, first.lm_batch(step, split_seed=1))
    assert not np.array_equal(batch, PlantedWorld(seed + 1, shared_tokens=shared, negative=negative).lm_batch(step))


def test_documents_alternate_and_stay_in_their_language(world: PlantedWorld) -> None:
    tokens, language = world.documents(700, seed=3)
    assert tokens.shape == language.shape == (1400, 64)
    assert tokens.dtype == np.uint32 and language.dtype == np.uint8
    assert (language == (np.arange(1400) % 2)[:, None]).all()
    np.testing.assert_array_equal(world.truth["language"][tokens[:, 1:]], language[:, 1:])
    fewer, _ = world.documents(600, seed=3)
    np.testing.assert_array_equal(fewer, tokens[:1200])
    assert len(np.unique(tokens, axis=0)) == 1400
    other, _ = world.documents(700, seed=4)
    assert not np.array_equal(tokens, other)


def test_every_word_occurs(world: PlantedWorld, shared_world: PlantedWorld) -> None:
    for w in (world, shared_world):
        counts = np.bincount(w.documents(6000, seed=0)[0].ravel(), minlength=len(w.vocabulary))
        missing = [w.vocabulary[i] for i in np.flatnonzero(counts == 0) if i not in w.special_ids]
        assert missing == []


def test_pairs_are_translations(world: PlantedWorld, shared_world: PlantedWorld) -> None:
    for w, longest in ((world, 12), (shared_world, 17)):
        english, japanese, concepts = w.sentence_pairs(1501, seed=1)
        assert len(english) == len(japanese) == len(concepts) == 1501
        concept, language = w.truth["concept"], w.truth["language"]
        for a, b, c in zip(english, japanese, concepts, strict=True):
            assert 3 <= len(a) <= longest and 3 <= len(b) <= longest
            assert set(language[a].tolist()) <= {ENGLISH, NO_LANGUAGE}
            assert set(language[b].tolist()) <= {JAPANESE, NO_LANGUAGE}
            assert sorted(c) == sorted(x for x in concept[b].tolist() if x >= 0)
            assert c == [x for x in concept[a].tolist() if x >= 0]
            assert sorted(t for t in a if w.truth["shared"][t] and w.vocabulary[t] != ",") == sorted(
                t for t in b if w.truth["shared"][t] and w.vocabulary[t] != ","
            )
        assert len({len(a) for a in english}) >= 7
        assert english == w.sentence_pairs(1501, seed=1)[0]


def _words(world: PlantedWorld, sentence: list[int]) -> str:
    return world.text(np.array(sentence))


def test_shared_world_ends_sentences(shared_world: PlantedWorld) -> None:
    english, japanese, _ = shared_world.sentence_pairs(500, seed=2)
    for e, j in zip(english, japanese, strict=True):
        s, t = _words(shared_world, e), _words(shared_world, j)
        assert s.endswith((" .", " ?", " !")) and s[-1] == t[-1]
        assert s.endswith("?") == ("か" in t.split())


def test_grammar_agreement(world: PlantedWorld) -> None:
    english, japanese, _ = world.sentence_pairs(4000, seed=2)
    text, translated = ([_words(world, s) for s in side] for side in (english, japanese))
    assert not any(bad in f" {s} " for s in text for bad in (" a apple ", " a egg ", " an big ", " an man ", " a old "))
    for s, j in zip(text, translated, strict=True):
        assert not {".", "?", "。"} & {*s.split(), *j.split()}  # planted with the shared tokens only
        assert ("not" in s.split()) == ("ません" in j.split())
        if "yesterday" in s.split():
            assert "ました" in j or "でした" in j
    # Numbers take a counter in Japanese and a plural in English.
    numbered = [(s, j) for s, j in zip(text, translated, strict=True) if " three " in f" {s}"]
    assert numbered and all("三" in j.split() for _, j in numbered)


def test_language_model_mixture(world: PlantedWorld) -> None:
    batches = np.concatenate([world.lm_batch(s) for s in range(250)])
    parallel = (batches == world.separator_id).any(1)
    assert abs(parallel.mean() - 0.4) < 0.03
    language = world.truth["language"][batches]
    both = (language == ENGLISH).any(1) & (language == JAPANESE).any(1)
    assert both[parallel].mean() > 0.99
    assert abs(both[~parallel].mean() - 0.3) < 0.04
    starts_english = language[parallel][:, 1] == ENGLISH
    assert abs(starts_english.mean() - 0.5) < 0.05
    # Of a switched document, three in ten content words are in the other language; function words never are.
    switched = ~parallel & both
    home = np.where((language[switched] == ENGLISH).sum(1) > (language[switched] == JAPANESE).sum(1), 0, 1)
    content = world.truth["concept"][batches[switched]] >= 0
    foreign = language[switched] == 1 - home[:, None]
    assert abs(foreign[content].mean() - 0.3) < 0.03
    assert foreign[~content].mean() < 0.005  # not 0: a heavily switched document can be taken for the other language


def test_parallel_documents_hold_translations(world: PlantedWorld) -> None:
    batch = world.lm_batch(0, 512)
    for row in batch[(batch == world.separator_id).any(1)]:
        parts = np.split(row[1:], np.flatnonzero(row[1:] == world.separator_id))
        parts = [p[p != world.separator_id] for p in parts][:-1]  # the last sentence may be cut
        for a, b in zip(parts[::2], parts[1::2], strict=False):
            concepts = [sorted(c for c in world.truth["concept"][p].tolist() if c >= 0) for p in (a, b)]
            assert concepts[0] == concepts[1]


@pytest.mark.parametrize("shared", [False, True])
def test_negative_world_has_no_crosslingual_signal(shared: bool) -> None:
    world = PlantedWorld(0, negative=True, shared_tokens=shared)
    batches = np.concatenate([world.lm_batch(s) for s in range(100)])
    assert not (batches == world.separator_id).any()
    language = world.truth["language"][batches]
    assert not ((language == ENGLISH).any(1) & (language == JAPANESE).any(1)).any()
    assert abs((language == ENGLISH).any(1).mean() - 0.5) < 0.05


def test_topics_and_memory_make_context_predictive() -> None:
    def repetition(world: PlantedWorld) -> float:
        tokens, _ = world.documents(500, seed=0)
        concept = np.where(world.truth["concept"] >= 0, world.truth["concept"], -1)[tokens]
        return float(np.mean([len(set(row[row >= 0])) / (row >= 0).sum() for row in concept]))

    full = repetition(PlantedWorld(0))
    no_memory = repetition(PlantedWorld(0, memory_probability=0.0))
    neither = repetition(PlantedWorld(0, memory_probability=0.0, topic_probability=0.0))
    assert full < no_memory - 0.05 < neither - 0.1


def test_shared_tokens(shared_world: PlantedWorld) -> None:
    truth = shared_world.truth
    shared = truth["shared"]
    expected = {*lx.SHARED_PUNCTUATION, *lx.DIGITS, *lx.NAMES}
    assert {shared_world.vocabulary[i] for i in np.flatnonzero(shared)} == expected
    assert (truth["language"][shared] == NO_LANGUAGE).all() and (truth["concept"][shared] == -1).all()
    tokens, language = shared_world.documents(3000, seed=0)
    for code in (ENGLISH, JAPANESE):
        counts = np.bincount(tokens[language == code], minlength=len(shared))
        assert (counts[shared] > 20).all()
    digit = np.isin(tokens, [shared_world.vocabulary.index(d) for d in lx.DIGITS])
    four = np.lib.stride_tricks.sliding_window_view(digit, 4, axis=1).all(-1)
    assert np.any(four, axis=1).mean() > 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_tokenizer_reads_documents_back(shared: bool, tmp_path: Path) -> None:
    world = PlantedWorld(0, shared_tokens=shared)
    world.tokenizer_files(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == len(world.vocabulary)
    assert tokenizer.convert_ids_to_tokens(list(range(len(world.vocabulary)))) == world.vocabulary
    names = ("pad", "bos", "eos", "sep", "unk")
    ids = [getattr(tokenizer, f"{n}_token_id") for n in names]
    assert ids == [world.pad_id, world.bos_id, world.eos_id, world.separator_id, world.unk_id]
    for row in world.lm_batch(0, 64):
        assert tokenizer.encode(world.text(row), add_special_tokens=False) == row.tolist()
    english, japanese, _ = world.sentence_pairs(50, seed=0)
    for sentence in english + japanese:
        assert tokenizer.encode(_words(world, sentence), add_special_tokens=False) == sentence
    text = world.text(world.documents(1, seed=0)[0][1])
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("wombat", add_special_tokens=False) == [world.unk_id]


@pytest.mark.parametrize(
    ("settings_", "field"),
    [({"parallel_share": 1.2}, "parallel_share"), ({"topic_probability": -0.1}, "topic_probability"),
     ({"context_length": 4}, "context_length")],
)  # fmt: skip
def test_bad_settings_are_named(settings_: dict[str, float], field: str) -> None:
    with pytest.raises(InputError, match=field):
        PlantedWorld(0, **settings_)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("length", [8, 9, 65, 128])
def test_context_length(length: int) -> None:
    world = PlantedWorld(0, context_length=length, shared_tokens=True)
    tokens, _ = world.documents(50, seed=0)
    assert tokens.shape == (100, length) and world.lm_batch(5, 4).shape == (4, length)
    assert (tokens[:, 1:] >= len(lx.SPECIAL)).all()


def test_extreme_shares() -> None:
    world = PlantedWorld(0, parallel_share=1.0, topic_probability=1.0, memory_probability=1.0)
    assert (world.lm_batch(0) == world.separator_id).any(1).all()
    world = PlantedWorld(0, parallel_share=0.0, switched_share=1.0, switch_probability=1.0, topic_probability=0.0)
    batch = world.lm_batch(0)
    language, content = world.truth["language"][batch], world.truth["concept"][batch] >= 0
    for row_language, row_content in zip(language, content, strict=True):
        assert len(set(row_language[row_content].tolist())) == 1
        function = set(row_language[~row_content].tolist()) - {NO_LANGUAGE}
        assert function == {1 - row_language[row_content][0]}


def test_generation_is_fast(world: PlantedWorld) -> None:
    start = time.process_time()
    tokens, _ = world.documents(4096, seed=9)
    # 3 M tokens/s measured on one core; a slow or busy machine gets a factor of ten.
    assert tokens.size / (time.process_time() - start) > 3e5
