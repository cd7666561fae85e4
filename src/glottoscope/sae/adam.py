"""Adam whose update can be applied to a few rows of a parameter at a time, so that no whole gradient need exist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as functional_adam

from glottoscope.errors import InputError


class Adam:
    """Moments of named parameters and Kingma and Ba's (2015) rule, as `torch.optim.Adam` computes it.

    A step is `begin(lr)`, then `apply` for every row of every parameter once (or a compiled loop that reads `rule`
    and the moments). Rows without gradient are updated too: this is not a lazy Adam.
    """

    def __init__(self, parameters: Mapping[str, Tensor], betas: tuple[float, float], eps: float) -> None:
        self.parameters = dict(parameters)
        self.betas, self.eps = betas, eps
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.steps = 0
        self.lr = 0.0

    def begin(self, lr: float) -> None:
        """Start an update with learning rate `lr`."""
        self.lr = lr
        self.steps += 1

    @property
    def rule(self) -> tuple[float, float, float, float, float, float]:
        """1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps."""
        beta1, beta2 = self.betas
        size = self.lr / (1 - beta1**self.steps)
        return 1 - beta1, beta2, 1 - beta2, size, 1 / math.sqrt(1 - beta2**self.steps), self.eps

    def apply(self, name: str, gradient: Tensor, rows: slice = slice(None)) -> None:
        """Update `rows` of a parameter with their gradient."""
        tensors = [t[name][rows] for t in (self.parameters, self.first, self.second)]
        # The functional form counts the step itself; fused is one pass over parameters and moments.
        count = torch.tensor(float(self.steps - 1), device=gradient.device)
        functional_adam(
            [tensors[0]], [gradient], [tensors[1]], [tensors[2]], [], [count],
            fused=gradient.device.type in ("cpu", "cuda"), foreach=False, amsgrad=False, maximize=False, weight_decay=0.0,
            beta1=self.betas[0], beta2=self.betas[1], lr=self.lr, eps=self.eps,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Copies of the moments, and the step."""
        moments = {name: {"first": self.first[name].clone(), "second": self.second[name].clone()} for name in self.first}
        return {"steps": self.steps, "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same parameters.

        Raises:
            InputError: it holds other parameters or shapes; nothing has changed then.
        """
        moments = state["moments"]
        if set(moments) != set(self.first):
            held, wanted = (", ".join(sorted(x)) for x in (moments, self.first))
            raise InputError(f"Adam's state is of {held}; this trainer learns {wanted}")
        for name, kept in self.first.items():
            given = tuple(moments[name]["first"].shape)
            if given != tuple(kept.shape):
                raise InputError(f"Adam's state of {name} has shape {given}, expected {tuple(kept.shape)}")
        for name, entry in moments.items():
            self.first[name].copy_(entry["first"])
            self.second[name].copy_(entry["second"])
        self.steps = int(state["steps"])
