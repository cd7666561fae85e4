"""The base model's loss under many conditions: the text is read once per batch, every condition goes on from there.

Shape legend: W windows, B windows of a batch, T positions, U units, S conditions, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.intervention.conditions import Condition
from glottoscope.intervention.parts import Injection
from glottoscope.lm.capture import capture
from glottoscope.lm.losses import check_head, loss_of_hidden
from glottoscope.lm.patch import Step, counted_positions, finish

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[float, float, str], None]


class Windows(NamedTuple):
    """Text cut into windows, each a pass of its own; every target counts in one window only."""

    tokens: NDArray[np.uint32]  # [W, T], padded on the right
    length: NDArray[np.int64]  # [W]
    first: NDArray[np.int64]  # [W] first position whose token is scored there
    unit: NDArray[np.int64]  # [W] unit that the window belongs to


class Measured(NamedTuple):
    """Sums over the scored tokens of every unit."""

    nll: NDArray[np.float64]  # [S, U] nats
    tokens: NDArray[np.int64]  # [U]
    added: NDArray[np.float64]  # [S, U] sum of ||h' - h|| / ||h|| over the patched positions of all layers
    positions: NDArray[np.int64]  # [S, U] how many; 0 where nothing is patched


def mean_norm(added_SU: NDArray[np.float64], positions_SU: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean ||h' - h|| / ||h|| over the positions of some units [S]; NaN where nothing is patched."""
    n_S = positions_SU.sum(axis=1)
    return np.divide(added_SU.sum(axis=1), n_S, out=np.full(len(n_S), np.nan), where=n_S > 0)


def windows(tokens: NDArray[np.integer], lengths: NDArray[np.integer], *, window: int, stride: int, bos_id: int | None) -> Windows:
    """Cut sequences into windows of at most `window` tokens, BOS included; each later one starts `stride` tokens on.

    A window's first tokens, which the window before has scored already, are context only. Every window starts with
    BOS where there is one, as the models were trained; without it a text's first token has no prediction.

    Args:
        tokens: all sequences one after the other, without BOS.
        lengths: of the sequences, which are the units; each at least 1.

    Raises:
        InputError: window or stride out of range.
    """
    prefix = 0 if bos_id is None else 1
    room = window - prefix
    if room < 2 or not 1 <= stride < window:  # without BOS, a later window's first token is scored in the one before
        raise InputError(
            f"window = {window} and stride = {stride}: give a window of at least {2 + prefix} tokens "
            f"and a stride from 1 to {max(1, window - 1)}"
        )
    lengths = np.asarray(lengths, np.int64)
    count_U = 1 + np.maximum(0, -(-(lengths - room) // stride))
    unit_W = np.repeat(np.arange(len(lengths)), count_U)
    number_W = np.arange(len(unit_W)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
    start_W = number_W * stride
    length_W = np.minimum(room, lengths[unit_W] - start_W)
    offset_W = (np.cumsum(lengths) - lengths)[unit_W] + start_W
    # What the window before ended with is context.
    first_W = np.where(number_W == 0, 0, room - stride)
    width = int(length_W.max(initial=0))
    real = np.arange(width) < length_W[:, None]
    result = np.zeros((len(unit_W), width + prefix), np.uint32)
    result[:, prefix:][real] = tokens[(offset_W[:, None] + np.arange(width))[real]]
    if bos_id is not None:
        result[:, 0] = bos_id
    return Windows(result, length_W + prefix, np.maximum(first_W + prefix, 1), unit_W)


def measure(
    base: PreTrainedModel,
    donor: PreTrainedModel | None,
    text: Windows,
    conditions: Sequence[tuple[Condition, Mapping[int, Injection]]],
    layers: Sequence[int],
    *,
    special_ids: Collection[int],
    batch: int,
    other_W: NDArray[np.int64] | None = None,
    report: Report = lambda *_: None,
) -> Measured:
    """Loss of every unit under every condition.

    Args:
        donor: None where no condition needs one.
        conditions: with their edits.
        layers: that any edit patches or reads; the lowest is where every condition goes on from.
        other_W: for the arm `shuffled`, the window whose donor states stand in for each window's own.

    Raises:
        InputError: a loss that is not finite, or a model whose head is not known; names the condition.
    """
    check_head(base)
    if donor is not None:
        check_head(donor)
    n_units = int(text.unit.max(initial=-1)) + 1
    nll_SU = np.zeros((len(conditions), n_units))
    added_SU, positions_SU = np.zeros(nll_SU.shape), np.zeros(nll_SU.shape, np.int64)
    tokens_U = np.zeros(n_units, np.int64)
    device = next(base.parameters()).device
    order = np.argsort(text.length, kind="stable")
    low, shuffles = min(layers), any(condition.arm == "shuffled" for condition, _ in conditions)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        scene = _scene(text, rows, special_ids, device)
        state = capture(base, scene.ids_BT, scene.attention_BT, [low])[low]
        theirs = {} if donor is None else capture(donor, scene.ids_BT, scene.attention_BT, layers)
        steps = {False: Step(scene.ids_BT, scene.counted_BT, theirs)}
        if shuffles:
            assert donor is not None
            assert other_W is not None
            other = _scene(text, other_W[rows], special_ids, device)
            others = capture(donor, other.ids_BT, other.attention_BT, layers)
            source_BT = _places(scene.counted_BT, other.counted_BT)
            steps[True] = Step(scene.ids_BT, scene.counted_BT, others, source_BT)
        for s, (condition, edits) in enumerate(conditions):
            model, known, todo = base, (low, state), edits
            if condition.arm == "donor":
                assert donor is not None
                model, known, todo = donor, (max(theirs), theirs[max(theirs)]), {}
            step = steps[condition.arm == "shuffled"]
            last_BTD = finish(model, scene.ids_BT, scene.attention_BT, known, todo, step)
            nll, n = loss_of_hidden(model, last_BTD, scene.ids_BT, scene.scored_BT, scene.unit_BT, len(scene.units))
            if not np.isfinite(nll).all():
                remedy = "take a smaller alpha" if condition.alpha else "check the model's weights"
                raise InputError(f"condition {describe(condition)}: the loss is not finite; {remedy}")
            nll_SU[s, scene.units] += nll
            for edit in todo.values():
                # A unit may have several windows in a batch.
                np.add.at(added_SU[s], text.unit[rows], edit.last_added_B.numpy())
                np.add.at(positions_SU[s], text.unit[rows], edit.last_positions_B.numpy())
            if s == 0:
                tokens_U[scene.units] += n
        report(min(start + batch, len(order)), len(order), f"{len(conditions)} conditions")
    return Measured(nll_SU, tokens_U, added_SU, positions_SU)


def describe(condition: Condition) -> str:
    """A condition in words."""
    parts = [condition.arm, condition.part, None if condition.draw is None else f"draw {condition.draw}"]
    parts += [None if condition.alpha is None else f"alpha {condition.alpha:g}"]
    return " ".join(p for p in parts if p)


class _Scene(NamedTuple):
    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    counted_BT: torch.Tensor  # may be patched
    scored_BT: torch.Tensor  # its token's loss counts
    unit_BT: torch.Tensor  # place in `units`
    units: NDArray[np.int64]


def _scene(text: Windows, rows: NDArray[np.int64], special_ids: Collection[int], device: torch.device) -> _Scene:
    length_B = text.length[rows]
    longest = int(length_B.max())
    place = np.arange(longest)
    ids = torch.from_numpy(text.tokens[rows, :longest].astype(np.int64)).to(device)
    attention = torch.from_numpy(place < length_B[:, None]).to(device)
    counted = counted_positions(ids, attention, special_ids)
    scored = counted & torch.from_numpy(place >= text.first[rows][:, None]).to(device)
    units, local = np.unique(text.unit[rows], return_inverse=True)
    unit = torch.from_numpy(local.reshape(-1, 1).repeat(longest, axis=1)).to(device)
    return _Scene(ids, attention.long(), counted, scored, unit, units)


def _places(counted_BT: torch.Tensor, other_BT: torch.Tensor) -> torch.Tensor:
    """For the j-th counted position of a row, the place of the j-th of the other row, from the start again at its end."""
    nth_BT = (counted_BT.long().cumsum(1) - 1).clamp_min(0)
    n_B1 = other_BT.sum(1, keepdim=True).clamp_min(1)
    place_BT = torch.argsort(~other_BT, dim=1, stable=True)
    return place_BT.gather(1, nth_BT % n_B1)


def other_windows(text: Windows, language_U: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """For every window one of another unit of its language [W], each taken once.

    Windows of one unit overlap and could tell each other what comes next. Only where a unit has more than half of its
    language's windows do some stay within it; a language's only window takes itself.
    """
    rng = np.random.default_rng(seed)
    result = np.arange(len(text.unit))
    language_W = language_U[text.unit]
    for language in np.unique(language_W):
        mine = np.flatnonzero(language_W == language)
        _, unit, count = np.unique(text.unit[mine], return_inverse=True, return_counts=True)
        # Units side by side in a drawn order: moved by the largest one's windows, every window leaves its unit.
        mine = mine[np.lexsort((rng.permutation(len(mine)), rng.permutation(len(count))[unit]))]
        result[mine] = np.roll(mine, count.max() if len(count) > 1 else 1)
    return result


def masses(
    donor: PreTrainedModel, text: Windows, readers: Mapping[int, Any], *, special_ids: Collection[int], batch: int
) -> dict[int, NDArray[np.float64]]:
    """Activation mass of every feature of the donor's SAEs: layer -> sum of z over the counted positions, [N].

    Args:
        readers: layer -> the SAE's reader.
    """
    device = next(donor.parameters()).device
    result = {layer: np.zeros(reader.sae.n) for layer, reader in readers.items()}
    order = np.argsort(text.length, kind="stable")
    for start in range(0, len(order), batch):
        scene = _scene(text, order[start : start + batch], special_ids, device)
        states = capture(donor, scene.ids_BT, scene.attention_BT, list(readers))
        for layer, reader in readers.items():
            codes = reader.codes(states[layer])
            counted = scene.counted_BT.to(codes.values_BTK.device)
            values, indices = codes.values_BTK[counted].double(), codes.indices_BTK[counted]
            result[layer] += np.bincount(indices.cpu().numpy().ravel(), values.cpu().numpy().ravel(), minlength=reader.sae.n)
    return result
