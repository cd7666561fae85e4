"""Examples stage: the text of a window is the decoded bytes of its tokens, whatever is cut at its edges."""

from __future__ import annotations

from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.study.stages import examples
from glottoscope.study.stages.examples import texts_of

# Byte tokens for every byte, as byte-fallback vocabularies have them, an empty one and whole words.
PIECES = [*(bytes([i]) for i in range(256)), b"", *(w.encode() for w in ("the ", "犬", "走る", "é", "𠮟"))]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(0, 12), st.integers(1, 9)),
    at_once=st.integers(1, 40),
    words=st.booleans(),
)
def test_texts_equal_joining_and_decoding_row_by_row(seed: int, shape: tuple[int, int], at_once: int, words: bool) -> None:
    tokens = np.random.default_rng(seed).integers(250 if words else 0, len(PIECES), shape).astype(np.uint32)
    with mock.patch.object(examples, "TEXT_TOKENS", at_once):
        found = texts_of(PIECES, tokens)
    assert found == [b"".join(PIECES[t] for t in row).decode("utf-8", errors="replace") for row in tokens]


def test_rows_without_any_bytes_are_empty() -> None:
    assert texts_of([b"", b"a"], np.zeros((2, 3), np.uint32)) == ["", ""]
