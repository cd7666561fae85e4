"""What the intervention shows, in words computed from the table: what was done, what may be concluded and what may not.

An effect is stated where its 95 % interval leaves 0 out. It counts for a class only where the class does better than
random features of the same activation mass: `rank` is 1 + the draws that do at least as well, so rank / (draws + 1) is the
share of equally likely outcomes that would look as good if the class were one more random draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from glottoscope.report.estimate import bracket, percent
from glottoscope.report.intervention_numbers import (
    FEWEST_DRAWS,
    LEVEL,
    POOLS,
    as_far_as,
    beyond_draws,
    beyond_pool,
    change_words,
    digits_of,
    listed,
    ranked,
    signed,
)
from glottoscope.report.intervention_others import others
from glottoscope.report.intervention_view import (
    METRIC_NAMES,
    TEXT_NAMES,
    Effect,
    Setting,
    Target,
    View,
    alpha_words,
    layer_words,
)

LOWER_HIGHER = {"better": "lower", "worse": "higher", "unclear": "no clear change", "unknown": "no interval"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one part did to pooled perplexity. `beyond`: more than the random draws do; None: cannot be told."""

    part: str
    name: str
    tag: str
    text: str
    verdict: str
    beyond: bool | None


@dataclass(frozen=True, slots=True)
class Story:
    """One base step in words. `others` are (name, text) about ceilings, added norm and translation."""

    setting: Setting
    title: str
    done: str
    findings: list[Finding]
    others: list[tuple[str, str]]


def stories(view: View) -> list[Story]:
    """The main settings in words, by base step."""
    return [_story(view, setting) for setting in view.main]


def _story(view: View, s: Setting) -> Story:
    text = view.texts[0] if view.texts else None
    findings = [_finding(view, s, part, text) for part in view.parts] if text else []
    return Story(s, f"Base: step {s.base_step:,}. Donor: {donor_name(s)}.", _done(view, s), findings, others(view, s, text))


def donor_name(s: Setting) -> str:
    """`step 1,500`, with the model where it is another one."""
    return f"{'' if s.donor_model == s.model else f'{s.donor_model}, '}step {s.donor_step:,}"


def _done(view: View, s: Setting) -> str:
    def seen(step: str, column: str, role: str) -> str:
        tokens = s.tokens(column)
        return f"{step} ({role}{'' if tokens is None else f', {tokens:,} tokens seen'})"

    base = seen(f"step {s.base_step:,}", "base_tokens", "the base")
    donor = seen(donor_name(s), "donor_tokens", "the donor")
    where = f"At {layer_words(s.layers)} of {s.model}"
    scale = "scaled to the norm of the base's state" if s.scale == "matched" else "in the donor's own scale"
    alpha = "alpha" if all(not s.chosen_alphas(text) for text in _tried(view)) else _alphas(view, s)
    if s.mode == "add":
        what = f"one class's part of the state at {donor} was added with {alpha} to the state at {base}, {scale}"
    else:
        what = f"one class's part of the state at {base} was taken out and that of {donor} put in with {alpha}, {scale}"
    sentences = [f"{where}, {what}.", _alpha_words(view, s)]
    units = [f"{TEXT_NAMES[text]} ({n:,} units)" for text in _tried(view) if (n := _units(s, text))]
    if units:
        sentences.append(f"Measured on {listed(units)}.")
    for text in view.texts[:1]:
        base_row, donor_row = (s.at(arm, None, text, Target("ppl", "all")) for arm in ("baseline", "donor"))
        if base_row and donor_row and math.isfinite(base_row.value + donor_row.value):
            sentences.append(
                f"Pooled perplexity on {TEXT_NAMES[text]}: {base_row.value:.4g} before, {donor_row.value:.4g} in the donor itself."
            )
    return " ".join(filter(None, sentences))


def _units(s: Setting, text: str) -> int:
    return max((e.n_units or 0 for key, rows in s.effects.items() if key[2] == text for e in rows), default=0)


def _tried(view: View) -> list[str]:
    return [*view.texts, *(["translation"] if view.translation_targets else [])]


def _alphas(view: View, s: Setting) -> str:
    """`alpha = 0.4`, with the texts where they differ."""
    by_text = {text: alpha_words(alphas) for text in _tried(view) if (alphas := s.chosen_alphas(text))}
    if len(set(by_text.values())) == 1:
        return f"alpha = {next(iter(by_text.values()))}"
    return f"alpha = {listed([f'{alphas} ({TEXT_NAMES[text]})' for text, alphas in by_text.items()])}"


def _alpha_words(view: View, s: Setting) -> str:
    tried = [s.tried_on_dev(text) for text in _tried(view)]
    if tried and min(map(len, tried)) > 1:
        return f"Alpha was chosen on dev text from {listed([f'{a:g}' for a in tried[0]])}, by perplexity with all features."
    if len(s.alphas) > 1:
        return "Several alphas were tried, and there is no dev text that one was chosen on."
    return "Alpha was given, not chosen on dev text."


def _finding(view: View, s: Setting, part: str, text: str) -> Finding:
    name = view.part_name(part)
    target = next((t for t in (Target("ppl", "all"), Target("nll", "all")) if _known(s.at("part", part, text, t))), None)
    effect = s.at("part", part, text, target) if target else None
    if target is None or effect is None:
        reason = s.note("part", part) or "no value in the table"
        return Finding(part, name, f"not tested: {reason}", f"Nothing was measured for it ({reason}).", "missing", None)
    words, beyond = [_effect_words(s, effect, part, text)], None
    draws = [_against_draws(s, effect, pool, part, text, target) for pool in POOLS] if part != "all" else []
    if draws:
        beyond = beyond_draws(effect, {pool: s.draws(pool, part, text, target) for pool in POOLS})
        verdict = ". So it is not shown to be specific to the class" if beyond is False and effect.verdict == "worse" else ""
        words.append(f"Random features of the same activation mass: {'; '.join(d.clause for d in draws)}{verdict}.")
    words.append(_by_language(view, s, part, text))
    words.append(_other_texts(view, s, part, target, effect.verdict))
    few = any(0 < d.n < FEWEST_DRAWS for d in draws)
    if effect.verdict == "better":
        controls = [_against_self(s, effect, part, text, target), _against_shuffled(s, effect, part, text, target)]
        words += [control.sentence for control in controls]
        if draws:
            words.append(_so(beyond, controls, few=few))
    tag = _tag(effect.verdict, beyond, part, few=few)
    return Finding(part, name, tag, " ".join(filter(None, words)), effect.verdict, beyond)


def _known(effect: Effect | None) -> bool:
    return effect is not None and effect.verdict != "missing"


def _effect_words(s: Setting, effect: Effect, part: str, text: str) -> str:
    measure = f"pooled {METRIC_NAMES[effect.metric]}"
    before, change = s.at("baseline", None, text, Target(effect.metric, "all")), change_words(effect)
    if before and math.isfinite(before.value + effect.value):
        digits = digits_of(effect.low, effect.high, effect.change)
        change = f"from {before.value:.{digits}f} to {effect.value:.{digits}f}: {change}"
    if effect.verdict == "better":
        return f"It lowers {measure} ({change}){_gap(s, part, text)}."
    if effect.verdict == "worse":
        return f"It raises {measure} ({change}): it does harm."
    if effect.verdict == "unclear":
        return f"No change of {measure} that this study can tell from 0 ({change})."
    return f"{measure.capitalize()} changes ({change}), without an interval: whether this is more than noise is not known."


def _gap(s: Setting, part: str, text: str) -> str:
    """The share of the gap in log perplexity, which adds up where perplexity itself exaggerates."""
    effect, donor = s.at("part", part, text, Target("nll", "all")), s.at("donor", None, text, Target("nll", "all"))
    if effect is None or not math.isfinite(effect.gap) or donor is None or not donor.change < 0:
        return ""
    extent = bracket(effect.gap_low, effect.gap_high)
    return f", {percent(effect.gap)}{f' {extent}' if extent else ''} of the gap to the donor in log perplexity"


@dataclass(frozen=True, slots=True)
class _Draws:
    """A comparison with the `n` random draws of one pool, as a clause."""

    clause: str
    n: int


def _against_draws(s: Setting, effect: Effect, pool: str, part: str, text: str, target: Target) -> _Draws:
    rank, n = ranked(effect, pool)
    note, where = s.note(pool, part), f"draws {POOLS[pool]}"
    if rank is None or not n:
        return _Draws(f"no {where}{f' ({note})' if note else ''}", 0)
    drawn = s.draws(pool, part, text, target)
    theirs = _range(drawn) + (f" ({note})" if note else "")
    flag = beyond_pool(effect, pool, drawn)
    if effect.verdict not in ("better", "worse"):
        return _Draws(f"{rank - 1} of {n} {where} do at least as well{theirs}", n)
    harm, as_far = effect.verdict == "worse", as_far_as(effect, pool, drawn)
    more, does = ("more harm than", "do as much harm or more") if harm else ("better than", "do at least as well")
    if as_far == 0:
        return _Draws(f"{more} all {n} {where}{theirs}", n)
    if flag:
        return _Draws(f"{more} all but {as_far} of {n} {where}{theirs}", n)
    return _Draws(f"{as_far} of {n} {where} {does}{theirs}", n)


def _range(changes: np.ndarray) -> str:
    if len(changes) == 0:
        return ""
    low, high = float(changes[0]), float(changes[-1])
    digits = digits_of(low, high, high)
    span = signed(low, digits) if len(changes) == 1 else f"{signed(low, digits)} to {signed(high, digits)}"
    return f" ({span})"


def _compare(effect: Effect, other: Effect | None) -> str | None:
    """less | alike | more: what the other does, by whether the intervals (of a lower-is-better metric) overlap."""
    if other is None or other.verdict in ("missing", "unknown"):
        return None
    return "less" if effect.high < other.low else "more" if other.high < effect.low else "alike"


@dataclass(frozen=True, slots=True)
class _Control:
    """A control beside an effect: what to say, what it rules out, what it leaves open."""

    sentence: str = ""
    ruled_out: str = ""
    doubt: str = ""


def _against_self(s: Setting, effect: Effect, part: str, text: str, target: Target) -> _Control:
    """The base's own part, added in the same way."""
    own = s.at("self", part, text, target)
    does = _compare(effect, own)
    if own is None or does is None:
        others = any(arm == "self" for arm, *_ in s.effects)
        return _Control("The base has no such part of its own to compare with." if others else "")
    change = change_words(own)
    if does == "less":
        return _Control(f"The base's own part does less ({change}).", "the base's own part")
    if does == "more":
        return _Control(f"The base's own part does more ({change}).", "", "the base's own part does more")
    return _Control(f"The base's own part: {change}, intervals overlap.", "", "the base's own part may do as much")


def _against_shuffled(s: Setting, effect: Effect, part: str, text: str, target: Target) -> _Control:
    """The donor's part of another text."""
    shuffled = s.at("shuffled", part, text, target)
    does = _compare(effect, shuffled)
    if shuffled is None or does is None:
        return _Control()
    change = change_words(shuffled)
    if does == "less":
        return _Control(f"The part of another text does less ({change}): what is read matters.", "the part of another text")
    if does == "more":
        return _Control(f"The part of another text does more ({change}).", "", "what is read does not help")
    return _Control(f"The part of another text: {change}, intervals overlap.", "", "what is read is not shown to matter")


def _by_language(view: View, s: Setting, part: str, text: str) -> str:
    words = []
    for code in view.languages:
        effect = s.at("part", part, text, Target("ppl", code)) or s.at("part", part, text, Target("nll", code))
        if effect is not None and effect.verdict != "missing":
            words.append(f"{view.data.language_name(code)} {LOWER_HIGHER[effect.verdict]} ({change_words(effect)})")
    return f"By language: {', '.join(words)}." if words else ""


def _other_texts(view: View, s: Setting, part: str, target: Target, verdict: str) -> str:
    words = []
    for text in view.texts[1:]:
        effect = s.at("part", part, text, target)
        if effect is not None and effect.verdict != "missing":
            too = ", too" if effect.verdict == verdict and verdict in ("better", "worse") else ""
            rank, n = ranked(effect, "random")
            draws = f"; {rank - 1} of {n} draws {POOLS['random']} do at least as well" if rank is not None and n else ""
            words.append(f"On {TEXT_NAMES[text]}: {LOWER_HIGHER[effect.verdict]}{too} ({change_words(effect)}{draws}).")
    return " ".join(words)


def _so(beyond: bool | None, controls: list[_Control], *, few: bool) -> str:
    if beyond is None:
        why = f"with fewer than {FEWEST_DRAWS} draws the rank cannot reach {100 * LEVEL:.0f} %, so " if few else ""
        return f"So it helps; {why}whether the class has to do with it was not tested."
    if not beyond:
        return (
            "So it helps, but the effect is not shown to be specific to the class: some random features of its mass help as much."
        )
    without = listed(["random features of the same mass", *(c.ruled_out for c in controls if c.ruled_out)])
    doubts = [c.doubt for c in controls if c.doubt]
    return f"So it does what {without} do not{f', but {listed(doubts)}' if doubts else ''}."


def _tag(verdict: str, beyond: bool | None, part: str, *, few: bool) -> str:
    if verdict == "better":
        untold = ", too few random draws to tell" if few else ", no random draws to compare with"
        ending = {True: ", beyond its random draws", False: ", but some random draws do as much", None: untold}[beyond]
        return "lowers perplexity" + ("" if part == "all" else ending)
    return {"worse": "raises perplexity", "unclear": "no change that can be told from 0"}.get(verdict, "no interval")
