"""The study file: defaults, every mistake at once with its remedy, overrides, presets."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from study_fixture import PLANTED, as_study, merged, planted, planted_model, text_study

from glottoscope.errors import InputError
from glottoscope.study.config import CheckpointModel, PretrainModel, TextCorpus
from glottoscope.study.load import PRESETS, corpus_path, dump_study, load_study, parse_study, preset_text

CHECKPOINTS: dict[str, Any] = {"name": "lm", "source": "checkpoints", "root": "weights", "tokens_per_step": 1024}


def message_of(raw: dict[str, Any], overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as caught:
        parse_study(tomli_w.dumps(raw), name="s.toml", folder=Path("/data"), overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers() -> None:
    raw = planted(sae={"lr": [1e-3]})
    for name in ("lr", "warmup_steps", "batch_tokens"):
        del raw["sae"][name]
    study = as_study(raw)
    assert (study.sae.warmup_steps, study.sae.batch_tokens, study.sae.eps) == (1000, 32768, 6.25e-10)
    assert study.sae.normalization == "unit"
    assert study.sae.betas == (0.9, 0.999)
    assert (study.features.threshold, study.features.language_share) == (0.7, 0.9)
    assert (study.features.phi_threshold, study.features.paper_threshold) == (0.4, 0.5)
    assert study.schema_ == 1
    assert study.languages == ("en", "ja")


def test_a_study_never_changes() -> None:
    study = as_study(PLANTED)
    with pytest.raises(ValidationError):
        study.sae.k = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_all_mistakes_at_once_with_the_nearest_names() -> None:
    raw = planted(sae={"stepps": 3, "k": "many"}, compute={"thread": 2}, features={"bootstrp": 1}, reports={})
    del raw["study"]["name"]
    del raw["models"][0]["d_model"]
    message = message_of(raw)
    assert message.startswith("s.toml: ")
    for part in (
        "unknown field sae.stepps: did you mean 'steps'?",
        "sae.k: Input should be a valid integer",
        "unknown field compute.thread: did you mean 'threads'?",
        "unknown field features.bootstrp: did you mean 'bootstrap'?",
        "unknown field reports: did you mean 'report'?",
        "missing field study.name",
        "missing field models.0.d_model",
    ):
        assert part in message


def test_an_unknown_field_far_from_all_names_lists_them() -> None:
    assert "unknown field study.zzz (known here: name, seed, notes)" in message_of(planted(study={"zzz": 1}))


def test_fields_of_corpus_and_models_are_named_without_their_kind(tmp_path: Path) -> None:
    raw = text_study(tmp_path)
    raw["corpus"]["contextlength"] = 3
    raw["corpus"]["sources"][0]["pth"] = raw["corpus"]["sources"][0].pop("path")
    message = message_of(raw)
    assert "unknown field corpus.contextlength: did you mean 'context_length'?" in message
    assert "unknown field corpus.sources.0.pth: did you mean 'path'?" in message
    assert "missing field corpus.sources.0.path" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae": {"k": 33}}, "k = 33 is larger than n = 32"),
        ({"sae": {"expansion": 2.0}}, "exactly one of n and expansion"),
        ({"sae": {"train_tokens": 10}}, "exactly one of steps and train_tokens"),
        ({"sae": {"lr": []}}, "lr and seeds need at least one entry"),
        ({"sae": {"seeds": [1, 1]}}, "none twice"),
        ({"layers": [0, 3]}, "layer 3 is beyond model m, which has 2: use 0..2"),
        ({"layers": []}, "name at least one layer"),
        ({"layers": "some"}, "layers: Input should be 'all'"),
        ({"study": {"name": "a/b"}}, "study.name"),
        ({"models": []}, "models"),
        ({"models": [*PLANTED["models"], *PLANTED["models"]]}, "two models are called m"),
        ({"models": planted_model(checkpoints=[0, 21])}, "checkpoint 21 lies beyond steps = 20"),
        ({"models": planted_model(checkpoints=[0, 0])}, "none twice"),
        ({"models": planted_model(layers=[])}, "name at least one layer"),
        ({"models": planted_model(source="trained")}, "source"),
        ({"models": [CHECKPOINTS]}, "give checkpoints, or glob, or pattern with steps"),
        ({"models": [{**CHECKPOINTS, "glob": "*"}]}, "models from checkpoints need corpus.kind = 'text'"),
        ({"models": [{**CHECKPOINTS, "pattern": "iter_{stp}", "steps": [1]}]}, "must use {step}"),
        ({"features": {"threshold": 1.0}}, "features.threshold"),
        ({"features": {"language_share": 0.5}}, "features.language_share"),
        ({"features": {"rule": "v2"}}, "features.rule"),
        ({"corpus": {"kind": "wiki"}}, "'planted', 'text'"),
        ({"schema": 7}, "schema 7 is newer than this glottoscope knows (1): update glottoscope"),
    ],
)
def test_wrong_values_are_explained(changes: dict[str, Any], words: str) -> None:
    assert words in message_of(merged(PLANTED, changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"languages": ["en", "en"]}, "two or more different languages"),
        ({"languages": ["en"]}, "two or more different languages"),
        ({"languages": ["en", "ja", "de"]}, "no source for language de"),
        ({"languages": ["en", "mixed"]}, "corpus.languages"),
        ({"split": [0.5, 0.5, 0.5]}, "three positive shares that add up to 1"),
        ({"tokenizer_training": None}, "need corpus.tokenizer or [corpus.tokenizer_training]"),
    ],
)
def test_wrong_text_corpora_are_explained(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    raw = text_study(tmp_path)
    raw["corpus"] = {k: v for k, v in {**raw["corpus"], **changes}.items() if v is not None}
    assert words in message_of(raw)


def test_rule_v1_knows_english_and_japanese_only(tmp_path: Path) -> None:
    assert "English and Japanese only" in message_of(text_study(tmp_path, ("en", "de"), features={"rule": "v1"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("study = [\nx\n", "line 2"),
        ("study = [\n", "end of document"),
        ('[study]\nname = "a"\nname = "b"\n', "line 3"),
        ("a b c", "line 1"),
    ],
)
def test_bad_toml_names_its_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=rf"s\.toml: not TOML: .*{words}"):
        parse_study(text, name="s.toml", folder=Path())


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such study file; `glottoscope init"):
        load_study(tmp_path / "none.toml")
    with pytest.raises(InputError, match="no such study file"):
        load_study(tmp_path)
    (tmp_path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    with pytest.raises(InputError, match="not valid UTF-8 at byte 8"):
        load_study(tmp_path / "latin.toml")


# ---- --set


def test_overrides() -> None:
    study = parse_study(
        tomli_w.dumps(PLANTED), name="s.toml", folder=Path(),
        overrides=["sae.k=2", "sae.lr=[1e-3, 3e-3]", "models.0.d_model=24", "study.name=trial", 'compute.dtype="bfloat16"',
                   "layers=all", "controls.shuffled=true", "models.0.mixture.parallel_share=0.5"],
    )  # fmt: skip
    assert (study.sae.k, study.sae.lr, study.study.name, study.layers) == (2, (1e-3, 3e-3), "trial", "all")
    assert study.compute.dtype == "bfloat16"
    assert study.controls.shuffled
    model = study.models[0]
    assert isinstance(model, PretrainModel)
    assert (model.d_model, model.mixture.parallel_share) == (24, 0.5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sae.k", "write key=value"),
        ("=3", "write key=value"),
        ("models.1.d_model=3", "'1' is no index of a list of 1"),
        ("models.x.d_model=3", "'x' is no index"),
        ("study.name.first=a", "study.name is a value, not a table"),
        ("sae.kk=3", "unknown field sae.kk: did you mean 'k'?"),
        ("sae.k=99", "k = 99 is larger than n = 32"),
    ],
)
def test_wrong_overrides_are_explained(override: str, words: str) -> None:
    assert words in message_of(PLANTED, (override,))


def test_paths_start_from_the_file_and_overrides_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = text_study(tmp_path)
    raw["corpus"]["root"] = "data"
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "s.toml").write_text(tomli_w.dumps(raw), encoding="utf-8")
    monkeypatch.chdir(here)
    study = load_study(home / "s.toml")
    assert isinstance(study.corpus, TextCorpus)
    assert corpus_path(study.corpus, study.corpus.sources[0].path) == home.resolve() / "data" / "en.jsonl"
    study = load_study(home / "s.toml", ["corpus.root=other"])
    assert isinstance(study.corpus, TextCorpus)
    assert corpus_path(study.corpus, study.corpus.sources[0].path) == here.resolve() / "other" / "en.jsonl"
    del raw["corpus"]["root"]
    raw["models"] = [{**CHECKPOINTS, "checkpoints": [{"step": 3, "path": "w/3"}]}]
    del raw["models"][0]["root"]
    del raw["corpus"]["tokenizer_training"]
    (home / "s.toml").write_text(tomli_w.dumps(raw), encoding="utf-8")
    study = load_study(home / "s.toml", ["corpus.sources.1.path=mine.jsonl"])
    assert isinstance(study.corpus, TextCorpus)
    assert [s.path for s in study.corpus.sources] == [str(home.resolve() / "en.jsonl"), str(here.resolve() / "mine.jsonl")]
    model = study.models[0]
    assert isinstance(model, CheckpointModel)
    assert model.checkpoints[0].path == str(home.resolve() / "w" / "3")


# ---- presets and round trips


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_round_trip(name: str) -> None:
    study = parse_study(preset_text(name), name=name, folder=Path("/data"))
    again = parse_study(dump_study(study), name="dump", folder=Path("/elsewhere"))
    assert again == study
    assert dump_study(again) == dump_study(study)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_commented(name: str) -> None:
    assert preset_text(name).count("#") > 8


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown preset 'plantd': choose one of .*did you mean 'planted'\?"):
        preset_text("plantd")


def test_the_example_of_the_paper_is_its_preset() -> None:
    example = (Path(__file__).parents[1] / "examples" / "llm-jp-3.toml").read_text(encoding="utf-8")
    assert tomllib.loads(example) == tomllib.loads(preset_text("llm-jp-3"))


@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 32), seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    lr=st.lists(st.floats(1e-6, 1), min_size=1, max_size=3, unique=True), layers=st.lists(st.integers(0, 2), min_size=1),
    notes=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20),
)  # fmt: skip
def test_any_study_survives_its_dump(k: int, seeds: list[int], lr: list[float], layers: list[int], notes: str) -> None:
    study = as_study(planted(sae={"k": k, "seeds": seeds, "lr": lr}, layers=layers, study={"notes": notes}))
    assert as_study(tomllib.loads(dump_study(study))) == study
