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

from glottoscope.report.data import CONTROL_NAMES, ReportData, numbers
from glottoscope.report.estimate import Estimate, above, estimate, percent

FEW_ALIVE_SHARE, FEW_ALIVE = 0.5, 100
POOR_FVU = 0.5
SEEDS_FOR_A_CLAIM = 3


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


def plural(n: int, noun: str) -> str:
    """`1 LM seed`, `2 LM seeds`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


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
    if fell is None or rose is None:
        return (
            f"{where} the share of mixed features went from {start} at {step_name(steps[first])} to {end} at "
            f"{last_name}, lowest {low} at {low_name}; whether this is more than noise is not known without intervals.",
            "Without intervals no change of mixed features can be told from noise",
        )

    if lowest == first:
        if rose:
            return (
                f"{where} the share of mixed features never fell below its first value: it rose from {start} at "
                f"{step_name(steps[first])} to {end} by {last_name}.",
                "Mixed features did not fall; they rose",
            )
        return (
            f"{where} the share of mixed features neither fell nor clearly rose: {start} at {step_name(steps[first])} "
            f"and {end} at {last_name}.",
            "Mixed features did not clearly change",
        )
    fall_words = (
        f"fell from {start} at {step_name(steps[first])} to {low} by {low_name}"
        if fell
        else f"did not clearly fall: {start} at {step_name(steps[first])}, lowest {low} at {low_name}, a difference "
        "that the intervals do not separate from none"
    )
    if lowest == last:
        if fell:
            sentence = f"{where} the share of mixed features {fall_words} and had not risen again by the last checkpoint."
            return sentence, "Mixed features fell and did not rise again"
        return f"{where} the share of mixed features {fall_words}.", "Mixed features did not clearly change"
    if rose:
        rise_words = f"and rose again to {end} by {last_name}" if fell else f"then rose to {end} by {last_name}"
    else:
        rise_words = f"{'and' if fell else 'it'} did not clearly rise {'again' if fell else 'later'} ({end} at {last_name})"
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
    return f" (95 % interval of the turning step: {int(turning['low']):,} to {int(turning['high']):,})"


def _change(turning: dict[str, Any] | None, name: str, high: Estimate, low: Estimate) -> bool | None:
    """Whether high > low is more than noise: by the bootstrap of the change where given, else by the two intervals."""
    bound = None if turning is None else turning.get(f"{name}_low")
    if bound is not None and math.isfinite(bound):
        return float(bound) > 0
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
    name = "features bilingual by translation pairs" if by_pairs else "bilingual features"
    lead = (
        ""
        if by_pairs
        else "There are no aligned sentences, so translation pairs could not be tested; by bilingual_paper (mixed, not "
        f"single-token, R >= {data.monosemanticity_threshold:g}) "
    )
    share = f"the share of {name}"
    if peak <= 0:
        rule = " by translation pairs" if by_pairs else ""
        words = f"{lead}no feature was bilingual{rule} at any checkpoint: {end} at {step_name(steps[last])}"
        head = "no bilingual features" if by_pairs else "no features bilingual by the paper-style rule"
    elif len(rows) == 1:
        words = f"{lead}{share} was {end} at {step_name(steps[last])}, the only checkpoint measured"
        head = f"{percent(end.value)} of the alive features are bilingual{'' if by_pairs else ' by the paper-style rule'}"
    else:
        rose, fell = above(end, start), above(start, end)
        suffix = "" if by_pairs else " by the paper-style rule"
        between = f"from {start} at {step_name(steps[first])} to {end} by {step_name(steps[last])}"
        if rose:
            verb = "became more" if start.value > 0.05 else "appeared"
            words, head = f"{lead}{share} rose {between}", f"bilingual features{suffix} {verb} ({percent(end.value)})"
        elif fell:
            words, head = f"{lead}{share} fell {between}", f"bilingual features{suffix} became fewer"
        elif rose is None:
            words = f"{lead}{share} went {between} (no intervals: whether this is more than noise is not known)"
            head = f"bilingual features{suffix}: change not testable"
        else:
            words = f"{lead}{share} went {between}, a change that the intervals do not separate from none"
            head = f"no clear change in bilingual features{suffix}"
        top = int(np.nanargmax(numbers(table, measure)))
        if top != last and above(estimate(table, top, measure), end):
            words += f", after a peak of {estimate(table, top, measure)} at {step_name(steps[top])}"
    control_words, apart = _controls(data, measure, end)
    if peak > 0 and not apart:
        head += ", but not clearly more than in a control"
    return f"{_capital(words)}; {control_words}.", head, measure


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _controls(data: ReportData, measure: str, end: Estimate) -> tuple[str, bool]:
    """What the whole-model controls did, in one clause, and whether the main model stands apart from all of them."""
    clauses, stands_apart = [], True
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
            False: ", which the intervals do not set apart from the main model",
            None: ", without an interval to compare",
        }[apart]
        stands_apart &= apart is not False
        clauses.append(f"{name} ended at {control_end}{where}{verdict}")
    if not clauses:
        return "no negative control was run, so how much of this needs no bilingual data is not known", True
    return "; ".join(clauses), stands_apart


def _stats(data: ReportData, table: pa.Table, measure: str | None) -> list[Stat]:
    """Counts at the last checkpoint of the main model's middle layer, and the control's beside them."""
    last = table.num_rows - 1

    def count(column: str, source: pa.Table = table, row: int = last) -> str:
        value = float(numbers(source, column)[row])
        return f"{int(value):,}" if math.isfinite(value) else "?"

    stats = [Stat(f"{count('n_alive')} of {count('n_features')}", "features alive at the last checkpoint")]
    stats.append(Stat(f"{count('count_mixed')} of {count('n_alive')}", "alive features are mixed (not: bilingual)"))
    if measure == "share_bilingual":
        stats.append(Stat(f"{count('n_bilingual')} of {count('n_alive')}", "alive features are bilingual by translation pairs"))
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
        out.append("The mixed share before training is a property of a random model and of the SAE's capacity, not of language.")
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
        seeds = f"{plural(n_lm, 'LM seed')} and {plural(n_sae, 'SAE seed')}"
        text += f"; over {seeds} the last checkpoint ranges: {', '.join(ranges)}"
    if n_lm < SEEDS_FOR_A_CLAIM:
        text += f"; with {plural(n_lm, 'LM seed')} no claim is made about other training runs or about model sizes"
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
        f"Few features are alive at step{'s' if len(few) > 1 else ''} {named} (as few as {counts}): shares there are weak evidence."
    ]
