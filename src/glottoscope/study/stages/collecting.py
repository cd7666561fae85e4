"""Stage "features": one language model pass over the test split, and one over the aligned sentences, for all setups of a cell.

What is written here costs language model passes; what only judges it (classes, entropies, thresholds) is stage "score".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from glottoscope.atomic import write_json, write_table
from glottoscope.corpus.display import merge_spans
from glottoscope.corpus.tokens import (
    AlignedTokens,
    TokenBlocks,
    position_mask,
    read_aligned_tokens,
)
from glottoscope.features import v1
from glottoscope.features.alignment import alignment
from glottoscope.features.collect import Collected, FeatureCollector, activation_histogram, restrict, token_histogram
from glottoscope.features.language import (
    NEUTRAL,
    count_languages,
    document_languages,
    script_language,
    script_languages,
)
from glottoscope.features.truth import ConceptMeans, alignment_truth
from glottoscope.sae.model import TopKSAE
from glottoscope.sae.quality import QualityAccumulator
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import VERSIONS, Context, Vocabulary
from glottoscope.study.stages.examples import choose_examples, document_ids, examples_table, windows_of
from glottoscope.study.stages.pairs import aligned_pass, pairs_table, with_phi
from glottoscope.study.stages.passes import Codes, Collecting, LMLosses, Setup, TokenMeans, positions

STRICTER = (0.8, 0.9)  # activation thresholds swept beside the study's own
KEPT_CODES = 256 * 2**20  # bytes of sparse codes kept between the two looks at the test split
FILES = ("collected.parquet", "histogram.parquet", "activations.parquet", "examples.parquet", "quality.json")
PAIRS = "pairs.parquet"  # only where there are aligned test sentences


def missing_layers(context: Context, cell: Cell, layers: Sequence[int]) -> list[int]:
    """Layers of the cell whose features, or (the final cell's) token means, are not collected yet."""
    return [
        x
        for x in layers
        if context.missing_seeds("features", cell, x) or (is_ruler(context, cell) and not _has_means(context, cell, x))
    ]


def _has_means(context: Context, cell: Cell, layer: int) -> bool:
    folder = context.store.ruler_dir(cell.model.name)
    return context.store.is_done(folder, f"means_layer_{layer:02d}", means_key(context, cell, layer))


def is_ruler(context: Context, cell: Cell) -> bool:
    """Whether this cell's hidden states are the space in which monosemanticity of its model is measured."""
    return cell.model.lm == cell.model.name and cell.checkpoint == cell.model.final


def means_key(context: Context, cell: Cell, layer: int) -> str:
    from glottoscope.study.store import digest

    return digest("means", VERSIONS["rulers"], context.lm_key(cell), context.tokens_key, context.pass_settings, layer)


def cell_key(context: Context, cell: Cell) -> str:
    from glottoscope.study.store import digest

    tokens = context.study.features.lm_loss_tokens
    return digest("cell", VERSIONS["features"], context.lm_key(cell), context.tokens_key, context.pass_settings, tokens)


def collect_cell(root: str, model: str, step: int, layers: tuple[int, ...], report: Any) -> None:
    """Collect the features of some layers of one cell: activations, examples, translation pairs, quality."""
    context = Context.open(root)
    cell = context.cell_of(model, step)
    study, store, info = context.study, context.store, context.token_info
    lm = context.load_lm(cell)
    shape = cell.model.shape
    assert shape is not None
    blocks, vocabulary, neutral = context.blocks("test"), context.vocabulary, context.neutral()
    setups: dict[Setup, Collecting] = {}
    for layer in layers:
        for seed in context.missing_seeds("features", cell, layer):
            sae = TopKSAE.load(store.setup_dir(model, step, layer, seed), device=str(context.device()))
            collector = FeatureCollector(sae.n, len(info.languages), info.vocab_size, threshold=study.features.threshold)
            setups[layer, seed] = Collecting(sae, collector, QualityAccumulator(sae.d, len(info.languages)))
    ruler = TokenMeans(vocabulary, layers, lm) if is_ruler(context, cell) else None
    concepts = {
        layer: ConceptMeans(len(info.languages), int(vocabulary.concept.max()) + 1, shape.d_model)
        for layer in layers
    } if vocabulary.concept is not None else {}  # fmt: skip

    everything = np.arange(len(blocks.tokens))
    # Kept codes spare the second pass for the examples; beyond the bound they are computed again.
    # Decided for the whole cell: how its layers are grouped changes no number.
    keeps = blocks.tokens.size * study.sae.k * 12 * len(list(context.setups(cell))) <= KEPT_CODES
    known = store.is_done(store.cell_dir(model, step), "cell", cell_key(context, cell))
    losses = None if known else LMLosses(context, lm, blocks)
    for n, chunk in enumerate(positions(context, lm, cell, blocks, layers, everything, losses)):
        if n % 5 == 0:
            report(n * study.compute.lm_batch, 2 * len(everything), "test split")
        language = torch.from_numpy(chunk.language.astype(np.int64))
        for (layer, _), setup in setups.items():
            x_MD = chunk.states[layer]
            values, indices = setup.sae.encode(x_MD)
            codes = Codes(chunk.position, values.cpu().numpy(), indices.cpu().numpy())
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
        store.begin(store.ruler_dir(model), *(f"means_layer_{layer:02d}" for layer in layers))
        ruler.write(store.ruler_dir(model))
        for layer in layers:
            files = ["embeddings.safetensors", f"hidden_layer_{layer:02d}.safetensors"]
            store.mark_done(store.ruler_dir(model), f"means_layer_{layer:02d}", means_key(context, cell, layer), {}, files)

    report(1, 2, "examples")
    shown = {key: choose_examples(context, c, blocks.tokens.shape[1], key) for key, c in collected.items()}
    windows = windows_of(context, lm, cell, blocks, layers, setups, shown)
    report(3, 4, "aligned sentences")
    # Thresholds are judged on dev, and at the final checkpoint only; every claim is made on test.
    sets = [w for w in info.aligned if w == "test" or cell.checkpoint == cell.model.final]
    aligned = {w: read_aligned_tokens(store.aligned_dir, w) for w in sets}
    states = {
        which: aligned_pass(context, lm, cell, pairs, layers, which, setups, collected, shown, neutral)
        for which, pairs in aligned.items()
    }
    if losses is not None:
        store.begin(store.cell_dir(model, step), "cell")
        write_json(store.cell_dir(model, step) / "cell.json", losses.result())
        store.mark_done(store.cell_dir(model, step), "cell", cell_key(context, cell), {}, ["cell.json"])
    documents = document_ids(context)
    for (layer, seed), setup in setups.items():
        folder = store.setup_dir(model, step, layer, seed)
        what = collected[layer, seed]
        table = _collected_table(context, what, blocks, vocabulary, neutral)
        for which, pairs in aligned.items():
            table = with_phi(context, table, setup, pairs, which)
        store.begin(folder, "features")
        write_table(folder / "collected.parquet", table)
        histogram = token_histogram(what)
        write_table(folder / "histogram.parquet", pa.table({
            "feature": histogram.feature.astype(np.int32), "token": histogram.token.astype(np.int32),
            "language": histogram.language.astype(np.uint8), "count": histogram.count.astype(np.int64),
        }))  # fmt: skip
        activations = activation_histogram(what)
        write_table(folder / "activations.parquet", pa.table({
            "feature": activations.feature.astype(np.int32), "language": activations.language.astype(np.uint8),
            "bin": activations.bin.astype(np.int8), "count": activations.count,
        }))  # fmt: skip
        files: list[str] = [*FILES]
        if "test" in aligned:
            write_table(folder / PAIRS, pairs_table(setup))
            files.append(PAIRS)
        else:
            (folder / PAIRS).unlink(missing_ok=True)  # of a study that had aligned sentences
        write_table(folder / "examples.parquet", examples_table(
            context, shown[layer, seed], windows[layer, seed], blocks, vocabulary, documents
        ))  # fmt: skip
        write_json(folder / "quality.json", _quality(context, setup, what, neutral, aligned, states, concepts, layer))
        store.mark_done(folder, "features", context.features_key(cell, layer, seed), {}, files)


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
            scripts = _position_scripts(context, blocks, vocabulary).reshape(-1)
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


def _position_scripts(context: Context, blocks: TokenBlocks, vocabulary: Vocabulary) -> NDArray[np.uint8]:
    """uint8 [B, T]: language of the merged character span at each position, by its script; the same for every setup."""
    cache: dict[str, NDArray[np.uint8]] = context.__dict__.setdefault("_scripts", {})
    if "test" not in cache:
        mapping = script_languages(context.token_info.languages)
        result = np.full(blocks.tokens.shape, NEUTRAL, np.uint8)
        for b, row in enumerate(np.asarray(blocks.tokens).tolist()):
            for span in merge_spans([vocabulary.piece[t] for t in row]):
                result[b, span.start : span.end] = script_language(span.text, mapping)
        cache["test"] = result
    return cache["test"]


def _exposure(context: Context, collected: Collected, neutral: NDArray[np.bool_]) -> list[int]:
    """Positions of each language that can count, by the same rule as a feature's: shares are rates of these."""
    if context.study.features.rule != "script":
        return collected.token_counts[~neutral].sum(axis=0).tolist()
    blocks = context.blocks("test")
    tokens, language = np.asarray(blocks.tokens), np.asarray(blocks.language)
    counted = position_mask(tokens, language, context.token_info.special_ids) & ~neutral[tokens]
    scripts = _position_scripts(context, blocks, context.vocabulary)[counted]
    g = len(context.token_info.languages)
    return np.bincount(scripts[scripts < g], minlength=g).tolist()


# ---- quality


def _quality(
    context: Context, setup: Collecting, collected: Collected, neutral: NDArray[np.bool_], aligned: dict[str, AlignedTokens],
    states: dict[str, dict[int, NDArray[np.float32]]], concepts: dict[int, ConceptMeans], layer: int,
) -> dict[str, Any]:  # fmt: skip
    info, quality = context.token_info, setup.quality.result()
    seed = seed_for(context.study, "alignment") % 2**32
    record: dict[str, Any] = {
        "fvu": quality.fvu, "cosine": quality.cosine, "l0": quality.l0, "loss": quality.loss,
        "n_positions": quality.n_positions,
        "exposure": _exposure(context, collected, neutral),
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
