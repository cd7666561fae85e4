"""Text and SVG made safe for one HTML page: escaping, attributes, figures that follow the page's colours."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glottoscope.report import style
from glottoscope.report.data import short_number

_THEMED = (
    style.INK,
    style.MUTED,
    style.FAINT,
    style.GRID,
    style.PAPER,
    style.BLUE,
    style.VERMILLION,
    style.GREEN,
    style.PURPLE,
    style.ORANGE,
    style.SKY,
    style.PAPER_RULE,
    style.YELLOW,
    *(words for words in style.WORDS.values() if words != style.MUTED),
)
_DARK = {
    style.INK: "#e6edf3",
    style.MUTED: "#9aa4af",
    style.FAINT: "#6e7781",
    style.GRID: "#30363d",
    style.PAPER: "#161b22",
    style.BLUE: "#58a6e8",
    style.VERMILLION: "#f0883e",
    style.GREEN: "#2fc79a",
    style.PURPLE: "#dc9cc0",
    style.ORANGE: "#f0b429",
    style.SKY: "#7cc7f2",
    style.PAPER_RULE: "#4f9f86",
    style.YELLOW: "#f0e442",
}
_DARK |= {words: _DARK[line] for line, words in style.WORDS.items() if words not in _DARK}  # light enough on dark paper
_HEX = re.compile("|".join(re.escape(colour) for colour in _THEMED))
_IDS = re.compile(r'(\bid="|href="#|url\(#)')
_PROLOG = re.compile(r"^.*?(?=<svg )", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)


def esc(text: object) -> str:
    """Any text as HTML text or attribute value; control, bidi and unpaired characters are shown, not obeyed."""
    return html.escape(style.visible(str(text)), quote=True)


def colour_variables(*, dark: bool) -> str:
    """CSS custom properties of the figures' colours."""
    return " ".join(f"--c-{c[1:]}: {_DARK[c] if dark else c};" for c in _THEMED)


def inline_svg(svg: str, name: str, label: str) -> str:
    """A figure's SVG for use inside the page: own ids, colours as variables, an accessible name, no fixed size."""
    svg = _METADATA.sub("", _PROLOG.sub("", svg))
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg [^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s*<title>.*?</title>", "", svg, count=1, flags=re.DOTALL)
    svg = _IDS.sub(lambda match: f"{match.group(1)}{name}-", svg)
    svg = _HEX.sub(lambda match: f"var(--c-{match.group(0)[1:]})", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{esc(label)}" ', 1).strip()


def number(value: Any, digits: int = 2) -> str:
    """A number of a table cell; an en dash where null or NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", numeric: bool = True) -> str:
    """An HTML table in a box that scrolls sideways on narrow screens. Cells are HTML already."""
    out = [f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption) or "table"}">']
    out.append(f'<table class="{"num" if numeric else "words"}">')
    out.append(f"<caption>{esc(caption)}</caption>" if caption else "")
    out.append("<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr></thead><tbody>")
    for row in rows:
        first, *others = row
        out.append(f'<tr><th scope="row"><span>{first}</span></th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>")
    return "\n".join([*filter(None, out), "</tbody></table></div>"])


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted name, text) rows."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in flat(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return [row for i, item in enumerate(value) for row in flat(item, f"{path}[{i}]")]
    if isinstance(value, (list, tuple)):
        return [(path, ", ".join(plain(item) for item in value))]
    return [(path, plain(value))]


def plain(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def definition_table(value: Mapping[str, Any], names: tuple[str, str], caption: str) -> str:
    """A nested mapping as a two-column table."""
    rows = [(f"<code>{esc(name)}</code>", esc(text)) for name, text in flat(value)]
    return table(names, rows, caption=caption, numeric=False) if rows else "<p>None recorded.</p>"


def tokens(value: Any) -> str:
    """Tokens seen in a table cell."""
    return "–" if value is None else short_number(float(value))
