"""Stage "pretrain": small bilingual Llamas, saved as ordinary Hugging Face checkpoints with their tokenizer."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.atomic import atomic_path, write_json, write_table
from glottoscope.errors import InputError
from glottoscope.study.config import PlantedCorpus, PretrainModel, TextCorpus
from glottoscope.study.metrics import POINTS, MetricsFile, Point
from glottoscope.study.plan import Cell, ModelRun, seed_for
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.resuming import VERSION, Keeper, Waiting, newest, surroundings
from glottoscope.study.stages.tokenizing import (
    aligned_pairs,
    documents_of,
    encode_all,
    load_run_tokenizer,
    read_json,
)
from glottoscope.study.store import digest

EVALUATION_BLOCKS = 64  # validation sequences per language whose loss is logged at every checkpoint
# What code switching injects is reported; this many pairs of the dictionary are kept as examples.
SHOWN_PAIRS = 40


def pretrained_runs(context: Context) -> list[ModelRun]:
    """Models that are trained here; controls made from them share their weights."""
    return [r for r in context.runs if isinstance(r.spec, PretrainModel) and r.lm == r.name]


def is_pretrained(context: Context, run: ModelRun) -> bool:
    """Whether every wanted checkpoint of the model is there."""
    store = context.store
    return all(
        store.is_done(store.checkpoint_dir(run.name, c.step), "pretrain", context.lm_key(Cell(run, c))) for c in run.checkpoints
    ) and store.is_done(store.model_dir(run.name), "pretrain", context.pretrain_key(run))


class LMText(NamedTuple):
    """What a text corpus gives a model trained here, as token ids (train split only)."""

    monolingual: dict[str, list[NDArray[np.uint32]]]
    articles: list[list[list[NDArray[np.uint32]]]]
    is_word: NDArray[np.bool_]


def text_dir(context: Context) -> Path:
    return context.store.tokens_dir / "pretrain"


def make_lm_text(root: str, report: Any) -> None:
    """Encode the train split for pre-training: documents of each language, aligned sentences, the mined dictionary."""
    from glottoscope.corpus.readers import split_of
    from glottoscope.corpus.tokens import encoder

    context = Context.open(root)
    corpus = context.study.corpus
    assert isinstance(corpus, TextCorpus)
    encode = encoder(load_run_tokenizer(context))
    folder = text_dir(context)
    context.store.begin(folder, "lm_text")
    files = []
    for n, language in enumerate(corpus.languages):
        report(n, len(corpus.languages) + 2, f"encoding {language}")
        texts = (d.text for d in documents_of(corpus, language, "train"))
        files += _write_ragged(folder, language, encode_all(encode, texts))
    # Articles of the training pairs may be documents of the test split: the model must not read those.
    pairs = [
        p for p in aligned_pairs(corpus, "train") if split_of(p.article, seed=corpus.split_seed, fractions=corpus.split) == "train"
    ]
    report(len(corpus.languages), len(corpus.languages) + 2, f"encoding {len(pairs):,} sentence pairs")
    for g, language in enumerate(corpus.languages):
        files += _write_ragged(folder, f"aligned_{language}", encode_all(encode, (p.texts[g] for p in pairs)))
    starts = [i for i, p in enumerate(pairs) if i == 0 or p.article != pairs[i - 1].article]
    _write_array(folder / "articles.npy", np.array([*starts, len(pairs)], np.int64))
    context.store.mark_done(folder, "lm_text", context.corpus_key, {}, [*files, "articles.npy"])


def dictionary_for(context: Context, text: LMText, phi: float) -> Any:
    """Mutual-best token pairs mined from the training pairs; None where there are none."""
    from glottoscope.corpus.switching import mine_dictionary

    if not text.articles:
        return None
    sides: list[Any] = [[p[g] for a in text.articles for p in a] for g in (0, 1)]
    return mine_dictionary(sides[0], sides[1], vocab_size=len(text.is_word), min_phi=phi, is_word=text.is_word)


def read_lm_text(context: Context) -> LMText:
    from glottoscope.corpus.display import token_bytes
    from glottoscope.corpus.switching import word_tokens

    folder, languages = text_dir(context), context.study.languages
    bounds = np.load(folder / "articles.npy")
    sides = [_read_ragged(folder, f"aligned_{language}") for language in languages]
    pairs = [list(sentences) for sentences in zip(*sides, strict=True)]
    articles = [pairs[a:b] for a, b in itertools.pairwise(bounds.tolist())] if pairs else []
    is_word = word_tokens(token_bytes(load_run_tokenizer(context)))
    return LMText({x: _read_ragged(folder, x) for x in languages}, articles, is_word)


def _write_ragged(folder: Path, name: str, rows: Any) -> list[str]:
    kept = [np.asarray(r, np.uint32) for r in rows]
    _write_array(folder / f"{name}.flat.npy", np.concatenate(kept) if kept else np.zeros(0, np.uint32))
    _write_array(folder / f"{name}.length.npy", np.array([len(r) for r in kept], np.int64))
    return [f"{name}.flat.npy", f"{name}.length.npy"]


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array)


def _read_ragged(folder: Path, name: str) -> list[NDArray[np.uint32]]:
    flat, length = np.load(folder / f"{name}.flat.npy"), np.load(folder / f"{name}.length.npy")
    return np.split(flat, np.cumsum(length)[:-1]) if len(length) else []


class Reading(NamedTuple):
    """What one model reads and is evaluated on."""

    batch_at: Callable[[int], NDArray[np.uint32]]
    evaluation: dict[str, NDArray[np.uint32]]  # language -> [B, T]
    vocab_size: int
    bos_id: int | None
    pad_id: int | None
    facts: dict[str, Any]  # what was injected, for the report


def _reading(context: Context, run: ModelRun) -> Reading:
    spec = run.spec
    assert isinstance(spec, PretrainModel)
    seed = seed_for(context.study, "lm-data", run.lm_seed)
    if isinstance(context.study.corpus, PlantedCorpus):
        world = context.world(negative=run.control == "negative", spec=spec)
        split_seed = seed % 2**31
        tokens, language = world.documents(EVALUATION_BLOCKS, seed=seed_for(context.study, "documents", "lm-validation"))
        evaluation = {code: tokens[language[:, 1] == g] for g, code in enumerate(world.languages)}

        def batch_at(step: int) -> NDArray[np.uint32]:
            return world.lm_batch(step, spec.batch_size, split_seed=split_seed)

        # The world switches monolingual documents only; the report speaks of all.
        switched = world.switched_share * (1 - world.parallel_share)
        facts = {"parallel_share": world.parallel_share, "switched_share": switched}
        return Reading(batch_at, evaluation, len(world.vocabulary), world.bos_id, world.pad_id, facts)
    return _reading_text(context, context.study.corpus, run, spec, seed)


def _reading_text(context: Context, corpus: TextCorpus, run: ModelRun, spec: PretrainModel, seed: int) -> Reading:
    from glottoscope.corpus.composition import BilingualText
    from glottoscope.corpus.tokens import encoder, pack

    tokenizer = load_run_tokenizer(context)
    text = read_lm_text(context)
    mixture = spec.mixture
    switches = spec.control == "none" and mixture.switched_share > 0 and len(corpus.languages) == 2
    dictionary = dictionary_for(context, text, mixture.dictionary_phi) if switches else None
    parallel = 0.0 if run.control == "negative" else mixture.parallel_share
    bos_id = tokenizer.bos_token_id
    if bos_id is None:
        raise InputError(
            f"model {run.name}: the tokenizer has no BOS token, with which every training sequence begins: "
            "use [corpus.tokenizer_training], or a tokenizer that has one"
        )
    source = BilingualText(
        text.monolingual, text.articles if parallel else [], dictionary, bos_id=bos_id, seed=seed,
        context_length=corpus.context_length, parallel_share=parallel, switched_share=mixture.switched_share,
        switch_probability=mixture.switch_probability, vocab_size=len(tokenizer),
        separator=encoder(tokenizer)(["\n"])[0],
    )  # fmt: skip
    evaluation = {}
    encode = encoder(tokenizer)
    for g, language in enumerate(corpus.languages):
        texts = (d.text for d in documents_of(corpus, language, "validation"))
        packed = pack(
            enumerate(encode_all(encode, texts)), language=g, context_length=corpus.context_length, bos="block", bos_id=bos_id,
            max_tokens=EVALUATION_BLOCKS * corpus.context_length,
        )  # fmt: skip
        if len(packed.tokens):
            evaluation[language] = packed.tokens
    facts: dict[str, Any] = {
        "parallel_share": source.parallel_share, "switched_share": source.switched_share,
        "switch_probability": source.switch_probability if dictionary is not None else 0.0,
        "epochs": source.epochs(spec.steps * spec.batch_size), "dictionary_pairs": 0,
    }  # fmt: skip
    if dictionary is not None:
        best = np.argsort(-dictionary.phi, kind="stable")[:SHOWN_PAIRS]
        facts["dictionary_pairs"] = len(dictionary.a)
        facts["dictionary_examples"] = [
            [tokenizer.decode([int(dictionary.a[i])]).strip(), tokenizer.decode([int(dictionary.b[i])]).strip()] for i in best
        ]
    return Reading(
        lambda step: source.lm_batch(step, spec.batch_size), evaluation, len(tokenizer), bos_id,
        tokenizer.pad_token_id, facts,
    )  # fmt: skip


def pretrain_model(root: str, name: str, report: Any) -> None:
    """Train one model and save its checkpoints; one that was stopped goes on from its last state, to the same bytes."""
    from glottoscope.lm.pretrain import LlamaShape, PretrainSettings, pretrain

    context = Context.open(root)
    run = context.run_of(name)
    spec, store = run.spec, context.store
    assert isinstance(spec, PretrainModel)
    reading = _reading(context, run)
    shape = LlamaShape(
        d_model=spec.d_model, n_layers=spec.n_layers, n_heads=spec.n_heads, vocab_size=reading.vocab_size,
        context_length=context.study.corpus.context_length, bos_id=reading.bos_id, pad_id=reading.pad_id,
    )  # fmt: skip
    settings = PretrainSettings(
        steps=spec.steps, lr=spec.lr, warmup_steps=spec.warmup_steps, batch_size=spec.batch_size,
        min_lr_ratio=spec.min_lr_ratio, weight_decay=spec.weight_decay, clip=spec.clip,
        embedding_init_std=spec.embedding_init_std, embedding_lr_scale=spec.embedding_lr_scale, dtype=spec.dtype,
        checkpoint_steps=spec.checkpoints, seed=seed_for(context.study, "lm-weights", run.lm_seed),
    )  # fmt: skip
    cells = {c.step: Cell(run, c) for c in run.checkpoints}

    def is_saved(step: int) -> bool:
        return store.is_done(store.checkpoint_dir(name, step), "pretrain", context.lm_key(cells[step]))

    def save(step: int, model: Any, lr: float) -> None:
        folder = store.checkpoint_dir(name, step)
        if is_saved(step):
            return
        with atomic_path(folder) as temporary:
            model.save_pretrained(str(temporary))
            for file in store.tokenizer_dir.iterdir():
                if file.is_file() and file.name != "done.json":
                    shutil.copyfile(file, temporary / file.name)
        files = sorted(p.name for p in folder.iterdir() if p.is_file())
        store.mark_done(folder, "pretrain", context.lm_key(cells[step]), {"learning_rate": lr}, files)

    device = context.device()
    metrics = MetricsFile(store.metrics_path(name), {"stage": "pretrain", "unit": name, "model": name})
    keeper = Keeper(
        store.pretrain_states_dir(name), wanted_state(context, run), surroundings(device), context.study.compute.checkpoint_minutes,
        # Checkpoints before a state are not made again from it.
        usable=lambda steps: all(is_saved(step) for step in cells if step < steps),
        # The step that it goes on from is told of again.
        restored=lambda training: metrics.begin(_point(row, spec) for row in training.rows[1:-1] if _is_shown(row, spec)),
    )  # fmt: skip

    def progress(step: int, row: dict[str, float]) -> None:
        if _is_shown(row, spec):
            metrics.add([_point(row, spec)])
        if step % 20 == 0 or step == spec.steps:
            with keeper.calm():
                report(step, spec.steps, f"loss {row['loss']:.2f}{keeper.words}")

    with keeper:
        log = pretrain(
            shape, settings, reading.batch_at, save, _evaluator(reading, str(device)), progress, device=str(device), keeper=keeper
        )  # fmt: skip
    store.model_dir(name).mkdir(parents=True, exist_ok=True)
    store.begin(store.model_dir(name), "pretrain")
    write_table(store.model_dir(name) / "log.parquet", log)
    write_json(store.model_dir(name) / "reading.json", reading.facts)
    store.mark_done(
        store.model_dir(name), "pretrain", context.pretrain_key(run), spec.model_dump(mode="json"),
        ["log.parquet", "reading.json"],
    )  # fmt: skip
    keeper.done()


def _is_shown(row: Mapping[str, float | None], spec: PretrainModel) -> bool:
    """Whether a row of the log is a point of the metrics: about POINTS of them, and those with the losses of the languages."""
    step = int(row["step"] or 0)
    return step % math.ceil(spec.steps / POINTS) == 0 or step == spec.steps or step in spec.checkpoints


def _point(row: Mapping[str, float | None], spec: PretrainModel) -> Point:
    rest = {k: v for k, v in row.items() if k not in ("step", "tokens_seen")}
    return {"step": row["step"], "steps": spec.steps, "tokens": row["tokens_seen"], **rest}


def wanted_state(context: Context, run: ModelRun) -> dict[str, str]:
    """The part of a training's state, and its key: the log has the losses at the checkpoints, so they count."""
    assert isinstance(run.spec, PretrainModel)
    return {"model": digest(VERSION, context.pretrain_key(run), run.spec.checkpoints)}


def waiting(context: Context) -> list[Waiting]:
    """States of models whose training was stopped, and whether a run would go on from them."""
    found = []
    for run in pretrained_runs(context):
        folder = context.store.pretrain_states_dir(run.name)
        if folder.is_dir():
            is_complete = is_pretrained(context, run)
            wanted = {} if is_complete else wanted_state(context, run)
            found.append(Waiting(folder, run.name, newest(folder, wanted), is_complete))
    return found


def _evaluator(reading: Reading, device: str) -> Callable[[Any], dict[str, float]]:
    import torch

    from glottoscope.lm.losses import lm_loss

    def evaluate(model: Any) -> dict[str, float]:
        losses = {}
        for language, tokens_BT in reading.evaluation.items():
            tokens = torch.from_numpy(tokens_BT.astype(np.int64)).to(device)
            everything = torch.ones_like(tokens, dtype=torch.bool)
            # BOS of a packed document is no word of the language: it is not predicted.
            counted = tokens != reading.bos_id if reading.bos_id is not None else everything
            nll, n = lm_loss(model, tokens, everything.long(), counted, torch.zeros_like(tokens), 1)
            losses[f"loss_{language}"] = float(nll[0] / n[0]) if int(n[0]) else math.nan
        return losses

    return evaluate


def lm_log(context: Context, name: str) -> pa.Table | None:
    """Training log of a model trained here."""
    from glottoscope.study.store import read_parquet

    path = context.store.model_dir(name) / "log.parquet"
    return read_parquet(path) if path.exists() else None


def lm_facts(context: Context, name: str) -> dict[str, Any]:
    """What a model trained here read: shares, epochs, the size of the dictionary."""
    path = context.store.model_dir(name) / "reading.json"
    return read_json(path) if path.exists() else {}
