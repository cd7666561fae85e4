"""`glottoscope label`: which features are asked about, what is shown of them, what keys do, and what is said in the end."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from study_fixture import Ended, command, environment, state

from glottoscope.errors import InputError
from glottoscope.features.granularity import join_labels, read_labels
from glottoscope.report.browser.labels import Label, LabelStore
from glottoscope.study.browsing import open_site
from glottoscope.study.label_agreement import INTERPRETABLE, MEASURES, TOKEN_LEVEL, agreement_of
from glottoscope.study.label_keys import END, LineKeys, plain
from glottoscope.study.label_sampling import Choice, Item, allotment, chosen_setups, draw
from glottoscope.study.label_session import HELP
from glottoscope.study.label_view import EXAMPLES, Example, Piece, View, print_view, shown_examples, visible
from glottoscope.study.labelling import merged
from glottoscope.study.store import RunStore, read_parquet

SETUP = "m@20/layer_01/seed_0"  # of the tiny run: what is asked about unless something else is named


@pytest.fixture
def root(tiny: RunStore, tmp_path: Path) -> Path:
    """A copy of the tiny run that labels may be written into."""
    shutil.copytree(tiny.root, tmp_path / "run")
    return tmp_path / "run"


Ask = Callable[..., Ended]


@pytest.fixture
def ask(root: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The command with answers, one a line."""

    def asked(answers: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(answers.split("|")) + "\n"))
        return command("label", root, "--rater", "mari", *arguments)

    return asked


def said(root: Path, rater: str = "mari") -> list[tuple[int, int | None, str]]:
    """Feature, grade and note of the labels that hold."""
    labels = LabelStore(RunStore(root).labels_path).latest()
    return [(x.feature, x.granularity, x.note) for x in labels if x.rater == rater]


def sampled(root: Path, n: int = 100, *, seed: int = 0, blind: bool = False, choice: Choice = Choice()) -> list[Item]:  # noqa: B008 - frozen
    """What the command asks about, in its order."""
    site = open_site(root)
    setups = chosen_setups(site.record, choice)
    columns = {row["id"]: site.list(site.setup(row["id"])).columns for row in setups}
    return draw(site.record, setups, columns, classes=choice.classes, n=n, seed=seed, shuffled=blind)


# ---- the sample


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 60), st.randoms(use_true_random=False))
def test_an_allotment_is_even_and_grows(sizes: list[int], n: int, random: Any) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)
    taken = allotment(sizes, n, order)
    assert sum(taken) == min(n, sum(sizes))
    assert all(0 <= t <= size for t, size in zip(taken, sizes, strict=True))
    # Who could give more has given as much as anyone, up to the odd one.
    for t, size in zip(taken, sizes, strict=True):
        assert t == size or t >= max(taken) - 1
    more = allotment(sizes, n + 1, order)
    assert all(a <= b for a, b in zip(taken, more, strict=True))


def site_record() -> dict[str, Any]:
    rows = [
        {"id": f"{model}@{step}/layer_{layer:02d}/seed_{seed}", "model": model, "name": name, "lm_seed": lm_seed, "step": step,
         "layer": layer, "sae_seed": seed, "final": step == last, "middle": layer == 2}
        for model, name, lm_seed, last in (("big", "big", 0, 30), ("big-s1", "big", 1, 20), ("small", "small", 0, 30))
        for step in (0, 10, last) for layer in (0, 2) for seed in (0, 1)
    ]  # fmt: skip
    return {"setups": rows, "default": {"model": "big"}, "classes": ["en", "ja", "mixed", "dead"]}


@pytest.mark.parametrize(
    ("choice", "ids"),
    [
        ({}, ["big@30/layer_02/seed_0"]),
        ({"models": ["small"]}, ["small@30/layer_02/seed_0"]),
        ({"models": ["big-s1"], "steps": ["0"]}, ["big-s1@0/layer_02/seed_0"]),
        ({"models": ["big", "big-s1"]}, ["big@30/layer_02/seed_0", "big-s1@20/layer_02/seed_0"]),
        ({"steps": ["0", "30"], "layers": ["0"]}, ["big@0/layer_00/seed_0", "big@30/layer_00/seed_0"]),
        ({"sae_seeds": ["1"]}, ["big@30/layer_02/seed_1"]),
        ({"sae_seeds": ["all"], "layers": ["all"]}, [f"big@30/layer_0{x}/seed_{s}" for x in (0, 2) for s in (0, 1)]),
        ({"models": ["all"]}, [f"{x}/layer_02/seed_0" for x in ("big@30", "big-s1@20", "small@30")]),
    ],
)  # fmt: skip
def test_which_setups_are_meant(choice: dict[str, Any], ids: list[str]) -> None:
    assert [row["id"] for row in chosen_setups(site_record(), Choice(**choice))] == ids


def test_everything_may_be_meant() -> None:
    record = site_record()
    every = Choice(models=["all"], steps=["all"], layers=["all"], sae_seeds=["all"])
    assert chosen_setups(record, every) == record["setups"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"models": ["huge"]}, "--model huge: there is none among these setups; there are big, big-s1, small, or all"),
        ({"steps": ["7"]}, "--step 7: there is none among these setups; there are 0, 10, 30, or all"),
        ({"models": ["big-s1"], "steps": ["30"]}, "--step 30.*there are 0, 10, 20, or all"), ({"layers": ["x"]}, "--layer x"),
        ({"sae_seeds": ["2"]}, "--sae-seed 2"),
    ],
)  # fmt: skip
def test_setups_that_are_not_there(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        chosen_setups(site_record(), Choice(**choice))


def drawn(n: int, *, seed: int = 0, classes: tuple[str, ...] = (), shuffled: bool = False) -> list[Item]:
    """From two setups: 60 en, 30 ja (10 of them without examples), 9 mixed (4 of them bilingual), 1 dead each."""
    names = np.array([0] * 60 + [1] * 30 + [2] * 9 + [3], float)
    examples = np.array([5] * 80 + [0] * 10 + [5] * 9 + [0], float)
    bilingual = np.array([np.nan] * 60 + [0] * 35 + [1] * 4 + [0], float)
    record = site_record()
    setups = record["setups"][:2]
    columns = {row["id"]: {"class": names, "examples": examples, "bilingual": bilingual} for row in setups}
    return draw(record, setups, columns, classes=classes, n=n, seed=seed, shuffled=shuffled)


def counts(items: list[Item]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for item in items:
        found[item.setup[-1], item.name] = found.get((item.setup[-1], item.name), 0) + 1
    return found


def test_a_sample_is_even_over_setups_and_classes() -> None:
    strata = [(s, c) for s in "01" for c in ("en", "ja", "mixed")]
    assert counts(drawn(30)) == dict.fromkeys(strata, 5)
    assert sorted(counts(drawn(33)).values()) == [5, 5, 5, 6, 6, 6]
    # The nine mixed ones of each are soon all there: the others give more.
    assert counts(drawn(98)) == {(s, c): n for s in "01" for c, n in (("en", 20), ("ja", 20), ("mixed", 9))}
    assert len(drawn(1000)) == len(set(drawn(1000))) == 2 * (60 + 20 + 9)
    assert not any(80 <= item.feature < 90 or item.feature == 99 for item in drawn(1000))  # nothing to look at


def test_a_sample_is_its_seeds_and_a_larger_one_holds_it() -> None:
    assert drawn(20) == drawn(20)
    assert set(drawn(20)) != set(drawn(20, seed=1))
    assert set(drawn(20)) <= set(drawn(21)) <= set(drawn(90))
    assert set(drawn(20, shuffled=True)) == set(drawn(20))
    order = [(x.setup, x.name) for x in drawn(60, shuffled=True)]
    assert order != sorted(order) and [(x.setup, x.name) for x in drawn(60)] == sorted(order)


def test_classes_may_be_named() -> None:
    assert {x.name for x in drawn(50, classes=("ja", "mixed"))} == {"ja", "mixed"}
    assert counts(drawn(1000, classes=("bilingual",))) == {("0", "bilingual"): 4, ("1", "bilingual"): 4}
    both = counts(drawn(1000, classes=("mixed", "bilingual")))
    assert both["0", "mixed"] == 5 and both["0", "bilingual"] == 4
    assert len(drawn(1000, classes=("all",))) == len(drawn(1000))
    with pytest.raises(InputError, match=r"--class german: unknown; choose from en, ja, mixed, dead, bilingual, or all"):
        drawn(5, classes=("german",))
    with pytest.raises(InputError, match="no feature of these setups and classes has examples"):
        drawn(5, classes=("dead",))


# ---- what is shown


def shown(view: View, **options: Any) -> str:
    out = io.StringIO()
    print_view(view, {"en": "English", "ja": "Japanese"}, Console(file=out, width=100, **options))
    return out.getvalue()


def example(language: str, *pieces: tuple[str, int], peak: int = 0) -> Example:
    return Example(language, [Piece(text, level, n == peak) for n, (text, level) in enumerate(pieces)])


def test_active_tokens_are_marked_with_and_without_styles() -> None:
    view = View([example("en", (" the", 0), (" dog", 100), (" and", 20), (" cat", 60), peak=1), example("ja", ("犬", 80))], {})
    assert "   the [[dog]] and [cat]\n" in shown(view)
    assert "[[犬]]" in shown(view)
    marked = shown(view, force_terminal=True)
    assert "\x1b[1;7mdog\x1b[0m" in marked and "\x1b[4mand\x1b[0m" in marked and "\x1b[1;4mcat\x1b[0m" in marked
    assert "[[" not in marked
    colourless = shown(view, force_terminal=True, no_color=True)
    assert colourless == marked  # no colour was there to begin with


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_text_does_nothing_to_a_terminal(terminal: bool) -> None:
    hostile = "a\x1b]0;title\x07\x1b[31m\u202eb\u2066\x00\x9b31m\ud800\ue000\r\n[red]x[/red]\u2028y\tz"
    view = View([example("en", (hostile, 100), ("q" * 10_000, 0))], {"en": [hostile, "r" * 10_000]}, (hostile,))
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(view, force_terminal=True)) if terminal else shown(view)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ue000]", text)
    assert "[red]x[/red]⏎ y z" in text  # no markup either
    assert len(text) < 3000
    text.encode()


def test_visible_text_keeps_what_is_text() -> None:
    for text in ("dog", "犬と猫", "é e\u0301", "👨\u200d👩\u200d👧", "שלום", " a  b "):
        assert visible(text) == text
    assert visible("a\nb\r\nc") == "a⏎ b⏎ c"


def test_examples_of_both_languages_as_far_as_there_are_any() -> None:
    en, ja = ([example(x, (f"{x}{n}", 100)) for n in range(20)] for x in ("en", "ja"))

    def counted(found: list[Example]) -> tuple[int, int]:
        languages = [e.language for e in shown_examples(found, ("en", "ja"))]
        assert languages == sorted(languages)
        return languages.count("en"), languages.count("ja")

    assert counted(en + ja) == (EXAMPLES, EXAMPLES)
    assert counted(en) == (2 * EXAMPLES, 0)
    assert counted(en[:2] + ja) == (2, 2 * EXAMPLES - 2)
    assert counted(en[:2] + ja[:1]) == (2, 1)
    assert counted([]) == (0, 0)
    assert shown_examples(ja + en, ("en", "ja"))[:EXAMPLES] == en[:EXAMPLES]
    assert "English: no examples" in shown(View(ja, {}))


def test_tokens_of_one_character_are_shown_as_it() -> None:
    """犬 in three byte tokens, the strongest in the middle, then an active word and a special token."""
    dog = "犬".encode()
    pieces = [b"a", dog[:1], dog[1:2], dog[2:], b" b", b"", b"c"]
    found = merged(pieces, {1: 30, 2: 100, 4: 7, 9: 9}, 2)
    assert found == [("a", 0, False), ("犬", 100, True), (" b", 7, False), ("c", 0, False)]


def test_a_long_example_is_cut_around_its_strongest_token() -> None:
    pieces = [(f" w{n}", 100 if n == 40 else 0) for n in range(64)]
    text = shown(View([example("en", *pieces, peak=40)], {}))
    assert "… " in text and "[[w40]]" in text and " w25 " in text
    assert " w20 " not in text and "w60" not in text


# ---- keys


def test_lines_are_keys() -> None:
    keys = LineKeys(io.StringIO("1\n\n ２ \nn a note\nN\nanother\nS\nquit\n"))
    with keys:
        assert [keys.key(), keys.key(), keys.key()] == ["1", "2", "n"]
        assert keys.line("note: ") == "a note"
        assert keys.key() == "n"
        assert keys.line("note: ") == "another"
        assert [keys.key(), keys.key(), keys.key(), keys.key()] == ["s", "quit", END, END]
    assert plain("４") == "4" and plain("Ｑ") == "q"


def test_grades_are_written_at_once_and_the_command_goes_on(ask: Ask, root: Path) -> None:
    order = sampled(root, 6)
    ended = ask("4|1|q", "--sample", "6")
    assert ended.code == 0, ended.err
    assert "6 feature(s) in the sample, 0 of them graded by mari before" in ended.out
    assert f"2 label(s) saved in {RunStore(root).labels_path}" in ended.out
    assert said(root) == sorted([(order[0].feature, 4, ""), (order[1].feature, 1, "")])
    again = ask("2|3|2|1|x", "--sample", "6")
    assert "6 feature(s) in the sample, 2 of them graded by mari before" in again.out
    assert "1 of 4" in again.out and "That was the last one" in again.out
    assert [x.feature for x in order[2:]] == [f for f, g, _ in sorted(said(root), key=lambda x: order_of(order, x[0]))[2:]]
    ended = ask("", "--sample", "6")
    assert "All of it is done; a larger --sample or another --seed has more." in ended.out
    assert "8 feature(s) in the sample, 6 of them" in ask("q", "--sample", "8").out
    labels = LabelStore(RunStore(root).labels_path).latest()
    assert {(x.setup, x.blind) for x in labels} == {(SETUP, False)}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels[0].time)


def order_of(items: list[Item], feature: int) -> int:
    return [x.feature for x in items].index(feature)


def test_another_rater_sees_the_same_sample(ask: Ask, root: Path) -> None:
    ask("1|2|3", "--sample", "3", "--blind")
    ended = ask("1|2|3", "--sample", "3", "--blind", "--rater", "ken")
    assert "0 of them graded by ken before" in ended.out
    assert said(root) == said(root, "ken") and len(said(root)) == 3
    assert {x.blind for x in LabelStore(RunStore(root).labels_path).latest()} == {True}


def test_back_undo_skip_and_notes(ask: Ask, root: Path) -> None:
    a, b, c = (x.feature for x in sampled(root, 3))
    assert "This is the first one." in ask("b|q", "--sample", "3").out
    assert "There is nothing to undo." in ask("u|q", "--sample", "3").out
    assert "0 label(s) saved" in ask("s|s|s|x", "--sample", "3").out
    assert said(root) == []
    assert "your label: 1 uninterpretable" in ask("1|b|q", "--sample", "3").out
    assert said(root) == [(a, 1, "")]
    # From here on only b and c are asked about. A note stays with the grade that follows.
    ask("n seen twice|4|n|line of its own|q", "--sample", "3")
    assert sorted(said(root)) == sorted([(a, 1, ""), (b, 4, "seen twice"), (c, None, "line of its own")])
    # A note alone is no grade: c is asked about again, and undo brings the state before back, one by one.
    ended = ask("2|u|q", "--sample", "3")
    assert "your label: a note only" in ended.out and "0 label(s) saved" in ended.out
    assert (c, None, "line of its own") in said(root)
    ended = ask("3|u|u|n|changed|1|b|2|x", "--sample", "3")
    assert "There is nothing to undo." in ended.out
    assert (c, 2, "changed") in said(root)
    assert ask("n|", "--sample", "4").out.count("No note.") == 1


def test_the_last_grade_can_be_taken_back(ask: Ask, root: Path) -> None:
    (a,) = (x.feature for x in sampled(root, 1))
    ask("1|u|4|b|3|x", "--sample", "1")
    assert said(root) == [(a, 3, "")]
    ask("u", "--sample", "1")
    assert said(root) == [(a, 3, "")]  # there was nothing of this session


def test_unknown_keys_and_help(ask: Ask, root: Path) -> None:
    ended = ask("7|12|?|" + "z" * 500 + "|q", "--sample", "2")
    assert ended.out.count("is no answer") == 3
    assert ended.out.count(HELP.splitlines()[0]) == 2
    assert max(map(len, ended.out.splitlines())) < 300
    assert said(root) == []


def test_what_is_not_blind_says_where_a_feature_is_from(ask: Ask, root: Path) -> None:
    (item,) = sampled(root, 1)
    out = ask("q", "--sample", "1").out
    assert f"{SETUP}, feature {item.feature}, class {item.name}" in out
    assert "density" in out


def test_blind_says_nothing_but_text(ask: Ask, root: Path) -> None:
    open_out = ask("q", "--sample", "40").out
    out = ask("|".join(["s"] * 40), "--sample", "40", "--blind").out
    asked = out[out.index("1 of ") : out.index("label(s) saved")]
    assert asked.count("English") > 5
    for word in (
        "class",
        "mixed",
        "unclassified",
        "feature ",
        "layer",
        "step",
        "seed",
        "m@",
        "density",
        "coherence",
        "phi",
        "R ",
        "0.",
    ):
        assert word not in asked.replace("feature's maximum", ""), word
    assert "class" in open_out
    # Nor does the order: it is not by class.
    names = [x.name for x in sampled(root, 40, blind=True)]
    assert names != sorted(names, key=["en", "ja", "mixed", "neutral", "unclassified"].index)


def test_other_setups_and_classes(ask: Ask, root: Path) -> None:
    out = ask("1|1|1|1|x", "--sample", "4", "--step", "all", "--layer", "all", "--class", "en", "--class", "ja").out
    assert "4 feature(s) in the sample" in out
    labels = LabelStore(RunStore(root).labels_path).latest()
    assert len({x.setup for x in labels}) > 1
    table = RunStore(root).table("features").to_pylist()
    classes = {(f"m@{r['step']}/layer_{r['layer']:02d}/seed_0", r["feature"]): r["language"] for r in table}
    assert {classes[x.setup, x.feature] for x in labels} <= {"en", "ja"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "none"), "--model none"),
        (("--step", "7"), "--step 7: there is none among these setups; there are 0, 20, or all"),
        (("--class", "cat"), "--class cat: unknown; choose from en, ja, mixed"), (("--rater", "<b>"), "rater '<b>'"),
        (("--class", "dead"), "has examples to look at"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(ask: Ask, root: Path, arguments: tuple[str, ...], words: str) -> None:
    before = state(root)
    ended = ask("1|2", *arguments)
    assert ended.code == 2
    assert words in ended.complaint
    assert state(root) == before


def test_what_is_no_run(tmp_path: Path) -> None:
    assert "no such run directory" in command("label", tmp_path / "none").complaint
    assert command("label", tmp_path, "--sample", "0").code == 2


def test_only_labels_are_written(ask: Ask, root: Path) -> None:
    before = state(root)
    ask("1|n x|2|u|q", "--sample", "5")
    changed = {name for name, value in state(root).items() if before.get(name) != value}
    assert changed == {"labels/labels.jsonl"}


# ---- CSV


def test_csv_is_what_the_study_reads(ask: Ask, root: Path, tmp_path: Path) -> None:
    items = sampled(root, 5)
    ask("4|n =1+1|2|1|3|4|x", "--sample", "5")
    path = tmp_path / "out" / "labels.csv"
    ended = command("label", root, "--csv", path, "--rater", "mari")
    assert (ended.code, ended.out) == (0, f"{path} written: 5 label(s) of mari\n")
    joined, unmatched = join_labels(RunStore(root).table("features"), read_labels(path))
    assert unmatched == 0
    found = {
        r["feature"]: r["granularity"]
        for r in joined.to_pylist()
        if r["granularity"] is not None and (r["step"], r["layer"]) == (20, 1)
    }  # fmt: skip
    assert found == dict(zip([x.feature for x in items], [4, 2, 1, 3, 4], strict=True))
    assert ",'=1+1\n" in path.read_text(encoding="utf-8")


def test_csv_of_two_raters(ask: Ask, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    empty = command("label", root, "--csv", path)
    assert "no labels yet" in empty.complaint
    ask("1|2|3|x", "--sample", "3")
    ask("1|4|4|x", "--sample", "3", "--rater", "ken")
    both = command("label", root, "--csv", path)
    assert "6 label(s) of ken, mari" in both.out
    assert "2 feature(s) have different labels" in both.out and "--rater NAME" in both.out
    with pytest.raises(InputError, match="second, different label"):
        read_labels(path)
    command("label", root, "--csv", path, "--rater", "ken")
    assert sorted(read_labels(path)["granularity"].to_pylist()) == [1, 4, 4]
    assert "there are ken, mari" in command("label", root, "--csv", path, "--rater", "eve").complaint
    assert "is a folder" in command("label", root, "--csv", tmp_path).complaint


def test_a_file_with_strange_lines_is_said(ask: Ask, root: Path) -> None:
    ask("1|q", "--sample", "2")
    with open(RunStore(root).labels_path, "ab") as handle:
        handle.write(b"{torn")
    ended = ask("1|x", "--sample", "2")
    assert "the last line is cut off" in ended.out
    assert len(said(root)) == 2


# ---- agreement


def many(root: Path, rater: str, seed: int) -> dict[tuple[str, int], int]:
    """Labels of every living feature of two setups, related to the measures."""
    rng, store, given_ = np.random.default_rng(seed), LabelStore(RunStore(root).labels_path), {}
    for setup in (SETUP, "m@20/layer_00/seed_0"):
        for row in read_parquet(RunStore(root).cells_dir / setup / "features.parquet").to_pylist():
            if row["alive"]:
                grade = 1 + int(rng.integers(0, 2)) + 2 * int((row["monosemanticity"] or 0) + rng.normal(0, 0.3) > 0.5)
                given_[setup, row["feature"]] = grade
                store.append(Label(rater, setup, row["feature"], grade))
    return given_


def test_the_record_of_agreement(root: Path) -> None:
    mari, ken = many(root, "mari", 0), many(root, "ken", 1)
    store = RunStore(root)
    labels = LabelStore(store.labels_path).latest()
    agreement = agreement_of(store)
    record = agreement(labels)
    (pair,) = record["pairs"]
    places = sorted(mari)
    first, second = [ken[x] for x in places], [mari[x] for x in places]
    assert (pair["a"], pair["b"], pair["n"]) == ("ken", "mari", len(places))
    assert pair["kappa"] == pytest.approx(cohen_kappa_score(first, second), abs=5e-5)
    assert pair["weighted_kappa"] == pytest.approx(cohen_kappa_score(first, second, weights="linear"), abs=5e-5)
    assert pair["kappa_low"] < pair["kappa"] < pair["kappa_high"]
    assert sum(map(sum, pair["confusion"])) == pair["n"]

    tables = {x: read_parquet(store.cells_dir / x / "features.parquet") for x in {place[0] for place in places}}
    for row in record["measures"]:
        assert row["measure"] in MEASURES
        agreed = [p for p in places if (mari[p] >= 2) == (ken[p] >= 2)]
        if row["against"] == TOKEN_LEVEL:
            agreed = [p for p in agreed if mari[p] >= 2 and (mari[p] == 4) == (ken[p] == 4)]
        truth = [mari[p] == 4 if row["against"] == TOKEN_LEVEL else mari[p] >= 2 for p in agreed]
        score = [tables[s][row["measure"]][f].as_py() for s, f in agreed]
        known = [n for n, x in enumerate(score) if x is not None]
        assert (row["n"], row["n_positive"]) == (len(known), sum(truth[n] for n in known))
        if row["auc"] is not None:
            assert row["auc"] == pytest.approx(roc_auc_score([truth[n] for n in known], [score[n] for n in known]), abs=5e-5)
    assert {row["against"] for row in record["measures"]} == {INTERPRETABLE, TOKEN_LEVEL}
    json.dumps(record, allow_nan=False)
    assert agreement(labels) is record  # unchanged labels: nothing is computed again
    assert agreement(labels[:-1]) is not record
    assert agreement_of(store)(labels) == record


def test_agreement_of_one_rater_or_of_nothing(root: Path) -> None:
    agreement = agreement_of(RunStore(root))
    assert agreement([]) == {"pairs": [], "measures": []}
    alone = agreement([Label("a", SETUP, 0, 1), Label("a", SETUP, 1, None, "a note")])
    assert alone["pairs"] == [] and all(row["auc"] is None for row in alone["measures"])
    elsewhere = agreement([Label("a", "gone@1/layer_00/seed_0", 0, 1), Label("b", "gone@1/layer_00/seed_0", 0, 2)])
    assert elsewhere["measures"] == [] and elsewhere["pairs"][0]["n"] == 1
    # One vote each is a tie, and no answer.
    tie = agreement([Label("a", SETUP, 0, 1), Label("b", SETUP, 0, 4)])
    assert tie["measures"] == []


def test_agreement_is_said_in_the_end(ask: Ask, root: Path) -> None:
    assert "Agreement needs a second rater" in ask("1|q", "--sample", "2").out
    many(root, "mari", 0)
    many(root, "ken", 1)
    out = ask("q", "--sample", "2").out
    assert "Raters" in out and "ken, mari" in out and "weighted kappa" in out
    assert "Measures against interpretable (2-4): AUC, 0.5 is chance" in out
    assert re.search(r"monosemanticity +│ \d+ +│ \d+ +│ 0\.\d\d \[0\.\d\d, [01]\.\d\d\]", out)


# ---- a real terminal


def _own_terminal() -> None:
    """So that Ctrl-C is the terminal's to send, also where the tests themselves run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The command at a terminal of its own."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glottoscope.cli", "label", str(root), "--rater", "mari", *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, close_fds=True,
            env={**environment(), "TERM": "xterm-256color", "COLUMNS": "100", "LANG": "C.UTF-8"},
            preexec_fn=_own_terminal,
        )  # fmt: skip
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What the terminal shows until `text` is there; shown once, it is passed."""
        limit = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < limit, f"{text!r} is not in {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:
                    assert text in self.seen, self.seen[-2000:]
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self, answer: str) -> None:
        """Press Ctrl-C, as often as it takes: Python's readline sleeps through one that comes just before it waits for a key."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(answer, 3)
                return
        self.wait_for(answer)

    def end(self) -> int:
        """Its exit code; the terminal is as it was."""
        code = self.process.wait(30)
        assert termios.tcgetattr(self.slave) == self.before
        return code


@pytest.fixture
def terminal(root: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(root, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        os.close(one.master)
        os.close(one.slave)


PROMPT = "? help\r\n"


def test_a_terminal_takes_keys_one_by_one(root: Path, terminal: Callable[..., Terminal]) -> None:
    a, b, c = (x.feature for x in sampled(root, 3))
    here = terminal("--sample", "3")
    page = here.wait_for(PROMPT)
    assert "\x1b[1;7m" in page  # the strongest token, in reverse type
    here.type("4")
    here.wait_for("4 token-level")
    here.wait_for(PROMPT)
    here.type("\x1b[A\x1bOP\x1b[15~\x1b[1;5C")  # arrows and function keys are no answers
    here.type("n")
    here.wait_for("note: ")
    here.type("x\x7f犬の話\r")  # the terminal's own line editing
    here.wait_for("Noted.")
    here.type("２")
    here.wait_for("2 concept")
    here.wait_for(PROMPT)
    here.type("b")
    here.wait_for("your label: 2 concept")
    here.wait_for(PROMPT)
    here.type("q")
    here.wait_for("2 label(s) saved")
    assert here.end() == 0
    assert sorted(said(root)) == sorted([(a, 4, ""), (b, 2, "犬の話")])
    assert c not in {x[0] for x in said(root)}


@pytest.mark.parametrize("during", ["a key", "a note"])
def test_ctrl_c_leaves_a_terminal_as_it_was(root: Path, terminal: Callable[..., Terminal], during: str) -> None:
    here = terminal("--sample", "3")
    here.wait_for(PROMPT)
    here.type("1")
    here.wait_for(PROMPT)
    if during == "a note":
        here.type("n")
        here.wait_for("note: ")
    here.interrupt("1 label(s) saved")
    here.wait_for("interrupted; the same command continues where it stopped")
    assert here.end() == 130
    assert len(said(root)) == 1


def test_ctrl_d_ends_and_a_killed_one_keeps_its_labels(root: Path, terminal: Callable[..., Terminal]) -> None:
    here = terminal("--sample", "5")
    here.wait_for(PROMPT)
    here.type("3")
    here.wait_for(PROMPT)
    here.type("\x04")
    here.wait_for("1 label(s) saved")
    assert here.end() == 0
    here = terminal("--sample", "5")
    here.wait_for(PROMPT)
    here.type("3")
    here.wait_for(PROMPT)
    here.process.send_signal(signal.SIGKILL)
    here.process.wait(30)
    assert len(said(root)) == 2
