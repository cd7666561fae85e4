"""“Does it cause anything?”: statements that follow from the numbers, the paper's table, figures for what was measured."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixture import EMPTY, PARTS, POOL_NOTE, PartEffect, evolution_rows, intervention_rows, intervention_table, report_data

from glottoscope.errors import InputError
from glottoscope.report.data import INTERVENTION, ReportData
from glottoscope.report.figures_intervention import intervention_figures
from glottoscope.report.intervention import Finding, Story, stories
from glottoscope.report.intervention_limits import limits, summary
from glottoscope.report.intervention_numbers import change_words, digits_of, signed
from glottoscope.report.intervention_section import PUBLISHED, section
from glottoscope.report.intervention_view import Target, View, view_of
from glottoscope.report.page import build_report, page
from glottoscope.report.style import render, style

BASE_NLL = 3.65  # of the made-up base, pooled


def with_rows(*parts: list[dict[str, Any]]) -> ReportData:
    """A report on one checkpoint and three layers: its other figures are few."""
    evolution = pa.Table.from_pylist(evolution_rows("toy-128", "none", steps=(1500,), layers=(1, 2, 3)))
    return report_data(evolution=evolution, sweeps=None, intervention=intervention_table(*parts))


def view(*parts: list[dict[str, Any]]) -> View:
    found = view_of(with_rows(*parts))
    assert found is not None
    return found


def story(part: PartEffect, name: str = "mixed", **changes: Any) -> tuple[View, Story, Finding]:
    """One part at one base step, in words."""
    seen = view(intervention_rows({name: part}, **changes))
    told = stories(seen)
    assert len(told) == 1 and len(told[0].findings) == 1
    return seen, told[0], told[0].findings[0]


def test_a_clear_effect_beyond_the_draws() -> None:
    seen, told, found = story(PartEffect(-0.05, draws=(-0.01, 0.004), outside=(-0.01, 0.004), own=-0.01, shuffled=0.02))
    assert (found.verdict, found.beyond, found.tag) == ("better", True, "lowers perplexity, beyond its random draws")
    before, after = math.exp(BASE_NLL), math.exp(BASE_NLL - 0.05)
    assert f"It lowers pooled perplexity (from {before:.2f} to {after:.2f}: −{before - after:.2f} [" in found.text
    assert f"{100 * 0.05 / 1.3:.1f} % [" in found.text and "of the gap to the donor in log perplexity" in found.text
    assert "better than all 32 draws from all alive features (−" in found.text
    assert "better than all 32 draws from outside the class (−" in found.text
    assert "The base's own part does less (−" in found.text and "what is read matters" in found.text
    ending = "So it does what random features of the same mass, the base's own part and the part of another text do not."
    assert found.text.endswith(ending)
    assert summary(seen, [told]).endswith(
        "On held-out documents 1 of them lowers pooled perplexity with the 95 % interval below 0. Better than random features of "
        "the same activation mass: mixed. On aligned sentences 1 of them lowers pooled perplexity with the 95 % interval below 0. "
        "Better than random features of the same activation mass: mixed."
    )


def test_an_effect_that_random_features_have_too() -> None:
    seen, told, found = story(PartEffect(-0.02, draws=(-0.02, 0.01), outside=(-0.02, 0.01)))
    effect = told.setting.at("part", "mixed", "documents", Target("ppl", "all"))
    assert effect is not None and effect.rank is not None and effect.rank > 5
    assert (found.verdict, found.beyond) == ("better", False)
    assert f"{effect.rank - 1} of 32 draws from all alive features do at least as well" in found.text
    assert found.text.endswith("is not shown to be specific to the class: some random features of its mass help as much.")
    assert "None of these is shown to do better than random features" in summary(seen, [told])
    assert any("is no evidence for the class. Some draws did at least as well as mixed." in text for text in limits(seen, [told]))


def test_one_pool_alone_is_not_enough() -> None:
    _, _, found = story(PartEffect(-0.02, draws=(-0.02, 0.01), outside=(0.0, 0.001)))
    assert "better than all 32 draws from outside the class" in found.text
    assert found.beyond is False and found.tag.endswith("but some random draws do as much")


@pytest.mark.parametrize(
    ("own", "shuffled", "words", "ending"),
    [
        (-0.05, 0.02, "The base's own part: −", "but the base's own part may do as much."),
        (-0.09, 0.02, "The base's own part does more (−", "but the base's own part does more."),
        (0.0, -0.05, "The part of another text: −", "but what is read is not shown to matter."),
        (0.0, -0.09, "The part of another text does more (−", "but what is read does not help."),
    ],
)
def test_controls_that_do_as_much_are_doubts(own: float, shuffled: float, words: str, ending: str) -> None:
    _, _, found = story(PartEffect(-0.05, own=own, shuffled=shuffled))
    assert found.beyond and words in found.text and found.text.endswith(ending)


def test_no_effect() -> None:
    seen, told, found = story(PartEffect(-0.001))
    assert (found.verdict, found.beyond, found.tag) == ("unclear", None, "no change that can be told from 0")
    assert found.text.startswith("No change of pooled perplexity that this study can tell from 0 (from 38.47 to ")
    assert "does less" not in found.text and "So it" not in found.text
    assert summary(seen, [told]).endswith("On aligned sentences none lowers pooled perplexity with its 95 % interval below 0.")


def test_harm() -> None:
    seen, told, found = story(PartEffect(0.03, draws=(0.0, 0.004), outside=(0.03, 0.01)))
    assert (found.verdict, found.tag) == ("worse", "raises perplexity")
    assert "It raises pooled perplexity" in found.text and "it does harm" in found.text
    assert "more harm than all 32 draws from all alive features" in found.text
    assert "do as much harm or more" in found.text and "So it is not shown to be specific to the class." in found.text
    assert found.beyond is False
    assert "1 raises it: mixed." in summary(seen, [told])


@pytest.mark.parametrize(("change", "verdict"), [(-0.05, "better"), (0.05, "worse")])
def test_draws_that_do_the_same_count_against_the_part(change: float, verdict: str) -> None:
    """A rank tells draws that do at least as well, so one that does just as much harm is not seen in it."""
    rows = intervention_rows({"mixed": PartEffect(change, draws=(0.0, 0.001), outside=None)}, translation=(), dev=False)
    table = {(r["text"], r["metric"], r["language"]): r for r in rows if r["arm"] == "part" and r["chosen"]}
    for row in rows:
        part = table.get((row["text"], row["metric"], row["language"]))
        if row["arm"] == "random" and row["draw"] < 2:
            assert part is not None
            row |= {"change": part["change"], "value": part["value"]}
        elif row["arm"] == "part" and row["chosen"]:
            row |= {"rank": 3 if verdict == "better" else 33, "n_random": 32}
    seen = view(rows)
    found = stories(seen)[0].findings[0]
    assert (found.verdict, found.beyond) == (verdict, False)
    does = "do at least as well" if verdict == "better" else "do as much harm or more"
    assert f"2 of 32 draws from all alive features {does} (" in found.text
    assert "The rank is 1 + the draws that do at least as well" in section(with_rows(rows), "")


def test_an_empty_class_and_a_pool_too_small_are_named() -> None:
    rows = intervention_rows({"bilingual": EMPTY, "mixed": PartEffect(-0.05, outside=None, note=POOL_NOTE)})
    seen = view(rows)
    told = stories(seen)
    mixed, bilingual = told[0].findings
    assert (bilingual.verdict, bilingual.tag) == ("missing", "not tested: empty class")
    assert "no draws from outside the class (pool too small)" in mixed.text
    assert mixed.beyond is True  # by the pool that there is
    assert "Not tested, empty class: bilingual." in limits(seen, told)
    html = section(with_rows(rows), "")
    assert "<small>empty class</small>" in html and "<small>pool too small</small>" not in html


def test_too_few_draws() -> None:
    seen, told, found = story(PartEffect(-0.05), n_random=8)
    assert (found.beyond, found.tag) == (None, "lowers perplexity, too few random draws to tell")
    assert "with fewer than 19 draws the rank cannot reach 5 %" in found.text
    assert any("Some ranks are among 8 draws" in text for text in limits(seen, [told]))
    assert "Not tested against enough random draws: mixed." in summary(seen, [told])


def test_no_draws_at_all() -> None:
    seen, told, found = story(PartEffect(-0.05, draws=None, outside=None))
    assert (found.beyond, found.tag) == (None, "lowers perplexity, no random draws to compare with")
    assert found.text.endswith("whether the class has to do with it was not tested.")
    assert "No random features were drawn, so no effect can be ascribed to a class." in limits(seen, [told])


@pytest.mark.parametrize(
    ("n", "better", "beyond"),
    [
        (1, 0, None),
        (18, 0, None),
        (18, 1, False),
        (19, 0, True),
        (19, 1, False),
        (32, 1, False),
        (39, 1, True),
        (99, 4, True),
        (99, 5, False),
    ],
)
def test_beyond_the_draws_is_a_rank_within_five_per_cent(n: int, better: int, beyond: bool | None) -> None:
    rows = intervention_rows({"mixed": PartEffect(-0.05, draws=None, outside=None)}, translation=(), dev=False)
    for row in rows:
        if row["arm"] == "part" and row["chosen"]:
            row |= {"rank": better + 1, "n_random": n}
    found = stories(view(rows))[0].findings[0]
    assert found.beyond is beyond
    if beyond and better:
        assert f"better than all but {better} of {n} draws from all alive features" in found.text


def test_own_language_and_other_texts() -> None:
    _, _, found = story(PartEffect(-0.02, lean=1.5), name="en")
    assert found.name == "English"
    assert "By language: English lower (−" in found.text and "Japanese higher (+" in found.text
    assert (
        "On aligned sentences: lower, too (−" in found.text and "32 draws from all alive features do at least as well" in found.text
    )


def test_what_was_done_is_said() -> None:
    _, told, _ = story(PartEffect(-0.05))
    assert told.title == "Base: step 300. Donor: step 1,500."
    for words in (
        "At layer 2 of toy-128",
        "step 1,500 (the donor, 1,536,000 tokens seen) was added with alpha = 0.4",
        "step 300 (the base, 307,200 tokens seen), scaled to the norm of the base's state.",
        "Measured on held-out documents (240 units), aligned sentences (90 units) and translation (80 units).",
        "Pooled perplexity on held-out documents: 38.47 before, 10.49 in the donor itself.",
    ):
        assert words in told.done, words
    _, told, _ = story(PartEffect(-0.05), layers="1+2+3", mode="replace", scale="raw")
    assert "At layers 1, 2 and 3 together" in told.done
    assert "was taken out and that of step 1,500" in told.done and "in the donor's own scale" in told.done


def test_a_donor_that_is_another_model_is_named() -> None:
    rows = [row | {"donor_model": "toy-128-negative"} for row in intervention_rows({"mixed": PartEffect(-0.05)})]
    told = stories(view(rows))[0]
    assert told.title == "Base: step 300. Donor: toy-128-negative, step 1,500."
    assert "state at toy-128-negative, step 1,500 (the donor" in told.done


def test_alpha_with_and_without_dev_text() -> None:
    parts = {"all": PartEffect(-0.08, draws=None, outside=None)}
    chosen = view(intervention_rows(parts))
    assert "Alpha was chosen on dev text from 0.1, 0.2, 0.4, 0.8 and 1, by perplexity" in stories(chosen)[0].done
    apart = view(
        intervention_rows(parts, texts=("documents",), translation=()),
        intervention_rows(parts, texts=("sentences",), translation=(), chosen=0.8),
    )
    assert "was added with alpha = 0.4 (held-out documents) and 0.8 (aligned sentences) to" in stories(apart)[0].done
    given_ = view(intervention_rows(parts, alphas=(0.4,), dev=False))
    assert "Alpha was given, not chosen on dev text." in stories(given_)[0].done
    assert any(text.startswith("Alpha was given") for text in limits(given_, stories(given_)))
    untold = view(intervention_rows(parts, dev=False))
    assert any("looks better than it is" in text for text in limits(untold, stories(untold)))


def test_translation_in_words() -> None:
    seen, told, _ = story(PartEffect(-0.05, translation=0.3))
    others = dict(told.others)
    assert "no change can be told from 0" in others["chrF, English → Japanese"]
    assert "noise, as far as this study can see" in others["chrF, Japanese → English"]
    assert others["BLEU, exact match and concept recall"].startswith("0 of 6 changes")
    assert any("whose interval holds 0 is noise" in text for text in limits(seen, [told]))
    _, told, _ = story(PartEffect(-0.05, translation=3.0), translation=("chrf", "comet"))
    others = dict(told.others)
    assert "mixed better (+" in others["COMET, English → Japanese"]  # COMET goes before chrF
    assert "0 of 32 random draws do at least as well" in others["COMET, English → Japanese"]
    assert others["chrF"].startswith("2 of 2 changes")
    seen, told, _ = story(PartEffect(-0.05), translation=())
    assert "Translation was not measured: nothing is said about it." in limits(seen, [told])


def test_translation_alone() -> None:
    seen = view(intervention_rows({"mixed": PartEffect(-0.05)}, texts=(), dev=False))
    assert seen.texts == [] and stories(seen)[0].findings == []
    html = section(with_rows(intervention_rows({"mixed": PartEffect(-0.05)}, texts=(), dev=False)), "")
    assert "chrF en → ja" in html and "PPL English" not in html
    assert "nothing is concluded about any class" in html


def test_comparisons_are_counted() -> None:
    seen = view(intervention_rows(PARTS))
    texts = limits(seen, stories(seen))
    assert any(text.startswith("5 parts are compared here") and "beat all of at least 99 draws" in text for text in texts)
    assert any("hold for this one language model and this one SAE" in text for text in texts)
    more = view(intervention_rows({"mixed": PARTS["mixed"]}), intervention_rows({"mixed": PARTS["mixed"]}, sae_seed=1))
    assert any("1 LM seed and 2 SAE seeds were run" in text for text in limits(more, stories(more)))


def test_missing_controls_are_named() -> None:
    rows = [row for row in intervention_rows({"mixed": PARTS["mixed"]}) if row["arm"] not in ("self", "reconstruction")]
    seen = view(rows)
    assert "Not measured: self-injection and the SAE's reconstruction as a ceiling." in limits(seen, stories(seen))


def test_settings_are_kept_apart() -> None:
    """Modes, layers and experiments with the same base are different rows, never mixed."""
    rows = [
        intervention_rows({"mixed": PartEffect(-0.05)}),
        intervention_rows({"mixed": PartEffect(-0.01)}, mode="replace"),
        intervention_rows({"mixed": PartEffect(-0.02)}, layers="1"),
        [row | {"experiment": "by hand"} for row in intervention_rows({"mixed": PartEffect(-0.03)})],
    ]
    seen = view(*rows)
    assert len(seen.keys) == 4 and len(seen.main) == 1
    main = seen.main[0]
    assert (main.experiment, main.mode, main.layers) == ("study", "add", "2")  # the study's own, at the middle layer
    target = Target("nll", "all")
    effect = main.at("part", "mixed", "documents", target)
    assert effect is not None and effect.change == pytest.approx(-0.05)
    assert len(main.draws("random", "mixed", "documents", target)) == 32
    html = section(with_rows(*rows), "")
    assert "Other settings (3)" in html and "by hand: toy-128" in html and ", replace, matched" in html


def named(name: str, *parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the command line."""
    return [row | {"experiment": name} for rows in parts for row in rows]


def test_base_steps_of_the_command_line_do_not_join_the_studys() -> None:
    own = {"mixed": PartEffect(-0.05)}
    study = intervention_rows(own, translation=())
    cli = named("cli", intervention_rows({**own, "few": PartEffect(-0.01)}, base_step=600), intervention_rows(own, base_step=300))
    seen = view(study, cli)
    assert [(s.experiment, s.base_step) for s in seen.main] == [("study", 300)]
    # What only the others have is no gap of the study's.
    assert (seen.parts, seen.translation_targets) == (["mixed"], [])
    assert [f.part for f in stories(seen)[0].findings] == ["mixed"]
    html = section(with_rows(study, cli), "")
    assert "Other settings (2)" in html and "cli: toy-128, layer 2, step 600" in html
    assert "Base: step 600" not in html
    others = html[html.index("Other settings (2)") :]
    assert ">few<" in others and ">few<" not in html[: html.index("Other settings (2)")]


def test_one_name_of_the_command_line_is_shown_where_the_study_asks_for_none() -> None:
    own = {"mixed": PartEffect(-0.05)}
    second = named("second", intervention_rows(own, base_step=100))
    first = named("first", intervention_rows(own, base_step=300), intervention_rows(own, base_step=600))
    seen = view(second, first)
    assert [(s.experiment, s.base_step) for s in seen.main] == [("first", 300), ("first", 600)]


def test_the_studys_own_are_shown_whatever_model_others_are_of() -> None:
    own = {"mixed": PartEffect(-0.05)}
    study = intervention_rows(own, model="toy-32")
    seen = view(study, named("cli", intervention_rows(own)))
    assert [(s.experiment, s.model) for s in seen.main] == [("study", "toy-32")]


def test_examples_that_did_not_fit_are_told() -> None:
    words = "2 of 4 examples left out, with which the longest sentence does not fit the model"
    rows = intervention_rows({"mixed": PartEffect(-0.05, draws=None, outside=None)})
    for row in rows:
        if row["text"] == "translation":
            row["note"] = f"prompts: {words}" + ("; random: pool too small" if row["arm"] == "part" else "")
    told = stories(view(rows))[0]
    assert dict(told.others)["Prompts"] == f"English → Japanese: {words}; Japanese → English: {words}."
    assert "no draws from all alive features (pool too small)" in told.findings[0].text  # one reason is not the other
    assert told.setting.note("part", "mixed") is None
    assert "Prompts" not in dict(stories(view(intervention_rows({"mixed": PartEffect(-0.05)})))[0].others)


@pytest.mark.parametrize("alphas", [(-0.4, -0.1, 0.4), (-0.8, -0.4), (0.1, 0.4)])
def test_every_strength_is_on_the_axis(alphas: tuple[float, ...]) -> None:
    rows = intervention_rows({"mixed": PARTS["mixed"]}, alphas=alphas, chosen=alphas[-1], texts=("documents",), translation=())
    figure = next(f.figure for f in intervention_figures(with_rows(rows)) if f.name == "intervention_alpha")
    for ax in figure.axes:
        low, high = ax.get_xlim()
        assert low <= min(0, *alphas) and max(0, *alphas) <= high


def cells(html: str, caption: str) -> dict[str, list[str]]:
    """Row name -> cells of the first table whose caption holds the words."""
    body = html[html.index(caption) :]
    rows = re.findall(r'<tr><th scope="row"><span>(.*?)</span></th>(.*?)</tr>', body[: body.index("</table>")])
    return {name: re.findall(r"<td>(.*?)</td>", rest) for name, rest in rows}


def test_the_papers_layout() -> None:
    html = section(with_rows(intervention_rows(PARTS | {"bilingual": EMPTY})), "")
    found = cells(html, "held-out documents (alpha 0.4), translation (alpha 0.4): change")
    names = ["nothing", "English", "Japanese", "mixed", "bilingual", "bilingual_paper", "all features", "(donor, step 1,500)"]
    assert list(found) == names
    assert found["nothing"][:5] == ["29.96", "49.40", "38.47", "22.4", "21.4"]
    assert re.fullmatch(r"36\.60 <small>−1\.88 \[−2\.02, −1\.73\]</small>", found["mixed"][2])
    assert found["mixed"][5:7] == ["1 of 33", "1 of 33"] and found["all features"][5] == "–"
    assert found["bilingual"][0] == "– <small>empty class</small>"
    published = cells(html, "Published, LLM-jp-3")
    assert published["bilingual"] == ["18.36", "25.20", "21.96", "62.5", "57.2"] and len(published) == len(PUBLISHED)
    assert "Other models and other text" in html
    arms = cells(html, "Log perplexity (nats per token), held-out documents")
    assert {"mixed: base's own part", "mixed: donor's part of another text", "donor's state in place"} <= set(arms)
    assert arms["mixed: random draws, all alive"][-2] == "32 draws"


def test_hostile_names_are_text() -> None:
    name = "<script>alert(1)</script>\u202e$x$"
    parts = {"mixed": PARTS["mixed"], name: PartEffect(-0.03)}
    data = with_rows(intervention_rows(parts, texts=("documents",), translation=("chrf",)))
    html = page(data, [])
    assert "<script" not in html and "\u202e" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;‹U+202E›$x$" in html
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph.*")
        assert len(drawn(data)) == 3


def drawn(data: ReportData) -> dict[str, tuple[str, bytes]]:
    with matplotlib.rc_context(style()):
        return {f.name: render(f.figure, f.name) for f in intervention_figures(data)}


@pytest.fixture(scope="module")
def rich() -> ReportData:
    """Three bases, three layers, a part of the user's own with a Japanese name."""
    own = {"mixed": PARTS["mixed"], "川の特徴 with a long name": PartEffect(-0.001), "all": PARTS["all"]}
    return with_rows(
        *(intervention_rows(own, base_step=step, strength=1 - step / 1000, translation=()) for step in (100, 300, 600)),
        *(intervention_rows(own, layers=layer, strength=0.5, translation=()) for layer in ("1", "3")),
    )


def test_figures_for_what_was_measured(rich: ReportData) -> None:
    names = {f.name for f in intervention_figures(rich)}
    assert names == {f"intervention_{name}" for name in ("documents", "sentences", "alpha", "layers", "bases")}
    small = with_rows(intervention_rows({"mixed": PARTS["mixed"]}, alphas=(0.4,), texts=("documents",), translation=("chrf",)))
    assert {f.name for f in intervention_figures(small)} == {"intervention_documents", "intervention_translation"}
    whole = {f.name for f in intervention_figures(report_data())}
    assert whole >= {"intervention_translation", "intervention_translation_2"}
    assert list(intervention_figures(report_data(intervention=None))) == []


@pytest.mark.parametrize(("alphas", "scale"), [((0.1, 0.4, 4.0), "symlog"), ((0.1, 0.4, 0.8), "linear")])
def test_much_harm_bends_every_axis_of_alpha(alphas: tuple[float, ...], scale: str) -> None:
    rows = intervention_rows({"mixed": PARTS["mixed"]}, alphas=alphas, texts=("documents",), translation=())
    figure = next(f.figure for f in intervention_figures(with_rows(rows)) if f.name == "intervention_alpha")
    assert {ax.get_yscale() for ax in figure.axes} == {scale}
    said = any("logarithmic" in text.get_text() for text in figure.texts)
    assert said == (scale == "symlog")


def test_same_figures_same_bytes_and_every_glyph(rich: ReportData) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph.*")
        first = drawn(rich)
    assert first == drawn(rich)


def test_the_page(rich: ReportData, tmp_path: Path) -> None:
    html = build_report(rich, tmp_path).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and "intervention" in ids and "intervention_layers" in ids
    places = [html.index(f'<section id="{name}"') for name in ("curves", "patterns", "intervention", "tables")]
    assert places == sorted(places)
    curves = html[places[0] : places[1]]
    assert "intervention_documents" not in curves
    assert html.index("What may not be concluded") < html.index("In the paper's layout")
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL), re.IGNORECASE)


@pytest.mark.parametrize("table", [None, intervention_table(intervention_rows(PARTS)).slice(0, 0)], ids=["none", "no rows"])
def test_no_section_without_an_intervention(table: pa.Table | None) -> None:
    html = page(report_data(intervention=table), [])
    assert 'id="intervention"' not in html and "Does it cause anything?" not in html


@pytest.mark.parametrize("column", ["arm", "rank_other", "donor_model"])
def test_a_table_of_another_make_is_an_input_error(column: str) -> None:
    table = intervention_table(intervention_rows({"mixed": PARTS["mixed"]}))
    assert set(INTERVENTION) <= set(table.column_names)
    with pytest.raises(InputError, match=rf"intervention table: column\(s\) {column} missing"):
        report_data(intervention=table.drop_columns([column]))


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e2))
@settings(max_examples=200, deadline=None)
def test_numbers_keep_their_sign_and_two_digits_of_their_interval(value: float, half: float) -> None:
    digits = digits_of(value - half, value + half, value)
    shown = signed(value, digits)
    assert shown[0] == ("−" if value < 0 else "+" if value > 0 else "0")
    assert abs(float(shown.replace("−", "-")) - value) <= 0.51 * 10**-digits
    assert digits == 6 or 10**-digits <= max(0.2 * half, 0.1)


def test_change_words_without_an_interval() -> None:
    effect = view(intervention_rows({"mixed": PartEffect(-0.05)})).main[0].at("part", "mixed", "documents", Target("nll", "all"))
    assert effect is not None and change_words(effect) == "−0.0500 [−0.0540, −0.0460]"
    rows = [row | {"change_low": None, "change_high": None} for row in intervention_rows({"mixed": PartEffect(-0.05)})]
    told = stories(view(rows))[0].findings[0]
    assert told.verdict == "unknown" and "without an interval" in told.text and told.tag == "no interval"
