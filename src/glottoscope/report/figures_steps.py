"""Figures over training: Figure 3 of the paper for each model, main against control, and SAE quality."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glottoscope.report.data import CONTROL_NAMES, ReportData, measured, numbers, where
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
    steps_on_top,
    tokens_axis,
    tokens_of,
)
from glottoscope.report.style import (
    ALIGNMENT,
    BILINGUAL,
    COHERENCE,
    CONTROL,
    FAINT,
    INK,
    MIXED,
    MONOSEMANTICITY,
    PAPER_RULE,
    SKY,
    drawable,
    language_colour,
    language_marker,
)
from glottoscope.report.summary import headline_measure

MIXED_CAPTION = (
    "Mixed is not bilingual: a feature of random tokens meets both languages too. The mixed level before and early in "
    "training is a property of a random model and of the SAE's capacity."
)


def figure_3(data: ReportData, model: str) -> ReportFigure:
    """Language shares, monosemanticity, LM loss and learning rate over training at the middle layer."""
    table = data.over_steps(model)
    tokens, steps = tokens_of(table), table["step"].to_pylist()
    layer = data.middle_layer(model)
    figure = Figure(figsize=(WIDTH, 7.6))
    axes = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [3.1, 2.3, 1.3, 0.75]})
    margins(figure, left=0.62, right=1.42, top=0.72, bottom=0.72, hspace=0.34)
    tokens_axis(axes[0], tokens)
    figure.text(
        0.012,
        1 - 0.1 / 7.6,
        drawable(f"{data.model_label(model)}, layer {layer}"),
        fontsize=10.5,
        fontweight="bold",
        va="top",
    )
    _shares(data, axes[0], table, model)
    steps_on_top(axes[0], tokens, steps)
    axes[0].set_title("Share of alive features", pad=16)
    _interpretability(data, axes[1], table)
    _loss(data, axes[2], table)
    _learning_rate(data, axes[3], table, model)
    axes[3].set_xlabel("tokens seen")
    figure.align_ylabels(list(axes))
    footer(figure, data, "bands: 95 % bootstrap over features", "mixed is not bilingual")
    controls = data.control_models()
    caption = (
        f"Fig. 3 of the paper, for {model} at layer {layer}. {MIXED_CAPTION} Bands are 95 % "
        f"bootstrap intervals over the "
        "features of one SAE. "
        + ("Dotted: the same measure in the " + " and the ".join(CONTROL_NAMES[c] for c, _ in controls) + ". " if controls else "")
        + "Dashed: floors with shuffled clusters or random token vectors. The lower lanes show what the language model "
        "itself was doing; 0 is the model before training."
    )
    return ReportFigure(f"fig3_steps_{file_name(model)}", f"Over training: {model}, layer {layer}", caption, figure)


def _shares(data: ReportData, ax: Axes, table: pa.Table, model: str) -> None:
    tokens, labels = tokens_of(table), Labels()
    _other_seeds(data, ax, model, "share_mixed", MIXED)
    _other_seeds(data, ax, model, "share_bilingual", BILINGUAL)
    for i, code in enumerate(data.languages):
        curve(
            ax,
            tokens,
            table,
            f"share_{code}",
            colour=language_colour(i),
            marker=language_marker(i),
            label=data.language_name(code),
            labels=labels,
        )
    curve(ax, tokens, table, "share_mixed", colour=MIXED, label="mixed", labels=labels, linestyle=(0, (5, 1.5)))
    curve(
        ax,
        tokens,
        table,
        "share_bilingual",
        colour=BILINGUAL,
        label="bilingual\n(translation pairs)",
        labels=labels,
        width=2.4,
        marker="D",
    )
    curve(
        ax,
        tokens,
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
    if measure is not None:
        for control, name in data.control_models():
            if name != model:
                rows = data.over_steps(name)
                curve(
                    ax,
                    tokens_of(rows),
                    rows,
                    measure,
                    colour=CONTROL,
                    marker=".",
                    linestyle=":",
                    label=f"bilingual,\n{control_label(control)}",
                    labels=labels,
                    band=False,
                )
    share_axis(ax)
    label_ends(ax, labels)


def _other_seeds(data: ReportData, ax: Axes, model: str, measure: str, colour: str) -> None:
    """Thin lines for every other LM and SAE seed."""
    table = data.rows(model, layer=data.middle_layer(model), all_seeds=True)
    pairs = sorted(set(zip(table["lm_seed"].to_pylist(), table["sae_seed"].to_pylist(), strict=True)), key=str)
    for lm_seed, sae_seed in pairs[1:]:
        rows = where(table, lm_seed=lm_seed, sae_seed=sae_seed)
        ax.plot(tokens_of(rows), numbers(rows, measure), color=colour, linewidth=0.6, alpha=0.6)


def _interpretability(data: ReportData, ax: Axes, table: pa.Table) -> None:
    tokens, labels = tokens_of(table), Labels()
    curves = (
        ("monosemanticity", "monosemanticity R", MONOSEMANTICITY, "o", "-"),
        ("monosemanticity_hidden", "R, hidden states", SKY, "d", "-"),
        ("coherence", "coherence", COHERENCE, "^", "-"),
        ("alignment", "alignment (no SAE)", ALIGNMENT, "s", "-."),
    )
    for measure, label, colour, marker, line in curves:
        curve(ax, tokens, table, measure, colour=colour, label=label, labels=labels, marker=marker, linestyle=line)
    floors = (
        ("monosemanticity_floor_shuffled", "R floor: shuffled", FAINT),
        ("monosemanticity_floor_random", "R floor: random", FAINT),
        ("coherence_floor_shuffled", "coherence floor", COHERENCE),
    )
    for measure, label, colour in floors:
        curve(
            ax,
            tokens,
            table,
            measure,
            colour=colour,
            label=label,
            labels=labels,
            marker="",
            linestyle="--",
            width=0.9,
            band=False,
        )
    ax.set_title("Are the features about something? (means, 0 to 1)")
    if labels.y:
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), min(1.02, max(0.2, ax.get_ylim()[1])))
        label_ends(ax, labels)
    else:
        say_empty(ax, "not measured in this study")


def _loss(data: ReportData, ax: Axes, table: pa.Table) -> None:
    tokens, labels = tokens_of(table), Labels()
    for i, code in enumerate(data.languages):
        curve(
            ax,
            tokens,
            table,
            f"lm_loss_{code}",
            colour=language_colour(i),
            marker=language_marker(i),
            label=data.language_name(code),
            labels=labels,
            band=False,
        )
    ax.set_title("Loss of the language model (nats per token)")
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if labels.y:
        label_ends(ax, labels)
    else:
        say_empty(ax, "not measured in this study")


def _learning_rate(data: ReportData, ax: Axes, table: pa.Table, model: str) -> None:
    ax.set_title("Its learning rate")
    tokens, rate = tokens_of(table), numbers(table, "lm_learning_rate")
    log = data.pretrain_log
    if log is not None and "lr" in log.column_names:
        log = where(log, model=model).sort_by("tokens_seen")
        if log.num_rows:
            tokens, rate = tokens_of(log), numbers(log, "lr")
    known = np.isfinite(rate)
    if not known.any():
        say_empty(ax, "not known")
        return
    ax.plot(tokens[known], rate[known], color=INK, linewidth=1.1)
    ax.set_ylim(0, max(float(rate[known].max()) * 1.15, 1e-12))
    ax.yaxis.set_major_locator(MaxNLocator(2))
    ax.ticklabel_format(axis="y", style="plain" if rate[known].max() >= 1e-3 else "sci", scilimits=(0, 0))


def figure_control(data: ReportData) -> ReportFigure | None:
    """Main model against the whole-model controls: mixed, and bilingual."""
    controls = [(c, m) for c, m in data.control_models() if m != data.main_model]
    if not controls:
        return None
    main = data.main_model
    table = data.over_steps(main)
    measure = headline_measure(table) or "share_bilingual"
    figure = Figure(figsize=(WIDTH, 4.9))
    axes = figure.subplots(2, 1, sharex=True)
    margins(figure, left=0.62, right=1.42, top=0.5, bottom=0.72, hspace=0.34)
    all_tokens = np.concatenate([tokens_of(table), *(tokens_of(data.over_steps(m)) for _, m in controls)])
    tokens_axis(axes[0], all_tokens)
    steps_on_top(axes[0], tokens_of(table), table["step"].to_pylist())
    for ax, name, title, colour in (
        (axes[0], "share_mixed", "Mixed", MIXED),
        (
            axes[1],
            measure,
            "Bilingual by translation pairs" if measure == "share_bilingual" else "bilingual_paper",
            BILINGUAL,
        ),
    ):
        labels = Labels()
        curve(ax, tokens_of(table), table, name, colour=colour, label=main, labels=labels, width=2)
        for control, model in controls:
            rows = data.over_steps(model)
            curve(
                ax,
                tokens_of(rows),
                rows,
                name,
                colour=CONTROL,
                marker="D" if control == "negative" else "v",
                linestyle=":",
                label=f"{model}\n({control_label(control)})",
                labels=labels,
            )
        ax.set_title(title, pad=16 if ax is axes[0] else 7)
        share_axis(ax)
        label_ends(ax, labels)
    axes[1].set_xlabel("tokens seen")
    footer(figure, data, "share of alive features", "bands: 95 % bootstrap over features")
    caption = (
        f"{main} against {' and '.join(f'{m}, the {CONTROL_NAMES[c]}' for c, m in controls)}, each "
        f"at its middle layer. "
        "What the control shows, too, needs no bilingual data to explain it."
    )
    return ReportFigure("control_vs_main", "The control beside the claim", caption, figure)


def figure_quality(data: ReportData) -> ReportFigure:
    """FVU, alive share and L0 over training, every model at its middle layer."""
    models = data.models() or [data.main_model]
    figure = Figure(figsize=(WIDTH, 5.4))
    axes = figure.subplots(3, 1, sharex=True)
    margins(figure, left=0.62, right=1.42, top=0.5, bottom=0.72, hspace=0.36)
    tables = [data.over_steps(model) for model in models]
    tokens_axis(axes[0], np.concatenate([tokens_of(table) for table in tables]))
    for row, (ax, measure, title) in enumerate(
        zip(
            axes,
            ("fvu", "alive", "l0"),
            (
                "Variance the SAE leaves unexplained (FVU; 0 is perfect, 1 is the mean)",
                "Alive share of the features",
                f"Active features per token (L0; at most K = {data.k})",
            ),
            strict=True,
        )
    ):
        labels = Labels()
        for i, (model, table) in enumerate(zip(models, tables, strict=True)):
            colour = (INK, *(language_colour(j) for j in range(4)))[(len(models) - 1 - i) % 5]
            curve(ax, tokens_of(table), table, measure, colour=colour, marker="os^Dv"[i % 5], label=model, labels=labels)
        ax.set_title(title, pad=16 if row == 0 else 7)
        if not any(measured(table, measure) for table in tables):
            say_empty(ax, "not measured in this study")
            continue
        if measure == "l0":
            ax.set_ylim(0, data.k * 1.08)
        else:
            share_axis(ax) if measure == "alive" else ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))
        label_ends(ax, labels)
    longest = max(tables, key=lambda table: table.num_rows)
    steps_on_top(axes[0], tokens_of(longest), longest["step"].to_pylist())
    axes[2].set_xlabel("tokens seen")
    footer(figure, data, "middle layer of each model")
    caption = "Quality of the SAEs behind the curves. Where few features are alive, a share is the share of few."
    return ReportFigure("quality_steps", "SAE quality over training", caption, figure)
