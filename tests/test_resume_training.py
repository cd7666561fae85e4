"""A training that is stopped goes on from its state and ends with the bytes of one that was not."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from study_fixture import contents, merged, planted, planted_model, run, stop_when

from glottoscope.errors import InputError
from glottoscope.lm.pretrain import Pretraining
from glottoscope.study import runner
from glottoscope.study.runner import clean, status
from glottoscope.study.stages import pretraining, resuming, training
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.states import states_in
from glottoscope.study.store import RunStore

OFTEN = 1e-9  # minutes: a state after every step
LM_STEPS, SAE_STEPS = 30, 40
# The epoch is larger than the buffer, and is read twice; two learning rates and two seeds of two layers share the stream.
STUDY = planted(
    study={"name": "long"}, compute={"checkpoint_minutes": OFTEN, "lm_batch": 4},
    models=planted_model(steps=LM_STEPS, checkpoints=[0, 7, LM_STEPS]),
    sae={"steps": SAE_STEPS, "lr": [1e-3, 3e-3], "seeds": [0, 1], "batch_tokens": 256, "buffer_tokens": 1000},
)  # fmt: skip
TRAINED = ("cells/**/*", "models/**/*")


class Stopped(Exception):
    """As good as a kill: nothing of the training is written after it."""


def silent(*_: object) -> None:
    """No progress is shown."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The study trained without a break, and without states."""
    return run(merged(STUDY, {"compute": {"checkpoint_minutes": 0}}), tmp_path_factory.mktemp("whole") / "run", until="train")


@pytest.fixture
def untrained(whole: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A copy of it that lacks the SAEs, and whose settings ask for a state after every step, whatever that costs."""
    monkeypatch.setattr(resuming, "COST", float("inf"))
    store = RunStore(shutil.copytree(whole.root, tmp_path / "run", ignore=shutil.ignore_patterns("cells")))
    store.study_path.write_text(tomli_w.dumps(STUDY), encoding="utf-8")
    return store


def train(store: RunStore, report: Callable[..., None] = silent) -> None:
    training.train_cell(str(store.root), "m", LM_STEPS, (0, 1), report)


def cell_of(store: RunStore) -> dict[str, str]:
    return contents(store.cell_dir("m", LM_STEPS), ("**/*",))


def states(store: RunStore) -> list[int]:
    """Steps of the states of the cell's layers, newest first."""
    return [s.steps for s in states_in(store.train_state_dir("m", LM_STEPS, (0, 1)))]


def stop_before(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, step: int, *, by: Any = Stopped) -> list[int]:
    """Let a training's method fail at a step; returns the list of steps that it makes."""
    original, made = getattr(kind, method), []

    def checked(self: Any, *arguments: Any) -> Any:
        if self.steps == step:
            raise by
        made.append(self.steps)
        return original(self, *arguments)

    monkeypatch.setattr(kind, method, checked)
    return made


# ---- SAEs


@pytest.mark.parametrize("stops", [sorted(random.Random(i).sample(range(1, SAE_STEPS), 2)) for i in range(3)], ids=str)
def test_saes_stopped_anywhere_end_with_the_same_bytes(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    made: list[int] = []
    for stop in stops:
        with monkeypatch.context() as patch:
            steps = stop_before(patch, training.CellTraining, "step", stop)
            with pytest.raises(Stopped):
                train(untrained)
            made += steps
        assert states(untrained) == [stop, stop - 1]
    with monkeypatch.context() as patch:
        steps = stop_before(patch, training.CellTraining, "step", -1)
        train(untrained)
        made += steps
    assert made == list(range(SAE_STEPS))  # no step was made twice
    assert cell_of(untrained) == cell_of(whole)
    assert list(untrained.root.rglob(".resume")) == []


def test_stopped_by_the_progress_and_in_the_language_models_pass(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[str] = []

    def report(done: int, total: int, said: str) -> None:
        words.append(said)
        if done == 25:
            raise Stopped

    with pytest.raises(Stopped):
        train(untrained, report)
    assert states(untrained) == [26, 25]
    passes: list[int] = []
    original = training.hidden_states

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        if states(untrained)[0] >= 30:
            raise Stopped
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "hidden_states", counted)
        with pytest.raises(Stopped):
            train(untrained)
    assert states(untrained)[0] >= 30 and len(passes) > 1
    train(untrained, lambda done, total, said: words.append(said))
    assert cell_of(untrained) == cell_of(whole)
    assert "loss" in words[0]


def test_a_damaged_state_is_passed_over(whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = untrained.train_state_dir("m", LM_STEPS, (0, 1))

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-8])

    def go_on(stop: int) -> list[int]:
        with monkeypatch.context() as patch:
            made = stop_before(patch, training.CellTraining, "step", stop)
            with pytest.raises(Stopped):
                train(untrained)
        assert states(untrained) == [stop, stop - 1]
        return made

    assert go_on(5) == [0, 1, 2, 3, 4]
    flip(folder / "state_5.safetensors")
    assert go_on(6) == [4, 5]
    cut(folder / "state_6.json")
    assert go_on(7) == [5, 6]
    (folder / "state_7.safetensors").unlink()
    flip(folder / "state_6.json")
    assert go_on(3) == [0, 1, 2]
    for path in folder.glob("*.safetensors"):
        cut(path)
    train(untrained)
    assert cell_of(untrained) == cell_of(whole)


def test_states_of_other_settings_are_not_used_and_go(untrained: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = merged(STUDY, {"sae": {"k": 3}})
    with monkeypatch.context() as patch:
        stop_before(patch, training.CellTraining, "step", 9)
        with pytest.raises(Stopped):
            train(untrained)
    context = Context.open(untrained.root)
    unit = (untrained.train_state_dir("m", LM_STEPS, (0, 1)), f"m@{LM_STEPS} layers 0-1")
    assert training.waiting(context) == [(*unit, 9, False)]
    untrained.study_path.write_text(tomli_w.dumps(changed), encoding="utf-8")
    changed_context = Context.open(untrained.root)
    assert training.waiting(changed_context) == [(*unit, None, False)]
    # A wave of the stage that has nothing to do leaves them: the settings may come back.
    runner._remove_states(changed_context, "train")
    assert states(untrained) == [9, 8]
    with monkeypatch.context() as patch:
        made = stop_before(patch, training.CellTraining, "step", 2)
        with pytest.raises(Stopped):
            train(untrained)
        assert made == [0, 1]
    assert states(untrained) == [2, 1]
    store = run(changed, untrained.root, until="train")
    assert list(store.root.rglob(".resume")) == []
    assert contents(store.root, TRAINED) == contents(run(changed, tmp_path / "fresh", until="train").root, TRAINED)


def test_states_of_other_surroundings_are_not_used(whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        stop_before(patch, training.CellTraining, "step", 9)
        with pytest.raises(Stopped):
            train(untrained)
    assert states(untrained) == [9, 8]
    with monkeypatch.context() as patch:
        made = stop_before(patch, training.CellTraining, "step", -1)
        train(untrained)
        assert made == list(range(SAE_STEPS))
    assert cell_of(untrained) == cell_of(whole)


def test_what_was_trained_when_saving_stopped_is_not_trained_again(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 is saved, layer 1 is not: its SAEs come from the state of both."""
    original = training._save

    def failing(context: Context, cell: Any, trained: Any, key: Any, losses: Any) -> None:
        if key[0] == 1:
            raise Stopped
        original(context, cell, trained, key, losses)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", failing)
        with pytest.raises(Stopped):
            train(untrained)
    assert [w.steps for w in training.waiting(Context.open(untrained.root))] == [SAE_STEPS]
    with monkeypatch.context() as patch:
        made = stop_before(patch, training.CellTraining, "step", -1)
        training.train_cell(str(untrained.root), "m", LM_STEPS, (1,), silent)
        assert made == []
    assert cell_of(untrained) == cell_of(whole)
    assert list(untrained.root.rglob(".resume")) == []


def test_larger_groups_go_on_from_the_states_of_smaller_ones(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on fewer, larger machines trains layers together that were trained apart."""
    for layer, stop in ((0, 12), (1, 20)):
        with monkeypatch.context() as patch:
            stop_before(patch, training.CellTraining, "step", stop)
            with pytest.raises(Stopped):
                training.train_cell(str(untrained.root), "m", LM_STEPS, (layer,), silent)
    with monkeypatch.context() as patch:
        made = stop_before(patch, training.CellTraining, "step", -1)
        run(STUDY, untrained.root, until="train")
    # The last checkpoint chooses learning rates, and so comes first.
    assert made[: 2 * SAE_STEPS - 32] == [*range(12, SAE_STEPS), *range(20, SAE_STEPS)]
    assert contents(untrained.root, TRAINED) == contents(whole.root, TRAINED)


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("saved", range(1, 4))
def test_saving_stopped_between_two_saes(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch, saved: int, with_state: bool
) -> None:
    """The SAEs saved later tell of the whole grid of learning rates, too."""
    original, calls = training._save, []

    def failing(*arguments: Any) -> None:
        if len(calls) == saved:
            raise Stopped
        calls.append(1)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", failing)
        with pytest.raises(Stopped):
            train(untrained)
    if not with_state:
        shutil.rmtree(untrained.train_states_dir("m", LM_STEPS))
    context = Context.open(untrained.root)
    cell = next(c for c in context.cells if c.checkpoint.step == LM_STEPS)
    left = training.missing_layers(context, cell, (0, 1))
    assert left == [0, 1][saved // 2 :]
    training.train_cell(str(untrained.root), "m", LM_STEPS, tuple(left), silent)
    assert cell_of(untrained) == cell_of(whole)


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_states_of_a_unit_stopped_when_all_was_saved_go_with_the_next_run(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def stopped(*_: object) -> None:
        raise Stopped

    if stage == "pretrain":
        shutil.rmtree(untrained.models_dir)
    with monkeypatch.context() as patch:
        patch.setattr(resuming.Keeper, "done", stopped)
        with pytest.raises(Stopped):
            if stage == "train":
                train(untrained)
            else:
                pretraining.pretrain_model(str(untrained.root), "m", silent)
    assert len(list(untrained.root.rglob("state_*.json"))) == 2
    run(STUDY, untrained.root, until=stage)
    assert list(untrained.root.rglob(".resume")) == []
    if stage == "train":
        assert contents(untrained.root, TRAINED) == contents(whole.root, TRAINED)


def test_no_room_for_a_state_is_no_reason_to_stop(whole: RunStore, untrained: RunStore) -> None:
    largest = max(p.stat().st_size for p in whole.cell_dir("m", LM_STEPS).rglob("*"))
    words: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 1000, hard))
        train(untrained, lambda done, total, said: words.append(said))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert words[0].endswith(", no room on the disk for its state")
    assert cell_of(untrained) == cell_of(whole)


# ---- language models


@pytest.mark.parametrize("stop", [3, 7, 8, 19, LM_STEPS - 1])
def test_a_pretraining_stopped_anywhere_ends_with_the_same_bytes(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    shutil.rmtree(untrained.models_dir)
    with monkeypatch.context() as patch:
        made = stop_before(patch, Pretraining, "update", stop)
        with pytest.raises(Stopped):
            pretraining.pretrain_model(str(untrained.root), "m", silent)
    assert made == list(range(stop))
    kept = {p: p.stat().st_ino for p in untrained.models_dir.rglob("step_*/*")}
    assert [(w.unit, w.steps) for w in pretraining.waiting(Context.open(untrained.root))] == [("m", stop)]
    with monkeypatch.context() as patch:
        made = stop_before(patch, Pretraining, "update", -1)
        pretraining.pretrain_model(str(untrained.root), "m", silent)
    assert made == list(range(stop, LM_STEPS))
    assert contents(untrained.root, ("models/**/*",)) == contents(whole.root, ("models/**/*",))
    assert {p: p.stat().st_ino for p in kept} == kept  # checkpoints that were there were not written again
    assert pretraining.waiting(Context.open(untrained.root)) == []
    assert list(untrained.root.rglob(".resume")) == []


def test_a_checkpoint_that_was_lost_is_not_skipped(whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(untrained.models_dir)
    with monkeypatch.context() as patch:
        stop_before(patch, Pretraining, "update", 12)
        with pytest.raises(Stopped):
            pretraining.pretrain_model(str(untrained.root), "m", silent)
    shutil.rmtree(untrained.checkpoint_dir("m", 7))
    pretraining.pretrain_model(str(untrained.root), "m", silent)
    assert contents(untrained.root, ("models/**/*",)) == contents(whole.root, ("models/**/*",))


def test_batches_are_a_function_of_the_step_alone(untrained: RunStore, text_run: RunStore) -> None:
    for store in (untrained, text_run):
        context = Context.open(store.root)
        (model,) = pretraining.pretrained_runs(context)
        straight = [pretraining._reading(context, model).batch_at(step) for step in range(0, 40)]
        anew = pretraining._reading(Context.open(store.root), model)
        for step in random.Random(0).sample(range(40), 12):
            assert np.array_equal(anew.batch_at(step), straight[step])


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["step", "pass"])
def test_a_signal_leaves_a_last_state(
    whole: RunStore, untrained: RunStore, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, where: str
) -> None:
    study = merged(STUDY, {"compute": {"checkpoint_minutes": 60}})
    untrained.study_path.write_text(tomli_w.dumps(study), encoding="utf-8")
    taken: list[int] = []

    def interrupt(*_: object) -> None:
        taken.append(1)
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    target, name = (training.SAETrainer, "step") if where == "step" else (training, "hidden_states")
    original, calls = getattr(target, name), []

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 21:
            signal.raise_signal(number)
        return original(*arguments)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, signalled)
            with pytest.raises(KeyboardInterrupt):
                train(untrained)
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert taken == [1]
    # 8 trainers take turns: their third step is made whole. A pass ends at once.
    (steps,) = states(untrained)
    assert steps == 3 if where == "step" else steps > 0
    train(untrained)
    assert cell_of(untrained) == cell_of(whole)


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_progress_is_told_to_its_end(untrained: RunStore, stage: str) -> None:
    """It goes through a queue's locks, which an exception in the middle would leave in disorder."""
    told: list[float] = []

    def report(done: float, *_: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        told.append(done)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if stage == "pretrain":
        shutil.rmtree(untrained.models_dir)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            if stage == "train":
                train(untrained, report)
            else:
                pretraining.pretrain_model(str(untrained.root), "m", report)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(told) == 1
    assert len(list(untrained.root.rglob(".resume"))) == 1


SLOW = planted(
    study={"name": "slow"}, compute={"checkpoint_minutes": 1e-4}, models=planted_model(steps=300, checkpoints=[0, 300]),
    sae={"steps": 600, "buffer_tokens": 1000},
)  # fmt: skip


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return run(SLOW, tmp_path_factory.mktemp("slow") / "run", until="train")


@pytest.mark.parametrize(
    ("number", "code", "stage", "workers"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "pretrain", 1),
        (signal.SIGKILL, -signal.SIGKILL, "train", 1),
        (signal.SIGTERM, 130, "train", 2),
    ],
    ids=["kill-pretrain", "kill-train", "terminate-two-workers"],
)
def test_a_killed_run_goes_on(
    slow: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, stage: str, workers: int
) -> None:
    study, out = tmp_path / "slow.toml", tmp_path / "run"
    study.write_text(tomli_w.dumps(SLOW), encoding="utf-8")
    folder = {"pretrain": "models", "train": "cells"}[stage]
    shutil.copytree(slow.root, out, ignore=shutil.ignore_patterns(folder))

    def at_work() -> set[Path]:
        return {p.parent for p in out.glob(f"{folder}/**/.resume/**/state_*.json")}

    arguments = ["run", study, "--out", out, "--until", stage, "--workers", str(workers)]
    returned, errors = stop_when(arguments, lambda: len(at_work()) >= 1, number)
    assert returned == code
    assert "Traceback" not in errors
    newest = [states_in(place)[0].steps for place in at_work()]
    assert newest
    model, cell = (stop_before(monkeypatch, *x, -1) for x in ((Pretraining, "update"), (training.CellTraining, "step")))
    store = run(SLOW, out, until=stage)
    assert contents(store.root, (f"{folder}/**/*",)) == contents(slow.root, (f"{folder}/**/*",))
    assert len(model) + len(cell) <= {"pretrain": 300, "train": 2 * 600}[stage] - sum(newest)
    assert list(store.root.rglob(".resume")) == [] and store.leftovers() == []


def test_a_negative_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"compute\.checkpoint_minutes"):
        run(merged(STUDY, {"compute": {"checkpoint_minutes": -1}}), tmp_path / "run")


def test_status_names_the_state_and_clean_removes_a_stale_one(untrained: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_before(patch, training.CellTraining, "step", 9)
        with pytest.raises(Stopped):
            train(untrained)
    words = {row.stage: row.words for row in status(untrained.root)}
    assert words["train"].endswith(f"m@{LM_STEPS} layers 0-1 resumes at step 9")
    assert clean(untrained.root) == []
    untrained.study_path.write_text(tomli_w.dumps(merged(STUDY, {"sae": {"k": 3}})), encoding="utf-8")
    ((folder, size),) = clean(untrained.root)
    assert folder == untrained.train_state_dir("m", LM_STEPS, (0, 1))
    assert size > 0 and not folder.exists()
