"""What stands beside the parts, in words: one class of all, ceilings, effect for its size, translation."""

from __future__ import annotations

import math

from glottoscope.report.estimate import percent
from glottoscope.report.intervention_numbers import LEVEL, change_words, listed, signed
from glottoscope.report.intervention_view import METRIC_NAMES, Effect, Setting, Target, View

CEILINGS = {
    "reconstruction": "the donor SAE's reconstruction in place of the state",
    "state": "the donor's whole state added",
    "state_replaced": "the donor's whole state in place of the base's",
}


def others(view: View, s: Setting, text: str | None) -> list[tuple[str, str]]:
    """(name, words) of one base step; `text` is the one that perplexity is told of."""
    return [*_together(view, s, text), *_per_norm(view, s, text), *_translation(view, s)]


def _together(view: View, s: Setting, text: str | None) -> list[tuple[str, str]]:
    """Ceilings, and how much of what all features do one class does."""
    if text is None:
        return []
    target, out = Target("nll", "all"), []
    everything = s.at("part", "all", text, target)
    shares = []
    for part in view.classes:
        effect = s.at("part", part, text, target)
        if everything and effect and effect.verdict == "better" and everything.verdict == "better":
            shares.append(f"{view.part_name(part)} {100 * effect.change / everything.change:.0f} %")
    if shares:
        out.append(
            ("One class of all", f"Of the change in log perplexity with all features, one class alone does: {listed(shares)}.")
        )
    words = []
    for arm, name in CEILINGS.items():
        effect = s.at(arm, None, text, target)
        if effect is not None and effect.verdict != "missing":
            gap = f", {percent(effect.gap).replace('-', '−')} of the gap" if math.isfinite(effect.gap) else ""
            words.append(f"{name} {change_words(effect)}{gap}")
    donor = s.at("donor", None, text, target)
    if donor is not None and math.isfinite(donor.change):
        words.append(f"the donor itself {signed(donor.change, 2)}")
    if words:
        out.append(("Ceilings", f"Change of pooled log perplexity in nats per token: {'; '.join(words)}."))
    if donor is not None and not donor.change < 0:
        out.append(("No gap", "The donor is not better than the base on this text: “share of the gap” means nothing here."))
    return out


def _per_norm(view: View, s: Setting, text: str | None) -> list[tuple[str, str]]:
    if text is None:
        return []
    words = []
    for part in view.parts:
        effect = s.at("part", part, text, Target("nll", "all"))
        if effect is not None and math.isfinite(effect.per_norm + effect.added_norm):
            words.append(f"{view.part_name(part)} {signed(effect.per_norm, 2)} (norm {effect.added_norm:.2g})")
    lead = "Change of pooled log perplexity for one unit of added norm (a unit is the state's own norm), without intervals: "
    return [("Effect for its size", lead + ", ".join(words) + ".")] if words else []


def _translation(view: View, s: Setting) -> list[tuple[str, str]]:
    """The main metric in words for each direction; of the others, how many changes leave 0 out."""
    out, rest = _prompts(view, s), []
    main = view.translation_targets[0].metric if view.translation_targets else ""
    for target in view.translation_targets:
        effects = {part: s.at("part", part, "translation", target) for part in view.parts}
        known = {part: e for part, e in effects.items() if e is not None and e.verdict in ("better", "worse", "unclear")}
        if target.metric != main:
            rest += [(target.metric, e) for e in known.values()]
        elif known:
            title = f"{METRIC_NAMES[target.metric]}, {view.language_name(target.language)}"
            out.append((title, _direction(view, s, target, known)))
    if rest:
        names = listed(list(dict.fromkeys(METRIC_NAMES[metric] for metric, _ in rest)))
        clear, n = sum(e.verdict != "unclear" for _, e in rest), len(rest)
        out.append((names, f"{clear} of {n} changes have an interval that leaves 0 out; by chance about {LEVEL * n:.1g} would."))
    return out


def _prompts(view: View, s: Setting) -> list[tuple[str, str]]:
    """What there is to say of the prompts, direction by direction; nothing where all is as it was asked for."""
    ways = dict.fromkeys(target.language for target in view.translation_targets)
    words = [f"{view.language_name(way)}: {said}" for way in ways if (said := s.prompts(way))]
    return [("Prompts", f"{'; '.join(words)}.")] if words else []


def _direction(view: View, s: Setting, target: Target, known: dict[str, Effect]) -> str:
    rows = (("before", s.at("baseline", None, "translation", target)), ("donor", s.at("donor", None, "translation", target)))
    levels = [f"{name} {row.value:.3g}" for name, row in rows if row is not None and math.isfinite(row.value)]
    clear = [
        f"{view.part_name(part)} {'better' if e.verdict == 'better' else 'worse'} ({change_words(e)}; {_rank_words(e)})"
        for part, e in known.items()
        if e.verdict != "unclear"
    ]
    if clear:
        words = ", ".join(clear) + (". The other changes cannot be told from 0." if len(clear) < len(known) else ".")
    else:
        part, largest = max(known.items(), key=lambda item: abs(item[1].change))
        size = f"{view.part_name(part)} ({change_words(largest)})"
        words = f"no change can be told from 0. The largest is that of {size}: noise, as far as this study can see."
    return f"{', '.join(levels)}{'; ' if levels else ''}{words}"


def _rank_words(e: Effect) -> str:
    if e.rank is None or not e.n_random:
        return "not compared with random draws"
    return f"{e.rank - 1} of {e.n_random} random draws do at least as well"
