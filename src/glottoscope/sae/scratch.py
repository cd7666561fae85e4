"""Memory that steps use again and again: a fresh tensor of 100 MB costs 40 ms of page faults."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_VIEWS = 256  # views of all sizes kept to be found again; the memory itself is kept once per name


class Scratch:
    """Uninitialised tensors by name, the same memory at every call; grows, never shrinks.

    Trainers that take turns on one thread can share one: what a step leaves here is worth nothing after it.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device | str], Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device | str], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A contiguous tensor of this shape, dtype and device, with whatever it held."""
        view = self._views.get((name, shape, dtype, device))
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[name, shape, dtype, device] = self._make(name, shape, dtype, device)
        return view

    def _make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        key, size = (name, dtype, device), math.prod(shape)
        kept = self._flat.get(key)
        if kept is None or kept.numel() < size:
            # The old memory goes, with every view of it, before the new one comes.
            self._flat.pop(key, None)
            for view in [v for v in self._views if (v[0], v[2], v[3]) == key]:
                del self._views[view]
            del kept
            kept = self._flat[key] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)

    def like(self, name: str, other: Tensor) -> Tensor:
        """As `take`, with the shape, dtype and device of `other`."""
        return self.take(name, tuple(other.shape), other.dtype, other.device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self._flat.values())
