"""Resume: what is complete stays, what changed is redone, what is added is added, what is killed continues."""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from study_fixture import (
    PLANTED,
    STAGES,
    command,
    contents,
    log_lines,
    planted,
    planted_model,
    run,
    state,
    stop_when,
    text_study,
    work_done,
)

from glottoscope.atomic import TEMPORARY_PREFIX
from glottoscope.errors import InputError
from glottoscope.study import runner
from glottoscope.study.engine import Unit, run_unit, stop_on_sigterm
from glottoscope.study.runner import clean, status
from glottoscope.study.stages import training
from glottoscope.study.store import RunStore

NOTHING = dict.fromkeys(STAGES, 0)


@pytest.fixture
def copy(tiny: RunStore, tmp_path: Path) -> RunStore:
    """A copy of the finished tiny run that a test may change."""
    shutil.copytree(tiny.root, tmp_path / "run")
    return RunStore(tmp_path / "run")


def rerun(store: RunStore, raw: dict[str, Any], until: str = "report") -> dict[str, int]:
    """Run again; returns the units that each stage did."""
    before = log_lines(store)
    run(raw, store.root, until=until)
    return {**NOTHING, **work_done(store, before)}


def test_a_complete_study_is_not_run_again(copy: RunStore) -> None:
    before = state(copy.root)
    assert rerun(copy, PLANTED) == NOTHING
    after = state(copy.root)
    assert set(after) == set(before)
    # Only what says who runs it is written again.
    assert {name for name in after if after[name] != before[name]} <= {"manifest.json", "study.toml", "done.json"}
    assert after["study.toml"][1] == before["study.toml"][1]
    assert [row.words for row in status(copy.root)] == ["done"] * len(STAGES)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"report": {"pattern_features": 2}}, "report"),
        ({"features": {"phi_threshold": 0.3}}, "score"),
        ({"features": {"theta": 0.6}}, "score"),
        ({"features": {"threshold": 0.6}}, "features"),
        ({"sae": {"steps": 12}}, "train"),
        ({"sae": {"k": 2}}, "train"),
        ({"corpus": {"train_documents": 41}}, "tokens"),
        ({"models": planted_model(lr=1e-3)}, "pretrain"),
    ],
    ids=lambda x: next(iter(next(iter(x.values())))) if isinstance(x, dict) and isinstance(next(iter(x.values())), dict) else None,
)
def test_changed_settings_redo_only_what_depends_on_them(copy: RunStore, changes: dict[str, Any], first: str) -> None:
    done = rerun(copy, planted(**changes), until="report" if first == "report" else "score")
    redone = {stage for stage, n in done.items() if n}
    # The token store of the planted world does not depend on the language model.
    expected = set(STAGES[STAGES.index(first) :]) - ({"tokens"} if first == "pretrain" else set())
    # This study asks for no intervention; its own tests are in test_intervene_study.
    assert redone == expected - (set() if first == "report" else {"intervene", "report"})


def test_other_test_text_trains_no_sae_again(copy: RunStore) -> None:
    done = rerun(copy, planted(corpus={"test_documents": 21}), until="score")
    assert {stage for stage, n in done.items() if n} == {"tokens", "features", "score"}


MORE = {
    "checkpoint": ({"models": planted_model(checkpoints=[0, 10, 20])}, {"train": 1, "features": 1}),
    "layer": ({"layers": [0, 1, 2]}, {"train": 2, "features": 2}),
    "seed": ({"sae": {"seeds": [0, 1]}}, {"train": 2, "features": 2}),
}


@pytest.mark.parametrize("what", MORE)
def test_more_is_added_and_what_is_there_stays(copy: RunStore, tmp_path: Path, what: str) -> None:
    changes, units = MORE[what]
    patterns = ("cells/**/*", "models/**/*.safetensors", "rulers/**/*.safetensors")
    before = state(copy.root, patterns)
    done = rerun(copy, planted(**changes), until="score")
    after = state(copy.root, patterns)
    assert {k: done[k] for k in units} == units
    assert len(after) > len(before)
    assert {name: after[name][1] for name in before} == {name: digest for name, (_, digest) in before.items()}
    # SAEs, features and scores that were there are not even written again.
    cells = [name for name in before if name.startswith("cells/")]
    assert [name for name in cells if after[name] != before[name]] == []
    # And the whole is what one run of all of it would have given.
    fresh = run(planted(**changes), tmp_path / "fresh")
    assert contents(fresh.root, ("tables/*",)) == contents(copy.root, ("tables/*",))
    assert contents(fresh.root, patterns) == contents(copy.root, patterns)


def test_changed_text_is_noticed(text_folder: Path, text_run: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(text_folder, folder)
    store = RunStore(folder / "run")
    assert {**rerun(store, text_study(folder), until="score"), "report": 0} == NOTHING  # only the place changed
    lines = (folder / "pairs.test.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "pairs.test.jsonl").write_text("\n".join(lines[:-4]) + "\n", encoding="utf-8")
    done = rerun(store, text_study(folder), until="tokens")
    assert done["tokens"] == 1
    assert contents(store.root, ("models/**/*.safetensors",)) == contents(text_run.root, ("models/**/*.safetensors",))


def test_a_removed_part_is_made_again(copy: RunStore) -> None:
    before = contents(copy.root)
    shutil.rmtree(copy.setup_dir("m", 0, 1, 0))
    (copy.ruler_dir("m") / "clusters_embeddings.safetensors").unlink()
    (copy.tables_dir / "done.json").write_text("{", encoding="utf-8")
    done = rerun(copy, PLANTED, until="score")
    assert (done["train"], done["features"]) == (1, 1)
    assert contents(copy.root) == before


# ---- clean


def test_clean_removes_only_what_no_setting_refers_to(copy: RunStore) -> None:
    raw = planted(models=[*planted_model(checkpoints=[0, 10, 20]), *planted_model(name="old")], layers=[0, 1, 2],
                  sae={"seeds": [0, 1]})  # fmt: skip
    rerun(copy, raw, until="train")
    assert clean(copy.root) == []
    rerun(copy, PLANTED, until="score")
    leftover = copy.cells_dir / f"{TEMPORARY_PREFIX}0-x"
    leftover.mkdir()
    before = state(copy.root)
    planned = clean(copy.root, dry_run=True)
    assert state(copy.root) == before
    names = {p.relative_to(copy.root).as_posix() for p, _ in planned}
    assert names == {
        "cells/old@0", "cells/old@10", "cells/old@20", "cells/m@10", "cells/m@0/layer_02", "cells/m@20/layer_02",
        *(f"cells/m@{s}/layer_0{x}/seed_1" for s in (0, 20) for x in (0, 1)),
        "models/old", "models/m/step_10", leftover.relative_to(copy.root).as_posix(),
        *(f"metrics/{unit}.jsonl" for unit in ("m@10", "old", "old@0", "old@20")),
    } - {"cells/old@10"}  # fmt: skip
    removed = clean(copy.root)
    assert [(p, n) for p, n in removed if p != leftover] == [(p, n) for p, n in planned if p != leftover]
    assert not any((copy.root / n).exists() for n in names)
    after = state(copy.root)
    assert {n: before[n] for n in after} == after
    assert {**rerun(copy, PLANTED, until="score"), "report": 0} == NOTHING
    assert clean(copy.root) == []


# ---- stopped in the middle

# Six cells: when the first is done, enough is left to be stopped in.
SLOW = planted(sae={"steps": 400}, models=planted_model(steps=100, checkpoints=[0, 20, 40, 60, 80, 100]), study={"name": "slow"})


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return run(SLOW, tmp_path_factory.mktemp("slow") / "run")


@pytest.mark.parametrize(
    ("number", "code", "sign", "workers"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "tokens/done.json", 1),
        (signal.SIGINT, 130, "cells/m@*/layer_00/seed_0/done.json", 2),
    ],
    ids=["kill", "interrupt-two-workers"],
)
def test_a_stopped_run_continues_to_the_same_bytes(
    slow: RunStore, tmp_path: Path, number: signal.Signals, code: int, sign: str, workers: int
) -> None:
    study, out = tmp_path / "slow.toml", tmp_path / "run"
    study.write_text(tomli_w.dumps(SLOW), encoding="utf-8")
    arguments = ["run", study, "--out", out, "--until", "score", "--workers", str(workers)]
    returned, errors = stop_when(arguments, lambda: any(out.glob(sign)), number)
    assert returned == code
    assert "Traceback" not in errors
    if code == 130:
        assert errors.splitlines()[-1] == "glottoscope: interrupted; the same command continues where it stopped"
    assert not (out / "tables").exists()
    store = run(SLOW, out)
    assert contents(store.root) == contents(slow.root)
    assert store.leftovers() == []
    # What was complete when it was stopped was not done again.
    assert sum(work_done(store).values()) <= sum(work_done(slow).values()) + 1


def test_sigterm_is_an_interrupt() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        stop_on_sigterm()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_what_becomes_of_an_interrupt_within_a_lock_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal between two lines of a lock's own code leaves it open: closing it is another error."""

    def disorder(*_: object) -> None:
        lock = threading.Lock()
        with lock:
            lock.release()
            raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="release unlocked lock"):
        disorder()
    with pytest.raises(KeyboardInterrupt):
        run_unit(Unit("a unit", disorder, ()), "train", str(tmp_path))
    monkeypatch.setattr(runner, "preflight", disorder)
    (tmp_path / "s.toml").write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    ended = command("run", tmp_path / "s.toml", "--out", tmp_path / "run", "--workers", "1")
    assert (ended.code, ended.complaint) == (130, "interrupted; the same command continues where it stopped")


def test_ctrl_c_while_a_model_is_trained(copy: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the driver's own process: one line, exit code 130, and nothing half written."""
    before = contents(copy.root)
    shutil.rmtree(copy.cells_dir)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_validate", interrupted)
    (tmp_path / "s.toml").write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    ended = command("run", tmp_path / "s.toml", "--out", copy.root, "--workers", "1")
    assert ended.code == 130
    assert ended.complaint == "interrupted; the same command continues where it stopped"
    monkeypatch.undo()
    assert rerun(copy, PLANTED, until="score")["pretrain"] == 0
    assert contents(copy.root) == before


def test_a_run_in_use_is_refused(copy: RunStore) -> None:
    before = state(copy.root)
    with copy.lock(), pytest.raises(InputError, match="another process is running the study"):
        run(planted(sae={"k": 2}), copy.root)
    assert state(copy.root) == before
