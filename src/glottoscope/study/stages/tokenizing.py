"""Stage "tokens" and what pre-training needs of the text: the tokenizer, and documents and pairs as token ids."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from glottoscope.atomic import atomic_path, write_json, write_table
from glottoscope.corpus.display import clean_text, has_letters, token_bytes
from glottoscope.corpus.planted import PlantedWorld
from glottoscope.corpus.readers import AlignedPair, Document, ReadReport, read_aligned, read_documents, split_of
from glottoscope.corpus.tokens import (
    AlignedTokens,
    TokenBlocks,
    encode_aligned,
    encoder,
    interleave,
    pack,
    position_mask,
    write_aligned,
    write_blocks,
)
from glottoscope.errors import InputError
from glottoscope.study.config import CheckpointModel, PlantedCorpus, TextCorpus
from glottoscope.study.load import corpus_path
from glottoscope.study.plan import seed_for
from glottoscope.study.stages.context import Context, TokenInfo

SPLITS = ("train", "validation", "test")
ENCODE_BATCH = 512


# ---- tokenizer


def make_tokenizer(root: str, report: Any) -> None:
    """Put the study's tokenizer into the run directory, as an ordinary Hugging Face tokenizer."""
    context = Context.open(root)
    corpus, folder = context.study.corpus, context.store.tokenizer_dir
    if isinstance(corpus, PlantedCorpus):
        with atomic_path(folder) as temporary:
            context.world().tokenizer_files(temporary)
    elif corpus.tokenizer_training is not None:
        from glottoscope.lm.tokenizer import train_tokenizer

        texts = (document.text for document in _balanced(context, corpus, report))
        train_tokenizer(texts, folder, vocab_size=corpus.tokenizer_training.vocab_size)
    else:
        with atomic_path(folder) as temporary:
            # Saving copies files of the place it was loaded from, so that must still be there; to hold that while asking
            # for the next would be to wait for oneself where there is room for one only.
            with _loaded(context, *tokenizer_source(context)) as tokenizer:
                tokenizer.save_pretrained(str(temporary))
                vocabulary = tokenizer.get_vocab()
            _check_one_tokenizer(context, vocabulary)
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != "done.json")
    context.store.mark_done(folder, "tokenizer", context.tokenizer_key, {}, files)


@contextlib.contextmanager
def _loaded(context: Context, path: str, revision: str | None) -> Iterator[Any]:
    from glottoscope.lm.checkpoints import Checkpoint, load_tokenizer

    with context.at_hand(Checkpoint(path, 0, 0, revision), "tokenizer") as place:
        yield load_tokenizer(place.path, place.revision)


def _check_one_tokenizer(context: Context, vocabulary: dict[str, int]) -> None:
    """All models of a study read the same ids: their tokenizers must agree where they bring one.

    Raises:
        InputError: a model's own tokenizer has another vocabulary; names the model.
    """
    for run in context.runs:
        own = getattr(run.spec, "tokenizer", None)
        place = (own, None) if own is not None else (str(run.final.path), run.final.revision)
        try:
            with _loaded(context, *place) as theirs:
                same = theirs.get_vocab() == vocabulary
        except InputError:
            if own is not None:
                raise
            continue  # weights without a tokenizer beside them: the study's is taken at its word
        if not same:
            raise InputError(
                f"model {run.name}: its tokenizer has another vocabulary than the study's: a study has one tokenizer, "
                "so make a study for each"
            )


def tokenizer_source(context: Context) -> tuple[str, str | None]:
    """Path or hub id, and revision, of a tokenizer that is given."""
    corpus = context.study.corpus
    assert isinstance(corpus, TextCorpus)
    if corpus.tokenizer is not None:
        return corpus.tokenizer, None
    for model in context.study.models:
        if isinstance(model, CheckpointModel) and model.tokenizer is not None:
            return model.tokenizer, None
    run = context.runs[0]
    final = run.final
    return str(final.path), final.revision


def load_run_tokenizer(context: Context) -> Any:
    from glottoscope.lm.checkpoints import load_tokenizer

    return load_tokenizer(str(context.store.tokenizer_dir))


def _balanced(context: Context, corpus: TextCorpus, report: Any) -> Iterator[Document]:
    """Train documents of all languages in turn, so that a tokenizer sees them 1:1."""
    streams = [documents_of(corpus, language, "train") for language in corpus.languages]
    n = 0
    while True:
        row = [next(s, None) for s in streams]
        if any(d is None for d in row):
            return
        for document in row:
            assert document is not None
            n += 1
            if n % 1000 == 0:
                report(0, 1, f"tokenizer: {n:,} documents")
            yield document


# ---- documents


def documents_of(corpus: TextCorpus, language: str, split: str, counts: ReadReport | None = None) -> Iterator[Document]:
    """Documents of one language that belong to a split, in the order of the sources."""
    for source in corpus.sources:
        if source.language != language:
            continue
        for document in read_documents(
            corpus_path(corpus, source.path), language=language, format=source.format, text_field=source.text_field,
            id_field=source.id_field, limit=source.limit, report=counts,
        ):  # fmt: skip
            if split_of(document.id, seed=corpus.split_seed, fractions=corpus.split) == split:
                yield document


def aligned_pairs(corpus: TextCorpus, which: str) -> list[AlignedPair]:
    """Aligned sentences of "train", "dev" or "test"; none where the study gives none."""
    aligned = corpus.aligned
    path = getattr(aligned, which) if aligned is not None else None
    if aligned is None or path is None:
        return []
    return read_aligned(
        corpus_path(corpus, path), languages=corpus.languages, format=aligned.format, fields=aligned.fields or None,
        id_field=aligned.id_field, limit=aligned.limit,
    )  # fmt: skip


def encode_all(encode: Any, texts: Iterator[str]) -> Iterator[list[int]]:
    """Token ids of texts, a batch at a time."""
    while batch := list(islice(texts, ENCODE_BATCH)):
        yield from encode(batch)


# ---- the token store


def make_tokens(root: str, report: Any) -> None:
    """Write the token blocks of all splits, the aligned sentences and the vocabulary."""
    context = Context.open(root)
    corpus = context.study.corpus
    tokenizer = load_run_tokenizer(context)
    if isinstance(corpus, PlantedCorpus):
        blocks, documents, aligned, truth, notes = _planted(context, corpus)
        special = context.world().special_ids
        bos_id, pad_id = context.world().bos_id, context.world().pad_id
    else:
        special = tuple(sorted(set(tokenizer.all_special_ids)))
        bos_id = tokenizer.bos_token_id
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        blocks, documents, aligned, notes = _text(context, corpus, tokenizer, special, bos_id, pad_id, report)
        truth = None
    store, languages = context.store, context.study.languages
    vocab_size = len(tokenizer)
    store.begin(store.tokens_dir, "tokens")
    files = []
    for split, value in blocks.items():
        write_blocks(store.tokens_dir, split, value)
        files += [f"{split}.{name}.npy" for name in TokenBlocks._fields]
    truncated = {}
    for which, (value, n_truncated) in aligned.items():
        write_aligned(store.aligned_dir, which, value)
        files += [f"aligned/{which}.{name}.npy" for name in ("tokens", "length", "article")]
        files += [f"aligned/{which}.ids.json"]
        articles = len(set(value.article.tolist()))
        truncated[which] = {"pairs": len(value.ids), "articles": articles, "truncated": n_truncated}
    write_table(store.tokens_dir / "documents.parquet", documents)
    write_table(store.tokens_dir / "vocabulary.parquet", _vocabulary(tokenizer, vocab_size, blocks, special, languages, truth))
    counted = {s: _counted(b, special, languages) for s, b in blocks.items()}
    per_split: dict[str, dict[str, int]] = {s: dict.fromkeys(languages, 0) for s in SPLITS}
    for split, language in zip(documents["split"].to_pylist(), documents["language"].to_pylist(), strict=True):
        per_split[split][language] += 1
    info = TokenInfo(
        languages, vocab_size, bos_id, int(pad_id), special, int(blocks["train"].tokens.shape[1]), counted, per_split,
        truncated, tuple(notes),
    )  # fmt: skip
    write_json(store.tokens_dir / "info.json", asdict(info))
    files += ["documents.parquet", "vocabulary.parquet", "info.json"]
    store.mark_done(store.tokens_dir, "tokens", context.tokens_key, {}, files)


def _planted(
    context: Context, corpus: PlantedCorpus
) -> tuple[dict[str, TokenBlocks], pa.Table, dict[str, tuple[AlignedTokens, int]], Any, list[str]]:
    """Monolingual documents and translated sentences of the planted world; its truth goes into the vocabulary."""
    study, world = context.study, context.world()
    blocks, rows = {}, []
    for split in SPLITS:
        n = getattr(corpus, f"{split}_documents")
        tokens, language = world.documents(n, seed=seed_for(study, "documents", split))
        document = np.repeat(np.arange(len(tokens), dtype=np.uint32)[:, None], tokens.shape[1], axis=1)
        blocks[split] = TokenBlocks(tokens, language, document)
        rows += [(f"{split}-{i}", world.languages[int(language[i, 1])], split, i) for i in range(len(tokens))]
    aligned = {}
    for which in ("dev", "test"):
        english, japanese, _ = world.sentence_pairs(corpus.aligned_pairs, seed=seed_for(study, "aligned", which))
        # Eight consecutive pairs are one planted document: what a bootstrap may resample.
        pairs = [AlignedPair(f"{which}{i // 8}.{i % 8}", f"{which}{i // 8}", ("", "")) for i in range(len(english))]
        aligned[which] = _aligned_ids(pairs, [english, japanese], world)
    documents = pa.table(dict(zip(("id", "language", "split", "row"), map(list, zip(*rows, strict=True)), strict=True)))
    return blocks, documents, aligned, world.truth, []


def _aligned_ids(pairs: Sequence[AlignedPair], sides: Sequence[list[list[int]]], world: PlantedWorld) -> tuple[AlignedTokens, int]:
    waiting = iter([ids for side in sides for ids in side])
    longest = max(len(ids) for side in sides for ids in side) + 1
    return encode_aligned(
        pairs,
        lambda texts: [next(waiting) for _ in texts],
        bos_id=world.bos_id,
        pad_id=world.pad_id,
        max_length=longest,
    )


def _text(
    context: Context, corpus: TextCorpus, tokenizer: Any, special: tuple[int, ...], bos_id: int | None, pad_id: int,
    report: Any,
) -> tuple[dict[str, TokenBlocks], pa.Table, dict[str, tuple[AlignedTokens, int]], list[str]]:  # fmt: skip
    encode = encoder(tokenizer)
    if corpus.bos != "none" and bos_id is None:
        raise InputError("the tokenizer has no BOS token: set corpus.bos = 'none'")
    blocks: dict[str, TokenBlocks] = {}
    rows: list[tuple[str, str, str, int]] = []
    rows_seen: list[str] = []
    counts = ReadReport()
    work = len(SPLITS) * len(corpus.languages)
    for s, split in enumerate(SPLITS):
        limit = getattr(corpus, f"{split}_tokens")
        per_language = []
        for g, language in enumerate(corpus.languages):
            seen: list[str] = []

            def texts(
                language: str = language, split: str = split, seen: list[str] = seen, done: int = s * len(corpus.languages) + g
            ) -> Iterator[str]:
                # Every split reads the same files: what was skipped is counted once.
                for document in documents_of(corpus, language, split, counts if split == "train" else None):
                    seen.append(document.id)
                    if len(seen) % 500 == 0:
                        report(done, work, f"{split} {language}: {len(seen):,} documents")
                    yield document.text

            report(s * len(corpus.languages) + g, work, f"{split} {language}")
            packed = pack(
                enumerate(encode_all(encode, texts())), language=g, context_length=corpus.context_length,
                mode=corpus.mode, bos=corpus.bos, bos_id=bos_id, pad_id=pad_id, drop_short=corpus.drop_short,
                max_tokens=limit // len(corpus.languages) if limit is not None else None,
            )  # fmt: skip
            if not len(packed.tokens):
                raise InputError(
                    f"no text of language {language!r} fills one block of the {split} split: "
                    "check the source's path and format, or lower corpus.context_length"
                )
            packed = packed._replace(document=packed.document + np.uint32(len(rows_seen)))
            first = len(rows_seen)
            rows_seen += seen
            # Documents that were read ahead, or cut off by the limit, are in no block.
            used = np.unique(packed.document).tolist()
            rows += [(rows_seen[i], language, split, i) for i in used if i >= first]
            per_language.append(packed)
        blocks[split] = interleave(per_language, special)
    aligned = {}
    for which in ("dev", "test"):
        if pairs := aligned_pairs(corpus, which):
            length = corpus.aligned.max_length if corpus.aligned else 128
            aligned[which] = encode_aligned(
                pairs, encode, bos_id=bos_id if corpus.bos != "none" else None, pad_id=pad_id, max_length=length
            )
    documents = pa.table(dict(zip(("id", "language", "split", "row"), map(list, zip(*rows, strict=True)), strict=True)))
    notes = [f"{counts.skipped_empty} empty documents were left out."] if counts.skipped_empty else []
    if counts.replaced_characters:
        notes.append(f"{counts.replaced_characters} lone surrogates in the text were replaced by U+FFFD.")
    return blocks, documents, aligned, notes


def _vocabulary(
    tokenizer: Any, vocab_size: int, blocks: dict[str, TokenBlocks], special: Sequence[int], languages: Sequence[str],
    truth: Any,
) -> pa.Table:  # fmt: skip
    pieces = token_bytes(tokenizer)[:vocab_size]
    train = blocks["train"]
    mask = position_mask(train.tokens, train.language, special)
    tokens, language = train.tokens[mask].astype(np.int64), train.language[mask]
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise InputError(f"token id {int(tokens.max())} lies beyond the tokenizer's {vocab_size} entries")
    columns: dict[str, Any] = {
        "token": np.arange(vocab_size),
        "bytes": pa.array(pieces, pa.binary()),
        "text": [clean_text(p.decode("utf-8", errors="replace"))[0] for p in pieces],
        "has_letters": np.array([has_letters(p) for p in pieces]),
    }
    for g, code in enumerate(languages):
        columns[f"count_{code}"] = np.bincount(tokens[language == g], minlength=vocab_size)
    if truth is not None:
        columns |= {name: np.asarray(truth[name]) for name in ("language", "concept", "category", "shared")}
    return pa.table(columns)


def _counted(blocks: TokenBlocks, special: Sequence[int], languages: Sequence[str]) -> dict[str, int]:
    mask = position_mask(blocks.tokens, blocks.language, special)
    counts = np.bincount(blocks.language[mask], minlength=len(languages))
    return {code: int(counts[g]) for g, code in enumerate(languages)}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
