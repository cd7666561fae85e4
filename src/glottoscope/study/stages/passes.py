"""The passes over text that the features stage makes: hidden states at counted positions, token means, the LM's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from glottoscope.atomic import atomic_path
from glottoscope.corpus.tokens import (
    TokenBlocks,
    attention_mask,
    position_mask,
)
from glottoscope.features.bilingual import (
    SentenceFirings,
)
from glottoscope.features.collect import FeatureCollector
from glottoscope.features.pairs import FiringPositions
from glottoscope.lm.layers import embedding_module
from glottoscope.lm.losses import check_head, loss_of_hidden
from glottoscope.sae.model import TopKSAE
from glottoscope.sae.quality import QualityAccumulator
from glottoscope.study.plan import Cell
from glottoscope.study.stages.context import Context, Vocabulary, bucketed, hidden_states, hidden_states_and_last

Setup = tuple[int, int]  # (layer, SAE seed)


class Codes(NamedTuple):
    """Sparse codes of some positions."""

    position: NDArray[np.int64]  # [M] block * T + t
    values: NDArray[np.float32]  # [M, K]
    indices: NDArray[np.int64]  # [M, K]


@dataclass
class Collecting:
    """Accumulators of one SAE during the pass over the test split."""

    sae: TopKSAE
    collector: FeatureCollector
    quality: QualityAccumulator
    firings: dict[tuple[str, int], list[SentenceFirings]] = field(default_factory=dict)
    # Of the aligned test sentences, by side: where features with examples fire. At most K entries of 16 bytes a counted
    # position; in truth the few that are above phi_firing x the feature's maximum, little more than `firings` holds.
    fired: tuple[list[FiringPositions], list[FiringPositions]] = field(default_factory=lambda: ([], []))
    codes: list[Codes] = field(default_factory=list)  # of the whole test split, where they are few


class Chunk(NamedTuple):
    """Counted positions of a few blocks."""

    states: dict[int, Tensor]  # layer -> [M, D]
    position: NDArray[np.int64]  # [M] block * T + t
    token: NDArray[np.int64]  # [M]
    language: NDArray[np.uint8]  # [M]


def positions(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], order: NDArray[np.int64],
    losses: LMLosses | None = None,
) -> Iterator[Chunk]:  # fmt: skip
    """Hidden states at the counted positions of the blocks; `losses` takes the model's loss from the same passes."""
    width = blocks.tokens.shape[1]
    for rows, tokens, language in bucketed(blocks, order, context.study.compute.lm_batch):
        mask = position_mask(tokens, language, context.token_info.special_ids)
        attention = attention_mask(language)
        if losses is not None and (wanted := losses.wants(rows)).any():
            states, last_BTD = hidden_states_and_last(lm, tokens, attention, layers, cell)
            losses.update(last_BTD, tokens, language, mask & wanted[:, None])
        else:
            states = hidden_states(lm, tokens, attention, layers, cell)
        kept = torch.from_numpy(np.flatnonzero(mask))
        position = (rows[:, None] * width + np.arange(tokens.shape[1]))[mask]
        yield Chunk(
            {x: s.flatten(0, 1).index_select(0, kept.to(s.device)) for x, s in states.items()},
            position, tokens[mask].astype(np.int64), language[mask],
        )  # fmt: skip


class LMLosses:
    """The language model's loss per language on the first test tokens, in nats per token.

    Raises:
        InputError: the model transforms its logits in a way that is not known here.
    """

    def __init__(self, context: Context, lm: Any, blocks: TokenBlocks) -> None:
        check_head(lm)
        self._lm, self._languages = lm, context.token_info.languages
        tokens, width = context.study.features.lm_loss_tokens, blocks.tokens.shape[1]
        self._n_blocks = max(len(self._languages), tokens // width)
        self._total = np.zeros(len(self._languages))
        self._counts = np.zeros(len(self._languages), np.int64)

    def wants(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the blocks are among the first."""
        return rows < self._n_blocks

    def update(self, last_BTD: Tensor, tokens: NDArray[Any], language: NDArray[np.uint8], counted: NDArray[np.bool_]) -> None:
        """Add blocks: the state after the final norm, and the target positions that count."""
        code = np.where(attention_mask(language), language, 0).astype(np.int64)
        ids, count, group = (torch.from_numpy(a).to(last_BTD.device) for a in (tokens.astype(np.int64), counted, code))
        nll, n = loss_of_hidden(self._lm, last_BTD, ids, count, group, len(self._languages))
        self._total, self._counts = self._total + nll, self._counts + n

    def result(self) -> dict[str, Any]:
        """lm_loss_<language>, None where no position of it was seen, and n_params."""
        means = (float(t / n) if n else None for t, n in zip(self._total, self._counts, strict=True))
        losses = {f"lm_loss_{x}": mean for x, mean in zip(self._languages, means, strict=True)}
        return {**losses, "n_params": int(sum(p.numel() for p in self._lm.parameters()))}


class TokenMeans:
    """Mean normalised hidden state of every token that occurs, per layer, and the input embeddings: the rulers' vectors.

    States are taken at norm 1, as the SAE sees them: a few positions of huge norm would otherwise be the mean.
    """

    def __init__(self, vocabulary: Vocabulary, layers: Sequence[int], lm: Any) -> None:
        self.embeddings = embedding_module(lm).weight.detach().float().cpu()[: len(vocabulary.text)].clone()
        self.layers = tuple(layers)
        self.sums: dict[int, Tensor] = {}
        self.counts = torch.zeros(len(vocabulary.text), dtype=torch.int64)

    def update(self, chunk: Chunk) -> None:
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
