"""Bad input: one clear line, exit code 2, and nothing is harmed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.torch import load_file, save_file
from study_fixture import (
    PLANTED,
    Ended,
    command,
    contents,
    merged,
    planted,
    planted_model,
    run,
    state,
    text_study,
    write_jsonl,
)

from glottoscope.study.store import RunStore


def start(raw: dict[str, Any], folder: Path, *arguments: str, out: Path | None = None) -> Ended:
    """`glottoscope run` on a study, to the feature table."""
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return command("run", path, "--out", out or folder / "out", "--until", "score", "--workers", "1", *arguments)


def complaint(ended: Ended) -> str:
    """The one line that says what is wrong, found before a stage ran or by one of its units."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    if any(x.startswith("glottoscope: ") for x in ended.err.splitlines()):
        return ended.complaint
    lines = ended.err.splitlines()
    (summary,) = (n for n, x in enumerate(lines) if "failed; the rest is kept" in x)
    found = [x.strip() for x in lines[summary + 1 :] if x.strip()]
    assert found, ended.err
    return found[0]


# ---- the study file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae": {"kk": 3}, "corpuss": {}}, ["unknown field sae.kk: did you mean 'k'?", "unknown field corpuss"]),
        ({"sae": {"k": 40}}, ["k = 40 is larger than n = 32"]),
        ({"layers": [0, 5]}, ["layer 5 is beyond model m, which has 2: use 0..2"]),
        ({"features": {"labels": ["nowhere.csv"]}}, ["features.labels", "nowhere.csv: no such file"]),
        ({"compute": {"memory_gb": 1e-6}}, ["raise compute.memory_gb"]),
    ],
)
def test_a_wrong_study_runs_nothing(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    said = complaint(start(merged(PLANTED, changes), tmp_path))
    assert all(w in said for w in words), said
    assert not (tmp_path / "out" / "cells").exists()


def test_k_beyond_an_expansion_is_found_before_anything_runs(tmp_path: Path) -> None:
    raw = planted(sae={"expansion": 0.1})
    del raw["sae"]["n"]
    assert "sae.k = 4 is larger than its n = 2 features" in complaint(start(raw, tmp_path))
    assert not (tmp_path / "out").exists()


def test_fewer_tokens_than_a_batch(tmp_path: Path) -> None:
    said = complaint(start(planted(sae={"batch_tokens": 100_000}), tmp_path))
    assert "5040 positions, fewer than one batch of 100000" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--until", "lunch"),
            "--until lunch: unknown stage; choose one of pretrain, tokens, train, features, score, intervene, report",
        ),
        (("--set", "sae.k"), "write key=value"),
        (("--set", "study.name=a b"), "study.name"),
    ],
)
def test_nonsense_arguments(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in start(PLANTED, tmp_path, *arguments).complaint
    assert not (tmp_path / "out").exists()


def test_unknown_preset(tmp_path: Path) -> None:
    ended = command("init", tmp_path / "s.toml", "--preset", "lmjp")
    assert ended.code == 2
    assert "unknown preset 'lmjp': choose one of planted" in ended.complaint
    assert not list(tmp_path.iterdir())


# ---- the text


GOOD = b'{"id": "a", "text": "words"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "en.jsonl: no such file"),
        (GOOD + b'{"id": "b", "text": \n', "en.jsonl line 2: invalid JSON"),
        (GOOD + GOOD + b'["b"]\n', "en.jsonl line 3"),
        (GOOD + b'{"id": "b", "text": "\xff\xfe"}\n', "line 2"),
        (GOOD + b'{"id": "b", "words": "x"}\n', "no field 'text' (fields present: id, words)"),
        (GOOD + b'{"id": "b", "text": 3}\n', "not text"),
        (b'{"id": "a", "text": ""}\n{"id": "b", "text": " "}\n', "all 2 documents are empty"),
        (b"", "holds no text for language 'en'"),
        (GOOD, "no text of language"),
    ],
    ids=["missing", "json", "array", "utf8", "field", "type", "empty-documents", "empty", "too-short"],
)
def test_bad_documents(text_folder: Path, tmp_path: Path, content: bytes | None, words: str) -> None:
    folder = tmp_path / "text"
    shutil.copytree(text_folder, folder, ignore=shutil.ignore_patterns("run"))
    if content is None:
        (folder / "en.jsonl").unlink()
    elif content == GOOD:  # plenty of documents, none as long as a block
        write_jsonl(folder / "en.jsonl", ({"id": f"d{i}", "text": "the river ."} for i in range(100)))
    else:
        (folder / "en.jsonl").write_bytes(content)
    before = state(folder)
    said = complaint(start(text_study(folder), tmp_path))
    assert words in said
    assert state(folder) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": "a.0", "en": "x"}\n', "no field 'ja'"),
        (b'{"id": "a.0", "en": "x", "ja": "y"}\n{', "line 2"),
        (b'{"id": "a.0", "en": "", "ja": "y"}\n', "no pair with text"),
    ],
)
def test_bad_sentence_pairs(text_folder: Path, tmp_path: Path, content: bytes, words: str) -> None:
    folder = tmp_path / "text"
    shutil.copytree(text_folder, folder, ignore=shutil.ignore_patterns("run"))
    (folder / "pairs.train.jsonl").write_bytes(content)
    assert words in complaint(start(text_study(folder), tmp_path))


def test_one_language_only(text_folder: Path, tmp_path: Path) -> None:
    raw = text_study(text_folder)
    raw["corpus"]["languages"] = ["en"]
    assert "a study needs two or more different languages" in start(raw, tmp_path).complaint
    assert not (tmp_path / "out").exists()


def test_a_language_without_text_of_its_own(text_folder: Path, tmp_path: Path) -> None:
    raw = text_study(text_folder)
    raw["corpus"]["sources"] = raw["corpus"]["sources"][:1]
    assert "no source for language ja" in start(raw, tmp_path).complaint


# ---- checkpoints


@pytest.fixture
def weights(text_run: RunStore, tmp_path: Path) -> Path:
    """A copy of the checkpoints of the text study."""
    shutil.copytree(text_run.model_dir("m"), tmp_path / "weights")
    return tmp_path / "weights"


def on_checkpoints(text_folder: Path, weights: Path, **changes: Any) -> dict[str, Any]:
    model = {
        "name": "lm", "source": "checkpoints", "root": str(weights), "pattern": "step_{step}", "steps": [0, 20],
        "tokens_per_step": 384,
    }  # fmt: skip
    raw = text_study(text_folder, models=[model], **changes)
    del raw["corpus"]["tokenizer_training"]
    return raw


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_anything(folder: Path) -> None:
    shutil.rmtree(folder)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def changed(folder: Path, name: str, value: float | None) -> None:
    """Fill a weight with a value, or drop it."""
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    changed(folder, "model.layers.0.mlp.up_proj.weight", float("nan"))


def with_overflow(folder: Path) -> None:
    changed(folder, "model.layers.0.input_layernorm.weight", 1e30)  # attention scores beyond float32


def without_a_tensor(folder: Path) -> None:
    changed(folder, "model.layers.1.mlp.up_proj.weight", None)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_anything, ["model lm: no checkpoint folder", "step_20 (step 20)"]),
        (without_config, ["config.json"]),
        (without_weights, ["step_20", "holds no weights"]),
        (truncated, ["step_20", "model.safetensors is truncated or corrupt"]),
        (broken_config, ["step_20", "config.json"]),
        (with_nan, ["step_20", "model.layers.0.mlp.up_proj.weight holds NaN or Inf"]),
        (with_overflow, ["cell lm@20, layer 1", "NaN or Inf in the hidden states", "before SAE step 0"]),
        (without_a_tensor, ["step_20", "lacks the weight model.layers.1.mlp.up_proj.weight"]),
    ],
)
def test_bad_checkpoints(
    text_folder: Path, weights: Path, tmp_path: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(weights / "step_20")
    before = state(weights)
    said = complaint(start(on_checkpoints(text_folder, weights), tmp_path))
    assert all(w in said for w in words), said
    assert state(weights) == before
    assert not (tmp_path / "out" / "tables").exists()


def test_a_layer_beyond_a_checkpoint(text_folder: Path, weights: Path, tmp_path: Path) -> None:
    said = complaint(start(on_checkpoints(text_folder, weights, layers=[1, 9]), tmp_path))
    assert "layer 9 is beyond model lm, which has 2: use 0..2" in said
    assert not (tmp_path / "out").exists()


def test_a_mended_checkpoint_lets_the_run_continue(text_folder: Path, text_run: RunStore, weights: Path, tmp_path: Path) -> None:
    without_weights(weights / "step_0")
    raw = on_checkpoints(text_folder, weights)
    assert "holds no weights" in complaint(start(raw, tmp_path))
    shutil.copy(text_run.checkpoint_dir("m", 0) / "model.safetensors", weights / "step_0")
    assert start(raw, tmp_path).code == 0
    assert set(contents(tmp_path / "out", ("cells/**/sae.safetensors",)).values()) == set(
        contents(text_run.root, ("cells/**/sae.safetensors",)).values()
    )


# ---- where results go


def test_an_output_directory_of_another_study(tiny: RunStore, tmp_path: Path) -> None:
    before = state(tiny.root)
    ended = start(planted(study={"name": "other"}), tmp_path, out=tiny.root)
    assert ended.code == 2
    assert "belongs to the study 'tiny', not to 'other': choose another --out" in ended.complaint
    assert state(tiny.root) == before


def test_an_output_directory_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("words")
    ended = start(PLANTED, tmp_path, out=tmp_path / "home")
    assert ended.code == 2
    assert "is not empty and is no run directory: choose another --out" in ended.complaint
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.tex"]
    assert "is a file, not a folder" in start(PLANTED, tmp_path, out=tmp_path / "home" / "thesis.tex").complaint


# ---- a full disk


@pytest.mark.parametrize("limit", [2_000, 60_000], ids=["tokenizer", "weights"])
def test_no_disk_space_is_one_line_and_the_run_continues(tiny: RunStore, tmp_path: Path, limit: int) -> None:
    """No file may grow beyond a limit: the system's refusal of a write, without a disk to fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ended = start(PLANTED, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = complaint(ended)
    assert "no space left on device while writing" in said
    assert "free some and run the study again" in said
    store = run(PLANTED, tmp_path / "out", until="train" if limit == 2_000 else "score")
    expected = contents(tiny.root, ("models/**/*.safetensors", "cells/**/sae.safetensors"))
    assert contents(store.root, ("models/**/*.safetensors", "cells/**/sae.safetensors")) == expected
    if limit != 2_000:
        assert contents(store.root) == contents(tiny.root)
    assert store.leftovers() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    ended = start(planted(models=planted_model(checkpoints=[0, 5, 10, 15, 20])), tmp_path, out=small_disk / "run")
    assert "no space left on device" in complaint(ended)
    assert RunStore(small_disk / "run").study().study.name == "tiny"
