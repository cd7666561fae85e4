"""Tiny studies and synthetic text for the tests of the study room: each runs in a few seconds."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from rich.console import Console

from glottoscope.study.config import Study
from glottoscope.study.load import parse_study
from glottoscope.study.runner import RunResult, run_study
from glottoscope.study.store import RunStore

SOURCE = Path(__file__).parents[1] / "src"
STAGES = ("pretrain", "tokens", "train", "features", "score", "intervene", "report")

PLANTED: dict[str, Any] = {
    "layers": [0, 1],
    "study": {"name": "tiny"},
    "compute": {"threads": 1, "device": "cpu"},
    "corpus": {
        "kind": "planted", "context_length": 64, "train_documents": 40, "test_documents": 20, "validation_documents": 10,
        "aligned_pairs": 60,
    },
    "models": [
        {
            "name": "m", "source": "pretrain", "d_model": 16, "n_layers": 2, "steps": 20, "warmup_steps": 5,
            "checkpoints": [0, 20],
        }
    ],
    "sae": {"n": 32, "k": 4, "lr": [1e-3], "warmup_steps": 5, "batch_tokens": 256, "steps": 10},
    "features": {"bootstrap": 50, "min_count": 5, "min_firings": 3},
}  # fmt: skip


# One experiment with everything in it, and the settings of one that is over at once.
INTERVENTION: dict[str, Any] = {
    "bases": [0], "layers": [1], "draws": 4, "alphas": [0.0, 0.5, 1.0], "tokens": 1500, "bootstrap": 50,
    "features": {"few": [1, 2, 3], "dense": "density > 0.1", "nothing": "density > 2"},
    "translation": {"pairs": 10, "draws": 2, "shots": 2, "max_new_tokens": 8},
}  # fmt: skip
BRIEF: dict[str, Any] = {
    "bases": [0], "layers": [1], "draws": 0, "alphas": [1.0], "tokens": 300, "bootstrap": 20, "parts": ["mixed", "all"],
    "texts": ["documents"],
}  # fmt: skip


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A study with some fields changed; nested tables are merged, lists replaced."""
    result: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result


def planted(**changes: Any) -> dict[str, Any]:
    """The tiny study of the planted world, with some tables changed."""
    return merged(PLANTED, changes)


def planted_model(**changes: Any) -> list[dict[str, Any]]:
    """The model of the tiny study, changed."""
    return [{**PLANTED["models"][0], **changes}]


def as_study(raw: Mapping[str, Any], folder: Path = Path()) -> Study:
    return parse_study(tomli_w.dumps(raw), name="study.toml", folder=folder)


def run(raw: Mapping[str, Any], out: Path, *, until: str = "score", workers: int = 1) -> RunStore:
    """Run a study in this process; it must succeed."""
    result = attempt(raw, out, until=until, workers=workers)
    assert result.exit_code == 0, [f.message + f.details for f in result.failures]
    return RunStore(out)


def attempt(raw: Mapping[str, Any], out: Path, *, until: str = "score", workers: int = 1) -> RunResult:
    """Run a study in this process; what failed is in the result."""
    return run_study(as_study(raw, out.parent), out, until=until, workers=workers, console=Console(file=StringIO()))


def intervened(
    source: RunStore, root: Path, settings: Mapping[str, Any], *, raw: Mapping[str, Any] = PLANTED, workers: int = 1
) -> RunStore:
    """The interventions of a study in `root`, which starts as a copy of a run of the study without them."""
    if not root.exists():
        shutil.copytree(source.root, root)
    return run({**raw, "intervention": settings}, root, until="intervene", workers=workers)


def work_done(store: RunStore, before: int = 0) -> dict[str, int]:
    """Stage -> units done by the runs logged after the first `before` lines."""
    counts: dict[str, int] = {}
    for line in store.log_path.read_text(encoding="utf-8").splitlines()[before:]:
        row = json.loads(line)
        counts[row["stage"]] = counts.get(row["stage"], 0) + row["done"]
    return counts


def log_lines(store: RunStore) -> int:
    return len(store.log_path.read_text(encoding="utf-8").splitlines())


def state(root: Path, patterns: Sequence[str] = ("**/*",)) -> dict[str, tuple[int, str]]:
    """File -> (time of its last change in ns, hash) below a folder; locks and logs are not results."""
    files = {p for pattern in patterns for p in root.glob(pattern) if p.is_file() and p.name not in (".lock", "log.jsonl")}
    return {str(p.relative_to(root)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(files)}


def contents(root: Path, patterns: Sequence[str] = ("tables/*", "cells/**/*", "models/**/*", "rulers/**/*")) -> dict[str, str]:
    """File -> hash below a folder."""
    return {name: digest for name, (_, digest) in state(root, patterns).items()}


# ---- text


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


NOUNS = {
    "en": "river temple garden gate bridge market winter summer mountain shrine teacher station water flower letter road",
    "ja": "川 寺 庭 門 橋 市場 冬 夏 山 神社 先生 駅 水 花 手紙 道",
    "de": "Fluss Tempel Garten Tor Brücke Markt Winter Sommer Berg Schrein Lehrer Bahnhof Wasser Blume Brief Straße",
}
WORDS = {language: words.split() for language, words in NOUNS.items()}
FRAMES = {"en": "the {} is near the {} .", "ja": "{}は{}の近くにある。", "de": "der {} steht nahe dem {} ."}


def sentence(language: str, a: int, b: int) -> str:
    return FRAMES[language].format(WORDS[language][a], WORDS[language][b])


def write_text(folder: Path, languages: Sequence[str] = ("en", "ja"), n: int = 200, pairs: int = 80) -> None:
    """Documents and aligned sentences of a few words each, in JSONL."""
    rng = random.Random(0)
    for language in languages:
        write_jsonl(
            folder / f"{language}.jsonl",
            (
                {"id": f"d{i}", "text": " ".join(sentence(language, rng.randrange(16), rng.randrange(16)) for _ in range(10))}
                for i in range(n)
            ),
        )
    for split in ("train", "dev", "test"):
        rows = []
        for i in range(pairs):
            a, b = rng.randrange(16), rng.randrange(16)
            rows.append({"id": f"{split}{i // 4}.{i % 4}", **{x: sentence(x, a, b) for x in languages}})
        write_jsonl(folder / f"pairs.{split}.jsonl", rows)


def text_study(folder: Path, languages: Sequence[str] = ("en", "ja"), *, aligned: bool = True, **changes: Any) -> dict[str, Any]:
    """The tiny study on the text of `write_text`."""
    corpus: dict[str, Any] = {
        "kind": "text", "languages": list(languages), "root": str(folder), "context_length": 24, "mode": "document_start",
        "sources": [{"language": x, "path": f"{x}.jsonl"} for x in languages], "tokenizer_training": {"vocab_size": 400},
    }  # fmt: skip
    if aligned:
        corpus["aligned"] = {split: f"pairs.{split}.jsonl" for split in ("train", "dev", "test")}
    raw = {**PLANTED, "study": {"name": "text"}, "corpus": corpus}
    return merged(raw, changes)


def write_hub(hub: Path, texts: Sequence[str], revisions: Sequence[str] = ("step0", "step10")) -> None:
    """A folder that stands for a hub, with the random checkpoints of owner/lm and their tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from glottoscope.lm.tokenizer import train_tokenizer

    for revision in revisions:
        folder = hub / "owner" / "lm" / revision
        train_tokenizer(iter(texts), folder, vocab_size=400)
        config = LlamaConfig(
            vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(len(revision))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def hub_study(folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny study on checkpoints of a hub that only their config.json tells the size of; writes its text and its hub."""
    write_text(folder / "text")
    write_hub(folder / "hub", [sentence(x, a, b) for x in ("en", "ja") for a in range(16) for b in range(16)])
    raw = text_study(folder / "text")
    del raw["corpus"]["tokenizer_training"]
    raw["models"] = [
        {
            "name": "m", "source": "checkpoints", "hub_id": "owner/lm",
            "checkpoints": [{"step": s, "tokens_seen": 1000 * s, "revision": f"step{s}"} for s in (0, 10)],
        }
    ]  # fmt: skip
    raw["compute"] = {**raw["compute"], "hub": str(folder / "hub"), "remove_downloads": True}
    return merged(raw, changes)


# ---- the program as its users start it


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "200"}


def glottoscope(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "glottoscope.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120)


def stop_when(arguments: Sequence[str | Path], ready: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Start the command line, send it a signal once `ready` holds; returns exit code and stderr."""
    command = [sys.executable, "-m", "glottoscope.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        limit = time.monotonic() + 60
        while process.poll() is None and not ready() and time.monotonic() < limit:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be stopped"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


class Ended(NamedTuple):
    """What a command left behind: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr that says what is wrong."""
        assert "Traceback" not in self.err, self.err
        lines = [x for x in self.err.splitlines() if x.startswith("glottoscope: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("glottoscope: ")


def command(*arguments: str | Path) -> Ended:
    """The command line in this process: what a user types, what comes back."""
    from glottoscope.cli import main

    out, err = StringIO(), StringIO()
    handler, argv, code = signal.getsignal(signal.SIGTERM), sys.argv, 0
    sys.argv = ["glottoscope", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return Ended(code, out.getvalue(), err.getvalue())
