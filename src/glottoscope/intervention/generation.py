"""Greedy translation with a patched model: batches, a cache, and a donor that reads along.

What all prompts begin with (the few-shot examples) goes through the models once and is then shared by the batch.

Shape legend: B sequences, P prefix, T positions of the prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from glottoscope.intervention.parts import Injection
from glottoscope.lm.capture import cached_arguments
from glottoscope.lm.patch import Donor, patched

Report = Callable[[float, float, str], None]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prefix: Sequence[int],
    rows: NDArray[np.integer],
    length: NDArray[np.integer],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch: int,
    edits: Mapping[int, Injection] | None = None,
    donor: PreTrainedModel | None = None,
    special_ids: Collection[int] = (),
    report: Report = lambda *_: None,
) -> list[list[int]]:
    """The most likely next token, again and again, until a stop token: new ids of every row, without the stop token.

    Args:
        prefix: ids that all prompts begin with; may be empty.
        rows: [R, T] what follows it, padded on the left; length [R], each at least 1.
        edits, donor: the patch; every position of prompt and output that is not masked goes through it.
        special_ids: tokens whose positions are not patched.

    Raises:
        InputError: from the patch (widths, layers).
    """
    result: list[list[int]] = [[] for _ in rows]
    # Rows of like length share a batch: less padding, and they end at about the same step.
    order = np.argsort(length, kind="stable")
    reader = None if donor is None or not edits else Donor(donor, sorted(edits))
    with patched(model, edits or {}, special_ids=special_ids, donor=reader):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = int(length[chosen].max())
            ids = torch.from_numpy(rows[chosen, rows.shape[1] - longest :].astype(np.int64))
            real = torch.from_numpy(np.arange(longest) >= longest - length[chosen][:, None])
            found = _continue(model, reader, prefix, ids, real, max_new_tokens, stop_ids)
            for row, new in zip(chosen.tolist(), found, strict=True):
                result[row] = new
            report(min(start + batch, len(order)), len(order), "sentences")
    return result


def _continue(
    model: PreTrainedModel, donor: Donor | None, prefix: Sequence[int], ids_BT: Tensor, real_BT: Tensor, max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[list[int]]:  # fmt: skip
    device = next(model.parameters()).device
    n_rows = len(ids_BT)
    cache = DynamicCache()
    attention = real_BT.to(device).long()
    if prefix:
        ids_1P = torch.tensor([list(prefix)], device=device)
        _read(model, ids_1P, torch.ones_like(ids_1P), cache)
        cache.batch_repeat_interleave(n_rows)
        if donor is not None:
            donor.repeat(n_rows)
        attention = torch.cat([attention.new_ones(n_rows, len(prefix)), attention], dim=1)
    stops = torch.tensor(sorted(stop_ids), device=device)
    ids = ids_BT.to(device)
    rows = torch.arange(n_rows, device=device)  # whose outputs are not finished
    new_BN = torch.full((n_rows, max_new_tokens), -1, dtype=torch.long, device=device)
    for n in range(max_new_tokens):
        last_BD = _read(model, ids, attention, cache)[:, -1]
        head = model.get_output_embeddings()
        assert head is not None
        token_B = head(last_BD).argmax(-1)
        going_B = ~torch.isin(token_B, stops)
        new_BN[rows, n] = torch.where(going_B, token_B, -1)
        if not bool(going_B.any()) or n == max_new_tokens - 1:
            break
        # Once a quarter of the rows have ended, go on with the others only: less work per step than copying the cache costs.
        if int(going_B.sum()) <= 0.75 * len(rows):
            kept = going_B.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            if donor is not None:
                donor.select(kept)
            rows, token_B, attention = rows[kept], token_B[kept], attention[kept]
        ids = token_B[:, None]
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
    # A row that had ended but was still carried along has written after its end.
    new = new_BN.cpu().numpy()
    ended = np.argmax(new == -1, axis=1)
    ended[~(new == -1).any(axis=1)] = max_new_tokens
    return [row[:end].tolist() for row, end in zip(new, ended, strict=True)]


def _read(model: PreTrainedModel, ids: Tensor, attention: Tensor, cache: DynamicCache) -> Tensor:
    arguments = cached_arguments(model, attention, ids.shape[1])
    return model.base_model(input_ids=ids, past_key_values=cache, **arguments).last_hidden_state
