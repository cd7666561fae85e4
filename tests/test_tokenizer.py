from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glottoscope.errors import InputError
from glottoscope.lm.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, train_tokenizer

KYOTO = Path(__file__).parents[2] / "shared" / "corpora" / "kyoto" / "parallel.train.jsonl"
TEXTS = [
    "Kyoto Shogi is a kind of board game; it was started in 1976 by Katsuya TAMIYA.",
    "The emperor's palace in Kyoto was the seat of the emperor until 1869.",
    "京都将棋（きょうとしょうぎ）とは将棋の一種であり、二人で行なうボードゲームの一種である。",
    "1976年に田宮克哉が発表した、ごく新しい将棋である。ラーメン、らーめん、ｶﾞ、々、〇。",
] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "bpe", vocab_size=600)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return [str(tokenizer.decode([token])) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if not any(name in text for name in SPECIAL_TOKENS):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_stand_alone_and_scripts_never_mix(tokenizer: PreTrainedTokenizerFast) -> None:
    scripts = ("CJK", "HIRAGANA", "KATAKANA", "LATIN")
    for text in TEXTS[:4]:
        for piece in pieces(tokenizer, text):
            assert len(piece.strip()) == 1 or not any(character.isdigit() for character in piece), piece
            names = [unicodedata.name(character, "") for character in piece if character.isalpha() and character != "ー"]
            assert len({script for script in scripts for name in names if name.startswith(script)}) <= 1, piece
    assert {"将棋", "とは"} <= set(pieces(tokenizer, TEXTS[2]))


def test_saved_directory_is_an_ordinary_tokenizer(tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, tmp_path / "bpe", vocab_size=600)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "bpe"))
    assert len(loaded) == len(trained) <= 600
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded(TEXTS[2])["input_ids"] == [1, *trained(TEXTS[2], add_special_tokens=False)["input_ids"]]
    assert loaded.decode(loaded(TEXTS[2])["input_ids"], skip_special_tokens=True) == TEXTS[2]


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path / "here", vocab_size=500)
    code = (
        "import sys, json; from pathlib import Path; from glottoscope.lm.tokenizer import train_tokenizer;"
        "train_tokenizer(json.load(sys.stdin), Path(sys.argv[1]), vocab_size=500)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        input=json.dumps(TEXTS),
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size 100"):
        train_tokenizer(TEXTS, tmp_path / "small", vocab_size=100)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(iter(()), tmp_path / "empty", vocab_size=MIN_VOCAB_SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not KYOTO.exists(), reason="needs the Kyoto corpus in shared/corpora")
def test_japanese_of_the_kyoto_corpus_round_trips(tmp_path: Path) -> None:
    with open(KYOTO, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 4000)]
    texts = [row[language] for row in rows for language in ("en", "ja")]
    tokenizer = train_tokenizer(texts, tmp_path / "bpe", vocab_size=4000)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(tokens) for tokens in encoded] == texts
    characters = sum(len(row["ja"]) for row in rows)
    assert sum(len(tokens) for tokens in encoded[1::2]) < 1.05 * characters  # bytes alone would be near 3
