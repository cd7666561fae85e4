"""The computed sentences: honest in every case that a study can end in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_fixture import evolution_rows, report_data
from scipy import stats

from glottoscope.report.data import ReportData
from glottoscope.report.estimate import wilson
from glottoscope.report.summary import Answer, answer

STEPS = (0, 10, 100, 1000)


def rows_of(
    mixed: list[float],
    bilingual: list[float | None],
    *,
    control: str = "none",
    model: str = "m",
    n_alive: int = 400,
    paper: float | None = 0.2,
    half: float | None = 0.04,
) -> list[dict[str, Any]]:
    """One layer, given shares; intervals of +- half."""
    out = []
    for step, m, b in zip(STEPS[: len(mixed)], mixed, bilingual, strict=True):
        row: dict[str, Any] = {
            "control": control,
            "family": "f",
            "model": model,
            "d_model": 8,
            "n_params": 10,
            "step": step,
            "tokens_seen": step,
            "layer": 2,
            "lm_seed": 0,
            "sae_seed": 0,
            "n_features": 500,
            "n_alive": n_alive,
            "alive": n_alive / 500,
            "count_mixed": round(m * n_alive),
            "n_bilingual": None if b is None else round(b * n_alive),
            "fvu": 0.3,
        }
        for name, value in (("share_mixed", m), ("share_bilingual", b), ("share_bilingual_paper", paper)):
            row |= {name: value, f"{name}_low": None, f"{name}_high": None}
            if value is not None and half is not None:
                row |= {f"{name}_low": max(0.0, value - half), f"{name}_high": min(1.0, value + half)}
        out.append(row)
    return out


def told(*rows: list[dict[str, Any]], **changes: Any) -> Answer:
    table = pa.Table.from_pylist([row for part in rows for row in part])
    return answer(ReportData(name="s", evolution=table, languages=["en", "ja"], k=4, **changes))


CONTROL = rows_of([0.1] * 4, [0.0] * 4, control="negative", model="c")


def test_fall_rise_and_bilingual() -> None:
    a = told(rows_of([0.4, 0.1, 0.2, 0.35], [0.0, 0.0, 0.1, 0.25]), CONTROL)
    assert a.headline == "Mixed features fell and rose again; bilingual features appeared (25.0 %)."
    assert "fell from 40.0 % (160 of 400) [36.0, 44.0] at step 0 (before training) to 10.0 % (40 of 400)" in a.sentences[0]
    assert "rose again to 35.0 %" in a.sentences[0] and "by step 1,000." in a.sentences[0]
    assert "to 25.0 % (100 of 400) [21.0, 29.0]" in a.sentences[1]
    assert "negative control (no cross-lingual signal) ended at 0.0 % (0 of 400) [0.0, 1.0]" in a.sentences[1]
    assert a.stats[-1].value == "0 of 400"
    assert any("100 of the 140 mixed features" in text for text in a.caveats)
    assert any("1 LM seed no claim" in text for text in a.caveats)


@pytest.mark.parametrize(
    ("mixed", "headline", "words"),
    [
        ([0.4, 0.3, 0.2, 0.1], "fell and did not rise again", "had not risen again by the last checkpoint"),
        ([0.4, 0.1, 0.11, 0.12], "fell and did not clearly rise again", "did not clearly rise again"),
        ([0.2, 0.19, 0.2, 0.21], "did not clearly change", "did not clearly fall"),
        ([0.2, 0.2, 0.2, 0.2], "did not clearly change", "neither fell nor clearly rose"),
        ([0.1, 0.2, 0.3, 0.4], "did not fall; they rose", "never fell below its first value"),
        ([0.2, 0.18, 0.3, 0.4], "did not clearly fall, but rose later", "then rose to 40.0 %"),
    ],
)
def test_other_courses_of_mixed(mixed: list[float], headline: str, words: str) -> None:
    a = told(rows_of(mixed, [0.0] * 4))
    assert headline in a.headline and words in a.sentences[0]
    assert "no features bilingual" in a.headline or "no bilingual features" in a.headline
    assert "no feature was bilingual by translation pairs at any checkpoint: 0.0 % (0 of 400) [0.0, 1.0]" in a.sentences[1].replace(
        "No", "no"
    )
    assert "no negative control was run" in a.sentences[1]


def test_bootstrap_of_the_change_decides_where_given() -> None:
    turning = {
        "model": "m",
        "layer": 2,
        "step": 10,
        "low": 10,
        "high": 100,
        "fall": 0.3,
        "fall_low": -0.01,
        "fall_high": 0.5,
        "rise": 0.2,
        "rise_low": 0.1,
        "rise_high": 0.3,
    }
    a = told(rows_of([0.4, 0.1, 0.2, 0.35], [0.0] * 4), turning=[turning])
    assert "did not clearly fall" in a.sentences[0] and "turning step: 10 to 100" in a.sentences[0]


def test_without_aligned_sentences_the_paper_rule_is_named() -> None:
    a = told(rows_of([0.4, 0.1, 0.2, 0.35], [None] * 4))
    assert "no aligned sentences" in a.sentences[1] and "bilingual_paper" in a.sentences[1]
    assert "paper-style rule" in a.headline and "translation pairs" not in a.headline
    assert any("cannot tell a translation" in text for text in a.caveats)


def test_nothing_measured_about_bilingual() -> None:
    a = told(rows_of([0.4, 0.1, 0.2, 0.35], [None] * 4, paper=None))
    assert "is not known" in a.sentences[1] and "were not measured" in a.headline


def test_a_control_as_high_as_the_claim_is_said_in_the_headline() -> None:
    a = told(
        rows_of([0.4, 0.1, 0.2, 0.35], [0.0, 0.0, 0.1, 0.25]),
        rows_of([0.3] * 4, [0.0, 0.1, 0.2, 0.22], control="negative", model="c"),
    )
    assert "but not clearly more than in a control" in a.headline
    assert "do not set apart from the main model" in a.sentences[1]


def test_overlap_peak_and_fall_of_bilingual() -> None:
    a = told(rows_of([0.3] * 4, [0.1, 0.1, 0.1, 0.12]))
    assert "no clear change in bilingual features" in a.headline and "do not separate from none" in a.sentences[1]
    a = told(rows_of([0.3] * 4, [0.1, 0.1, 0.3, 0.12]))
    assert "after a peak of 30.0 %" in a.sentences[1]
    a = told(rows_of([0.3] * 4, [0.3, 0.1, 0.1, 0.1]))
    assert "became fewer" in a.headline


def test_no_intervals_no_verdict() -> None:
    a = told(rows_of([0.4, 0.1, 0.2, 0.35], [0.01, 0.02, 0.1, 0.25], half=None))
    assert "not known" in a.sentences[0] and "not known" in a.sentences[1]
    assert "fell" not in a.headline and "appeared" not in a.headline


def test_one_checkpoint() -> None:
    a = told(rows_of([0.4], [0.1]))
    assert "nothing can be said about change" in a.sentences[0] and "only checkpoint" in a.sentences[1]


def test_few_alive_features_and_poor_saes_are_caveats() -> None:
    rows = rows_of([0.4, 0.1, 0.2, 0.35], [0.0] * 4)
    rows[1] |= {"n_alive": 40, "alive": 0.08}
    rows[3]["fvu"] = 0.7
    a = told(rows, notes=["by dictionary code switching"])
    assert any("alive at step 10 (as few as 40 features)" in text for text in a.caveats)
    assert any("70.0 %" in text for text in a.caveats)
    assert a.caveats[-1] == "by dictionary code switching"


def test_seeds_are_counted_and_ranged() -> None:
    data = report_data()
    assert data.n_seeds("toy-128") == (1, 2)
    assert any("1 LM seed and 2 SAE seeds" in text for text in answer(data).caveats)


def test_middle_layer_and_main_model() -> None:
    data = report_data()
    assert data.main_model == "toy-128" and data.middle_layer("toy-128") == 2
    sparse = ReportData(
        name="s", evolution=pa.Table.from_pylist(evolution_rows("m", "none", layers=(0, 14))), languages=["en"], k=4
    )
    assert sparse.middle_layer("m") == 14


def test_wilson_against_scipy() -> None:
    for count, n in ((0, 30), (3, 30), (30, 30)):
        reference = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
        np.testing.assert_allclose(wilson(count, n), (reference.low, reference.high), atol=1e-4)
