"""What a training step is made of, and what every kernel offers.

Shape suffixes: B batch rows, D d_model, N features, K top-k.

With G = 2 (u_hat - u) / B, v the values and dv_bk = <G_b, W_dec[i_bk]> where v_bk > 0, else 0 (ReLU'(0) = 0):
grad W_dec[i] = sum v_b G_b, grad W_enc[i] = sum dv_b (u_b - b_dec), grad b_enc[i] = sum dv_b over the rows b that
picked i; grad b_dec = sum_b G_b - grad b_enc W_enc, a matrix-vector product in place of a third full one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from glottoscope.sae.adam import Adam
from glottoscope.sae.encoding import Preselection
from glottoscope.sae.scratch import Scratch

if TYPE_CHECKING:
    from glottoscope.sae.model import TopKSAE


class Forward(NamedTuple):
    """What the first half of a step leaves for the second; tensors live in scratch memory until the next step."""

    loss: float  # mean over rows of ||u - u_hat||^2; NaN where a preactivation was
    n_active: int  # (row, feature) pairs with a value above 0
    recomputed: int  # rows whose bf16 preselection was not certain
    values_BK: Tensor  # ReLU'd, in falling order
    indices_BK: Tensor  # int64
    dvalues_BK: Tensor
    centred_BD: Tensor  # u - b_dec
    residual_BD: Tensor  # G
    residual_sum_D: Tensor  # float64 where the device has it


class Gradients(NamedTuple):
    """Gradients of the loss, each of its parameter's shape; W_dec is None where the decoder is frozen."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor | None
    b_dec: Tensor


class Kernel:
    """One SAE's training step in two halves: `forward` changes nothing, `update` changes the parameters.

    A subclass gives `forward` and `gradients`; one that need not hold whole gradients gives `update` too.
    """

    name = ""

    def __init__(
        self, sae: TopKSAE, *, frozen_decoder: bool = False, scratch: Scratch | None = None, preselection: Preselection = "none"
    ) -> None:
        self.sae, self.frozen_decoder = sae, frozen_decoder
        self.preselection: Preselection = preselection
        self.scratch = Scratch() if scratch is None else scratch

    def normalise(self, x_BD: Tensor) -> tuple[Tensor, int]:
        """(u [B, D] of the SAE's dtype, number of rows with NaN or Inf) from raw states of that dtype."""
        # One pass without a mask in memory; the slow exact test runs only where the sum is suspicious.
        bad = 0
        if not math.isfinite(x_BD.sum().item()):
            bad = int((~x_BD.isfinite()).any(1).sum())
        return self.sae.normalize(x_BD), bad

    def forward(self, u_BD: Tensor) -> Forward:
        """Loss and sparse codes at u [B, D], already normalised."""
        raise NotImplementedError

    def gradients(self, forward: Forward) -> Gradients:
        """The exact gradients, written out whole."""
        raise NotImplementedError

    def update(self, forward: Forward, adam: Adam) -> None:
        """One Adam update of every parameter (`adam.begin` has been called), and the unit norm of decoder rows."""
        for name, gradient in self.gradients(forward)._asdict().items():
            if gradient is not None:
                adam.apply(name, gradient)
        if not self.frozen_decoder:
            unit_norm(self.sae.W_dec)


def unit_norm(rows_XD: Tensor) -> None:
    """Divide every row by its norm, in place."""
    rows_XD.div_(torch.linalg.vector_norm(rows_XD, dim=1, keepdim=True))


def accumulator(tensor: Tensor) -> torch.dtype:
    """float64, which keeps long sums exact whatever the chunking; Apple GPUs have none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
