"""What is done to the base model in one condition: an arm, a part, a draw and an alpha, as edits of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from glottoscope.intervention.parts import Injection, Kind, Mode, Reader, Scale
from glottoscope.sae.model import TopKSAE

Arm = Literal[
    "baseline", "donor", "part", "random", "random_other", "self", "shuffled", "reconstruction", "state", "state_replaced",
    "identity",
]  # fmt: skip
KINDS: dict[str, Kind] = {
    "part": "part", "random": "part", "random_other": "part", "self": "self", "shuffled": "shuffled",
    "reconstruction": "reconstruction", "state": "state", "state_replaced": "state_replaced", "identity": "identity",
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """One thing done to the base model.

    Attributes:
        arm: baseline (nothing), donor (the donor model itself), part, random and random_other (draws matched to `part`,
            from all alive features and from those outside it), self, shuffled, and the ceilings and checks that
            `parts.Injection` describes.
        features: name of the set of features in the plan; None where the arm takes none.
    """

    arm: Arm
    part: str | None = None
    draw: int | None = None
    alpha: float | None = None
    chosen: bool = True
    features: str | None = None


@dataclass(frozen=True, eq=False)
class Readers:
    """The SAEs of one layer: the donor's on the donor's state and on the base's, and the base's own on its own."""

    donor: Reader
    donor_on_base: Reader
    base: Reader | None

    @classmethod
    def of(cls, donor: TopKSAE, base: TopKSAE | None) -> Readers:
        return cls(Reader(donor), Reader(donor), Reader(base) if base is not None else None)


def edits_of(
    condition: Condition,
    readers: Mapping[int, Readers],
    sets: Mapping[int, Mapping[str, NDArray[np.bool_]]],
    mode: Mode,
    scale: Scale,
) -> dict[int, Injection]:
    """The edits of a condition, by layer; none for the baseline and the donor.

    Args:
        sets: layer -> name -> bool [N] features of the SAE that the arm reads with.
    """
    if condition.arm in ("baseline", "donor"):
        return {}
    kind = KINDS[condition.arm]
    result = {}
    for layer, found in readers.items():
        reader = found.base if kind in ("self", "identity") else found.donor
        assert reader is not None
        weight = None
        if condition.features is not None:
            weight = torch.tensor(sets[layer][condition.features]).to(reader.sae.W_dec)
        result[layer] = Injection(
            reader, layer, kind, weight, 1.0 if condition.alpha is None else condition.alpha,
            # Own features put in place of own features are no change: the own part is always added.
            "add" if kind == "self" else mode, scale, found.donor_on_base,
        )  # fmt: skip
    return result


def added_norm(edits: Sequence[Injection]) -> float | None:
    """Mean ||h' - h|| / ||h|| over the patched positions of all layers; None where nothing was patched."""
    positions = sum(edit.positions for edit in edits)
    return sum(edit.added for edit in edits) / positions if positions else None
