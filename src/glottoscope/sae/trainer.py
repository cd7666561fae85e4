"""Training one TopK-SAE: the recipe of METHOD's section "SAE" (Inaba et al., arXiv 2503.06394), one batch per call.

Shape suffixes: B batch rows, D d_model, N features, K top-k.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.sae.kernels import Kernel, StepBuffers, get_kernel
from glottoscope.sae.model import TENSOR_NAMES, TopKSAE, geometric_median


class SAETrainer:
    """Adam on the mean squared reconstruction error, with unit-norm decoder rows.

    lr_t = lr * min(1, (t + 1) / warmup_steps), then constant. The first step of a never-trained SAE sets b_dec to the
    geometric median of its batch. A trainer touches nothing but its own SAE and buffers: several trainers
    (learning rates, seeds, layers) on one stream give bit for bit what each gives alone.

    Args:
        frozen_decoder: the control in which W_dec keeps its initial directions; W_enc, b_enc and b_dec still learn.
        kernel: a registered name, or any callable of the `Kernel` protocol.
    """

    def __init__(
        self,
        sae: TopKSAE,
        lr: float = 1e-3,
        warmup_steps: int = 1000,
        *,
        eps: float = 6.25e-10,
        betas: tuple[float, float] = (0.9, 0.999),
        frozen_decoder: bool = False,
        kernel: str | Kernel = "chunked",
    ) -> None:
        if not lr > 0 or warmup_steps < 0:
            raise InputError(f"SAE training needs lr > 0 and warmup_steps >= 0; got lr = {lr}, warmup_steps = {warmup_steps}")
        self.sae = sae
        self.lr, self.warmup_steps, self.frozen_decoder = lr, warmup_steps, frozen_decoder
        self.steps = 0
        self._settings = {
            "lr": lr,
            "warmup_steps": warmup_steps,
            "eps": eps,
            "betas": tuple(betas),
            "frozen_decoder": frozen_decoder,
        }
        self._kernel = get_kernel(kernel) if isinstance(kernel, str) else kernel
        self._buffers = StepBuffers(sae, frozen_decoder=frozen_decoder)
        trained = [name for name in TENSOR_NAMES if not (frozen_decoder and name == "W_dec")]
        self._trained: dict[str, nn.Parameter] = {name: getattr(sae, name) for name in trained}
        # Fused: one pass over parameters and moments; 10 times faster than the default on a CPU.
        fused = sae.W_enc.device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(self._trained.values(), lr, betas, eps, fused=fused)

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step` (0-based)."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> dict[str, float]:
        """One update on raw hidden states x [B, d] of any floating dtype.

        Returns:
            "loss": mean over rows of ||u - u_hat||^2 before the update; "lr": the learning rate used; "l0": mean number
            of active features (value above 0) per row.

        Raises:
            InputError: x is not [B, d] with B >= 1.
            NonFiniteError: NaN or Inf in x or in the loss; no weight and no optimizer state has changed.
        """
        sae = self.sae
        if x_BD.ndim != 2 or x_BD.shape[1] != sae.d or len(x_BD) == 0:
            raise InputError(f"hidden states of shape {tuple(x_BD.shape)} given to an SAE that needs [B, {sae.d}], B >= 1")
        x_BD = x_BD.to(device=sae.W_enc.device, dtype=sae.W_enc.dtype)
        # One pass without a mask in memory; the slow exact test runs only where the sum is suspicious.
        if not math.isfinite(x_BD.sum().item()) and not bool(x_BD.isfinite().all()):
            bad = int((~x_BD.isfinite()).any(1).sum())
            raise NonFiniteError(
                f"NaN or Inf in the hidden states of {bad} of {len(x_BD)} positions at SAE step {self.steps}: "
                "load the model in float32 or bfloat16, or check its checkpoint"
            )
        u_BD = sae.normalize(x_BD)
        before_D = sae.b_dec.clone()
        if not sae.b_dec_initialised:
            sae.b_dec.copy_(geometric_median(u_BD))
        gradients = self._kernel(sae, u_BD, self._buffers)
        loss = float(gradients.loss)
        if not math.isfinite(loss):
            sae.b_dec.copy_(before_D)
            raise NonFiniteError(f"the SAE's loss is {loss} at step {self.steps}: its weights or the hidden states overflow")
        sae.b_dec_initialised = True
        lr = self.learning_rate(self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in self._trained.items():
            parameter.grad = getattr(gradients, name)
        self._optimizer.step()
        for parameter in self._trained.values():
            parameter.grad = None  # an SAE kept after training must not keep the buffers alive
        if not self.frozen_decoder:
            norms_N1 = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
            sae.W_dec.div_(norms_N1)
        self.steps += 1
        return {"loss": loss, "lr": lr, "l0": int((gradients.values > 0).sum()) / len(x_BD)}

    def state_dict(self) -> dict[str, Any]:
        """A snapshot (copies) of the SAE's tensors, Adam's moments and the step: resumes exactly."""
        return {
            "settings": dict(self._settings),
            "steps": self.steps,
            "b_dec_initialised": self.sae.b_dec_initialised,
            "sae": {name: getattr(self.sae, name).detach().clone() for name in TENSOR_NAMES},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same settings and SAE shape.

        Raises:
            InputError: settings or shapes differ; nothing has changed then.
        """
        settings = {**state["settings"], "betas": tuple(state["settings"]["betas"])}
        different = [key for key, value in self._settings.items() if settings.get(key) != value]
        if different:
            key = different[0]
            raise InputError(f"trainer state has {key} = {settings.get(key)}, this trainer has {self._settings[key]}")
        for name in TENSOR_NAMES:
            given, own = tuple(state["sae"][name].shape), tuple(getattr(self.sae, name).shape)
            if given != own:
                raise InputError(f"trainer state holds {name} of shape {given}, this SAE has {own}")
        with torch.no_grad():
            for name in TENSOR_NAMES:
                getattr(self.sae, name).copy_(state["sae"][name])
        # torch keeps references to the given moments; two trainers loaded from one state must not share them.
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.sae.b_dec_initialised = state["b_dec_initialised"]
        self.steps = state["steps"]
