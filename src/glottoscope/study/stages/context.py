"""What every stage needs of a study: its models, its keys, its language models, its token blocks.

A key is a hash over everything that decides an artefact's bytes: settings, the seed, the keys of what it is made from
and a version number per stage that is raised when its code changes what it writes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.study.config import PlantedCorpus, PretrainModel, Shape, Study, TextCorpus
from glottoscope.study.load import corpus_path
from glottoscope.study.plan import Cell, CheckpointRef, ModelRun, Room, cells_of, expand, groups_of, seed_for
from glottoscope.study.store import RunStore, digest, file_digest, read_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedModel

    from glottoscope.corpus.planted import PlantedWorld
    from glottoscope.corpus.tokens import TokenBlocks
    from glottoscope.lm.checkpoints import Checkpoint
    from glottoscope.lm.hub import Downloads, What

# Raised when a stage's code changes what it writes: artefacts of older code are then made again.
WORLD_VERSION = 1  # of the planted world: its grammar, words and draws
VERSIONS = {"tokenizer": 1, "pretrain": 1, "tokens": 1, "train": 2, "features": 3, "rulers": 2, "score": 2, "report": 1}


@dataclass(frozen=True)
class TokenInfo:
    """What the token store says about itself (tokens/info.json)."""

    languages: tuple[str, ...]
    vocab_size: int
    bos_id: int | None
    pad_id: int
    special_ids: tuple[int, ...]
    block_length: int
    counted: dict[str, dict[str, int]]  # split -> language -> counted tokens
    documents: dict[str, dict[str, int]]  # split -> language -> documents
    aligned: dict[str, dict[str, int]]  # "dev" | "test" -> pairs, articles, truncated
    notes: tuple[str, ...] = ()


class Vocabulary(NamedTuple):
    """Per token id: display and counts of the train split, and the planted truth where there is one."""

    text: list[str]
    piece: list[bytes]
    has_letters: NDArray[np.bool_]
    counts: NDArray[np.int64]  # [V, G]
    concept: NDArray[np.int32] | None


class Context:
    """A study and its run directory, opened by the driver and by every worker alike."""

    def __init__(self, study: Study, store: RunStore, *, recorded: bool = False) -> None:
        self.study = study
        self.store = store
        # Hashes of the corpus and sizes of models as the driver recorded them: workers need not read or fetch them again,
        # and a run that was moved away from its corpus can still be looked at.
        self.recorded = recorded

    @classmethod
    def open(cls, root: str | Path) -> Context:
        """Open a run as its workers, its status and its report see it."""
        store = RunStore(Path(root))
        return cls(store.study(), store, recorded=True)

    # ---- models

    @cached_property
    def runs(self) -> tuple[ModelRun, ...]:
        """Models of the study, with the size of those that only their checkpoints tell read from them."""
        return tuple(self._sized(run) for run in expand(self.study))

    def _sized(self, run: ModelRun) -> ModelRun:
        # What config.json alone says is enough to plan; n_params of the tables is counted.
        if isinstance(run.spec, PretrainModel) or run.spec.shape is not None:
            return run
        from glottoscope.study.plan import _layers

        shape = self._told_shape(run.final)
        return replace(run, shape=shape, layers=_layers(run.spec.layers or self.study.layers, shape.n_layers, run.name))

    def _told_shape(self, ref: CheckpointRef) -> Shape:
        """The size that a checkpoint's config.json tells; asked once, since it may lie on a hub."""
        name = _name_of(ref)
        if name not in self._shapes:
            from glottoscope.lm.checkpoints import Checkpoint, describe

            assert ref.path is not None
            with self.at_hand(Checkpoint(ref.path, ref.step, ref.tokens_seen, ref.revision), "config") as checkpoint:
                found = describe(checkpoint)
            self._shapes[name] = Shape(
                n_layers=found.n_layers, d_model=found.d_model, n_params=found.n_params, vocab_size=found.vocab_size
            )
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        known = self.store.recorded_shapes() if self.recorded else {}
        return {name: Shape.model_validate(shape) for name, shape in known.items()}

    def record_shapes(self) -> None:
        """Keep the sizes that only checkpoints tell, for workers and for all who look at the run."""
        # Asking for the models has filled it.
        if self.runs and self._shapes:
            self.store.record_shapes({name: shape.model_dump() for name, shape in self._shapes.items()})

    def run_of(self, name: str) -> ModelRun:
        return next(r for r in self.runs if r.name == name)

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.runs)

    def cell_of(self, model: str, step: int) -> Cell:
        run = self.run_of(model)
        return Cell(run, next(c for c in run.checkpoints if c.step == step))

    def groups(self, run: ModelRun, memory: float | Room) -> list[tuple[int, ...]]:
        return groups_of(self.study, run, memory)

    def lm_checkpoint(self, run: ModelRun, ref: CheckpointRef) -> Any:
        """Where the weights of a checkpoint lie, as the lm room wants it."""
        from glottoscope.lm.checkpoints import Checkpoint

        if ref.path is None:
            return Checkpoint(str(self.store.checkpoint_dir(run.lm, ref.step)), ref.step, ref.tokens_seen)
        return Checkpoint(ref.path, ref.step, ref.tokens_seen, ref.revision)

    def load_lm(self, cell: Cell) -> PreTrainedModel:
        from glottoscope.lm.checkpoints import choose_device, load_lm, shuffle_weights

        compute = self.study.compute
        place = self.lm_checkpoint(cell.model, cell.checkpoint)
        goes = not place.is_local and self.downloads is not None and self.downloads.remove
        with self.at_hand(place) as checkpoint:
            model = load_lm(checkpoint, device=choose_device(compute.device), dtype=compute.dtype, files_stay=not goes)
        if cell.model.control == "shuffled":
            shuffle_weights(model, seed_for(self.study, "shuffle", cell.model.lm))
        return model

    @cached_property
    def downloads(self) -> Downloads | None:
        """Where hub checkpoints are fetched to; None: huggingface_hub's own cache keeps them."""
        from glottoscope.lm.hub import Downloads, FolderHub, PublicHub

        compute = self.study.compute
        if compute.hub is None and compute.disk_gb is None and not compute.remove_downloads:
            return None
        hub = PublicHub() if compute.hub is None else FolderHub(compute.hub)
        budget = None if compute.disk_gb is None else compute.disk_gb * 1e9
        return Downloads(self.store.downloads_dir, hub, budget=budget, remove=compute.remove_downloads)

    @contextlib.contextmanager
    def at_hand(self, checkpoint: Checkpoint, what: What = "model") -> Iterator[Checkpoint]:
        """The checkpoint on this machine's disk for the length of the block; what comes from a hub may be gone after it."""
        if checkpoint.is_local or self.downloads is None:
            yield checkpoint
            return
        with self.downloads.held(checkpoint.path, checkpoint.revision, what) as folder:
            yield replace(checkpoint, path=str(folder), revision=None)

    def device(self) -> torch.device:
        import torch

        from glottoscope.lm.checkpoints import choose_device

        return torch.device(choose_device(self.study.compute.device))

    # ---- corpus

    def world(self, negative: bool = False, spec: PretrainModel | None = None) -> PlantedWorld:
        from glottoscope.corpus.planted import PlantedWorld

        corpus = self.study.corpus
        assert isinstance(corpus, PlantedCorpus)
        mixture = {}
        if spec is not None:
            mixture = {
                "parallel_share": spec.mixture.parallel_share,
                "switched_share": 0.0 if spec.control == "no_switching" else spec.mixture.switched_share,
                "switch_probability": spec.mixture.switch_probability,
            }
        return PlantedWorld(
            corpus.seed, negative=negative, shared_tokens=corpus.shared_tokens, context_length=corpus.context_length,
            **mixture,
        )  # fmt: skip

    @cached_property
    def token_info(self) -> TokenInfo:
        path = self.store.tokens_dir / "info.json"
        if not path.exists():
            raise InputError(f"{path} is not there: the tokens stage has not run; `glottoscope run` continues the study")
        raw = json.loads(path.read_text(encoding="utf-8"))
        for name in ("languages", "special_ids", "notes"):
            raw[name] = tuple(raw[name])
        return TokenInfo(**raw)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        table = read_parquet(self.store.tokens_dir / "vocabulary.parquet")
        counts = np.stack([table[f"count_{x}"].to_numpy() for x in self.token_info.languages], axis=1)
        concept = table["concept"].to_numpy().astype(np.int32) if "concept" in table.column_names else None
        return Vocabulary(table["text"].to_pylist(), table["bytes"].to_pylist(), table["has_letters"].to_numpy(), counts, concept)

    def neutral(self) -> NDArray[np.bool_]:
        """bool [V]: tokens that are evidence for no language, from the train split."""
        from glottoscope.features.language import neutral_tokens

        vocabulary, features = self.vocabulary, self.study.features
        return neutral_tokens(
            vocabulary.has_letters, vocabulary.counts, vocabulary.counts.sum(axis=0),
            features.neutral_ratio, features.neutral_min_count,
        )  # fmt: skip

    def blocks(self, split: str) -> TokenBlocks:
        from glottoscope.corpus.tokens import read_blocks

        return read_blocks(self.store.tokens_dir, split)

    # ---- keys

    @cached_property
    def source_hashes(self) -> dict[str, str]:
        """SHA-256 of every file of the corpus, by its path in the study."""
        corpus = self.study.corpus
        if not isinstance(corpus, TextCorpus):
            return {}
        aligned = corpus.aligned
        paths = [s.path for s in corpus.sources]
        paths += [p for p in (aligned.train, aligned.dev, aligned.test) if p] if aligned else []
        recorded = self.store.recorded_sources() if self.recorded else {}
        return {p: recorded.get(str(corpus_path(corpus, p))) or _hash_tree(corpus_path(corpus, p)) for p in paths}

    def _document_hashes(self) -> dict[str, str]:
        corpus = self.study.corpus
        return {s.path: self.source_hashes[s.path] for s in corpus.sources} if isinstance(corpus, TextCorpus) else {}

    @cached_property
    def tokenizer_key(self) -> str:
        corpus = self.study.corpus
        if isinstance(corpus, PlantedCorpus):
            return digest("tokenizer", VERSIONS["tokenizer"], "planted", WORLD_VERSION, corpus.shared_tokens)
        if corpus.tokenizer_training is not None:
            return digest(
                "tokenizer", VERSIONS["tokenizer"], self._document_hashes(), corpus.languages, corpus.split, corpus.split_seed,
                corpus.tokenizer_training.model_dump(), [s.model_dump() for s in corpus.sources],
            )  # fmt: skip
        from glottoscope.study.stages.tokenizing import tokenizer_source

        path, revision = tokenizer_source(self)
        content = _hash_tree(Path(path), TOKENIZER_FILES) if Path(path).exists() else [path, revision]
        return digest("tokenizer", VERSIONS["tokenizer"], content)

    @property
    def pass_settings(self) -> dict[str, Any]:
        """What of the machine's settings can change the last bits of a language model pass."""
        return self.study.compute.model_dump(mode="json", include={"threads", "device", "dtype", "lm_batch"})

    @cached_property
    def stream_key(self) -> str:
        """Key of what the SAEs learn from: neither the test split nor the aligned sentences can make them stale."""
        apart = {"root", "aligned", "test_tokens", "test_documents", "aligned_pairs"}
        corpus = self.study.corpus.model_dump(mode="json", exclude=apart)
        return digest("stream", VERSIONS["tokens"], corpus, self._document_hashes(), self.tokenizer_key, self.study.study.seed)

    @cached_property
    def tokens_key(self) -> str:
        corpus = self.study.corpus.model_dump(mode="json", exclude={"root"})
        return digest("tokens", VERSIONS["tokens"], corpus, self.source_hashes, self.tokenizer_key, self.study.study.seed)

    def pretrain_key(self, run: ModelRun) -> str:
        """Key of a model trained here; its checkpoints share it, so that more of them can be asked for later."""
        assert isinstance(run.spec, PretrainModel)
        spec = run.spec.model_dump(mode="json", exclude={"name", "family", "checkpoints", "seeds", "layers"})
        return digest(
            "pretrain", VERSIONS["pretrain"], spec, run.lm_seed, self.study.study.seed, self.study.compute.threads,
            self.study.compute.device, self.corpus_key,
        )  # fmt: skip

    @cached_property
    def corpus_key(self) -> str:
        """Key of what a model trained here reads."""
        corpus = self.study.corpus
        if isinstance(corpus, PlantedCorpus):
            return digest(WORLD_VERSION, corpus.seed, corpus.context_length, corpus.shared_tokens)
        aligned = corpus.aligned.train if corpus.aligned else None
        sources = [(s.model_dump(), self.source_hashes[s.path]) for s in corpus.sources]
        return digest(
            sources, corpus.languages, corpus.context_length, corpus.split, corpus.split_seed, self.tokenizer_key,
            self.source_hashes.get(aligned) if aligned else None,
            corpus.aligned.model_dump(exclude={"dev", "test", "max_length"}) if corpus.aligned else None,
        )  # fmt: skip

    def lm_key(self, cell: Cell) -> str:
        run = cell.model
        if cell.checkpoint.path is None:
            base = digest(self.pretrain_key(run), cell.checkpoint.step)
        else:
            base = self._fingerprint(run, cell.checkpoint)
        shuffle = seed_for(self.study, "shuffle", run.lm) if run.control == "shuffled" else None
        return digest(base, shuffle)

    def _fingerprint(self, run: ModelRun, ref: CheckpointRef) -> str:
        cache: dict[CheckpointRef, str] = self.__dict__.setdefault("_fingerprints", {})
        if ref not in cache:
            from glottoscope.lm.checkpoints import fingerprint

            cache[ref] = fingerprint(self.lm_checkpoint(run, ref))
        return cache[ref]

    def train_key(self, cell: Cell, layer: int, seed: int) -> str:
        study = self.study
        sae = study.sae.model_dump(mode="json", exclude={"seeds", "lr_choice"})
        # One seed chooses the learning rate, so that more seeds, or more checkpoints before the last, change nothing.
        first = min(study.sae.seeds)
        chooser = None
        if len(study.sae.lr) > 1 and not (self.chooses_lr(cell) and seed == first):
            chooser = self.train_key(cell if self.chooses_lr(cell) else self.chooser_of(cell), layer, first)
        return digest(
            "train", VERSIONS["train"], self.lm_key(cell), self.stream_key, sae, self.pass_settings, layer, seed, chooser,
            cell.model.control == "frozen_decoder", study.study.seed,
        )  # fmt: skip

    def chooses_lr(self, cell: Cell) -> bool:
        """Whether this cell tries the whole grid of learning rates (METHOD 4: once per model x layer, at the last)."""
        if len(self.study.sae.lr) == 1 or self.study.sae.lr_choice == "setup":
            return True
        return cell.checkpoint == cell.model.final and cell.model.control != "frozen_decoder"

    def chooser_of(self, cell: Cell) -> Cell:
        """The cell that chose the learning rates for this one."""
        run = self.run_of(cell.model.lm) if cell.model.control == "frozen_decoder" else cell.model
        return Cell(run, run.final)

    def features_key(self, cell: Cell, layer: int, seed: int) -> str:
        features = self.study.features.model_dump(
            mode="json",
            include={
                "rule", "threshold", "neutral_ratio", "neutral_min_count", "top_examples", "language_examples",
                "example_window",
                "example_features", "phi_firing", "lm_loss_tokens",
            },
        )  # fmt: skip
        # dev pairs are looked at for the final checkpoint only.
        final = "dev" in self._aligned_sets() and cell.checkpoint == cell.model.final
        return digest("features", VERSIONS["features"], self.train_key(cell, layer, seed), self.tokens_key, final, features)

    def _aligned_sets(self) -> tuple[str, ...]:
        corpus = self.study.corpus
        if isinstance(corpus, TextCorpus):
            return tuple(x for x in ("dev", "test") if corpus.aligned is not None and getattr(corpus.aligned, x) is not None)
        return ("dev", "test")

    def ruler_run(self, run: ModelRun) -> ModelRun:
        """The model whose final checkpoint is the ruler of monosemanticity for `run`."""
        return self.run_of(run.lm)

    def rulers_key(self, run: ModelRun) -> str:
        final = Cell(run, run.final)
        features = self.study.features.model_dump(
            mode="json",
            include={"theta", "theta_percentile", "cluster_tokens", "neutral_ratio", "neutral_min_count"},
        )  # fmt: skip
        return digest("rulers", VERSIONS["rulers"], self.lm_key(final), self.tokens_key, self.pass_settings, features,
                      self.study.study.seed)  # fmt: skip

    def score_key(self, cell: Cell, layer: int, seed: int) -> str:
        features = self.study.features.model_dump(mode="json")
        labels = [_hash_tree(Path(p)) for p in self.study.features.labels]
        ruler = self.rulers_key(self.ruler_run(cell.model))
        family = [cell.model.family, cell.checkpoint.tokens_seen, cell.checkpoint.learning_rate]
        return digest(
            "score", VERSIONS["score"], self.features_key(cell, layer, seed), ruler, features, labels, family,
        )  # fmt: skip

    def missing_seeds(self, stage: Literal["train", "features"], cell: Cell, layer: int) -> list[int]:
        """SAE seeds of a layer of a cell for which `stage` is not complete with the study's settings."""
        key = {"train": self.train_key, "features": self.features_key}[stage]
        model, step = cell.model.name, cell.checkpoint.step
        return [
            seed
            for seed in self.study.sae.seeds
            if not self.store.is_done(self.store.setup_dir(model, step, layer, seed), stage, key(cell, layer, seed))
        ]

    def setups(self, cell: Cell) -> Iterator[tuple[int, int]]:
        """(layer, SAE seed) of a cell, in order."""
        for layer in cell.model.known_layers():
            for seed in self.study.sae.seeds:
                yield layer, seed


def hidden_states(
    model: PreTrainedModel, tokens_BT: NDArray[Any], attention_BT: NDArray[np.bool_], layers: Sequence[int], cell: Cell,
) -> dict[int, torch.Tensor]:  # fmt: skip
    """Hidden states of the wanted layers for one batch, checked: layer -> float32 [B, T, D] on the model's device.

    Raises:
        NonFiniteError: NaN or Inf at an attended position; names the cell and the layer.
    """
    return _hidden_states(model, tokens_BT, attention_BT, layers, cell, finish=False)[0]


def hidden_states_and_last(
    model: PreTrainedModel, tokens_BT: NDArray[Any], attention_BT: NDArray[np.bool_], layers: Sequence[int], cell: Cell,
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:  # fmt: skip
    """As `hidden_states`, and the state [B, T, D] after the final norm, in the model's dtype, from the same pass."""
    states, last = _hidden_states(model, tokens_BT, attention_BT, layers, cell, finish=True)
    assert last is not None
    return states, last


def _hidden_states(
    model: PreTrainedModel, tokens_BT: NDArray[Any], attention_BT: NDArray[np.bool_], layers: Sequence[int], cell: Cell,
    *, finish: bool,
) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:  # fmt: skip
    import torch

    from glottoscope.lm.capture import capture, capture_and_finish

    device = next(model.parameters()).device
    ids = torch.from_numpy(np.ascontiguousarray(tokens_BT).astype(np.int64)).to(device)
    attention = torch.from_numpy(np.ascontiguousarray(attention_BT)).to(device)
    last = None
    if finish:
        states, last = capture_and_finish(model, ids, attention.long(), layers)
    else:
        states = capture(model, ids, attention.long(), layers)
    result = {}
    for layer, x_BTD in states.items():
        x_BTD = x_BTD.float()
        # A sum is finite only where every term is; the exact test, which leaves padding out, runs only where it is not.
        if not bool(torch.isfinite(x_BTD.sum())) and not bool(x_BTD[attention].isfinite().all()):
            raise NonFiniteError(
                f"cell {cell.name}, layer {layer}: NaN or Inf in the hidden states: the checkpoint is damaged or "
                "overflows in this dtype (compute.dtype)"
            )
        result[layer] = x_BTD
    return result, last


class Batch(NamedTuple):
    """A few blocks, cut to the longest of them."""

    rows: NDArray[np.int64]  # [B] block numbers
    tokens: NDArray[np.uint32]  # [B, T]
    language: NDArray[np.uint8]  # [B, T]; PADDING where padded


BUCKET = 16  # batches whose blocks are sorted by length together


def bucketed(blocks: TokenBlocks, order: NDArray[np.int64], size: int) -> Iterator[Batch]:
    """The blocks in batches of `size`, nearly in `order`: within some batches' worth, blocks of like length share one, so
    that little of it is padding. The order of blocks changes no state."""
    from glottoscope.corpus.tokens import PADDING

    for window in batches(order, size * BUCKET):
        tokens, language = np.asarray(blocks.tokens[window]), np.asarray(blocks.language[window])
        # Padding is on the right: a block's length is where its last real position ends.
        width = language.shape[1]
        length = width - (language[:, ::-1] != PADDING).argmax(axis=1)
        length[(language == PADDING).all(axis=1)] = 1
        for rows in batches(np.argsort(length, kind="stable"), size):
            longest = int(length[rows].max())
            yield Batch(window[rows], tokens[rows, :longest], language[rows, :longest])


def batches(order: NDArray[np.int64], size: int) -> Iterable[NDArray[np.int64]]:
    """Consecutive runs of `size` rows."""
    return (order[i : i + size] for i in range(0, len(order), size))


def key_columns(context: Context, cell: Cell, layer: int, seed: int) -> dict[str, Any]:
    """The key columns of every table, for one setup."""
    run = cell.model
    assert run.shape is not None
    return {
        "control": run.control, "family": run.family, "model": run.name, "d_model": run.shape.d_model,
        "n_params": run.shape.n_params, "step": cell.checkpoint.step, "tokens_seen": cell.checkpoint.tokens_seen,
        "layer": layer, "lm_seed": run.lm_seed, "sae_seed": seed,
    }  # fmt: skip


KEY_COLUMNS = (
    "control", "family", "model", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed", "sae_seed",
)  # fmt: skip


def with_key(table: pa.Table, key: dict[str, Any]) -> pa.Table:
    """The table with the key columns in front, the same in every row."""
    import pyarrow as pa

    n = table.num_rows
    types = {k: pa.string() if isinstance(v, str) else pa.int64() for k, v in key.items()}
    arrays = [pa.array([v] * n, types[k]) for k, v in key.items()]
    return pa.table([*arrays, *table.columns], names=[*key, *table.column_names])


def _name_of(ref: CheckpointRef) -> str:
    assert ref.path is not None
    return ref.path if ref.revision is None else f"{ref.path}@{ref.revision}"


TOKENIZER_FILES = (".json", ".model", ".txt", ".jinja")  # what a tokenizer is read from, beside a model's weights


def _hash_tree(path: Path, suffixes: tuple[str, ...] | None = None) -> str:
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and (suffixes is None or p.suffix in suffixes)]
        return digest([(str(p.relative_to(path)), file_digest(p)) for p in files])
    matches = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    if not matches:
        raise InputError(f"{path}: no such file, folder or glob")
    return digest([(p.name, file_digest(p)) for p in matches if p.is_file()])
