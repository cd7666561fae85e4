"""A cache for many threads: bounded, least recently used out first, and each value made once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Values by key, of a total weight of at most `limit` (one value may be heavier alone).

    A value that another thread is making is waited for; a failure is not kept.
    """

    def __init__(self, limit: float, weight: Callable[[Value], float] = lambda _: 1) -> None:
        self._limit, self._weigh = limit, weight
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._total = 0.0
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made by `make` where it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            turn = self._making.setdefault(key, threading.Lock())
        with turn:
            found = self.peek(key)
            if found is not None:
                return found
            try:
                value = make()
            finally:
                with self._lock:
                    self._making.pop(key, None)
            self.put(key, value)
            return value

    def peek(self, key: Hashable) -> Value | None:
        """The value of `key` where it is there."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value, and let go of the oldest beyond the limit."""
        with self._lock:
            old = self._values.pop(key, None)
            self._total += self._weigh(value) - (self._weigh(old) if old is not None else 0)
            self._values[key] = value
            while self._total > self._limit and len(self._values) > 1:
                _, gone = self._values.popitem(last=False)
                self._total -= self._weigh(gone)
