"""Shuffled activations: coverage, determinism, bounds. M positions of a chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glottoscope.errors import InputError
from glottoscope.sae.stream import Batch, Chunk, ShuffledActivations


class Source:
    """Chunks whose rows hold their own position; layer 7 holds it times 10, so that layers can be matched.

    With `turned`, an epoch reads the chunks in an order of its own.
    """

    def __init__(self, sizes: list[int], turned: bool = False) -> None:
        self.sizes, self.turned = sizes, turned
        self.epochs: list[int] = []
        self.computed: list[tuple[int, int]] = []  # (epoch, chunk)

    def __call__(self, epoch: int) -> Iterator[Chunk]:
        self.epochs.append(epoch)
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        turn = epoch % len(self.sizes) if self.turned else 0
        for number in [*range(turn, len(self.sizes)), *range(turn)]:
            yield Chunk(self.sizes[number], lambda n=number: self.states(epoch, n, starts[n]))

    def states(self, epoch: int, number: int, start: int) -> dict[int, Tensor]:
        self.computed.append((epoch, number))
        x = torch.arange(start, start + self.sizes[number], dtype=torch.float32)[:, None]
        return {2: x, 7: 10 * x.expand(-1, 3)}


def collect(stream: Iterable[Batch]) -> list[list[int]]:
    out = []
    for batch in stream:
        assert torch.equal(batch[7], 10 * batch[2].expand(-1, 3))
        out.append([int(v) for v in batch[2][:, 0]])
    return out


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    batch=st.integers(1, 15),
    extra=st.integers(0, 80),
    seed=st.integers(0, 99),
)
def test_each_position_once_per_epoch_but_for_the_tail(sizes: list[int], batch: int, extra: int, seed: int) -> None:
    total = sum(sizes)
    if total < batch:
        return
    per_epoch = total // batch
    source = Source(sizes)
    stream = ShuffledActivations(source, batch_size=batch, n_steps=3 * per_epoch, buffer_tokens=batch + extra, seed=seed)
    batches = collect(stream)
    assert len(batches) == len(stream) == 3 * per_epoch and all(len(b) == batch for b in batches)
    for e in range(3):
        seen = [p for b in batches[e * per_epoch : (e + 1) * per_epoch] for p in b]
        assert len(set(seen)) == len(seen) == per_epoch * batch
        assert set(seen) <= set(range(total))
    # An epoch that fits is computed once.
    assert source.epochs == ([0] if total <= batch + extra else [0, 1, 2])
    assert collect(stream) == batches  # iterating again repeats it


def test_seed_decides_the_order() -> None:
    def run(seed: int, buffer_tokens: int) -> list[list[int]]:
        return collect(ShuffledActivations(Source([50] * 4), batch_size=10, n_steps=40, buffer_tokens=buffer_tokens, seed=seed))

    for buffer_tokens in (60, 1000):
        assert run(1, buffer_tokens) == run(1, buffer_tokens) != run(2, buffer_tokens)
        first, second = run(1, buffer_tokens)[:20], run(1, buffer_tokens)[20:]
        assert first != second  # epochs are shuffled anew
    # Neighbours spread: with the whole epoch in the buffer a batch draws from all of it.
    assert max(run(1, 1000)[0]) - min(run(1, 1000)[0]) > 50


def test_exact_number_of_steps_and_no_needless_work() -> None:
    source = Source([30] * 100)
    stream = ShuffledActivations(source, batch_size=10, n_steps=2, buffer_tokens=60, seed=0)
    assert len(collect(stream)) == 2 and source.epochs == [0]
    assert collect(ShuffledActivations(source, batch_size=10, n_steps=0, buffer_tokens=60, seed=0)) == []


def test_batches_are_copies_in_the_given_dtype() -> None:
    def chunks(epoch: int) -> Iterator[Chunk]:
        yield Chunk(20, lambda: {0: torch.ones(20, 4, dtype=torch.bfloat16)})

    for batch in ShuffledActivations(chunks, batch_size=5, n_steps=8, buffer_tokens=20, seed=0):
        assert batch[0].dtype == torch.bfloat16 and bool((batch[0] == 1).all())
        batch[0].zero_()  # a consumer that writes must not reach the buffer


def test_errors() -> None:
    with pytest.raises(InputError, match="buffer_tokens = 5 is below batch_size = 6"):
        ShuffledActivations(Source([9]), batch_size=6, n_steps=1, buffer_tokens=5, seed=0)
    with pytest.raises(InputError, match="9 positions, fewer than one batch of 10"):
        collect(ShuffledActivations(Source([4, 5]), batch_size=10, n_steps=1, buffer_tokens=50, seed=0))
    with pytest.raises(InputError, match="0 positions"):
        collect(ShuffledActivations(Source([]), batch_size=10, n_steps=1, buffer_tokens=50, seed=0))

    def uneven(epoch: int) -> Iterator[Chunk]:
        yield Chunk(4, lambda: {0: torch.ones(4, 2), 1: torch.ones(5, 2)})

    with pytest.raises(InputError, match=r"layers of one chunk of hidden states have \{0: 4, 1: 5\} positions, not 4"):
        list(ShuffledActivations(uneven, batch_size=2, n_steps=1, buffer_tokens=50, seed=0))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    batch=st.integers(1, 15),
    extra=st.integers(0, 80),
    seed=st.integers(0, 99),
    n_steps=st.integers(1, 60),
    turned=st.booleans(),
    data=st.data(),
)
def test_from_any_step_as_if_never_left(
    sizes: list[int], batch: int, extra: int, seed: int, n_steps: int, turned: bool, data: st.DataObject
) -> None:
    total = sum(sizes)
    if total < batch:
        return
    step = data.draw(st.integers(0, n_steps), "step")

    def stream() -> tuple[Source, ShuffledActivations]:
        source = Source(sizes, turned)
        return source, ShuffledActivations(source, batch_size=batch, n_steps=n_steps, buffer_tokens=batch + extra, seed=seed)

    whole_source, whole = stream()
    expected = collect(whole)
    source, resumed = stream()
    found = collect(resumed.iterate_from(step))
    assert found == expected[step:]
    # No chunk is computed twice, nor any that the whole iteration leaves out.
    assert len(set(source.computed)) == len(source.computed)
    assert set(source.computed) <= set(whole_source.computed)
    assert step < n_steps or source.computed == []
    # From the same stream object, again.
    assert collect(resumed.iterate_from(step)) == found


def test_only_chunks_still_in_the_buffer_are_computed_again() -> None:
    source = Source([10] * 400)
    stream = ShuffledActivations(source, batch_size=10, n_steps=400, buffer_tokens=100, seed=0)
    expected = collect(stream)
    batch_of = {p: i for i, batch in enumerate(expected) for p in batch}
    for step in (1, 7, 201, 372, 399):
        source.computed.clear()
        batch = next(stream.iterate_from(step))
        assert [int(v) for v in batch[2][:, 0]] == expected[step]
        # 100 positions fill the buffer, then 50 at a time replace the 5 batches that left.
        seen = 100 + 50 * ((step - 1) // 5)
        assert source.computed == [(0, n) for n in sorted({p // 10 for p, i in batch_of.items() if p < seen and i >= step})]
