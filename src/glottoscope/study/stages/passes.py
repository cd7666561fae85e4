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
from glottoscope.lm.layers import embedding_module
from glottoscope.sae.model import TopKSAE
from glottoscope.sae.quality import QualityAccumulator
from glottoscope.study.plan import Cell
from glottoscope.study.stages.context import Context, Vocabulary, batches, hidden_states

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
    codes: list[Codes] = field(default_factory=list)  # of the whole test split, where they are few


class Chunk(NamedTuple):
    """Counted positions of a few blocks."""

    states: dict[int, Tensor]  # layer -> [M, D]
    position: NDArray[np.int64]  # [M] block * T + t
    token: NDArray[np.int64]  # [M]
    language: NDArray[np.uint8]  # [M]


def positions(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], order: NDArray[np.int64]
) -> Iterator[Chunk]:
    width = blocks.tokens.shape[1]
    for rows in batches(order, context.study.compute.lm_batch):
        tokens, language = np.asarray(blocks.tokens[rows]), np.asarray(blocks.language[rows])
        mask = position_mask(tokens, language, context.token_info.special_ids)
        states = hidden_states(lm, tokens, attention_mask(language), layers, cell)
        kept = torch.from_numpy(np.flatnonzero(mask))
        position = (rows[:, None] * width + np.arange(width))[mask]
        yield Chunk(
            {x: s.flatten(0, 1).index_select(0, kept.to(s.device)) for x, s in states.items()},
            position, tokens[mask].astype(np.int64), language[mask],
        )  # fmt: skip


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


def lm_losses(context: Context, lm: Any, blocks: TokenBlocks) -> dict[str, Any]:
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
