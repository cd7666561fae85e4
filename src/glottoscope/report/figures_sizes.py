"""Figures over model sizes and over the thresholds that were swept."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from glottoscope.report.data import ReportData, distinct, first_seeds, interval, measured, numbers, short_number, where
from glottoscope.report.plot import (
    NO_CLAIM,
    WIDTH,
    Labels,
    ReportFigure,
    control_label,
    curve,
    footer,
    label_ends,
    margins,
    say_empty,
    share_axis,
)
from glottoscope.report.style import (
    BILINGUAL,
    CONTROL,
    GREEN,
    INK,
    MIXED,
    MONOSEMANTICITY,
    MUTED,
    ORANGE,
    SKY,
    VERMILLION,
    drawable,
)
from glottoscope.report.summary import SEEDS_FOR_A_CLAIM, headline_measure

SWEEP_TITLES = {
    "phi": "Threshold on phi (bilingual)",
    "monosemanticity": "Threshold on R (bilingual_paper)",
    "threshold": "Activation threshold (share of the maximum)",
    "language_share": "Share above which a feature is one language's",
    "theta": "Clusters merge above this percentile of pair cosines",
}


def figure_sizes(data: ReportData) -> ReportFigure | None:
    """Mixed, bilingual and monosemanticity at the last step and the middle layer against model size."""
    models = data.models()
    if len(models) < 2:
        return None
    last = {model: data.rows(model, layer=data.middle_layer(model), step=data.last_step(model), all_seeds=True) for model in models}
    measure = headline_measure(pa.concat_tables(list(last.values()), promote_options="permissive")) or "share_bilingual"
    panels = (
        ("share_mixed", "Mixed", MIXED),
        (measure, "Bilingual (pairs)" if measure == "share_bilingual" else "bilingual_paper", BILINGUAL),
        ("monosemanticity", "Monosemanticity R", MONOSEMANTICITY),
    )
    figure = Figure(figsize=(WIDTH, 3.1))
    axes = figure.subplots(1, 3)
    margins(figure, left=0.5, right=0.15, top=0.62, bottom=0.78)
    figure.subplots_adjust(wspace=0.34)
    sizes = {model: float(last[model]["n_params"][0].as_py() or i + 1) for i, model in enumerate(models)}
    claim = min(data.n_seeds(model)[0] for model in models) >= SEEDS_FOR_A_CLAIM
    for ax, (name, title, colour) in zip(axes, panels, strict=True):
        ax.set_title(title)
        ax.set_xscale("log")
        for model in models:
            _points(ax, last[model], name, sizes[model], colour)
        _control_points(data, ax, name)
        values = list(sizes.values())
        ax.set_xlim(min(values) / 1.7, max(values) * 1.7)
        ax.xaxis.set_major_locator(FixedLocator(values))
        ax.xaxis.set_major_formatter(FixedFormatter([f"{drawable(m)}\n{short_number(sizes[m])}" for m in models]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="x", labelsize=6.5 if len(models) <= 3 else 5.5, rotation=0 if len(models) <= 3 else 30)
        if any(measured(table, name) for table in last.values()):
            ax.set_ylim(0, max(0.05, ax.get_ylim()[1]))
            if name != "monosemanticity":
                share_axis(ax)
        else:
            say_empty(ax, "not measured")
    figure.text(0.012, 1 - 0.1 / 3.1, "Last step, middle layer", fontsize=10.5, fontweight="bold", va="top")
    if not claim:
        figure.text(0.985, 1 - 0.1 / 3.1, NO_CLAIM, fontsize=8, color=VERMILLION, va="top", ha="right", fontweight="bold")
    footer(
        figure,
        data,
        "filled: one LM and SAE seed each",
        "bar: 95 % over features",
        "hollow: control",
    )
    caption = (
        "Model size against the shares at the last step and the middle layer. Each filled point is "
        "one LM and SAE seed, hollow "
        "diamonds are controls. "
        + (
            ""
            if claim
            else "Fewer than three LM seeds: no claim about size is made, because seeds move these shares as much as sizes do."
        )
    )
    return ReportFigure("sizes", "Over model sizes", caption, figure)


def _points(ax: Axes, table: pa.Table, measure: str, size: float, colour: str) -> None:
    value, low, high = interval(table, measure)
    n = len(value)
    x = size * np.exp(0.035 * (np.arange(n) - (n - 1) / 2))
    for i in range(n):
        if np.isfinite(low[i]) and np.isfinite(high[i]):
            ax.vlines(x[i], low[i], high[i], color=colour, linewidth=1, alpha=0.7)
    ax.plot(x, value, "o", color=colour, markersize=4.5)


def _control_points(data: ReportData, ax: Axes, measure: str) -> None:
    for _, model in data.control_models():
        table = data.rows(model, layer=data.middle_layer(model), step=data.last_step(model))
        size = table["n_params"][0].as_py()
        if size:
            ax.plot([size * 1.12], numbers(table, measure)[:1], "D", color=CONTROL, markersize=4, markerfacecolor="none")


def figure_sweeps(data: ReportData) -> ReportFigure | None:
    """What other thresholds would have given: the main model's last step beside the control's."""
    sweeps = data.sweeps
    if sweeps is None or sweeps.num_rows == 0:
        return None
    kinds = [kind for kind in SWEEP_TITLES if kind in distinct(sweeps, "sweep")]
    main = data.main_model
    arms = [("", _of(data, sweeps, main), "-")]
    arms += [(f",\n{control_label(c)}", _of(data, sweeps, model), ":") for c, model in data.control_models() if model != main]
    used = {
        "phi": data.phi_threshold,
        "monosemanticity": data.monosemanticity_threshold,
        "threshold": data.activation_threshold,
        "language_share": data.language_share,
        "theta": data.theta_percentile,
    }
    kinds = [kind for kind in kinds if any(len(where(table, sweep=kind)) for _, table, _ in arms)]
    if not kinds:
        return None
    height = 1.9 * len(kinds) + 0.9
    figure = Figure(figsize=(WIDTH, height))
    axes = np.atleast_1d(figure.subplots(len(kinds), 1))
    margins(figure, left=0.62, right=1.42, top=0.35, bottom=0.68, hspace=0.5)
    palette = {
        "share_mixed": MIXED,
        "share_bilingual": BILINGUAL,
        "share_bilingual_paper": GREEN,
        "monosemanticity": INK,
    }
    spare = (SKY, ORANGE, VERMILLION, MUTED)
    for ax, kind in zip(axes, kinds, strict=True):
        labels = Labels()
        measures = sorted({m for _, table, _ in arms for m in where(table, sweep=kind)["measure"].to_pylist()})
        for suffix, table, line in arms:
            for i, measure in enumerate(measures):
                rows = where(table, sweep=kind, measure=measure).sort_by("value")
                curve(
                    ax,
                    numbers(rows, "value"),
                    rows.rename_columns({"result": "shown"}),
                    "shown",
                    colour=palette.get(measure, spare[i % 4]),
                    label=measure.removeprefix("share_") + suffix,
                    labels=labels,
                    linestyle=line,
                    band=False,
                )
        setting = used.get(kind)
        if setting is not None:
            ax.axvline(setting, color=MUTED, linewidth=0.8, linestyle="--")
        ax.set_title(SWEEP_TITLES[kind])
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), max(0.05, ax.get_ylim()[1]))
        label_ends(ax, labels)
    footer(figure, data, f"{main}, middle layer, last step", "dotted: control", "dashed: the setting used")
    caption = (
        "How the levels move with the thresholds, for the main model (solid) and its controls "
        "(dotted) at the last step and the middle "
        "layer. A claim that holds at one threshold only is no claim."
    )
    return ReportFigure("sweeps", "Other thresholds", caption, figure)


def _of(data: ReportData, sweeps: pa.Table, model: str) -> pa.Table:
    """Sweep rows of a model at its middle layer, last step, first seeds."""
    wanted = {"model": model, "layer": data.middle_layer(model), "step": data.last_step(model)}
    return first_seeds(where(sweeps, **wanted, control=data.control_of(model)))
