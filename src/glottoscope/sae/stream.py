"""Shuffled batches of hidden states for all layers at once, from one LM pass per epoch.

Shape suffixes: M positions of one chunk, C buffer capacity in positions, B batch rows, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from glottoscope.errors import InputError


class ShuffledActivations:
    """Exactly `n_steps` batches {layer: x [batch_size, D]}, every layer's rows from the same positions.

    Chunks fill a buffer of `buffer_tokens` positions; when it is full, a random half leaves in batches and the
    buffer is filled again, so neighbouring positions of a document spread over many batches. Within an epoch each
    position is used once, but for a tail of fewer than `batch_size`. An epoch that fits the buffer stays there:
    later epochs reshuffle it and `blocks_for` is not called again. Iterating again gives the same batches.

    Args:
        blocks_for: epoch -> chunks {layer: x [M, D]} of counted positions (masked ones left out), in the caller's
            order of blocks, which should differ from epoch to epoch where the epoch exceeds the buffer.
        buffer_tokens: bound on positions held per layer; memory is buffer_tokens * D * itemsize * layers.
        seed: with the chunks, determines the batches.

    Raises:
        InputError: the buffer is smaller than a batch; when iterated: an epoch has fewer positions than a batch, or a
            chunk's layers differ in their number of positions.
    """

    def __init__(
        self,
        blocks_for: Callable[[int], Iterable[dict[int, Tensor]]],
        *,
        batch_size: int,
        n_steps: int,
        buffer_tokens: int,
        seed: int,
    ) -> None:
        if batch_size < 1 or buffer_tokens < batch_size:
            raise InputError(f"buffer_tokens = {buffer_tokens} is below batch_size = {batch_size}: raise buffer_tokens")
        self._blocks_for = blocks_for
        self._batch_size, self._n_steps = batch_size, n_steps
        self._buffer_tokens, self._seed = buffer_tokens, seed

    def __len__(self) -> int:
        return self._n_steps

    def __iter__(self) -> Iterator[dict[int, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        buffer = _Buffer(self._buffer_tokens, self._batch_size, generator)
        left, epoch = self._n_steps, 0
        whole_epoch = 0  # positions of an epoch that fits the buffer
        while left > 0:
            n_batches = 0
            source = self._keep(buffer, whole_epoch) if whole_epoch else self._stream(buffer, epoch)
            for batch in source:
                n_batches += 1
                yield batch
                left -= 1
                if left == 0:
                    return
            if n_batches == 0:
                raise InputError(
                    f"epoch {epoch} of the SAE's training text has {buffer.seen} positions, fewer than one batch of "
                    f"{self._batch_size}: lower the batch size or add text"
                )
            whole_epoch = buffer.seen if buffer.seen <= self._buffer_tokens else 0
            epoch += 1

    def _stream(self, buffer: _Buffer, epoch: int) -> Iterator[dict[int, Tensor]]:
        buffer.clear()
        for chunk in self._blocks_for(epoch):
            start, n_rows = 0, buffer.check(chunk)
            while start < n_rows:
                if buffer.is_full:
                    yield from buffer.emit(half=True)
                start += buffer.put(chunk, start)
        yield from buffer.emit(half=False)

    def _keep(self, buffer: _Buffer, size: int) -> Iterator[dict[int, Tensor]]:
        buffer.size = size
        yield from buffer.emit(half=False)


class _Buffer:
    """Storage [C, D] per layer with `size` filled rows, and one permutation for all layers."""

    def __init__(self, capacity: int, batch_size: int, generator: torch.Generator) -> None:
        self._capacity, self._batch_size, self._generator = capacity, batch_size, generator
        self._storage: dict[int, Tensor] = {}
        self.size = 0
        self.seen = 0  # positions put since the last clear

    @property
    def is_full(self) -> bool:
        return self.size == self._capacity

    def clear(self) -> None:
        self.size = self.seen = 0

    def check(self, chunk: dict[int, Tensor]) -> int:
        lengths = {layer: len(x) for layer, x in chunk.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"layers of one chunk of hidden states differ in their number of positions: {lengths}")
        return next(iter(lengths.values()))

    def put(self, chunk: dict[int, Tensor], start: int) -> int:
        """Copy rows from `start` on, as many as fit; returns their number."""
        n_taken = 0
        for layer, x_MD in chunk.items():
            if layer not in self._storage:
                shape = (self._capacity, x_MD.shape[1])
                self._storage[layer] = torch.empty(shape, dtype=x_MD.dtype, device=x_MD.device)
            n_taken = min(len(x_MD) - start, self._capacity - self.size)
            self._storage[layer][self.size : self.size + n_taken] = x_MD[start : start + n_taken]
        self.size += n_taken
        self.seen += n_taken
        return n_taken

    def emit(self, *, half: bool) -> Iterator[dict[int, Tensor]]:
        """Batches of randomly drawn rows, which leave the buffer: half of it (at least one batch), or all of it.

        Emitting all drops fewer than `batch_size` rows and leaves the storage as it was, for reuse.
        """
        batch = self._batch_size
        n_batches = max(1, self.size // (2 * batch)) if half else self.size // batch
        permutation = torch.randperm(self.size, generator=self._generator)
        for i in range(n_batches):
            rows = permutation[i * batch : (i + 1) * batch]
            yield {layer: x_CD.index_select(0, rows.to(x_CD.device)) for layer, x_CD in self._storage.items()}
        if half:
            self._close_gaps(permutation, n_batches * batch)
        else:
            self.size = 0

    def _close_gaps(self, permutation: Tensor, n_gone: int) -> None:
        """Move kept rows from the end into the places of the rows that left."""
        n_kept = self.size - n_gone
        gone, kept = permutation[:n_gone], permutation[n_gone:]
        holes, movers = gone[gone < n_kept], kept[kept >= n_kept]
        for x_CD in self._storage.values():
            x_CD[holes.to(x_CD.device)] = x_CD.index_select(0, movers.to(x_CD.device))
        self.size = n_kept
