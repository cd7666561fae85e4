"""How well an SAE reconstructs: fraction of variance unexplained (FVU), cosine, L0, pooled and per language.

Shape suffixes: B positions of one update, D d_model, G languages.

FVU = sum ||u - u_hat||^2 / sum ||u - mean(u)||^2 with one mean over all positions; per language with that language's
own mean. Predicting the mean gives 1, a perfect reconstruction 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Quality(NamedTuple):
    """Reconstruction quality; NaN where undefined (no position, or no variance to explain)."""

    fvu: float
    fvu_language: tuple[float, ...]  # in the order of languages, each about its own mean
    cosine: float  # mean over positions of cos(u, u_hat); 0 where either is the zero vector
    l0: float  # mean number of active features per position
    loss: float  # mean over positions of ||u - u_hat||^2
    n_positions: int


class QualityAccumulator:
    """Sums in float64 over chunks; the result does not depend on the chunking.

    Means and squared deviations are merged as in Chan et al. (1979), so that no difference of large sums is taken.
    """

    def __init__(self, d: int, n_languages: int) -> None:
        self._count_G = torch.zeros(n_languages, dtype=torch.float64)
        self._mean_GD = torch.zeros(n_languages, d, dtype=torch.float64)
        self._deviation_G = torch.zeros(n_languages, dtype=torch.float64)  # sum ||u - mean of the language||^2
        self._error_G = torch.zeros(n_languages, dtype=torch.float64)  # sum ||u - u_hat||^2
        self._cosine, self._active = 0.0, 0.0

    @torch.no_grad()
    def update(self, u_BD: Tensor, u_hat_BD: Tensor, l0_B: Tensor, language_B: Tensor) -> None:
        """Add positions: normalised states, their reconstruction, active features per position, language indices.

        Positions whose language is not below n_languages (255 = padding) are left out.
        """
        n_languages = len(self._count_G)
        language_B = language_B.to("cpu", torch.int64)
        counted_B = language_B < n_languages
        u_BD, u_hat_BD = (t.to("cpu", torch.float64)[counted_B] for t in (u_BD, u_hat_BD))
        language_B = language_B[counted_B]
        count_G = torch.bincount(language_B, minlength=n_languages).to(torch.float64)
        sums_GD = torch.zeros_like(self._mean_GD).index_add_(0, language_B, u_BD)
        mean_GD = sums_GD / count_G.clamp_min(1)[:, None]
        deviation_B = (u_BD - mean_GD[language_B]).square().sum(1)
        total_G = (self._count_G + count_G).clamp_min(1)
        shift_GD = mean_GD - self._mean_GD
        self._deviation_G += torch.bincount(language_B, deviation_B, n_languages)
        self._deviation_G += shift_GD.square().sum(1) * self._count_G * count_G / total_G
        self._mean_GD += shift_GD * (count_G / total_G)[:, None]
        self._count_G += count_G
        self._error_G += torch.bincount(language_B, (u_BD - u_hat_BD).square().sum(1), n_languages)
        norms_B = torch.linalg.vector_norm(u_BD, dim=1) * torch.linalg.vector_norm(u_hat_BD, dim=1)
        dot_B = (u_BD * u_hat_BD).sum(1)
        self._cosine += torch.where(norms_B > 0, dot_B / norms_B, 0.0).sum().item()
        self._active += l0_B.to("cpu", torch.float64)[counted_B].sum().item()

    def result(self) -> Quality:
        """The quality over everything added so far."""
        n = self._count_G.sum().item()
        mean_D = (self._count_G[:, None] * self._mean_GD).sum(0) / max(n, 1.0)
        between = (self._count_G * (self._mean_GD - mean_D).square().sum(1)).sum().item()
        error = self._error_G.sum().item()
        return Quality(
            fvu=_ratio(error, self._deviation_G.sum().item() + between),
            fvu_language=tuple(_ratio(e, v) for e, v in zip(self._error_G.tolist(), self._deviation_G.tolist(), strict=True)),
            cosine=_ratio(self._cosine, n),
            l0=_ratio(self._active, n),
            loss=_ratio(error, n),
            n_positions=int(n),
        )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan
