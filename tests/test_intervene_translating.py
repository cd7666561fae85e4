"""Translations of a study: the sentences they were made of, the tokenizer they were scored with, where an output ends, examples
that do not fit, and chunks that are not those of the plan."""

from __future__ import annotations

import json
import math
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sacrebleu
from rich.console import Console
from sacrebleu.metrics.bleu import BLEU
from study_fixture import BRIEF, command, contents, intervened, log_lines, run, state, text_study, work_done
from test_intervene_study import RESULTS, asked, folder_of, forward, outputs, pair_of, row_of, rows_of

import glottoscope as gs
from glottoscope.errors import InputError
from glottoscope.study.interventions import print_effects
from glottoscope.study.runner import remake_report
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene import experiments as stage
from glottoscope.study.stages.intervene import translating
from glottoscope.study.stages.intervene.effects import make_effects
from glottoscope.study.stages.intervene.measuring import load_losses
from glottoscope.study.stages.intervene.sentences import tasks_of
from glottoscope.study.stages.intervene.translating import ask, load_statistics
from glottoscope.study.stages.tokenizing import load_run_tokenizer
from glottoscope.study.store import RunStore

TRANSLATION: dict[str, Any] = {
    "pairs": 4, "draws": 0, "shots": 1, "max_new_tokens": 4, "shot": "{source} = {target}\n", "query": "{source} =", "stop": "\n",
}  # fmt: skip
SETTINGS: dict[str, Any] = {**BRIEF, "translation": TRANSLATION}


@pytest.fixture
def own(text_run: RunStore, text_folder: Path, tmp_path: Path) -> tuple[RunStore, Path]:
    """Translations of real text, and the folder of its files, both of which a test may change."""
    folder = tmp_path / "text"
    shutil.copytree(text_folder, folder, ignore=shutil.ignore_patterns("run"))
    store = intervened(text_run, tmp_path / "run", SETTINGS, raw=text_study(folder))
    return store, folder


def again(store: RunStore, raw: dict[str, Any], settings: dict[str, Any]) -> int:
    """Run the study with these interventions; returns how many units of the stage that took."""
    before = log_lines(store)
    run({**raw, "intervention": settings}, store.root, until="intervene")
    return work_done(store, before).get("intervene", 0)


# ---- the sentences


def pairs_in(path: Path) -> list[dict[str, str]]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("which", ["test", "dev"])
def test_other_sentences_are_not_translated_under_the_name_of_the_old(own: tuple[RunStore, Path], which: str) -> None:
    store, folder = own
    path = folder / f"pairs.{which}.jsonl"
    rows = pairs_in(path)[::-1]
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows), encoding="utf-8")
    (folder_of(store) / "translation-en-ja-000.npz").unlink()  # as a kill between two chunks would leave it
    before = state(store.root, RESULTS)
    for arguments in (("--name", "mine"), ("--name", "mine", "--pairs", "3")):
        said = command(
            "intervene", store.root, "--base", "0", "--layer", "1", "--translate", "--workers", "1", *arguments
        ).complaint
        assert said == f"{path}: is not the file that the run has read: put it back, or `glottoscope run` the study again"
    assert state(store.root, RESULTS) == before
    # What was made of the old file is still shown as it is.
    remake_report(store.root, Console(file=StringIO()))
    assert row_of(store, text="translation", arm="donor", metric="chrf", language="en-ja")["value"] is not None
    # A run reads the new file, and translates all of it.
    assert again(store, text_study(folder), SETTINGS) == 6
    references = [x["ja"] for x in pairs_in(folder / "pairs.test.jsonl")[:4]]
    for arm in ("baseline", "donor"):
        row = row_of(store, text="translation", arm=arm, metric="chrf", language="en-ja")
        assert math.isclose(row["value"], sacrebleu.corpus_chrf(outputs(store, "en-ja")[arm, None, None], [references]).score)
    task = next(t for t in tasks_of(Context.open(store.root), asked(store)[0]) if t.source == "en")
    assert task.shots == [(rows[0]["en"], rows[0]["ja"])] if which == "dev" else [p[1] for p in task.pairs] == references


# ---- the scores


def test_what_another_tokenizer_scored_is_scored_again_and_told(
    own: tuple[RunStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = own
    references = [x["ja"] for x in pairs_in(folder / "pairs.test.jsonl")[:4]]
    with_mecab, texts = store.table("intervention"), contents(store.root, ("interventions/**/*.parquet",))

    def check(tokenizer: str) -> None:
        for arm in ("baseline", "donor"):
            row = row_of(store, text="translation", arm=arm, metric="bleu", language="en-ja")
            score = BLEU(tokenize=tokenizer, force=True).corpus_score(outputs(store, "en-ja")[arm, None, None], [references])
            assert math.isclose(row["value"], score.score, rel_tol=1e-9)
            assert f"|tok:{tokenizer}" in row["signature"]

    check("ja-mecab")
    with monkeypatch.context() as without:
        for name in [name for name in sys.modules if "mecab" in name.lower()]:
            without.delitem(sys.modules, name)
        without.setitem(sys.modules, "MeCab", None)  # as if it were not installed
        # Looking at the run changes nothing: the numbers are those of the tokenizer that they are said to be of.
        remake_report(store.root, Console(file=StringIO()))
        assert {e.name for e in stage.all_experiments(Context.open(store.root))} == {"study"}
        make_effects(str(store.root), asked(store)[0].dump(), lambda *_: None)
        path = folder_of(store) / "intervention.parquet"
        found = [r for r in pq.read_table(path).to_pylist() if (r["metric"], r["language"]) == ("bleu", "en-ja")]
        assert found == rows_of(store, metric="bleu", language="en-ja")
        assert all("|tok:ja-mecab" in r["signature"] for r in found)
        assert again(store, text_study(folder), SETTINGS) == 3  # scores into Japanese, effects, the table
        assert "|tok:char" in row_of(store, text="translation", arm="donor", metric="bleu", language="en-ja")["signature"]
        found = contents(store.root, ("interventions/**/translation-*.parquet",))
        assert found == {name: texts[name] for name in found}  # nothing was translated again
        scored = {r["value"] for r in rows_of(store, text="translation", metric="bleu", language="en-ja")}
    expected = {
        BLEU(tokenize="char", force=True).corpus_score(x, [references]).score for x in outputs(store, "en-ja").values()
    }  # fmt: skip
    assert sorted(scored) == pytest.approx(sorted(expected), rel=1e-9)
    assert again(store, text_study(folder), SETTINGS) == 3
    check("ja-mecab")
    assert store.table("intervention").equals(with_mecab)


# ---- chunks


FEW: dict[str, Any] = {**BRIEF, "translation": {"pairs": 3, "draws": 0, "shots": 1, "max_new_tokens": 3}}


def test_chunks_of_another_size_are_measured_again(tiny: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the old ones beside them some conditions would be left out and others be there twice."""
    store = intervened(tiny, tmp_path / "run", FEW)
    table = store.table("intervention")
    conditions = {x: len(stage.read_plan(folder_of(store))["texts"][x]["conditions"]) for x in ("documents", "translation")}
    for module, name in ((stage, "CHUNK"), (stage, "TRANSLATED_CHUNK"), (translating, "TRANSLATED_CHUNK")):
        monkeypatch.setattr(module, name, 5)
    intervened(tiny, store.root, FEW)
    assert len(list(folder_of(store).glob("documents-*.npz"))) == -(-conditions["documents"] // 5) > 1
    assert len(list(folder_of(store).glob("translation-en-ja-*.npz"))) > 1
    found = store.table("intervention")
    for name in ("arm", "part", "alpha", "text", "metric", "language"):
        assert found[name].equals(table[name])
    np.testing.assert_allclose(found["value"].to_numpy(), table["value"].to_numpy(), rtol=1e-6)


def shorten(path: Path, names: tuple[str, ...]) -> None:
    """Leave the last condition out of a file of sums."""
    with np.load(path) as found:
        arrays = {name: found[name][:-1] if name in names else found[name] for name in found.files}
    np.savez(path, **arrays)


def test_sums_of_other_conditions_are_refused(tiny: RunStore, tmp_path: Path) -> None:
    store = intervened(tiny, tmp_path / "run", FEW)
    context, (experiment,) = Context.open(store.root), asked(store)
    n = len(load_losses(context, experiment, "documents").nll)
    shorten(folder_of(store) / "documents-000.npz", ("nll", "added", "positions"))
    with pytest.raises(InputError, match=f"losses of {n - 1} conditions on documents, and the plan has {n}: remove the folder"):
        load_losses(context, experiment, "documents")
    found = load_statistics(context, experiment, "en-ja")
    shorten(folder_of(store) / "translation-en-ja-000.npz", (*found.sums, "added_norm"))
    with pytest.raises(InputError, match=f"translations en-ja are not of the {len(found.added_norm)} conditions of its plan"):
        load_statistics(context, experiment, "en-ja")


# ---- where a translation ends


def cut_by_hand(store: RunStore, ids: list[int], stop: str) -> str:
    text = gs.load_run(store.root).tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.split(stop, 1)[0].strip()


def test_a_token_that_holds_more_than_the_stop_is_cut_and_not_dropped(own: tuple[RunStore, Path]) -> None:
    """A stop within words, as a line break within `.\\n` would be."""
    store, folder = own
    settings = {"shots": 0, "shot": "{source} = {target}e\n", "stop": "e", "max_new_tokens": 6}
    assert again(store, text_study(folder), {**BRIEF, "translation": {**TRANSLATION, **settings}}) > 0
    pair, pieces = pair_of(store), Context.open(store.root).vocabulary.piece
    tokenizer, shorter = gs.load_run(store.root).tokenizer, 0
    for row, sentence in enumerate(pairs_in(folder / "pairs.test.jsonl")[:4]):
        for direction, source in (("en-ja", "en"), ("ja-en", "ja")):
            prompt = [*([1] if 1 in pair.special else []), *tokenizer(f"{sentence[source]} =", add_special_tokens=False).input_ids]
            ids: list[int] = []
            while len(ids) < 6:
                new = int(forward(pair.donor, prompt + ids)[0][-1].argmax())
                if new in pair.special:
                    break
                ids.append(new)
            assert outputs(store, direction)["donor", None, None][row] == cut_by_hand(store, ids, "e"), (row, direction, ids)
            whole = next((i for i, x in enumerate(ids) if b"e" in pieces[x]), len(ids))
            shorter += cut_by_hand(store, ids[:whole], "e") != cut_by_hand(store, ids, "e")
    assert shorter > 0  # what dropping the last token whole would have lost


def test_only_the_whole_stop_ends_a_translation_of_real_text(own: tuple[RunStore, Path]) -> None:
    store, folder = own
    settings = {"pairs": 2, "shots": 0, "shot": "{source} = {target} .\n", "stop": " ."}
    again(store, text_study(folder), {**BRIEF, "translation": {**TRANSLATION, **settings}})
    context, (experiment,) = Context.open(store.root), asked(store)
    pieces = context.vocabulary.piece
    for task in tasks_of(context, experiment):
        found = ask(context, experiment, task, load_run_tokenizer(context), None)
        assert found.stop_ids == set(context.token_info.special_ids)
        assert {pieces[i] for i in found.last_ids} == {x for x in pieces if b" ." in x}
    assert any(b"." in x and b" ." not in x for x in pieces)


# ---- examples that do not fit


def test_the_planted_worlds_default_prompts_fit(tiny: RunStore, tmp_path: Path) -> None:
    store = intervened(tiny, tmp_path / "run", {**BRIEF, "translation": {"pairs": 3, "draws": 0}})
    record = store.done(folder_of(store))
    assert {x["settings"]["dropped_shots"] for name, x in record.items() if name.startswith("translation-")} == {0}
    assert [len(task.shots) for task in tasks_of(Context.open(store.root), asked(store)[0])] == [2, 2]
    assert all(not (r["note"] or "").startswith("prompts: ") for r in rows_of(store))


def test_examples_that_do_not_fit_are_told(tiny: RunStore, tmp_path: Path) -> None:
    settings = {**BRIEF, "translation": {"pairs": 3, "draws": 0, "shots": 4}}
    store = intervened(tiny, tmp_path / "run", settings)
    record = store.done(folder_of(store))
    for direction in ("en-ja", "ja-en"):
        dropped = record[f"translation-{direction}-000"]["settings"]["dropped_shots"]
        assert dropped > 0
        words = f"{dropped} of 4 examples left out, with which the longest sentence does not fit the model"
        notes = {r["note"] for r in rows_of(store, text="translation", language=direction)}
        assert all(note.startswith(f"prompts: {words}") for note in notes)
        said = StringIO()
        print_effects(store.root, asked(store)[0].config, "study", Console(file=said, width=200))
        assert said.getvalue().count(f"{direction}: {words}") == 1
        assert said.getvalue().count(words) == 2  # beneath the table, not in each of its rows
    assert all(not (r["note"] or "").startswith("prompts: ") for r in rows_of(store) if r["text"] != "translation")
    remake_report(store.root, Console(file=StringIO()))
    assert f"English → Japanese: {words}" in (store.report_dir / "index.html").read_text(encoding="utf-8")
