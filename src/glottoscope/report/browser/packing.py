"""Small whole numbers as characters: what makes up most of a site's size.

A number below 184 is one character of ALPHABET, a larger one is an escape and two or three characters (base 184, highest
first). gzip then needs hardly more than the numbers' entropy: half of what it needs for their decimals in JSON. The
characters are printable, need no escaping in JSON, and leave out the space, which separates lists.
`unpack` here and assets/packed.js read them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Latin-1, so that a string is its characters' codes as bytes; without quote, backslash and soft hyphen.
ALPHABET = "".join(chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x100)) if chr(c) not in '"\\\xad')
SEPARATOR = " "
_BASE = len(ALPHABET) - 2
_TWO, _THREE = _BASE, _BASE + 1  # escapes
_CODES = np.frombuffer(ALPHABET.encode("latin-1"), np.uint8)
_TWO_END = _BASE + _BASE**2
LIMIT = _TWO_END + _BASE**3  # the smallest number that has no code


def widths(values: NDArray[Any]) -> NDArray[np.int64]:
    """Characters of each number."""
    return 1 + 2 * (values >= _BASE).astype(np.int64) + (values >= _TWO_END)


def codes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Character codes of the numbers, one after the other.

    Args:
        values: whole numbers from 0 to LIMIT - 1.

    Raises:
        ValueError: a number outside of that.
    """
    values = values.astype(np.int64)
    if len(values) and not 0 <= values.min() <= values.max() < LIMIT:
        raise ValueError(f"only numbers from 0 to {LIMIT - 1} have a code")
    if not (values >= _BASE).any():
        return _CODES[values]
    width = widths(values)
    place = np.cumsum(width) - width
    out = np.empty(int(width.sum()), np.uint8)
    out[place[width == 1]] = _CODES[values[width == 1]]
    for size, escape, base in ((3, _TWO, _BASE), (4, _THREE, _TWO_END)):
        rows = np.flatnonzero(width == size)
        rest = values[rows] - base
        out[place[rows]] = _CODES[escape]
        for digit in range(size - 1, 0, -1):
            out[place[rows] + digit] = _CODES[rest % _BASE]
            rest //= _BASE
    return out


def pack(values: NDArray[Any]) -> str:
    """A list of numbers as a string."""
    return codes(values).tobytes().decode("latin-1")


def pack_lists(sizes: NDArray[Any], values: NDArray[Any]) -> str:
    """Many lists, each followed by the separator.

    Args:
        sizes [L]: how many of the values each list has.
    """
    width = widths(values)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    ends = np.cumsum(np.bincount(owner, weights=width, minlength=len(sizes)).astype(np.int64) + 1)
    out = np.full(int(ends[-1]) if len(ends) else 0, ord(SEPARATOR), np.uint8)
    inside = np.ones(len(out), bool)
    inside[ends - 1] = False
    out[inside] = codes(values)
    return out.tobytes().decode("latin-1")


def zigzag(values: NDArray[Any]) -> NDArray[np.int64]:
    """Whole numbers as numbers from 0: 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4."""
    values = values.astype(np.int64)
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unpack(text: str) -> list[int]:
    """The numbers of a string that `pack` made."""
    digits = [ALPHABET.index(character) for character in text]
    values, at = [], 0
    while at < len(digits):
        head = digits[at]
        size = 2 if head == _TWO else 3 if head == _THREE else 0
        value = head if not size else 0
        for digit in digits[at + 1 : at + 1 + size]:
            value = value * _BASE + digit
        values.append(value + (0, 0, _BASE, _TWO_END)[size])
        at += 1 + size
    return values
