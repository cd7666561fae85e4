"""States of a training: their files, when they are written, how many there are."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glottoscope.study.stages import resuming
from glottoscope.study.stages.resuming import Keeper
from glottoscope.study.stages.states import load_state, states_in, write_state


class Counter:
    """The smallest training: a tensor that counts."""

    def __init__(self) -> None:
        self.steps = 0
        self.count = torch.zeros(3)

    def step(self) -> None:
        self.steps += 1
        self.count += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def notes(self) -> dict[str, Any]:
        return {}

    def resume_at(self, steps: int, notes: dict[str, Any]) -> None:
        self.steps = steps


def test_a_state_is_a_safetensors_file_and_its_json(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(), "zero": torch.tensor(3.5), "wide": torch.randn(2, 2, dtype=torch.float64),
        "none": torch.zeros(0, 4), "turned": torch.arange(6).view(2, 3).T, "short": torch.ones(2, dtype=torch.float16),
    }  # fmt: skip
    notes = {"loss": [0.1, 1e-17, None], "words": "語"}
    state = write_state(tmp_path, 12, {"x": "k"}, {"threads": 1}, notes, tensors)
    assert {p.name for p in tmp_path.iterdir()} == {"state_12.json", "state_12.safetensors"}
    assert states_in(tmp_path) == [state]
    found = load_file(state.tensors_path)
    assert set(found) == set(tensors) and all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in tensors.items()}
    # A part of it, or all.
    for names in (("half", "zero"), tuple(tensors)):
        into = {name: torch.zeros_like(tensors[name]) for name in names}
        assert load_state(state, into)
        assert all(torch.equal(into[name], tensors[name]) for name in names)
    # Nothing is changed by a state that does not fit.
    for wrong in ({"zero": torch.tensor(1.0), "other": torch.zeros(2)}, {"zero": torch.tensor(1.0), "half": torch.zeros(5, 3)}):
        assert not load_state(state, wrong)
        assert wrong["zero"] == 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now[0])
    yield now


def test_states_are_written_by_the_clock_and_two_are_kept(tmp_path: Path, clock: list[float]) -> None:
    folder = tmp_path / ".resume" / "unit"
    counter, keeper = Counter(), Keeper(folder, {"x": "k"}, {}, 10)
    write_state(folder, 99, {"x": "other settings"}, {}, {}, {})
    written = []
    with keeper:
        keeper.restore(counter)
        for minute in range(45):
            clock[0] = 60.0 * minute
            counter.step()
            keeper.tick()
            written.append([s.steps for s in states_in(folder)])
    assert written[9] == [99] and written[10] == [11] and written[20] == [21, 11] and written[44] == [41, 31]
    again = Counter()
    Keeper(folder, {"x": "k"}, {}, 10).restore(again)
    assert again.steps == 41 and again.count.tolist() == [41.0] * 3
    keeper.done()
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "COST", 0.05)
    original, writes = resuming.write_state, []

    def slow(*arguments: Any) -> Any:
        writes.append(clock[0])
        clock[0] += 300
        return original(*arguments)

    monkeypatch.setattr(resuming, "write_state", slow)
    counter, keeper = Counter(), Keeper(tmp_path, {"x": "k"}, {}, 10)
    with keeper:
        keeper.restore(counter)
        while clock[0] < 30_000:
            clock[0] += 60
            counter.step()
            keeper.tick()
    assert len(writes) >= 4 and 300 * len(writes) <= 0.06 * clock[0]


def test_no_states_where_none_are_wanted(tmp_path: Path) -> None:
    counter, keeper = Counter(), Keeper(tmp_path / "s", {"x": "k"}, {}, 0)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), keeper:
        keeper.restore(counter)
        assert signal.getsignal(signal.SIGINT) is handler
        counter.step()
        keeper.tick()
        raise KeyboardInterrupt
    assert not (tmp_path / "s").exists()


def test_a_second_ctrl_c_does_not_wait_and_leaves_no_half_step(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "states", {"x": "k"}, {}, 60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), keeper:
            keeper.restore(Counter())
            with keeper.held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the second Ctrl-C did not stop it")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "states").exists()
