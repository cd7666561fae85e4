"""How a part looks in every figure of the intervention."""

from __future__ import annotations

from glottoscope.report.intervention_view import View
from glottoscope.report.style import BILINGUAL, INK, MIXED, ORANGE, PAPER_RULE, PURPLE, SKY, language_colour, language_marker

_KNOWN = {"mixed": (MIXED, "o"), "bilingual": (BILINGUAL, "D"), "bilingual_paper": (PAPER_RULE, "p"), "all": (INK, "*")}
_OWN = ((ORANGE, "h"), (SKY, "v"), (PURPLE, "<"))


def part_style(view: View, part: str) -> tuple[str, str]:
    """(colour, marker) of a part: the class's own in the rest of the report; parts named by the user take turns."""
    if part in view.data.languages:
        i = view.data.languages.index(part)
        return language_colour(i), language_marker(i)
    if part in _KNOWN:
        return _KNOWN[part]
    own = [name for name in view.parts if name not in _KNOWN and name not in view.data.languages]
    return _OWN[own.index(part) % len(_OWN)]
