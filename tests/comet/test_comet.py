"""COMET scores from the real unbabel-comet in its own environment; `make test-comet` makes that and runs this.

The model is a tiny random XLM-R with a tokenizer trained here, saved by Lightning as COMET's own models are.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from glottoscope.errors import InputError
from glottoscope.intervention import comet

HUB_NAME = "xlm-roberta-large"  # what COMET-22 names as its encoder
ENGLISH = "the old river was cold and a small boat went down to sea where people said that winter came early this year"
JAPANESE = "その 古い 川は 冷たかった 小さな 舟が 海へ 下り 人々は 今年の 冬は 早く 来たと 言った 町の 灯りが 見えた"

# Runs in COMET's environment: python -I build.py FOLDER. Reads FOLDER/corpus.txt and pairs.json, writes the models and the scores
# that comet's own predict gives with the model in memory, before anything was saved.
BUILD = r"""
import json, pathlib, shutil, sys
import pytorch_lightning as pl, sentencepiece, torch
from comet.models import RegressionMetric
from pytorch_lightning.core.saving import save_hparams_to_yaml
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizerFast

root = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
sentencepiece.SentencePieceTrainer.train(
    input=str(root / "corpus.txt"), model_prefix=str(root / "sentencepiece.bpe"), vocab_size=200, hard_vocab_limit=False
)
tokenizer = XLMRobertaTokenizerFast(vocab_file=str(root / "sentencepiece.bpe.model"))
encoder = root / "encoder"
tokenizer.save_pretrained(encoder)
config = XLMRobertaConfig(
    vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, initializer_range=0.5,
)
XLMRobertaModel(config).save_pretrained(encoder)
model = RegressionMetric(
    encoder_model="XLM-RoBERTa", pretrained_model=str(encoder), layer="mix", layer_transformation="sparsemax", layer_norm=False,
    hidden_sizes=[32], local_files_only=True,
)

expected = {}
for name, case in json.loads((root / "pairs.json").read_text(encoding="utf-8")).items():
    rows = [dict(zip(("src", "mt", "ref"), row)) for row in case["pairs"]]
    expected[name] = model.predict(rows, batch_size=case["batch_size"], gpus=0, progress_bar=False).scores
(root / "expected.json").write_text(json.dumps(expected))

def folder(name):
    path = root / name
    (path / "checkpoints").mkdir(parents=True)
    return path

path = folder("model")
trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.strategy.connect(model)
trainer.save_checkpoint(path / "checkpoints" / "model.ckpt", weights_only=True)
save_hparams_to_yaml(path / "hparams.yaml", model.hparams)

def variant(name, change):
    # A copy of the model with a changed checkpoint.
    checkpoint = torch.load(path / "checkpoints" / "model.ckpt", weights_only=True)
    change(checkpoint)
    there = folder(name)
    torch.save(checkpoint, there / "checkpoints" / "model.ckpt")
    named = checkpoint["hyper_parameters"]["pretrained_model"]
    save_hparams_to_yaml(there / "hparams.yaml", {**model.hparams, "pretrained_model": named})

variant("from_hub", lambda c: c["hyper_parameters"].update(pretrained_model="xlm-roberta-large"))
variant("incomplete", lambda c: c["state_dict"].pop("estimator.ff.0.weight"))
variant("not_finite", lambda c: c["state_dict"]["estimator.ff.0.weight"].fill_(float("nan")))
variant("with_objects", lambda c: c["hyper_parameters"].update(train_data=[pathlib.PurePosixPath("train.csv")]))
"""


def sentence(words: str, joint: str, generator: random.Random) -> str:
    return joint.join(generator.choices(words.split(), k=generator.randint(1, 12)))


def sample_pairs(n: int) -> list[tuple[str, str, str]]:
    generator = random.Random(0)
    return [
        (sentence(ENGLISH, " ", generator), sentence(JAPANESE, "", generator), sentence(JAPANESE, "", generator)) for _ in range(n)
    ]


# Order matters: comet sorts by length within itself. Distinct pairs, so that a swap shows.
PAIRS = [
    ("The old river was cold.", "その古い川は冷たかった。", "古い川は冷たかった。"),
    ("", "", ""),
    ("", "小さな舟が海へ", "小さな舟が"),
    ("the sea", "", "海へ"),
    ("the sea", "海へ", ""),
    ("He said: \"winter\\came\" 'early'", '「冬は」"早く"来たと', "冬は'早く'来た"),
    ("two\nlines\r\nand\ttab", "二\n行", "二\u2028行\u2029"),
    ("a boat 🛶 \u0000 \u200b", "👩‍👩‍👧 舟が", "ﾌﾈ と 舟が"),
    ("that winter " * 400, "今年の冬は" * 400, "冬は"),
    ("That the river was cold", "その古い川は冷たかった。", "古い川は冷たかった。"),
    ("y", "の", "は"),
]
BATCH = 4
# A surrogate alone is scored as U+FFFD; two that make a character are that character.
SURROGATES, REPLACED = ("cold \udce3 river", "川は\ud83d", "\ud83d\udef6"), ("cold \ufffd river", "川は\ufffd", "🛶")
MANY = sample_pairs(3000)  # more than a pipe holds, both ways


class Built(NamedTuple):
    root: Path
    expected: dict[str, list[float]]


def columns(pairs: list[tuple[str, str, str]]) -> tuple[list[str], list[str], list[str]]:
    return [p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]


def children() -> list[int]:
    """Process ids of workers that this process started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:")).split()[1]
            worker = b"comet_worker.py" in (status.parent / "cmdline").read_bytes()
        except (OSError, StopIteration):
            continue
        if worker and int(parent) == os.getpid():
            found.append(int(status.parent.name))
    return found


@pytest.fixture(scope="module")
def environment() -> Path:
    named = os.environ.get(comet.ENVIRONMENT_VARIABLE)
    if not named or not (Path(named) / "bin" / "python").exists():
        pytest.skip(f"${comet.ENVIRONMENT_VARIABLE} names no environment with unbabel-comet; `make test-comet` makes one")
    return Path(named)


@pytest.fixture(scope="module")
def built(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("comet")
    generator = random.Random(1)
    corpus = [sentence(ENGLISH, " ", generator) for _ in range(500)] + [sentence(JAPANESE, "", generator) for _ in range(500)]
    (root / "corpus.txt").write_text("\n".join(corpus), encoding="utf-8")
    cases = {
        "pairs": {"pairs": PAIRS, "batch_size": BATCH},
        "one": {"pairs": [*PAIRS, REPLACED], "batch_size": 1},
        "many": {"pairs": MANY, "batch_size": 64},
    }
    (root / "pairs.json").write_text(json.dumps(cases), encoding="utf-8")
    (root / "build.py").write_text(BUILD, encoding="utf-8")
    done = subprocess.run([environment / "bin" / "python", "-I", root / "build.py", root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Built(root, json.loads((root / "expected.json").read_text()))


def test_scores_are_those_of_predict(built: Built) -> None:
    seen: list[tuple[int, int]] = []
    scores = comet.score(built.root / "model", *columns(PAIRS), batch_size=BATCH, report=lambda done, n: seen.append((done, n)))
    assert scores == built.expected["pairs"]
    assert len(set(scores)) == len(PAIRS)
    assert seen == [(0, 11), (4, 11), (8, 11), (11, 11)]


def test_batch_size_and_odd_text_reach_the_model_and_our_python_path_does_not(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('the torch of another environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    scores = comet.score(built.root / "model" / "checkpoints" / "model.ckpt", *columns([*PAIRS, SURROGATES]), batch_size=1)
    assert scores == built.expected["one"]
    assert scores[:-1] == pytest.approx(built.expected["pairs"], abs=1e-5)


def test_more_text_than_a_pipe_holds(built: Built) -> None:
    assert comet.score(built.root / "model", *columns(MANY), batch_size=64) == built.expected["many"]


def test_encoder_in_a_folder_of_its_name(built: Built, tmp_path: Path) -> None:
    model = shutil.copytree(built.root / "from_hub", tmp_path / "model")
    (model / HUB_NAME).mkdir()
    for file in ("config.json", "sentencepiece.bpe.model"):  # the least that works; the test below has tokenizer.json instead
        shutil.copy(built.root / "encoder" / file, model / HUB_NAME)
    assert comet.score(model, *columns(PAIRS), batch_size=BATCH) == built.expected["pairs"]


def test_model_and_encoder_in_the_cache_of_the_hub(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps files as links to blobs, so hparams.yaml is beside the link and not beside the blob."""

    def cache(name: str, source: Path, files: list[str]) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0123abcd"
        for file in files:
            blob = repository / "blobs" / file.replace("/", "_")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, blob)
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).symlink_to(blob)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abcd")
        return snapshot

    cache(HUB_NAME, built.root / "encoder", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    model = cache("some/comet", built.root / "from_hub", ["hparams.yaml", "checkpoints/model.ckpt"])
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert comet.score(model, *columns(PAIRS), batch_size=BATCH) == built.expected["pairs"]


def test_encoder_that_is_not_there(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError) as error:
        comet.score(built.root / "from_hub", ["a"], ["b"], ["c"])
    message = str(error.value)
    assert f"tokenizer of the encoder {HUB_NAME}" in message and "\n" not in message
    assert str(built.root / "from_hub" / HUB_NAME) in message and f"hf download {HUB_NAME} config.json" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("incomplete", r"model.ckpt lacks 1 of the model's weights, estimator.ff.0.weight first"),
        ("not_finite", r"the score of pair 1 is nan"),
        ("with_objects", r"torch loads these only from a file that you trust.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"),
    ],
)
def test_damaged_checkpoints(built: Built, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        comet.score(built.root / name, ["a"], ["b"], ["c"])


def test_remedy_for_objects_in_a_checkpoint(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert comet.score(built.root / "with_objects", *columns(PAIRS), batch_size=BATCH) == built.expected["pairs"]


def test_truncated_checkpoint(built: Built, tmp_path: Path) -> None:
    model = shutil.copytree(built.root / "model", tmp_path / "model")
    os.truncate(model / "checkpoints" / "model.ckpt", 10_000)
    with pytest.raises(InputError, match=r"model.ckpt cannot be loaded as a COMET checkpoint, download it again \(\w+: "):
        comet.score(model, ["a"], ["b"], ["c"])


def test_worker_that_is_killed(built: Built) -> None:
    def kill(done: int, _: int) -> None:
        if done == 0:
            os.kill(children()[0], signal.SIGKILL)

    with pytest.raises(InputError, match=r"ended by signal 9 \(Killed\).*smaller batch size"):
        comet.score(built.root / "model", *columns(MANY), batch_size=1, report=kill)


def test_interrupt_stops_the_worker(built: Built) -> None:
    seen: list[int] = []

    def interrupt(done: int, _: int) -> None:
        seen.extend(children())
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        comet.score(built.root / "model", *columns(MANY), batch_size=1, report=interrupt)
    assert len(seen) == 1 and not children()


def test_worker_on_its_own(environment: Path, built: Built) -> None:
    """Started from its folder, which holds a comet.py; every line of stdout is a score."""
    command = [environment / "bin" / "python", comet.WORKER.name, built.root / "model", "--batch-size", str(BATCH)]
    rows = [json.dumps(dict(zip(("src", "mt", "ref"), pair, strict=True))) for pair in PAIRS]
    done = subprocess.run(command, input="\n".join(rows), capture_output=True, text=True, cwd=comet.WORKER.parent)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"score": s} for s in built.expected["pairs"]]

    rows[2] = '{"src": "a", "mt": null, "ref": "b"}'
    done = subprocess.run(command, input="\n".join(rows), capture_output=True, text=True, cwd=comet.WORKER.parent)
    assert done.returncode == 2 and done.stdout == ""
    assert json.loads(done.stderr.splitlines()[-1])["error"].startswith("line 3 of the input is not a JSON object of the texts")


def test_gpu_that_is_not_there(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="torch sees no CUDA GPU in COMET's environment: score with gpus = 0"):
        comet.score(built.root / "model", ["a"], ["b"], ["c"], gpus=1)


def test_environment_without_comet(built: Built) -> None:
    with pytest.raises(InputError, match=r"does not hold a working unbabel-comet .*'comet'.*: run `glottoscope comet setup`"):
        comet.score(built.root / "model", ["a"], ["b"], ["c"], environment=Path(sys.prefix))


def test_environment_that_is_not_there(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(comet.ENVIRONMENT_VARIABLE, str(tmp_path / "none"))
    for use in (lambda: comet.score(built.root / "model", ["a"], ["b"], ["c"]), comet.versions):
        with pytest.raises(InputError, match=r"no environment for COMET in .*none: run `glottoscope comet setup`"):
            use()


def test_arguments_that_do_not_fit(built: Built, tmp_path: Path) -> None:
    model = built.root / "model"
    with pytest.raises(InputError, match="equally many texts: 2 sources, 1 hypotheses, 2 references"):
        comet.score(model, ["a", "b"], ["a"], ["a", "b"])
    for batch_size, gpus in ((0, 0), (16, 2), (16, -1)):
        with pytest.raises(InputError, match="batch_size must be at least 1 and gpus 0 or 1"):
            comet.score(model, ["a"], ["b"], ["c"], batch_size=batch_size, gpus=gpus)
    with pytest.raises(InputError, match=r"no COMET checkpoint at .*absent: give the .ckpt file or the model's folder"):
        comet.score(tmp_path / "absent", ["a"], ["b"], ["c"])
    lone = tmp_path / "lone" / "checkpoints" / "model.ckpt"
    lone.parent.mkdir(parents=True)
    lone.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"lone/hparams.yaml is missing"):
        comet.score(lone, ["a"], ["b"], ["c"])
    (lone.parents[1] / "hparams.yaml").write_text("class_identifier: regression_metric\n")
    with pytest.raises(InputError, match=r"is a Git LFS pointer, not the checkpoint: run `git lfs pull`"):
        comet.score(lone, ["a"], ["b"], ["c"])
    assert comet.score(model, [], [], []) == []


def test_provenance(environment: Path, built: Built) -> None:
    file = built.root / "model" / "checkpoints" / "model.ckpt"
    assert comet.fingerprint(built.root / "model") == comet.fingerprint(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    versions = comet.versions(environment)
    lines = comet.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert len(pinned) > 40 and {name: versions[name].partition("+")[0] for name in pinned} == pinned
    code = "import platform; print(platform.python_version())"
    assert versions["python"] == subprocess.check_output([environment / "bin" / "python", "-c", code], text=True).strip()


def test_setup_keeps_what_is_complete(environment: Path) -> None:
    said: list[str] = []
    before = (environment / comet.MARKER).stat()
    assert comet.setup(environment, report=said.append) == environment / "bin" / "python"
    assert said == [f"COMET's environment in {environment} is up to date"]
    after = (environment / comet.MARKER).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_setup_replaces_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    folder = tmp_path / "environment"
    failed = r"COMET's packages could not be installed into .*environment \(No matching distribution found for .*\)"
    with pytest.raises(InputError, match=failed):
        comet.setup(folder, report=lambda _: None)
    assert not comet.is_current(folder)
    (folder / "left over").touch()
    with pytest.raises(InputError, match=failed):
        comet.setup(folder, report=lambda _: None)
    assert not (folder / "left over").exists()

    # Another's virtual environment, as .venv given by mistake.
    (folder / comet.MARKER).unlink()
    (folder / "kept").touch()
    with pytest.raises(InputError, match=r"environment holds other files: give an empty or a new folder"):
        comet.setup(folder)
    assert (folder / "kept").exists()
    with pytest.raises(InputError, match="is not a folder"):
        comet.setup(folder / "kept")


def test_other_requirements_make_it_out_of_date(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert comet.is_current(environment)
    changed = tmp_path / "requirements.txt"
    changed.write_bytes(comet.REQUIREMENTS.read_bytes() + b"# changed\n")
    monkeypatch.setattr(comet, "REQUIREMENTS", changed)
    assert not comet.is_current(environment)


def test_python_that_does_not_fit(tmp_path: Path) -> None:
    newer = tmp_path / "python"
    newer.write_text("#!/bin/sh\necho 3 14 0\n")
    newer.chmod(0o755)
    with pytest.raises(InputError, match=r"is Python 3.14.0, and COMET's packages .* have wheels for Python 3.11 or 3.12"):
        comet.setup(tmp_path / "environment", python=str(newer))
    with pytest.raises(InputError, match="nowhere does not run"):
        comet.setup(tmp_path / "environment", python=str(tmp_path / "nowhere"))
    assert not (tmp_path / "environment").exists()


def test_virtualenv_where_venv_does_not_work(tmp_path: Path) -> None:
    """As on Debian without python3-venv: `-m venv` makes half an environment and fails."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"-m venv"*) {sys.executable} -m venv --without-pip "{tmp_path}/made"; exit 1;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    comet.create_environment(tmp_path / "made", str(python))
    made = tmp_path / "made" / "bin" / "python"
    where = subprocess.check_output([made, "-I", "-c", "import pip; print(pip.__file__)"], text=True)
    assert Path(where).is_relative_to(tmp_path / "made" / "lib")
    assert not (tmp_path / "made" / "bootstrap").exists()


def test_default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(comet.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert comet.default_environment() == Path("/home/someone/.cache/glottoscope/comet")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert comet.default_environment() == Path("/caches/glottoscope/comet")
    monkeypatch.setenv(comet.ENVIRONMENT_VARIABLE, "~/comet")
    assert comet.default_environment() == Path("/home/someone/comet")
