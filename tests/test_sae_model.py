"""TopKSAE: encode, decode, files. Shape suffixes: B rows, D d_model, N features, K top-k."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glottoscope.errors import InputError
from glottoscope.sae.model import TopKSAE
from glottoscope.sae.trainer import SAETrainer

D, N, K = 12, 600, 5


def trained(seed: int = 0, bias: float = 0.0) -> TopKSAE:
    sae = TopKSAE(D, N, K, seed)
    trainer = SAETrainer(sae, 1e-2, 1)
    for i in range(3):
        trainer.step(torch.randn(64, D, generator=torch.Generator().manual_seed(i)))
    sae.b_enc.add_(bias)
    return sae


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def test_encode_is_relu_then_top_k() -> None:
    sae, x = trained(bias=-0.2), rows(50)
    values, indices = sae.encode(x)
    u = x / x.norm(dim=1, keepdim=True)
    expected = ((u - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    assert torch.allclose(values, expected.topk(K, dim=1).values, atol=1e-6)
    assert torch.allclose(values, expected.gather(1, indices), atol=1e-6)
    assert indices.dtype == torch.int64
    z = torch.zeros(50, N).scatter(1, indices, values)
    assert torch.allclose(sae.decode(values, indices), z @ sae.W_dec + sae.b_dec, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 1500), cut=st.integers(0, 1500))
def test_encode_does_not_depend_on_chunks(b: int, cut: int) -> None:
    sae, x = TopKSAE(D, N, K), rows(b)
    values, indices = sae.encode(x)
    parts = [sae.encode(x[:cut]), sae.encode(x[cut:])]
    values_parts, indices_parts = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    assert torch.allclose(values, values_parts, atol=1e-6)
    # Matrix products of different heights may round differently, which may swap near ties only.
    swapped = indices != indices_parts
    assert float(swapped.float().mean()) < 0.01


def test_leading_shapes_and_empty_input() -> None:
    sae, x = trained(), rows(2, 3, 4)
    values, indices = sae.encode(x)
    assert values.shape == indices.shape == (2, 3, 4, K)
    assert sae.decode(values, indices).shape == x.shape == sae.reconstruct(x).shape
    assert sae.encode(rows(0))[0].shape == (0, K)
    assert sae.encode(x[0, 0, 0])[0].shape == (K,)


def test_scale_does_not_matter_and_reconstruct_is_in_raw_space() -> None:
    sae, x = trained(), rows(20)
    assert torch.allclose(sae.encode(x)[0], sae.encode(8 * x)[0], atol=1e-6)
    raw = sae.reconstruct(x)
    assert torch.allclose(raw, sae.decode(*sae.encode(x)) * x.norm(dim=1, keepdim=True))
    assert torch.allclose(sae.reconstruct(8 * x), 8 * raw, rtol=1e-5, atol=1e-4)
    plain = TopKSAE(D, N, K, normalization="none")
    assert torch.equal(plain.reconstruct(x), plain.decode(*plain.encode(x)))
    assert not torch.allclose(plain.encode(x)[0], plain.encode(8 * x)[0])


def test_zero_vector() -> None:
    sae = trained()
    x = torch.zeros(3, D)
    assert not sae.normalize(x).any()
    values, _ = sae.encode(x)
    assert bool(values.isfinite().all()) and not sae.reconstruct(x).any()


def test_value_zero_is_no_activation() -> None:
    """With few positives TopK still returns K ids: those with value 0 must count nowhere."""
    sae = trained(bias=-0.75)
    values, indices = sae.encode(rows(200))
    active = values > 0
    assert 0 < int(active.sum()) < active.numel()
    u = sae.normalize(rows(200))
    positives = ((u - sae.b_dec) @ sae.W_enc.T + sae.b_enc) > 0
    assert torch.equal(active.sum(1), positives.sum(1).clamp_max(K))
    elsewhere = torch.where(active, indices, (indices + 1) % N)
    assert torch.allclose(sae.decode(values, indices), sae.decode(values, elsewhere))
    trainer = SAETrainer(sae)
    assert trainer.step(rows(200))["l0"] == int(active.sum()) / 200


def test_k_equal_to_n_and_bad_sizes() -> None:
    sae = TopKSAE(D, 6, 6)
    assert sorted(sae.encode(rows(1))[1][0].tolist()) == list(range(6))
    for d, n, k in ((4, 3, 4), (0, 3, 1), (4, 3, 0)):
        with pytest.raises(InputError, match="k <= n"):
            TopKSAE(d, n, k)
    with pytest.raises(InputError, match="normalization"):
        TopKSAE(4, 4, 2, normalization="rms")  # pyright: ignore[reportArgumentType]


def test_max_preactivation_is_before_top_k() -> None:
    sae, x = trained(), rows(20)
    u = sae.normalize(x)
    expected = ((u - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu().amax(0)
    assert torch.allclose(sae.max_preactivation(x), expected, atol=1e-6)
    many = rows(700)  # several chunks
    parts = torch.stack([sae.max_preactivation(many[:100]), sae.max_preactivation(many[100:])])
    assert torch.allclose(sae.max_preactivation(many), parts.amax(0), atol=1e-6)
    values, indices = sae.encode(x)
    after = torch.zeros(N).scatter_reduce(0, indices.view(-1), values.view(-1), "amax")
    assert bool((after <= expected + 1e-6).all()) and bool((after < expected - 1e-3).any())


def test_save_and_load(tmp_path: Path) -> None:
    sae = trained(seed=4)
    sae.save(tmp_path, {"layer": 3, "model": "m"})
    again = TopKSAE.load(tmp_path)
    assert (again.d, again.n, again.k, again.seed, again.normalization) == (D, N, K, 4, "unit")
    assert again.extra == {"layer": 3, "model": "m"} and again.b_dec_initialised
    x = rows(30)
    assert all(torch.equal(a, b) for a, b in zip(sae.encode(x), again.encode(x), strict=True))
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again.save(tmp_path)  # keeps extra; equal content gives equal bytes
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    assert sorted(first) == ["cfg.json", "sae.safetensors"]
    SAETrainer(again).step(x)  # a loaded SAE trains on
    fresh = TopKSAE(D, N, K)
    fresh.save(tmp_path)
    assert not TopKSAE.load(tmp_path).b_dec_initialised


def test_load_errors_name_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        trained().save(tmp_path / name)
        return tmp_path / name

    with pytest.raises(InputError, match=r"cfg\.json: no such file"):
        TopKSAE.load(tmp_path / "absent")

    folder = broken("no_weights")
    (folder / "sae.safetensors").unlink()
    with pytest.raises(InputError, match=r"sae\.safetensors: no such file"):
        TopKSAE.load(folder)

    folder = broken("truncated")
    data = (folder / "sae.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        (folder / "sae.safetensors").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"sae\.safetensors: unreadable or truncated"):
            TopKSAE.load(folder)

    folder = broken("missing_tensor")
    tensors = load_file(folder / "sae.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "b_enc"}, folder / "sae.safetensors")
    with pytest.raises(InputError, match="tensor b_enc is missing"):
        TopKSAE.load(folder)
    save_file({**tensors, "W_dec": tensors["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    with pytest.raises(InputError, match="tensor W_dec has shape"):
        TopKSAE.load(folder)
    save_file({**tensors, "b_dec": tensors["b_dec"] * torch.nan}, folder / "sae.safetensors")
    with pytest.raises(InputError, match="b_dec holds values"):
        TopKSAE.load(folder)

    for change, message in (
        ({"schema": 2}, "newer than this version"),
        ({"format": "other"}, "not a glottoscope SAE"),
        ({"k": None}, "field k is missing"),
        ({"k": N + 1}, "k <= n"),
        ({"n": N - 1}, "cfg.json says n"),
    ):
        folder = broken("config")
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            TopKSAE.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        TopKSAE.load(folder)


def test_encoding_leaves_the_callers_states_alone() -> None:
    """Without normalisation the states are the caller's own memory."""
    for normalization in ("none", "unit"):
        sae = TopKSAE(8, 40, 4, normalization=normalization)
        sae.b_dec.add_(0.7)
        x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
        kept = x.clone()
        first, second = sae.encode(x), sae.encode(x)
        assert torch.equal(x, kept)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        pre = (sae.normalize(x) - sae.b_dec) @ sae.W_enc.T
        assert torch.allclose(first[0], pre.topk(4, dim=1).values.relu(), atol=1e-5)
