"""How figures look and how they are written: palette, fonts, missing glyphs, deterministic SVG and PNG."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

# Okabe and Ito (2008), "Color Universal Design": told apart by readers with any colour vision. Line styles and markers
# repeat every difference, so that colour never carries it alone.
BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
YELLOW, BLUE, VERMILLION, PURPLE = "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
INK, MUTED, FAINT, GRID, PAPER = "#1f2328", "#59636e", "#8c959f", "#d8dee4", "#ffffff"

LANGUAGE_COLOURS = (BLUE, VERMILLION, ORANGE, SKY, YELLOW)
LANGUAGE_MARKERS = ("s", "^", "D", "v", "P")
MIXED, BILINGUAL, PAPER_RULE, CONTROL = MUTED, GREEN, "#66c2a5", PURPLE
MONOSEMANTICITY, COHERENCE, ALIGNMENT = INK, PURPLE, ORANGE
# Text on coloured cells: near black and near white, different from INK and PAPER, which the page recolours in the dark.
ON_LIGHT, ON_DARK = "#101112", "#fdfdfe"
# The colours that are too light for words on white, and a shade of the same hue with a contrast of 4.5 (WCAG 2, AA).
WORDS = {
    ORANGE: "#946200",
    SKY: "#1f75a6",
    GREEN: "#007a59",
    YELLOW: "#746c00",
    VERMILLION: "#b84f00",
    PURPLE: "#a34a7b",
    PAPER_RULE: "#33796a",
    FAINT: MUTED,
}

_STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.6,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "figure.dpi": 100,
    "text.hinting": "none",
    "text.hinting_factor": 1,  # the same advances in PNG and SVG, which figure 4 relies on
    "text.parse_math": False,  # "$" in a corpus is a dollar sign, never mathematics
    "axes.unicode_minus": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "glottoscope",
    "path.simplify": False,
}


@functools.cache
def japanese_font() -> Path:
    """Path of IPAexGothic, packaged in matplotlib-fontja, registered with matplotlib.

    The package is located but not imported: importing it changes matplotlib's global settings.
    """
    spec = importlib.util.find_spec("matplotlib_fontja")
    assert spec is not None and spec.origin is not None, "matplotlib-fontja is a dependency of glottoscope"
    path = Path(spec.origin).parent / "fonts" / "ipaexg.ttf"
    font_manager.fontManager.addfont(path)
    regular = next(entry for entry in font_manager.fontManager.ttflist if Path(entry.fname) == path)
    # The package has one weight. Bold titles would find it all the same, with a warning for each.
    font_manager.fontManager.ttflist.append(dataclasses.replace(regular, weight=700))
    return path


@functools.cache
def _latin_font() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def families() -> tuple[str, ...]:
    """Font families of the figures in order of fallback; both are packaged, so no machine's own fonts matter."""
    return ("DejaVu Sans", FT2Font(str(japanese_font())).family_name)


@functools.cache
def _drawable_codepoints() -> frozenset[int]:
    return frozenset().union(*(FT2Font(str(path)).get_charmap().keys() for path in (_latin_font(), japanese_font())))


def missing_glyphs(texts: Iterable[str]) -> set[str]:
    """Characters of `texts` that no font of the figures can draw (line breaks aside)."""
    return {char for text in texts for char in text if char != "\n" and ord(char) not in _drawable_codepoints()}


# Characters that reorder, hide or break the text around them: bidi marks, embeddings and isolates, line separators.
_HOSTILE = frozenset([0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def visible(text: str) -> str:
    """Text from a corpus with every control, bidi and unpaired character shown by its code point, `‹U+202E›`."""
    out = []
    for char in text:
        code = ord(char)
        if char in "\n\r":
            out.append("⏎")
        elif char == "\t":
            out.append(" ")
        elif 0xD800 <= code <= 0xDFFF:
            out.append("\ufffd")
        elif code in _HOSTILE or unicodedata.category(char) == "Cc" or (code & 0xFFFE) == 0xFFFE:
            out.append(f"‹U+{code:04X}›")
        else:
            out.append(char)
    return "".join(out)


def drawable(text: str) -> str:
    """`visible(text)` with a hollow square for every character that the figures' fonts lack."""
    text = visible(text)
    absent = missing_glyphs([text])
    return "".join("□" if char in absent else char for char in text) if absent else text


def style(salt: str = "glottoscope") -> dict[Any, Any]:
    """rc parameters for `matplotlib.rc_context`; the salt makes the ids inside an SVG."""
    return {**_STYLE, "font.family": list(families()), "svg.hashsalt": salt}


def language_colour(index: int) -> str:
    """Colour of the language at this index of `languages` (repeats after five)."""
    return LANGUAGE_COLOURS[index % len(LANGUAGE_COLOURS)]


def language_marker(index: int) -> str:
    """Marker of the language at this index of `languages`."""
    return LANGUAGE_MARKERS[index % len(LANGUAGE_MARKERS)]


def render(figure: Figure, name: str) -> tuple[str, bytes]:
    """Draw a figure -> (SVG text, PNG bytes): same figure, same bytes; no dates, no version in the metadata."""
    salt = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    with matplotlib.rc_context(style(f"glottoscope-{salt}")):
        svg, png = io.StringIO(), io.BytesIO()
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": "glottoscope", "Title": name})
        figure.set_dpi(150)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": "glottoscope"})
    return svg.getvalue(), png.getvalue()


def spread(positions: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres of labels of these sizes, nearest to `positions` without overlap, in order, within [low, high].

    Least squares: with the sizes before each label taken off, keeping the order is an isotonic regression. Where the
    labels cannot all fit, they share the room in proportion.
    """
    if not positions:
        return []
    shrink = min(1.0, (high - low) / sum(sizes))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    starts, before = [], 0.0  # lower edge wanted, minus the room of the labels below
    for i in order:
        starts.append(positions[i] - shrink * sizes[i] / 2 - before)
        before += shrink * sizes[i]
    pools: list[tuple[float, int]] = []  # (mean, members)
    for start in starts:
        pool = (start, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, n = pools.pop()
            pool = ((mean * n + pool[0] * pool[1]) / (n + pool[1]), n + pool[1])
        pools.append(pool)
    edges = [min(max(mean, low), high - before) for mean, n in pools for _ in range(n)]
    out, below = [0.0] * len(positions), 0.0
    for i, edge in zip(order, edges, strict=True):
        out[i] = edge + below + shrink * sizes[i] / 2
        below += shrink * sizes[i]
    return out
