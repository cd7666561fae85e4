"""The answer on the report's first screen: two sentences, their caveats and counts, computed from the tables.

Every wording is tied to what the numbers support: a change is stated only where the two 95 % intervals do not overlap
(or where the stages' bootstrap of the change itself excludes zero), and what was not measured is said to be so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from glottoscope.report.data import CONTROL_NAMES, ReportData, numbers, short_number

FEW_ALIVE_SHARE, FEW_ALIVE = 0.5, 100
POOR_FVU = 0.5
SEEDS_FOR_A_CLAIM = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share with its 95 % interval (NaN where unknown) and, where known, the counts behind it."""

    value: float
    low: float
    high: float
    count: int | None
    out_of: int | None

    def __str__(self) -> str:
        text = percent(self.value)
        if self.out_of:
            text += f" ({self.count} of {self.out_of})" if self.count is not None else f" (of {self.out_of})"
        return f"{text} {bracket(self.low, self.high)}".rstrip()


@dataclass(frozen=True, slots=True)
class Stat:
    """One number of the first screen: `41 of 164` / `features are bilingual ...`."""

    value: str
    label: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What happened: a headline, two sentences, the caveats that belong to them, counts beside the shares."""

    headline: str
    sentences: tuple[str, str]
    caveats: tuple[str, ...]
    stats: tuple[Stat, ...]


def percent(value: float) -> str:
    """.2834 -> `28.3 %`."""
    return "unknown" if not math.isfinite(value) else f"{100 * value:.1f} %"


def bracket(low: float, high: float) -> str:
    """95 % interval in per cent: `[24.0, 32.5]`; empty where unknown."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]" if math.isfinite(low) and math.isfinite(high) else ""


def wilson(count: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 %)."""
    p, zz = count / n, z * z
    centre, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, (centre - half) / (1 + zz / n)), min(1.0, (centre + half) / (1 + zz / n))


def estimate(table: pa.Table, row: int, measure: str) -> Estimate:
    """A share of the table's row. A bootstrap of 0 or of all features has no width: there Wilson's "
    "interval stands in."""
    counts = {"share_bilingual": "n_bilingual"}.get(measure, measure.replace("share_", "count_", 1))
    value, low, high = (float(numbers(table, f"{measure}{end}")[row]) for end in ("", "_low", "_high"))
    count, n = (numbers(table, column)[row] for column in (counts, "n_alive"))
    n_alive = int(n) if math.isfinite(n) and n > 0 else None
    n_count = int(count) if math.isfinite(count) else None
    if math.isfinite(value) and n_alive and (value <= 0 or value >= 1):
        low, high = wilson(round(value * n_alive), n_alive)
    return Estimate(value, low, high, n_count, n_alive)


def above(a: Estimate, b: Estimate) -> bool | None:
    """True where a's interval lies wholly above b's; None where an interval is unknown."""
    if not (math.isfinite(a.low) and math.isfinite(b.high)):
        return None
    return a.low > b.high


def step_name(step: int) -> str:
    """`step 0 (before training)`, `step 1,500`."""
    return "step 0 (before training)" if step == 0 else f"step {step:,}"


def answer(data: ReportData) -> Answer:
    """Compute the first screen. Follows the largest model that is not a control, at its middle layer, first seeds."""
    table = data.over_steps(data.main_model)
    mixed_words, mixed_head = _mixed(data, table)
    bilingual_words, bilingual_head, measure = _bilingual(data, table)
    return Answer(
        headline=f"{mixed_head}; {bilingual_head}.",
        sentences=(mixed_words, bilingual_words),
        caveats=tuple(_caveats(data, table, measure)),
        stats=tuple(_stats(data, table, measure)),
    )


def _finite_rows(table: pa.Table, measure: str) -> np.ndarray:
    return np.flatnonzero(np.isfinite(numbers(table, measure)))


def _where(data: ReportData) -> str:
    model = data.main_model
    what = "" if data.control_of(model) == "none" else f" ({CONTROL_NAMES.get(data.control_of(model), 'a control')})"
    return f"In {model}{what} at layer {data.middle_layer(model)}"


def turning_of(data: ReportData, model: str) -> dict[str, Any] | None:
    """The stages' turning step of a model at its middle layer, where they give one."""
    layer = data.middle_layer(model)
    return next((t for t in data.turning if t.get("model") == model and t.get("layer") == layer), None)


def _mixed(data: ReportData, table: pa.Table) -> tuple[str, str]:
    """(sentence, headline part) about the share of mixed features over training."""
    rows, where = _finite_rows(table, "share_mixed"), _where(data)
    if len(rows) == 0:
        return f"{where} the share of mixed features could not be measured.", "Mixed features were not measured"
    steps = table["step"].to_pylist()
    values = numbers(table, "share_mixed")
    first, last = int(rows[0]), int(rows[-1])
    start, end = estimate(table, first, "share_mixed"), estimate(table, last, "share_mixed")
    if len(rows) == 1:
        return (
            f"{where} {start} of the alive features are mixed at {step_name(steps[first])}, the only checkpoint "
            "measured: nothing can be said about change over training.",
            "One checkpoint only: no change over training can be seen",
        )
    turning = turning_of(data, data.main_model)
    lowest = int(rows[np.argmin(values[rows])])
    if turning is not None and turning.get("step") in steps:
        lowest = steps.index(turning["step"])
    low = estimate(table, lowest, "share_mixed")
    span = _turning_interval(turning)
    fell = _change(turning, "fall", start, low)
    rose = _change(turning, "rise", end, low)
    last_name, low_name = step_name(steps[last]), f"{step_name(steps[lowest])}{span}"
    unknown = " (no intervals: whether these are more than noise is not known)" if None in (fell, rose) else ""

    if lowest == first:
        if rose:
            return (
                f"{where} the share of mixed features never fell below its first value: it rose from {start} at "
                f"{step_name(steps[first])} to {end} by {last_name}.",
                "Mixed features did not fall; they rose",
            )
        return (
            f"{where} the share of mixed features neither fell nor clearly rose: {start} at {step_name(steps[first])} "
            f"and {end} at {last_name}{unknown}.",
            "Mixed features did not clearly change",
        )
    fall_words = (
        f"fell from {start} at {step_name(steps[first])} to {low} by {low_name}"
        if fell
        else f"did not clearly fall: {start} at {step_name(steps[first])}, lowest {low} at {low_name}{unknown}"
        + ("" if unknown else ", a difference that the intervals do not separate from none")
    )
    if lowest == last:
        rise_words = "and had not risen again by the last checkpoint" if fell else "which is the last checkpoint"
        head = "Mixed features fell and did not rise again" if fell else "Mixed features did not clearly change"
        return f"{where} the share of mixed features {fall_words}{' ' if fell else ', '}{rise_words}.", head
    if rose:
        rise_words = f"and rose again to {end} by {last_name}" if fell else f"then rose to {end} by {last_name}"
    else:
        rise_words = f"and did not clearly rise again ({end} at {last_name})"
    head = {
        (True, True): "Mixed features fell and rose again",
        (True, False): "Mixed features fell and did not clearly rise again",
        (False, True): "Mixed features did not clearly fall, but rose later",
        (False, False): "Mixed features did not clearly change",
    }[bool(fell), bool(rose)]
    return f"{where} the share of mixed features {fall_words}{' ' if fell else '; '}{rise_words}.", head


def _turning_interval(turning: dict[str, Any] | None) -> str:
    if turning is None or turning.get("low") is None or turning.get("high") is None:
        return ""
    return f" (95 % interval of the turning step: {turning['low']:,} to {turning['high']:,})"


def _change(turning: dict[str, Any] | None, name: str, high: Estimate, low: Estimate) -> bool | None:
    """Whether high > low is more than noise: by the bootstrap of the change where given, else by the two intervals."""
    if turning is not None and turning.get(f"{name}_low") is not None:
        return float(turning[f"{name}_low"]) > 0
    return above(high, low)


def headline_measure(table: pa.Table) -> str | None:
    """share_bilingual where it was measured, else share_bilingual_paper, else None."""
    return next((m for m in ("share_bilingual", "share_bilingual_paper") if len(_finite_rows(table, m))), None)


def _bilingual(data: ReportData, table: pa.Table) -> tuple[str, str, str | None]:
    """(sentence, headline part, measure) about bilingual features and the control."""
    measure = headline_measure(table)
    if measure is None:
        return (
            "Whether any feature is bilingual is not known: this study has neither aligned sentences nor the token "
            "statistics of the paper-style rule.",
            "bilingual features were not measured",
            None,
        )
    by_pairs = measure == "share_bilingual"
    rows, steps = _finite_rows(table, measure), table["step"].to_pylist()
    first, last = int(rows[0]), int(rows[-1])
    start, end = estimate(table, first, measure), estimate(table, last, measure)
    peak = float(np.nanmax(numbers(table, measure)))
    name = (
        "features bilingual by translation pairs" if by_pairs else "features that the paper-style rule calls bilingual"
    )
    lead = (
        ""
        if by_pairs
        else "There are no aligned sentences, so translation pairs could not be tested; by bilingual_paper (mixed, not "
        f"single-token, R >= {data.monosemanticity_threshold:g}) "
    )
    share = f"the share of {name}"
    if peak <= 0:
        words = f"{lead or ''}no feature was bilingual{' by translation pairs' if by_pairs else ''} "
        f"at any checkpoint: {end} at {step_name(steps[last])}"
        head = "no bilingual features" if by_pairs else "no features bilingual by the paper-style rule"
    elif len(rows) == 1:
        words = f"{lead}{share} was {end} at {step_name(steps[last])}, the only checkpoint measured"
        head = (
            f"{percent(end.value)} of the alive features are bilingual{'' if by_pairs else ' by the paper-style rule'}"
        )
    else:
        rose, fell = above(end, start), above(start, end)
        suffix = "" if by_pairs else " by the paper-style rule"
        between = f"from {start} at {step_name(steps[first])} to {end} by {step_name(steps[last])}"
        if rose:
            words, head = f"{lead}{share} rose {between}", f"bilingual features{suffix} appeared"
            if start.value > 0.05:
                head = f"bilingual features{suffix} became more"
        elif fell:
            words, head = f"{lead}{share} fell {between}", f"bilingual features{suffix} became fewer"
        elif rose is None:
            words = f"{lead}{share} went {between} (no intervals: whether this is more than noise is not known)"
            head = f"bilingual features{suffix}: change not testable"
        else:
            words = f"{lead}{share} went {between}, a change that the intervals do not separate from none"
            head = f"no clear change in bilingual features{suffix}"
    return f"{_capital(words)}; {_controls(data, measure, end)}.", head, measure


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _controls(data: ReportData, measure: str, end: Estimate) -> str:
    """What the whole-model controls did, in one clause, and whether the claim stands apart from them."""
    clauses = []
    for control, model in data.control_models():
        if model == data.main_model:
            continue
        table = data.over_steps(model)
        rows = _finite_rows(table, measure)
        name = f"the {CONTROL_NAMES[control]}"
        if len(rows) == 0:
            clauses.append(f"{name} was not measured")
            continue
        values, last = numbers(table, measure), int(rows[-1])
        control_end = estimate(table, last, measure)
        where = f" (its highest: {percent(float(np.nanmax(values)))})" if len(rows) > 1 else ""
        apart = above(end, control_end)
        verdict = {
            True: "",
            False: ", which is not clearly below it",
            None: ", without an interval to compare",
        }[apart]
        clauses.append(f"{name} ended at {control_end}{where}{verdict}")
    return (
        "; ".join(clauses)
        if clauses
        else "no negative control was run, so how much of this needs no bilingual data is not known"
    )


def _stats(data: ReportData, table: pa.Table, measure: str | None) -> list[Stat]:
    """Counts at the last checkpoint of the main model's middle layer, and the control's beside them."""
    last = table.num_rows - 1

    def count(column: str, source: pa.Table = table, row: int = last) -> str:
        value = float(numbers(source, column)[row])
        return f"{int(value):,}" if math.isfinite(value) else "?"

    stats = [Stat(f"{count('n_alive')} of {count('n_features')}", "features alive at the last checkpoint")]
    stats.append(Stat(f"{count('count_mixed')} of {count('n_alive')}", "alive features are mixed (not: bilingual)"))
    if measure == "share_bilingual":
        stats.append(
            Stat(f"{count('n_bilingual')} of {count('n_alive')}", "alive features are bilingual by translation pairs")
        )
        if math.isfinite(numbers(table, "n_supportable")[last]):
            stats.append(Stat(count("n_supportable"), "features fire often enough in the pairs to be tested at all"))
        for control, model in data.control_models():
            if model != data.main_model:
                rows = data.over_steps(model)
                n = rows.num_rows - 1
                stats.append(
                    Stat(
                        f"{count('n_bilingual', rows, n)} of {count('n_alive', rows, n)}",
                        f"bilingual in the {CONTROL_NAMES[control]}",
                    )
                )
    return stats


def _caveats(data: ReportData, table: pa.Table, measure: str | None) -> list[str]:
    out = []
    last = table.num_rows - 1
    mixed, bilingual = numbers(table, "count_mixed")[last], numbers(table, "n_bilingual")[last]
    if measure == "share_bilingual" and mixed > 0 and math.isfinite(bilingual):
        out.append(
            f"Mixed is not bilingual: at the last checkpoint {int(bilingual)} of the {int(mixed)} "
            f"mixed features respond to "
            "translations of the same sentence; the others only meet both languages."
        )
    else:
        out.append("Mixed is not bilingual: a feature of random tokens, too, is active in both languages.")
    if 0 in table["step"].to_pylist():
        out.append(
            "The mixed share before training is a property of a random model and of the SAE's "
            "capacity, not of language."
        )
    out += _seed_caveat(data, measure)
    out += _alive_caveat(table)
    fvu = numbers(table, "fvu")[last]
    if fvu > POOR_FVU:
        out.append(
            f"The SAE leaves {percent(float(fvu))} of the variance unexplained at the last "
            f"checkpoint: its features are a partial view."
        )
    if measure != "share_bilingual":
        out.append("Without aligned sentences the study cannot tell a translation from a coincidence of categories.")
    return [*out, *data.notes]


def _seed_caveat(data: ReportData, measure: str | None) -> list[str]:
    model = data.main_model
    n_lm, n_sae = data.n_seeds(model)
    text = "Intervals are 95 % bootstrap over the features of one SAE and hold for that language model and SAE only"
    if n_lm * n_sae > 1:
        table = data.rows(model, layer=data.middle_layer(model), step=data.last_step(model), all_seeds=True)
        ranges = []
        for column, name in (("share_mixed", "mixed"), (measure or "", "bilingual")):
            values = numbers(table, column) if column else np.array([np.nan])
            if np.isfinite(values).any():
                ranges.append(f"{name} {percent(float(np.nanmin(values)))} to {percent(float(np.nanmax(values)))}")
        text += f"; over {n_lm} LM and {n_sae} SAE seed(s) the last checkpoint ranges: {', '.join(ranges)}"
    if n_lm < SEEDS_FOR_A_CLAIM:
        text += f"; with {n_lm} LM seed{'s' if n_lm > 1 else ''} no claim is made about other "
        "training runs or about model sizes"
    return [text + "."]


def _alive_caveat(table: pa.Table) -> list[str]:
    alive, n = numbers(table, "alive"), numbers(table, "n_alive")
    with np.errstate(invalid="ignore"):
        few = np.flatnonzero((alive < FEW_ALIVE_SHARE) | (n < FEW_ALIVE))
    if len(few) == 0:
        return []
    steps = table["step"].to_pylist()
    named = ", ".join(f"{steps[i]:,}" for i in few[:6]) + (" ..." if len(few) > 6 else "")
    worst = int(few[np.argmin(n[few])]) if np.isfinite(n[few]).all() else int(few[0])
    counts = f"{int(n[worst])} features" if math.isfinite(n[worst]) else percent(float(alive[worst]))
    return [
        f"Few features are alive at step{'s' if len(few) > 1 else ''} {named} (as few as {counts}): "
        f"shares there are weak evidence."
    ]


def tokens_words(value: float | None) -> str:
    """Tokens seen in words: `1.5 M tokens`."""
    return "" if value is None or not math.isfinite(value) else f"{short_number(value)} tokens"
