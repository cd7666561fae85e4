# ruff: noqa: E501 (a style sheet reads best with one rule a line)
"""The page's style: calm, light and dark, from 360 px to wide screens."""

from __future__ import annotations

from glottoscope.report.html import colour_variables
from glottoscope.report.webfont import FAMILY, font_face

_CSS = """
:root { color-scheme: light dark; LIGHT
  --bg: #ffffff; --card: #ffffff; --text: #1f2328; --soft: #57606a; --line: #d8dee4; --link: #0b5cad; --tint: #f6f8fa; --shade: 230, 159, 0; }
@media (prefers-color-scheme: dark) { :root { DARK
  --bg: #0d1117; --card: #161b22; --text: #e6edf3; --soft: #9aa4af; --line: #30363d; --link: #6cb6ff; --tint: #161b22; --shade: 214, 142, 20; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--text); line-height: 1.55; font-size: 1rem;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Hiragino Sans", "Noto Sans CJK JP", "Yu Gothic", "FAMILY", sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1.25rem clamp(.9rem, 3vw, 2.5rem) 4rem; }
a { color: var(--link); }
h1 { font-size: clamp(1.45rem, 1.1rem + 1.6vw, 2.2rem); line-height: 1.2; margin: .2rem 0 1rem; max-width: 34ch; text-wrap: balance; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
h4 { font-size: .9rem; margin: 0 0 .3rem; font-weight: 600; color: var(--soft); }
p, dl.words, header ul { max-width: 75ch; }
.eyebrow { color: var(--soft); font-size: .87rem; margin: 0; }
.answer, .told { font-size: 1.06rem; margin: .5rem 0; overflow-wrap: anywhere; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(9.2rem, 46%), 1fr)); gap: .6rem; margin: 1.1rem 0; }
.stats div { display: flex; flex-direction: column-reverse; justify-content: flex-end; background: var(--tint); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem; }
.stats dt { font-size: .82rem; color: var(--soft); line-height: 1.35; }
.stats dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.caveats summary { font-weight: 600; cursor: pointer; }
.caveats ul { margin: .4rem 0; padding-left: 1.15rem; font-size: .93rem; }
.caveats li { margin: 0 0 .4rem; overflow-wrap: anywhere; break-inside: avoid; }
@media (min-width: 70rem) { header .caveats ul { max-width: none; columns: 2; column-gap: 2.2rem; } }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: .7rem 0 0; margin: 1rem 0 0; border-top: 1px solid var(--line); font-size: .9rem; }
#curves, .figures { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.2rem 2.2rem; align-items: start; }
#curves > h2 { grid-column: 1 / -1; margin-bottom: 0; }
@media (min-width: 70rem) { #curves, .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (min-width: 130rem) { main { max-width: 124rem; } #curves, .figures { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
figure { margin: 0; background: var(--card); min-width: 0; padding: .5rem .9rem .8rem; border: 1px solid var(--line); border-radius: .5rem; }
figure h3 { margin: .4rem 0; }
figcaption, .caption { font-size: .85rem; color: var(--soft); margin-top: .4rem; max-width: 75ch; overflow-wrap: anywhere; }
figcaption span { white-space: nowrap; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
figure svg { display: block; width: 100%; height: auto; min-width: 31rem; max-width: 46rem; }
table { border-collapse: collapse; font-size: .84rem; margin: .9rem 0 1.3rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; font-size: .9rem; white-space: nowrap; }
th, td { padding: .26rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; white-space: nowrap; }
.num { font-variant-numeric: tabular-nums; }
.num th, .num td { text-align: right; white-space: nowrap; }
.num th:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); }
.words tbody th { font-weight: 500; } .words td, .words th { overflow-wrap: anywhere; min-width: 9rem; max-width: 60ch; }
td small { color: var(--soft); }
dl.words dt { font-weight: 600; margin-top: .55rem; } dl.words dd { margin: 0 0 0 1rem; }
.under td small { display: block; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.2rem; align-items: flex-start; } .pair > * { min-width: 0; }
.findings, .limits { max-width: 82ch; padding-left: 1.15rem; font-size: .93rem; } .findings li, .limits li { margin: 0 0 .45rem; overflow-wrap: anywhere; break-inside: avoid; }
@media (min-width: 70rem) { .findings, .limits { max-width: none; columns: 2; column-gap: 2.6rem; } }
.tag { color: var(--soft); border: 1px solid var(--line); background: var(--tint); border-radius: .8rem; padding: .04rem .55rem; font-size: .84rem; }
details > summary { cursor: pointer; margin: .5rem 0; }
.pattern { margin: .55rem 0 1rem; }
.pattern ul { list-style: none; margin: 0; padding: 0; }
.pattern li { display: flex; gap: .7rem; padding: .16rem 0; border-bottom: 1px solid var(--line); }
.pattern bdi { overflow-wrap: anywhere; white-space: pre-wrap; line-height: 1.75; min-width: 0; }
.code { color: var(--soft); font-size: .78rem; flex: 0 0 1.9rem; padding-top: .25rem; }
.scale { font-size: .8rem; color: var(--soft); } .scale span { padding: .1rem .35rem; color: var(--text); }
mark { color: inherit; background: none; text-decoration: underline; text-decoration-thickness: 2px; text-decoration-color: var(--c-0072b2); text-underline-offset: 3px; }
code { font-family: ui-monospace, SFMono-Regular, Consolas, monospace; font-size: .92em; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  figure { padding-inline: .6rem; }
  figure h3::after { content: "swipe for the whole figure →"; display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
  caption { white-space: normal; max-width: calc(100vw - 1.8rem); }
  .num tbody th span { display: block; width: max-content; max-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
  .words td, .words th { min-width: 6rem; padding-inline: .35rem; } }
@media print { nav { display: none; } #curves, .figures { display: block; } figure { break-inside: avoid; } }
"""


def stylesheet(text: str) -> str:
    """CSS of a page that shows `text`, with the figures' colours and the Japanese glyphs it needs."""
    levels = "\n".join(f".a{i} {{ background: rgba(var(--shade), {0.08 + 0.062 * i:.3f}); }}" for i in range(1, 10))
    return (
        font_face(text)
        + _CSS.replace("FAMILY", FAMILY).replace("LIGHT", colour_variables(dark=False)).replace("DARK", colour_variables(dark=True))
        + levels
        + "\n"
    )
