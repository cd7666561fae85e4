"""Greedy translation with a patched model: batches, a cache, and a donor that reads along.

What all prompts begin with (the few-shot examples) goes through the models once and is then shared by the batch.

Shape legend: B sequences, P prefix, T positions of the prompts, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glottoscope.intervention.parts import Injection
from glottoscope.lm.capture import cached_arguments
from glottoscope.lm.llama_pass import knows
from glottoscope.lm.llama_steps import LlamaSteps
from glottoscope.lm.patch import Donor, Step, check_layers, counted_positions, patched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[float, float, str], None]


class Reading(Protocol):
    """A batch that the patched model reads, some positions at a time."""

    def read(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """State after the final norm [B, T, D] at new positions; padding on the left and only at the beginning."""
        ...

    def repeat(self, times: int) -> None:
        """Let the one sequence read so far be what `times` sequences begin with."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these sequences only."""
        ...


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prefix: Sequence[int],
    rows: NDArray[np.integer],
    length: NDArray[np.integer],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    last_ids: Collection[int] = (),
    batch: int,
    edits: Mapping[int, Injection] | None = None,
    donor: PreTrainedModel | None = None,
    special_ids: Collection[int] = (),
    report: Report = lambda *_: None,
) -> list[list[int]]:
    """The most likely next token, again and again, until one that ends the row: new ids of every row.

    What the edits sum up counts the positions of a row's prompt, beginning included, and of its output as far as it was
    read, each once: it does not depend on `batch`.

    Args:
        prefix: ids that all prompts begin with; may be empty.
        rows: [R, T] what follows it, padded on the left; length [R], each at least 1.
        stop_ids: tokens that end a row and are not part of it.
        last_ids: tokens that end a row and are its last.
        edits, donor: the patch; every position of prompt and output that is not masked goes through it.
        special_ids: tokens whose positions are not patched.

    Raises:
        InputError: from the patch (widths, layers).
    """
    result: list[list[int]] = [[] for _ in rows]
    # Rows of like length share a batch: less padding, and they end at about the same step.
    order = np.argsort(length, kind="stable")
    start_reading, context = _reader(model, edits or {}, donor if edits else None, special_ids)
    device = next(model.parameters()).device
    with context:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = int(length[chosen].max())
            ids = torch.from_numpy(rows[chosen, rows.shape[1] - longest :].astype(np.int64)).to(device)
            real = torch.from_numpy(np.arange(longest) >= longest - length[chosen][:, None]).to(device)
            rules = _Rules(max_new_tokens, frozenset(stop_ids), frozenset(last_ids))
            found = _continue(model, start_reading(), prefix, ids, real, rules, list((edits or {}).values()))
            for row, new in zip(chosen.tolist(), found, strict=True):
                result[row] = new
            report(min(start + batch, len(order)), len(order), "sentences")
    return result


def _reader(
    model: PreTrainedModel, edits: Mapping[int, Injection], donor: PreTrainedModel | None, special_ids: Collection[int]
) -> tuple[Callable[[], Reading], AbstractContextManager[None]]:
    """What starts reading a batch, and the context in which it works: hooks, where the model is not a plain Llama."""
    if knows(model) and (donor is None or knows(donor)):
        for owner in (model, donor):
            if owner is not None:
                check_layers(owner, edits)
        return lambda: _PlainReading(model, edits, donor, special_ids), nullcontext()
    along = None if donor is None else Donor(donor, sorted(edits))
    return lambda: _HookedReading(model, along), patched(model, edits, special_ids=special_ids, donor=along)


class _HookedReading:
    """Any model, through its own forward pass."""

    def __init__(self, model: PreTrainedModel, donor: Donor | None) -> None:
        self._model, self._donor = model, donor
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._attention: Tensor | None = None

    def read(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        real = real_BT.long()
        self._attention = real if self._attention is None else torch.cat([self._attention, real], dim=1)
        arguments = cached_arguments(self._model, self._attention, ids_BT.shape[1])
        return self._model.base_model(input_ids=ids_BT, past_key_values=self._cache, **arguments).last_hidden_state

    def repeat(self, times: int) -> None:
        assert self._attention is not None
        self._cache.batch_repeat_interleave(times)
        self._attention = self._attention.repeat_interleave(times, 0)
        if self._donor is not None:
            self._donor.repeat(times)

    def select(self, rows: Tensor) -> None:
        assert self._attention is not None
        self._cache.batch_select_indices(rows)
        self._attention = self._attention[rows]
        if self._donor is not None:
            self._donor.select(rows)


class _PlainReading:
    """Plain Llamas on a CPU."""

    def __init__(
        self, model: PreTrainedModel, edits: Mapping[int, Injection], donor: PreTrainedModel | None, special_ids: Collection[int]
    ) -> None:
        self._edits, self._special = edits, special_ids
        self._base = LlamaSteps(model)
        self._donor = None if donor is None else LlamaSteps(donor, max(edits))

    def read(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        theirs = {} if self._donor is None else self._donor.read(ids_BT, real_BT)[0]
        step = Step(ids_BT, counted_positions(ids_BT, real_BT, self._special), theirs)
        edits = {layer: lambda x_BTD, edit=edit: edit(x_BTD, step) for layer, edit in self._edits.items()}
        last_BTD = self._base.read(ids_BT, real_BT, edits)[1]
        assert last_BTD is not None
        return last_BTD

    def repeat(self, times: int) -> None:
        self._base.repeat(times)
        if self._donor is not None:
            self._donor.repeat(times)

    def select(self, rows: Tensor) -> None:
        self._base.select(rows)
        if self._donor is not None:
            self._donor.select(rows)


class _Rules(NamedTuple):
    """When a row ends."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    last_ids: frozenset[int]


def _continue(
    model: PreTrainedModel, reading: Reading, prefix: Sequence[int], ids_BT: Tensor, real_BT: Tensor, rules: _Rules,
    edits: Sequence[Injection],
) -> list[list[int]]:  # fmt: skip
    device, n_rows, max_new_tokens = ids_BT.device, len(ids_BT), rules.max_new_tokens
    if prefix:
        ids_1P = torch.tensor([list(prefix)], device=device)
        _weigh(edits, torch.tensor([n_rows]))  # read once for all rows
        reading.read(ids_1P, torch.ones_like(ids_1P, dtype=torch.bool))
        reading.repeat(n_rows)
    head = model.get_output_embeddings()
    assert head is not None
    stops, lasts = (torch.tensor(sorted(x), dtype=torch.long, device=device) for x in (rules.stop_ids, rules.last_ids))
    rows = torch.arange(n_rows, device=device)
    going_B = torch.ones(n_rows, dtype=torch.bool, device=device)  # of those still carried along
    new_BN = torch.full((n_rows, max_new_tokens), -1, dtype=torch.long, device=device)
    ids, real = ids_BT, real_BT
    for n in range(max_new_tokens):
        _weigh(edits, going_B)  # rows that have ended are read on and count no more
        token_B = head(reading.read(ids, real)[:, -1]).argmax(-1)
        going_B = going_B & ~torch.isin(token_B, stops)
        new_BN[rows, n] = torch.where(going_B, token_B, -1)
        going_B = going_B & ~torch.isin(token_B, lasts)
        if not bool(going_B.any()) or n == max_new_tokens - 1:
            break
        # Once a quarter of the rows have ended, the others go on alone: copying what is kept of them costs a step.
        if int(going_B.sum()) <= 0.75 * len(rows):
            kept = going_B.nonzero()[:, 0]
            reading.select(kept)
            rows, token_B, going_B = rows[kept], token_B[kept], going_B[kept]
        ids = token_B[:, None]
        real = torch.ones_like(ids, dtype=torch.bool)
    new = new_BN.cpu().numpy()
    ended = np.where((new == -1).any(axis=1), np.argmax(new == -1, axis=1), max_new_tokens)
    _weigh(edits, None)
    return [row[:end].tolist() for row, end in zip(new, ended, strict=True)]


def _weigh(edits: Sequence[Injection], weight_B: Tensor | None) -> None:
    for edit in edits:
        edit.weight_B = weight_B
