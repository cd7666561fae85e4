"""A synthetic run directory for the browser: as many features and examples as asked for, without any model.

Text is drawn by Zipf's law, or is that of a corpus of JSONL files ({"id", "text"}: en.jsonl and ja.jsonl, and pairs in
parallel.test.jsonl) under a SentencePiece tokenizer. What the site's size depends on follows a study of three sizes over
nine checkpoints: 6 active positions per example on average with a long tail, levels that use most of 1 to 100 (one in
nine is at the maximum), features of one language or of both. Everything is drawn without any pattern between features,
which packs worse than real ones do.

Shapes: N features, E examples of a chunk, W tokens of a window, B blocks, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save_file

from glottoscope.atomic import write_json, write_table
from glottoscope.features.collect import BINS
from glottoscope.study.load import parse_study
from glottoscope.study.store import RunStore

LANGUAGES = ("en", "ja")
CLASSES, SHARES = ("en", "ja", "mixed", "unclassified"), (0.35, 0.35, 0.2, 0.1)
MEAN_ACTIVE = 6.0
PAIRED = 0.5  # share of features with sentence pairs
PAIRS, SENTENCE, SHOWN_PAIRS = 1000, 30, 8
CHUNK = 100_000  # examples made together
SPECIAL = 4

STUDY = """
schema = 1
layers = [6]
[study]
name = "synthetic"
[corpus]
kind = "text"
languages = ["en", "ja"]
context_length = {window}
sources = [{{ language = "en", path = "en.jsonl" }}, {{ language = "ja", path = "ja.jsonl" }}]
aligned = {{ test = "parallel.test.jsonl" }}
[corpus.tokenizer_training]
vocab_size = {vocabulary}
[[models]]
source = "pretrain"
name = "m"
d_model = {width}
n_layers = 12
steps = {last}
checkpoints = {steps}
[sae]
n = {features}
k = 32
steps = 1
[features]
top_examples = {examples}
example_window = {window}
"""


class Sizes(NamedTuple):
    """How large the run is."""

    features: int = 32_768
    setups: int = 3
    examples: int = 50
    window: int = 64
    blocks: int = 100_000
    vocabulary: int = 99_574
    width: int = 256


class Text(NamedTuple):
    """Token blocks with their languages and documents, aligned sentences, and what the tokens are."""

    tokens: NDArray[np.uint32]  # [B, W]
    language: NDArray[np.uint8]  # [B, W]
    document: NDArray[np.uint32]  # [B, W]
    pairs: NDArray[np.uint32]  # [2, P, T]
    length: NDArray[np.int32]  # [2, P]
    pieces: list[bytes]


def synthetic_run(root: Path, sizes: Sizes, text: Text | None = None, *, seed: int = 0) -> Path:
    """Write a complete run directory of one SAE at several checkpoints.

    Args:
        text: default: drawn by Zipf's law. Its windows are those of `sizes`.
    """
    rng = np.random.default_rng(seed)
    text = text or zipf_text(sizes, rng)
    steps = [100 * n for n in range(sizes.setups)]
    study = STUDY.format(**sizes._asdict(), steps=steps, last=max(steps[-1], 1))
    store = RunStore(root)
    store.create(parse_study(study, name="study.toml", folder=root), {})
    _write_tokens(store, text)
    _write_ruler(store, text, sizes, rng)
    used = np.flatnonzero(np.bincount(text.tokens.reshape(-1), minlength=len(text.pieces)))
    rows, directions = [], rng.standard_normal((sizes.features, sizes.width), np.float32)
    for step in steps:
        folder = store.setup_dir("m", step, 6, 0)
        folder.mkdir(parents=True)
        rows.append(_write_setup(folder, sizes, text, used[used >= SPECIAL], step, rng))
        # The next checkpoint's directions lie near this one's.
        directions += 0.5 * rng.standard_normal(directions.shape, np.float32)
        save_file({"W_dec": directions}, folder / "sae.safetensors")
        for stage, files in (("train", ["sae.safetensors"]), ("features", ["examples.parquet"]), ("score", ["features.parquet"])):
            store.mark_done(folder, stage, "synthetic", {}, files)
    write_table(store.table_path("evolution"), pa.Table.from_pylist(rows))
    return root


# ---- text


def zipf_text(sizes: Sizes, rng: np.random.Generator) -> Text:
    """Blocks of one language each, in turn; every language has its own order of the same vocabulary."""
    weight = 1 / np.arange(1, sizes.vocabulary - SPECIAL + 1) ** 1.05
    bounds = np.cumsum(weight) / weight.sum()
    order = np.stack([rng.permutation(len(weight)) + SPECIAL for _ in LANGUAGES])
    language_B = np.arange(sizes.blocks) % 2
    drawn = np.searchsorted(bounds, rng.random((sizes.blocks, sizes.window)))
    tokens = order[language_B[:, None], np.minimum(drawn, len(weight) - 1)].astype(np.uint32)
    sentences = np.searchsorted(bounds, rng.random((2, PAIRS, SENTENCE)))
    pairs = order[np.arange(2)[:, None, None], np.minimum(sentences, len(weight) - 1)].astype(np.uint32)
    length = rng.integers(5, SENTENCE + 1, (2, PAIRS)).astype(np.int32)
    words = [f" {i:x}".encode() if i % 2 else chr(0x4E00 + i % 20_000).encode() for i in range(sizes.vocabulary - SPECIAL)]
    return _text(tokens, language_B, np.arange(sizes.blocks) // 8, pairs, length, [b"<s>", b"</s>", b"<pad>", b"<unk>", *words])


def _text(tokens: Any, language_B: Any, document_B: Any, pairs: Any, length: Any, pieces: list[bytes]) -> Text:
    language = np.repeat(language_B[:, None], tokens.shape[1], axis=1).astype(np.uint8)
    document = np.repeat(document_B[:, None], tokens.shape[1], axis=1).astype(np.uint32)
    return Text(tokens, language, document, pairs, length, pieces)


def corpus_text(tokenizer: Path, corpus: Path, sizes: Sizes) -> Text:
    """The corpus under a SentencePiece tokenizer: at most sizes.blocks blocks, the languages in turn."""
    from sentencepiece import SentencePieceProcessor

    from glottoscope.corpus.display import piece_bytes

    model: Any = SentencePieceProcessor(model_file=str(tokenizer))
    per_language = [_blocks(model, _jsonl(corpus / f"{x}.jsonl"), sizes) for x in LANGUAGES]
    n = min(len(tokens) for tokens, _ in per_language)
    tokens = np.stack([tokens[:n] for tokens, _ in per_language], axis=1).reshape(2 * n, sizes.window)
    document_B = np.stack([documents[:n] for _, documents in per_language], axis=1).reshape(2 * n)
    pairs, length = np.zeros((2, PAIRS, SENTENCE), np.uint32), np.zeros((2, PAIRS), np.int32)
    for p, row in zip(range(PAIRS), _jsonl(corpus / "parallel.test.jsonl"), strict=False):
        for side, language in enumerate(LANGUAGES):
            ids = model.encode(row[language])[:SENTENCE]
            pairs[side, p, : len(ids)], length[side, p] = ids, len(ids)
    pieces = [piece_bytes(model.id_to_piece(i)) for i in range(model.get_piece_size())]
    return _text(tokens, np.arange(2 * n) % 2, document_B, pairs, length, pieces)


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def _blocks(model: Any, rows: Iterable[dict[str, Any]], sizes: Sizes) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Full blocks of a language's documents, and the document in which each begins."""
    wanted, stream, owner = sizes.blocks // 2 * sizes.window, [], []
    for number, row in enumerate(rows):
        ids = model.encode(row["text"])
        stream.append(np.array(ids, np.uint32))
        owner.append(np.full(len(ids), number))
        wanted -= len(ids)
        if wanted <= 0:
            break
    tokens, document = np.concatenate(stream), np.concatenate(owner)
    n = min(len(tokens) // sizes.window, sizes.blocks // 2)
    return tokens[: n * sizes.window].reshape(n, sizes.window), document[: n * sizes.window : sizes.window]


def _write_tokens(store: RunStore, text: Text) -> None:
    folder = store.tokens_dir
    store.aligned_dir.mkdir(parents=True)
    for name in ("tokens", "language", "document"):
        np.save(folder / f"test.{name}.npy", getattr(text, name))
    np.save(store.aligned_dir / "test.tokens.npy", text.pairs)
    np.save(store.aligned_dir / "test.length.npy", text.length)
    n_documents = int(text.document.max()) + 1
    write_table(folder / "documents.parquet", pa.table({
        "id": [f"document-{i}" for i in range(n_documents)], "language": ["en"] * n_documents,
        "split": ["test"] * n_documents, "row": np.arange(n_documents),
    }))  # fmt: skip
    counts = [np.bincount(text.tokens[text.language[:, 0] == g].reshape(-1), minlength=len(text.pieces)) for g in range(2)]
    write_table(folder / "vocabulary.parquet", pa.table({
        "token": np.arange(len(text.pieces)), "bytes": pa.array(text.pieces, pa.binary()),
        "has_letters": [True] * len(text.pieces), "text": [x.decode("utf-8", "replace") for x in text.pieces],
        **{f"count_{x}": c for x, c in zip(LANGUAGES, counts, strict=True)},
    }))  # fmt: skip
    both = {x: int(c.sum()) for x, c in zip(LANGUAGES, counts, strict=True)}
    write_json(folder / "info.json", {
        "languages": list(LANGUAGES), "vocab_size": len(text.pieces), "bos_id": 0, "pad_id": 2,
        "special_ids": list(range(SPECIAL)), "block_length": text.tokens.shape[1], "counted": {"test": both},
        "documents": {"test": both}, "aligned": {"test": {"pairs": PAIRS, "articles": PAIRS // 8, "truncated": 0}},
        "notes": [],
    })  # fmt: skip


def _write_ruler(store: RunStore, text: Text, sizes: Sizes, rng: np.random.Generator) -> None:
    """Token vectors of more tokens than are clustered together: each feature's own are, when they are shown."""
    folder = store.ruler_dir("m")
    folder.mkdir(parents=True)
    vectors = rng.standard_normal((len(text.pieces), sizes.width), np.float32)
    counts = np.bincount(text.tokens.reshape(-1), minlength=len(text.pieces)).astype(np.int64)
    save_file({"vectors": vectors, "counts": counts}, folder / "hidden_layer_06.safetensors")
    save_file({"theta": np.array([0.1])}, folder / "clusters_hidden_layer_06.safetensors")


# ---- a setup


def _write_setup(
    folder: Path, sizes: Sizes, text: Text, tokens: NDArray[np.int64], step: int, rng: np.random.Generator
) -> dict[str, Any]:  # fmt: skip
    """All tables of a setup; returns its row of the evolution table."""
    n = sizes.features
    key = {
        "control": "none", "family": "synthetic", "model": "m", "d_model": sizes.width, "n_params": 10**8, "step": step,
        "tokens_seen": step * 1024, "layer": 6, "lm_seed": 0, "sae_seed": 0,
    }  # fmt: skip
    kind = rng.choice(len(CLASSES), n, p=SHARES)
    maximum = rng.lognormal(-1.0, 0.5, n).astype(np.float32)
    # Share of a feature's text in the first language.
    first = np.choose(kind, [1.0, 0.0, 0.5, 0.5])
    _write_features(folder / "features.parquet", key, kind, maximum, rng)
    _write_examples(folder / "examples.parquet", sizes, text, first, maximum, rng)
    _write_histogram(folder / "histogram.parquet", tokens, first, rng)
    _write_activations(folder / "activations.parquet", first, rng)
    _write_pairs(folder / "pairs.parquet", text, maximum, rng)
    counts = np.bincount(kind, minlength=len(CLASSES)).tolist()
    shares = {f"share_{x}": c / n for x, c in zip(CLASSES, counts, strict=True)}
    return {
        **key, "n_features": n, "n_alive": n, "n_bilingual": counts[2] // 2, **shares,
        **{f"count_{x}": c for x, c in zip(CLASSES, counts, strict=True)}, "count_neutral": 0, "count_dead": 0,
    }  # fmt: skip


def _write_features(path: Path, key: dict[str, Any], kind: NDArray[Any], maximum: NDArray[Any], rng: np.random.Generator) -> None:
    n = len(kind)
    positions = rng.lognormal(6, 1.5, n).astype(np.int64) + 20
    columns: dict[str, Any] = {name: [value] * n for name, value in key.items()}
    columns |= {"feature": np.arange(n, dtype=np.int32), "alive": np.ones(n, bool), "density": rng.lognormal(-7, 1.5, n)}
    columns |= {"max_activation": maximum, "n_positions": positions, "n_neutral": positions // 10}
    columns |= {f"n_{x}": (positions * rng.random(n)).astype(np.int64) for x in LANGUAGES}
    columns["language"] = [CLASSES[x] for x in kind.tolist()]
    for name in ("share", "share_low", "share_high", "monosemanticity", "monosemanticity_hidden", "coherence", "coherence_token"):
        columns[name] = rng.random(n)
    for name in ("phi", "phi_null", "h_token", "h_semantic"):
        columns[name] = rng.normal(0.2, 0.2, n)
    for name in ("n_pairs_a", "n_pairs_b"):
        columns[name] = rng.integers(0, 200, n)
    for name in ("single_token", "supportable", "bilingual", "bilingual_paper"):
        columns[name] = rng.random(n) < 0.1
    columns["granularity"] = pa.nulls(n, pa.int8())
    write_table(path, pa.table(columns))


def _write_examples(
    path: Path, sizes: Sizes, text: Text, first: NDArray[Any], maximum: NDArray[Any], rng: np.random.Generator
) -> None:  # fmt: skip
    """At most one example per block; the columns with the window's tokens and text, which the site does not read, are left out."""
    width, per = sizes.window, sizes.examples
    writer = None
    for begin in range(0, sizes.features, max(1, CHUNK // per)):
        features = np.arange(begin, min(begin + max(1, CHUNK // per), sizes.features))
        e = len(features) * per
        feature, rank = np.repeat(features, per), np.tile(np.arange(per), len(features))
        language = (rng.random(e) >= first[feature]).astype(np.int64)
        # Distinct blocks of a feature: one out of each of `per` stretches, in random order.
        stretch = len(text.tokens) // per // 2
        place = rng.permuted(np.tile(np.arange(per), (len(features), 1)), axis=1).reshape(-1)
        block = 2 * (place * stretch + rng.integers(0, stretch, e)) + language
        at = rng.integers(0, width, e)
        value = maximum[feature] * (1 - 0.5 * (rank / per) ** 0.7) * rng.uniform(0.98, 1, e)
        value[rank == 0] = maximum[features]
        rate = np.minimum(rng.exponential((MEAN_ACTIVE - 1) / (width - 1), e), 1)
        active = rng.random((e, width), np.float32) < rate[:, None]
        strength = np.where(rng.random((e, width), np.float32) < 1 / 9, 0.99, rng.uniform(0.15, 1, (e, width)))
        activations = np.where(active, value[:, None] * strength, 0).astype(np.float32)
        activations[np.arange(e), at] = value
        offsets = pa.array(np.arange(e + 1, dtype=np.int32) * width)
        table = pa.table({
            "feature": feature.astype(np.int32), "rank": rank.astype(np.int32),
            "language": pa.array(list(LANGUAGES)).take(pa.array(language)), "block": block,
            "position": at.astype(np.int32), "window_start": np.zeros(e, np.int32), "value": value.astype(np.float32),
            "activations": pa.ListArray.from_arrays(offsets, pa.array(activations.reshape(-1))),
        })  # fmt: skip
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_histogram(path: Path, tokens: NDArray[np.int64], first: NDArray[Any], rng: np.random.Generator) -> None:
    """10 to 60 tokens of each language that a feature has, of every frequency alike on a log scale."""
    n = len(first)
    counts = np.stack([np.where(first > 0, rng.integers(10, 61, n), 0), np.where(first < 1, rng.integers(10, 61, n), 0)], axis=1)
    feature, language = (np.repeat(x, counts.reshape(-1)) for x in (np.repeat(np.arange(n), 2), np.tile(np.arange(2), n)))
    drawn = tokens[np.minimum(len(tokens) ** rng.random(len(feature)), len(tokens) - 1).astype(np.int64)]
    key = np.unique((feature * 2 + language) * (int(tokens.max()) + 1) + drawn)
    group, token = np.divmod(key, int(tokens.max()) + 1)
    write_table(path, pa.table({
        "feature": (group // 2).astype(np.int32), "token": token.astype(np.int32), "language": (group % 2).astype(np.uint8),
        "count": np.ceil(rng.pareto(1.0, len(key)) * 3).astype(np.int64) + 1,
    }))  # fmt: skip


def _write_activations(path: Path, first: NDArray[Any], rng: np.random.Generator) -> None:
    """Eight half octaves of each language that a feature has."""
    n = len(first)
    feature, language, step = (x.reshape(-1) for x in np.meshgrid(np.arange(n), np.arange(2), np.arange(8), indexing="ij"))
    there = np.where(language == 0, first[feature] > 0, first[feature] < 1)
    start = rng.integers(4, BINS - 8, n)
    count = rng.lognormal(4, 1.5, len(feature)).astype(np.int64) + 1
    write_table(path, pa.table({
        "feature": feature[there].astype(np.int32), "language": language[there].astype(np.uint8),
        "bin": (start[feature] + step)[there].astype(np.int8), "count": count[there],
    }))  # fmt: skip


def _write_pairs(path: Path, text: Text, maximum: NDArray[Any], rng: np.random.Generator) -> None:
    n = len(maximum)
    feature = np.repeat(np.sort(rng.choice(n, int(PAIRED * n), replace=False)), SHOWN_PAIRS)
    sides: dict[str, Any] = {}
    for side in "ab":
        length = rng.integers(1, 5, len(feature))
        place = np.sort(rng.integers(0, 5, (len(feature), 4)) + np.arange(4) * 5, axis=1)[np.arange(4) < length[:, None]]
        offsets = pa.array(np.concatenate(([0], np.cumsum(length))).astype(np.int32))
        level = maximum[np.repeat(feature, length)] * rng.uniform(0.5, 1, len(place))
        sides[f"at_{side}"] = pa.ListArray.from_arrays(offsets, pa.array(place.astype(np.int32)))
        sides[f"level_{side}"] = pa.ListArray.from_arrays(offsets, pa.array(level.astype(np.float32)))
        sides[f"value_{side}"] = np.zeros(len(feature), np.float32)
    write_table(path, pa.table({
        "feature": feature.astype(np.int32), "rank": np.tile(np.arange(SHOWN_PAIRS, dtype=np.int32), len(feature) // SHOWN_PAIRS),
        "pair": rng.integers(0, text.pairs.shape[1], len(feature)).astype(np.int64), **sides,
    }))  # fmt: skip


def quick(sizes: Sizes) -> Sizes:
    """A hundredth of the features, a twentieth of the text."""
    return sizes._replace(features=max(256, sizes.features // 100), blocks=sizes.blocks // 20, vocabulary=sizes.vocabulary // 10)


def cut_run(run: Path, root: Path, n: int) -> Path:
    """A run directory that holds the first n setups of another, by links."""
    root.mkdir(parents=True)
    for path in run.iterdir():
        if path.name not in ("cells", "labels", ".lock"):
            (root / path.name).symlink_to(path.resolve())
    for path in sorted((run / "cells").glob("*/layer_*/seed_*"))[:n]:
        link = root / path.relative_to(run)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return root
