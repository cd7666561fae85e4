"""Figures of the intervention over alpha, over layers and over base checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from glottoscope.report.intervention_numbers import signed
from glottoscope.report.intervention_view import TEXT_NAMES, Effect, Setting, Target, View, setting_rows
from glottoscope.report.plot import WIDTH, ReportFigure, footer, margins, tokens_axis
from glottoscope.report.style import MUTED, drawable
from glottoscope.report.style_intervention import part_style

MOST_PANELS = 3  # base steps side by side
MUCH_HARM = 12  # times the benefit: beyond it a linear axis would show the harm alone
HEAD = {"fontsize": 10.5, "fontweight": "bold", "va": "top"}
SWEPT = (
    "experiment",
    "control",
    "model",
    "lm_seed",
    "sae_seed",
    "donor_model",
    "donor_step",
    "mode",
    "scale",
)  # alike in every point of a sweep over layers


def sweep_figures(view: View) -> Iterator[ReportFigure]:
    """Curves over alpha, layers and base steps, as far as several were tried."""
    if not view.texts:
        return
    for figure in (_alphas(view), _layers(view), _bases(view)):
        if figure is not None:
            yield figure


# ---- alpha


def _alphas(view: View) -> ReportFigure | None:
    text = view.texts[0]
    settings = [s for s in _few(view.main) if len(s.alphas) > 1]
    if not settings:
        return None
    targets = view.perplexity_targets("nll")
    figure, axes, height = _grid(view, targets, settings, f"{settings[0].model}: change over alpha")
    panels: list[tuple[Axes, list[Effect], Effect | None]] = []
    for ax_row, target in zip(axes, targets, strict=True):
        for ax, s in zip(ax_row, settings, strict=True):
            lines = {part: s.curve("part", part, text, target) for part in view.parts}
            for part, effects in lines.items():
                _line(view, part, ax, [e.alpha for e in effects], effects)
            dev = s.curve("part", "all", s.dev_text(text) or "", target)
            if len(dev) > 1:
                ax.plot([e.alpha for e in dev], [e.change for e in dev], color=MUTED, linestyle=":", linewidth=1.1)
            for alpha in s.chosen_alphas(text):
                ax.axvline(alpha, color=MUTED, linewidth=0.8, linestyle="--")
            everything = [e for effects in lines.values() for e in effects]
            panels.append((ax, [*everything, *dev], s.at("donor", None, text, target)))
            ax.set_xlim(min(0, *s.alphas) * 1.06, max(0, *s.alphas) * 1.06)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.set_title(drawable(view.language_name(target.language)))
    bent = any(_harm(effects) > MUCH_HARM for _, effects, _ in panels)
    for ax, effects, donor in panels:
        _change_axis(ax, effects, donor, bent=bent)
    for ax in axes[-1]:
        ax.set_xlabel("alpha")
    dev_words = ["dotted: all features, dev text"] if any(s.tried_on_dev(text) for s in settings) else []
    notes = [*dev_words, *(["above the first mark the axes are logarithmic"] if bent else [])]
    footer(figure, view.data, "bands: 95 % paired bootstrap", _donors(settings), "dashed: the alpha used", *notes)
    caption = (
        f"Change of log perplexity (nats per token, {TEXT_NAMES[text]}) against alpha for every part; below 0 is better. Dashed: "
        "the alpha of all statements and controls. The best alpha of a curve, chosen on the curve itself, looks better than it "
        "is."
    )
    _legend(figure, view, height)
    return ReportFigure("intervention_alpha", "Over alpha", caption, figure)


# ---- layers


def _layers(view: View) -> ReportFigure | None:
    text = view.texts[0]
    swept = [(s, over) for s in _few(view.main) if len(over := _over_layers(view, s)) > 1]
    if not swept:
        return None
    targets = view.perplexity_targets("nll")
    figure, axes, height = _grid(view, targets, [s for s, _ in swept], f"{swept[0][0].model}: change over layers")
    for ax_row, target in zip(axes, targets, strict=True):
        for ax, (s, over) in zip(ax_row, swept, strict=True):
            everything: list[Effect] = []
            for part in view.parts:
                effects = [_known(other.at("part", part, text, target)) for other in over]
                _line(view, part, ax, [other.layer for other in over], effects)
                everything += [e for e in effects if e is not None]
            _change_axis(ax, everything, s.at("donor", None, text, target))
            layers = [other.layer for other in over]
            ax.set_xlim(min(layers) - 0.3, max(layers) + 0.3)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.set_title(drawable(view.language_name(target.language)))
    for ax in axes[-1]:
        ax.set_xlabel("patched layer")
    footer(figure, view.data, "bands: 95 % paired bootstrap", _donors([s for s, _ in swept]), "each layer at its own alpha")
    caption = (
        f"Change of log perplexity (nats per token, {TEXT_NAMES[text]}) when one layer is patched, against that layer; below 0 is "
        "better. Each layer has its own SAEs, so its classes hold other features. Random draws: see the tables."
    )
    _legend(figure, view, height)
    return ReportFigure("intervention_layers", "Over layers", caption, figure)


def _over_layers(view: View, s: Setting) -> list[Setting]:
    """Settings that differ from this one in the layer alone, one layer at a time, lowest first."""
    keys = [
        key
        for key in view.keys
        if "+" not in key["layers"] and key["base_step"] == s.base_step and all(key[name] == getattr(s, name) for name in SWEPT)
    ]
    # Draws are not drawn here, and they are most of the table.
    rows = view.table.filter(pc.field("arm").isin(["part", "donor"]) & (pc.field("text") == view.texts[0]))
    return sorted((setting_rows(rows, key) for key in keys), key=lambda other: other.layer)


# ---- base steps


def _bases(view: View) -> ReportFigure | None:
    if len(view.main) < 3:
        return None
    text, target = view.texts[0], Target("nll", "all")
    figure = Figure(figsize=(WIDTH, 5.1))
    axes = figure.subplots(2, 1, sharex=True)
    margins(figure, left=0.72, right=0.2, top=0.86, bottom=0.84, hspace=0.3)
    figure.text(0.012, 1 - 0.1 / 5.1, drawable(f"{view.main[0].model}: change over base steps"), **HEAD)
    steps = [s.base_step for s in view.main]
    _step_axis(axes[0], steps)
    changes: list[Effect] = []
    for part in view.parts:
        effects = [_known(s.at("part", part, text, target)) for s in view.main]
        _line(view, part, axes[0], steps, effects)
        _line(view, part, axes[1], steps, effects, gap=True)
        changes += [e for e in effects if e is not None]
    _change_axis(axes[0], changes, None)
    axes[0].set_title("Change of pooled log perplexity (nats per token)")
    axes[1].set_title("Share of the gap to the donor that is closed")
    axes[1].axhline(0, color=MUTED, linewidth=0.8)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes[1].set_xlabel("base step")
    figure.align_ylabels(list(axes))
    footer(figure, view.data, "bands: 95 % paired bootstrap", _donors(view.main))
    caption = (
        f"Every class at the chosen alpha against the step of the base ({TEXT_NAMES[text]}). The gap shrinks as the base nears the "
        "donor, so a steady share of it is a shrinking change. The donor's features are the same at every step."
    )
    _legend(figure, view, 5.1)
    return ReportFigure("intervention_bases", "Over base steps", caption, figure)


# ---- pieces


def _few(settings: Sequence[Setting]) -> list[Setting]:
    n = len(settings)
    if n <= MOST_PANELS:
        return list(settings)
    return [settings[round(i * (n - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]


def _known(effect: Effect | None) -> Effect | None:
    return effect if effect is not None and effect.verdict != "missing" else None


def _donors(settings: Sequence[Setting]) -> str:
    return f"donor: step {', '.join(f'{step:,}' for step in sorted({s.donor_step for s in settings}))}"


def _step_axis(ax: Axes, steps: Sequence[int]) -> None:
    """Base steps on a logarithmic axis, each named where there is room; the last one always is."""
    tokens_axis(ax, np.array(steps, float))
    places = [float(ax.transAxes.inverted().transform(ax.transData.transform((step, 0)))[0]) for step in steps]
    named: list[int] = []
    for i in reversed(range(len(steps))):
        if not named or places[named[-1]] - places[i] > 0.07:
            named.append(i)
    ax.xaxis.set_major_locator(FixedLocator([steps[i] for i in named]))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{steps[i]:,}" for i in named]))


def _grid(view: View, targets: Sequence[Target], settings: Sequence[Setting], head: str) -> tuple[Figure, np.ndarray, float]:
    """Axes [targets, settings] with the base steps above the columns."""
    height = 1.5 * len(targets) + 1.9
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(len(targets), len(settings), sharex="col", squeeze=False)
    margins(figure, left=0.62, right=0.2, top=1.02, bottom=0.84, hspace=0.42)
    figure.subplots_adjust(wspace=0.42)
    figure.text(0.012, 1 - 0.1 / height, drawable(head), **HEAD)
    for ax, s in zip(axes[0], settings, strict=True):
        ax.annotate(
            f"base step {s.base_step:,}",
            (0, 1),
            xytext=(0, 19),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=7.5,
            color=MUTED,
        )
    return figure, axes, height


def _line(view: View, part: str, ax: Axes, x: Sequence[float], effects: Sequence[Effect | None], *, gap: bool = False) -> None:
    """One part's curve with its band; it breaks where there is no value."""
    none = (math.nan,) * 3
    values = np.array(
        [none if e is None else (e.gap, e.gap_low, e.gap_high) if gap else (e.change, e.low, e.high) for e in effects]
    )
    if not np.isfinite(values).any():
        return
    y, low, high = values.T
    colour, marker = part_style(view, part)
    line = (0, (5, 1.5)) if part == "mixed" else "-"
    ax.plot(x, y, color=colour, marker=marker, linestyle=line, markersize=6 if marker == "*" else 3.4)
    known = np.isfinite(low) & np.isfinite(high)
    ax.fill_between(np.array(x, float), low, high, where=known, color=colour, alpha=0.14, linewidth=0)
    ax.vlines(np.array(x, float)[known], low[known], high[known], color=colour, linewidth=0.7, alpha=0.6)  # no band round one point


def _ends(effects: Sequence[Effect]) -> tuple[float, float]:
    values = [v for e in effects for v in (e.change, e.low, e.high) if math.isfinite(v)]
    return min(0.0, *values, 0.0), max(0.0, *values, 0.0)


def _harm(effects: Sequence[Effect]) -> float:
    """How many times further the curves go up than down."""
    low, high = _ends(effects)
    return high / -low if low < 0 else 0.0


def _change_axis(ax: Axes, effects: Sequence[Effect], donor: Effect | None, *, bent: bool = False) -> None:
    """Zero line and limits; bent: logarithmic above; the donor as a line, or in words where it is out of sight."""
    ax.axhline(0, color=MUTED, linewidth=0.8)
    low, high = _ends(effects)
    if bent and low < 0:
        _bent_axis(ax, low, max(high, -low))
    else:
        pad = 0.08 * max(high - low, 1e-9)
        ax.set_ylim(low - pad, high + pad)
        ax.yaxis.set_major_locator(MaxNLocator(4))
    if donor is None or not math.isfinite(donor.change):
        return
    bottom, top = ax.get_ylim()
    if bottom <= donor.change <= top:
        ax.axhline(donor.change, color=MUTED, linewidth=0.8, linestyle="-.")
    arrow = "▼ " if donor.change < bottom else "▲ " if donor.change > top else ""
    words = f"{arrow}donor {signed(donor.change, 2)}"
    ax.set_title(words, loc="right", fontsize=6.5, color=MUTED, fontweight="normal")


def _bent_axis(ax: Axes, low: float, high: float) -> None:
    """Linear down to `low` and as far up, logarithmic above: harm at a large alpha would flatten everything else."""
    reach = -low
    ax.set_yscale("symlog", linthresh=reach, linscale=1.4)
    step = 10 ** math.floor(math.log10(reach))
    step *= max(m for m in (1, 2, 5) if m * step <= reach)
    ticks = [-step, 0.0, step]
    while ticks[-1] * 10 <= high:
        ticks.append(ticks[-1] * 10)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(FixedFormatter([f"{'−' if t < 0 else ''}{abs(t):g}" for t in ticks]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(low * 1.15, high * 1.3)


def _legend(figure: Figure, view: View, height: float) -> None:
    handles = []
    for part in view.parts:
        colour, marker = part_style(view, part)
        line = (0, (5, 1.5)) if part == "mixed" else "-"
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=line, markersize=4, linewidth=1.5))
    names = [drawable(view.part_name(part)) for part in view.parts]
    names = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.29 / height),
        ncols=min(len(names), 7),
        handlelength=2.2,
        columnspacing=1.1,
        handletextpad=0.5,
        fontsize=7,
        borderaxespad=0.2,
    )
