"""Pieces that several figures share: the tokens axis, a curve with its interval, labels at line ends, the footer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter

from glottoscope.report.data import ReportData, interval, numbers, short_number
from glottoscope.report.style import FAINT, MUTED, WORDS, drawable, spread

WIDTH = 6.4  # inches
NO_CLAIM = "fewer than three LM seeds: no claim"


@dataclass(slots=True)
class ReportFigure:
    """A figure with its file name (no suffix), its title and its caption (plain text)."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(slots=True)
class Labels:
    """Line ends waiting for their labels."""

    y: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    colour: list[str] = field(default_factory=list)


def setting_words(data: ReportData) -> str:
    """The settings that move every level, for the footer of every figure."""
    return f"counted: activation > {data.activation_threshold:g} of the feature's maximum   ·   K = {data.k}"


def footer(figure: Figure, data: ReportData, *extra: str) -> None:
    """Print the activation threshold and K at the figure's foot, and what else the figure must say."""
    room = 17.2 * figure.get_figwidth()  # characters of a line
    lines = [""]
    for part in [setting_words(data), *extra]:
        joined = f"{lines[-1]}   ·   {part}" if lines[-1] else part
        if len(joined) <= room:
            lines[-1] = joined
        else:
            lines.append(part)
    text = "\n".join(drawable(line) for line in lines)
    figure.text(0.012, 0.07 / figure.get_figheight(), text, fontsize=6.5, color=MUTED, va="bottom", linespacing=1.35)


def margins(figure: Figure, *, left: float, right: float, top: float, bottom: float, hspace: float = 0.2) -> None:
    """Place the axes by inches from the figure's edges."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height, hspace=hspace)


def curve(
    ax: Axes,
    x: np.ndarray,
    table: pa.Table,
    measure: str,
    *,
    colour: str,
    label: str,
    labels: Labels,
    marker: str = "o",
    linestyle: str | tuple[int, tuple[float, ...]] = "-",
    width: float = 1.5,
    band: bool = True,
) -> bool:
    """Draw a measure against x [rows] with its 95 % interval; False where it was not measured."""
    value, low, high = interval(table, measure)
    known = np.isfinite(value)
    if not known.any():
        return False
    if band:
        ax.fill_between(x, low, high, where=np.isfinite(low) & np.isfinite(high), color=colour, alpha=0.16, linewidth=0)
        if known.sum() == 1:  # a band of one point is invisible
            i = int(np.flatnonzero(known)[0])
            if np.isfinite(low[i]) and np.isfinite(high[i]):
                ax.vlines(x[i], low[i], high[i], color=colour, linewidth=1)
    ax.plot(x[known], value[known], color=colour, marker=marker, linestyle=linestyle, linewidth=width)
    labels.y.append(float(value[known][-1]))
    labels.text.append(label)
    labels.colour.append(colour)
    return True


def label_ends(ax: Axes, labels: Labels) -> None:
    """Write the labels right of the axes near the ends of their lines, moved apart where they would overlap."""
    if not labels.y:
        return
    limits = ax.get_ylim()
    height = ax.get_position().height * ax.get_figure().get_figheight() * 72  # type: ignore[union-attr]  # points
    ends = [_axes_fraction(ax, y) for y in labels.y]
    sizes = [(9.4 * (text.count("\n") + 1) + 1.5) / height for text in labels.text]
    placed = spread(ends, sizes, -0.04, 1.06)
    for end, y, text, colour in zip(ends, placed, labels.text, labels.colour, strict=True):
        ax.plot([1.004, 1.026], [end, y], transform=ax.transAxes, color=colour, linewidth=0.6, clip_on=False)
        words = "\n".join(drawable(line) for line in text.split("\n"))
        ax.annotate(
            words,
            (1.034, y),
            xycoords="axes fraction",
            color=WORDS.get(colour, colour),
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            linespacing=1.0,
        )
    ax.set_ylim(limits)


def _axes_fraction(ax: Axes, y: float) -> float:
    return float(ax.transAxes.inverted().transform(ax.transData.transform((ax.get_xlim()[0], y)))[1])


def tokens_axis(ax: Axes, tokens: np.ndarray) -> None:
    """Scale x for tokens seen: logarithmic, with 0 (before training) kept at the left where it was measured."""
    positive = np.unique(tokens[tokens > 0])
    if len(positive) == 0:
        ax.set_xlim(-1, 1)
        ticks = [0.0]
    else:
        first, last = float(positive[0]), float(positive[-1])
        powers = [10.0**p for p in range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)]
        powers = powers[:: max(1, math.ceil(len(powers) / 8))]
        ticks = powers if len(powers) >= 2 else sorted({first, *powers, last})
        if (tokens == 0).any():
            ax.set_xscale("symlog", linthresh=first, linscale=0.5)
            ax.set_xlim(-0.35 * first, last * 1.25)
            ticks = [0.0, *ticks]
        else:
            ax.set_xscale("log")
            ax.set_xlim(first / 1.6, last * 1.6)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter([short_number(t) if t else "0" for t in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())


def steps_on_top(ax: Axes, tokens: np.ndarray, steps: Sequence[int]) -> None:
    """Mark every checkpoint above the axes with its step; labels that would touch are left out, the ends never."""
    fractions = [float(ax.transAxes.inverted().transform(ax.transData.transform((t, 0)))[0]) for t in tokens]
    names = [f"{step:,}" for step in steps]
    width_in = ax.get_position().width * ax.get_figure().get_figwidth()  # type: ignore[union-attr]
    last = len(steps) - 1
    reach = -1.0
    for i, (x, name) in enumerate(zip(fractions, names, strict=True)):
        ax.plot([x, x], [1.0, 1.015], transform=ax.transAxes, color=FAINT, linewidth=0.7, clip_on=False)
        half = 0.5 * (len(name) * 0.062 + 0.08) / width_in
        end = fractions[last] - (0.5 * (len(names[last]) * 0.062 + 0.08) / width_in)
        if i == last or (x - half > reach and x + half < end):
            ax.annotate(
                name,
                (x, 1.025),
                xycoords="axes fraction",
                fontsize=6.5,
                color=MUTED,
                ha="center",
                annotation_clip=False,
            )
            reach = x + half
    ax.annotate("step", (1.034, 1.025), xycoords="axes fraction", fontsize=6.5, color=MUTED, ha="left", annotation_clip=False)


def share_axis(ax: Axes, top: float | None = None) -> None:
    """Per cent from 0 to `top` (or to what the data need, at most 100)."""
    high = top if top is not None else min(1.0, max(0.05, ax.get_ylim()[1]))
    ax.set_ylim(-0.02 * high, high * 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high > 0.08 else 1))


def tokens_of(table: pa.Table) -> np.ndarray:
    """tokens_seen as float64 [rows]."""
    return numbers(table, "tokens_seen")


def say_empty(ax: Axes, text: str) -> None:
    """Write in an empty panel why it is empty."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=8)
    ax.set_yticks([])
    ax.grid(False)


def file_name(text: str) -> str:
    """A model's name as part of a file name."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in text)


def control_label(control: str) -> str:
    """Short name of a whole-model control for labels at line ends."""
    return "negative control" if control == "negative" else "no-switching control"
