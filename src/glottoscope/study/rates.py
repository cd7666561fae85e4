"""How fast this machine does the four things a study's time is made of: measured, stated or guessed.

    forward   one token through a language model's blocks (hidden states of all layers)
    pretrain  one token of a language model's training step
    sae       one position of an SAE's training step
    collect   one position of an SAE's features: encoded, counted, decoded

A measurement is seconds a token at one amount of work (FLOPs a token). Between two of them the seconds are
interpolated; beyond them they grow with the work. Pure: no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from glottoscope.study.config import Shape

Kind = Literal["forward", "pretrain", "sae", "collect"]
KINDS: tuple[Kind, ...] = ("forward", "pretrain", "sae", "collect")
# Share of the speed of a large matrix product that training reached when it was measured on a CPU: a rough figure.
EFFICIENCY = 0.4


class Point(NamedTuple):
    """One measurement."""

    work: float  # FLOPs a token
    seconds: float  # a token


@dataclass(frozen=True)
class Rates:
    """Seconds a token of every kind of work; kinds that were not measured follow `flops`."""

    flops: float  # FLOP/s of a large float32 product
    points: Mapping[Kind, Sequence[Point]] = field(default_factory=dict)
    words: str = "as stated"

    @property
    def is_measured(self) -> bool:
        return bool(self.points)

    def unmeasured(self, kinds: Iterable[Kind]) -> list[Kind]:
        """Which of these kinds follow `flops`."""
        return [kind for kind in kinds if not self.points.get(kind)]

    def seconds(self, kind: Kind, work: float) -> float:
        """Seconds a token that takes `work` FLOPs."""
        points = sorted(self.points.get(kind, ()))
        if not points:
            return work / (self.flops * EFFICIENCY)
        if work <= points[0].work:
            return _below(points, work)
        for low, high in itertools.pairwise(points):
            if work <= high.work:
                share = (work - low.work) / (high.work - low.work)
                return low.seconds + share * (high.seconds - low.seconds)
        return points[-1].seconds * work / points[-1].work


def _below(points: Sequence[Point], work: float) -> float:
    # Small work is mostly overhead: half of the smallest measurement's is taken not to shrink.
    first = points[0]
    return first.seconds * (0.5 + 0.5 * work / first.work)


def forward_work(shape: Shape) -> float:
    """FLOPs of one token through the blocks; embeddings are look-ups, and there is no head."""
    return 2.0 * max(1, shape.n_params - 2 * shape.vocab_size * shape.d_model)


def pretrain_work(shape: Shape) -> float:
    """FLOPs of one token of a training step: forward and twice that back, with the head."""
    return 6.0 * max(1, shape.n_params - shape.vocab_size * shape.d_model)


def sae_work(d_model: int, n: int, k: int) -> float:
    """FLOPs of one position of a training step: one dense encoder product, gathers over k features for the rest."""
    return 2.0 * n * d_model + 8.0 * k * d_model


def collect_work(d_model: int, n: int, k: int) -> float:
    """FLOPs of one position encoded and decoded."""
    return 2.0 * n * d_model + 2.0 * k * d_model
