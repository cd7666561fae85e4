"""Training one TopK-SAE: the recipe of METHOD's section "SAE" (Inaba et al., arXiv 2503.06394), one batch per call.

Shape suffixes: B batch rows, D d_model, N features, K top-k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glottoscope.errors import InputError, NonFiniteError
from glottoscope.sae.adam import Adam
from glottoscope.sae.encoding import Preselection
from glottoscope.sae.kernels import Kernel, kernel_class
from glottoscope.sae.model import TENSOR_NAMES, TopKSAE, geometric_median
from glottoscope.sae.scratch import Scratch


class SAETrainer:
    """Adam on the mean squared reconstruction error, with unit-norm decoder rows.

    lr_t = lr * min(1, (t + 1) / warmup_steps), then constant. The first step of a never-trained SAE sets b_dec to the
    geometric median of its batch. A trainer touches nothing but its own SAE and buffers: several trainers
    (learning rates, seeds, layers) on one stream give bit for bit what each gives alone.

    Args:
        frozen_decoder: the control in which W_dec keeps its initial directions; W_enc, b_enc and b_dec still learn.
        kernel: a name of `glottoscope.sae.kernels` ("auto": the fastest that runs here), or a subclass of `Kernel`.
        preselection: "bf16" proposes candidates by a bfloat16 product; certain rows keep them, others are recomputed.
        scratch: memory shared with trainers that take turns with this one.
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
        kernel: str | type[Kernel] = "auto",
        preselection: Preselection = "none",
        scratch: Scratch | None = None,
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
        chosen = kernel_class(kernel, sae) if isinstance(kernel, str) else kernel
        if not (isinstance(chosen, type) and issubclass(chosen, Kernel)):
            raise InputError(f"SAE kernel {kernel!r} is neither a name nor a subclass of glottoscope.sae.kernels.Kernel")
        self.kernel = chosen(sae, frozen_decoder=frozen_decoder, scratch=scratch, preselection=preselection)
        trained = [name for name in TENSOR_NAMES if not (frozen_decoder and name == "W_dec")]
        self._adam = Adam({name: getattr(sae, name) for name in trained}, (betas[0], betas[1]), eps)

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step` (0-based)."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> dict[str, float]:
        """One update on raw hidden states x [B, d] of any floating dtype.

        Returns:
            "loss": mean over rows of ||u - u_hat||^2 before the update; "lr": the learning rate used; "l0": mean number
            of active features (value above 0) per row; "recomputed": rows whose bf16 preselection was not certain.

        Raises:
            InputError: x is not [B, d] with B >= 1.
            NonFiniteError: NaN or Inf in x or in the loss; no weight and no optimizer state has changed.
        """
        sae = self.sae
        if x_BD.ndim != 2 or x_BD.shape[1] != sae.d or len(x_BD) == 0:
            raise InputError(f"hidden states of shape {tuple(x_BD.shape)} given to an SAE that needs [B, {sae.d}], B >= 1")
        x_BD = x_BD.detach().to(device=sae.W_enc.device, dtype=sae.W_enc.dtype)
        u_BD, bad = self.kernel.normalise(x_BD)
        if bad:
            raise NonFiniteError(
                f"NaN or Inf in the hidden states of {bad} of {len(x_BD)} positions at SAE step {self.steps}: "
                "load the model in float32 or bfloat16, or check its checkpoint"
            )
        before_D = sae.b_dec.clone()
        if not sae.b_dec_initialised:
            sae.b_dec.copy_(geometric_median(u_BD))
        forward = self.kernel.forward(u_BD)
        if not math.isfinite(forward.loss):
            sae.b_dec.copy_(before_D)
            raise NonFiniteError(
                f"the SAE's loss is {forward.loss} at step {self.steps}: its weights or the hidden states overflow"
            )
        sae.b_dec_initialised = True
        lr = self.learning_rate(self.steps)
        self._adam.begin(lr)
        self.kernel.update(forward, self._adam)
        self.steps += 1
        return {"loss": forward.loss, "lr": lr, "l0": forward.n_active / len(x_BD), "recomputed": forward.recomputed}

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the number of steps made, by name; the tensors themselves, no copies.

        The SAE's own and Adam's moments (`NAME.first`, `NAME.second`). Kernels and scratch memory keep nothing between
        steps. To go on from tensors saved elsewhere, copy into these and call `resume_at`.
        """
        found = {name: getattr(self.sae, name).detach() for name in TENSOR_NAMES}
        for kind, moments in (("first", self._adam.first), ("second", self._adam.second)):
            found |= {f"{name}.{kind}": moment for name, moment in moments.items()}
        return found

    def resume_at(self, steps: int) -> None:
        """Take `tensors` for those after `steps` steps."""
        self.steps = self._adam.steps = steps
        self.sae.b_dec_initialised = self.sae.b_dec_initialised or steps > 0

    def state_dict(self) -> dict[str, Any]:
        """A snapshot (copies) of the SAE's tensors, Adam's moments and the step: resumes exactly."""
        return {
            "settings": dict(self._settings),
            "steps": self.steps,
            "b_dec_initialised": self.sae.b_dec_initialised,
            "sae": {name: getattr(self.sae, name).detach().clone() for name in TENSOR_NAMES},
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a trainer with the same settings and SAE shape.

        Raises:
            InputError: settings or shapes differ; nothing has changed then.
        """
        if "adam" not in state:
            raise InputError("trainer state has no entry 'adam': it was saved by an older version; train again")
        settings = {**state["settings"], "betas": tuple(state["settings"]["betas"])}
        different = [key for key, value in self._settings.items() if settings.get(key) != value]
        if different:
            key = different[0]
            raise InputError(f"trainer state has {key} = {settings.get(key)}, this trainer has {self._settings[key]}")
        for name in TENSOR_NAMES:
            given, own = tuple(state["sae"][name].shape), tuple(getattr(self.sae, name).shape)
            if given != own:
                raise InputError(f"trainer state holds {name} of shape {given}, this SAE has {own}")
        self._adam.load_state_dict(state["adam"])
        with torch.no_grad():
            for name in TENSOR_NAMES:
                getattr(self.sae, name).copy_(state["sae"][name])
        self.sae.b_dec_initialised = state["b_dec_initialised"]
        self.steps = state["steps"]
