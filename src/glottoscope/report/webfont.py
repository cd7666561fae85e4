"""Japanese on any reader's machine: the page carries the glyphs that it shows, as a subset of IPAexGothic.

The IPA Font License v1.0 lets a document embed the font; the page names it.
"""

from __future__ import annotations

import base64
import io

from fontTools import subset
from fontTools.ttLib import TTFont

from glottoscope.report.style import japanese_font

FAMILY = "glottoscope Japanese"


def font_face(text: str) -> str:
    """A CSS `@font-face` with the glyphs of `text` beyond Latin; empty where there are none. Same text, same bytes."""
    with TTFont(japanese_font(), recalcTimestamp=False) as font:
        wanted = sorted(code for code in set(map(ord, text)) & set(font.getBestCmap() or {}) if code >= 0x2E80)
        if not wanted:
            return ""
        options = subset.Options(layout_features=[], hinting=False, notdef_outline=True, drop_tables=["DSIG"])
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=wanted)
        subsetter.subset(font)
        font.flavor = "woff"
        out = io.BytesIO()
        font.save(out)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return f'@font-face {{ font-family: "{FAMILY}"; src: url(data:font/woff;base64,{data}) format("woff"); }}\n'
