"""A run directory written by hand for the browser's tests: two checkpoints of one SAE on text that no corpus should hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file
from study_fixture import as_study, text_study

from glottoscope.atomic import write_json, write_table
from glottoscope.report.browser.site import Site
from glottoscope.study.browsing import gather
from glottoscope.study.store import RunStore

HOSTILE = (
    "<script>alert(1)</script>",
    "\u202ebidi\u2066",
    "\x00\x1b[2J",
    "a" * 10_000,
    "\ue000fake\ue001",
    "\n",
    '"\\\u2028</style>',
)
DOG = "犬"
# Token ids: specials, hostile tokens, words, and the three bytes of 犬 one by one.
PIECES = [b"<s>", b"</s>", *(x.encode() for x in HOSTILE), b" dog", b" runs", DOG.encode(), "が".encode(), b" caf\xc3", b"\xa9",
          *(bytes([x]) for x in DOG.encode()), "ＤＯＧ".encode()]  # fmt: skip
ID = {text: 2 + n for n, text in enumerate(HOSTILE)} | {" dog": 9, " runs": 10, DOG: 11, "が": 12, "caf": 13, "é": 14, "wide": 18}
BYTES = [15, 16, 17]
WIDTH = 16
N, ALIVE_FROM = 70, 2  # two shards; features 0 and 1 have the examples, 3 to 5 are dead
DEAD = (3, 4, 5)

DOCUMENT = "doc <b>\u202e"


def blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, language, document [3, WIDTH]: English, Japanese, and a block of both that is padded."""
    hostile = [ID[x] for x in HOSTILE]
    rows = [
        [0, ID[" dog"], ID[" runs"], *hostile, ID[" dog"], ID["caf"], ID["é"], ID[" runs"], ID[" dog"], ID[" runs"]],
        [0, ID[DOG], ID["が"], *BYTES, ID["が"], *BYTES, ID[DOG], ID["が"], ID[DOG], ID["wide"], ID["が"], ID[DOG]],
        [0, ID[" dog"], ID[" runs"], 0, ID[DOG], ID["が"], *BYTES, 1, 1, 1, 1, 1, 1, 1],
    ]
    language = np.zeros((3, WIDTH), np.uint8)
    language[1], language[2, 3:9], language[2, 9:] = 1, 1, 255
    document = np.zeros((3, WIDTH), np.uint32)
    document[1], document[2, 3:] = 1, 2
    return np.array(rows, np.uint32), language, document


EXAMPLES = [
    # feature, rank, language, block, position, value, {position: activation}
    (0, 0, "en", 0, 1, 0.8, {1: 0.8, 3: 0.004, 15: 0.4}),
    (0, 1, "ja", 1, 4, 0.6, {3: 0.6, 4: 0.6, 5: 0.5}),
    (0, 2, "en", 2, 1, 0.6, {1: 0.6}),
    (0, 3, "en", 0, 11, 0.2, {11: 0.2}),
    (1, 0, "en", 0, 6, 0.5, {5: 0.1, 6: 0.5}),
    (1, 1, "en", 0, 7, 0.3, {7: 0.3}),
    (69, 0, "ja", 1, 13, 1.5, {13: 1.5}),
]
HISTOGRAM = [(0, ID[" dog"], 0, 9), (0, ID[" runs"], 0, 9), (0, BYTES[0], 1, 4), (0, ID[DOG], 1, 7), (69, ID["wide"], 1, 2)]
PAIRS = [(0, 0, 1, [1], [0.8], [1, 2], [0.4, 0.6])]


def hand_made(root: Path, name: str = "hand <made>\u202e", steps: tuple[int, ...] = (0, 100)) -> RunStore:
    """Write the run; it is complete but for the measures that none of its tests asks for."""
    raw = text_study(root, corpus={"context_length": WIDTH})
    raw = {**raw, "study": {"name": "hand", "notes": name}, "sae": {**raw["sae"], "n": N}, "layers": [1]}
    raw["models"] = [{**raw["models"][0], "checkpoints": list(steps), "steps": max(1, *steps)}]
    store = RunStore(root)
    store.create(as_study(raw, root), {})
    _write_tokens(store)
    for step in steps:
        _write_setup(store, step)
    rows = [_row(step) for step in steps]
    write_table(store.table_path("evolution"), pa.Table.from_pylist(rows))
    return store


def site_of(store: RunStore) -> Site:
    return Site(gather(store))


def _write_tokens(store: RunStore) -> None:
    folder = store.tokens_dir
    store.aligned_dir.mkdir(parents=True)
    for name, array in zip(("tokens", "language", "document"), blocks(), strict=True):
        np.save(folder / f"test.{name}.npy", array)
    pairs = np.array([[[0, 9, 1], [0, 9, 10]], [[0, 11, 1], [0, 12, 11]]], np.uint32)
    np.save(store.aligned_dir / "test.tokens.npy", pairs)
    np.save(store.aligned_dir / "test.length.npy", np.array([[2, 3], [2, 3]], np.int32))
    write_table(folder / "documents.parquet", pa.table({
        "id": [DOCUMENT, "ja-1", "ja-2", "x"], "language": ["en", "ja", "ja", "en"], "split": ["test"] * 3 + ["train"],
        "row": [0, 1, 2, 0],
    }))  # fmt: skip
    write_table(folder / "vocabulary.parquet", pa.table({
        "token": np.arange(len(PIECES)), "bytes": pa.array(PIECES, pa.binary()),
        "text": [x.decode("utf-8", "replace") for x in PIECES], "has_letters": [True] * len(PIECES),
        "count_en": np.ones(len(PIECES), np.int64), "count_ja": np.ones(len(PIECES), np.int64),
    }))  # fmt: skip
    counts = {"en": 20, "ja": 20}
    write_json(folder / "info.json", {
        "languages": ["en", "ja"], "vocab_size": len(PIECES), "bos_id": 0, "pad_id": 1, "special_ids": [0, 1],
        "block_length": WIDTH, "counted": {"test": counts}, "documents": {"test": counts},
        "aligned": {"test": {"pairs": 2, "articles": 1, "truncated": 0}}, "notes": ["a note"],
    })  # fmt: skip


def _key(step: int) -> dict[str, Any]:
    return {
        "control": "none", "family": "f", "model": "m", "d_model": 8, "n_params": 1000, "step": step, "tokens_seen": 10 * step,
        "layer": 1, "lm_seed": 0, "sae_seed": 0,
    }  # fmt: skip


def classes() -> list[str]:
    return ["dead" if f in DEAD else ("mixed", "en", "ja")[f % 3] for f in range(N)]


def _row(step: int) -> dict[str, Any]:
    names = classes()
    counts = {f"count_{x}": names.count(x) for x in ("en", "ja", "mixed", "neutral", "unclassified", "dead")}
    shares = {"share_mixed": 0.123456, "share_mixed_low": 0.1, "share_mixed_high": 0.2, "fvu": 0.0123456}
    return {**_key(step), "n_features": N, "n_alive": N - len(DEAD), "n_bilingual": 1, **counts, **shares}


def _write_setup(store: RunStore, step: int) -> None:
    folder = store.setup_dir("m", step, 1, 0)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(step)
    alive = np.array([x != "dead" for x in classes()])
    maximum = np.where(alive, 1.0, 0.0).astype(np.float32)
    maximum[[0, 1, 69]] = (0.8, 0.5, 1.5)
    measure = np.where(np.arange(N) % 7 == 6, np.nan, rng.random(N).round(6))
    write_table(folder / "features.parquet", pa.table({
        **{name: [value] * N for name, value in _key(step).items()}, "feature": np.arange(N, dtype=np.int32), "alive": alive,
        "density": rng.random(N) / 1e4, "max_activation": maximum, "n_positions": rng.integers(0, 99, N), "language": classes(),
        "monosemanticity": pa.array(measure, from_pandas=True), "phi": pa.array(np.roll(measure, 3), from_pandas=True),
        "single_token": rng.random(N) < 0.5, "bilingual": pa.array([True, False, *([None] * (N - 2))], pa.bool_()),
        "granularity": pa.array([3, *([None] * (N - 1))], pa.int8()),
    }))  # fmt: skip
    _write_examples(folder / "examples.parquet")
    feature, token, language, count = (np.array(x) for x in zip(*HISTOGRAM, strict=True))
    write_table(folder / "histogram.parquet", pa.table({
        "feature": feature.astype(np.int32), "token": token.astype(np.int32), "language": language.astype(np.uint8),
        "count": count,
    }))  # fmt: skip
    write_table(folder / "activations.parquet", pa.table({
        "feature": np.array([0, 0, 0], np.int32), "language": np.array([0, 0, 1], np.uint8),
        "bin": np.array([20, 22, 21], np.int8), "count": [5, 7, 2],
    }))  # fmt: skip
    names = ("feature", "rank", "pair", "at_a", "level_a", "at_b", "level_b")
    kinds = (pa.int32(), pa.int32(), pa.int64(), *(pa.list_(pa.int32()), pa.list_(pa.float32())) * 2)
    columns = zip(names, kinds, zip(*PAIRS, strict=True), strict=True)
    write_table(folder / "pairs.parquet", pa.table({name: pa.array(list(values), kind) for name, kind, values in columns}))
    save_file({"W_dec": rng.standard_normal((N, 8)).astype(np.float32)}, folder / "sae.safetensors")
    for stage, files in (("train", ["sae.safetensors"]), ("features", ["examples.parquet"]), ("score", ["features.parquet"])):
        store.mark_done(folder, stage, "hand", {}, files)


def _write_examples(path: Path) -> None:
    feature, rank, language, block, position, value, on = zip(*EXAMPLES, strict=True)
    activations = np.zeros((len(EXAMPLES), WIDTH), np.float32)
    for n, active in enumerate(on):
        activations[n, list(active)] = list(active.values())
    write_table(path, pa.table({
        "feature": pa.array(feature, pa.int32()), "rank": pa.array(rank, pa.int32()), "document": ["d"] * len(rank),
        "language": list(language), "block": pa.array(block, pa.int64()), "position": pa.array(position, pa.int32()),
        "window_start": np.zeros(len(rank), np.int32), "value": pa.array(value, pa.float32()),
        "activations": pa.array(activations.tolist(), pa.list_(pa.float32())),
    }))  # fmt: skip
