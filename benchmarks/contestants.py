"""One measurement in a process of its own: a training step, an encode, or the bare encoder product.

    python benchmarks/contestants.py '{"what": "train", "contestant": "sparsify", "d": 512, "n": 8192, "B": 2048, "k": 32,
                                       "steps": 3, "threads": 1, "fast": false}'

glottoscope's training step also needs "kernel": a kernel's name, or NAME+bf16 for the bf16 preselection.

Prints one line of JSON. Everybody gets the same batches, the same Adam (lr 1e-3, betas 0.9 and 0.999, eps 6.25e-10, no
warm-up) and float32, and takes the step as its own training loop takes it: SAELens through SAETrainer.fit, sparsify through
Trainer.fit on a language model that looks its hidden states up, dictionary_learning through TopKTrainer.update, which its
loop calls and nothing else. Time runs from one request for a batch to the next, so it holds all that a loop does.
Shape suffixes: S batches, B rows, D d_model, N features.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import MB, peak_memory, reset_peak
from torch import Tensor, nn

BATCHES = 2  # distinct batches, taken in turn
PRODUCT_CHUNKS = (256, 512, 2048)
LONG = 8.0  # seconds of the first step above which only two steps are timed
LR, BETAS, EPS = 1e-3, (0.9, 0.999), 6.25e-10
ENDLESS = 10_000  # steps that the loops are told to take; the clock ends them
TINY = {"d": 32, "n": 256, "B": 64, "k": 4}

Task = dict[str, Any]


class Enough(Exception):
    """Ends a training loop from inside its request for a batch."""


class Clock:
    """Times each step by the requests for batches: the first step is the warm-up and does not count."""

    def __init__(self, steps: int) -> None:
        self.wanted, self.times = steps, list[float]()
        self.facts: dict[str, Any] = {}  # more for the record

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times)][1:]

    def tick(self) -> int:
        """Called at each request; the number of the batch to hand out.

        Raises:
            Enough: all steps are taken.
        """
        self.times.append(time.perf_counter())
        done = len(self.times) - 1
        wanted = min(self.wanted, 2) if done and self.times[1] - self.times[0] > LONG else self.wanted
        if done > wanted:
            raise Enough
        return done % BATCHES


def hidden_states(d: int, B: int, *, unit: bool) -> Tensor:
    """[S, B, D], the same in every process: Gaussian, coordinate j with standard deviation j^-1/2, no mean.

    Rows have unit norm (unit = True: for the peers, whose input is expected to be scaled), or the same directions with
    log-normal norms (for glottoscope, which normalises them itself).
    """
    generator = torch.Generator().manual_seed(0)
    x_SBD = torch.randn(BATCHES, B, d, generator=generator)
    x_SBD *= torch.arange(1, d + 1) ** -0.5
    x_SBD /= torch.linalg.vector_norm(x_SBD, dim=2, keepdim=True)
    return x_SBD if unit else x_SBD.mul_(torch.randn(BATCHES, B, 1, generator=generator).mul_(0.5).exp_().mul_(10))


def batches(task: Task, clock: Clock, *, unit: bool = True) -> Iterator[Tensor]:
    """Batches [B, D] until the clock has seen enough."""
    x_SBD = hidden_states(task["d"], task["B"], unit=unit)
    while True:
        yield x_SBD[clock.tick()]


def set_eps(optimizer: torch.optim.Optimizer) -> None:
    """Adam's eps for a peer that has no setting for it."""
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == BETAS and group["lr"] == LR
        group["eps"] = EPS


def train_glottoscope(task: Task, clock: Clock) -> None:
    from glottoscope.sae.model import TopKSAE
    from glottoscope.sae.trainer import SAETrainer

    kernel, _, preselection = task["kernel"].partition("+")
    sae = TopKSAE(task["d"], task["n"], task["k"], seed=0)
    trainer = SAETrainer(sae, LR, 0, eps=EPS, betas=BETAS, kernel=kernel, preselection=preselection or "none")
    clock.facts["kernel"] = type(trainer.kernel).__name__
    for x_BD in batches(task, clock, unit=False):
        trainer.step(x_BD)


def train_saelens(task: Task, clock: Clock) -> None:
    """SAETrainer.fit. Its decoder rows are not reset: hidden states are scaled by their norms instead (its default)."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=task["d"], d_sae=task["n"], k=task["k"], aux_loss_coefficient=0.0))
    config = SAETrainerConfig(
        total_training_samples=ENDLESS * task["B"], train_batch_size_samples=task["B"], lr=LR, lr_end=LR,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1],
    )  # fmt: skip
    trainer = SAETrainer(config, sae, batches(task, clock))
    set_eps(trainer.optimizer)
    trainer.fit()


def train_dictionary_learning(task: Task, clock: Clock) -> None:
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    trainer = TopKTrainer(
        steps=ENDLESS, activation_dim=task["d"], dict_size=task["n"], k=task["k"], layer=0, lm_name="", lr=LR,
        auxk_alpha=0.0, warmup_steps=0, seed=0, device="cpu",
    )  # fmt: skip
    set_eps(trainer.optimizer)
    for step, x_BD in enumerate(batches(task, clock)):
        trainer.update(step, x_BD)


def train_sparsify(task: Task, clock: Clock) -> None:
    """Trainer.fit on a language model of one layer whose hidden states are looked up: token i has state i."""
    from sparsify import SaeConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]
    from transformers import PretrainedConfig, PreTrainedModel

    size = task["B"]

    class Lookup(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.states = nn.Embedding.from_pretrained(hidden_states(task["d"], size, unit=True).flatten(0, 1))
            self.layer = nn.Identity()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(self.states(input_ids))

    class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return ENDLESS

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if task["fast"]:
                torch.set_float32_matmul_precision("medium")  # fit has just set "high"
            return {"input_ids": torch.arange(size) + clock.tick() * size}

    config = TrainConfig(
        SaeConfig(num_latents=task["n"], k=task["k"]), batch_size=1, optimizer="adam", lr=LR, lr_warmup_steps=0,
        hookpoints=["layer"], log_to_wandb=False,
    )  # fmt: skip
    trainer = Trainer(config, Sequences(), Lookup())  # pyright: ignore[reportArgumentType]
    set_eps(trainer.optimizers[0])
    trainer.fit()


def encode_glottoscope(task: Task, clock: Clock) -> None:
    from glottoscope.sae.model import TopKSAE

    sae = TopKSAE(task["d"], task["n"], task["k"], seed=0)
    for x_BD in batches(task, clock, unit=False):
        sae.encode(x_BD)


def encode_saelens(task: Task, clock: Clock) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig  # pyright: ignore[reportMissingImports]

    sae = TopKSAE(TopKSAEConfig(d_in=task["d"], d_sae=task["n"], k=task["k"]))
    _encode(sae, task, clock)


def encode_dictionary_learning(task: Task, clock: Clock) -> None:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK  # pyright: ignore[reportMissingImports]

    _encode(AutoEncoderTopK(task["d"], task["n"], task["k"]), task, clock)


def encode_sparsify(task: Task, clock: Clock) -> None:
    from sparsify import SaeConfig, SparseCoder  # pyright: ignore[reportMissingImports]

    _encode(SparseCoder(task["d"], SaeConfig(num_latents=task["n"], k=task["k"])), task, clock)


@torch.no_grad()
def _encode(sae: Any, task: Task, clock: Clock) -> None:
    for x_BD in batches(task, clock):
        sae.encode(x_BD)


@torch.no_grad()
def encoder_product(task: Task, clock: Clock) -> None:
    """torch.mm of [B, D] by [D, N] into a reused buffer, in row chunks; the fastest chunk counts."""
    rows, n = task["B"], task["n"]
    W_ND = torch.randn(n, task["d"], generator=torch.Generator().manual_seed(1))
    x_BD = hidden_states(task["d"], rows, unit=True)[0]
    medians: dict[int, float] = {}
    for chunk in sorted({min(size, rows) for size in PRODUCT_CHUNKS}):
        buffer, inner = torch.empty(chunk, n), Clock(clock.wanted)
        try:
            while True:
                inner.tick()
                for start in range(0, rows, chunk):
                    part = x_BD[start : start + chunk]
                    torch.mm(part, W_ND.T, out=buffer[: len(part)])
        except Enough:
            medians[chunk] = statistics.median(inner.seconds)
            if not clock.times or medians[chunk] < statistics.median(clock.seconds):
                clock.times = inner.times
    clock.facts |= {"chunks": medians, "gflops": 2e-9 * rows * n * task["d"] / min(medians.values())}


RUNS: dict[tuple[str, str], Callable[[Task, Clock], None]] = {
    ("train", "glottoscope"): train_glottoscope,
    ("train", "saelens"): train_saelens,
    ("train", "dictionary_learning"): train_dictionary_learning,
    ("train", "sparsify"): train_sparsify,
    ("encode", "glottoscope"): encode_glottoscope,
    ("encode", "saelens"): encode_saelens,
    ("encode", "dictionary_learning"): encode_dictionary_learning,
    ("encode", "sparsify"): encode_sparsify,
    ("product", "product"): encoder_product,
}


def take(task: Task, steps: int) -> Clock:
    """Run a task until its clock has seen enough."""
    clock = Clock(steps)
    with contextlib.suppress(Enough):
        RUNS[task["what"], task["contestant"]](task, clock)
    return clock


def choose_matmul(task: Task) -> str:
    """Set the product of this process: torch's default, or the fast one, which glottoscope takes only where it is fp32."""
    if not task["fast"]:
        return "default"
    if task["contestant"] in ("glottoscope", "product"):
        from glottoscope.sae.matmul import enable_fast_matmul

        return "fast" if enable_fast_matmul() else "default (the fast one is not float32 here)"
    torch.set_float32_matmul_precision("medium")
    return "fast"


def main() -> None:
    task: Task = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # peers print
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its own switch: Triton's decoder does not run on a CPU
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    matmul = choose_matmul(task)
    # Imports, lazy initialisation and compiled kernels belong to the baseline, for everybody.
    take({**task, **TINY}, 1)
    gc.collect()
    reset_peak()
    baseline = peak_memory()
    clock = take(task, task["steps"])
    peak = peak_memory()
    seconds = statistics.median(clock.seconds)
    record = {
        "seconds": seconds, "steps": clock.seconds, "tokens_per_second": task["B"] / seconds, "matmul": matmul,
        "peak_mb": peak / MB, "memory_mb": (peak - baseline) / MB, "words": f"{seconds:.3g} s, {(peak - baseline) / MB:,.0f} MB",
        **clock.facts,
    }  # fmt: skip
    print(json.dumps(record), file=out)


if __name__ == "__main__":
    main()
