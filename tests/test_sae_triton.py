"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for GPUs that need not be here, run on one that is.

The interpreter is chosen when triton is first imported, and torch imports triton for its own ends. So `TestKernels` is
collected only where TRITON_INTERPRET is set or there is a GPU, and `TestOrdinary` starts a process with the interpreter.

Shape suffixes: B rows, D d_model, N features, K top-k.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sae_kernels import check
from test_sae_kernels import random_sae as random_sae_on_cpu
from test_sae_kernels import unit_rows as unit_rows_on_cpu
from torch import Tensor

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.sae.adam import Adam
from glottoscope.sae.kernels import Forward, Gradients, resolve_kernel
from glottoscope.sae.kernels.chunked import ChunkedKernel
from glottoscope.sae.kernels.triton import MAX_D, TritonKernel, warps_of, why_not_triton
from glottoscope.sae.model import TENSOR_NAMES, TopKSAE
from glottoscope.sae.scratch import Scratch
from glottoscope.sae.trainer import SAETrainer

pytest.importorskip("triton", reason="triton is not installed; it has wheels for Linux")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def random_sae(d: int, n: int, k: int, seed: int, bias: float = 0.0) -> TopKSAE:
    return random_sae_on_cpu(d, n, k, seed, torch.float32, bias).to(DEVICE)


def unit_rows(b: int, d: int, seed: int) -> Tensor:
    return unit_rows_on_cpu(b, d, seed, torch.float32).to(DEVICE)


def step(sae: TopKSAE, u_BD: Tensor, chunk: int = TritonKernel.CHUNK, **options: Any) -> tuple[Forward, Gradients]:
    kernel = TritonKernel(sae, **options)
    kernel.CHUNK = chunk
    forward = kernel.forward(u_BD)
    return forward, kernel.gradients(forward)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))


class TestKernels:
    __test__ = INTERPRETED or torch.cuda.is_available()

    @pytest.mark.parametrize(
        ("d", "n", "k", "b", "chunk", "bias"),
        [
            (24, 33, 4, 37, 256, 0.0),
            (40, 130, 6, 20, 4, 0.0),  # three blocks of features; whole chunks inside of most lists
            (33, 7, 7, 9, 3, 0.0),  # K = N
            (1, 1, 1, 5, 2, 1.0),
            (16, 70, 12, 11, 8, -1.2),  # K above the number of positives in many rows
            (300, 20, 5, 1, 256, 0.0),  # one row
        ],
    )
    def test_gradients(self, d: int, n: int, k: int, b: int, chunk: int, bias: float) -> None:
        """Against dense autograd in float64, and against the kernel in plain torch."""
        sae, u_BD = random_sae(d, n, k, 3, bias), unit_rows(b, d, 4)
        forward, gradients = step(sae, u_BD, chunk)
        check(sae, u_BD, (forward, gradients), 1e-6, 1e-5)
        if bias < 0:
            assert 0 < forward.n_active < forward.values_BK.numel()
        plain = ChunkedKernel(sae)
        expected = plain.forward(u_BD)
        assert torch.equal(forward.indices_BK, expected.indices_BK)
        assert torch.equal(forward.dvalues_BK == 0, expected.dvalues_BK == 0)
        for name in ("dvalues_BK", "residual_BD", "residual_sum_D"):
            assert relative(getattr(forward, name), getattr(expected, name)) < 2e-6, name
        for name, reference in plain.gradients(expected)._asdict().items():
            assert relative(getattr(gradients, name), reference) < (1e-5 if name == "b_dec" else 2e-6), name

    def test_duplicate_maxima(self) -> None:
        sae = random_sae(16, 60, 6, 5, bias=-0.8)
        sae.W_enc[30:] = sae.W_enc[:30]  # every preactivation occurs twice
        sae.b_enc[30:] = sae.b_enc[:30]
        u_BD = unit_rows(25, 16, 6)
        check(sae, u_BD, step(sae, u_BD, 8), 1e-6, 1e-5)

    def test_inactive_picks_move_nothing(self) -> None:
        sae = random_sae(16, 40, 4, 5, bias=-50.0)
        forward, gradients = step(sae, unit_rows(8, 16, 6), 4)
        assert forward.n_active == 0 and not forward.dvalues_BK.any()
        assert gradients.W_dec is not None
        assert all(not g.any() for g in (gradients.W_enc, gradients.b_enc, gradients.W_dec))
        assert bool(gradients.b_dec.any())

    def test_a_feature_that_is_active_everywhere(self) -> None:
        """Its pairs are a head, several whole chunks and a tail."""
        sae = random_sae(6, 5, 2, 1)
        sae.b_enc[2] = 3.0
        u_BD = unit_rows(150, 6, 2)
        forward, gradients = step(sae, u_BD, 32)
        assert int((forward.indices_BK == 2).sum()) == 150
        before = int((forward.indices_BK[forward.values_BK > 0] < 2).sum())
        assert before % 32 > 0 and (before + 150) % 32 > 0
        check(sae, u_BD, (forward, gradients), 1e-6, 1e-5)

    def test_scratch_is_overwritten_whatever_it_held(self) -> None:
        """And equal inputs give equal bits."""
        sae, used = random_sae(16, 70, 4, 1), Scratch()
        step(sae, unit_rows(12, 16, 1), 4, scratch=used)
        for b in (5, 12):  # a smaller batch, then a larger one again
            u_BD = unit_rows(b, 16, 2)
            fresh, again = step(sae, u_BD, 4), step(sae, u_BD, 4, scratch=used)
            for mine, theirs in zip((*again[0], *again[1]), (*fresh[0], *fresh[1]), strict=True):
                assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))

    def test_preselection(self) -> None:
        sae, u_BD = random_sae(16, 150, 2, 1), unit_rows(10, 16, 1)
        exact, found = step(sae, u_BD)[0], step(sae, u_BD, preselection="bf16")[0]
        assert torch.equal(found.indices_BK, exact.indices_BK)
        assert relative(found.dvalues_BK, exact.dvalues_BK) < 1e-5

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 / 0 in the padding, never stored
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("eps", [1e-9, 0.0])
    def test_update_is_adam_on_the_written_gradients(self, frozen: bool, eps: float) -> None:
        """Entry by entry: features without a pair are updated too, once they have moments."""
        n, k = (20, 2) if eps else (3, 3)  # without eps every feature needs a gradient
        sae, plain = (random_sae(11, n, k, 1, 0.0 if eps else 5.0) for _ in range(2))
        names = [name for name in TENSOR_NAMES if not (frozen and name == "W_dec")]
        made, other = (TritonKernel(s, frozen_decoder=frozen) for s in (sae, plain))
        mine, theirs = (Adam({name: getattr(s, name) for name in names}, (0.9, 0.999), eps) for s in (sae, plain))
        made.CHUNK = other.CHUNK = 2
        without_pair = 0
        for t in range(3):
            u_BD = unit_rows(6, 11, t)
            forward = made.forward(u_BD)
            for tensor in TENSOR_NAMES:
                getattr(plain, tensor).copy_(getattr(sae, tensor))
            written = other.gradients(other.forward(u_BD))
            without_pair += int((written.b_enc == 0).sum()) if t else 0
            mine.begin(1e-2)
            theirs.begin(1e-2)
            made.update(forward, mine)
            for name in names:
                theirs.apply(name, getattr(written, name))
            if not frozen:
                plain.W_dec.div_(plain.W_dec.norm(dim=1, keepdim=True))
            for name in names:
                assert torch.allclose(getattr(sae, name), getattr(plain, name), rtol=1e-6, atol=1e-8), (name, t)
                assert torch.allclose(mine.first[name], theirs.first[name], rtol=1e-6, atol=1e-9), (name, t)
                assert torch.allclose(mine.second[name], theirs.second[name], rtol=1e-6, atol=1e-12), (name, t)
        assert without_pair > 0 or not eps
        assert torch.equal(sae.W_dec, random_sae(11, n, k, 1).W_dec) == frozen

    @pytest.mark.parametrize("frozen", [False, True])
    def test_training_agrees_with_plain_torch(self, frozen: bool) -> None:
        saes = [TopKSAE(20, 40, 3, seed=1, device=DEVICE) for _ in range(2)]
        start = {name: getattr(saes[0], name).clone() for name in TENSOR_NAMES}
        trainers = [
            SAETrainer(sae, 1e-2, warmup_steps=3, frozen_decoder=frozen, kernel=kernel)
            for sae, kernel in zip(saes, (TritonKernel, "chunked"), strict=True)
        ]
        for t in range(5):
            x_BD = 3 * unit_rows(11, 20, t)
            mine, theirs = (trainer.step(x_BD) for trainer in trainers)
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["l0"] == theirs["l0"]
        for name in TENSOR_NAMES:
            moved = (getattr(saes[1], name) - start[name]).norm()
            assert bool(moved > 0) != (frozen and name == "W_dec")
            assert float((getattr(saes[0], name) - getattr(saes[1], name)).norm()) <= 1e-4 * float(moved), name

    def test_nan_stops_the_step_before_any_change(self) -> None:
        sae = random_sae(16, 40, 4, 1)
        sae.b_enc[30] = torch.nan
        trainer, kept = SAETrainer(sae, kernel=TritonKernel), sae.W_enc.clone()
        with pytest.raises(NonFiniteError):
            trainer.step(unit_rows(5, 16, 1))
        assert torch.equal(sae.W_enc, kept)

    def test_what_the_kernels_do_not_take(self) -> None:
        with pytest.raises(InputError, match=r'float64.*float32.*"chunked"'):
            TritonKernel(TopKSAE(4, 8, 2, dtype=torch.float64, device=DEVICE))
        with pytest.raises(InputError, match=r'd = 8193.*"chunked"'):
            TritonKernel(TopKSAE(MAX_D + 1, 2, 1, device=DEVICE))


class TestOrdinary:
    __test__ = not INTERPRETED

    def test_under_the_interpreter(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[1]
        result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]
        assert "skipped" not in result.stdout

    @pytest.mark.parametrize(("capability", "block"), [(80, 32), (90, MAX_D)])
    def test_kernels_compile(self, capability: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter takes more Python than the compiler does; the compiler needs no GPU."""
        from triton import compile as compile_source
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from glottoscope.sae import triton_loops

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        integers = {"d": "i32", "n": "i32", "indices_BK": "*i64", "order_A": "*i64", "offsets_N1": "*i64", "feature_A": "*i32"}
        numbers = dict.fromkeys(("scale", "keep", "decay", "fresh", "size", "root", "eps"), "fp32")
        constants = {"K": 32, "CHUNK": TritonKernel.CHUNK, "FEATURES": TritonKernel.FEATURES, "PAIRS": TritonKernel.PAIRS}
        for name in ("decode_and_differentiate", "bias_gradients", "sum_whole_chunks", "write_gradients", "update_features"):
            loop = getattr(triton_loops, name)
            for decoder in (True, False):
                given = {**constants, "BLOCK_D": block, "DECODER": decoder}
                given = {key: value for key, value in given.items() if key in loop.arg_names}
                signature = {a: "constexpr" if a in given else {**integers, **numbers}.get(a, "*fp32") for a in loop.arg_names}
                source = ASTSource(loop, signature, constexprs=given)
                options = {"num_warps": warps_of(block)}
                made = compile_source(source, target=GPUTarget("cuda", capability, 32), options=options)
                assert len(made.asm["cubin"]) > 1000, name
                # No atomics, whose order varies; no tensor cores, which would round to TF32.
                assert not any(word in made.asm["ptx"] for word in ("atom.", "red.global", "mma.")), name

    def test_what_is_missing_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton import runtime

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolve_kernel("auto", "cuda") == "chunked"
        with pytest.raises(InputError, match=r'no CUDA device.*TRITON_INTERPRET=1.*kernel = "chunked"'):
            TritonKernel(TopKSAE(4, 8, 2))

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        old = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="cuda", arch=75))
        monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=old))
        assert "capability 7.5, Triton needs 8.0" in str(why_not_triton())
        monkeypatch.setattr(runtime, "driver", SimpleNamespace())  # asking for `active` fails
        assert "AttributeError" in str(why_not_triton())
        old.get_current_target = lambda: SimpleNamespace(backend="cuda", arch=90)
        monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=old))
        assert why_not_triton() is None and resolve_kernel("auto", "cuda") == "triton"
        with pytest.raises(InputError, match=r'float32 on cpu.*on a CUDA device.*"chunked"'):
            TritonKernel(TopKSAE(4, 8, 2))

        monkeypatch.setitem(sys.modules, "triton.runtime", None)
        assert "triton cannot be imported" in str(why_not_triton())
