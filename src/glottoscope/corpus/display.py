"""Byte-safe text of tokens: what a token's bytes are, and which tokens together make readable characters.

A byte-level or byte-fallback tokenizer cuts a character into several tokens; shown one by one they are
unreadable. So tokens are first turned into bytes, and then grouped into the smallest spans of valid UTF-8.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

REPLACEMENT = "\ufffd"
_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # SentencePiece's visible space
# Han, Hiragana, Katakana (half-width too): scripts written without spaces between words.
_UNSPACED = re.compile("[\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) and the text that they make together."""

    start: int
    end: int
    text: str


def clean_text(text: str) -> tuple[str, int]:
    """Replace lone surrogates (JSON escapes such as a bare `\\ud83d`) by U+FFFD.

    Returns:
        The text, encodable as UTF-8, and the number of characters replaced.
    """
    return _SURROGATES.subn(REPLACEMENT, text)


def piece_bytes(piece: str) -> bytes:
    """Bytes of a token written in SentencePiece's notation, as in published feature examples.

    `<0x0A>` is that byte, `▁` a space, everything else its own UTF-8.
    """
    match = _BYTE_PIECE.fullmatch(piece)
    if match:
        return bytes([int(match[1], 16)])
    return clean_text(piece)[0].replace(_SPACE_MARK, " ").encode()


def has_letters(piece: bytes) -> bool:
    """Whether a token can be part of a word: it holds a Unicode letter (category L*), or a part of a character.

    An incomplete character counts as a letter: most characters that need byte tokens are rare letters.
    """
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return True
    return any(unicodedata.category(character)[0] == "L" for character in text)


def merge_spans(pieces: Sequence[bytes]) -> list[Span]:
    """Group tokens into the smallest runs whose bytes are complete characters.

    The spans cover every token once and in order, and their texts concatenate to the decoded bytes. Bytes that
    can never become a character (or an example cut inside one) show as U+FFFD and do not swallow the next token.
    """
    spans: list[Span] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start, text, waiting = 0, "", b""
    for position, piece in enumerate(pieces):
        if waiting and piece and not _continues(waiting, piece[0]):
            spans.append(Span(start, position, text + decoder.decode(b"", final=True)))
            decoder.reset()
            start, text = position, ""
        text += decoder.decode(piece)
        waiting = decoder.getstate()[0]
        if not waiting:
            spans.append(Span(start, position + 1, text))
            start, text = position + 1, ""
    if start < len(pieces):
        spans.append(Span(start, len(pieces), text + decoder.decode(b"", final=True)))
    return spans


def _continues(waiting: bytes, byte: int) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(waiting + bytes([byte]))
    except UnicodeDecodeError:
        return False
    return True


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token of a Hugging Face tokenizer (fast, or slow with SentencePiece), by id: length V.

    SentencePiece and byte fallback, GPT-2's byte-level alphabet, WordPiece (`##`), `</w>` and plain words are told
    apart by the tokenizer's own decoder. Plain words get the space that the decoder would put before them, except
    in scripts written without spaces. Special and added tokens are their own name; an id without a token is empty.
    """
    names: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    added |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    convert = _CONVERTERS[_notation(tokenizer)]
    return [
        added[index].encode() if index in added else convert(name) if name is not None else b"" for index, name in enumerate(names)
    ]


def _notation(tokenizer: Any) -> str:
    """Which of the notations in `_CONVERTERS` the token names are written in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if hasattr(tokenizer, "sp_model"):
            return "sentencepiece"
        return "byte_level" if hasattr(tokenizer, "byte_decoder") else "words"
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level"
    if kinds & {"ByteFallback", "Metaspace"} or any(_SPACE_MARK in str(step.get("pattern", "")) for step in steps):
        return "sentencepiece"
    if "WordPiece" in kinds:
        return "wordpiece"
    return "word_end" if "BPEDecoder" in kinds else "words"


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    return b"".join(bytes([alphabet[character]]) if character in alphabet else character.encode() for character in piece)


def _wordpiece_bytes(piece: str) -> bytes:
    return piece[2:].encode() if piece.startswith("##") else _word_bytes(piece)


def _word_end_bytes(piece: str) -> bytes:
    return (piece.removesuffix("</w>") + " ").encode() if piece.endswith("</w>") else piece.encode()


def _word_bytes(piece: str) -> bytes:
    spaced = piece[:1].isalnum() and not _UNSPACED.match(piece)
    return (" " + piece if spaced else piece).encode()


_CONVERTERS = {
    "sentencepiece": piece_bytes,
    "byte_level": _byte_level_bytes,
    "wordpiece": _wordpiece_bytes,
    "word_end": _word_end_bytes,
    "words": _word_bytes,
}
