"""LLM-jp-eval's translation files: both versions of the format, the direction, and one clear line for bad files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from glottoscope.corpus.llm_jp_eval import TranslationFile, read_translation, shots_file
from glottoscope.errors import InputError

SAMPLES = [{"input": " The cat sat. ", "output": "猫が座った。"}, {"input": "It {rains}.", "output": "雨が降る。\n"}]
PAIRS = [("The cat sat.", "猫が座った。"), ("It {rains}.", "雨が降る。")]
VERSION_1 = {
    "instruction": "英語を日本語にする。",
    "output_length": 250,
    "metrics": ["comet_wmt22"],
    "few_shots": [{"input": "Hello.", "output": "こんにちは。"}],
    "samples": SAMPLES,
}
VERSION_2 = {
    "instruction": "英語を日本語にする。",
    "output_length": 250,
    "metrics": ["comet_wmt22"],
    "samples": [{**sample, "metadata": {"split": "test"}} for sample in SAMPLES],
    "label_list": [],
    "answer_extract_pattern": "",
    "num_few_shots": 4,
    "answer_pattern_id": "custom",
    "language": "ja",
    "custom_prompt_template": None,
}


def write(folder: Path, content: Any, name: str = "alt-e-to-j.json") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def fails(path: Path, message: str, direction: tuple[str, str] | None = None) -> None:
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_translation(path, direction=direction)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_version_1(tmp_path: Path) -> None:
    expected = TranslationFile(("en", "ja"), PAIRS, [("Hello.", "こんにちは。")], "英語を日本語にする。", 250, 0)
    assert read_translation(write(tmp_path, VERSION_1)) == expected


def test_version_2_has_no_shots_in_the_file(tmp_path: Path) -> None:
    expected = TranslationFile(("en", "ja"), PAIRS, [], "英語を日本語にする。", 250, 0)
    assert read_translation(write(tmp_path, VERSION_2)) == expected


def test_only_the_samples_are_needed(tmp_path: Path) -> None:
    read = read_translation(write(tmp_path, "\ufeff" + json.dumps({"samples": SAMPLES, "instruction": " ", "few_shots": None})))
    assert read == TranslationFile(("en", "ja"), PAIRS, [], None, None, 0)


def test_empty_sides_are_counted_and_surrogates_replaced(tmp_path: Path) -> None:
    samples = [{"input": "", "output": "猫"}, {"input": "a", "output": " \n"}, {"input": "b\ud83d", "output": "い"}]
    read = read_translation(write(tmp_path, {"samples": samples}))
    assert (read.pairs, read.skipped_empty) == ([("b\ufffd", "い")], 2)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("alt-e-to-j.json", None, ("en", "ja")),
        ("alt-j-to-e.json", None, ("ja", "en")),
        ("wikicorpus-e-to-j.json", None, ("en", "ja")),
        ("WikiCorpus_J_to_E.json", ("ja", "en"), ("ja", "en")),
        ("j-to-e.json", None, ("ja", "en")),
        ("kftt.json", ("ja", "en"), ("ja", "en")),
        ("flores-e-to-e.json", ("en", "de"), ("en", "de")),
    ],
)
def test_the_direction(tmp_path: Path, name: str, given: tuple[str, str] | None, expected: tuple[str, str]) -> None:
    assert read_translation(write(tmp_path, VERSION_1, name), direction=given).direction == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("alt.json", None, "the name does not end in e-to-j or j-to-e: give the direction"),
        ("alt-e-to-e.json", None, "the name does not end in e-to-j or j-to-e"),
        ("alt-e-to-j-old.json", None, "the name does not end in e-to-j or j-to-e"),
        ("alt-e-to-j.json", ("ja", "en"), "the name says en-ja, the direction ja-en: rename the file or correct the direction"),
        ("alt.json", ("ja", "ja"), "direction 'ja' to 'ja': name two different languages"),
        ("alt.json", ("ja", ""), "name two different languages"),
    ],
)
def test_a_bad_direction(tmp_path: Path, name: str, given: tuple[str, str] | None, message: str) -> None:
    fails(write(tmp_path, VERSION_1, name), message, given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"samples": [', "invalid JSON (Expecting value: line 1 column 14"),
        ("[" * 100_000, "invalid JSON"),
        ("", "invalid JSON"),
        ([], "a JSON list, not an object"),
        ({"instruction": "x"}, "no field 'samples' (fields present: instruction)"),
        ({"samples": {}}, "field 'samples' holds a dict, not a list of samples"),
        ({"samples": []}, "holds no sample with text on both sides"),
        ({"samples": [{"input": "a", "output": ""}]}, "holds no sample with text on both sides"),
        ({"samples": [SAMPLES[0], "text"]}, "samples 2: a str, not an object with input and output"),
        ({"samples": [SAMPLES[0], {"input": "a"}]}, "samples 2: no field 'output' (fields present: input)"),
        ({"samples": [{"output": "a"}]}, "samples 1: no field 'input' (fields present: output)"),
        ({"samples": [{"input": "a", "output": None}]}, "samples 1: field 'output' holds a NoneType, not text"),
        ({"samples": SAMPLES, "few_shots": [{"input": "a"}]}, "few_shots 1: no field 'output'"),
        ({"samples": SAMPLES, "few_shots": 4}, "field 'few_shots' holds a int, not a list"),
        ({"samples": SAMPLES, "instruction": ["x"]}, "field 'instruction' holds a list, not text"),
        ({"samples": SAMPLES, "output_length": "250"}, "field 'output_length' holds '250', not a number of tokens"),
        ({"samples": SAMPLES, "output_length": 0}, "field 'output_length' holds 0, not a number of tokens"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    fails(write(tmp_path, content), message)


def test_a_file_that_is_no_utf8_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "alt-e-to-j.json"
    fails(path, "cannot be read (No such file or directory)")
    path.write_bytes(b'{"samples": "\xff"}')
    fails(path, "invalid UTF-8 (position 14)")
    fails(write(tmp_path, VERSION_1, "x-j-to-e.json/y").parent, "cannot be read (Is a directory)")


def test_shots_come_from_the_train_folder_beside(tmp_path: Path) -> None:
    test = write(tmp_path, VERSION_2, "evaluation/test/alt-e-to-j.json")
    assert shots_file(test) is None
    train = write(tmp_path, VERSION_2, "evaluation/train/alt-e-to-j.json")
    assert shots_file(test) == train
    assert shots_file(train) is None
