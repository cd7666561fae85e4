"""Byte-safe text: bytes of tokens for every kind of tokenizer, and spans of whole characters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glottoscope.corpus.display import Span, clean_text, has_letters, merge_spans, piece_bytes, token_bytes

SHARED = Path(__file__).parents[2] / "shared"
TEXT = "Hello  world, 1234 naïve 京都の𠮷野家で🍣を食べた。\nThe end"

pieces_of_text = st.builds(
    lambda text, cuts: [text.encode()[a:b] for a, b in zip([0, *cuts], [*cuts, len(text.encode())], strict=True)],
    st.text(max_size=12),
    st.lists(st.integers(0, 40), max_size=8).map(sorted),
)


@given(st.lists(st.binary(max_size=5), max_size=12) | pieces_of_text)
def test_spans_cover_every_token_once_and_keep_the_text(pieces: list[bytes]) -> None:
    spans = merge_spans(pieces)
    assert [i for span in spans for i in range(span.start, span.end)] == list(range(len(pieces)))
    assert all(span.end > span.start for span in spans)
    assert "".join(span.text for span in spans) == b"".join(pieces).decode(errors="replace")


@given(pieces_of_text)
def test_spans_of_valid_text_are_minimal(pieces: list[bytes]) -> None:
    def valid(part: list[bytes]) -> bool:
        try:
            b"".join(part).decode()
        except UnicodeDecodeError:
            return False
        return True

    for start, end, text in merge_spans(pieces):
        assert b"".join(pieces[start:end]).decode() == text
        assert not any(valid(pieces[start:middle]) for middle in range(start + 1, end))


def test_a_broken_character_does_not_swallow_its_neighbours() -> None:
    kyo = "京".encode()
    assert merge_spans([kyo[:1], kyo[1:2], b"A", kyo[:2]]) == [
        Span(0, 2, "\ufffd"),
        Span(2, 3, "A"),
        Span(3, 4, "\ufffd"),
    ]
    assert merge_spans([b" a" + kyo[:2], kyo[2:] + b"b", b""]) == [Span(0, 2, " a京b"), Span(2, 3, "")]
    assert merge_spans([]) == []


def test_lone_surrogates_are_replaced_and_counted() -> None:
    assert clean_text("a\ud83db\udc00") == ("a\ufffdb\ufffd", 2)
    assert clean_text("🍣") == ("🍣", 0)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("<0x0A>", b"\n"),
        ("<0xe3>", b"\xe3"),
        (" The", b" The"),
        ("▁The", b" The"),
        ("<0x0A", b"<0x0A"),
        ("\ud83d", b"\xef\xbf\xbd"),
    ],
)
def test_piece_bytes(piece: str, expected: bytes) -> None:
    assert piece_bytes(piece) == expected


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("the", True),
        ("ー", True),
        ("é", True),
        ("12", False),
        (" ・、", False),
        ("²", False),
        ("", False),
        ("\n", False),
    ],
)
def test_has_letters(piece: str, expected: bool) -> None:
    assert has_letters(piece.encode()) is expected


def test_an_incomplete_character_counts_as_a_letter() -> None:
    assert has_letters(b"\xe3") and has_letters("京".encode()[1:])


def test_byte_level_bpe_round_trips() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>")
    tokenizer.add_tokens(["Ġé"])  # an added token is its own text, not the byte alphabet's
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    assert table[:2] == [b"<pad>", b"<bos>"]
    assert table[tokenizer.convert_tokens_to_ids("Ġé")] == "Ġé".encode()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids) == TEXT.encode()
    assert "".join(span.text for span in merge_spans([table[i] for i in ids])) == TEXT
    assert {bytes([byte]) for byte in range(256)} <= set(table)


def test_words_get_the_space_of_their_script() -> None:
    words = ["<pad>", "[UNK]", "the", "cat", "猫", "が", ".", "7"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="[UNK]")
    assert token_bytes(tokenizer) == [w.encode() for w in ["<pad>", "[UNK]", " the", " cat", "猫", "が", ".", " 7"]]


def test_wordpiece_and_word_end_notations() -> None:
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]"))[1:] == [b" play", b"ing"]
    bpe = Tokenizer(models.BPE({"play": 0, "ing</w>": 1}, []))
    bpe.decoder = decoders.BPEDecoder()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=bpe))[:2] == [b"play", b"ing "]


def sentencepiece_model() -> Path:
    found = sorted((SHARED / "tokenizer").glob("*.model"))
    if not found:
        pytest.skip("no SentencePiece model in shared/tokenizer")
    return found[0]


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(sentencepiece_model(), folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return AutoTokenizer.from_pretrained(folder)


def test_sentencepiece_bytes_agree_with_the_library(llama_tokenizer: Any) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(sentencepiece_model()))
    table = token_bytes(llama_tokenizer)
    assert len(table) == processor.get_piece_size()
    # Pieces are decoded behind a letter: SentencePiece strips the space of a first token.
    ordinary = [
        index
        for index in range(0, len(table), 97)
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    ]
    prefix = processor.piece_to_id("a")
    assert [table[index].decode() for index in ordinary] == [processor.decode([prefix, i])[1:] for i in ordinary]
    for byte in range(256):
        assert table[processor.piece_to_id(f"<0x{byte:02X}>")] == bytes([byte])
    ids = processor.encode(TEXT)
    spans = merge_spans([table[i] for i in ids])
    assert "".join(span.text for span in spans).removeprefix(" ") == processor.decode(ids)
    assert any(span.text == "𠮷" and span.end - span.start == 4 for span in spans)
    assert table[processor.bos_id()] == b"<s>"


def test_hugging_face_llama_ids_decode_to_the_same_text(llama_tokenizer: Any) -> None:
    table = token_bytes(llama_tokenizer)
    ids = llama_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids).decode().removeprefix(" ") == TEXT


def test_published_examples_merge_into_valid_text() -> None:
    path = SHARED / "features" / "llm-jp-3-1.8b_layer12_step10.jsonl"
    if not path.exists():
        pytest.skip("no published features in shared/features")
    with open(path, encoding="utf-8") as handle:
        examples = [example for line, _ in zip(handle, range(20), strict=False) for example in json.loads(line)["examples"]]
    n_tokens = n_broken = 0
    for example in examples:
        spans = merge_spans([piece_bytes(token) for token in example["tokens"]])
        assert spans[-1].end == len(example["tokens"])
        n_tokens += len(example["tokens"])
        n_broken += sum("\ufffd" in span.text for span in spans[1:-1])
    assert n_tokens > 10_000
    assert n_broken == 0  # only an example's first or last span may be cut inside a character
