"""A part of a representation, taken apart by an SAE and put into another model's hidden state (METHOD 6).

u = h / ||h||, z = TopK(enc(u)), part_g = sum over the features of g of z_i W_dec,i, without b_dec.
add:     h_base <- h_base + alpha ||h_base|| part_g(donor)
replace: h_base <- h_base + alpha ||h_base|| (part_g(donor) - part_g(base through the same SAE))
at every position that is not masked.

Shape legend: B sequences, T positions, K active features, N features, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.lm.patch import Step
from glottoscope.sae.model import TopKSAE

Mode = Literal["add", "replace"]
Scale = Literal["matched", "raw"]
Kind = Literal["part", "self", "shuffled", "reconstruction", "state", "state_replaced", "identity", "steer"]


class Codes(NamedTuple):
    """Sparse codes of states [B, T, D]."""

    values_BTK: Tensor
    indices_BTK: Tensor
    norm_BT1: Tensor  # of the states


class Reader:
    """An SAE that remembers the codes of the state it read last: many injections read the same one."""

    def __init__(self, sae: TopKSAE) -> None:
        self.sae = sae
        self._state: Tensor | None = None
        self._version: int | None = None
        self._codes: Codes | None = None

    def check(self, x_BTD: Tensor) -> None:
        """Raises InputError where the SAE is of another width than the states."""
        if x_BTD.shape[-1] != self.sae.d:
            raise InputError(f"the SAE reads states of width {self.sae.d}, the model's have width {x_BTD.shape[-1]}")

    def codes(self, x_BTD: Tensor) -> Codes:
        """Codes of raw states.

        Raises:
            InputError: the SAE is of another width.
        """
        # A tensor written to in place is another state; one of inference mode does not say when it was.
        version = None if x_BTD.is_inference() else x_BTD._version
        if self._codes is None or self._state is not x_BTD or version is None or self._version != version:
            self.check(x_BTD)
            values, indices = self.sae.encode(x_BTD)
            norm = torch.linalg.vector_norm(x_BTD.to(values), dim=-1, keepdim=True)
            self._state, self._version, self._codes = x_BTD, version, Codes(values, indices, norm)
        return self._codes


def part_of(sae: TopKSAE, codes: Codes, weight_N: Tensor | None) -> Tensor:
    """sum_i weight_i z_i W_dec,i [B, T, D] in the SAE's normalised space, without b_dec.

    Args:
        weight_N: 1 for the features of the part and 0 for the others (any weights do); None: all features.
    """
    values = codes.values_BTK if weight_N is None else codes.values_BTK * weight_N[codes.indices_BTK]
    k = values.shape[-1]
    flat = F.embedding_bag(codes.indices_BTK.reshape(-1, k), sae.W_dec, per_sample_weights=values.reshape(-1, k), mode="sum")
    return flat.view(*values.shape[:-1], sae.d)


@dataclass(eq=False)
class Injection:
    """An edit (`lm.patch.Edit`) of one layer.

    Kinds: part, self and shuffled add the wanted features' sum, of the donor's state, of the base's own, or of the
    donor's on another text (another position of the same text could tell what comes next). reconstruction puts the SAE's
    reconstruction of the donor's state, b_dec included, in place of the base's state. state adds the donor's whole unit
    state; state_replaced puts the donor's state, as it is, in place of the base's. identity takes the base's own state
    apart and puts it together again with its error: it must change nothing. steer adds the same vector everywhere, the
    sum of the weighted decoder directions.

    Raises, when called:
        InputError: the SAE is of another width, or there is no donor that reads this layer.

    Attributes:
        reader: the SAE that reads the donor's state (self, identity: the base's).
        own: the same SAE for the base's state, for mode replace.
        weight_N: of the features, in the reader's SAE; None: every feature.
        scale: matched gives the donor's part the base's norm, raw leaves it the donor's.
        weight_B: how often each sequence of a pass counts in `added` and `positions`; None: once.
        added, positions: sums over positions of ||h' - h|| / ||h||, and how many.
        last_added_B, last_positions_B: the same of the last pass by sequence, each counted once.
    """

    reader: Reader
    layer: int
    kind: Kind = "part"
    weight_N: Tensor | None = None
    alpha: float = 1.0
    mode: Mode = "add"
    scale: Scale = "matched"
    own: Reader | None = None
    weight_B: Tensor | None = None
    added: float = 0.0
    positions: int = 0
    last_added_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    last_positions_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __call__(self, h_BTD: Tensor, step: Step) -> Tensor:
        if self.alpha == 0 and self.kind not in ("reconstruction", "state_replaced", "identity"):
            self._count(torch.zeros(len(h_BTD), dtype=torch.float64), step)
            return h_BTD  # nothing is added, not even a zero
        self.reader.check(h_BTD)
        # One precision for all arithmetic here, that of the SAE; the model's own only at the end.
        h = h_BTD.to(self.reader.sae.W_dec)
        norm_BT1 = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        changed = torch.where(step.counted_BT[..., None], self._changed(h_BTD, h, norm_BT1, step).to(h_BTD), h_BTD)
        moved_BT = torch.linalg.vector_norm((changed.to(h) - h).detach(), dim=-1)
        norm_BT = norm_BT1.detach()[..., 0]
        share_BT = torch.where(step.counted_BT & (norm_BT > 0), moved_BT / norm_BT, 0)
        self._count(share_BT.double().sum(dim=1), step)
        return changed

    def _count(self, added_B: Tensor, step: Step) -> None:
        self.last_added_B, self.last_positions_B = added_B.cpu(), step.counted_BT.sum(dim=1).cpu()
        weight_B = torch.ones_like(self.last_positions_B) if self.weight_B is None else self.weight_B.to(self.last_positions_B)
        self.added += float((weight_B * self.last_added_B).sum())
        self.positions += int((weight_B * self.last_positions_B).sum())

    def _changed(self, h_BTD: Tensor, h: Tensor, norm_BT1: Tensor, step: Step) -> Tensor:
        sae = self.reader.sae
        if self.kind == "identity":
            u, codes = sae.normalize(h), self.reader.codes(h_BTD)
            u_hat = sae.decode(codes.values_BTK, codes.indices_BTK)
            return self._raw(u_hat + (u - u_hat), norm_BT1)
        if self.kind == "steer":
            assert self.weight_N is not None
            return h + self.alpha * self._raw(self.weight_N @ sae.W_dec, norm_BT1)
        if self.kind != "self" and self.layer not in step.donor:
            raise InputError(f"{self.kind} at layer {self.layer} takes the donor's state and there is no donor that reads it")
        source = h_BTD if self.kind == "self" else step.donor[self.layer]
        if self.kind == "state_replaced":
            return source.to(h)
        codes = self.reader.codes(source)
        if self.kind == "reconstruction":
            return self._scaled(sae.decode(codes.values_BTK, codes.indices_BTK), codes, norm_BT1)
        if self.kind == "state":
            return h + self.alpha * self._scaled(sae.normalize(source), codes, norm_BT1)
        if self.kind == "shuffled":
            codes = _moved(codes, step)
        addition = self._scaled(part_of(sae, codes, self.weight_N), codes, norm_BT1)
        if self.mode == "replace":
            assert self.own is not None
            addition = addition - self._raw(part_of(sae, self.own.codes(h_BTD), self.weight_N), norm_BT1)
        return h + self.alpha * addition

    def _raw(self, unit: Tensor, norm_BT1: Tensor) -> Tensor:
        """From the SAE's space to that of states of this norm."""
        return unit * norm_BT1 if self.reader.sae.normalization == "unit" else unit

    def _scaled(self, part: Tensor, codes: Codes, norm_BT1: Tensor) -> Tensor:
        """A part of the donor's state at the base's norm, or at its own."""
        if self.scale == "raw":
            return self._raw(part, codes.norm_BT1)
        if self.reader.sae.normalization == "unit":
            return part * norm_BT1
        # A state of zeros has no direction that a norm could be given to.
        return part * torch.where(codes.norm_BT1 > 0, norm_BT1 / codes.norm_BT1, 0)


def _moved(codes: Codes, step: Step) -> Codes:
    """Every position's codes taken from the position that the step names."""
    assert step.source_BT is not None
    index = step.source_BT[..., None]
    return Codes(*(part.gather(1, index.expand(*index.shape[:-1], part.shape[-1])) for part in codes))
