"""The report's tables, as HTML."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from glottoscope.report.data import CONTROL_NAMES, ReportData, interval, measured, numbers, where
from glottoscope.report.estimate import bracket, estimate
from glottoscope.report.html import definition_table, esc, number, table, tokens


def _share(rows: pa.Table, row: int, measure: str) -> str:
    share = estimate(rows, row, measure)
    if not math.isfinite(share.value):
        return "–"
    extent = bracket(share.low, share.high)
    return f"{100 * share.value:.1f}" + (f" <small>{extent}</small>" if extent else "")


def _unit(rows: pa.Table, row: int, measure: str) -> str:
    """A measure between 0 and 1 with its interval."""
    value, low, high = (float(part[row]) for part in interval(rows, measure))
    if not math.isfinite(value):
        return "–"
    return f"{value:.2f}" + (f" <small>[{low:.2f}, {high:.2f}]</small>" if math.isfinite(low + high) else "")


def _count(rows: pa.Table, row: int, column: str) -> str:
    value = float(numbers(rows, column)[row])
    return f"{int(value):,}" if math.isfinite(value) else "–"


def evolution_table(data: ReportData, rows: pa.Table, first: str, caption: str) -> str:
    """Rows of the evolution table with counts beside shares. `first`: step, layer, or model."""
    columns: list[tuple[str, Any]] = []
    if first != "step":
        columns.append(("step", lambda i: _count(rows, i, "step")))
    if first != "layer":
        columns.append(("layer", lambda i: _count(rows, i, "layer")))
    columns.append(("tokens seen", lambda i: tokens(rows["tokens_seen"][i].as_py())))
    columns.append(("alive", lambda i: f"{_count(rows, i, 'n_alive')} of {_count(rows, i, 'n_features')}"))
    for code in data.languages:
        columns.append((f"{esc(data.language_name(code))} %", lambda i, m=f"share_{code}": _share(rows, i, m)))
    columns += [
        ("mixed %", lambda i: _share(rows, i, "share_mixed")),
        ("mixed n", lambda i: _count(rows, i, "count_mixed")),
        ("bilingual %", lambda i: _share(rows, i, "share_bilingual")),
        ("bilingual n", lambda i: _count(rows, i, "n_bilingual")),
        ("testable n", lambda i: _count(rows, i, "n_supportable")),
        ("bilingual_&#8203;paper %", lambda i: _share(rows, i, "share_bilingual_paper")),
        ("neutral %", lambda i: _share(rows, i, "share_neutral")),
        ("unclassified %", lambda i: _share(rows, i, "share_unclassified")),
    ]
    for measure, name in (
        ("monosemanticity", "R"),
        ("monosemanticity_multi", "R, without single-token"),
        ("monosemanticity_pooled", "R, pooled"),
        ("monosemanticity_hidden", "R, hidden"),
        ("coherence", "coherence"),
        ("coherence_token", "coherence, tokens"),
        ("alignment", "alignment"),
    ):
        if measured(rows, measure):
            columns.append((name, lambda i, m=measure: _unit(rows, i, m)))
    for measure, name in (
        ("fvu", "FVU"),
        ("l0", "L0"),
        *((f"lm_loss_{code}", f"loss {esc(code)}") for code in data.languages),
    ):
        if measured(rows, measure):
            columns.append((name, lambda i, m=measure: number(float(numbers(rows, m)[i]))))
    heads = rows[first].to_pylist()
    body = [
        [number(head) if isinstance(head, int) else esc(head), *(cell(i) for _, cell in columns)] for i, head in enumerate(heads)
    ]
    return table([first, *(name for name, _ in columns)], body, caption=caption)


def controls_table(data: ReportData) -> str:
    """Every control's row at the last step, beside the main model's."""
    main = data.main_model
    parts = [_last(data, main, data.control_of(main))]
    names = [main]
    for control in [
        *CONTROL_NAMES,
        *sorted({str(c) for c in data.evolution["control"].to_pylist()} - {*CONTROL_NAMES, "none"}),
    ]:
        for model in data.models(control):
            if (model, control) != (main, data.control_of(main)):
                parts.append(_last(data, model, control))
                names.append(f"{model}: {CONTROL_NAMES.get(control, control)}")
    if len(parts) == 1:
        return "<p>This study ran no control.</p>"
    rows = pa.concat_tables(parts, promote_options="permissive")
    rows = rows.drop_columns(["model"]).append_column("model", pa.array(names))
    return evolution_table(data, rows, "model", "Main model and controls, last measured step")


def _last(data: ReportData, model: str, control: str) -> pa.Table:
    rows = data.rows(model, control=control)
    layers = sorted(set(rows["layer"].to_pylist()))
    wanted = data.middle_layer(model) if data.rows(model).num_rows else layers[0]
    layer = wanted if wanted in layers else layers[len(layers) // 2]
    rows = data.rows(model, control=control, layer=layer)
    return rows.slice(rows.num_rows - 1)


def seeds_table(data: ReportData) -> str:
    """Every seed's last step at the middle layer; empty where one seed was run."""
    parts = []
    for model in [*data.models(), *(m for _, m in data.control_models())]:
        if data.n_seeds(model) != (1, 1):
            parts.append(data.rows(model, layer=data.middle_layer(model), step=data.last_step(model), all_seeds=True))
    if not parts:
        return ""
    rows = pa.concat_tables(parts, promote_options="permissive")
    names = [
        f"{model}, LM seed {lm}, SAE seed {sae}"
        for model, lm, sae in zip(*(rows[c].to_pylist() for c in ("model", "lm_seed", "sae_seed")), strict=True)
    ]
    rows = rows.drop_columns(["model"]).append_column("model", pa.array(names))
    return evolution_table(data, rows, "model", "Seeds at the last step and the middle layer")


def truth_table(data: ReportData) -> str:
    """Agreement with the planted truth; empty where there is none."""
    truth = data.truth
    if truth is None or truth.num_rows == 0:
        return ""
    main = data.main_model
    rows = where(truth, model=main, layer=data.middle_layer(main), control=data.control_of(main)).sort_by("tokens_seen")
    body = [
        [number(step), number(lm), number(sae), *(number(v) for v in values)]
        for step, lm, sae, *values in zip(
            *(rows[c].to_pylist() for c in ("step", "lm_seed", "sae_seed", "auc_phi", "auc_flag", "n_truth_bilingual", "n_alive")),
            strict=True,
        )
    ]
    head = ("step", "LM seed", "SAE seed", "AUC of phi", "AUC of the flag", "truly bilingual", "alive")
    return table(head, body, caption=f"{main}, layer {data.middle_layer(main)}: agreement with the planted truth")


def turning_table(data: ReportData) -> str:
    """Turning steps with intervals, for every model and layer given."""

    def span(t: dict[str, Any], name: str) -> str:
        low, high = t.get(f"{name}_low"), t.get(f"{name}_high")
        text = number(None if t.get(name) is None else 100 * float(t[name]), 1)
        return text + (f" <small>[{100 * low:.1f}, {100 * high:.1f}]</small>" if low is not None and high is not None else "")

    body = [
        [
            esc(t["model"]),
            number(t.get("layer")),
            number(t.get("step")),
            f"{number(t.get('low'))} to {number(t.get('high'))}",
            span(t, "fall"),
            span(t, "rise"),
        ]
        for t in data.turning
    ]
    head = (
        "model",
        "layer",
        "mixed lowest at step",
        "95 % interval",
        "fall until there (points)",
        "rise since (points)",
    )
    return (
        table(head, body, caption="Turning step of the mixed share")
        + ('<p class="caption">Choosing the lowest of several noisy values makes fall and rise a little too large.</p>')
        if body
        else ""
    )


def settings_tables(data: ReportData) -> str:
    """The study's settings and the run's manifest."""
    return definition_table(data.settings, ("field", "value"), "Settings of the study") + definition_table(
        data.manifest, ("what", "value"), "Versions, seeds, hashes, threads"
    )


def choices_table(data: ReportData) -> str:
    """Choices that are ours."""
    body = [[esc(what), esc(ours), esc(theirs)] for what, ours, theirs in data.choices]
    return table(("choice", "ours", "the paper's"), body, numeric=False) if body else "<p>None recorded.</p>"


def licences_table(data: ReportData) -> str:
    """Data licences with attribution."""
    body = [[esc(what), esc(licence), esc(by)] for what, licence, by in data.licences]
    return (
        table(("data", "licence", "attribution"), body, numeric=False)
        if body
        else "<p>No licensed data were named by this study.</p>"
    )


def feature_counts(data: ReportData) -> str:
    """How many features of the final checkpoint fall in each class, with the median phi; empty without features."""
    features = data.features
    if features is None or features.num_rows == 0 or "language" not in features.column_names:
        return ""
    main = data.main_model
    last = data.rows(main, layer=data.middle_layer(main), step=data.last_step(main))
    if last.num_rows == 0:
        return ""
    wanted = {c: last[c][0].as_py() for c in ("control", "model", "step", "layer", "lm_seed", "sae_seed")}
    rows = where(features, **wanted)
    classes = np.array(rows["language"].to_pylist(), dtype=object)
    if len(classes) == 0:
        return ""
    body = []
    for name in [*data.languages, "mixed", "neutral", "unclassified", "dead"]:
        of = classes == name
        phi = numbers(rows, "phi")[of]
        phi = phi[np.isfinite(phi)]
        flags = (
            numbers(rows.set_column(0, "flag", rows["bilingual"].cast(pa.int8())), "flag")[of]
            if "bilingual" in rows.column_names
            else np.array([])
        )
        body.append(
            [
                esc(data.language_name(name)),
                f"{int(of.sum()):,}",
                f"{int(np.nansum(flags)):,}" if np.isfinite(flags).any() else "–",
                f"{len(phi):,}",
                number(float(np.median(phi))) if len(phi) else "–",
            ]
        )
    head = ("class", "features", "of these bilingual", "with a phi", "median phi")
    return table(head, body, caption=f"Classes at the last step: {main}, layer {wanted['layer']}")
