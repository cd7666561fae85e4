"""Shuffled batches of hidden states for all layers at once, from one LM pass per epoch.

The generator alone decides which position lies where in the buffer, never the states. So the buffer of any step can be
rebuilt: the decisions are replayed with the positions' numbers, and only the chunks that lie in it are computed again.

Shape suffixes: M positions of one chunk, C buffer capacity in positions, B batch rows, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from glottoscope.errors import InputError

Batch = dict[int, Tensor]  # layer -> x [batch_size, D]


class Chunk:
    """Some neighbouring counted positions: how many is known at once, their hidden states are computed when first needed.

    Args:
        size: M.
        states: computes {layer: x [M, D]}; called once at most.
    """

    def __init__(self, size: int, states: Callable[[], dict[int, Tensor]]) -> None:
        self.size = size
        self._compute = states
        self._states: dict[int, Tensor] | None = None

    def states(self) -> dict[int, Tensor]:
        """layer -> x [M, D].

        Raises:
            InputError: a layer has another number of positions than the chunk said.
        """
        if self._states is None:
            found = self._compute()
            if any(len(x) != self.size for x in found.values()):
                lengths = {layer: len(x) for layer, x in found.items()}
                raise InputError(f"layers of one chunk of hidden states have {lengths} positions, not {self.size}")
            self._states = found
        return self._states


class ShuffledActivations:
    """Exactly `n_steps` batches {layer: x [batch_size, D]}, every layer's rows from the same positions.

    Chunks fill a buffer of `buffer_tokens` positions; when it is full, a random half leaves in batches and the
    buffer is filled again, so neighbouring positions of a document spread over many batches. Within an epoch each
    position is used once, but for a tail of fewer than `batch_size`. An epoch that fits the buffer stays there:
    later epochs reshuffle it and `chunks_for` is not called again. Iterating again gives the same batches.

    Args:
        chunks_for: epoch -> chunks of counted positions (masked ones left out), in the caller's order of blocks, which
            should differ from epoch to epoch where the epoch exceeds the buffer. The same chunks at every call.
        buffer_tokens: bound on positions held per layer; memory is buffer_tokens * D * itemsize * layers.
        seed: with the chunks, determines the batches.

    Raises:
        InputError: the buffer is smaller than a batch; when iterated: an epoch has fewer positions than a batch, or a
            chunk's layers differ in their number of positions.
    """

    def __init__(
        self,
        chunks_for: Callable[[int], Iterable[Chunk]],
        *,
        batch_size: int,
        n_steps: int,
        buffer_tokens: int,
        seed: int,
    ) -> None:
        if batch_size < 1 or buffer_tokens < batch_size:
            raise InputError(f"buffer_tokens = {buffer_tokens} is below batch_size = {batch_size}: raise buffer_tokens")
        self._chunks_for = chunks_for
        self._batch_size, self._n_steps = batch_size, n_steps
        self._buffer_tokens, self._seed = buffer_tokens, seed

    def __len__(self) -> int:
        return self._n_steps

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate_from(0)

    def iterate_from(self, step: int) -> Iterator[Batch]:
        """The batches from number `step` (0-based) on, bit for bit as if all before it had been taken.

        Only chunks with positions that are still in the buffer at that step are computed. An epoch that fits the buffer
        is read as a whole. Memory is that of the whole iteration.
        """
        if step >= self._n_steps:
            return
        generator = torch.Generator().manual_seed(self._seed)
        buffer = _Buffer(self._buffer_tokens, self._batch_size, generator, asleep=step > 0)
        batches = self._batches(buffer)
        for _ in range(step):
            next(batches)
        if step > 0:
            buffer.wake(self._chunks_for)
        yield from batches

    def _batches(self, buffer: _Buffer) -> Iterator[Batch]:
        left, epoch = self._n_steps, 0
        whole_epoch = 0  # positions of an epoch that fits the buffer
        while left > 0:
            n_batches = 0
            source = self._keep(buffer, whole_epoch) if whole_epoch else self._stream(buffer, epoch)
            for batch in source:
                n_batches += 1
                left -= 1
                yield batch
                if left == 0:
                    return
            if n_batches == 0:
                raise InputError(
                    f"epoch {epoch} of the SAE's training text has {buffer.seen} positions, fewer than one batch of "
                    f"{self._batch_size}: lower the batch size or add text"
                )
            whole_epoch = buffer.seen if buffer.fits else 0
            epoch += 1

    def _stream(self, buffer: _Buffer, epoch: int) -> Iterator[Batch]:
        buffer.begin(epoch)
        for number, chunk in enumerate(self._chunks_for(epoch)):
            start = 0
            while start < chunk.size:
                if buffer.is_full:
                    yield from buffer.emit(half=True)
                start += buffer.put(number, chunk, start)
        yield from buffer.emit(half=False)

    def _keep(self, buffer: _Buffer, size: int) -> Iterator[Batch]:
        buffer.size = size
        yield from buffer.emit(half=False)


class _Buffer:
    """Storage [C, D] per layer with `size` filled rows, and one permutation for all layers.

    Asleep it holds the positions' numbers in their epoch in place of their states, and gives empty batches.
    """

    def __init__(self, capacity: int, batch_size: int, generator: torch.Generator, *, asleep: bool = False) -> None:
        self._capacity, self._batch_size, self._generator = capacity, batch_size, generator
        self._storage: dict[int, Tensor] = {}
        self._positions_C = torch.full((capacity,), -1) if asleep else None  # -1: no batch needs this row any more
        self._last: tuple[int, Chunk] | None = None  # the chunk last put, which may not be used up
        self._epoch = 0
        self.size = 0
        self.seen = 0  # positions put since the epoch began

    @property
    def is_full(self) -> bool:
        return self.size == self._capacity

    @property
    def fits(self) -> bool:
        """Whether all positions of the epoch so far fit."""
        return self.seen <= self._capacity

    def begin(self, epoch: int) -> None:
        self._epoch, self._last = epoch, None
        self.size = self.seen = 0

    def put(self, number: int, chunk: Chunk, start: int) -> int:
        """Copy rows of a chunk from `start` on, as many as fit; returns their number."""
        self._last = number, chunk  # the one before is let go of before this one is computed
        n_taken = min(chunk.size - start, self._capacity - self.size)
        places = slice(self.size, self.size + n_taken)
        if self._positions_C is not None:
            self._positions_C[places] = torch.arange(self.seen, self.seen + n_taken)
        else:
            for layer, x_MD in chunk.states().items():
                self._rows(layer, x_MD)[places] = x_MD[start : start + n_taken]
        self.size += n_taken
        self.seen += n_taken
        return n_taken

    def _rows(self, layer: int, like_MD: Tensor) -> Tensor:
        if layer not in self._storage:
            shape = (self._capacity, like_MD.shape[1])
            self._storage[layer] = torch.empty(shape, dtype=like_MD.dtype, device=like_MD.device)
        return self._storage[layer]

    def emit(self, *, half: bool) -> Iterator[Batch]:
        """Batches of randomly drawn rows, which leave the buffer: half of it (at least one batch), or all of it.

        Emitting all drops fewer than `batch_size` rows and leaves the storage as it was, for reuse.
        """
        batch = self._batch_size
        n_batches = max(1, self.size // (2 * batch)) if half else self.size // batch
        permutation = torch.randperm(self.size, generator=self._generator)
        read_again = not half and self.fits
        if not half and not read_again:
            self._forget(permutation[n_batches * batch :])
        for i in range(n_batches):
            rows = permutation[i * batch : (i + 1) * batch]
            if not read_again:
                self._forget(rows)
            yield {layer: x_CD.index_select(0, rows.to(x_CD.device)) for layer, x_CD in self._storage.items()}
        if half:
            self._close_gaps(permutation, n_batches * batch)
        else:
            self.size = 0

    def _forget(self, rows: Tensor) -> None:
        if self._positions_C is not None:
            self._positions_C[rows] = -1

    def _close_gaps(self, permutation: Tensor, n_gone: int) -> None:
        """Move kept rows from the end into the places of the rows that left."""
        n_kept = self.size - n_gone
        gone, kept = permutation[:n_gone], permutation[n_gone:]
        holes, movers = gone[gone < n_kept], kept[kept >= n_kept]
        tables = list(self._storage.values()) + ([] if self._positions_C is None else [self._positions_C])
        for x_CD in tables:
            x_CD[holes.to(x_CD.device)] = x_CD.index_select(0, movers.to(x_CD.device))
        self.size = n_kept

    def wake(self, chunks_for: Callable[[int], Iterable[Chunk]]) -> None:
        """Put the states in the places of their numbers, chunk by chunk, and go on with states."""
        assert self._positions_C is not None
        held_C = self._positions_C[: self.size]
        position_H, order_H = held_C.sort()
        skipped = int((position_H < 0).sum())
        position_H, place_H = position_H[skipped:], order_H[skipped:]
        self._positions_C = None
        first = low = 0
        for number, chunk in enumerate(chunks_for(self._epoch)):
            if low == len(position_H):
                break
            high = int(torch.searchsorted(position_H, first + chunk.size))
            if high > low:
                # The one that was being put is not done: its states are computed for both at once.
                source = self._last[1] if self._last is not None and self._last[0] == number else chunk
                for layer, x_MD in source.states().items():
                    rows, places = position_H[low:high] - first, place_H[low:high]
                    self._rows(layer, x_MD)[places.to(x_MD.device)] = x_MD.index_select(0, rows.to(x_MD.device))
            first, low = first + chunk.size, high
