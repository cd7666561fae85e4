"""Stage "features": one language model pass over the test split, and one over the aligned sentences, for all setups of a cell.

What is written here costs language model passes; what only judges it (classes, entropies, thresholds) is stage "score".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from glottoscope.atomic import atomic_path, write_json, write_table
from glottoscope.corpus.display import merge_spans
from glottoscope.corpus.tokens import (
    AlignedTokens,
    TokenBlocks,
    attention_mask,
    position_mask,
    read_aligned_tokens,
)
from glottoscope.features import v1
from glottoscope.features.alignment import alignment
from glottoscope.features.bilingual import (
    SentenceFirings,
    firing_threshold,
    length_strata,
    merge_firings,
    permute_sentences,
    phi,
    phi_null_exact,
    sentence_firings,
    shift_to_next_sentence,
)
from glottoscope.features.collect import Collected, Examples, FeatureCollector, restrict, token_histogram, top_examples
from glottoscope.features.language import (
    NEUTRAL,
    count_languages,
    document_languages,
    script_language,
    script_languages,
)
from glottoscope.features.truth import ConceptMeans, alignment_truth
from glottoscope.lm.layers import embedding_module
from glottoscope.sae.model import TopKSAE
from glottoscope.sae.quality import QualityAccumulator
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import VERSIONS, Context, Vocabulary, batches, hidden_states

STRICTER = (0.8, 0.9)  # activation thresholds swept beside the study's own
KEPT_CODES = 256 * 2**20  # bytes of sparse codes kept between the two looks at the test split
SENTENCES = 256  # aligned sentences of one forward pass
FILES = ("collected.parquet", "histogram.parquet", "examples.parquet", "quality.json")

Setup = tuple[int, int]  # (layer, SAE seed)


def missing_layers(context: Context, cell: Cell, layers: Sequence[int]) -> list[int]:
    """Layers of the cell whose features, or (the final cell's) token means, are not collected yet."""
    return [x for x in layers if _missing_seeds(context, cell, x) or (is_ruler(context, cell) and not _has_means(context, cell, x))]


def _missing_seeds(context: Context, cell: Cell, layer: int) -> list[int]:
    store, model, step = context.store, cell.model.name, cell.checkpoint.step
    return [
        seed
        for seed in context.study.sae.seeds
        if not store.is_done(store.setup_dir(model, step, layer, seed), "features", context.features_key(cell, layer, seed))
    ]


def _has_means(context: Context, cell: Cell, layer: int) -> bool:
    folder = context.store.ruler_dir(cell.model.name)
    return context.store.is_done(folder, f"means_layer_{layer:02d}", means_key(context, cell, layer))


def is_ruler(context: Context, cell: Cell) -> bool:
    """Whether this cell's hidden states are the space in which monosemanticity of its model is measured."""
    return cell.model.lm == cell.model.name and cell.checkpoint == cell.model.final


def means_key(context: Context, cell: Cell, layer: int) -> str:
    from glottoscope.study.store import digest

    return digest("means", VERSIONS["rulers"], context.lm_key(cell), context.tokens_key, layer)


def cell_key(context: Context, cell: Cell) -> str:
    from glottoscope.study.store import digest

    return digest("cell", context.lm_key(cell), context.tokens_key, context.study.features.lm_loss_tokens)


class _Codes(NamedTuple):
    """Sparse codes of some positions."""

    position: NDArray[np.int64]  # [M] block * T + t
    values: NDArray[np.float32]  # [M, K]
    indices: NDArray[np.int64]  # [M, K]


@dataclass
class _Setup:
    """Accumulators of one SAE during the pass over the test split."""

    sae: TopKSAE
    collector: FeatureCollector
    quality: QualityAccumulator
    firings: dict[tuple[str, int], list[SentenceFirings]] = field(default_factory=dict)
    codes: list[_Codes] = field(default_factory=list)  # of the whole test split, where they are few


def collect_cell(root: str, model: str, step: int, layers: tuple[int, ...], report: Any) -> None:
    """Collect the features of some layers of one cell: activations, examples, translation pairs, quality."""
    context = Context.open(root)
    cell = context.cell_of(model, step)
    study, store, info = context.study, context.store, context.token_info
    lm = context.load_lm(cell)
    shape = cell.model.shape
    assert shape is not None
    blocks, vocabulary, neutral = context.blocks("test"), context.vocabulary, context.neutral()
    setups: dict[Setup, _Setup] = {}
    for layer in layers:
        for seed in _missing_seeds(context, cell, layer):
            sae = TopKSAE.load(store.setup_dir(model, step, layer, seed), device=str(context.device()))
            collector = FeatureCollector(sae.n, len(info.languages), info.vocab_size, threshold=study.features.threshold)
            setups[layer, seed] = _Setup(sae, collector, QualityAccumulator(sae.d, len(info.languages)))
    ruler = _TokenMeans(vocabulary, layers, lm) if is_ruler(context, cell) else None
    concepts = {
        layer: ConceptMeans(len(info.languages), int(vocabulary.concept.max()) + 1, shape.d_model)
        for layer in layers
    } if vocabulary.concept is not None else {}  # fmt: skip

    everything = np.arange(len(blocks.tokens))
    # Kept codes spare the second pass for the examples; beyond the bound they are computed again.
    keeps = blocks.tokens.size * study.sae.k * 12 * len(setups) <= KEPT_CODES
    for n, chunk in enumerate(_positions(context, lm, cell, blocks, layers, everything)):
        if n % 5 == 0:
            report(n * study.compute.lm_batch, 2 * len(everything), "test split")
        language = torch.from_numpy(chunk.language.astype(np.int64))
        for (layer, _), setup in setups.items():
            x_MD = chunk.states[layer]
            values, indices = setup.sae.encode(x_MD)
            codes = _Codes(chunk.position, values.cpu().numpy(), indices.cpu().numpy())
            setup.collector.update(codes.values, codes.indices, codes.position, chunk.token, chunk.language)
            if keeps:
                setup.codes.append(codes)
            if study.features.rule == "v1":
                setup.collector.update_max(setup.sae.max_preactivation(x_MD).cpu().numpy())
            setup.quality.update(setup.sae.normalize(x_MD), setup.sae.decode(values, indices), (values > 0).sum(1), language)
        for layer, means in concepts.items():
            assert vocabulary.concept is not None
            means.update(chunk.states[layer].cpu().numpy(), vocabulary.concept[chunk.token], chunk.language)
        if ruler is not None:
            ruler.update(chunk)
    collected = {key: setup.collector.finish() for key, setup in setups.items()}
    if ruler is not None:
        ruler.write(store.ruler_dir(model))
        for layer in layers:
            files = ["embeddings.safetensors", f"hidden_layer_{layer:02d}.safetensors"]
            store.mark_done(store.ruler_dir(model), f"means_layer_{layer:02d}", means_key(context, cell, layer), {}, files)

    report(1, 2, "examples")
    shown = {key: _examples(context, c, blocks.tokens.shape[1], key) for key, c in collected.items()}
    windows = _windows(context, lm, cell, blocks, layers, setups, shown)
    report(3, 4, "aligned sentences")
    # Thresholds are judged on dev, and at the final checkpoint only; every claim is made on test.
    sets = [w for w in info.aligned if w == "test" or cell.checkpoint == cell.model.final]
    aligned = {w: read_aligned_tokens(store.aligned_dir, w) for w in sets}
    states = {
        which: _aligned_pass(context, lm, cell, pairs, layers, which, setups, collected, neutral)
        for which, pairs in aligned.items()
    }
    if not store.is_done(store.cell_dir(model, step), "cell", cell_key(context, cell)):
        write_json(store.cell_dir(model, step) / "cell.json", _lm_losses(context, lm, blocks))
        store.mark_done(store.cell_dir(model, step), "cell", cell_key(context, cell), {}, ["cell.json"])
    documents = _document_ids(context)
    for (layer, seed), setup in setups.items():
        folder = store.setup_dir(model, step, layer, seed)
        what = collected[layer, seed]
        table = _collected_table(context, what, blocks, vocabulary, neutral)
        for which, pairs in aligned.items():
            table = _with_phi(context, table, setup, pairs, which)
        write_table(folder / "collected.parquet", table)
        histogram = token_histogram(what)
        write_table(folder / "histogram.parquet", pa.table({
            "feature": histogram.feature.astype(np.int32), "token": histogram.token.astype(np.int32),
            "language": histogram.language.astype(np.uint8), "count": histogram.count.astype(np.int64),
        }))  # fmt: skip
        write_table(folder / "examples.parquet", _examples_table(
            context, shown[layer, seed], windows[layer, seed], blocks, vocabulary, documents
        ))  # fmt: skip
        write_json(folder / "quality.json", _quality(context, setup, what, neutral, aligned, states, concepts, layer))
        store.mark_done(folder, "features", context.features_key(cell, layer, seed), {}, list(FILES))


# ---- the pass over the test split


class _Chunk(NamedTuple):
    """Counted positions of a few blocks."""

    states: dict[int, Tensor]  # layer -> [M, D]
    position: NDArray[np.int64]  # [M] block * T + t
    token: NDArray[np.int64]  # [M]
    language: NDArray[np.uint8]  # [M]


def _positions(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], order: NDArray[np.int64]
) -> Iterator[_Chunk]:
    width = blocks.tokens.shape[1]
    for rows in batches(order, context.study.compute.lm_batch):
        tokens, language = np.asarray(blocks.tokens[rows]), np.asarray(blocks.language[rows])
        mask = position_mask(tokens, language, context.token_info.special_ids)
        states = hidden_states(lm, tokens, attention_mask(language), layers, cell)
        kept = torch.from_numpy(np.flatnonzero(mask))
        position = (rows[:, None] * width + np.arange(width))[mask]
        yield _Chunk(
            {x: s.flatten(0, 1).index_select(0, kept.to(s.device)) for x, s in states.items()},
            position, tokens[mask].astype(np.int64), language[mask],
        )  # fmt: skip


class _TokenMeans:
    """Mean normalised hidden state of every token that occurs, per layer, and the input embeddings: the rulers' vectors.

    States are taken at norm 1, as the SAE sees them: a few positions of huge norm would otherwise be the mean.
    """

    def __init__(self, vocabulary: Vocabulary, layers: Sequence[int], lm: Any) -> None:
        self.embeddings = embedding_module(lm).weight.detach().float().cpu()[: len(vocabulary.text)].clone()
        self.layers = tuple(layers)
        self.sums: dict[int, Tensor] = {}
        self.counts = torch.zeros(len(vocabulary.text), dtype=torch.int64)

    def update(self, chunk: _Chunk) -> None:
        token = torch.from_numpy(chunk.token)
        self.counts += torch.bincount(token, minlength=len(self.counts))
        for layer, x_MD in chunk.states.items():
            u_MD = torch.nn.functional.normalize(x_MD, dim=1).cpu()
            if layer not in self.sums:
                self.sums[layer] = torch.zeros(len(self.counts), u_MD.shape[1])
            self.sums[layer].index_add_(0, token, u_MD)

    def write(self, folder: Path) -> None:
        with atomic_path(folder / "embeddings.safetensors") as temporary:
            save_file({"vectors": self.embeddings, "counts": self.counts}, temporary)
        for layer, sums in self.sums.items():
            means = sums / self.counts.clamp_min(1)[:, None]
            with atomic_path(folder / f"hidden_layer_{layer:02d}.safetensors") as temporary:
                save_file({"vectors": means, "counts": self.counts}, temporary)


def _lm_losses(context: Context, lm: Any, blocks: TokenBlocks) -> dict[str, Any]:
    """The language model's loss per language on the first test tokens, in nats per token."""
    from glottoscope.lm.losses import lm_loss

    info, study = context.token_info, context.study
    width = blocks.tokens.shape[1]
    n_blocks = min(len(blocks.tokens), max(len(info.languages), study.features.lm_loss_tokens // width))
    total, counts = np.zeros(len(info.languages)), np.zeros(len(info.languages), np.int64)
    device = next(lm.parameters()).device
    for rows in batches(np.arange(n_blocks), study.compute.lm_batch):
        tokens, language = np.asarray(blocks.tokens[rows]), np.asarray(blocks.language[rows])
        mask, attention = position_mask(tokens, language, info.special_ids), attention_mask(language)
        arrays = (
            tokens.astype(np.int64),
            attention.astype(np.int64),
            mask,
            np.where(attention, language, 0).astype(np.int64),
        )
        ids, attended, counted, code = (torch.from_numpy(a).to(device) for a in arrays)
        nll, n = lm_loss(lm, ids, attended, counted, code, len(info.languages))
        total, counts = total + nll, counts + n
    losses = {f"lm_loss_{x}": float(total[g] / counts[g]) if counts[g] else None for g, x in enumerate(info.languages)}
    return {**losses, "n_params": int(sum(p.numel() for p in lm.parameters()))}


# ---- examples


def _examples(context: Context, collected: Collected, width: int, key: Setup) -> Examples:
    """The examples kept of a setup: strongest first; under rule v1 its first ones, in order."""
    features = context.study.features
    if features.rule == "v1":
        examples = v1.v1_examples(collected, width, max(features.top_examples, v1.N_EXAMPLES))
    else:
        examples = top_examples(collected, features.top_examples, width)
    alive = np.flatnonzero(collected.alive)
    if features.example_features is not None and len(alive) > features.example_features:
        rng = np.random.default_rng([seed_for(context.study, "examples"), *key])
        wanted = np.zeros(collected.n_features, bool)
        wanted[rng.choice(alive, features.example_features, replace=False)] = True
        examples = Examples(*(column[wanted[examples.feature]] for column in examples))
    return examples


class _Windows(NamedTuple):
    """The feature's activations around each example."""

    start: NDArray[np.int64]  # [E] first position shown
    activations: NDArray[np.float32]  # [E, W]


def _windows(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], setups: dict[Setup, _Setup],
    shown: dict[Setup, Examples],
) -> dict[Setup, _Windows]:  # fmt: skip
    """A second look at the blocks that hold examples: activations of a feature at every position of its windows."""
    width = blocks.tokens.shape[1]
    window = min(width, context.study.features.example_window)
    result, order, keys = {}, {}, {}
    for key, examples in shown.items():
        start = np.clip(examples.t - window // 2, 0, width - window)
        result[key] = _Windows(start, np.zeros((len(start), window), np.float32))
        # At most one example per (feature, block): the pair is a key, sorted for look-up.
        pair = examples.block * setups[key].sae.n + examples.feature
        order[key] = np.argsort(pair, kind="stable")
        keys[key] = pair[order[key]]
    for key, codes in _codes_again(context, lm, cell, blocks, layers, setups, shown):
        if not len(keys[key]):
            continue
        block, t = np.divmod(codes.position, width)
        pair = block[:, None] * setups[key].sae.n + codes.indices
        place = np.minimum(np.searchsorted(keys[key], pair), len(keys[key]) - 1)
        row, pick = np.nonzero((keys[key][place] == pair) & (codes.values > 0))
        example = order[key][place[row, pick]]
        column = t[row] - result[key].start[example]
        inside = (column >= 0) & (column < window)
        result[key].activations[example[inside], column[inside]] = codes.values[row, pick][inside]
    return result


def _codes_again(
    context: Context,
    lm: Any,
    cell: Cell,
    blocks: TokenBlocks,
    layers: Sequence[int],
    setups: dict[Setup, _Setup],
    shown: dict[Setup, Examples],
) -> Iterator[tuple[Setup, _Codes]]:
    """Codes of the blocks that hold examples: the kept ones, or from another pass."""
    if all(setup.codes for setup in setups.values()):
        for key, setup in setups.items():
            yield from ((key, codes) for codes in setup.codes)
        return
    needed = np.unique(np.concatenate([e.block for e in shown.values()])) if shown else np.zeros(0, np.int64)
    for chunk in _positions(context, lm, cell, blocks, layers, needed.astype(np.int64)):
        for key, setup in setups.items():
            values, indices = setup.sae.encode(chunk.states[key[0]])
            yield key, _Codes(chunk.position, values.cpu().numpy(), indices.cpu().numpy())


def _examples_table(
    context: Context, examples: Examples, windows: _Windows, blocks: TokenBlocks, vocabulary: Vocabulary,
    documents: list[str],
) -> pa.Table:  # fmt: skip
    window = windows.activations.shape[1]
    columns = windows.start[:, None] + np.arange(window)
    tokens = np.asarray(blocks.tokens[examples.block[:, None], columns]) if len(columns) else np.zeros((0, window), np.uint32)
    document = np.asarray(blocks.document[examples.block, examples.t])
    language = np.asarray(blocks.language[examples.block, examples.t])
    pieces = vocabulary.piece
    codes = np.array(context.token_info.languages)
    size = pa.list_(pa.float32())
    return pa.table({
        "feature": examples.feature.astype(np.int32),
        "rank": examples.rank.astype(np.int32),
        "document": [documents[i] for i in document.tolist()],
        "language": codes[language].tolist() if len(language) else pa.array([], pa.string()),
        "block": examples.block.astype(np.int64),
        "position": examples.t.astype(np.int32),
        "window_start": windows.start.astype(np.int32),
        "value": examples.value.astype(np.float32),
        "tokens": pa.array(list(tokens), pa.list_(pa.uint32())),
        "activations": pa.array(list(windows.activations), size),
        "text": pa.array([_text_of(pieces, row) for row in tokens.tolist()], pa.string()),
    })  # fmt: skip


def _text_of(pieces: list[bytes], tokens: list[int]) -> str:
    """Text of a window; a character cut at its edge shows as U+FFFD."""
    return b"".join([pieces[t] for t in tokens]).decode("utf-8", errors="replace")


def _document_ids(context: Context) -> list[str]:
    from glottoscope.study.store import read_parquet

    table = read_parquet(context.store.tokens_dir / "documents.parquet")
    mask = np.array(table["split"].to_pylist()) == "test"
    ids = np.array(table["id"].to_pylist(), dtype=object)[mask]
    rows = table["row"].to_numpy()[mask]
    by_row = np.full(int(rows.max()) + 1, "", dtype=object)
    by_row[rows] = ids
    return by_row.tolist()


# ---- what a feature's positions count for


def _collected_table(
    context: Context, collected: Collected, blocks: TokenBlocks, vocabulary: Vocabulary, neutral: NDArray[np.bool_]
) -> pa.Table:
    """Per feature: how often and how strongly it is active, and its positions by language under the study's rule."""
    info, rule = context.token_info, context.study.features.rule
    n, g = collected.n_features, len(info.languages)
    if rule == "v1":
        english, digits = v1.v1_token_tables(vocabulary.text)
        tokens = np.asarray(blocks.tokens)
        mask = position_mask(tokens, np.asarray(blocks.language), info.special_ids)
        language = v1.v1_position_language(tokens, english, digits, mask)
        counts = v1.v1_counts(v1.v1_examples(collected, tokens.shape[1]), language, n)
        by_code = {"en": counts[:, v1.EN], "ja": counts[:, v1.JA]}
        n_lang, n_neutral = np.stack([by_code[x] for x in info.languages], axis=1), np.zeros(n, np.int64)
    else:
        position_language = document_languages(collected, neutral)
        if rule == "script":
            scripts = _position_scripts(blocks, vocabulary, info.languages).reshape(-1)
            position_language = np.where(position_language == NEUTRAL, NEUTRAL, scripts[collected.position])
        n_lang, n_neutral = count_languages(collected.feature, position_language, n, g)
    columns: dict[str, Any] = {
        "feature": np.arange(n, dtype=np.int32), "alive": collected.alive, "density": collected.density,
        "max_activation": collected.max_activation, "n_positions": collected.n_positions,
    }  # fmt: skip
    columns |= {f"n_{x}": n_lang[:, i] for i, x in enumerate(info.languages)}
    columns["n_neutral"] = n_neutral
    if rule == "document":
        # The threshold moves levels: what stricter ones would have counted, for the report's sweep.
        for stricter in (t for t in STRICTER if t > collected.threshold):
            part = restrict(collected, collected.max_activation * np.float32(stricter / max(collected.threshold, 1e-9)))
            n_lang, n_neutral = count_languages(part.feature, document_languages(part, neutral), n, g)
            suffix = f"_at_{stricter:.0%}".rstrip("%")
            columns |= {f"n_{x}{suffix}": n_lang[:, i] for i, x in enumerate(info.languages)}
            columns[f"n_neutral{suffix}"] = n_neutral
    return pa.table(columns)


def _position_scripts(blocks: TokenBlocks, vocabulary: Vocabulary, languages: Sequence[str]) -> NDArray[np.uint8]:
    """uint8 [B, T]: language of the merged character span at each position, by its script."""
    mapping = script_languages(languages)
    result = np.full(blocks.tokens.shape, NEUTRAL, np.uint8)
    for b, row in enumerate(np.asarray(blocks.tokens).tolist()):
        for span in merge_spans([vocabulary.piece[t] for t in row]):
            result[b, span.start : span.end] = script_language(span.text, mapping)
    return result


# ---- aligned sentences


def _aligned_pass(
    context: Context, lm: Any, cell: Cell, pairs: AlignedTokens, layers: Sequence[int], which: str,
    setups: dict[Setup, _Setup], collected: dict[Setup, Collected], neutral: NDArray[np.bool_],
) -> dict[int, NDArray[np.float32]]:  # fmt: skip
    """Which features fire in which sentence (kept in the setups), and mean states: layer -> [2, P, D]."""
    info, fraction = context.token_info, context.study.features.phi_firing
    n_pairs = pairs.tokens.shape[1]
    threshold = {key: firing_threshold(c.max_activation, fraction) for key, c in collected.items()}
    means: dict[int, NDArray[np.float32]] = {}
    for side in (0, 1):
        # Sentences of like length share a batch, so that little of it is padding; the order changes no result.
        order = np.argsort(pairs.length[side], kind="stable")
        for rows in batches(order, SENTENCES):
            longest = int(pairs.length[side, rows].max())
            tokens = np.asarray(pairs.tokens[side, rows, :longest])
            attention = np.arange(longest) < pairs.length[side, rows][:, None]
            language = np.where(attention, np.uint8(side), np.uint8(255))
            mask = position_mask(tokens, language, info.special_ids)
            states = hidden_states(lm, tokens, attention, layers, cell)
            kept = torch.from_numpy(np.flatnonzero(mask))
            sentence = np.broadcast_to(rows[:, None], tokens.shape)[mask]
            counted = ~neutral[tokens[mask]]
            weight = torch.from_numpy(mask).to(next(iter(states.values())).device)[..., None]
            for layer, x_BTD in states.items():
                means.setdefault(layer, np.zeros((2, n_pairs, x_BTD.shape[2]), np.float32))
                mean_BD = torch.where(weight, x_BTD, 0.0).sum(1) / weight.sum(1).clamp_min(1)
                means[layer][side, rows] = mean_BD.cpu().numpy()
            for key, setup in setups.items():
                x_MD = states[key[0]].flatten(0, 1)
                values, indices = setup.sae.encode(x_MD.index_select(0, kept.to(x_MD.device)))
                setup.firings.setdefault((which, side), []).append(
                    sentence_firings(
                        values.cpu().numpy(), indices.cpu().numpy(), sentence, threshold[key], counted,
                        n_sentences=n_pairs,
                    )
                )  # fmt: skip
    return means


def _with_phi(context: Context, table: pa.Table, setup: _Setup, pairs: AlignedTokens, which: str) -> pa.Table:
    """Translation-pair consistency of every feature, its null and its controls; the test pairs carry the plain names."""
    a, b = (merge_firings(setup.firings[which, side]) for side in (0, 1))
    found = phi(a, b)
    null = phi_null_exact(a, b, length_strata(pairs.length[0], pairs.length[1]))
    suffix = "" if which == "test" else f"_{which}"
    columns: dict[str, Any] = {
        f"phi{suffix}": found.phi, f"phi_null{suffix}": null, f"n_pairs_a{suffix}": found.n_a,
        f"n_pairs_b{suffix}": found.n_b,
    }  # fmt: skip
    if which == "test":
        rng = np.random.default_rng(seed_for(context.study, "shuffled-pairs"))
        columns["phi_shuffled"] = phi(a, permute_sentences(b, rng)).phi
        columns["phi_next"] = phi(a, shift_to_next_sentence(b, pairs.article)).phi
    for name, values in columns.items():
        array = pa.array(values, from_pandas=True) if values.dtype.kind == "f" else pa.array(values)
        table = table.append_column(name, array)
    return table


# ---- quality


def _quality(
    context: Context, setup: _Setup, collected: Collected, neutral: NDArray[np.bool_], aligned: dict[str, AlignedTokens],
    states: dict[str, dict[int, NDArray[np.float32]]], concepts: dict[int, ConceptMeans], layer: int,
) -> dict[str, Any]:  # fmt: skip
    info, quality = context.token_info, setup.quality.result()
    seed = seed_for(context.study, "alignment") % 2**32
    record: dict[str, Any] = {
        "fvu": quality.fvu, "cosine": quality.cosine, "l0": quality.l0, "loss": quality.loss,
        "n_positions": quality.n_positions,
        "exposure": collected.token_counts[~neutral].sum(axis=0).tolist(),
    }  # fmt: skip
    record |= {f"fvu_{x}": quality.fvu_language[g] for g, x in enumerate(info.languages)}
    if "test" in aligned:
        found = alignment(states["test"][layer][0], states["test"][layer][1], aligned["test"].article, seed=seed,
                          n_boot=context.study.features.bootstrap)  # fmt: skip
        record |= {"alignment": found.value, "alignment_low": found.low, "alignment_high": found.high}
    if layer in concepts:
        found = alignment_truth(concepts[layer].means(), concepts[layer].counts_GC, seed=seed, min_count=5)
        record["alignment_truth"] = found.value
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
