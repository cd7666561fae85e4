"""Figures of the intervention: the effect of every class beside its random draws, on text and on translation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from glottoscope.report.data import ReportData
from glottoscope.report.figures_intervention_sweeps import sweep_figures
from glottoscope.report.intervention import donor_name
from glottoscope.report.intervention_numbers import digits_of, signed
from glottoscope.report.intervention_view import (
    LOWER_IS_BETTER,
    METRIC_NAMES,
    TEXT_NAMES,
    Effect,
    Setting,
    Target,
    View,
    alpha_words,
    layer_words,
    view_of,
)
from glottoscope.report.plot import WIDTH, ReportFigure, footer, margins
from glottoscope.report.style import CONTROL, FAINT, GRID, INK, MUTED, drawable
from glottoscope.report.style_intervention import part_style

PREFIX = "intervention_"
MOST_BASES = 4  # panels of one figure
MOST_COLUMNS = 4
LANES = {"part": 0.2, "self": -0.14, "shuffled": -0.32}  # heights within a class's row
POOL_LANES = {"random": 0.21, "random_other": 0.02}  # lower edges of the bands
BAND = 0.17
POOL_COLOURS = {"random": FAINT, "random_other": CONTROL}


def intervention_figures(data: ReportData) -> Iterator[ReportFigure]:
    """Every figure of the intervention that the table supports; none where the study made none."""
    view = view_of(data)
    if view is None:
        return
    for text in view.texts:
        targets = view.perplexity_targets("nll")
        caption = (
            f"Change of log perplexity (nats per token) on {TEXT_NAMES[text]} when one class's part of the donor is added at the "
            "chosen alpha; left of 0 is better. Bars are 95 % paired bootstrap intervals. Behind each class: the changes that "
            "random features of the same activation mass make (light: all draws, dark: the middle 95 %), drawn from all alive "
            "features (above) and from outside the class (below). An effect inside its band is no evidence for the class. Base "
            "steps have their own scales."
        )
        yield from _effects(view, text, targets, f"{PREFIX}{text}", f"Effect by class, {TEXT_NAMES[text]}", caption)
    for i, some in enumerate(_groups(view.translation_targets)):
        names = ", ".join(dict.fromkeys(METRIC_NAMES[t.metric] for t in some))
        caption = (
            f"Change of the translation measures ({names}) when one class's part of the donor is added at the chosen alpha; right "
            "of 0 is better. Bars are 95 % paired bootstrap intervals over articles, bands the random draws where they were "
            "translated. A change whose interval holds 0 is noise."
        )
        name = f"{PREFIX}translation" + (f"_{i + 1}" if i else "")
        yield from _effects(view, "translation", some, name, f"Effect by class, translation: {names}", caption)
    yield from sweep_figures(view)


def _groups(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets of one figure each: whole metrics, as many as fit side by side."""
    groups: list[list[Target]] = []
    for metric in dict.fromkeys(t.metric for t in targets):
        mine = [t for t in targets if t.metric == metric]
        if groups and len(groups[-1]) + len(mine) <= MOST_COLUMNS:
            groups[-1] += mine
        else:
            groups.append(mine)
    return groups


def shown_bases(view: View) -> list[Setting]:
    """At most MOST_BASES main settings, spread over training, the first and the last among them."""
    n = len(view.main)
    if n <= MOST_BASES:
        return view.main
    return [view.main[round(i * (n - 1) / (MOST_BASES - 1))] for i in range(MOST_BASES)]


def _effects(view: View, text: str, targets: Sequence[Target], name: str, title: str, caption: str) -> Iterator[ReportFigure]:
    settings = [s for s in shown_bases(view) if any(_points(view, s, text, target) for target in targets)]
    if not settings:
        return
    parts = list(reversed(view.parts))
    controls = any(s.at(arm, part, text, t) for s in settings for arm in ("self", "shuffled") for part in parts for t in targets)
    panel, between = (0.34 if controls else 0.25) * len(parts), 0.82
    width = max(WIDTH, 1.3 + 1.4 * len(targets))
    height = 1.12 + len(settings) * panel + (len(settings) - 1) * between + 0.88
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(settings), len(targets), sharey=True, squeeze=False)
    margins(figure, left=1.18, right=0.16, top=1.12, bottom=0.88, hspace=between / panel)
    figure.subplots_adjust(wspace=0.14)
    figure.text(0.012, 1 - 0.1 / height, drawable(f"{settings[0].model}: {title[:1].lower()}{title[1:]}"), **_HEAD)
    _legend(figure, view, settings, text, targets, height)
    for row, s in zip(axes, settings, strict=True):
        limits = [_limits(view, s, text, target) for target in targets]
        if targets[0].metric in LOWER_IS_BETTER:  # one unit: languages can be compared
            limits = [(min(low for low, _ in limits), max(high for _, high in limits))] * len(limits)
        for ax, target, span in zip(row, targets, limits, strict=True):
            ax.set_xlim(span)
            _panel(view, s, text, target, parts, ax, lift=0.0 if controls else -0.2)
        alpha = f", alpha {alpha_words(alphas)}" if (alphas := s.chosen_alphas(text)) else ""
        words = f"base step {s.base_step:,}, donor {donor_name(s)}, {layer_words(s.layers)}{alpha}"
        row[0].annotate(drawable(words), (0, 1), xytext=(-79, 29), xycoords="axes fraction", textcoords="offset points", **_ROW)
    for ax, target in zip(axes[-1], targets, strict=True):
        lower = target.metric in LOWER_IS_BETTER
        unit = "nats per token" if target.metric == "nll" else METRIC_NAMES[target.metric]
        ax.set_xlabel(f"← better   {unit}" if lower else f"{unit}   better →", fontsize=7.5)
    units = "documents" if text == "documents" else "articles"
    footer(figure, view.data, f"bars: 95 % paired bootstrap over {units}", *_left_out(view, settings))
    yield ReportFigure(name, title, caption, figure)


_HEAD = {"fontsize": 10.5, "fontweight": "bold", "va": "top"}
_ROW = {"fontsize": 8.5, "fontweight": "bold", "color": INK, "annotation_clip": False}


def _left_out(view: View, settings: Sequence[Setting]) -> list[str]:
    return ["other base steps: in the tables"] if len(view.main) > len(settings) else []


def _points(view: View, s: Setting, text: str, target: Target) -> list[Effect]:
    found = [s.at("part", part, text, target) for part in view.parts]
    return [e for e in found if e is not None and e.verdict != "missing"]


def _panel(view: View, s: Setting, text: str, target: Target, parts: Sequence[str], ax: Axes, *, lift: float) -> None:
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.axvline(0, color=MUTED, linewidth=0.8)
    for y, part in enumerate(parts):
        if y:
            ax.axhline(y - 0.5, color=GRID, linewidth=0.6)
        _draws(s, text, target, part, y + lift, ax)
        drawn = [_marker(view, s, arm, text, target, part, y + lift, ax) for arm in LANES]
        if not drawn[0]:
            why = s.note("part", part) or "not measured"
            ax.text(0.02, y, drawable(why), transform=ax.get_yaxis_transform(), fontsize=6.5, color=MUTED, va="center")
    ax.set_ylim(-0.5, len(parts) - 0.5)
    ax.yaxis.set_major_locator(FixedLocator(range(len(parts))))
    ax.set_yticklabels([drawable(_short(view.part_name(part))) for part in parts])
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(4 if _inches(ax) > 1.45 else 2, min_n_ticks=2))
    ax.tick_params(axis="x", labelsize=7)
    title = view.language_name(target.language, arrow="→")
    if target.metric not in LOWER_IS_BETTER:
        codes = target.language.split("-")
        # The axis below bears the metric's whole name; the panels are too narrow for it.
        short = METRIC_NAMES[target.metric].removeprefix("concept ")
        title = f"{short}, {'→'.join(codes)}"
    ax.set_title(drawable(title), fontsize=8.5, pad=13)
    donor = s.at("donor", None, text, target)
    if donor is not None and math.isfinite(donor.change):
        words = f"the donor itself: {signed(donor.change, digits_of(0, donor.change, donor.change))}"
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(words, (0, 1), xytext=(0, 4), fontsize=6.5, color=MUTED, **place)


def _inches(ax: Axes) -> float:
    figure = ax.get_figure()
    assert figure is not None
    return ax.get_position().width * figure.get_figwidth()  # pyright: ignore[reportAttributeAccessIssue]


def _short(name: str) -> str:
    return name if len(name) <= 15 else f"{name[:14]}…"


def _limits(view: View, s: Setting, text: str, target: Target) -> tuple[float, float]:
    """x limits that hold 0, every part's interval and every draw; self and shuffled as far as 1.5 times that."""
    near, far = [0.0], []
    for part in view.parts:
        effect = s.at("part", part, text, target)
        if effect is not None and effect.verdict != "missing":
            near += [v for v in (effect.change, effect.low, effect.high) if math.isfinite(v)]
        for pool in POOL_LANES:
            near += [float(v) for v in s.draws(pool, part, text, target)[[0, -1]]] if _n(s, pool, part, text, target) else []
        for arm in ("self", "shuffled"):
            other = s.at(arm, part, text, target)
            far += [other.change] if other is not None and math.isfinite(other.change) else []
    low, high = min(near), max(near)
    room = 0.75 * max(high - low, 1e-9)
    low, high = max(low - room, min([low, *far])), min(high + room, max([high, *far]))
    pad = 0.07 * max(high - low, 1e-9)
    return low - pad, high + pad


def _n(s: Setting, pool: str, part: str, text: str, target: Target) -> int:
    return len(s.draws(pool, part, text, target))


def _draws(s: Setting, text: str, target: Target, part: str, y: float, ax: Axes) -> None:
    for pool, edge in POOL_LANES.items():
        changes = s.draws(pool, part, text, target)
        if len(changes) == 0:
            continue
        spans = [(changes[0], changes[-1], 0.25), (*np.quantile(changes, [0.025, 0.975]), 0.45)]
        for low, high, strength in spans:
            box = Rectangle((low, y + edge), high - low, BAND, color=POOL_COLOURS[pool], alpha=strength, linewidth=0)
            ax.add_patch(box)


def _marker(view: View, s: Setting, arm: str, text: str, target: Target, part: str, y: float, ax: Axes) -> bool:
    """A point with its interval; at the panel's edge an arrow and the number, where it lies far outside."""
    effect = s.at(arm, part, text, target)
    if effect is None or effect.verdict == "missing":
        return False
    height = y + LANES[arm]
    colour, marker = part_style(view, part) if arm == "part" else (INK, "o" if arm == "self" else "x")
    low, high = ax.get_xlim()
    if not low <= effect.change <= high:
        right = effect.change > high
        edge = high if right else low
        ax.plot([edge], [height], ">" if right else "<", color=colour, markersize=3, clip_on=False)
        words = signed(effect.change, 2)
        offset = (-5 if right else 5, 0)
        place = {"ha": "right" if right else "left", "va": "center", "fontsize": 5.5, "color": MUTED}
        ax.annotate(words, (edge, height), xytext=offset, textcoords="offset points", **place)
        return True
    if math.isfinite(effect.low + effect.high):
        thick = 1.5 if arm == "part" else 0.7
        ax.plot([max(effect.low, low), min(effect.high, high)], [height, height], color=colour, linewidth=thick)
    if arm == "part":
        ax.plot([effect.change], [height], marker, color=colour, markersize=7 if marker == "*" else 4.6)
    else:
        ax.plot([effect.change], [height], marker, color=colour, markersize=3, markerfacecolor="none", markeredgewidth=0.8)
    return True


def _legend(figure: Figure, view: View, settings: Sequence[Setting], text: str, targets: Sequence[Target], height: float) -> None:
    def any_of(arm: str) -> bool:
        return any(s.at(arm, part, text, t) is not None for s in settings for part in view.parts for t in targets)

    handles: list[Any] = [Line2D([], [], color=INK, marker="D", markersize=4.6, linewidth=1.5)]
    names = ["the donor's part"]
    for arm, marker, label in (("self", "o", "the base's own part"), ("shuffled", "x", "the part of another text")):
        if any_of(arm):
            handles.append(Line2D([], [], color=INK, marker=marker, markersize=3, markerfacecolor="none", linewidth=0.7))
            names.append(label)
    for pool, label in (("random", "random, all alive"), ("random_other", "random, outside the class")):
        if any(_n(s, pool, part, text, t) for s in settings for part in view.parts for t in targets):
            colour = POOL_COLOURS[pool]
            handles.append((Patch(color=colour, alpha=0.25, linewidth=0), Patch(color=colour, alpha=0.6, linewidth=0)))
            names.append(label)
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.29 / height),
        ncols=len(names),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=1.7,
        columnspacing=1.1,
        handletextpad=0.5,
        fontsize=7,
        borderaxespad=0.2,
    )
