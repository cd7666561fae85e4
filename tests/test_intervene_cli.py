"""`glottoscope intervene`: what it prints and leaves behind, beside the study's own experiments, and one line for bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from study_fixture import (
    BRIEF,
    PLANTED,
    Ended,
    command,
    contents,
    intervened,
    planted_model,
    run,
    state,
    text_study,
    work_done,
    write_jsonl,
)
from test_intervene_study import RESULTS, Pair, documents, forward, loss, measured, members, pair_of, plan_of, rows_of
from transformers import PreTrainedModel

import glottoscope as gs
from glottoscope.errors import InputError
from glottoscope.intervention import comet
from glottoscope.sae.model import TopKSAE
from glottoscope.study.config import InterventionConfig
from glottoscope.study.interventions import settings_of
from glottoscope.study.runner import clean
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import check
from glottoscope.study.store import RunStore

# Beside the model of the tiny study another one of its width, and a wider one, which is the largest.
MODELS = {
    **PLANTED,
    "models": [
        *planted_model(),
        *planted_model(name="other", steps=4, warmup_steps=1, checkpoints=[4]),
        *planted_model(name="wide", d_model=32, steps=1, warmup_steps=0, checkpoints=[1], layers=[1]),
    ],
}
NAMED = [
    "--base", "0", "--donor", "20", "--model", "m", "--layer", "1", "--alpha", "0", "--alpha", "1", "--draws", "2",
    "--part", "mixed", "--part", "all", "--features", "few=1, 2", "--features", "none=density > 2", "--translate", "--pairs", "3",
    "--set", "tokens=300", "--set", "intervention.bootstrap=20", "--set", "translation.max_new_tokens=4",
    "--set", "translation.shots=1", "--set", "translation.draws=1", "--name", "mine", "--workers", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def several(tiny: RunStore, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A finished run of three models. Tests read it, and what they start on it must fail."""
    root = tmp_path_factory.mktemp("several") / "run"
    shutil.copytree(tiny.root, root)
    return run(MODELS, root)


@pytest.fixture(scope="module")
def done(several: RunStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, Ended]:
    """The command with most of its options, on a copy of the run, and what it said."""
    root = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(several.root, root)
    return RunStore(root), command("intervene", root, *NAMED)


@pytest.fixture(scope="module")
def unaligned(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Real text without aligned sentences."""
    return run(text_study(text_folder, aligned=False), tmp_path_factory.mktemp("unaligned") / "run")


def refused(ended: Ended) -> str:
    """The one line that says what is wrong, found before anything ran or by a unit of the stage."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    if any(x.startswith("glottoscope: ") for x in lines):
        return ended.complaint
    (summary,) = (n for n, x in enumerate(lines) if "failed; the rest is kept" in x)
    (found,) = (x.strip() for x in lines[summary + 1 :] if x.strip())
    return found


def start(store: RunStore, *arguments: str | Path) -> str:
    """What the command says of bad input; nothing in the run changes."""
    before = state(store.root)
    said = refused(command("intervene", store.root, "--model", "m", "--base", "0", "--workers", "1", *arguments))
    assert state(store.root) == before
    return said


# ---- what it does


def test_it_says_what_was_found(done: tuple[RunStore, Ended]) -> None:
    store, ended = done
    assert ended.code == 0, ended.err
    for text in ("documents", "sentences", "translation"):
        assert f"m@0 + 20 layer 1, {text}" in ended.out
    rows = rows_of(store, metric="ppl", language="all", text="documents")
    (baseline,) = (r for r in rows if r["arm"] == "baseline")
    (mixed,) = (r for r in rows if r["arm"] == "part" and r["part"] == "mixed" and r["chosen"])
    assert f"{baseline['value']:.3f}" in ended.out
    interval = f"{mixed['value']:.3f} ({mixed['change']:+.3f} [{mixed['change_low']:+.3f}, {mixed['change_high']:+.3f}])"
    (line,) = (x for x in ended.out.splitlines() if interval in x)
    assert f"{mixed['rank']} of 3" in line
    assert "mixed" in line
    (line,) = (x for x in ended.out.splitlines() if "empty class" in x)  # said, not left out
    assert "none" in line
    assert ended.out.splitlines()[-1] == f"report: {store.report_dir / 'index.html'}"
    assert "Does it cause anything?" in (store.report_dir / "index.html").read_text(encoding="utf-8")


def test_its_rows(done: tuple[RunStore, Ended]) -> None:
    store, _ = done
    rows = rows_of(store)
    assert {r["experiment"] for r in rows} == {"mine"}
    assert {r["part"] for r in rows if r["arm"] == "part"} == {"mixed", "all", "few", "none"}
    assert {r["alpha"] for r in rows if r["arm"] == "part" and r["value"] is not None} == {0.0, 1.0}
    assert {r["text"] for r in rows} == {"documents", "sentences", "translation", "dev_documents", "dev_sentences"}
    few = next(r for r in rows if r["part"] == "few" and r["arm"] == "part")
    assert few["n_features"] == 2
    assert store.table_path("intervention").with_suffix(".csv").exists()
    assert work_done(store)["intervene"] == 7


def test_experiments_of_the_command_line_stay_beside_those_of_the_study(done: tuple[RunStore, Ended], tmp_path: Path) -> None:
    shutil.copytree(done[0].root, tmp_path / "run")
    store = RunStore(tmp_path / "run")
    mine = store.table("intervention")
    (folder,) = (store.interventions_dir / "mine").glob("*/*/*")
    raw = {**MODELS, "intervention": {**BRIEF, "models": ["m"]}}
    run(raw, store.root, until="intervene")
    assert {r["experiment"] for r in rows_of(store)} == {"mine", "study"}
    assert store.table("intervention").slice(0, mine.num_rows).equals(mine)
    assert clean(store.root) == []
    # With other SAEs it is no longer true: its rows leave the table, and `clean` removes it.
    run({**raw, "sae": {**PLANTED["sae"], "steps": 11}}, store.root, until="intervene")
    assert {r["experiment"] for r in rows_of(store)} == {"study"}
    assert [path for path, _ in clean(store.root)] == [folder]
    assert {r["experiment"] for r in rows_of(store)} == {"study"}


def test_a_donor_of_another_model(several: RunStore, tmp_path: Path) -> None:
    settings = {**BRIEF, "models": ["m"], "bases": [20], "donor_model": "other", "alphas": [0.6]}
    store = intervened(several, tmp_path / "run", settings, raw=MODELS)
    assert {(r["model"], r["base_step"], r["donor_model"], r["donor_step"]) for r in rows_of(store)} == {("m", 20, "other", 4)}
    from glottoscope.lm.checkpoints import Checkpoint, load_lm

    base = pair_of(store, base=20)
    donor: PreTrainedModel = load_lm(Checkpoint(str(store.checkpoint_dir("other", 4)), 4, 0), device="cpu", dtype="float32")
    sae = TopKSAE.load(store.setup_dir("other", 4, 1, 0))
    pair, ids = Pair(base.base, donor, base.base_sae, sae, base.special), documents(store, BRIEF["tokens"])[0]
    nll_SU, _ = measured(store, "documents")
    every = members(store, "all", 20) | True
    for s, condition in enumerate(plan_of(store)["texts"]["documents"]["conditions"]):
        if (condition["arm"], condition["part"]) in (("part", "all"), ("self", "all"), ("donor", None), ("reconstruction", None)):
            change = pair.change(condition, every, ids, forward(donor, ids)[1][1])
            model = donor if condition["arm"] == "donor" else base.base
            assert math.isclose(nll_SU[s, 0], loss(forward(model, ids, {1: change})[0], ids), rel_tol=1e-5), condition


def test_without_aligned_sentences(unaligned: RunStore, text_folder: Path, tmp_path: Path) -> None:
    settings = {k: v for k, v in BRIEF.items() if k not in ("parts", "texts")}
    raw = text_study(text_folder, aligned=False)
    store = intervened(unaligned, tmp_path / "run", settings, raw=raw)
    assert {r["text"] for r in rows_of(store)} == {"documents", "dev_documents"}
    assert "bilingual" not in {r["part"] for r in rows_of(store)}
    store = intervened(unaligned, tmp_path / "run", {**settings, "parts": ["bilingual", "all"]}, raw=raw)
    (row,) = rows_of(store, part="bilingual")
    assert row["note"] == "empty class: without aligned sentences no feature is known to be bilingual"
    (row,) = rows_of(store, text="documents", metric="nll", language="all", arm="part", part="all")
    assert row["note"] is None
    assert row["n_features"] > 0


# ---- settings


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({"features": {"few": [1]}}, [], {"parts": ("mixed", "few"), "features": {"few": (1,)}}),
        ({"features": {"few": [1]}, "parts": ["few"]}, [], {"parts": ("few",)}),
        ({"bases": [20], "draws": 0}, [], {"bases": (20,), "draws": 0, "tokens": 300}),
        ({"translation": {"pairs": 5}}, [], {"translation.pairs": 5, "translation.shots": 1}),
        ({"translation": None}, [], {"translation": None}),
        ({}, ["tokens=7", "intervention.translation.shots=2"], {"tokens": 7, "translation.shots": 2}),
        ({}, ["alphas=[0.3]"], {"alphas": (0.3,), "parts": ("mixed",)}),
    ],
)
def test_the_settings_of_the_study_are_the_defaults(
    tiny: RunStore, tmp_path: Path, changes: Mapping[str, Any], overrides: list[str], expected: Mapping[str, Any]
) -> None:
    shutil.copytree(tiny.root, tmp_path / "run")
    settings = {**BRIEF, "parts": ["mixed"], "translation": {"pairs": 3, "shots": 1}}
    store = run({**PLANTED, "intervention": settings}, tmp_path / "run", until="pretrain")
    found = settings_of(store, changes, overrides)
    for name, value in expected.items():
        inner: Any = found
        for part in name.split("."):
            inner = getattr(inner, part)
        assert inner == value, name


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "7"], "base: model m has no checkpoint of step 7; it has 0, 20"),
        (["--donor", "7"], "donor: model m has no checkpoint of step 7; it has 0, 20"),
        (["--layer", "2"], "layer 2: there is no SAE of m there; the study has layers 0, 1"),
        (["--model", "n"], "intervention.models: there is no model 'n'; there are m, other, wide"),
        (["--donor-model", "n"], "intervention.donor_model: there is no model 'n'"),
        (["--donor-model", "wide"], "base m has width 16 and donor wide has width 32"),
        (["--donor-model", "wide", "--layer", "0"], "width"),
        (["--alpha", "nan"], "intervention.alphas.0: Input should be a finite number (given nan)"),
        (["--alpha", "1", "--alpha", "inf"], "intervention.alphas.1: Input should be a finite number (given inf)"),
        (["--alpha", "1", "--alpha", "1"], "alphas needs at least one strength, none twice"),
        (["--part", "mixd"], "part 'mixd' is unknown: choose from en, ja, mixed, bilingual, bilingual_paper, all"),
        (["--features", "x=phy > 0.5"], "features 'phy > 0.5' is no condition on the feature table"),
        (["--features", "x=phi > "], "is no condition on the feature table"),
        (["--features", "x=select * from read_csv('/etc/passwd')"], "is no condition on the feature table"),
        (["--features", "x=3,32"], "feature 32 does not exist: the SAE has 32, numbered from 0"),
        (["--features", "x=²"], "features '²' is no condition on the feature table"),
        (["--features", "x"], "--features 'x': write NAME=IDS or NAME=SQL"),
        (
            ["--features", "few=3,17", "--part", "few", "--layer", "0", "--layer", "1"],
            "features.few: ids are those of one SAE and there are several (m@20 layer 0, m@20 layer 1)",
        ),
        (
            ["--features", "few=3,17", "--part", "few", "--layer", "0", "--layer", "1", "--together"],
            "features.few: ids are those of",
        ),
        (["--features", "mixed=3"], "features.mixed: that is the name of a class; choose another"),
        (["--features", "ja=3"], "intervention.features.ja: that is a language of the study"),
        (["--mode", "subtract"], "intervention.mode"),
        (["--set", "tokens=0"], "intervention.tokens"),
        (["--set", "sae.k=2"], "unknown field intervention.sae"),
        (["--set", "window=20", "--set", "stride=30"], "window = 20 and stride = 30: give"),
        (["--set", "draw=3"], "unknown field intervention.draw: did you mean 'draws'?"),
        (["--name", "study"], "--name study: that is the name of the study file's own interventions"),
        (["--name", "../mine"], "--name '../mine': use letters, digits"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options_are_one_line(several: RunStore, arguments: list[str], words: str) -> None:
    assert words in start(several, *arguments)


def test_ids_of_several_models(several: RunStore) -> None:
    """Two donors have two SAEs; one donor for two bases has one."""
    context, given = Context.open(several.root), {**BRIEF, "bases": "half", "models": ["m", "other"], "features": {"few": [3, 17]}}
    own = InterventionConfig.model_validate({**given, "parts": ["few"]})
    with pytest.raises(InputError, match=r"features.few: ids are those of one SAE and there are several \(m@20 layer 1, other@4"):
        check(context, own)
    for changes in ({"donor_model": "m"}, {"parts": ["mixed"]}, {"models": ["m"]}, {"features": {"few": "feature in (3, 17)"}}):
        check(context, own.model_copy(update=changes))


def test_ids_with_one_layer_and_several_bases(tiny: RunStore, tmp_path: Path) -> None:
    settings = {**BRIEF, "bases": [0, 20], "parts": ["few"], "features": {"few": [3, 17]}}
    store = intervened(tiny, tmp_path / "run", settings)
    assert {r["base_step"] for r in rows_of(store, part="few")} == {0, 20}


def test_comet_uses_one_gpu_at_most(several: RunStore) -> None:
    ended = command("intervene", several.root, "--base", "0", "--translate", "--comet-gpus", "2")
    assert ended.code == 2
    assert "--comet-gpus" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_strengths_of_a_study_file_are_finite(tmp_path: Path, alpha: float) -> None:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps({**PLANTED, "intervention": {"alphas": [0.1, alpha]}}), encoding="utf-8")
    said = refused(command("run", path, "--out", tmp_path / "out"))
    assert f"intervention.alphas.1: Input should be a finite number (given {alpha})" in said
    assert not (tmp_path / "out").exists()


def test_a_wrong_step_in_the_study_file_ends_the_run_with_one_line(tiny: RunStore, tmp_path: Path) -> None:
    shutil.copytree(tiny.root, tmp_path / "out")
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps({**PLANTED, "intervention": {**BRIEF, "bases": [7]}}), encoding="utf-8")
    said = refused(command("run", path, "--out", tmp_path / "out", "--workers", "1"))
    assert "base: model m has no checkpoint of step 7; it has 0, 20" in said
    assert contents(tmp_path / "out", ("tables/*",)) == contents(tiny.root, ("tables/*",))


FILES: dict[str, tuple[str, str]] = {
    "field.jsonl": ('{"id": "a.0", "en": "a dog", "de": "ein Hund"}\n', "no field 'ja' (fields present: id, en, de)"),
    "type.jsonl": ('{"id": "a.0", "en": "a dog", "ja": 3}\n', "field 'ja' holds a int, not text"),
    "json.jsonl": ('{"id": "a.0", "en": \n', "line 1"),
    "empty.jsonl": ('{"id": "a.0", "en": "", "ja": ""}\n', "holds no pair with text in all of en, ja"),
    "columns.tsv": ("id\ten\tde\nb\tc\td\n", "line 1: no header with the columns en, ja (found: id, en, de)"),
    "alt-e-to-j.json": ('{"instruction": "Translate."}', "no field 'samples' (fields present: instruction)"),
    "alt-j-to-e.json": ('{"samples": []}', "holds no sample with text on both sides"),
    "alt.json": ('{"samples": [{"input": "a", "output": "b"}]}', "the name does not end in e-to-j or j-to-e"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_to_translate_are_one_line(several: RunStore, tmp_path: Path, name: str) -> None:
    text, words = FILES[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    said = start(several, "--translate", "--set", f'translation.files=["{path}"]')
    assert words in said
    assert str(path) in said


def test_a_file_to_translate_that_is_not_there(several: RunStore, tmp_path: Path) -> None:
    path = tmp_path / "none.tsv"
    assert f"{path}: no such file" in start(several, "--translate", "--set", f'translation.files=["{path}"]')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--translate"], "translation needs sentences: give corpus.aligned.test, or intervention.translation.files"),
        (["--set", 'texts=["sentences"]'], "intervention.texts: sentences need corpus.aligned.test"),
    ],
    ids=["translate", "sentences"],
)
def test_what_needs_aligned_sentences(unaligned: RunStore, arguments: list[str], words: str) -> None:
    assert words in start(unaligned, *arguments)


def test_examples_need_sentences(unaligned: RunStore, text_folder: Path) -> None:
    path = write_jsonl(text_folder / "few.jsonl", [{"id": "a.0", "en": "the river .", "ja": "川。"}])
    said = start(unaligned, "--translate", "--set", f'translation.files=["{path}"]')
    assert "translation needs 4 examples and has 0: give corpus.aligned.dev" in said


# ---- the run directory


def without_tables(root: Path) -> None:
    shutil.rmtree(root / "tables")


def without_an_sae(root: Path) -> None:
    shutil.rmtree(root / "cells" / "m@20" / "layer_01")


def newer(root: Path) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "schema": 99}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no such run directory; `glottoscope run"),
        (without_tables, "the study is not complete; `glottoscope run` continues it"),
        (without_an_sae, "m@20, layer 1: there is no SAE with scored features"),
        (newer, "was written by a newer glottoscope (schema 99): update yours"),
    ],
    ids=["missing", "not-finished", "no-sae", "newer"],
)
def test_a_run_directory_that_will_not_do(tiny: RunStore, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    shutil.copytree(tiny.root, tmp_path / "run")
    damage(tmp_path / "run")
    before = state(tmp_path)
    said = refused(command("intervene", tmp_path / "run", "--base", "0", "--layer", "1", "--workers", "1"))
    assert words in said
    assert state(tmp_path) == before


def test_what_is_no_run_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    assert "is no run directory" in refused(command("intervene", tmp_path, "--base", "0"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_in_use_is_refused(several: RunStore) -> None:
    with several.lock():
        assert "another process is running the study" in start(several)


def test_nothing_is_left_of_what_was_refused(several: RunStore) -> None:
    assert contents(several.root, RESULTS) == {}


# ---- COMET


def comet_model(folder: Path) -> Path:
    """What COMET takes for a model until it loads it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "hparams.yaml").write_text("class_identifier: regression_metric\n", encoding="utf-8")
    (folder / "checkpoints" / "model.ckpt").write_bytes(b"weights")
    return folder


def test_comet_is_looked_for_before_anything_runs(several: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(comet.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    model = comet_model(tmp_path / "model")
    assert "--comet scores translations: add --translate" in start(several, "--comet", model)
    said = start(several, "--translate", "--comet", tmp_path / "none")
    assert f"no COMET checkpoint at {tmp_path / 'none'}" in said
    said = start(several, "--translate", "--comet", model)
    assert f"no environment for COMET in {tmp_path / 'nowhere'}: run `glottoscope comet setup`" in said
    said = start(several, "--translate", "--comet", model, "--comet-environment", tmp_path)
    assert f"no environment for COMET in {tmp_path}" in said


def test_comet_setup_needs_a_python_that_fits(tmp_path: Path) -> None:
    ended = command("comet", "setup", "--folder", tmp_path / "comet", "--python", "/bin/false")
    assert "/bin/false does not run, and COMET's packages" in refused(ended)
    (tmp_path / "thesis.tex").write_text("words")
    said = refused(command("comet", "setup", "--folder", tmp_path))
    assert f"{tmp_path} holds other files: give an empty or a new folder" in said
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_help() -> None:
    ended = command("intervene", "--help")
    assert ended.code == 0
    for option in ("--base", "--donor", "--layer", "--together", "--alpha", "--features", "--translate", "--comet", "--name"):
        assert option in ended.out
    # What no option says is as in the study file, if it says anything.
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ended.out).split())
    for default in ("where half of the fall", "the last.", "the middle one.", "32.", "1,000.", "the largest that is no control."):
        assert f"Default: the study file's, else {default}" in words
    assert command("comet", "--help").code == command("comet", "setup", "--help").code == 0


def test_it_is_there_for_python(done: tuple[RunStore, Ended]) -> None:
    table = gs.load_run(done[0].root).table("intervention")
    assert table.equals(done[0].table("intervention"))
