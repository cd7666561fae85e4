"""The report's page and figures: complete, self-contained, deterministic, safe, and whole with any data."""

from __future__ import annotations

import itertools
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixture import evolution_rows, report_data

from glottoscope.errors import InputError
from glottoscope.report.data import KEY, ReportData
from glottoscope.report.html import esc
from glottoscope.report.page import build_report
from glottoscope.report.style import drawable, missing_glyphs, spread, visible
from glottoscope.report.webfont import font_face


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(report_data(), tmp_path_factory.mktemp("report"))


def text_of(html: str) -> str:
    class Reader(HTMLParser):
        out: list[str] = []  # noqa: RUF012

        def handle_data(self, data: str) -> None:
            self.out.append(data)

    reader = Reader()
    reader.out = []
    reader.feed(html)
    return " ".join(" ".join(reader.out).split())


def test_files_and_self_containment(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    names = {p.name for p in (report.parent / "figures").iterdir()}
    for name in (
        "fig3_steps_toy-128",
        "fig3_steps_toy-64",
        "fig4_patterns",
        "fig5_layers_toy-128",
        "heat_toy-128",
        "heat_toy-128-negative",
        "sizes",
        "sweeps",
        "control_vs_main",
        "quality_steps",
    ):
        assert {f"{name}.svg", f"{name}.png"} <= names
    assert "<script" not in html.lower()
    loaded = re.findall(r'(?:src|srcset)="([^"]*)"|url\(([^)]*)\)|@import|<link', html)
    assert all(match[1].startswith(("#", "data:font/woff;base64,")) for match in loaded if isinstance(match, tuple)), loaded
    assert set(re.findall(r'<a href="(http[^"]*)"', html)) == {"https://arxiv.org/abs/2503.06394"}
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', html):
        assert target in ids
    for figure in re.findall(r'href="(figures/[^"]+)"', html):
        assert (report.parent / figure).is_file()


def test_same_data_same_bytes(report: Path, tmp_path: Path) -> None:
    again = build_report(report_data(), tmp_path)
    for old in [report, *sorted((report.parent / "figures").iterdir())]:
        assert old.read_bytes() == (again.parent / old.relative_to(report.parent)).read_bytes(), old.name


def test_svg_parses_and_has_no_text_elements(report: Path) -> None:
    for svg in (report.parent / "figures").glob("*.svg"):
        root = ElementTree.parse(svg).getroot()
        assert not list(root.iter("{http://www.w3.org/2000/svg}text")), "text must be paths"
        assert not list(root.iter("{http://www.w3.org/2000/svg}image"))


def test_hostile_text_is_shown_not_obeyed(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "‹U+202E›evil‹U+0000›" in html
    assert not set(html) & set("\u202e\u2066\x00")
    assert "planted &lt;demo&gt;" in html


def test_page_says_what_it_must(report: Path) -> None:
    text = text_of(report.read_text(encoding="utf-8"))
    for words in (
        "Mixed is not bilingual",
        "property of a random model",
        "K = 4",
        "Findings of EMNLP 2025",
        "2503.06394",
        "46 of 182",
        "planted world",
        "torch",
        "two SAEs with 180 alive features",
        "not known to us",
        "no claim",
        "The planted world is a toy",
    ):
        assert words in text, words
    assert '<bdi lang="ja">' in report.read_text(encoding="utf-8")


def without(data: ReportData, *columns: str) -> pa.Table:
    return data.evolution.drop_columns([c for c in data.evolution.column_names if c.startswith(columns)])


def nulls(table: pa.Table) -> pa.Table:
    keep = {*KEY, "share_mixed"}
    return pa.table({c: table[c] if c in keep else pa.nulls(len(table), table[c].type) for c in table.column_names})


def bare(rows: list[dict[str, Any]], **changes: Any) -> ReportData:
    fields: dict[str, Any] = {
        "name": "bare",
        "evolution": pa.Table.from_pylist(rows),
        "languages": ["en", "ja"],
        "k": 32,
    }
    return ReportData(**(fields | changes))


LANGUAGES = ("en", "ja", "de")
CASES: dict[str, ReportData] = {
    "one checkpoint": bare(evolution_rows("m", "none", steps=(1500,))),
    "only step 0": bare(evolution_rows("m", "none", steps=(0,))),
    "one layer": bare(evolution_rows("m", "none", layers=(3,))),
    "one row": bare(evolution_rows("m", "none", steps=(30,), layers=(0,))),
    "three languages": bare(evolution_rows("m", "none", languages=LANGUAGES), languages=list(LANGUAGES)),
    "nulls": bare([], evolution=nulls(pa.Table.from_pylist(evolution_rows("m", "none")))),
    "key columns only": bare([], evolution=pa.Table.from_pylist(evolution_rows("m", "none")).select([*KEY, "share_mixed"])),
    "only a control": bare(evolution_rows("m", "negative")),
    "hostile model name": bare(evolution_rows("$a_{b}$ <i>", "none", steps=(0, 10))),
}


@pytest.mark.parametrize("case", CASES)
def test_any_shape_of_study_renders(case: str, tmp_path: Path) -> None:
    page = build_report(CASES[case], tmp_path)
    text = text_of(page.read_text(encoding="utf-8"))
    assert "nan" not in re.split(r"\W+", text.lower())
    assert list((tmp_path / "figures").glob("fig3_steps_*.png"))


def test_the_page_carries_its_japanese_glyphs(report: Path) -> None:
    match = re.search(r"data:font/woff;base64,([A-Za-z0-9+/=]+)", report.read_text(encoding="utf-8"))
    assert match is not None
    with TTFont(BytesIO(b64decode(match.group(1)))) as font:
        held = {chr(code) for code in font.getBestCmap() or {}}
    assert set("その古い川は冷たかった") <= held and len(held) < 100
    assert font_face("no Japanese") == ""


def test_old_figures_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fig3_steps_old.svg").write_text("old")
    build_report(CASES["one row"], tmp_path)
    assert not (tmp_path / "figures" / "fig3_steps_old.svg").exists()


def test_unusable_tables_are_input_errors() -> None:
    with pytest.raises(InputError, match="tokens_seen"):
        bare([], evolution=pa.Table.from_pylist(evolution_rows("m", "none")).drop_columns(["tokens_seen"]))
    with pytest.raises(InputError, match="no rows"):
        bare([], evolution=pa.Table.from_pylist(evolution_rows("m", "none")).slice(0, 0))


def test_japanese_has_glyphs_and_absent_characters_are_found() -> None:
    assert (
        missing_glyphs(["日本語の特徴、ひらがな・カタカナ「引用」ー々〆ヶ", "明治 昭和 平成 天皇 藤原氏", "Mixed ≥ 0.5 – …"])
        == set()
    )
    assert missing_glyphs(["漢字 \U00013000 ok"]) == {"\U00013000"}
    assert drawable("漢\U00013000") == "漢□"


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_escaped_text_is_inert(text: str) -> None:
    safe = esc(text)
    assert not set(safe) & set('<>"\x00\u202e\u2067\u200f')
    safe.encode("utf-8")
    assert missing_glyphs([drawable(text)]) == set()
    assert visible(visible(text)) == visible(text)


@given(st.lists(st.tuples(st.floats(-1, 2), st.floats(0.01, 0.4)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_labels_never_overlap_and_keep_order(items: list[tuple[float, float]]) -> None:
    positions, sizes = [p for p, _ in items], [s for _, s in items]
    placed = spread(positions, sizes, 0.0, 1.0)
    shrink = min(1.0, 1 / sum(sizes))
    order = np.argsort(positions, kind="stable")
    for a, b in itertools.pairwise(order):
        assert placed[b] - placed[a] >= shrink * (sizes[a] + sizes[b]) / 2 - 1e-9
    assert min(p - shrink * s / 2 for p, s in zip(placed, sizes, strict=True)) >= -1e-9
    assert max(p + shrink * s / 2 for p, s in zip(placed, sizes, strict=True)) <= 1 + 1e-9
