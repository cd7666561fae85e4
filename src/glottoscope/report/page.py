"""`build_report`: one HTML file that opens from disk without a network or a script, and its figures as files."""

from __future__ import annotations

from pathlib import Path

from glottoscope.atomic import atomic_path, write_text
from glottoscope.report import tables
from glottoscope.report.css import stylesheet
from glottoscope.report.data import ReportData
from glottoscope.report.figures import DrawnFigure, all_figures
from glottoscope.report.figures_intervention import PREFIX as INTERVENTION
from glottoscope.report.figures_patterns import describe, ordered_patterns
from glottoscope.report.html import esc, flat, inline_svg, table
from glottoscope.report.intervention_section import section as intervention_section
from glottoscope.report.summary import Answer, answer

CITATION = (
    "Inaba et al., “How a Bilingual LM Becomes Bilingual: Tracing Internal Representations with Sparse Autoencoders”, "
    "Findings of EMNLP 2025"
)
PAPER_URL = "https://arxiv.org/abs/2503.06394"


def build_report(data: ReportData, out_dir: Path) -> Path:
    """Write `index.html` and `figures/*.svg`, `figures/*.png` into `out_dir`; return the path of `index.html`.

    The same data give the same bytes. Both appear whole or not at all; figures of an earlier report are replaced.
    """
    out_dir = Path(out_dir)
    drawn = []
    with atomic_path(out_dir / "figures") as folder:
        folder.mkdir()
        for figure in all_figures(data):
            (folder / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
            (folder / f"{figure.name}.png").write_bytes(figure.png)
            drawn.append(figure)
    write_text(out_dir / "index.html", page(data, drawn))
    return out_dir / "index.html"


def page(data: ReportData, figures: list[DrawnFigure]) -> str:
    """The whole page as HTML."""
    main = data.main_model
    layer, last = data.middle_layer(main), data.last_step(main)
    sections = [
        (
            "curves",
            "The curves",
            "".join(
                _figure(f, first=i == 0)
                for i, f in enumerate(figures)
                if f.name != "fig4_patterns" and not f.name.startswith(INTERVENTION)
            ),
        ),
        ("patterns", "What activates the features", _patterns(data, figures)),
        (
            "intervention",
            "Does it cause anything?",
            intervention_section(data, "".join(_figure(f) for f in figures if f.name.startswith(INTERVENTION))),
        ),
        ("tables", "The numbers", _numbers(data, main, layer, last)),
        ("classes", "What the words mean", _words(data)),
        ("detectable", "The smallest difference this study could have seen", _detectable(data)),
        (
            "choices",
            "Choices that are ours",
            "<p>The paper's own choice is quoted where it is known to us.</p>" + tables.choices_table(data),
        ),
        (
            "settings",
            "Settings and versions",
            f"<details><summary>Show all</summary>{tables.settings_tables(data)}</details>",
        ),
        ("sources", "Citation and data licences", _sources(data)),
    ]
    links = "".join(f'<li><a href="#{name}">{esc(title)}</a></li>' for name, title, body in sections if body)
    body = "".join(f'<section id="{name}"><h2>{esc(title)}</h2>{text}</section>' for name, title, text in sections if text)
    first = _first_screen(data, answer(data))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{esc(data.name)}: glottoscope report</title>
<style>{stylesheet(first + body)}</style>
</head>
<body>
<main>
{first}
<nav aria-label="Contents"><ol>{links}</ol></nav>
{body}
</main>
</body>
</html>
"""


def _first_screen(data: ReportData, result: Answer) -> str:
    stats = "".join(f"<div><dt>{esc(s.label)}</dt><dd>{esc(s.value)}</dd></div>" for s in result.stats)
    caveats = "".join(f"<li>{esc(text)}</li>" for text in result.caveats)
    names = ", ".join(data.language_name(code) for code in data.languages)
    return f"""<header>
<p class="eyebrow">glottoscope report · study <b>{esc(data.name)}</b> · {esc(names)}</p>
<h1>{esc(result.headline)}</h1>
<p class="answer">{esc(result.sentences[0])}</p>
<p class="answer">{esc(result.sentences[1])}</p>
<dl class="stats">{stats}</dl>
<details open class="caveats"><summary>What this does not say</summary><ul>{caveats}</ul></details>
</header>"""


def _figure(figure: DrawnFigure, *, first: bool = False) -> str:
    svg = inline_svg(figure.svg, figure.name, figure.title)
    links = " · ".join(f'<a href="figures/{figure.name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png"))
    return (
        f'<figure id="{figure.name}"{" class=first" if first else ""}><h3>{esc(figure.title)}</h3>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(figure.title)}">{svg}</div>'
        f"<figcaption>{esc(figure.caption)} <span>{links}</span></figcaption></figure>"
    )


def _patterns(data: ReportData, figures: list[DrawnFigure]) -> str:
    if not data.patterns:
        return ""
    caption = next((f.caption for f in figures if f.name == "fig4_patterns"), "")
    links = " · ".join(f'<a href="figures/fig4_patterns.{kind}">{kind.upper()}</a>' for kind in ("svg", "png"))
    out = [
        f'<p class="caption">{esc(caption)} K = {data.k}, counted above {data.activation_threshold:g} of the maximum. {links}</p>'
    ]
    out.append(
        '<p class="scale" aria-hidden="true">activation '
        + "".join(f'<span class="a{i}">.{i}</span>' for i in range(1, 10))
        + "</p>"
    )
    heading = ""
    for pattern in ordered_patterns(data):
        title = f"{pattern.role.capitalize()}: {pattern.model}, step {pattern.step:,}, layer {pattern.layer}"
        if title != heading:
            out.append(f"<h3>{esc(title)}</h3>")
            heading = title
        out.append(f'<div class="pattern"><h4>{esc(describe(pattern, data))}</h4><ul>')
        for language, spans in pattern.examples:
            text = "".join(_span(text, activation, data.activation_threshold) for text, activation in spans)
            out.append(f'<li><span class="code">{esc(language)}</span><bdi lang="{esc(language)}">{text}</bdi></li>')
        out.append("</ul></div>")
    return "".join(out)


def _span(text: str, activation: float, threshold: float) -> str:
    if activation < 0.05:
        return esc(text)
    level = min(9, max(1, round(activation * 10)))
    tag = "mark" if activation > threshold else "span"
    return f'<{tag} class="a{level}" title="{activation:.2f}">{esc(text)}</{tag}>'


def _numbers(data: ReportData, main: str, layer: int, last: int) -> str:
    steps = tables.evolution_table(data, data.over_steps(main), "step", f"Over training: {main}, layer {layer}")
    layers = tables.evolution_table(data, data.rows(main, step=last), "layer", f"Over layers: {main}, step {last:,}")
    others = "".join(
        f"<details><summary>{esc(model)}, layer {data.middle_layer(model)}, over training</summary>"
        + tables.evolution_table(data, data.over_steps(model), "step", model)
        + "</details>"
        for model in [*reversed(data.models()), *(m for _, m in data.control_models())]
        if model != main
    )
    return (
        "<p>Shares are per cent of the alive features, with 95 % bootstrap intervals over the "
        "features of one SAE. Every setup is in "
        "<code>tables/evolution.csv</code> of the run directory.</p>"
        + steps
        + layers
        + "<h3>Controls</h3>"
        + tables.controls_table(data)
        + others
        + tables.feature_counts(data)
        + tables.turning_table(data)
        + tables.seeds_table(data)
        + tables.truth_table(data)
    )


def _words(data: ReportData) -> str:
    names = " or ".join(data.language_name(code) for code in data.languages)
    rows = [
        (names, "a feature with more than 90 % of its counted positions (as rates) in documents of that language"),
        (
            "mixed",
            "any other feature with enough counted positions. Mixed is not bilingual: random tokens meet both languages, too",
        ),
        (
            "bilingual",
            f"mixed, and it fires in a sentence and in its translation together: phi minus that of "
            f"shuffled pairs is at least {data.phi_threshold:g}",
        ),
        (
            "bilingual_paper",
            f"mixed, not single-token, and monosemanticity R at least "
            f"{data.monosemanticity_threshold:g}; our wording of the paper's idea",
        ),
        (
            "neutral, unclassified, dead",
            "mostly tokens without letters or shared by the languages; too few counted positions; never active on the test text",
        ),
        ("monosemanticity R", "1 - entropy of the clusters of a feature's tokens / entropy of the tokens"),
        ("coherence", "1 - expected entropy of 50 of its positions / log 50: less bent by how often a feature fires"),
        ("alignment", "cosine of aligned sentences' mean states minus that of shuffled pairs: no SAE is involved"),
        (
            "counted",
            f"a position where the feature is among the K = {data.k} active ones, above "
            f"{data.activation_threshold:g} of its maximum",
        ),
    ]
    return "<dl class=words>" + "".join(f"<dt>{esc(a)}</dt><dd>{esc(b)}.</dd>" for a, b in rows) + "</dl>"


def _detectable(data: ReportData) -> str:
    if not data.detectable:
        return "<p>Not computed.</p>"
    return table(
        ("what", "value"),
        [(esc(name.replace("_", " ")), esc(text)) for name, text in flat(data.detectable)],
        numeric=False,
    )


def _sources(data: ReportData) -> str:
    return (
        f'<p>The method is that of {esc(CITATION)}, <a href="{PAPER_URL}">arXiv 2503.06394</a>. This report was '
        "made by glottoscope; what differs from the paper stands under “Choices that are ours”. "
        "Japanese glyphs: IPAexGothic, IPA Font License v1.0.</p>" + tables.licences_table(data)
    )
