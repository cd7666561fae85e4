"""Token blocks: nothing lost, nothing counted that must not count, languages 1:1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glottoscope.corpus.readers import AlignedPair
from glottoscope.corpus.tokens import (
    PADDING,
    TokenBlocks,
    attention_mask,
    encode_aligned,
    encoder,
    interleave,
    pack,
    position_mask,
    read_aligned_tokens,
    read_blocks,
    write_aligned,
    write_blocks,
)
from glottoscope.errors import InputError

BOS, PAD = 1, 0
corpora = st.lists(st.lists(st.integers(2, 70_000), max_size=15), max_size=8)


def content(documents: list[list[int]]) -> list[tuple[int, int]]:
    return [(row, token) for row, ids in enumerate(documents) for token in ids]


@given(corpora, st.integers(2, 7), st.sampled_from(["document", "block", "none"]), st.booleans())
def test_blocks_hold_the_stream_in_order(
    documents: list[list[int]], length: int, bos: Literal["document", "block", "none"], drop_short: bool
) -> None:
    blocks = pack(enumerate(documents), language=1, context_length=length, bos=bos, bos_id=BOS, pad_id=PAD, drop_short=drop_short)
    assert blocks.tokens.shape == blocks.language.shape == blocks.document.shape
    assert blocks.tokens.shape[1] == length
    assert [array.dtype for array in blocks] == [np.uint32, np.uint8, np.uint32]
    counted = position_mask(blocks.tokens, blocks.language, [BOS, PAD])
    found = list(zip(blocks.document[counted].tolist(), blocks.tokens[counted].tolist(), strict=True))
    expected = content(documents)
    assert found == expected[: len(found)]
    if drop_short:
        assert attention_mask(blocks.language).all()
        assert len(expected) - len(found) < length
    else:
        assert found == expected
    if bos == "block":
        assert (blocks.tokens[:, 0] == BOS).all() and (blocks.tokens == BOS).sum() == len(blocks.tokens)
        assert (blocks.document[:, 0] == blocks.document[:, min(1, length - 1)]).all()
    if bos == "document" and not drop_short:
        assert (blocks.tokens == BOS).sum() == sum(bool(ids) for ids in documents)
    assert (blocks.language[attention_mask(blocks.language)] == 1).all()
    assert (blocks.tokens[~attention_mask(blocks.language)] == PAD).all()


@given(corpora, st.integers(1, 7), st.booleans(), st.booleans())
def test_document_starts(documents: list[list[int]], length: int, with_bos: bool, drop_short: bool) -> None:
    blocks = pack(
        enumerate(documents), language=0, context_length=length, mode="document_start",
        bos="document" if with_bos else "none", bos_id=BOS, pad_id=PAD, drop_short=drop_short,
    )  # fmt: skip
    kept = [(row, ids[:length]) for row, ids in enumerate(documents) if ids and (len(ids) >= length or not drop_short)]
    assert blocks.tokens.shape == (len(kept), length + with_bos)
    for (row, ids), tokens, language, document in zip(kept, *blocks, strict=True):
        expected = [BOS] * with_bos + ids
        assert tokens.tolist() == expected + [PAD] * (length + with_bos - len(expected))
        assert (language != PADDING).sum() == len(expected)
        assert (document == row).all()


@given(corpora, st.integers(2, 5), st.integers(0, 40), st.sampled_from(["blocks", "document_start"]))
def test_max_tokens_is_a_prefix_in_whole_blocks(documents: list[list[int]], length: int, max_tokens: int, mode: str) -> None:
    settings: dict[str, Any] = {"language": 0, "context_length": length, "mode": mode, "bos_id": BOS}
    every = pack(enumerate(documents), drop_short=False, **settings)
    some = pack(enumerate(documents), drop_short=False, max_tokens=max_tokens, **settings)
    n = len(some.tokens)
    assert (some.tokens == every.tokens[:n]).all()
    running = position_mask(every.tokens, every.language, [BOS]).sum(axis=1).cumsum()
    assert n == (running <= max_tokens).sum()


def test_reading_stops_at_max_tokens() -> None:
    def endless() -> Iterator[tuple[int, list[int]]]:
        row = 0
        while True:
            yield row, [5] * 4096
            row += 1

    blocks = pack(endless(), language=0, context_length=64, bos="block", bos_id=BOS, max_tokens=630)
    assert blocks.tokens.shape == (10, 64)


def test_long_streams_are_cut_without_a_seam() -> None:
    ids = (np.arange(3_000_000) % 60_000 + 2).astype(np.uint32)
    documents = [(row, part.tolist()) for row, part in enumerate(np.array_split(ids, 700))]
    blocks = pack(documents, language=0, context_length=100, bos="none")
    assert (blocks.tokens.ravel() == ids).all()


def test_bos_without_an_id_is_an_input_error() -> None:
    with pytest.raises(InputError, match="BOS"):
        pack([(0, [3])], language=0, context_length=4, bos="block")
    with pytest.raises(InputError, match="context_length"):
        pack([(0, [3])], language=0, context_length=1, bos="block", bos_id=BOS)


def test_position_mask_leaves_out_padding_bos_and_specials() -> None:
    tokens = np.array([[BOS, 5, 9, 6, PAD]], np.uint32)
    language = np.array([[0, 0, 0, 1, PADDING]], np.uint8)
    assert attention_mask(language).tolist() == [[True, True, True, True, False]]
    assert position_mask(tokens, language, {BOS, 9}).tolist() == [[False, True, False, True, False]]
    assert position_mask(tokens, language, ()).tolist() == [[True, True, True, True, False]]


def test_full_blocks_alternate_one_to_one() -> None:
    sizes = [7, 3, 5]
    languages = [
        TokenBlocks(*(np.full((n, 4), value, kind) for value, kind in [(9, np.uint32), (g, np.uint8), (g, np.uint32)]))
        for g, n in enumerate(sizes)
    ]
    mixed = interleave(languages)
    assert mixed.language[:, 0].tolist() == [0, 1, 2] * 3
    assert mixed.tokens.dtype == np.uint32 and mixed.language.dtype == np.uint8


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=20), min_size=2, max_size=3))
def test_padded_blocks_are_balanced_by_tokens(lengths: list[list[int]]) -> None:
    width = 7
    languages = []
    for g, rows in enumerate(lengths):
        real = np.arange(width) <= np.array(rows)[:, None]  # BOS and `row` tokens
        tokens = np.where(real, 9, PAD).astype(np.uint32)
        tokens[:, 0] = BOS
        document = np.repeat(np.arange(len(rows), dtype=np.uint32)[:, None], width, axis=1)
        languages.append(TokenBlocks(tokens, np.where(real, g, PADDING).astype(np.uint8), document))
    mixed = interleave(languages, special_ids=[BOS])
    counted = position_mask(mixed.tokens, mixed.language, [BOS]).sum(axis=1)
    running = [(counted * (mixed.language[:, 0] == g)).cumsum() for g in range(len(lengths))]
    largest = max(max(rows) for rows in lengths)
    for a in running:
        for b in running:
            assert not len(a) or abs(a - b).max() < 2 * largest
            assert not len(a) or abs(int(a[-1]) - int(b[-1])) < largest
    for g in range(len(lengths)):  # each language keeps its own order
        rows = mixed.document[mixed.language[:, 0] == g, 0]
        assert rows.tolist() == list(range(len(rows)))


def test_a_language_without_blocks_is_an_input_error() -> None:
    full = pack([(0, [5] * 8)], language=0, context_length=4, bos="none")
    empty = pack([], language=1, context_length=4, bos="none")
    with pytest.raises(InputError, match="language 1"):
        interleave([full, empty])


def test_blocks_come_back_from_disk(tmp_path: Path) -> None:
    blocks = pack([(3, [5, 80_000, 7])], language=1, context_length=2, bos="none", drop_short=False)
    write_blocks(tmp_path, "train", blocks)
    for mmap in (True, False):
        back = read_blocks(tmp_path, "train", mmap=mmap)
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(blocks, back, strict=True))
    empty = pack([], language=1, context_length=2, bos="none")
    write_blocks(tmp_path, "empty", empty)
    assert read_blocks(tmp_path, "empty").tokens.shape == (0, 2)
    path = tmp_path / "train.tokens.npy"
    path.write_bytes(path.read_bytes()[:-3])
    for mmap in (True, False):
        with pytest.raises(InputError, match=r"train\.tokens\.npy"):
            read_blocks(tmp_path, "train", mmap=mmap)
    with pytest.raises(InputError, match=r"test\.tokens\.npy"):
        read_blocks(tmp_path, "test")


def test_aligned_sentences(tmp_path: Path) -> None:
    pairs = [
        AlignedPair("b.0", "b", ("one two three", "いち に")),
        AlignedPair("a.0", "a", ("one", "いち")),
        AlignedPair("b.1", "b", ("two", "に に に に に")),
    ]

    def encode(texts: list[str]) -> list[list[int]]:
        return [[len(word) + 10 for word in text.split()] for text in texts]

    aligned, n_truncated = encode_aligned(pairs, encode, bos_id=BOS, pad_id=PAD, max_length=4)
    assert n_truncated == 1
    assert aligned.tokens.tolist() == [
        [[1, 13, 13, 15], [1, 13, 0, 0], [1, 13, 0, 0]],
        [[1, 12, 11, 0], [1, 12, 0, 0], [1, 11, 11, 11]],
    ]
    assert aligned.length.tolist() == [[4, 2, 2], [3, 2, 4]]
    assert aligned.article.tolist() == [0, 1, 0]
    write_aligned(tmp_path, "test", aligned)
    back = read_aligned_tokens(tmp_path, "test")
    assert back.ids == ["b.0", "a.0", "b.1"]
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(aligned[:3], back[:3], strict=True))
    (tmp_path / "test.ids.json").write_text("[")
    with pytest.raises(InputError, match=r"test\.ids\.json"):
        read_aligned_tokens(tmp_path, "test")
    with pytest.raises(InputError, match="no aligned sentences"):
        encode_aligned([], encode, bos_id=BOS, pad_id=PAD, max_length=4)


def test_texts_are_encoded_without_special_tokens_at_any_length() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=2)
    assert encoder(tokenizer)(["a b " * n for n in range(7)]) == [[1, 2] * n for n in range(7)]
    assert encoder(tokenizer)(["b x", ""]) == [[2, 0], []]
