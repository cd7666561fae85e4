"""Figures over layers: Figure 5 of the paper, and step x layer heat maps."""

from __future__ import annotations

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from glottoscope.report.data import ReportData, numbers
from glottoscope.report.plot import (
    WIDTH,
    Labels,
    ReportFigure,
    control_label,
    curve,
    file_name,
    footer,
    label_ends,
    margins,
    say_empty,
    share_axis,
)
from glottoscope.report.style import (
    ALIGNMENT,
    BILINGUAL,
    COHERENCE,
    CONTROL,
    FAINT,
    GREEN,
    INK,
    MIXED,
    MONOSEMANTICITY,
    MUTED,
    ON_DARK,
    ON_LIGHT,
    PAPER_RULE,
    SKY,
    VERMILLION,
    drawable,
    language_colour,
    language_marker,
)
from glottoscope.report.summary import headline_measure


def figure_5(data: ReportData, model: str) -> ReportFigure:
    """Shares, interpretability and SAE quality over layers at the last step."""
    step = data.last_step(model)
    table = data.rows(model, step=step)
    layers = numbers(table, "layer")
    figure = Figure(figsize=(WIDTH, 6.2))
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [2.6, 2.0, 1.4]})
    margins(figure, left=0.62, right=1.42, top=0.68, bottom=0.72, hspace=0.28)
    figure.text(
        0.012,
        1 - 0.1 / 6.2,
        drawable(f"{data.model_label(model)}, step {step:,}"),
        fontsize=10.5,
        fontweight="bold",
        va="top",
    )
    labels = Labels()
    for i, code in enumerate(data.languages):
        curve(
            axes[0],
            layers,
            table,
            f"share_{code}",
            colour=language_colour(i),
            marker=language_marker(i),
            label=data.language_name(code),
            labels=labels,
        )
    curve(axes[0], layers, table, "share_mixed", colour=MIXED, label="mixed", labels=labels, linestyle=(0, (5, 1.5)))
    curve(
        axes[0],
        layers,
        table,
        "share_bilingual",
        colour=BILINGUAL,
        label="bilingual\n(translation pairs)",
        labels=labels,
        width=2.4,
        marker="D",
    )
    curve(
        axes[0],
        layers,
        table,
        "share_bilingual_paper",
        colour=PAPER_RULE,
        label="bilingual_paper",
        labels=labels,
        marker="x",
        linestyle="-.",
        band=False,
        width=1.1,
    )
    measure = headline_measure(table)
    for control, name in data.control_models():
        if measure is not None and name != model:
            rows = data.rows(name, step=data.last_step(name))
            curve(
                axes[0],
                numbers(rows, "layer"),
                rows,
                measure,
                colour=CONTROL,
                marker=".",
                linestyle=":",
                label=f"bilingual,\n{control_label(control)}",
                labels=labels,
                band=False,
            )
    axes[0].set_title("Share of alive features")
    axes[0].xaxis.set_major_locator(FixedLocator(layers.tolist()) if len(layers) <= 16 else MaxNLocator(12, integer=True))
    axes[0].set_xlim(layers.min() - 0.4, layers.max() + 0.4)
    share_axis(axes[0])
    label_ends(axes[0], labels)
    _lane(
        axes[1],
        table,
        layers,
        "Are the features about something? (means, 0 to 1)",
        (
            ("monosemanticity", "monosemanticity R", MONOSEMANTICITY, "o", "-"),
            ("monosemanticity_hidden", "R, hidden states", SKY, "d", "-"),
            ("coherence", "coherence", COHERENCE, "^", "-"),
            ("alignment", "alignment (no SAE)", ALIGNMENT, "s", "-."),
            ("monosemanticity_floor_shuffled", "R floor: shuffled", FAINT, "", "--"),
        ),
    )
    _lane(
        axes[2],
        table,
        layers,
        "Quality of the SAE",
        (
            ("fvu", "FVU (unexplained)", VERMILLION, "o", "-"),
            ("alive", "alive share", GREEN, "^", "-"),
            ("l0_of_k", "L0 / K", INK, "s", "-"),
        ),
        l0_of_k=numbers(table, "l0") / data.k,
    )
    axes[2].set_xlabel("layer (0 = embeddings; L = output of decoder block L)")
    footer(figure, data, "bands: 95 % bootstrap over features", "mixed is not bilingual")
    caption = (
        f"Fig. 5 of the paper, for {model} at its last measured step ({step:,}), with the quality of the SAEs below. "
        "One SAE for each layer; intervals hold for that SAE only."
    )
    return ReportFigure(f"fig5_layers_{file_name(model)}", f"Over layers: {model}, step {step:,}", caption, figure)


def _lane(
    ax: Axes,
    table: pa.Table,
    layers: np.ndarray,
    title: str,
    curves: tuple[tuple[str, str, str, str, str], ...],
    l0_of_k: np.ndarray | None = None,
) -> None:
    labels = Labels()
    if l0_of_k is not None:
        table = table.append_column("l0_of_k", [l0_of_k.tolist()])
    for measure, label, colour, marker, line in curves:
        curve(
            ax,
            layers,
            table,
            measure,
            colour=colour,
            label=label,
            labels=labels,
            marker=marker,
            linestyle=line,
            width=0.9 if line == "--" else 1.5,
        )
    ax.set_title(title)
    if labels.y:
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.03)
        label_ends(ax, labels)
    else:
        say_empty(ax, "not measured in this study")


def figure_heat(data: ReportData, model: str) -> ReportFigure:
    """Step x layer maps of mixed, bilingual and monosemanticity."""
    table = data.rows(model)
    steps = sorted(set(table["step"].to_pylist()))
    layers = data.layers(model)
    bilingual = headline_measure(table) or "share_bilingual"
    panels = (
        ("share_mixed", "Mixed (%)"),
        (bilingual, "Bilingual by translation pairs (%)" if bilingual == "share_bilingual" else "bilingual_paper (%)"),
        ("monosemanticity", "Monosemanticity R (x 100)"),
    )
    panel_height = max(0.75, min(0.21 * len(layers), 3.2))
    tilted = len(steps) > 12
    bottom = 1.1 if tilted else 0.78
    height = 3 * (panel_height + 0.42) + 0.27 + bottom
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(3, 1, sharex=True)
    margins(figure, left=0.62, right=0.75, top=0.62, bottom=bottom, hspace=0.42 / panel_height)
    figure.text(0.012, 1 - 0.1 / height, drawable(data.model_label(model)), fontsize=10.5, fontweight="bold", va="top")
    column = {step: i for i, step in enumerate(steps)}
    row = {layer: i for i, layer in enumerate(layers)}
    places = (
        np.array([row[v] for v in table["layer"].to_pylist()]),
        np.array([column[v] for v in table["step"].to_pylist()]),
    )
    for ax, (measure, title) in zip(axes, panels, strict=True):
        grid_LS = np.full((len(layers), len(steps)), np.nan)
        grid_LS[places] = numbers(table, measure)
        _heat(figure, ax, grid_LS, title)
        ax.set_yticks(
            np.arange(0, len(layers), max(1, len(layers) // 12)) + 0.5,
            [str(v) for v in layers][:: max(1, len(layers) // 12)],
        )
        ax.set_ylabel("layer")
    axes[2].set_xticks(np.arange(len(steps)) + 0.5, [f"{s:,}" for s in steps], rotation=40 if tilted else 0)
    axes[2].set_xlabel("step")
    footer(figure, data, "share of alive features", "each cell is one SAE; dash: not measured")
    caption = f"{model}: every measured step and layer. Darker is less. Mixed is not bilingual."
    return ReportFigure(f"heat_{file_name(model)}", f"Step by layer: {model}", caption, figure)


def _heat(figure: Figure, ax: Axes, grid_LS: np.ndarray, title: str) -> None:
    ax.set_title(title)
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    top = float(np.nanmax(grid_LS)) if np.isfinite(grid_LS).any() else 1.0
    top = max(top, 0.05)
    colours = matplotlib.colormaps["cividis"].resampled(32)  # few enough for a colour bar of vectors, not of pixels
    mesh = ax.pcolormesh(np.ma.masked_invalid(grid_LS), cmap=colours, vmin=0, vmax=top, edgecolors="face", linewidth=0.4)
    ax.set_xlim(0, grid_LS.shape[1])
    bar = figure.colorbar(mesh, ax=ax, pad=0.015, fraction=0.025, aspect=14)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.ax.yaxis.set_major_locator(MaxNLocator(3))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    if grid_LS.size > 200:
        return
    for (i, j), value in np.ndenumerate(grid_LS):
        if np.isfinite(value):
            colour = ON_LIGHT if value / top > 0.48 else ON_DARK
            ax.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center_baseline", fontsize=6.5, color=colour)
        else:
            ax.text(j + 0.5, i + 0.5, "–", ha="center", va="center_baseline", fontsize=6.5, color=MUTED)
