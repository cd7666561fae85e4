"""The training recipe. Shape suffixes: B rows, D d_model."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.sae.encoding import Preselection
from glottoscope.sae.kernels import Forward
from glottoscope.sae.kernels.chunked import ChunkedKernel
from glottoscope.sae.model import TENSOR_NAMES, TopKSAE, geometric_median
from glottoscope.sae.scratch import Scratch
from glottoscope.sae.trainer import SAETrainer

D, N, K, B = 12, 40, 4, 64


def batches(count: int, seed: int = 0, b: int = B) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [7 * torch.randn(b, D, generator=generator) + 3 for _ in range(count)]


def weights(sae: TopKSAE) -> list[Tensor]:
    return [getattr(sae, name).clone() for name in TENSOR_NAMES]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def reconstruction_loss(sae: TopKSAE, x: Tensor) -> float:
    return float((sae.normalize(x) - sae.decode(*sae.encode(x))).square().sum(1).mean())


def test_first_steps_match_a_plain_dense_adam() -> None:
    """The whole recipe written out naively: median, loss before update, warm-up, Adam's eps, unit rows."""
    sae = TopKSAE(D, N, K, 1)
    trainer = SAETrainer(sae, 3e-3, 5)
    dense = [p.double().requires_grad_() for p in weights(TopKSAE(D, N, K, 1))]
    W_enc, b_enc, W_dec, b_dec = dense
    optimizer = torch.optim.Adam(dense, lr=1.0, eps=6.25e-10)
    for t, x in enumerate(batches(8)):
        u = x.double() / x.double().norm(dim=1, keepdim=True)
        with torch.no_grad():
            if t == 0:
                b_dec.copy_(geometric_median(u))
        values, indices = ((u - b_dec) @ W_enc.T + b_enc).relu().topk(K, dim=1)
        z = torch.zeros(B, N, dtype=torch.float64).scatter(1, indices, values)
        loss = (z @ W_dec + b_dec - u).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (t + 1) / 5)
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        out = trainer.step(x)
        assert out["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert out["lr"] == pytest.approx(3e-3 * min(1, (t + 1) / 5), rel=1e-12)
        assert out["l0"] == int((values > 0).sum()) / B
    for mine, reference in zip(weights(sae), dense, strict=True):
        assert torch.allclose(mine.double(), reference, atol=2e-5)
    assert trainer.steps == 8


def test_loss_is_from_before_the_update_and_training_lowers_it() -> None:
    sae, x = TopKSAE(D, N, K), batches(1)[0]
    trainer = SAETrainer(sae, 1e-2, 1)
    trainer.step(x)
    expected = reconstruction_loss(sae, x)
    assert trainer.step(x)["loss"] == pytest.approx(expected, rel=1e-6)
    for _ in range(100):
        trainer.step(x)
    assert reconstruction_loss(sae, x) < 0.5 * expected


def test_initial_weights_and_unit_rows() -> None:
    sae = TopKSAE(D, N, K, seed=9)
    assert torch.equal(sae.W_enc, sae.W_dec) and not sae.b_enc.any() and not sae.b_dec.any()
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert same(weights(sae), weights(TopKSAE(D, N, K, seed=9)))
    assert not torch.equal(sae.W_dec, TopKSAE(D, N, K, seed=8).W_dec)
    trainer = SAETrainer(sae, 0.3, 1)
    for x in batches(3):
        trainer.step(x)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-6)
    assert not torch.allclose(sae.W_enc.norm(dim=1), torch.ones(N), atol=1e-2)


def test_warmup_and_eps() -> None:
    trainer = SAETrainer(TopKSAE(D, N, K), 1e-3, 1000)
    assert trainer.step(batches(1)[0])["lr"] == pytest.approx(1e-6)
    assert trainer.learning_rate(499) == pytest.approx(5e-4)
    assert trainer.learning_rate(999) == trainer.learning_rate(10**6) == 1e-3
    assert SAETrainer(TopKSAE(D, N, K), 1e-3, 0).learning_rate(0) == 1e-3
    assert trainer._adam.eps == 6.25e-10
    assert trainer._adam.betas == (0.9, 0.999)


def test_b_dec_is_the_median_of_the_first_batch_only_once() -> None:
    sae, (first, second) = TopKSAE(D, N, K), batches(2)
    seen: list[Tensor] = []

    class Spy(ChunkedKernel):
        def forward(self, u_BD: Tensor) -> Forward:
            seen.append(self.sae.b_dec.clone())
            return super().forward(u_BD)

    SAETrainer(sae, kernel=Spy).step(first)
    assert torch.allclose(seen[0], geometric_median(sae.normalize(first)))
    after = sae.b_dec.clone()
    SAETrainer(sae, kernel=Spy).step(second)  # a new trainer, but a trained SAE
    assert torch.equal(seen[1], after)


@pytest.mark.parametrize("kernel", ["compiled", "chunked", "reference"])
def test_several_trainers_on_one_stream_are_bit_identical_to_each_alone(kernel: str) -> None:
    """Learning rates, seeds, controls and sizes, all in one scratch memory, as a study trains them."""
    settings_list = [(1e-3, 0, False, N), (3e-3, 0, False, N), (1e-3, 1, True, N), (1e-3, 2, False, 3 * N)]

    def build(scratch: Scratch | None) -> list[SAETrainer]:
        return [
            SAETrainer(TopKSAE(D, n, K, s), lr, 3, frozen_decoder=f, kernel=kernel, scratch=scratch)
            for lr, s, f, n in settings_list
        ]

    together, alone = build(Scratch()), build(None)
    kept = [x.clone() for x in batches(6)]
    stream = batches(6)
    for x in stream:
        for trainer in together:
            trainer.step(x)
    assert same(stream, kept)  # the stream itself is left alone
    for trainer in alone:
        for x in kept:
            trainer.step(x)
    for left, right in zip(together, alone, strict=True):
        assert same(weights(left.sae), weights(right.sae))


def test_state_dict_resumes_exactly() -> None:
    stream = batches(9)
    straight = SAETrainer(TopKSAE(D, N, K), 3e-3, 6)
    results = [straight.step(x) for x in stream[:4]]
    file = io.BytesIO()
    state = straight.state_dict()
    torch.save(state, file)
    results = [straight.step(x) for x in stream[4:]]
    file.seek(0)
    from_file: dict[str, Any] = torch.load(file, weights_only=True)
    for saved in (state, from_file, state):  # the snapshot neither follows the trainer nor is used up
        resumed = SAETrainer(TopKSAE(D, N, K, seed=77), 3e-3, 6)
        resumed.load_state_dict(saved)
        assert resumed.steps == 4
        assert [resumed.step(x) for x in stream[4:]] == results
        assert same(weights(resumed.sae), weights(straight.sae))


@pytest.mark.parametrize(
    ("kernel", "preselection", "frozen"),
    [("compiled", "none", False), ("compiled", "bf16", True), ("chunked", "bf16", False), ("reference", "none", True)],
)
def test_tensors_and_steps_are_all_there_is_of_a_trainer(kernel: str, preselection: Preselection, frozen: bool) -> None:
    """Moved into a trainer with other weights and a scratch memory that others used, they give the same steps."""
    n, stream, dirty = 200, batches(9), Scratch()

    def build(seed: int, scratch: Scratch) -> SAETrainer:
        sae = TopKSAE(D, n, K, seed)
        return SAETrainer(sae, 3e-3, 6, kernel=kernel, preselection=preselection, frozen_decoder=frozen, scratch=scratch)

    straight, moved = build(0, Scratch()), build(77, dirty)
    for x in stream[:4]:
        straight.step(x)
        build(5, dirty).step(-x)
    kept = {name: tensor.clone() for name, tensor in straight.tensors().items()}
    assert ("W_dec.first" in kept) != frozen
    for name, tensor in moved.tensors().items():
        tensor.copy_(kept[name])
    moved.resume_at(4)
    assert [moved.step(x) for x in stream[4:]] == [straight.step(x) for x in stream[4:]]
    assert all(torch.equal(a, straight.tensors()[name]) for name, a in moved.tensors().items())


def test_state_of_other_settings_or_shape_is_refused() -> None:
    state = SAETrainer(TopKSAE(D, N, K), 3e-3).state_dict()
    with pytest.raises(InputError, match="lr"):
        SAETrainer(TopKSAE(D, N, K), 1e-3).load_state_dict(state)
    with pytest.raises(InputError, match="W_enc"):
        SAETrainer(TopKSAE(D, N + 1, K), 3e-3).load_state_dict(state)
    with pytest.raises(InputError, match="older version"):
        SAETrainer(TopKSAE(D, N, K), 3e-3).load_state_dict({k: v for k, v in state.items() if k != "adam"})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_nonfinite_input_stops_before_any_weight_changes(bad: float, at: int) -> None:
    sae = TopKSAE(D, N, K)
    trainer = SAETrainer(sae)
    stream = batches(at + 1)
    for x in stream[:at]:
        trainer.step(x)
    before, moments = weights(sae), trainer.state_dict()["adam"]["moments"]
    stream[at][5, 3] = bad
    with pytest.raises(NonFiniteError, match="1 of 64 positions"):
        trainer.step(stream[at])
    assert same(weights(sae), before) and trainer.steps == at
    after = trainer.state_dict()["adam"]["moments"]
    assert all(torch.equal(after[i][key], value) for i, entry in moments.items() for key, value in entry.items())


def test_nonfinite_loss_stops_before_any_weight_changes() -> None:
    sae = TopKSAE(D, N, K)
    sae.W_enc[0, 0] = math.nan
    before = weights(sae)
    with pytest.raises(NonFiniteError, match="loss"):
        SAETrainer(sae).step(batches(1)[0])
    assert all(torch.equal(a.nan_to_num(5.0), b.nan_to_num(5.0)) for a, b in zip(weights(sae), before, strict=True))
    assert not sae.b_dec_initialised


@pytest.mark.parametrize("shape", [(B, D + 1), (0, D), (D,), (2, 3, D)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="hidden states of shape"):
        SAETrainer(TopKSAE(D, N, K)).step(torch.zeros(shape))


def test_frozen_decoder() -> None:
    sae = TopKSAE(D, N, K)
    before = weights(sae)
    trainer = SAETrainer(sae, 1e-2, 1, frozen_decoder=True)
    for x in batches(3):
        trainer.step(x)
    assert torch.equal(sae.W_dec, before[2])
    assert not torch.equal(sae.W_enc, before[0]) and not torch.equal(sae.b_dec, before[3])


def test_zero_vectors_train_without_nan() -> None:
    sae = TopKSAE(D, N, K)
    trainer = SAETrainer(sae, 1e-2, 1)
    x = batches(1)[0]
    x[::3] = 0
    for _ in range(3):
        assert math.isfinite(trainer.step(x)["loss"])
    assert math.isfinite(SAETrainer(TopKSAE(D, N, K)).step(torch.zeros(4, D))["loss"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_widened(dtype: torch.dtype) -> None:
    x = batches(1)[0].to(dtype)
    half, full = TopKSAE(D, N, K), TopKSAE(D, N, K)
    assert SAETrainer(half).step(x) == SAETrainer(full).step(x.float())
    assert same(weights(half), weights(full)) and half.W_enc.dtype == torch.float32
    big = torch.full((2, D), 60000.0, dtype=torch.float16)  # its norm overflows float16
    assert torch.allclose(half.normalize(big).norm(dim=1), torch.ones(2))


def test_raw_inputs_with_autograd_history_leave_no_graph() -> None:
    sae = TopKSAE(D, N, K)
    for kernel in ("compiled", "chunked"):
        SAETrainer(sae, kernel=kernel).step(batches(1)[0].requires_grad_() * 2)
        SAETrainer(sae, kernel=kernel).step(batches(1)[0].requires_grad_())
        assert not sae.W_enc.requires_grad and sae.W_enc.grad_fn is None


def test_a_kernel_is_a_name_or_a_class() -> None:
    with pytest.raises(InputError, match="subclass"):
        SAETrainer(TopKSAE(D, N, K), kernel=lambda *_: None)  # type: ignore[arg-type]


def test_preselection_trains_the_same_and_says_what_it_recomputed() -> None:
    n, k = 600, 4
    plain, preselected = (TopKSAE(D, n, k, 3) for _ in range(2))
    one, other = SAETrainer(plain, 3e-3, 3), SAETrainer(preselected, 3e-3, 3, preselection="bf16")
    recomputed = 0.0
    for x in batches(10, b=200):
        left, right = one.step(x), other.step(x)
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        recomputed += right["recomputed"]
    assert 0 <= recomputed < 10 * 200
    assert torch.allclose(plain.W_enc, preselected.W_enc, atol=1e-4)
    with pytest.raises(InputError, match="preselects nothing"):
        SAETrainer(TopKSAE(D, n, k), kernel="reference", preselection="bf16")
    with pytest.raises(InputError, match="as coarse as"):
        SAETrainer(TopKSAE(D, n, k, dtype=torch.bfloat16), kernel="chunked", preselection="bf16")


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_states_of_any_finite_size_are_normalised(scale: float) -> None:
    x = batches(1)[0].clamp(-3, 3) * scale
    for kernel in ("compiled", "chunked"):
        u_BD, bad = SAETrainer(TopKSAE(D, N, K), kernel=kernel).kernel.normalise(x)
        assert bad == 0 and bool(u_BD.isfinite().all())
        if kernel == "compiled":
            assert torch.allclose(u_BD.double(), x.double() / x.double().norm(dim=1, keepdim=True), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 12), d=st.integers(1, 4), seed=st.integers(0, 1000), duplicates=st.integers(0, 12))
def test_geometric_median_is_the_minimum(b: int, d: int, seed: int, duplicates: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(b, d))
    points = np.concatenate([points, np.repeat(points[:1], duplicates, axis=0)])

    def total(m: np.ndarray) -> float:
        return float(np.linalg.norm(points - m, axis=1).sum())

    starts = [points.mean(0), *points]
    best = min(min(minimize(total, s, method="Nelder-Mead").fun for s in starts[:4]), *(total(p) for p in points))
    found = geometric_median(torch.tensor(points), iterations=2000, tol=1e-9).numpy()
    assert total(found) <= best * (1 + 1e-4) + 1e-9


def test_geometric_median_where_the_mean_is_a_data_point() -> None:
    symmetric = torch.tensor([[0.0, 0.0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    assert torch.allclose(geometric_median(symmetric), torch.zeros(2))
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [34.0], [8.0]])  # mean 8 is a point; medians are [2, 3]
    assert 1.99 <= float(geometric_median(line, iterations=1000, tol=1e-9)) <= 3.01
    assert torch.equal(geometric_median(torch.full((5, 3), 2.0)), torch.full((3,), 2.0))
