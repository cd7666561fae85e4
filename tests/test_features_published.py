"""`measure` on feature examples: published counts, the three rules, and every way a file can be bad."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from glottoscope.corpus.display import Span, merge_spans, piece_bytes
from glottoscope.errors import InputError
from glottoscope.features.granularity import join_labels, read_labels
from glottoscope.features.published import measure_file

SHARED = Path(__file__).parents[2] / "shared" / "features"


def spans(tokens: Sequence[str]) -> list[Span]:
    return merge_spans([piece_bytes(token) for token in tokens])


def example(tokens: list[str], activations: list[float], language: str | None = None) -> dict[str, Any]:
    out: dict[str, Any] = {"tokens": tokens, "activations": activations}
    return out if language is None else out | {"document_language": language}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("step", [10, 1000, 100000])
def test_v1_reproduces_every_published_count(step: int) -> None:
    path = SHARED / f"llm-jp-3-1.8b_layer12_step{step}.jsonl"
    if not path.exists():
        pytest.skip("LLM-jp's published features (shared/features) are not beside this repository")
    table = measure_file(path, rule="v1")
    assert table["n_en"].to_pylist() == table["published_en"].to_pylist()
    assert table["n_ja"].to_pylist() == table["published_ja"].to_pylist()
    classes = table["language"].to_pylist()
    published = {10: (67, 20, 13), 1000: (18, 30, 52), 100000: (7, 42, 51)}[step]
    assert tuple(round(100 * classes.count(name) / len(classes)) for name in ("mixed", "ja", "en")) == published
    assert table["granularity"].null_count == 0


def test_script_rule_merges_byte_tokens(tmp_path: Path) -> None:
    fire = [10.0, 0.0]
    byte_tokens = [f"<0x{byte:02X}>" for byte in "鰯".encode()]
    rows = [
        {"feature": 0, "examples": [example(["the", "x"], fire)] * 25},
        {"feature": 1, "examples": [example(["犬", "x"], fire)] * 25},
        {"feature": 2, "examples": [example(["the", "犬"], [9, 10])] * 25},
        {"feature": 3, "examples": [example([" 75", "x"], fire)] * 25},
        {"feature": 4, "examples": [example([*byte_tokens, "x"], [8, 9, 10, 0])] * 25},
        {"feature": 5, "examples": [example(["the", "x"], fire)] * 19},
        {"feature": 6, "examples": [example(["the", "x"], [0, 0])] * 25},
        {"feature": 7, "examples": []},
    ]
    path = write(tmp_path / "f.jsonl", rows)
    table = measure_file(path, rule="script", merge_spans=spans).to_pydict()
    assert table["language"] == ["en", "ja", "mixed", "neutral", "ja", "unclassified", "dead", "dead"]
    assert table["n_ja"][4] == 75 and table["n_positions"][4] == 75
    assert measure_file(path, rule="script")["language"].to_pylist()[4] == "neutral"  # bytes without merging
    assert measure_file(path, rule="script", min_count=10)["language"].to_pylist()[5] == "en"
    assert table["single_token"] == [True, True, False, True, False, True, False, False]
    assert table["h_token"][2] == pytest.approx(np.log(2)) and table["h_token"][6] is None
    assert table["coherence_token"][0] == 1.0 and table["phi"] == [None] * 8
    assert measure_file(path, rule="v1")["language"].to_pylist() == [
        "en", "ja", "ja", "en", "ja", "en", "dead", "dead"
    ]  # fmt: skip


def test_positions_are_above_seven_tenths_of_the_features_maximum(tmp_path: Path) -> None:
    rows = [{"feature": 3, "examples": [example(["a", "b", "c"], [10, 7, 7.1]), example(["d"], [7])]}]
    table = measure_file(write(tmp_path / "f.jsonl", rows), rule="v1").to_pydict()
    assert table["n_positions"] == [2] and table["n_en"] == [1] and table["n_examples"] == [2]


def test_v1_keeps_the_first_fifty_examples(tmp_path: Path) -> None:
    rows = [{"feature": 0, "examples": [example(["a"], [9])] * 50 + [example(["犬"], [10])] * 50}]
    table = measure_file(write(tmp_path / "f.jsonl", rows)).to_pydict()
    assert (table["n_en"], table["n_ja"], table["language"]) == ([50], [0], ["en"])


def test_document_rule_leaves_out_neutral_tokens(tmp_path: Path) -> None:
    fire = [10.0, 0.0]
    both = [example(["OK", "a"], fire, "en"), example(["OK", "犬"], fire, "ja")]  # a string frequent in both languages
    rows = [
        {"feature": 0, "examples": [example(["dog", "a"], fire, "en")] * 12 + [example(["犬", "は"], fire, "ja")] * 12},
        {"feature": 1, "examples": both * 12},
        {"feature": 2, "examples": [example(["12", "a"], fire, "en"), example(["12", "犬"], fire, "ja")] * 12},
        {"feature": 3, "examples": [example(["dog", "a"], fire, "ja")] * 20},
    ]
    table = measure_file(write(tmp_path / "f.jsonl", rows), rule="document").to_pydict()
    assert table["language"][1:3] == ["neutral", "neutral"]
    # "dog" is in documents of both languages (12 and 20 times), so it says nothing here.
    assert table["language"][3] == "neutral" and table["n_neutral"][3] == 20
    single = write(tmp_path / "g.jsonl", rows[:1])
    table = measure_file(single, rule="document").to_pydict()
    assert table["language"] == ["mixed"] and (table["n_en"], table["n_ja"]) == ([12], [12])
    assert table["share_low"][0] < 0.5 <= table["share_high"][0]


GOOD = {"feature": 0, "examples": [{"tokens": ["a"], "activations": [1]}]}
BAD: list[tuple[Any, str]] = [
    ("{", "line 2: not valid JSON"),
    ("[]", "line 2: not a JSON object"),
    ({"examples": []}, "line 2: the field 'feature' is missing"),
    ({"feature": 5}, "line 2: the field 'examples' is missing"),
    ({"feature": "x", "examples": []}, "line 2: feature 'x'"),
    ({"feature": 0, "examples": []}, "line 2: feature 0 was on line 1"),
    ({"feature": 5, "examples": [{"tokens": ["a"]}]}, "line 2, feature 5, example 0: the field 'activations'"),
    ({"feature": 5, "examples": [example(["a"], [1, 2])]}, "line 2, feature 5, example 0: 1 tokens and 2 activations"),
    ({"feature": 5, "examples": [example([], [])]}, "0 tokens"),
    ({"feature": 5, "examples": [example(["a", "b"], [1, float("nan")])]}, "line 2, feature 5, example 0: .*finite"),
    ({"feature": 5, "examples": [example(["a"], [-1])]}, "not negative"),
    ({"feature": 5, "examples": [{"tokens": ["a"], "activations": ["1"]}]}, "must be numbers"),
    ({"feature": 5, "examples": [{"tokens": [1], "activations": [1]}]}, "must be strings"),
    ({"feature": 5, "examples": [], "granularity": 5}, "granularity 5"),
    ({"feature": 5, "examples": [], "language": {"en": -1}}, "'language' must give counts"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_lines_name_line_and_feature(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        measure_file(path)


def test_bad_files_and_arguments(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    with pytest.raises(InputError, match="no such file"):
        measure_file(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no feature with an example"):
        measure_file(path)
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff")
    with pytest.raises(InputError, match="line 2: not valid UTF-8"):
        measure_file(path)
    write(path, [GOOD])
    with pytest.raises(InputError, match="rule 'v2'"):
        measure_file(path, rule="v2")
    with pytest.raises(InputError, match="en and ja only"):
        measure_file(path, rule="v1", languages=("en", "de"))
    with pytest.raises(InputError, match="line 1, feature 0, example 0: document_language is None"):
        measure_file(path, rule="document")


def test_labels_join_by_the_keys_they_have(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    lines = [
        "model,step,feature,label,note",
        'm,10,0,4,"a, b"',
        "m,10,2,1,",
        "m,20,0,2,",
        "m,20,1,,unsure",
        "m,20,9,3,",
    ]
    path.write_text("\n".join(lines))
    labels = read_labels(path)
    assert labels.column_names == ["model", "step", "feature", "granularity"] and len(labels) == 4
    features = pa.table(
        {
            "model": ["m"] * 6,
            "step": [20, 20, 20, 10, 10, 10],
            "feature": pa.array([0, 1, 2, 0, 1, 2], pa.int32()),
        }
    )
    joined, unmatched = join_labels(features, labels)
    assert joined["granularity"].to_pylist() == [2, None, None, 4, None, 1] and unmatched == 1
    assert joined.select(["model", "step", "feature"]).equals(features)
    again, _ = join_labels(joined, labels)
    assert again.equals(joined)
    jsonl = tmp_path / "labels.jsonl"
    jsonl.write_text('{"feature": 1, "granularity": 3}\n{"feature": 2, "granularity": null}\n')
    joined, unmatched = join_labels(features, read_labels(jsonl))
    assert joined["granularity"].to_pylist() == [None, 3, None, None, 3, None] and unmatched == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("feature,label\n0,7\n", "line 2: label 7"),
        ("feature,label\n0,good\n", "line 2: label is 'good'"),
        ("feature\n0\n", "line 2: needs 'feature' and 'granularity'"),
        ("feature,label\n0,1\n0,2\n", "line 3: feature 0 has a second"),
        ("feature,label\n0,\n", "no labels"),
    ],
)
def test_bad_labels(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_labels(path)


def test_labels_of_other_features_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("layer,feature,label\n12,0,4\n")
    with pytest.raises(InputError, match="key column 'layer'"):
        join_labels(pa.table({"feature": [0]}), read_labels(path))
    with pytest.raises(InputError, match="none of the 1 labels"):
        join_labels(pa.table({"feature": [0], "layer": [3]}), read_labels(path))
