"""How well an SAE reconstructs: fraction of variance unexplained (FVU), cosine, L0, pooled and per language.

Shape suffixes: B positions of one update, S positions of a stretch, D d_model, G languages.

FVU = sum ||u - u_hat||^2 / sum ||u - mean(u)||^2 with one mean over all positions; per language with that language's
own mean. Predicting the mean gives 1, a perfect reconstruction 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_ELEMENTS = 2**19  # of a stretch: what is computed from it stays in cache
DEVICE_ELEMENTS = 2**24
ELEMENTS_OF_A_RUN = 2**17  # below, gathering costs less than one more stretch


class Quality(NamedTuple):
    """Reconstruction quality; NaN where undefined (no position, or no variance to explain)."""

    fvu: float
    fvu_language: tuple[float, ...]  # in the order of languages, each about its own mean
    cosine: float  # mean over positions of cos(u, u_hat); 0 where either is the zero vector
    l0: float  # mean number of active features per position
    loss: float  # mean over positions of ||u - u_hat||^2
    n_positions: int


class QualityAccumulator:
    """Sums over chunks; against float64 throughout, and between chunkings, results differ by less than 1e-6 relative.

    Positions are taken in stretches of one language. Inside a stretch differences, and sums along D, are float32 (float64
    for float64 states); sums over positions are float64. Squared deviations are taken about the stretch's own mean and
    merged as in Chan et al. (1979), so that no difference of large sums is taken.
    """

    def __init__(self, d: int, n_languages: int) -> None:
        self._count_G = [0] * n_languages
        self._mean_GD = torch.zeros(n_languages, d, dtype=torch.float64)
        self._deviation_G = [0.0] * n_languages  # sum ||u - mean of the language||^2
        self._error_G = [0.0] * n_languages  # sum ||u - u_hat||^2
        self._cosine, self._active = 0.0, 0.0
        self._work: Tensor | None = None

    @torch.no_grad()
    def update(self, u_BD: Tensor, u_hat_BD: Tensor, l0_B: Tensor, language_B: Tensor) -> None:
        """Add positions: normalised states, their reconstruction, active features per position, language indices.

        Positions whose language is not below n_languages (255 = padding) are left out.
        """
        if not len(u_BD):
            return
        if u_BD.device.type == "mps":  # Apple GPUs have no float64
            u_BD, u_hat_BD = u_BD.cpu(), u_hat_BD.cpu()
        dtype = torch.float64 if torch.float64 in (u_BD.dtype, u_hat_BD.dtype) else torch.float32
        device, language_B = u_BD.device, language_B.to("cpu", torch.int64)
        u_BD, u_hat_BD, l0_B = u_BD.to(dtype), u_hat_BD.to(device, dtype), l0_B.to(device)
        longest = max(1, (CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // u_BD.shape[1])
        work = self._work
        if work is None or (work.dtype, work.device) != (dtype, device) or work.shape[1] < min(longest, len(u_BD)):
            work = self._work = torch.empty(3, min(longest, len(u_BD)), u_BD.shape[1], dtype=dtype, device=device)
        difference_SD, *copies = work
        starts = _run_starts(language_B)
        if len(starts) <= 2 * len(self._count_G) + u_BD.numel() // ELEMENTS_OF_A_RUN:
            for language, rows in _stretches(starts, language_B, longest):
                if language < len(self._count_G):
                    self._add(language, u_BD[rows], u_hat_BD[rows], l0_B[rows], difference_SD)
            return
        # Languages take turns too often for long stretches: each language's positions are gathered.
        for language in range(len(self._count_G)):
            own = torch.nonzero(language_B == language).flatten().to(device)
            for rows in own.split(longest):
                u_SD, u_hat_SD = (
                    torch.index_select(x, 0, rows, out=c[: len(rows)]) for x, c in zip((u_BD, u_hat_BD), copies, strict=True)
                )
                self._add(language, u_SD, u_hat_SD, l0_B[rows], difference_SD)

    def _add(self, language: int, u_SD: Tensor, u_hat_SD: Tensor, l0_S: Tensor, work_SD: Tensor) -> None:
        """Add a stretch of one language; `work_SD` is overwritten."""
        n, seen = len(u_SD), self._count_G[language]
        work_SD = work_SD[:n]
        about_D = u_SD.mean(0)
        torch.sub(u_SD, about_D, out=work_SD)
        deviation = _squares(work_SD).sum()
        # What rounding left of the deviations' sum moves the mean and the squares to where they belong.
        rest_D = work_SD.sum(0).double() / n
        deviation -= n * rest_D.square().sum()
        error = _squares(torch.sub(u_SD, u_hat_SD, out=work_SD)).sum()
        dot_S = torch.mul(u_SD, u_hat_SD, out=work_SD).sum(1).double()
        norms_S = (_squares(u_SD) * _squares(u_hat_SD)).sqrt()
        cosine = torch.where(norms_S > 0, dot_S / norms_S, 0.0).sum()
        sums = torch.stack([deviation, error, cosine, l0_S.sum().double()]).tolist()

        shift_D = (about_D.double() + rest_D).cpu() - self._mean_GD[language]
        self._deviation_G[language] += sums[0] + shift_D.square().sum().item() * seen * n / (seen + n)
        self._mean_GD[language] += shift_D * (n / (seen + n))
        self._count_G[language] += n
        self._error_G[language] += sums[1]
        self._cosine += sums[2]
        self._active += sums[3]

    def result(self) -> Quality:
        """The quality over everything added so far."""
        n = sum(self._count_G)
        count_G1 = torch.tensor(self._count_G, dtype=torch.float64)[:, None]
        mean_D = (count_G1 * self._mean_GD).sum(0) / max(n, 1)
        between = (count_G1 * (self._mean_GD - mean_D).square()).sum().item()
        error = sum(self._error_G)
        return Quality(
            fvu=_ratio(error, sum(self._deviation_G) + between),
            fvu_language=tuple(_ratio(e, v) for e, v in zip(self._error_G, self._deviation_G, strict=True)),
            cosine=_ratio(self._cosine, n),
            l0=_ratio(self._active, n),
            loss=_ratio(error, n),
            n_positions=n,
        )


def _squares(x_SD: Tensor) -> Tensor:
    """Squared norm of every row, float64 [S]."""
    return torch.linalg.vector_norm(x_SD, dim=1).double().square()


def _run_starts(language_B: Tensor) -> list[int]:
    """Where runs of one language start."""
    if not len(language_B):
        return []
    return [0, *(torch.nonzero(language_B[1:] != language_B[:-1]).flatten() + 1).tolist()]


def _stretches(starts: list[int], language_B: Tensor, longest: int) -> Iterator[tuple[int, slice]]:
    """(language, rows) of runs of one language, cut where they are longer than `longest`."""
    for start, end in zip(starts, [*starts[1:], len(language_B)], strict=True):
        for first in range(start, end, longest):
            yield int(language_B[start]), slice(first, min(first + longest, end))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan
