"""Figure 4 of the paper: what activates a feature early, in the middle and at the end of training."""

from __future__ import annotations

import functools

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from glottoscope.report.data import PatternExample, ReportData, Spans
from glottoscope.report.plot import ReportFigure, footer
from glottoscope.report.style import BLUE, MUTED, ORANGE, drawable, japanese_font

PATTERN_WIDTH = 7.2  # inches
LINE = 0.19  # inches between examples
SIZE = 7.5  # points
PER_ROLE, PER_FEATURE = 2, 4
ROLES = ("early", "middle", "last")


def ordered_patterns(data: ReportData) -> list[PatternExample]:
    """Early, middle, last; within a role as the study gave them."""
    return sorted(data.patterns, key=lambda p: ROLES.index(p.role))


def describe(pattern: PatternExample, data: ReportData) -> str:
    """`feature 17: mixed, bilingual (phi .71)`."""
    language = data.language_name(pattern.language)
    words = f"feature {pattern.feature}: {language}"
    if pattern.bilingual is not None:
        words += ", bilingual" if pattern.bilingual else ", not bilingual"
    if pattern.phi is not None:
        words += f" (phi {pattern.phi:.2f})"
    return words


def figure_4(data: ReportData) -> ReportFigure | None:
    """Texts shaded by activation, at three checkpoints."""
    chosen = [p for role in ROLES for p in [q for q in data.patterns if q.role == role][:PER_ROLE]]
    if not chosen:
        return None
    lines = sum(1.35 + min(len(p.examples), PER_FEATURE) for p in chosen) + 1.5 * len({p.role for p in chosen})
    height = lines * LINE + 0.5
    figure = Figure(figsize=(PATTERN_WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(0, PATTERN_WIDTH * 72)
    ax.set_ylim(height * 72, 0)  # points from the top
    y, role = 16.0, ""
    for pattern in chosen:
        if pattern.role != role:
            role = pattern.role
            y += 6 if y > 20 else 0
            title = f"{role.capitalize()}: {pattern.model}, step {pattern.step:,}, layer {pattern.layer}"
            ax.text(8, y, drawable(title), fontsize=9.5, fontweight="bold")
            y += LINE * 72 * 1.15
        ax.text(8, y, drawable(describe(pattern, data)), fontsize=SIZE, color=MUTED)
        y += LINE * 72
        for language, spans in pattern.examples[:PER_FEATURE]:
            ax.text(8, y, drawable(language), fontsize=6.5, color=MUTED)
            _draw(ax, spans, 34, y, PATTERN_WIDTH * 72 - 12, data.activation_threshold)
            y += LINE * 72
        y += LINE * 72 * 0.3
    footer(figure, data, "shade: activation; underlined: counted")
    caption = (
        "Fig. 4 of the paper: texts that activate features at an early, a middle and the last "
        "checkpoint. The shade is the "
        "activation relative to the feature's maximum; underlined pieces are above the activation "
        "threshold, so counted. "
        "A feature number means nothing across checkpoints: every checkpoint has its own SAE."
    )
    return ReportFigure("fig4_patterns", "What activates the features", caption, figure)


def _draw(ax: Axes, spans: Spans, x: float, y: float, right: float, threshold: float) -> None:
    """One line of text around its strongest piece, cut to the width with an ellipsis at either end."""
    pieces = [(drawable(text), activation) for text, activation in spans]
    pieces = [(text, activation) for text, activation in pieces if text]
    if not pieces:
        return
    widths = [_width(text) for text, _ in pieces]
    room, dots = right - x, _width("…")
    peak = max(range(len(pieces)), key=lambda i: pieces[i][1])
    start, stop, used = peak, peak + 1, widths[peak] + 2 * dots
    while True:  # grow around the peak: twice as much context before it as after
        before = start > 0 and used + widths[start - 1] <= room
        after = stop < len(pieces) and used + widths[stop] <= room
        if before and (not after or peak - start < 2 * (stop - peak)):
            start -= 1
            used += widths[start]
        elif after:
            used += widths[stop]
            stop += 1
        else:
            break
    shown = [("…", 0.0)] * (start > 0) + pieces[start:stop] + [("…", 0.0)] * (stop < len(pieces))
    for text, activation in _joined(shown):
        width = _width(text)
        if x + width > right + dots:  # one piece longer than the line
            keep = max(1, int(len(text) * (right - x) / width) - 1)
            text = text[:keep] + "…"
            width = _width(text)
        if activation >= 0.05:
            ax.add_patch(Rectangle((x, y - 7.4), width, 9.4, facecolor=ORANGE, alpha=0.12 + 0.6 * min(activation, 1), linewidth=0))
        if activation > threshold:
            ax.plot([x + 0.5, x + width - 0.5], [y + 2.2, y + 2.2], color=BLUE, linewidth=1)
        ax.text(x, y, text, fontsize=SIZE)
        x += width


def _joined(pieces: Spans) -> Spans:
    """Neighbours without activation as one piece: fewer texts to draw."""
    out: Spans = []
    for text, activation in pieces:
        if out and activation < 0.05 and out[-1][1] < 0.05:
            out[-1] = (out[-1][0] + text, 0.0)
        else:
            out.append((text, activation))
    return out


@functools.cache
def _fonts() -> tuple[tuple[FT2Font, frozenset[int]], ...]:
    paths = (f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", str(japanese_font()))
    fonts = [FT2Font(path) for path in paths]
    for font in fonts:
        font.set_size(SIZE, 72)
    return tuple((font, frozenset(font.get_charmap())) for font in fonts)


@functools.cache
def _advance(char: str) -> float:
    for font, codepoints in _fonts():
        if ord(char) in codepoints:
            return font.load_char(ord(char)).linearHoriAdvance / 65536
    return SIZE


def _width(text: str) -> float:
    """Width of a drawable text in points."""
    return sum(map(_advance, text))
