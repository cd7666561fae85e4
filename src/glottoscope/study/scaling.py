"""`run --scale tiny`: a study of checkpoints made small, so that every line of its path can be gone through on a laptop.

Models become random ones of 1/16 of the width with the same names, layers, steps and number of checkpoints, written as
Hugging Face checkpoints into a folder that stands for the hub. Text becomes the planted world's. SAEs and tokens shrink.
What comes out says nothing of any model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from glottoscope.atomic import atomic_path, write_text
from glottoscope.errors import InputError
from glottoscope.study.config import CheckpointModel, SAEConfig, Study, TextCorpus
from glottoscope.study.plan import ModelRun, expand, llama_shape, lm_memory, sae_memory, seed_for
from glottoscope.study.store import RunStore, digest

SCALES = ("tiny",)
VERSION = 1
WIDTH, FEATURES, ACTIVE, TOKENS, BATCH, CONTEXT = 16, 256, 8, 8192, 128, 16  # what is divided by how much
HEAD = 16  # width of an attention head, and what every width is a multiple of
PAIRS = 120  # aligned sentences of dev and of test
LEAST = {"train": 8192, "validation": 1024, "test": 4096}  # tokens of a split, over both languages


class Checkpoint(NamedTuple):
    """One random checkpoint: where in the hub, and which."""

    repo: str
    revision: str
    model: str
    step: int
    d_model: int
    n_layers: int
    head_std: float


def scale_study(study: Study, scale: str, out: Path) -> Study:
    """The small study; its text and its hub are to lie in the run directory `out`. Writes nothing.

    Raises:
        InputError: an unknown scale, models trained here, other languages, a model whose size is not known.
    """
    if scale not in SCALES:
        raise InputError(f"--scale {scale}: unknown scale; choose one of {', '.join(SCALES)}")
    _check(study)
    place = RunStore(out.resolve()).scaled_dir
    raw = study.dump()
    raw["study"]["name"] = f"{study.study.name}-{scale}"
    raw["corpus"] = _corpus(study, place)
    raw["models"] = [_model(study, run) for run in expand(study) if run.name == run.lm]
    raw["sae"] = _sae(study)
    raw["features"] |= {
        "bootstrap": min(study.features.bootstrap, 100), "min_firings": min(study.features.min_firings, 3), "labels": [],
        "lm_loss_tokens": max(1000, study.features.lm_loss_tokens // TOKENS),
    }  # fmt: skip
    if study.features.example_features is not None:
        raw["features"]["example_features"] = max(4, study.features.example_features // 16)
    if study.intervention is not None:
        raw["intervention"] |= {
            "tokens": max(1000, study.intervention.tokens // TOKENS), "bootstrap": min(study.intervention.bootstrap, 100),
            "draws": min(study.intervention.draws, 19), "features": {},
        }  # fmt: skip
        if translation := raw["intervention"].get("translation"):
            translation |= {"files": [], "pairs": 20, "draws": min(translation["draws"], 2), "max_new_tokens": 8, "shots": 2}
    raw["compute"] |= {"threads": 1, "hub": str(place / "hub"), "remove_downloads": True}
    if study.compute.device in ("auto", "cpu"):
        raw["compute"]["dtype"] = "float32"  # most CPUs have no bfloat16 units: these tiny products take six times as long
    small = Study.model_validate(raw)
    return small.model_copy(update={"compute": small.compute.model_copy(update=_limits(small))})


def _check(study: Study) -> None:
    if not isinstance(study.corpus, TextCorpus):
        raise InputError("--scale tiny is for studies of real text: this one is of the planted world already")
    if set(study.corpus.languages) != {"en", "ja"}:
        raise InputError(f"--scale tiny: the planted world is English and Japanese, the study {', '.join(study.corpus.languages)}")
    if trained := [m.name for m in study.models if not isinstance(m, CheckpointModel)]:
        raise InputError(f"--scale tiny replaces checkpoints; {trained[0]} is trained here: lower its d_model and steps with --set")


def _corpus(study: Study, place: Path) -> dict[str, Any]:
    corpus = study.corpus
    assert isinstance(corpus, TextCorpus)
    raw = corpus.model_dump(mode="json", exclude_none=True)
    raw.pop("tokenizer", None)
    raw |= {
        "root": str(place / "text"), "context_length": max(16, corpus.context_length // CONTEXT), "bos": corpus.bos,
        "sources": [{"language": x, "path": f"{x}.jsonl"} for x in corpus.languages],
        "aligned": {x: f"pairs.{x}.jsonl" for x in ("dev", "test")},
        **{f"{split}_tokens": max(least, (getattr(corpus, f"{split}_tokens") or 0) // TOKENS) for split, least in LEAST.items()},
    }  # fmt: skip
    return raw


def _model(study: Study, run: ModelRun) -> dict[str, Any]:
    spec = run.spec
    assert isinstance(spec, CheckpointModel)
    if run.shape is None:
        raise InputError(f"--scale tiny: the size of model {run.name} is not known: give [models.shape]")
    raw = spec.model_dump(mode="json", exclude_none=True, exclude={"root", "glob", "tokenizer", "checkpoints", "steps", "pattern"})
    raw["hub_id"] = spec.hub_id or f"{study.study.name}/{run.name}"
    if spec.pattern is not None and not spec.checkpoints:
        raw |= {"pattern": spec.pattern, "steps": [c.step for c in run.checkpoints]}
    else:
        raw["checkpoints"] = [{"step": c.step, "tokens_seen": c.tokens_seen, "revision": f"step_{c.step}"} for c in run.checkpoints]
    d = HEAD * max(1, round(run.shape.d_model / WIDTH / HEAD))
    raw["shape"] = llama_shape(d, run.shape.n_layers, len(_world(study.study.seed, 64).vocabulary)).model_dump()
    return raw


def _sae(study: Study) -> dict[str, Any]:
    sae = study.sae
    raw = sae.model_dump(mode="json", exclude_none=True)
    raw["k"] = max(2, sae.k // ACTIVE)
    if sae.n is not None:
        raw["n"] = max(4 * raw["k"], sae.n // FEATURES)
    raw["batch_tokens"] = max(128, sae.batch_tokens // BATCH)
    if sae.steps is not None:
        raw["steps"] = max(4, min(sae.steps, sae.steps * sae.batch_tokens // TOKENS // raw["batch_tokens"]))
    else:
        raw["train_tokens"] = max(4 * raw["batch_tokens"], int(sae.train_tokens or 0) // TOKENS)
    raw["warmup_steps"] = min(sae.warmup_steps, SAEConfig.model_validate(raw).n_steps // 4)
    raw["buffer_tokens"] = max(raw["batch_tokens"], sae.buffer_tokens // FEATURES)
    return raw


def _limits(small: Study) -> dict[str, float]:
    """Limits of memory and disk that bind: the widest model's layers go in two groups, and two of its checkpoints do not
    lie on disk together. What the study itself states is kept."""
    limits = {}
    run = max(expand(small), key=lambda r: r.shape.n_params if r.shape else 0)
    assert run.shape is not None
    layers, sae = run.known_layers(), small.sae
    if small.compute.memory_gb is None:
        one_group = sae_memory(run.shape.d_model, sae, len(sae.lr) * len(sae.seeds), -(-len(layers) // 2), sae.buffer_tokens)
        limits["memory_gb"] = (lm_memory(small, run.shape, len(layers)) + one_group) / 2**30
    if small.compute.disk_gb is None:
        limits["disk_gb"] = (1.5 * 2 * run.shape.n_params + 2**20) / 1e9
    return limits


# ---- writing it


def write_scaled(small: Study, console: Console) -> None:
    """Write the text and the hub of a small study into its run directory, where they are not there already.

    Raises:
        InputError: the run directory belongs to another study, or someone else is at work in it.
    """
    from glottoscope.study.runner import describe_run

    place = Path(str(small.compute.hub)).parent
    store = RunStore(place.parent)
    store.check_owner(small)
    wanted = _checkpoints(small)
    corpus = small.corpus.model_dump(mode="json", include={"context_length", "split", "split_seed", *_limits_of_text()})
    key = digest("scaled", VERSION, small.study.seed, wanted, corpus)
    with store.lock():
        store.create(small, describe_run(small))
        if store.is_done(place, "scaled", key):
            return
        store.begin(place, "scaled")
        console.print(f"writing {len(wanted)} random checkpoints and the planted world's text to {place}")
        _write_text(small, place / "text")
        for checkpoint in wanted:
            _write_checkpoint(small, checkpoint, place / "hub")
        files = [p.relative_to(place).as_posix() for p in sorted(place.rglob("*")) if p.is_file() and p != place / "done.json"]
        store.mark_done(place, "scaled", key, {"checkpoints": len(wanted)}, files)


def _limits_of_text() -> Iterable[str]:
    return (f"{split}_tokens" for split in LEAST)


def _world(seed: int, context_length: int) -> Any:
    from glottoscope.corpus.planted import PlantedWorld

    return PlantedWorld(seed, context_length=context_length)


def _world_of(small: Study) -> Any:
    # Documents are longer than a sequence: none is dropped for being short.
    return _world(small.study.seed, max(16, 2 * small.corpus.context_length))


def _checkpoints(small: Study) -> list[Checkpoint]:
    found = []
    for run in expand(small):
        assert run.shape is not None
        last = max(1, len(run.checkpoints) - 1)
        for i, ref in enumerate(run.checkpoints if run.name == run.lm else ()):
            # Logits shrink from checkpoint to checkpoint, so that the loss falls and "half of its fall" is a step.
            std = 0.02 + 0.3 * (1 - i / last)
            place = (str(ref.path), ref.revision or "main")
            found.append(Checkpoint(*place, run.name, ref.step, run.shape.d_model, run.shape.n_layers, std))
    return found


def _write_text(small: Study, folder: Path) -> None:
    corpus = small.corpus
    assert isinstance(corpus, TextCorpus)
    world = _world_of(small)
    wanted = [getattr(corpus, f"{split}_tokens") / share for split, share in zip(LEAST, corpus.split, strict=True)]
    # Splits are drawn by document: half as much again, so that the smallest is surely filled.
    n = 1 + int(1.5 * max(wanted) / len(corpus.languages) / world.context_length)
    tokens, _ = world.documents(n, seed=seed_for(small, "scaled", "documents") % 2**31)
    for g, language in enumerate(world.languages):
        rows = ({"id": f"{language}-{i}", "text": world.text(row[1:])} for i, row in enumerate(tokens[g::2]))
        _write_lines(folder / f"{language}.jsonl", rows)
    for which in ("dev", "test"):
        english, japanese, _ = world.sentence_pairs(PAIRS, seed=seed_for(small, "scaled", which) % 2**31)
        _write_lines(folder / f"pairs.{which}.jsonl", _pairs(world, which, english, japanese))


def _pairs(world: Any, which: str, english: list[list[int]], japanese: list[list[int]]) -> Iterator[dict[str, str]]:
    # Eight consecutive pairs are one planted document.
    for i, sides in enumerate(zip(english, japanese, strict=True)):
        texts = (" ".join(world.vocabulary[t] for t in side) for side in sides)
        yield {"id": f"{which}{i // 8}.{i % 8}", **dict(zip(world.languages, texts, strict=True))}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_checkpoint(small: Study, checkpoint: Checkpoint, hub: Path) -> None:
    import torch
    from transformers.utils import logging

    from glottoscope.lm.pretrain import LlamaShape, PretrainSettings, build_model

    logging.disable_progress_bar()
    world = _world_of(small)
    shape = LlamaShape(
        d_model=checkpoint.d_model, n_layers=checkpoint.n_layers, n_heads=checkpoint.d_model // HEAD,
        vocab_size=len(world.vocabulary), context_length=8 * small.corpus.context_length,
        bos_id=world.bos_id, eos_id=world.eos_id, pad_id=world.pad_id,
    )  # fmt: skip
    seed = seed_for(small, "scaled", checkpoint.model, checkpoint.step)
    settings = PretrainSettings(steps=1, lr=1e-3, warmup_steps=0, batch_size=1, checkpoint_steps=(0,), seed=seed)
    model: Any = build_model(shape, settings)
    with torch.no_grad():
        model.lm_head.weight.mul_(checkpoint.head_std / settings.init_std)
    with atomic_path(hub / checkpoint.repo / checkpoint.revision) as temporary:
        temporary.mkdir()
        model.to(torch.bfloat16).save_pretrained(str(temporary))
        world.tokenizer_files(temporary)
