"""Metrics: a line for each point of a training, whole and in order also where the training was stopped, and never a result."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
from study_fixture import contents, log_lines, merged, planted, planted_model, run, work_done

from glottoscope.lm.pretrain import Pretraining
from glottoscope.study.merging import merge
from glottoscope.study.metrics import POINTS, MetricsFile, is_last, points
from glottoscope.study.runner import clean
from glottoscope.study.stages import pretraining, resuming, training
from glottoscope.study.store import RunStore
from glottoscope.study.verifying import verify

LM_STEPS, SAE_STEPS = 30, 40
STUDY = planted(
    study={"name": "metrics"}, compute={"checkpoint_minutes": 1e-9},
    models=planted_model(steps=LM_STEPS, checkpoints=[0, 7, LM_STEPS]),
    sae={"steps": SAE_STEPS, "lr": [1e-3, 3e-3], "seeds": [0, 1]},
)  # fmt: skip
TRAINED = ("cells/**/*", "models/**/*")
CELL = f"cells/m@{LM_STEPS}/**/*"
Series = tuple[int, int, float]  # layer, SAE seed, learning rate of the grid


class Stopped(Exception):
    """As good as a kill."""


def silent(*_: object) -> None:
    """No progress is shown."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Trained without a break."""
    return run(merged(STUDY, {"compute": {"checkpoint_minutes": 0}}), tmp_path_factory.mktemp("whole") / "run", until="train")


@pytest.fixture
def untrained(whole: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A copy of it without SAEs and metrics, with a state after every step."""
    monkeypatch.setattr(resuming, "COST", float("inf"))
    store = RunStore(shutil.copytree(whole.root, tmp_path / "run", ignore=shutil.ignore_patterns("cells", "metrics")))
    store.study_path.write_text(tomli_w.dumps(STUDY), encoding="utf-8")
    return store


def train(store: RunStore, layers: tuple[int, ...] = (0, 1)) -> None:
    training.train_cell(str(store.root), "m", LM_STEPS, layers, silent)


def stopped_before(step: int, kind: type, method: str, work: Callable[[], None]) -> None:
    """Do some work that ends before a step."""
    original = getattr(kind, method)

    def checked(self: Any, *arguments: Any) -> Any:
        if self.steps == step:
            raise Stopped
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(kind, method, checked)
        work()


def curves(store: RunStore, unit: str = f"m@{LM_STEPS}") -> dict[Series, list[dict[str, Any]]]:
    """Points of a unit's trainings in the order of its file."""
    found: dict[Series, list[dict[str, Any]]] = {}
    for point in points(store.metrics_path(unit)):
        found.setdefault((point["layer"], point["sae_seed"], point["grid_lr"]), []).append(point)
    return found


def measured(point: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in point.items() if k not in ("time", "tokens_per_second", "attempt")}


def test_saes_are_told_of_by_layer_seed_and_learning_rate(whole: RunStore) -> None:
    found = curves(whole)
    assert set(found) == {(layer, seed, lr) for layer in (0, 1) for seed in (0, 1) for lr in (1e-3, 3e-3)}
    for (layer, seed, lr), curve in found.items():
        table = pq.read_table(whole.setup_dir("m", LM_STEPS, layer, seed) / "training.parquet").to_pylist()
        rows = [(x["step"], x["loss"], x["lr"], x["l0"]) for x in table if x["grid_lr"] == lr]
        assert [(p["step"], p["loss"], p["lr"], p["l0"]) for p in curve] == rows
        assert [p["tokens"] for p in curve] == [256 * (n + 1) for n in range(SAE_STEPS)]
        assert all(p["tokens_per_second"] > 0 and p["time"] > 1.7e9 for p in curve)
        assert [is_last(p) for p in curve] == [False] * (SAE_STEPS - 1) + [True]
        about = {"stage": "train", "unit": "m@30", "model": "m", "checkpoint": 30, "steps": SAE_STEPS, "attempt": 1}
        assert about.items() <= curve[0].items()


def test_language_models_are_told_of_with_their_losses(whole: RunStore) -> None:
    found = list(points(whole.metrics_path("m")))
    log = pq.read_table(whole.model_dir("m") / "log.parquet").to_pylist()[1:]
    assert [p["step"] for p in found] == list(range(1, LM_STEPS + 1))
    for point, row in zip(found, log, strict=True):
        assert (point["tokens"], point["loss"], point["lr"], point["grad_norm"]) == (
            row["tokens_seen"], row["loss"], row["lr"], row["grad_norm"],
        )  # fmt: skip
        assert point.get("loss_en") == row["loss_en"]
        assert point["stage"] == "pretrain"
    assert [p["step"] for p in found if "loss_en" in p] == [7, LM_STEPS]
    assert is_last(found[-1])
    assert not is_last(found[-2])


@pytest.mark.parametrize("total", [1, 7, 199, 200, 201, 250, 399, 400, 401, 999, 1000, 1001, 3051, 100_000])
def test_a_training_gives_about_200_points(total: int) -> None:
    cell = training.CellTraining({}, total)
    shown = [n for n in range(total) if cell.is_shown(n)]
    curve = [n for n in range(total) if n % max(1, total // training.CURVE_POINTS) == 0 or n == total - 1]
    assert set(shown) <= set(curve)  # what a state holds is enough to write them again
    assert min(total, POINTS / 2) <= len(shown) <= POINTS + 2
    assert shown[-1] == total - 1


@pytest.mark.parametrize("stops", [sorted(random.Random(i).sample(range(1, SAE_STEPS), 2)) for i in range(2)], ids=str)
def test_saes_that_go_on_go_on_in_the_same_file(whole: RunStore, untrained: RunStore, stops: list[int]) -> None:
    seen: list[str] = []
    for stop in stops:
        stopped_before(stop, training.CellTraining, "step", lambda: train(untrained))
        # The state is one step behind what is in the file.
        text = untrained.metrics_path("m@30").read_text(encoding="utf-8").splitlines()
        assert len(text) == 8 * stop
        assert text[: len(seen)] == seen  # lines stay as they were, also when they were written
        seen = text[: 8 * (stop - 1)] if stop != stops[-1] else text
    train(untrained)
    for series, curve in curves(untrained).items():
        assert [measured(p) for p in curve] == [measured(p) for p in curves(whole)[series]]
        assert {p["attempt"] for p in curve} == {1, 2, 3}
    assert contents(untrained.root, (CELL,)) == contents(whole.root, (CELL,))


def test_layers_that_go_on_alone_have_a_whole_file_of_their_own(whole: RunStore, untrained: RunStore) -> None:
    stopped_before(25, training.CellTraining, "step", lambda: train(untrained))
    for layer in (0, 1):
        train(untrained, (layer,))
        for series, curve in curves(untrained, f"m@30 layers {layer}-{layer}").items():
            expected = [{**measured(p), "unit": f"m@30 layers {layer}-{layer}"} for p in curves(whole)[series]]
            assert [measured(p) for p in curve] == expected


def test_a_language_model_that_goes_on_goes_on_in_the_same_file(whole: RunStore, untrained: RunStore) -> None:
    shutil.rmtree(untrained.model_dir("m"))
    for stop in (7, 19):
        work = lambda: pretraining.pretrain_model(str(untrained.root), "m", silent)  # noqa: E731
        stopped_before(stop, Pretraining, "update", work)
    pretraining.pretrain_model(str(untrained.root), "m", silent)
    found, expected = (list(points(s.metrics_path("m"))) for s in (untrained, whole))
    assert [measured(p) for p in found] == [measured(p) for p in expected]
    assert {p["attempt"] for p in found} == {1, 2, 3}
    assert contents(untrained.root, ("models/**/*",)) == contents(whole.root, ("models/**/*",))


def test_other_settings_begin_the_file_anew(tmp_path: Path) -> None:
    store = run(STUDY, tmp_path / "run", until="train")
    run(merged(STUDY, {"sae": {"k": 2}}), store.root, until="train")
    for curve in curves(store).values():
        assert [p["step"] for p in curve] == list(range(SAE_STEPS))
        assert {p["attempt"] for p in curve} == {2}


def test_lines_of_other_settings_and_torn_ones_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "u.jsonl"
    first = MetricsFile(path, {"unit": "u"})
    first.begin()
    for step in range(5):
        first.add([{"step": step, "loss": step / 3, "tokens": step}])
    text = path.read_bytes()
    path.write_bytes(text[:-10] + b'\xff\n7\n[]\n{"step": 9, "unit": "u", "model": []}\n')  # a crash of the machine
    again = MetricsFile(path, {"unit": "u"})
    again.begin([{"step": n, "loss": n / 3 if n != 2 else 0.5, "tokens": n} for n in range(5)])
    assert len(list(points(path))) == 5  # nothing is lost before there is something new
    again.add([{"step": 5, "loss": float("nan"), "tokens": 5}])
    lines = path.read_bytes().splitlines()
    found = [json.loads(x) for x in lines]
    assert [p["step"] for p in found] == list(range(6))
    assert [p["attempt"] for p in found] == [1, 1, 2, 2, 2, 2]
    assert (found[2]["loss"], found[5]["loss"]) == (0.5, None)
    assert lines[:2] == text.splitlines()[:2]
    assert [p.name for p in path.parent.iterdir()] == ["u.jsonl"]


def test_a_file_that_cannot_be_written_changes_nothing(whole: RunStore, untrained: RunStore) -> None:
    shutil.rmtree(untrained.models_dir)
    untrained.metrics_dir.write_text("no folder", encoding="utf-8")
    run(STUDY, untrained.root, until="train")
    assert contents(untrained.root, TRAINED) == contents(whole.root, TRAINED)


def test_metrics_are_no_part_of_what_is_verified_or_merged(whole: RunStore, tmp_path: Path) -> None:
    mine, theirs = (RunStore(shutil.copytree(whole.root, tmp_path / name)) for name in ("a", "b"))
    mine.metrics_path("m").write_text("damaged", encoding="utf-8")
    shutil.rmtree(mine.cell_dir("m", 7))
    mine.metrics_path("m@7").unlink()
    verdict = verify(theirs.root, keep=True)
    assert (verdict.problems, verdict.unknown) == ([], [])
    merge(mine.root, theirs.root)
    assert mine.metrics_path("m").read_text(encoding="utf-8") == "damaged"
    assert not mine.metrics_path("m@7").exists()
    before = log_lines(mine)
    run(merged(STUDY, {"compute": {"checkpoint_minutes": 0}}), mine.root, until="train")
    assert sum(work_done(mine, before).values()) == 0


def test_clean_removes_metrics_of_what_the_study_no_longer_has(whole: RunStore, tmp_path: Path) -> None:
    store = RunStore(shutil.copytree(whole.root, tmp_path / "run"))
    for name in ("m@7 layers 1-1", "m@99", "old", "old@30"):
        store.metrics_path(name).write_text("", encoding="utf-8")
    for name in ("m@7", "m@99"):
        (store.logger_dir("tensorboard") / name).mkdir(parents=True)
    gone = {path.relative_to(store.metrics_dir).as_posix() for path, _ in clean(store.root)}
    assert gone == {"m@99.jsonl", "old.jsonl", "old@30.jsonl", "tensorboard/m@99"}
    assert {p.name for p in store.metrics_dir.glob("*.jsonl")} >= {"m.jsonl", "m@7.jsonl", "m@7_layers_1-1.jsonl", "m@30.jsonl"}
