"""300 steps of every sparse kernel beside dense training. Shape suffixes: B rows, D d_model, N features, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from glottoscope.sae.model import TopKSAE, geometric_median
from glottoscope.sae.trainer import SAETrainer

D, N, K, B, STEPS = 32, 256, 8, 256, 300
LR, WARMUP = 3e-3, 20
SEEDS = (0, 1, 2)


@cache
def stream(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions_ND = torch.randn(3 * N, D, generator=generator)
    batches = []
    for _ in range(STEPS):
        codes = torch.rand(B, 3 * N, generator=generator) * (torch.rand(B, 3 * N, generator=generator) < 0.01)
        batches.append(codes @ directions_ND + 0.05 * torch.randn(B, D, generator=generator))
    return batches


def dense_losses(seed: int, product: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    """Training with every product dense, its gradients written out, in float32; the products are `product`'s."""
    sae = TopKSAE(D, N, K, seed)
    W_enc, b_enc, W_dec, b_dec = parameters = [p.clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=LR, eps=6.25e-10)
    losses = []
    for t, x in enumerate(stream(seed)):
        u = sae.normalize(x)
        if t == 0:
            b_dec.copy_(geometric_median(u))
        centred = u - b_dec
        values, indices = (product(centred, W_enc.T) + b_enc).topk(K, dim=1)
        z = torch.zeros(B, N).scatter(1, indices, values.relu())
        residual = product(z, W_dec) - centred
        losses.append(float(residual.square().sum(1).mean()))
        G = residual * (2 / B)
        dz = product(G, W_dec.T) * (z > 0)
        W_enc.grad, W_dec.grad, b_enc.grad = product(dz.T, centred), product(z.T, G), dz.sum(0)
        b_dec.grad = G.sum(0) - product(dz, W_enc).sum(0)
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (t + 1) / WARMUP)
        optimizer.step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return np.array(losses)


def numpy_product(a: Tensor, b: Tensor) -> Tensor:
    """The same product by numpy's BLAS, which is another library than torch's."""
    return torch.from_numpy(np.ascontiguousarray(a.numpy()) @ np.ascontiguousarray(b.numpy()))


def sparse_losses(kernel: str, seed: int) -> np.ndarray:
    trainer = SAETrainer(TopKSAE(D, N, K, seed), LR, WARMUP, kernel=kernel)
    return np.array([trainer.step(x)["loss"] for x in stream(seed)])


def difference(runs: dict[int, np.ndarray], dense: dict[int, np.ndarray]) -> float:
    """The largest relative difference over the steps; the median over seeds, since one rounded tie can part two runs."""
    return float(np.median([np.max(np.abs(runs[seed] / dense[seed] - 1)) for seed in SEEDS]))


@pytest.fixture(scope="module")
def dense() -> dict[int, np.ndarray]:
    return {seed: dense_losses(seed, torch.mm) for seed in SEEDS}


@pytest.fixture(scope="module")
def gap(dense: dict[int, np.ndarray]) -> float:
    """Difference between dense runs on two matrix products."""
    return difference({seed: dense_losses(seed, numpy_product) for seed in SEEDS}, dense)


@pytest.mark.parametrize("kernel", ["compiled", "chunked"])
def test_losses_stay_within_twice_the_gap_between_two_matrix_products(
    kernel: str, dense: dict[int, np.ndarray], gap: float
) -> None:
    if gap == 0:
        pytest.skip("torch and numpy share one matrix product here")
    assert gap < 0.05
    assert dense[0][-1] < 0.6 * dense[0][0]  # it does learn
    assert difference({seed: sparse_losses(kernel, seed) for seed in SEEDS}, dense) <= 2 * gap
