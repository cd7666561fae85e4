"""Labels beside a run: what is accepted, what survives, what is shown, what leaves as CSV."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_fixture import environment

from glottoscope.errors import InputError
from glottoscope.features.granularity import LABELS, read_labels
from glottoscope.report.browser import labels as module
from glottoscope.report.browser.labels import GRADES, Label, LabelStore, default_rater, defused, labels_csv, parse_setup
from glottoscope.study.store import RunStore

SETUP = "m@20/layer_01/seed_0"
OTHER = "m-s1@0/layer_00/seed_2"


def label(feature: int = 0, granularity: int | None = 1, *, rater: str = "mari", setup: str = SETUP, **more: Any) -> Label:
    return Label(rater, setup, feature, granularity, **{"time": "2025-01-31T12:00:00Z", **more})


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    """Labels of a folder without any SAE: every label is accepted as it is."""
    return LabelStore(RunStore(tmp_path / "run").labels_path)


def lines(store: LabelStore) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.path.read_text(encoding="utf-8").splitlines()]


# ---- what is a label


def test_the_grades_are_those_of_the_features_room() -> None:
    assert GRADES == LABELS


@pytest.mark.parametrize("name", ["m", "Mari", "山田 花子", "O'Brien", "a.b_c-d+e@f", "x" * 64, "é", "9"])
def test_raters_that_are_names(name: str) -> None:
    assert label(rater=name).rater == name
    assert label(rater=f" {name} ").rater == name


@pytest.mark.parametrize(
    "name", ["", " ", "x" * 65, "-x", "=x", "@x", "_x", "a\nb", "a\x00", "<b>", "a/b", "a,b", "\u202ex", None, 3]
)
def test_raters_that_are_none(name: Any) -> None:
    with pytest.raises(InputError, match="rater"):
        label(rater=name)


def test_one_name_is_one_rater_however_it_is_typed() -> None:
    assert label(rater="é").rater == label(rater="e\u0301").rater
    assert default_rater() == label(rater=default_rater()).rater


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"granularity": 0}, "granularity"), ({"granularity": 5}, "granularity"), ({"granularity": True}, "granularity"),
        ({"granularity": 2.0}, "granularity"), ({"granularity": "2"}, "granularity"), ({"feature": -1}, "feature"),
        ({"feature": 2**31}, "feature"), ({"feature": True}, "feature"), ({"feature": 1.0}, "feature"),
        ({"feature": "1"}, "feature"), ({"note": None}, "note"), ({"note": "x" * 10_001}, "10,001 characters"),
        ({"blind": 1}, "blind"), ({"time": "yesterday"}, "time"), ({"time": "2025-01-31"}, "time"), ({"sae": "../x"}, "sae"),
        ({"setup": "m@20/layer_01"}, "setup"), ({"setup": "../m@20/layer_01/seed_0"}, "setup"), ({"setup": 3}, "setup"),
        ({"setup": "a/b@20/layer_01/seed_0"}, "setup"), ({"setup": "m@20/layer_01/seed_0/.."}, "setup"),
        ({"setup": "m@２/layer_01/seed_0"}, "setup"), ({"setup": "m@20/layer_01/seed_0\n"}, "setup"),
    ],
)  # fmt: skip
def test_what_is_no_label(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(label(), **change)


def test_parts_of_a_setup() -> None:
    assert parse_setup(OTHER) == ("m-s1", 0, 0, 2)
    assert parse_setup("Qwen2.5-0.5B@1000/layer_12/seed_0").model == "Qwen2.5-0.5B"


NOTES = st.text(st.characters(codec=None), max_size=60)


@settings(max_examples=100, deadline=None)
@given(note=NOTES, granularity=st.sampled_from([1, 2, 3, 4, None]), blind=st.booleans())
def test_a_label_is_one_line_and_comes_back(note: str, granularity: int | None, blind: bool) -> None:
    """Lone surrogates cannot be written; all else survives, line ends and NUL too."""
    given_ = label(3, granularity, note=note, blind=blind)
    line = given_.line()
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert Label.from_line(line) == given_
    assert given_.note == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in note)


# ---- the file


def test_the_last_word_holds_and_withdrawing_is_a_word(store: LabelStore) -> None:
    assert store.latest() == []
    store.append(label(1, 2))
    store.append(label(1, 3, rater="ken"))
    store.append(label(1, 4, note="it is 犬"))
    store.append(label(1, 1, setup=OTHER))
    assert [(x.rater, x.setup, x.granularity, x.note) for x in store.latest()] == [
        ("ken", SETUP, 3, ""), ("mari", SETUP, 4, "it is 犬"), ("mari", OTHER, 1, "")
    ]  # fmt: skip
    store.append(label(1, None, rater="ken"))
    store.append(label(1, None, note="unsure"))
    assert [(x.rater, x.granularity, x.note) for x in store.latest() if x.setup == SETUP] == [("mari", None, "unsure")]
    assert len(lines(store)) == 6  # nothing is ever removed
    assert store.problems == []
    assert LabelStore(store.path).latest() == store.latest()


def test_what_another_process_writes_is_seen(store: LabelStore) -> None:
    store.append(label(0))
    assert len(store.latest()) == 1
    LabelStore(store.path).append(label(1))
    assert [x.feature for x in store.latest()] == [0, 1]


def _many(path: Path, rater: str, n: int) -> None:
    store = LabelStore(path)
    for feature in range(n):
        store.append(label(feature, rater=rater, note="x" * 5000))


def test_several_processes_write_whole_lines(store: LabelStore) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_many, args=(store.path, name, 30)) for name in ("a", "b", "c")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert len(store.latest()) == 90
    assert store.problems == []


def test_a_torn_last_line_is_left_out_then_set_aside(store: LabelStore) -> None:
    store.append(label(0))
    torn = label(1, note="犬" * 20).line()[:60]
    with open(store.path, "ab") as handle:
        handle.write(torn)
    assert [x.feature for x in store.latest()] == [0]
    (problem,) = store.problems
    assert "the last line is cut off" in problem and str(store.path) in problem
    assert not store.torn_path.exists()  # reading changes nothing
    store.append(label(2))
    assert [x.feature for x in store.latest()] == [0, 2]
    assert store.torn_path.read_bytes() == torn + b"\n"
    (problem,) = store.problems
    assert str(store.torn_path) in problem
    assert [x["feature"] for x in lines(store)] == [0, 2]


def test_a_whole_last_line_without_its_end_is_kept(store: LabelStore) -> None:
    store.append(label(0))
    os.truncate(store.path, store.path.stat().st_size - 1)
    assert [x.feature for x in store.latest()] == [0]
    store.append(label(1))
    assert [x["feature"] for x in lines(store)] == [0, 1]
    assert not store.torn_path.exists()


def test_killed_while_writing(store: LabelStore) -> None:
    """Whatever a kill leaves, every label that was said to be saved is there."""
    code = (
        "import sys; from pathlib import Path\n"
        "from glottoscope.report.browser.labels import Label, LabelStore\n"
        "store = LabelStore(Path(sys.argv[1]))\n"
        "for f in range(10**6):\n"
        f"    store.append(Label('mari', {SETUP!r}, f, 1, note='x' * 9000)); print(f, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.path)], stdout=subprocess.PIPE, text=True, env=environment()
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = [int(x) for x in process.stdout.read().split()]
    process.wait(30)
    process.stdout.close()
    store.append(label(999_999))
    found = [x.feature for x in store.latest()]
    assert set(found) >= {*range(50), *said, 999_999}


def test_lines_that_are_no_labels_are_said_and_left(store: LabelStore) -> None:
    good = label(0).line()
    store.path.parent.mkdir(parents=True)
    strange = [b"{", b"[1]", b'{"rater": "a"}', b"\xff\xfe", good.replace(b'"granularity": 1', b'"granularity": 9'), b"[" * 100_000]
    store.path.write_bytes(good + b"\n".join(strange) + b"\n\n" + label(1).line().replace(b"{", b'{"later": [1], ', 1))
    assert [x.feature for x in store.latest()] == [0, 1]
    assert len(store.problems) == 6 and "1 more" in store.problems[-1]
    assert "line 2 is no label (not JSON)" in store.problems[0]
    assert "line 4 is no label (no setup)" in store.problems[2]
    before = store.path.read_bytes()
    store.append(label(2))
    assert store.path.read_bytes().startswith(before)


def test_a_full_disk_leaves_no_piece_of_a_label(store: LabelStore) -> None:
    store.append(label(0))
    size = store.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
        with pytest.raises(InputError, match=r"labels\.jsonl: the label is not saved \(no space left on device\)"):
            store.append(label(1, note="x" * 500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert store.path.stat().st_size == size
    store.append(label(2))
    assert [x.feature for x in store.latest()] == [0, 2]


def test_a_place_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a file")
    with pytest.raises(InputError, match="the label is not saved"):
        LabelStore(tmp_path / "labels" / "labels.jsonl").append(label())
    (tmp_path / "run" / "labels" / "labels.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        LabelStore(tmp_path / "run" / "labels" / "labels.jsonl").latest()


def test_an_unchanged_file_is_not_parsed_again(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(label(0))
    store.latest()
    read = []
    parse = Label.from_line
    monkeypatch.setattr(module.Label, "from_line", lambda line: read.append(line) or parse(line))
    assert [x.feature for x in store.latest()] == [0]
    assert read == []
    store.append(label(1))
    store.latest()
    assert len(read) == 2


# ---- of which SAE


def trained(run: RunStore, setup: str, content: bytes) -> None:
    """A setup's folder as its training leaves it."""
    folder = run.cells_dir / setup
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sae.safetensors").write_bytes(content)
    run.mark_done(folder, "train", "key", {}, ["sae.safetensors"])


def test_labels_of_an_sae_that_was_trained_again_are_left_out(tmp_path: Path) -> None:
    run = RunStore(tmp_path / "run")
    trained(run, SETUP, b"first")
    trained(run, OTHER, b"other")
    store = LabelStore(run.labels_path)
    saved = store.append(label(0))
    store.append(label(0, setup=OTHER))
    assert saved.sae == run.sae_hash(SETUP) and len(saved.sae) == 16
    assert saved.entry().keys() == {"setup", "feature", "rater", "granularity", "note", "time", "blind"}
    trained(run, SETUP, b"second")
    again = LabelStore(run.labels_path)
    assert [x.setup for x in again.latest()] == [OTHER]
    (problem,) = again.problems
    assert f"1 label(s) are of SAEs that this run no longer has (the first: {SETUP}, feature 0)" in problem
    again.append(label(0, 4))
    assert [(x.setup, x.granularity) for x in again.latest()] == [(SETUP, 4), (OTHER, 1)]
    trained(run, SETUP, b"first")  # the old settings again: the old label holds again, the newer one not
    assert [(x.setup, x.granularity) for x in LabelStore(run.labels_path).latest()] == [(SETUP, 1), (OTHER, 1)]


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"train": 3}', '{"train": {"files": []}}', '{"train": {"files": {}}}'])
def test_a_setup_without_a_whole_record_has_no_sae(tmp_path: Path, record: str) -> None:
    run = RunStore(tmp_path / "run")
    (run.cells_dir / SETUP).mkdir(parents=True)
    (run.cells_dir / SETUP / "done.json").write_text(record, encoding="utf-8")
    assert run.sae_hash(SETUP) == ""
    assert LabelStore(run.labels_path).append(label()).sae == ""


# ---- CSV


def test_the_csv_is_what_a_study_reads(store: LabelStore, tmp_path: Path) -> None:
    store.append(label(3, 2, note='a "quoted", note\nof two lines', blind=True))
    store.append(label(4, None, note="no grade"))
    store.append(label(5, 4, setup=OTHER))
    store.append(label(6, 4, setup="gone@1/layer_00/seed_0"))
    text = labels_csv(store.latest(), {SETUP: 0, OTHER: 1})
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    read = read_labels(path)
    assert read.to_pylist() == [
        {"model": "m", "step": 20, "layer": 1, "lm_seed": 0, "sae_seed": 0, "feature": 3, "granularity": 2},
        {"model": "m-s1", "step": 0, "layer": 0, "lm_seed": 1, "sae_seed": 2, "feature": 5, "granularity": 4},
    ]
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [(r["rater"], r["blind"], r["time"], r["note"]) for r in rows[:2]] == [
        ("mari", "1", "2025-01-31T12:00:00Z", 'a "quoted", note\nof two lines'), ("mari", "0", "2025-01-31T12:00:00Z", "no grade")
    ]  # fmt: skip


def test_two_raters_who_differ_are_two_files(store: LabelStore, tmp_path: Path) -> None:
    store.append(label(0, 1))
    store.append(label(0, 4, rater="ken"))
    path = tmp_path / "labels.csv"
    path.write_text(labels_csv(store.latest(), {SETUP: 0}), encoding="utf-8")
    with pytest.raises(InputError, match="a second, different label"):
        read_labels(path)
    path.write_text(labels_csv([x for x in store.latest() if x.rater == "ken"], {SETUP: 0}), encoding="utf-8")
    assert read_labels(path)["granularity"].to_pylist() == [4]


@settings(max_examples=150, deadline=None)
@given(st.one_of(NOTES, st.builds(lambda a, b: a + b, st.sampled_from(list("=+-@\t\r\n＝＋－＠'")), NOTES)))
def test_a_note_is_never_a_formula(note: str) -> None:
    text = labels_csv([label(0, 1, note=note)], {SETUP: 0})
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    cell = row["note"]
    assert not cell.startswith(tuple("=+-@\t\r\n＝＋－＠"))
    assert cell == defused(label(note=note).note)
    assert not {"\x00", "\x1b", "\r"} & set(text)


def test_notes_that_are_formulas_keep_their_text() -> None:
    assert [defused(x) for x in ("=1+1", "+1", "-1", "@a", "＝1", "a=1", "", "it's")] == [
        "'=1+1", "'+1", "'-1", "'@a", "'＝1", "a=1", "", "it's"
    ]  # fmt: skip
