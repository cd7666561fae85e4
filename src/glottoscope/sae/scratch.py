"""Memory that steps use again and again: a fresh tensor of 100 MB costs 40 ms of page faults."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Uninitialised tensors by name, the same memory at every call; grows, never shrinks.

    Trainers that take turns on one thread can share one: what a step leaves here is worth nothing after it.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A contiguous tensor of this shape, dtype and device, with whatever it held."""
        key, size = (name, dtype, torch.device(device)), math.prod(shape)
        kept = self._flat.get(key)
        if kept is None or kept.numel() < size:
            self._flat.pop(key, None)  # the old one goes before the new one comes
            kept = self._flat[key] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)

    def like(self, name: str, other: Tensor) -> Tensor:
        """As `take`, with the shape, dtype and device of `other`."""
        return self.take(name, tuple(other.shape), other.dtype, other.device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self._flat.values())
