"""The step by plain dense autograd: holds [B, N], for tests and for checking new kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.sae.kernels.base import Forward, Gradients, Kernel, accumulator


class ReferenceKernel(Kernel):
    """What the other kernels must agree with."""

    name = "reference"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.preselection != "none":
            raise InputError('SAE kernel "reference" is dense and preselects nothing: use another kernel, or preselection = "none"')

    def forward(self, u_BD: Tensor) -> Forward:
        sae = self.sae
        with torch.enable_grad():
            self._leaves = [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
            W_enc_ND, b_enc_N, W_dec_ND, b_dec_D = self._leaves
            pre_BN = (u_BD - b_dec_D) @ W_enc_ND.T + b_enc_N
            values_BK, indices_BK = pre_BN.topk(sae.k, dim=1)
            values_BK = values_BK.relu()
            z_BN = torch.zeros_like(pre_BN).scatter(1, indices_BK, values_BK)
            residual_BD = z_BN @ W_dec_ND + b_dec_D - u_BD
            self._loss = residual_BD.square().sum(1).mean()
            dvalues_BK = torch.autograd.grad(self._loss, values_BK, retain_graph=True)[0] * (values_BK > 0)
        scaled_BD = residual_BD.detach() * (2 / len(u_BD))
        return Forward(
            float(self._loss.detach()), int((values_BK > 0).sum()), 0, values_BK.detach(), indices_BK, dvalues_BK,
            (u_BD - b_dec_D).detach(), scaled_BD, scaled_BD.to(accumulator(u_BD)).sum(0),
        )  # fmt: skip

    def gradients(self, forward: Forward) -> Gradients:
        W_enc_ND, b_enc_N, W_dec_ND, b_dec_D = torch.autograd.grad(self._loss, self._leaves)
        return Gradients(W_enc_ND, b_enc_N, None if self.frozen_decoder else W_dec_ND, b_dec_D)
