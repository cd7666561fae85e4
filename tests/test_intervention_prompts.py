"""Prompts: texts survive, the shared beginning is cut out without changing a token, and what does not fit is said."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from glottoscope.errors import InputError
from glottoscope.intervention.prompts import (
    Encode,
    Prompts,
    Template,
    build_prompts,
    cut_output,
    encode_prompts,
    fit_prompts,
    stop_token_ids,
)

NAMES = {"source_name": "English", "target_name": "Japanese"}
SHOTS = [("A cat.", "猫。"), ("Two {dogs}.", "{source}二匹の犬。"), ("Rain {0}", "雨 }{")]
SOURCES = ["The cat {source} sat.", "{", "}}{target!r}", "", "The cat is here."]
BOS = 999


def codepoints(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


@pytest.fixture(scope="module")
def bpe() -> Encode:
    """A real byte-level BPE tokenizer, whose tokens reach over the border between the shots and the query."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(build_prompts(Template(), SHOTS, SOURCES, **NAMES) * 3, trainer)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode


def whole(prompts: Prompts) -> list[list[int]]:
    rows = zip(prompts.rows.tolist(), prompts.length.tolist(), strict=True)
    return [[*prompts.prefix, *row[len(row) - length :]] for row, length in rows]


def test_the_text_of_a_prompt() -> None:
    built = build_prompts(Template(), SHOTS[:1], ["A dog."], **NAMES)
    assert built == ["English: A cat.\nJapanese: 猫。\nEnglish: A dog.\nJapanese:"]
    template = Template(
        intro="{{{instruction}}}\n<examples>\n",
        shot="<{number}>\n### {source}\n### {target}\n</{number}>\n",
        query="</examples>\n### {source}\n### ",
        stop="\n</",
    )
    built = build_prompts(template, SHOTS[:2], ["A dog."], instruction="Go {source}.", **NAMES)
    shots = "<1>\n### A cat.\n### 猫。\n</1>\n<2>\n### Two {dogs}.\n### {source}二匹の犬。\n</2>\n"
    assert built == ["{Go {source}.}\n<examples>\n" + shots + "</examples>\n### A dog.\n### "]
    assert Template(shot="{source}={target}}}\n", query="{source}=", stop="}\n")


@given(st.lists(st.text(), min_size=1), st.text(), st.text())
@example(SOURCES, "{target}", "{{source}}")
def test_any_text_survives(sources: list[str], shot_source: str, shot_target: str) -> None:
    template = Template(shot="<{source}|{target}\0", query="<{source}|", stop="\0")
    target = shot_target.replace("\0", "")
    for source, prompt in zip(sources, build_prompts(template, [(shot_source, target)], sources, **NAMES), strict=True):
        assert prompt == "<" + shot_source + "|" + target + "\0<" + source + "|"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shot": "{source}\n"}, "template shot: no {target}: put it where the target sentence goes"),
        ({"shot": "{target}\n"}, "template shot: no {source}: put it where the source sentence goes"),
        ({"query": "{source_name}:"}, "template query: no {source}"),
        ({"query": "{source} {target}"}, "template query: unknown field {target}: use {source_name}, {target_name}, {source}"),
        ({"query": "{source} {number}"}, "template query: unknown field {number}"),
        ({"query": "{source!r}"}, "template query: unknown field {source!r}"),
        ({"query": "{source:>9}"}, "template query: unknown field {source:>9}"),
        ({"query": "{source.real}"}, "template query: unknown field {source.real}"),
        ({"query": "{source} {}"}, "template query: unknown field {}"),
        ({"shot": "{source} {text} {target}\n"}, "template shot: unknown field {text}"),
        ({"intro": "{source}"}, "template intro: unknown field {source}: use {source_name}, {target_name}, {instruction}"),
        ({"shot": "{source} {target"}, "template shot: expected '}' before end of string: write {{ or }} for a brace"),
        ({"query": "{source} }"}, "template query: Single '}' encountered"),
        ({"shot": "{source} {target}"}, "template shot: '' follows {target}, not the stop '\\n': make them agree"),
        ({"shot": "{source} {target} {number}\n"}, "template shot: ' ' follows {target}, not the stop"),
        ({"shot": "{target} <- {source}\n"}, "template shot: ' <- ' follows {target}, not the stop"),
        ({"shot": "{source} {target} {target}\n"}, "template shot: {target} stands there twice"),
        ({"stop": ""}, "template stop: is empty"),
    ],
)
def test_a_bad_template_is_named(parts: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Template(**parts)


def test_bad_data_for_a_template_is_named() -> None:
    with pytest.raises(InputError, match=r"intro: \{instruction\} is used, but this data has no instruction"):
        build_prompts(Template(intro="{instruction}\n"), SHOTS, SOURCES, **NAMES)
    with pytest.raises(InputError, match="shot 2: its translation holds the stop"):
        build_prompts(Template(), [("a", "b"), ("c", "d\ne")], SOURCES, **NAMES)
    with pytest.raises(InputError, match="no sentences to translate"):
        encode_prompts(codepoints, [], bos_id=BOS)
    with pytest.raises(InputError, match="row 2: has no tokens"):
        encode_prompts(codepoints, ["a", ""], bos_id=None)


@pytest.mark.parametrize("bos", [None, BOS])
def test_prefix_and_row_are_the_prompts_own_encoding(bpe: Encode, bos: int | None) -> None:
    texts = build_prompts(Template(), SHOTS, SOURCES, **NAMES)
    prompts = encode_prompts(bpe, texts, bos_id=bos)
    start = [] if bos is None else [bos]
    assert whole(prompts) == [start + ids for ids in bpe(texts)]
    assert prompts.prefix[: len(start)] == start
    assert len(prompts.prefix) > sum(len(ids) for ids in bpe([a + b for a, b in SHOTS]))


@given(st.lists(st.text(alphabet="ab", max_size=4), min_size=1, max_size=5), st.booleans(), st.text(alphabet="ab"))
@example(["ab", "ab"], False, "")
@example(["", ""], True, "")
@example(["a", "ab", "abb"], True, "")
def test_the_prefix_is_the_longest_that_leaves_a_token_to_each(texts: list[str], has_bos: bool, shared: str) -> None:
    texts = [shared + text if has_bos else shared + text + "b" for text in texts]
    expected = [([BOS] if has_bos else []) + ids for ids in codepoints(texts)]
    prompts = encode_prompts(codepoints, texts, bos_id=BOS if has_bos else None)
    assert whole(prompts) == expected
    assert prompts.length.min() >= 1
    assert prompts.rows.shape == (len(texts), prompts.length.max())
    np.testing.assert_array_equal(prompts.mask.sum(axis=1), prompts.length)
    assert not prompts.rows[~prompts.mask].any()
    longer = len(prompts.prefix) + 1
    assert prompts.length.min() == 1 or len({tuple(ids[:longer]) for ids in expected}) > 1


def fit(max_length: int | None, encode: Callable[[list[str]], list[list[int]]] = codepoints, new_tokens: int = 10) -> Prompts:
    return fit_prompts(encode, Template(), SHOTS, SOURCES, **NAMES, bos_id=BOS, max_length=max_length, new_tokens=new_tokens)


def test_shots_are_dropped_from_the_front_until_all_prompts_fit() -> None:
    lengths = []
    for dropped in range(len(SHOTS) + 1):
        texts = build_prompts(Template(), SHOTS[dropped:], SOURCES, **NAMES)
        lengths.append(1 + max(len(text) for text in texts))
        # The last length at which this many shots still fit, and one less.
        fitting = fit(lengths[-1] + 10)
        assert fitting.dropped == dropped
        assert whole(fitting) == [[BOS, *ids] for ids in codepoints(texts)]
        if dropped < len(SHOTS):
            assert fit(lengths[-1] + 9).dropped == dropped + 1
    assert fit(None).dropped == 0
    message = rf"row 1: {lengths[-1]} tokens without shots and 10 for the translation are more than the model's {lengths[-1] + 9}"
    with pytest.raises(InputError, match=message):
        fit(lengths[-1] + 9)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [(" 猫。 \nEnglish: x", "\n", "猫。"), ("a b", "\n", "a b"), ("\nab", "\n", ""), ("a`\nb", "`", "a"), ("", "\n", "")],
)
def test_output_is_cut_at_the_first_stop(text: str, stop: str, expected: str) -> None:
    assert cut_output(text, stop) == expected


def test_stop_tokens_hold_the_whole_stop() -> None:
    pieces = [b"", b"a", b"\n", "。\n\n".encode(), b"\\n", "。".encode(), "。".encode()[:2]]
    assert stop_token_ids(pieces, "\n") == {2, 3}
    assert stop_token_ids(pieces, "\n\n") == {3}
    assert stop_token_ids(pieces, "。") == {3, 5}
    assert stop_token_ids(pieces, "x") == set()
