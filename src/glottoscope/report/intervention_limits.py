"""What the intervention does not show: comparisons, draws, alpha, seeds, what was left out; and the section's first lines."""

from __future__ import annotations

import math

from glottoscope.report.data import distinct, where
from glottoscope.report.intervention import Finding, Story
from glottoscope.report.intervention_numbers import FEWEST_DRAWS, LEVEL, POOLS, beyond_draws, listed
from glottoscope.report.intervention_view import METRIC_NAMES, TEXT_NAMES, Effect, Target, View
from glottoscope.report.summary import plural

CONTROL_ARMS = {
    "self": "self-injection",
    "shuffled": "the part of another text",
    "reconstruction": "the SAE's reconstruction as a ceiling",
    "state": "the donor's whole state as a ceiling",
}


def _findings(stories: list[Story]) -> list[tuple[Story, Finding]]:
    """Findings about classes, of every base step."""
    return [(story, f) for story in stories for f in story.findings if f.part != "all"]


def _named(found: list[tuple[Story, str]], several: bool) -> str:
    """`mixed (steps 300 and 600), bilingual (step 600)`; names alone where there is one base step."""
    steps: dict[str, list[str]] = {}
    for story, name in found:
        steps.setdefault(name, []).append(f"{story.setting.base_step:,}")
    if not several:
        return listed(list(steps))
    return ", ".join(f"{name} (step{'s' if len(at) > 1 else ''} {listed(at)})" for name, at in steps.items())


def summary(view: View, stories: list[Story]) -> str:
    """Counts over the classes and base steps, text by text: how many help, and how many do so beyond the random draws."""
    several, words = len(stories) > 1, []
    for text in view.texts:
        found = [
            (story, part, effect)
            for story in stories
            for part in view.classes
            if (effect := story.setting.at("part", part, text, Target("ppl", "all"))) is not None
            and effect.verdict in ("better", "worse", "unclear")
        ]
        if found and not words:
            steps = f" at {plural(len(stories), 'base step')}" if several else ""
            whole = f"{plural(len(found), 'class part')}{' in all' if several else ''}"
            words.append(f"{whole} {_was(len(found))} added{steps}.")
        if found:
            words += _counts(view, text, found, several)
    return (
        " ".join(words) or "No class's effect on perplexity was measured with an interval, so nothing is concluded about any class."
    )


def _counts(view: View, text: str, found: list[tuple[Story, str, Effect]], several: bool) -> list[str]:
    """The sentences of one text."""

    def named(wanted: list[tuple[Story, str, Effect]]) -> str:
        return _named([(story, view.part_name(part)) for story, part, _ in wanted], several)

    better = [item for item in found if item[2].verdict == "better"]
    worse = [item for item in found if item[2].verdict == "worse"]
    where = f"On {TEXT_NAMES[text]}"
    words = [f"{where} none lowers pooled perplexity with its 95 % interval below 0."]
    if better:
        verb = _verb(len(better), "lower")
        words = [f"{where} {len(better)} of them {verb} pooled perplexity with the 95 % interval below 0."]
        flags = [_beyond(story, part, effect) for story, part, effect in better]
        beyond = [item for item, flag in zip(better, flags, strict=True) if flag]
        untested = [item for item, flag in zip(better, flags, strict=True) if flag is None]
        if beyond:
            words.append(f"Better than random features of the same activation mass: {named(beyond)}.")
        elif len(untested) < len(better):
            words.append("None of these is shown to do better than random features of the same activation mass.")
        if untested:
            words.append(f"Not tested against enough random draws: {named(untested)}.")
    if worse:
        words.append(f"{len(worse)} {_verb(len(worse), 'raise')} it: {named(worse)}.")
    return words


def _beyond(story: Story, part: str, effect: Effect) -> bool | None:
    target = Target(effect.metric, effect.language)
    return beyond_draws(effect, {pool: story.setting.draws(pool, part, effect.text, target) for pool in POOLS})


def _was(n: int) -> str:
    return "was" if n == 1 else "were"


def _verb(n: int, verb: str) -> str:
    return verb + ("s" if n == 1 else "")


def limits(view: View, stories: list[Story]) -> list[str]:
    """What may not be concluded, and why, from the table's own numbers."""
    out = [_scope(view), _random(stories), *_comparisons(view, stories), *_draws(view), *_alpha(view)]
    out += [_translation(view), *_untested(stories), *_missing_controls(view)]
    out.append(
        "That a part helps when it is added from outside does not show that the base would learn by way of it, nor that its "
        "features do what the class is called."
    )
    return out


def _scope(view: View) -> str:
    model = view.main[0].model
    mine = [key for key in view.keys if key["model"] == model]
    lm, sae = (len({key[name] for key in mine}) for name in ("lm_seed", "sae_seed"))
    units = [{"documents": "documents", "sentences": "articles of aligned sentences"}[text] for text in view.texts]
    others = "" if lm * sae == 1 else f" {plural(lm, 'LM seed')} and {plural(sae, 'SAE seed')} were run: see “Other settings”."
    return (
        f"Intervals are 95 % paired bootstraps over {listed(units) if units else 'articles'}. They hold for this one language "
        f"model and this one SAE, and say nothing about another training run of either.{others}"
    )


def _random(stories: list[Story]) -> str:
    rule = "An effect that random features of the same activation mass also have is no evidence for the class."
    same = [(story, f.name) for story, f in _findings(stories) if f.verdict == "better" and f.beyond is False]
    return f"{rule} Some draws did at least as well as {_named(same, len(stories) > 1)}." if same else rule


def _comparisons(view: View, stories: list[Story]) -> list[str]:
    n = sum(f.verdict in ("better", "worse", "unclear") for _, f in _findings(stories))
    if n < 2:
        return []
    words = [
        f"{n} parts are compared here, on several texts and languages. By chance alone about {LEVEL * n:.1g} of {n} would pass a "
        f"test at {100 * LEVEL:.0f} %, and the best one looks better than it is."
    ]
    draws = _n_draws(view)
    needed = math.ceil(n / LEVEL) - 1
    if draws and draws[-1] < needed:
        best = f"1 in {draws[-1] + 1}" if len(draws) == 1 else f"1 in {draws[0] + 1} to 1 in {draws[-1] + 1}"
        words.append(
            f"With {listed([str(k) for k in draws])} draws the best possible rank means {best}. To stay below {100 * LEVEL:.0f} % "
            f"after a correction for {n} comparisons (Bonferroni) a class would have to beat all of at least {needed} draws."
        )
    return [" ".join(words)]


def _n_draws(view: View) -> list[int]:
    """Numbers of draws that parts were ranked among, fewest first."""
    found = set()
    for s in view.main:
        rows = where(s.table, arm="part")
        found |= {*rows["n_random"].to_pylist(), *rows["n_random_other"].to_pylist()} - {None, 0}
    return sorted(found)


def _draws(view: View) -> list[str]:
    draws = _n_draws(view)
    if not draws:
        return ["No random features were drawn, so no effect can be ascribed to a class."]
    if draws[0] < FEWEST_DRAWS:
        return [f"Some ranks are among {draws[0]} draws: with fewer than {FEWEST_DRAWS} the rank cannot reach {100 * LEVEL:.0f} %."]
    return []


def _alpha(view: View) -> list[str]:
    texts = [*view.texts, *(["translation"] if view.translation_targets else [])]
    tried = [len(s.tried_on_dev(text)) for s in view.main for text in texts]
    if tried and min(tried) > 1:
        return [
            "Alpha was chosen on dev text, once for all parts. Another alpha may suit one class better: see the curves over alpha."
        ]
    if any(len(s.alphas) > 1 for s in view.main):
        return ["Several alphas were tried without dev text: the best of them on this text looks better than it is."]
    return ["Alpha was given and not chosen on dev text: another one may change the order of the classes."]


def _translation(view: View) -> str:
    if not view.translation_targets:
        return "Translation was not measured: nothing is said about it."
    widths = []
    target = view.translation_targets[0]
    for s in view.main:
        for part in view.parts:
            effect = s.at("part", part, "translation", target)
            if effect is not None and math.isfinite(effect.high - effect.low):
                widths.append((effect.high - effect.low) / 2)
    size = (
        f" Of {METRIC_NAMES[target.metric]} a change of {sorted(widths)[len(widths) // 2]:.2g} would be needed." if widths else ""
    )
    return f"A difference in translation whose interval holds 0 is noise, however it looks in the table.{size}"


def _untested(stories: list[Story]) -> list[str]:
    several = len(stories) > 1
    reasons: dict[str, list[tuple[Story, str]]] = {}
    for story in stories:
        for f in story.findings:
            if f.verdict == "missing":
                reasons.setdefault(f.tag.removeprefix("not tested: "), []).append((story, f.name))
    return [f"Not tested, {reason}: {_named(found, several)}." for reason, found in reasons.items()]


def _missing_controls(view: View) -> list[str]:
    there = set()
    for s in view.main:
        there |= set(distinct(s.table.filter(s.table["change"].is_valid()), "arm"))
    missing = [name for arm, name in CONTROL_ARMS.items() if arm not in there]
    return [f"Not measured: {listed(missing)}."] if missing else []
