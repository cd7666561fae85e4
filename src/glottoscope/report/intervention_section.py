"""The report's section “Does it cause anything?”: words first, then the paper's table, figures, and every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc

from glottoscope.report.data import CONTROL_NAMES, ReportData
from glottoscope.report.html import esc, number, table
from glottoscope.report.intervention import Story, donor_name, stories
from glottoscope.report.intervention_limits import limits, summary
from glottoscope.report.intervention_numbers import change_words, digits_of, ranked, signed
from glottoscope.report.intervention_view import (
    DRAWS,
    METRIC_NAMES,
    SETTING,
    STUDY,
    TEXT_NAMES,
    Effect,
    Setting,
    Target,
    View,
    alpha_words,
    layer_words,
    setting_rows,
    view_of,
)

OPEN_STORIES = 3  # base steps told without unfolding
PUBLISHED = (
    ("nothing", "18.70", "25.78", "22.43", "61.1", "56.4"),
    ("English", "18.53", "25.64", "22.28", "61.4", "56.9"),
    ("Japanese", "18.65", "25.33", "22.17", "61.3", "57.2"),
    ("bilingual", "18.36", "25.20", "21.96", "62.5", "57.2"),
)
ARM_NAMES = {
    "part": "donor's part",
    "random": "random draws, all alive",
    "random_other": "random draws, outside the class",
    "self": "base's own part",
    "shuffled": "donor's part of another text",
    "reconstruction": "donor SAE's reconstruction",
    "state": "donor's state added",
    "state_replaced": "donor's state in place",
    "donor": "donor itself",
    "identity": "check: the base's state taken apart and put together again",
}


def section(data: ReportData, figures: str) -> str:
    """The section's HTML around its figures (HTML already); empty where the study made no intervention."""
    view = view_of(data)
    if view is None:
        return ""
    told = stories(view)
    items = "".join(f"<li>{esc(text)}</li>" for text in limits(view, told))
    return (
        "<p>A part of one checkpoint's representation (the donor's) is put into another checkpoint (the base) while both read the "
        "same text; every position that counts is changed. If a class of features does something, the base should now predict "
        "better, and better than with random features.</p>"
        f'<p class="told">{esc(summary(view, told))}</p>'
        + "".join(_story(story, folded=i >= OPEN_STORIES) for i, story in enumerate(told))
        + f'<h3>What may not be concluded</h3><ul class="limits">{items}</ul>'
        + _paper_tables(view)
        + (f'<div class="figures">{figures}</div>' if figures else "")
        + "".join(_arms(view, s) for s in view.main)
        + _other_settings(view)
        + _words()
    )


def _story(story: Story, *, folded: bool) -> str:
    found = "".join(f'<li><b>{esc(f.name)}</b> <span class="tag">{esc(f.tag)}</span> {esc(f.text)}</li>' for f in story.findings)
    others = "".join(f"<li><b>{esc(name)}</b>: {esc(text)}</li>" for name, text in story.others)
    body = f"<p>{esc(story.done)}</p>" + (f'<ul class="findings">{found}{others}</ul>' if found or others else "")
    if folded:
        return f"<details><summary>{esc(story.title)}</summary>{body}</details>"
    return f"<h3>{esc(story.title)}</h3>{body}"


# ---- the paper's layout


def _paper_tables(view: View) -> str:
    """One table for each base step and text, translation with the first text; the published one beside the first base's last."""
    texts: list[str | None] = [*view.texts] or [None]
    by_base = [
        [_paper_table(view, s, text, view.translation_targets if i == 0 else []) for i, text in enumerate(texts)] for s in view.main
    ]
    # The published table stands beside the one with the fewest columns.
    narrow = len(texts) - 1
    shown = [html for some in by_base[:OPEN_STORIES] for html in some]
    shown[narrow] = f"<div class=pair>{shown[narrow]}{_published()}</div>"
    rest = "".join(html for some in by_base[OPEN_STORIES:] for html in some)
    folded = f"<details><summary>The same for the other base steps</summary>{rest}</details>" if rest else ""
    return f"<h3>In the paper's layout</h3>{''.join(shown)}{folded}"


def _paper_table(view: View, s: Setting, text: str | None, translation: Sequence[Target]) -> str:
    """Perplexity, the main translation measure, ranks, other measures."""
    columns: list[tuple[str, Callable[[str, str | None], str]]] = []

    def measure(name: str, where: str, target: Target) -> None:
        columns.append((name, lambda arm, part: _cell(s, arm, part, where, target)))

    if text is not None:
        for code in (*view.languages, "all"):
            measure(f"PPL {'all' if code == 'all' else esc(view.data.language_name(code))}", text, Target("ppl", code))
    main = [t for t in translation if t.metric == translation[0].metric]
    for t in main:
        measure(f"{METRIC_NAMES[t.metric]} {_way(t)}", "translation", t)
    if text is not None:
        target = Target("ppl", "all")
        for pool, name in (("random", "rank of PPL all<br>among all alive"), ("random_other", "rank among<br>outside")):
            columns.append((name, lambda arm, part, pool=pool: _rank(s.at(arm, part, text, target), pool)))
    for t in translation[len(main) :]:
        measure(f"{METRIC_NAMES[t.metric]} {_way(t)}", "translation", t)
    rows: list[tuple[str, str, str | None]] = [("nothing", "baseline", None)]
    rows += [(esc(view.part_name(part)), "part", part) for part in view.parts]
    rows.append((f"(donor, {esc(donor_name(s))})", "donor", None))
    caption = f"{s.model}, {layer_words(s.layers)}, base step {s.base_step:,}"
    for name in (*([text] if text is not None else []), *(["translation"] if translation else [])):
        caption += f", {TEXT_NAMES[name]} (alpha {alpha_words(s.chosen_alphas(name))})"
    caption += ": change with 95 % interval beneath"
    body = [[name, *(cell(arm, part) for _, cell in columns)] for name, arm, part in rows]
    html = table(["added", *(name for name, _ in columns)], body, caption=caption)
    return html.replace('<table class="num">', '<table class="num under">', 1)


def _way(target: Target) -> str:
    """`en → ja`: codes, because a column is narrow."""
    return esc(target.language.replace("-", " → ") if target.language.count("-") == 1 else target.language)


def _cell(s: Setting, arm: str, part: str | None, text: str, target: Target) -> str:
    effect = s.at(arm, part, text, target)
    if effect is None or not math.isfinite(effect.value):
        note = s.note(arm, part)
        return f"– <small>{esc(note)}</small>" if note else "–"
    digits = 2 if effect.metric == "ppl" else 1 if effect.metric in ("chrf", "bleu") or abs(effect.value) > 1.5 else 3
    value = f"{effect.value:.{digits}f}"
    if arm == "baseline" or not math.isfinite(effect.change):
        return value
    return f"{value} <small>{esc(change_words(effect))}</small>"


def _rank(effect: Effect | None, pool: str) -> str:
    if effect is None:
        return "–"
    rank, n = ranked(effect, pool)
    return "–" if rank is None or not n else f"{rank} of {n + 1}"


def _published() -> str:
    return (
        '<div class="published">'
        + table(
            ("added", "PPL En", "PPL Ja", "PPL all", "COMET En → Ja", "COMET Ja → En"),
            PUBLISHED,
            caption="Published, LLM-jp-3",
        )
        + '<p class="caption">Inaba et al. 2025. Other models and other text, without intervals: for the layout and the direction '
        "only, not to compare numbers.</p></div>"
    )


# ---- every arm


def _arms(view: View, s: Setting) -> str:
    """Every arm at the chosen alpha, one table for each text."""
    parts = []
    for text in view.texts:
        targets = view.perplexity_targets("nll")
        parts.append(_arm_table(view, s, text, targets, f"Log perplexity (nats per token), {TEXT_NAMES[text]}"))
    metrics = list(dict.fromkeys(t.metric for t in view.translation_targets))
    for metric in metrics:
        targets = [t for t in view.translation_targets if t.metric == metric]
        parts.append(_arm_table(view, s, "translation", targets, f"Translation, {METRIC_NAMES[metric]}"))
    title = f"Every arm: base step {s.base_step:,}, donor step {s.donor_step:,}"
    return f"<details><summary>{esc(title)}</summary>{''.join(parts)}</details>"


def _arm_table(view: View, s: Setting, text: str, targets: Sequence[Target], caption: str) -> str:
    first = targets[0]
    conditions: list[tuple[str, str | None]] = [(arm, part) for part in view.parts for arm in ("part", "self", "shuffled", *DRAWS)]
    conditions += [(arm, None) for arm in ("reconstruction", "state", "state_replaced", "donor", "identity")]
    body = []
    for arm, part in conditions:
        name = f"{esc(view.part_name(part))}{': ' if part is not None else ''}{ARM_NAMES[arm]}"
        if arm in DRAWS and part is not None:
            spans = [_span(s, arm, part, text, target) for target in targets]
            if any(spans):
                n = len(s.draws(arm, part, text, first))
                body.append([name, *(span or "–" for span in spans), "–", "–", "–", "–", "–", f"{n} draws", "–"])
            continue
        effects = [s.at(arm, part, text, target) for target in targets]
        main = effects[0]
        if main is None:
            continue
        changes = ["–" if e is None or e.verdict == "missing" else _change(e) for e in effects]
        if main.verdict == "missing" and main.note:
            changes[0] = f"– <small>{esc(main.note)}</small>"
        gap = "–"
        if math.isfinite(main.gap):
            gap = _minus(f"{100 * main.gap:.1f}")
            if math.isfinite(main.gap_low + main.gap_high) and arm != "donor":
                gap += f" <small>[{_minus(f'{100 * main.gap_low:.1f}')}, {_minus(f'{100 * main.gap_high:.1f}')}]</small>"
        measures = [number(main.added_norm, 3), _minus(number(main.per_norm, 3)), number(main.mass, 3), number(main.n_features)]
        body.append([name, *changes, gap, *measures, _rank(main, "random"), _rank(main, "random_other")])
    if not body:
        return ""
    named = [f"change, {esc(view.language_name(t.language))}" for t in targets]
    lead = esc(view.language_name(first.language))
    head = ["arm", *named, f"gap closed %, {lead}", f"added norm, {lead}", "change per norm", "mass", "features"]
    return table([*head, "rank, all alive", "rank, outside"], body, caption=caption)


def _change(effect: Effect) -> str:
    digits = digits_of(effect.low, effect.high, effect.change)
    value = signed(effect.change, digits)
    if not math.isfinite(effect.low + effect.high):
        return value
    return f"{value} <small>[{signed(effect.low, digits)}, {signed(effect.high, digits)}]</small>"


def _minus(text: str) -> str:
    return "0.0" if text == "-0.0" else text.replace("-", "−", 1)


def _span(s: Setting, arm: str, part: str, text: str, target: Target) -> str:
    changes = s.draws(arm, part, text, target)
    if len(changes) == 0:
        return ""
    low, high = float(changes[0]), float(changes[-1])
    digits = digits_of(low, high, high)
    return f"{signed(low, digits)} to {signed(high, digits)}"


def _other_settings(view: View) -> str:
    """Other layers, seeds, models, controls, modes and scales, one row each: pooled perplexity of every part."""
    main = {tuple(getattr(s, name) for name in SETTING) for s in view.main}
    keys = [key for key in view.keys if tuple(key[name] for name in SETTING) not in main]
    if not keys or not view.texts:
        return ""
    target, text = Target("ppl", "all"), view.texts[0]
    # The rows of the other settings that this table shows, before they become Python objects: settings may be many.
    shown = view.table.filter(
        (pc.field("arm") == "part") & (pc.field("text") == text) & (pc.field("metric") == "ppl") & (pc.field("language") == "all")
    )
    body, parts = [], view.parts_of(shown)
    for key in keys:
        s = setting_rows(shown, key)
        cells = []
        for part in parts:
            effect = s.at("part", part, text, target)
            known = effect is not None and effect.verdict != "missing"
            rank = _rank(effect, "random")
            cells.append(f"{esc(change_words(effect))}<br><small>{rank}</small>" if effect is not None and known else "–")
        body.append([_setting_name(key), alpha_words(s.chosen_alphas(text)), *cells])
    head = ("setting", "alpha", *(esc(view.part_name(part)) for part in parts))
    caption = f"Change of pooled perplexity, {TEXT_NAMES[text]}; beneath: rank among draws from all alive features"
    return f"<details><summary>Other settings ({len(keys)})</summary>{table(head, body, caption=caption)}</details>"


def _setting_name(key: dict[str, Any]) -> str:
    control = "" if key["control"] == "none" else f", {CONTROL_NAMES.get(key['control'], key['control'])}"
    way = "" if (key["mode"], key["scale"]) == ("add", "matched") else f", {key['mode']}, {key['scale']}"
    seeds = f", LM seed {key['lm_seed']}, SAE seed {key['sae_seed']}"
    model = "" if key["donor_model"] == key["model"] else f"{key['donor_model']} "
    steps = f"step {key['base_step']:,} from {model}{key['donor_step']:,}"
    experiment = "" if key["experiment"] == STUDY else f"{key['experiment']}: "
    return esc(f"{experiment}{key['model']}{control}, {layer_words(key['layers'])}, {steps}{way}{seeds}")


def _words() -> str:
    rows = (
        ("base, donor", "the checkpoint that is changed, and the one whose features are added"),
        ("part", "the sum of the decoder rows of one class of the donor's features, each times its activation at that position"),
        ("alpha", "the part is added times alpha; at alpha 0 nothing changes"),
        (
            "random draws",
            "sets of random features that hold as much of the donor SAE's activation mass as the class. The rank is 1 + the draws "
            "that do at least as well; rank / (draws + 1) of at most 5 % is called beyond the draws. For harm the draws count "
            "that do as much harm or more",
        ),
        ("base's own part", "the same class read by the base's own SAE in its own state, and added to it (self-injection)"),
        (
            "the part of another text",
            "the donor's part where it read another text of the same language; a later place in the same text would tell too much",
        ),
        ("gap closed", "change / (donor - base), of log perplexity or of the translation measure"),
        ("added norm", "the mean length of the change of the state, as a share of the state's own length"),
        (
            "interval",
            "95 % paired bootstrap: documents, or articles of aligned sentences, are drawn again and again, "
            "the same before and after",
        ),
    )
    words = "".join(f"<dt>{esc(a)}</dt><dd>{esc(b)}.</dd>" for a, b in rows)
    return f"<details><summary>The words of this section</summary><dl class=words>{words}</dl></details>"
