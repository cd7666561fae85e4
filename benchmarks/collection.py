"""Seconds per 1 M tokens from sparse codes to the feature table and the examples of one setup; no model runs.

    python benchmarks/collection.py
    python benchmarks/collection.py --tokens 200000 --n 8192

The codes are synthetic: feature densities and tokens follow Zipf's law, half of a token's features are its own (and fire
stronger and more evenly there), activations are log-normal, blocks are of two languages. They come in chunks of 16
blocks of 1,024 positions, as the study feeds them; making them is not timed. The last line of the table is the
straightforward way on a slice of the same codes, a Python loop over positions and features, extrapolated to 1 M tokens.
Prints Markdown, then one line of JSON. numpy's own threads are those of the environment (OPENBLAS_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Section, peak_memory, reset_peak
from numpy.typing import NDArray

from glottoscope.features.bilingual import (
    firing_threshold,
    is_bilingual,
    length_strata,
    merge_firings,
    permute_sentences,
    phi,
    phi_null_exact,
    sentence_firings,
    shift_to_next_sentence,
)
from glottoscope.features.clustering import Clustering, row_labels, unit_rows
from glottoscope.features.coherence import coherence
from glottoscope.features.collect import FeatureCollector, group_counts, restrict, token_histogram, tokens_of, top_examples
from glottoscope.features.evolution import evolution_row
from glottoscope.features.language import classify, count_languages, document_languages
from glottoscope.features.monosemanticity import monosemanticity
from glottoscope.sae.quality import QualityAccumulator

BLOCK = 1024
BATCH = 16  # blocks of a chunk
LANGUAGES = ("en", "ja")
OWN = 0.5  # share of a token's features that are its own
PAIRS, SENTENCE = 1000, 30
MB = 2**20


@dataclass(frozen=True)
class Options:
    """What is measured: sizes of the codes, the states' width, examples per feature, share of tokens in the loop."""

    tokens: int = 1_000_000
    k: int = 32
    n: int = 32_768
    vocab: int = 50_000
    examples: int = 50
    d: int = 768
    slice: float = 0.01
    threads: int = 1
    seed: int = 0


class Chunk(NamedTuple):
    """Codes of M positions."""

    values: NDArray[np.float32]  # [M, K]
    indices: NDArray[np.int64]  # [M, K], distinct in a row
    position: NDArray[np.int64]  # [M]
    token: NDArray[np.int64]  # [M]
    language: NDArray[np.uint8]  # [M]


class Codes:
    """Synthetic sparse codes. Slot j of a position draws from the features j, K + j, 2 K + j ...: never one twice."""

    def __init__(self, options: Options) -> None:
        self.options, self.rng = options, np.random.default_rng(options.seed)
        rng, self.per_slot = self.rng, options.n // options.k
        self.feature_cumulative = np.cumsum(_zipf(self.per_slot, 1.1))
        self.token_cumulative = np.cumsum(_zipf(options.vocab, 1.0))
        own = np.searchsorted(self.feature_cumulative, rng.random((options.vocab, options.k)) * self.feature_cumulative[-1])
        self.own_VK = own.astype(np.int32)
        self.scale_N = rng.lognormal(0.0, 0.5, options.n).astype(np.float32)
        # Each language has its own half of the vocabulary, but for one token in ten.
        self.token_of = np.stack([rng.permutation(options.vocab) for _ in LANGUAGES])
        shared = rng.random(options.vocab) < 0.1
        self.token_of[1, shared] = self.token_of[0, shared]
        self.neutral_V = rng.random(options.vocab) < 0.05

    def chunks(self) -> Iterator[Chunk]:
        """All chunks of the test split."""
        n_blocks = -(-self.options.tokens // BLOCK)
        for first in range(0, n_blocks, BATCH):
            blocks = np.arange(first, min(first + BATCH, n_blocks))
            position = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)[: self.options.tokens - first * BLOCK]
            language = (position // BLOCK % 2).astype(np.uint8)
            yield self.codes(position, language)

    def codes(self, position: NDArray[np.int64], language: NDArray[np.uint8]) -> Chunk:
        """Codes at some positions of some languages."""
        rng, m, k = self.rng, len(position), self.options.k
        rank = np.searchsorted(self.token_cumulative, rng.random(m) * self.token_cumulative[-1])
        token = self.token_of[language, rank]
        is_own = rng.random((m, k), np.float32) < OWN
        other = np.searchsorted(self.feature_cumulative, rng.random((m, k), np.float32) * self.feature_cumulative[-1])
        slot = np.where(is_own, self.own_VK[token], np.minimum(other, self.per_slot - 1))
        indices = slot.astype(np.int64) * k + np.arange(k)
        noise = rng.standard_normal((m, k), np.float32) * np.where(is_own, np.float32(0.15), np.float32(0.35))
        values = self.scale_N[indices] * np.exp(noise + np.where(is_own, np.float32(1.0), np.float32(0.0)))
        return Chunk(values, indices, position, token, language)


def _zipf(n: int, exponent: float) -> NDArray[np.float64]:
    return np.arange(1, n + 1, dtype=np.float64) ** -exponent


class Clock:
    """Seconds by the name of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def measure(options: Options) -> dict[str, Any]:
    """Time every step on the same codes; the record of the section."""
    torch.set_num_threads(options.threads)
    codes, clock = Codes(options), Clock()
    reset_peak()
    before = peak_memory()
    n, g = options.n, len(LANGUAGES)

    collector = FeatureCollector(n, g, options.vocab)
    kept: list[Chunk] = []
    for chunk in codes.chunks():
        clock("FeatureCollector.update", collector.update, chunk.values, chunk.indices, chunk.position, chunk.token, chunk.language)
        if sum(len(c.token) for c in kept) < options.slice * options.tokens:
            kept.append(chunk)
    collected = clock("finish", collector.finish)
    histogram = clock("token_histogram", token_histogram, collected)
    clock(f"top_examples ({options.examples} a feature)", top_examples, collected, options.examples, BLOCK)

    def languages(maxima: NDArray[np.float32] | None = None) -> Any:
        part = collected if maxima is None else restrict(collected, maxima)
        return count_languages(part.feature, document_languages(part, codes.neutral_V), n, g)

    counts = clock("count_languages", languages)
    stricter = [collected.max_activation * np.float32(t / collected.threshold) for t in (0.8, 0.9)]
    clock("count_languages at two stricter thresholds", lambda: [languages(m) for m in stricter])
    exposure = collected.token_counts[~codes.neutral_V].sum(axis=0)
    found = clock("language table", lambda: classify(counts[0], counts[1], exposure, collected.alive, LANGUAGES))

    tokens = clock("tokens of the histogram", tokens_of, histogram)
    clustering = global_clustering(options, codes.rng)
    mono = clock(
        "entropies, R_mono (one global clustering)",
        lambda: monosemanticity(tokens, row_labels(clustering, tokens, n)[0], n),
    )

    def coherences() -> Any:
        labels, _ = row_labels(clustering, tokens, n)
        return coherence(group_counts(tokens.feature, labels, tokens.count), n), coherence(tokens, n)

    clusters, words = clock("coherence of clusters and of tokens", coherences)
    flag, null = translation_pairs(codes, clock, collected.max_activation, found.language)
    table = {
        "alive": collected.alive, "language": found.language, "single_token": mono.single_token, "monosemanticity": mono.r,
        "monosemanticity_hidden": mono.r, "h_token": mono.h_token, "h_semantic": mono.h_semantic, "bilingual": flag,
        "bilingual_paper": flag, "supportable": np.isfinite(null), "coherence": clusters.value, "coherence_token": words.value,
    }  # fmt: skip
    clock("bootstrap of the measures (1,000 draws)", lambda: evolution_row(table, LANGUAGES, n_boot=1000, seed=0))
    quality(options, clock)
    peak = (peak_memory() - before) / MB

    fixed = ("phi and its null", "firings", "bootstrap", "language table")
    scale = 1e6 / options.tokens
    seconds = {name: s * (1 if name.startswith(fixed) else scale) for name, s in clock.seconds.items()}
    total = sum(seconds.values())
    slice_tokens = sum(len(c.token) for c in kept)
    loop = python_loop(kept, options, codes.neutral_V) * 1e6 / slice_tokens
    collection = total - seconds["quality of the reconstruction"]
    return {
        "benchmark": "collection", "options": vars(options), "seconds_per_million_tokens": seconds, "total": total,
        "entries": len(collected.value), "entries_share": len(collected.value) / (options.tokens * options.k),
        "histogram_rows": len(histogram.count), "peak_memory_mb": peak, "loop_slice_tokens": slice_tokens,
        "loop_seconds_per_million_tokens_extrapolated": loop, "loop_ratio": loop / collection,
    }  # fmt: skip


def global_clustering(options: Options, rng: np.random.Generator) -> Clustering:
    """A clustering as a ruler holds it: about four tokens a cluster, each named by its smallest token."""
    cluster = rng.integers(0, max(1, options.vocab // 4), options.vocab)
    _, first, inverse = np.unique(cluster, return_index=True, return_inverse=True)
    labels = first[inverse]
    vectors = unit_rows(rng.standard_normal((options.vocab, 8)))
    return Clustering(vectors, np.ones(options.vocab, bool), 0.5, labels, len(first))


def translation_pairs(
    codes: Codes, clock: Clock, maxima: NDArray[np.float32], language: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Phi of every feature over aligned pairs with its null and two controls; 256 sentences a pass, as in the study."""
    threshold, rng = firing_threshold(maxima), codes.rng
    lengths = [rng.integers(SENTENCE // 2, SENTENCE * 3 // 2, PAIRS) for _ in LANGUAGES]
    sides = []
    for side, length in enumerate(lengths):
        parts = []
        for rows in np.array_split(np.argsort(length, kind="stable"), -(-PAIRS // 256)):
            sentence = np.repeat(rows, length[rows])
            chunk = codes.codes(np.zeros_like(sentence), np.full(len(sentence), side, np.uint8))
            counted = ~codes.neutral_V[chunk.token]
            parts.append(
                clock(
                    f"firings of {PAIRS:,} aligned pairs",
                    lambda c=chunk, s=sentence, m=counted: sentence_firings(
                        c.values, c.indices, s, threshold, m, n_sentences=PAIRS
                    ),
                )
            )
        sides.append(parts)
    article = np.arange(PAIRS) // 20

    def judged() -> tuple[Any, NDArray[np.float64]]:
        a, b = (merge_firings(parts) for parts in sides)
        found = phi(a, b)
        null = phi_null_exact(a, b, length_strata(lengths[0], lengths[1]))
        phi(a, permute_sentences(b, np.random.default_rng(0)))
        phi(a, shift_to_next_sentence(b, article))
        return found, null

    found, null = clock(f"phi and its null on {PAIRS:,} pairs", judged)
    return is_bilingual(language, found.phi, null, found.n_a, found.n_b), null


def quality(options: Options, clock: Clock) -> None:
    """Accumulate the reconstruction's quality over all positions; four chunks of states are used again and again."""
    generator = torch.Generator().manual_seed(options.seed)
    size = BATCH * BLOCK
    accumulator = QualityAccumulator(options.d, len(LANGUAGES))
    u = torch.nn.functional.normalize(torch.randn(size, options.d, generator=generator) + 0.5, dim=1)
    u_hat = u + 0.3 / math.sqrt(options.d) * torch.randn(size, options.d, generator=generator)
    l0 = torch.full((size,), options.k)
    language = torch.arange(size) // BLOCK % 2
    for first in range(0, options.tokens, size):
        m = min(size, options.tokens - first)
        clock("quality of the reconstruction", accumulator.update, u[:m], u_hat[:m], l0[:m], language[:m])
    clock("quality of the reconstruction", accumulator.result)


def python_loop(chunks: list[Chunk], options: Options, neutral: NDArray[np.bool_]) -> float:
    """Seconds of the straightforward way: a Python loop over positions and features, then over features.

    It finds what counts for the table (languages, entropies of tokens) and the examples; no clusters, phi or bootstrap.
    """
    start = time.perf_counter()
    of_feature: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
    for chunk in chunks:
        for values, indices, position, token, language in zip(*chunk, strict=True):
            for value, feature in zip(values, indices, strict=True):
                if value > 0:
                    of_feature[int(feature)].append((float(value), int(position), int(token), int(language)))
    for activations in of_feature.values():
        bound = 0.7 * max(a[0] for a in activations)
        strong = [a for a in activations if a[0] > bound]
        by_token = Counter(a[2] for a in strong)
        Counter(a[3] for a in strong if not neutral[a[2]])
        sum(-c / len(strong) * math.log(c / len(strong)) for c in by_token.values())
        best: dict[int, tuple[float, int, int, int]] = {}
        for a in strong:
            block = a[1] // BLOCK
            if block not in best or a[0] > best[block][0]:
                best[block] = a
        heapq.nlargest(options.examples, best.values())
    return time.perf_counter() - start


def run(options: Options) -> Section:
    """The section of the benchmarks' page."""
    record = measure(options)
    o, seconds = record["options"], record["seconds_per_million_tokens"]
    lines = [
        f"K = {o['k']}, n = {o['n']:,}, vocabulary {o['vocab']:,}, {o['tokens']:,} tokens in chunks of {BATCH} x {BLOCK:,} "
        f"positions, {o['threads']} thread(s); {record['entries']:,} activations above the threshold "
        f"({record['entries_share']:.0%}), {record['histogram_rows']:,} rows of the histogram.",
        "",
        "| step | s per 1 M tokens |",
        "|---|---|",
        *(f"| {name} | {s:.2f} |" for name, s in seconds.items()),
        f"| total | {record['total']:.2f} |",
        f"| Python loop over positions and features, extrapolated from {record['loop_slice_tokens']:,} tokens "
        f"| {record['loop_seconds_per_million_tokens_extrapolated']:.0f} |",
        "",
        f"Loop / total without the quality: {record['loop_ratio']:.0f} x (the loop leaves out clusters, coherence, phi and the "
        f"bootstrap). Peak memory above the imports: {record['peak_memory_mb']:.0f} MB.",
    ]
    return Section("Feature collection per 1 M tokens", "\n".join(lines), record)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, field in Options.__dataclass_fields__.items():
        parser.add_argument(f"--{name}", type=type(field.default), default=field.default)
    section = run(Options(**vars(parser.parse_args())))
    print(f"## {section.title}\n\n{section.markdown}\n\n{json.dumps(section.record)}")


if __name__ == "__main__":
    main()
