"""A feature in a terminal: its examples with the active tokens marked, and its top tokens.

Marks are reverse, bold and underlined type, so that they are seen without colour; where output is no terminal they are brackets.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

PEAK, STRONG, WEAK = "bold reverse", "bold underline", "underline"
STRONG_LEVEL = 50  # percent of the feature's maximum
AROUND = 16  # tokens shown on either side of the strongest one
EXAMPLES = 4  # of a language, where both have enough; twice as many in all
MAX_TOKEN = 200  # characters
_LINE_ENDS = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Piece(NamedTuple):
    """Some tokens that make readable characters: text, and activation in percent of the feature's maximum (0: not active)."""

    text: str
    level: int
    peak: bool


class Example(NamedTuple):
    language: str
    pieces: Sequence[Piece]


class View(NamedTuple):
    """What a rater sees of a feature: examples, strongest first, and top tokens by language; facts where it is not blind."""

    examples: Sequence[Example]
    tokens: Mapping[str, Sequence[str]]
    facts: Sequence[str] = ()


def visible(text: str) -> str:
    """Corpus text that does nothing to a terminal: no control, bidi or private characters; line ends are shown."""
    text = _LINE_ENDS.sub("⏎ ", text).replace("\t", " ")
    return "".join("\ufffd" if c in _BIDI or unicodedata.category(c) in ("Cc", "Co", "Cs", "Cn") else c for c in text)


def shown_examples(examples: Sequence[Example], languages: Sequence[str]) -> list[Example]:
    """The first examples of each language, and more of one where the other has few."""
    by_language = {x: [e for e in examples if e.language == x] for x in languages}
    counts = {x: min(EXAMPLES, len(found)) for x, found in by_language.items()}
    for language, found in by_language.items():
        spare = EXAMPLES * len(languages) - sum(counts.values())
        counts[language] += min(spare, len(found) - counts[language])
    return [e for x in languages for e in by_language[x][: counts[x]]]


def print_view(view: View, names: Mapping[str, str], console: Console) -> None:
    """Print a feature: examples by language, then top tokens.

    Args:
        names: language code -> its name, in the order to show.
    """
    marked = console.is_terminal
    for line in view.facts:
        console.print(Text(visible(line)), soft_wrap=False)
    shown = shown_examples(view.examples, list(names))
    for language, name in names.items():
        mine = [e for e in shown if e.language == language]
        console.print(Text(f"\n{name}", style="bold") + Text("" if mine else ": no examples"))
        for example in mine:
            line = Text("  ") + _excerpt(example.pieces, marked)
            console.print(line, soft_wrap=False, overflow="fold")
    console.print()
    for language, name in names.items():
        tokens = [f"“{visible(t[:MAX_TOKEN])}”" for t in view.tokens.get(language, ())]
        if tokens:
            console.print(Text(f"Top tokens, {name}: {'  '.join(tokens)}"), soft_wrap=False, overflow="fold")


def _excerpt(pieces: Sequence[Piece], marked: bool) -> Text:
    peak = next((n for n, piece in enumerate(pieces) if piece.peak), 0)
    first, last = max(0, peak - AROUND), min(len(pieces), peak + AROUND + 1)
    line = Text("… " if first else "")
    for piece in pieces[first:last]:
        line.append_text(_piece(piece, marked))
    return line.append(" …" if last < len(pieces) else "")


def _piece(piece: Piece, marked: bool) -> Text:
    text = visible(piece.text if len(piece.text) <= MAX_TOKEN else f"{piece.text[:MAX_TOKEN]}…")
    bare = text.strip(" ") or text  # the space before a word is no part of it, unless it is all there is
    before, after = text[: text.find(bare)], text[text.find(bare) + len(bare) :]
    strong = piece.level >= STRONG_LEVEL
    if marked:
        style = PEAK if piece.peak else STRONG if strong else WEAK if piece.level > 0 else ""
        return Text(before) + Text(bare, style=style) + Text(after)
    opened, closed = ("[[", "]]") if piece.peak else ("[", "]") if strong else ("", "")
    return Text(f"{before}{opened}{bare}{closed}{after}")


def legend(console: Console) -> Text:
    """How active tokens are marked."""
    if not console.is_terminal:
        return Text("Active tokens: [[strongest of the example]], [at least half of the feature's maximum].")
    parts = [Text("Active tokens: "), Text("strongest of the example", style=PEAK), Text(", "),
             Text("at least half of the feature's maximum", style=STRONG), Text(", "), Text("weaker", style=WEAK)]  # fmt: skip
    return Text.assemble(*parts, ".")
