"""The time of a study, the speed of a machine, and what is said before a run that cannot fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from study_fixture import INTERVENTION, PLANTED, as_study, command, environment, planted, planted_model, run

from glottoscope.atomic import write_json
from glottoscope.errors import InputError
from glottoscope.lm import checkpoints
from glottoscope.study import calibration, machine, planning
from glottoscope.study.config import Study
from glottoscope.study.load import load_study, parse_study, preset_text
from glottoscope.study.plan import expand, train_memory
from glottoscope.study.rates import EFFICIENCY, Point, Rates
from glottoscope.study.runner import describe_run, stages
from glottoscope.study.stages import resuming
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import chunks
from glottoscope.study.store import RESUME_FOLDER, RunStore, tree_size
from glottoscope.study.times import TIMED, Units, conditions, makespan, times, total

EXAMPLE = Path(__file__).parents[1] / "examples" / "llm-jp-3.toml"
INFINITE = float("inf")
STATED = Rates(1e10)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def units_of(study: Study, workers: int = 1, rates: Rates = STATED) -> list[Units]:
    return times(study, expand(study), rates, INFINITE, workers)


# ---- rates and times


@given(st.lists(st.tuples(st.floats(1e3, 1e9), st.floats(1e-9, 1e-2)), min_size=1, max_size=4, unique_by=lambda x: x[0]))
def test_rates_pass_through_what_was_measured(found: list[tuple[float, float]]) -> None:
    rates = Rates(1e10, {"sae": [Point(*x) for x in found]})
    for work, seconds in found:
        assert rates.seconds("sae", work) == pytest.approx(seconds)
    largest = max(found)
    assert rates.seconds("sae", 3 * largest[0]) == pytest.approx(3 * largest[1])
    assert 0 < rates.seconds("sae", min(found)[0] / 10) < min(found)[1]
    assert rates.seconds("forward", 1e9) == 1e9 / (1e10 * EFFICIENCY)  # not measured: as stated


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 50)), max_size=8), st.integers(1, 6))
def test_makespan_is_between_its_bounds(found: list[tuple[int, float]], workers: int) -> None:
    units = [Units("train", "m", count, seconds) for count, seconds in found]
    work, longest = sum(c * s for c, s in found), max((s for _, s in found), default=0.0)
    assert max(work / workers, longest) - 1e-9 <= makespan(units, workers) <= work / workers + longest + 1e-9


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"models": planted_model(steps=200)}),
        ("train", {"sae": {"steps": 100}}),
        ("train", {"sae": {"lr": [1e-3, 3e-3]}}),
        ("features", {"corpus": {"test_documents": 2000}}),
        ("score", {"sae": {"n": 64}}),
        ("intervene", {"intervention": {**INTERVENTION, "draws": 64}}),
    ],
)
def test_a_stage_that_has_more_to_do_takes_longer(stage: str, changes: dict[str, Any]) -> None:
    def seconds(raw: dict[str, Any]) -> float:
        return sum(u.count * u.seconds for u in units_of(as_study(raw)) if u.stage == stage)

    base = planted(intervention=INTERVENTION)
    assert seconds(planted(**{"intervention": INTERVENTION, **changes})) > seconds(base) > 0
    assert total(units_of(as_study(base)), 1) == pytest.approx(
        sum(u.count * u.seconds for u in units_of(as_study(base)) if u.stage in TIMED)
    )


def test_units_are_counted_as_the_run_makes_them(tmp_path: Path) -> None:
    raw = planted(intervention={**INTERVENTION, "translation": None})
    raw["intervention"] = {k: v for k, v in raw["intervention"].items() if v is not None}
    store = run(raw, tmp_path / "run", until="intervene")
    rows = [json.loads(x) for x in store.log_path.read_text(encoding="utf-8").splitlines()]
    study = as_study(raw)
    for stage in ("pretrain", "train", "features"):
        made = max(r["done"] for r in rows if r["stage"] == stage) if stage != "train" else 2
        assert sum(u.count for u in units_of(study) if u.stage == stage) == made
    assert study.intervention is not None
    (folder,) = [p.parent for p in store.interventions_dir.rglob("plan.json")]
    # Parts without features, as some of a model so small, have no conditions.
    assert sum(len(c) for c in chunks(folder, "documents")) <= conditions(study, study.intervention)
    full = parse_study(preset_text("planted-full"), name="preset", folder=tmp_path)
    assert full.intervention is not None
    assert conditions(full, full.intervention) == 368  # counted in a run of it


# ---- calibration


def test_calibration_measures_and_is_kept(cache: Path, tmp_path: Path) -> None:
    study = as_study(PLANTED)
    assert planning.known_rates(study, 1) is None
    measured = calibration.calibrate(study, 1, budget=8.0)
    (path,) = cache.rglob("*.json")
    assert path == calibration.cache_path(study, 1)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["machine"]["threads"] == 1
    assert kept["measured"] == measured
    assert {json.loads(t)["kind"] for t in measured} == {"forward", "sae", "collect", "pretrain"}
    assert all(1e-10 < s < 1 for s in measured.values())
    rates = planning.known_rates(study, 1)
    assert rates is not None
    assert planning.known_rates(study, 2) is None  # two workers share the memory: measured apart
    # Another size uses it, too; another kind of SAE does not.
    assert planning.known_rates(as_study(planted(models=planted_model(d_model=64))), 1) == rates
    other = planning.known_rates(as_study(planted(sae={"k": 8})), 1)
    assert other is not None
    assert set(other.points) == {"forward", "pretrain"}

    study_file = tmp_path / "tiny.toml"
    study_file.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    ended = command("plan", study_file, "--workers", "1")
    assert "from a calibration of this machine" in ended.out
    assert "planned: " in command("run", study_file, "--out", tmp_path / "out", "--workers", "1", "--until", "tokens").err
    stated = command("plan", study_file, "--workers", "1", "--device-flops", "1e12")
    assert "at 1.00e+12 FLOP/s (as stated)" in stated.out


def test_a_damaged_cache_is_no_calibration(cache: Path) -> None:
    study = as_study(PLANTED)
    path = calibration.cache_path(study, 1)
    path.parent.mkdir(parents=True)
    for text in ("", "[]", '{"measured": 3}'):
        path.write_text(text, encoding="utf-8")
        assert planning.known_rates(study, 1) is None


def test_without_a_home_nothing_is_kept_and_a_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    study = as_study(PLANTED)
    assert planning.known_rates(study, 1) is None
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        calibration.calibrate(study, 1)
    text = StringIO()
    planning.announce(study, tmp_path, 1, machine.room_for(study, 1), Console(file=text), nodes=False)


@pytest.mark.usefixtures("cache")
def test_kinds_that_were_not_measured_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    study = as_study(PLANTED)
    measured = {json.dumps(t, sort_keys=True): 1e-6 for t in calibration.tasks_of(study) if t["kind"] in ("forward", "pretrain")}
    write_json(calibration.cache_path(study, 1), {"measured": measured})
    monkeypatch.setattr(planning, "cpu_flops", lambda: 7e9)
    rates = planning.known_rates(study, 1)
    assert rates is not None
    assert rates.seconds("sae", 7e9) == pytest.approx(1 / EFFICIENCY), "at the speed of this machine, not of a guess"
    text = StringIO()
    planning.print_plan(study, None, Console(file=text, width=250), workers=1)
    assert "Not measured, since too large for half a minute here: sae, collect; at 7.00e+09 FLOP/s (measured on" in text.getvalue()


def test_each_measuring_process_has_a_gpu_as_workers_have() -> None:
    found = calibration._environments(3, ["2", "GPU-5fa"])
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["2", "GPU-5fa", "2"]
    assert calibration._environments(2, []) == [dict(os.environ)] * 2


def test_a_shape_beyond_the_memory_is_left_out() -> None:
    task = next(t for t in calibration.tasks_of(as_study(PLANTED)) if t["kind"] == "sae")
    assert calibration.measure(task, 0.01, "cpu", most_bytes=24 * task["d"] * task["n"] // 2 - 1) is None
    assert calibration.measure(task, 0.01, "cpu", most_bytes=24 * task["d"] * task["n"] // 2) is not None


# ---- the machine


def test_a_container_has_no_more_memory_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine.machine_memory()
    root, own = tmp_path / "cgroup", tmp_path / "own"
    monkeypatch.setattr(machine, "CGROUPS", root)
    monkeypatch.setattr(machine, "OWN_CGROUP", own)
    assert machine.machine_memory() >= whole  # no such file: no limit

    def limit(path: str, value: str) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(value + "\n", encoding="utf-8")

    own.write_text("0::/user/job\n", encoding="utf-8")
    limit("user/job/memory.max", "max")
    limit("user/memory.max", str(2**20))
    assert machine.machine_memory() == 2**20
    limit("user/job/memory.max", str(2**19))
    assert machine.machine_memory() == 2**19
    # Version 1, in a container that sees its own group as the root; the controller may have company.
    own.write_text("9:name=systemd:/\n4:cpu,memory:/docker/5fa\n", encoding="utf-8")
    assert machine.machine_memory() >= whole
    limit("memory/memory.limit_in_bytes", str(2**21))
    assert machine.machine_memory() == 2**21
    limit("memory/docker/5fa/memory.limit_in_bytes", "9223372036854771712")
    assert machine.machine_memory() == 2**21


def test_workers_are_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def study(device: str) -> Study:
        return as_study(planted(compute={"device": device, "threads": 2}))

    monkeypatch.setattr(machine, "usable_cores", lambda: [1, 4, 5, 6, 7])
    assert machine.workers_of(study("cpu")) == 2
    assert machine.workers_of(study("cpu"), 7) == 7
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "1", "3"])
    assert machine.workers_of(study("cuda")) == 3
    assert machine.workers_of(study("mps")) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is an accelerator")
def test_a_driver_file_alone_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch for CPUs only: torch is asked."""
    study = as_study(planted(compute={"device": "auto"}))
    assert machine.device_of(study) == "cpu"
    monkeypatch.setattr(machine, "DEVICES", ("null",))
    asked: list[str] = []
    monkeypatch.setattr(checkpoints, "choose_device", lambda name: asked.append(name) or "mps")
    assert (machine.device_of(study), asked) == ("mps", ["auto"])


def test_the_papers_plan_asks_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from glottoscope.study import machine, planning
from glottoscope.study.load import load_study
from rich.console import Console
machine.DEVICES = ()
planning.print_plan(load_study(Path({str(EXAMPLE)!r})), 1e10, Console(width=120))
print("LOADED", *(m for m in ("torch", "transformers", "scipy") if m in sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "LOADED", done.stderr
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert len(table) > 10 and max(map(len, table)) <= 120 and not any("…" in line for line in table)


@pytest.mark.usefixtures("cache")
def test_large_shapes_are_measured_in_part() -> None:
    (forward, *_) = [t for t in calibration.tasks_of(load_study(EXAMPLE)) if t["work"] > 1e9]
    assert (forward["kind"], forward["d_model"]) == ("forward", 3072)
    forward |= {"dtype": "float32", "context": 8}  # so that it is soon over
    seconds = calibration.measure(forward, 0.2, "cpu")
    assert seconds is not None
    assert seconds > forward["work"] / 1e13


# ---- disk


@pytest.mark.parametrize("grid", ["final", "setup"])
def test_states_take_the_disk_that_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str) -> None:
    """Weighed after every state written, in every folder where one lies."""
    raw = planted(
        compute={"checkpoint_minutes": 1e-9}, models=planted_model(d_model=96, checkpoints=[0, 20]),
        sae={"n": 512, "lr": [1e-3, 3e-3], "seeds": [0, 1], "lr_choice": grid},
    )  # fmt: skip
    monkeypatch.setattr(resuming, "COST", float("inf"))
    weighed = {"pretrain": 0, "train": 0}
    original = resuming.Keeper._write

    def weighing(keeper: resuming.Keeper) -> None:
        original(keeper)
        for stage, folder in (("pretrain", "models"), ("train", "cells")):
            size = sum(tree_size(p) for p in (tmp_path / "run" / folder).rglob(RESUME_FOLDER))
            weighed[stage] = max(weighed[stage], size)

    monkeypatch.setattr(resuming.Keeper, "_write", weighing)
    run(raw, tmp_path / "run", until="train")
    study = as_study(raw)
    runs = expand(study)
    assert min(weighed.values()) > 0
    assert planning.states_disk(study, runs, INFINITE, 1) == pytest.approx(max(weighed.values()), rel=0.03)
    # Two units at once: the two cells, of which one has the chosen rate alone, and only once the other is done.
    both = planning.states_disk(study, runs, INFINITE, 2) / planning.states_disk(study, runs, INFINITE, 1)
    assert both == (2 if grid == "setup" else 1)
    never = as_study({**raw, "compute": {**raw["compute"], "checkpoint_minutes": 0}})
    assert planning.states_disk(never, runs, INFINITE, 2) == 0
    found = planning.forecast(study, STATED, 1)
    assert found.disk == sum(c.disk for _, c in found.rows if c is not None) + found.states


def test_the_plan_says_what_states_take(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    words = "for the states of trainings at work"
    assert words in command("plan", path, "--device-flops", "1e10").out
    assert words not in command("plan", path, "--device-flops", "1e10", "--set", "compute.checkpoint_minutes=0").out


# ---- warnings


def said(study: Study, out: Path, **changes: Any) -> str:
    found = planning.forecast(study, STATED, changes.pop("workers", 1))
    return "\n".join(planning.warnings(study, found, out))


def test_what_cannot_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, paper = as_study(PLANTED), load_study(EXAMPLE, ["compute.device=cpu"])
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**13})())
    assert said(tiny, tmp_path / "not" / "there") == ""
    monkeypatch.setattr(machine, "machine_memory", lambda: 8 * 2**30)
    words = said(paper, tmp_path)
    assert "One layer of llm-jp-3-440m, " in words and "(80% of this machine's 8.0 GiB): take a larger machine" in words
    monkeypatch.setattr(machine, "machine_memory", lambda: 64 * 2**30)
    assert said(paper, tmp_path) == "", "layers go in groups that fit by themselves"
    shared = said(paper, tmp_path, workers=2)
    assert "a process may use 25.6 GiB (80% of this machine's 64.0 GiB by 2 workers): fewer --workers, or lower" in shared
    assert "fewer --workers" in said(load_study(EXAMPLE, ["compute.device=cpu", "compute.memory_gb=60"]), tmp_path, workers=2)
    assert "raise compute.memory_gb" in said(load_study(EXAMPLE, ["compute.device=cpu", "compute.memory_gb=6"]), tmp_path)
    cuda = load_study(EXAMPLE, ["compute.device=cuda"])
    assert said(cuda, tmp_path, workers=8) == "", "what the GPU of another machine has is not known here"
    monkeypatch.setattr(machine, "gpu_memory", lambda: 4 * 2**30)
    assert "(80% of 4.0 GiB free on the GPU): take a larger" in said(cuda, tmp_path)
    stated = load_study(EXAMPLE, ["compute.device=cuda", "compute.memory_gb=60"])
    assert "The GPU has 4.0 GiB free and 1 process(es) on it need up to" in said(stated, tmp_path)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    assert "has 953.7 MiB free: choose another --out" in said(paper, tmp_path)


def test_the_plan_is_of_the_groups_that_the_run_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compute.memory_gb unset: the units of the first run, without doing them."""
    raw = planted(
        models=planted_model(n_layers=6, checkpoints=[0, 10, 20]), layers="all", sae={"n": 2**20, "lr": [1e-3, 3e-3]},
        controls={"frozen_decoder": True},
    )  # fmt: skip
    study = as_study(raw)
    (first, *_) = expand(study)
    assert first.shape is not None
    have = int(train_memory(study, first.shape, 6) / machine.SHARE) + 1024
    monkeypatch.setattr(machine, "machine_memory", lambda: have)
    store = RunStore(tmp_path / "run")
    store.create(study, describe_run(study))
    context = Context.open(store.root)
    for workers, groups in ((1, 1), (2, 3), (3, 6), (24, None)):
        room = machine.room_for(study, workers)
        if groups is None:
            with pytest.raises(InputError, match="fewer --workers"):
                context.groups(first, room)
            continue
        found = planning.forecast(study, STATED, workers)
        assert {cost.groups for _, cost in found.rows if cost is not None} == {groups}
        made = [(s, u) for s, units in stages(context, room, workers) if s in ("train", "features") for u in units()]
        for stage in ("train", "features"):
            assert sum(u.count for u in found.units if u.stage == stage) == sum(s == stage for s, _ in made)
        assert found.peak == max(u.memory for _, u in made) <= room.each


def test_plan_and_the_first_line_of_a_run_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    study = as_study(PLANTED)
    measured = {json.dumps(t, sort_keys=True): 1e-6 for t in calibration.tasks_of(study)}
    write_json(calibration.cache_path(study, 1), {"measured": measured})
    monkeypatch.setattr(machine, "machine_memory", lambda: 2**30)
    plan = command("plan", path, "--workers", "1").out
    assert "Each may use 819.2 MiB (80% of this machine's 1.0 GiB)" in plan
    (total,) = (line.split("│") for line in plan.splitlines() if line.startswith("│ total"))
    peak, disk = (total[i].strip() for i in (6, 7))
    ran = command("run", path, "--out", tmp_path / "out", "--workers", "1", "--until", "pretrain").err
    assert f"with 1 worker(s), {peak} a process, {disk} on disk" in ran


def test_what_lies_there_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = as_study(PLANTED), tmp_path / "run"
    need = planning.forecast(study, STATED, 1).disk
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: type("Usage", (), {"free": need // 2})())
    assert "The run directory grows to about" in said(study, out)
    out.mkdir()
    (out / "done").write_bytes(bytes(2 * need // 3))
    assert said(study, out) == ""
    (out / "done").rename(out / "less")
    (out / "less").write_bytes(bytes(need // 3))
    assert "The run directory grows by about" in said(study, out)


def test_checkpoints_beyond_the_disk_budget_are_said(tmp_path: Path) -> None:
    hub = [f"models.{i}.hub_id=owner/lm{i}" for i in range(5)]
    small = said(load_study(EXAMPLE, [*hub, "compute.disk_gb=5", "compute.remove_downloads=true"]), tmp_path)
    assert "A checkpoint of llm-jp-3-3.7b does not fit compute.disk_gb = 5" in small
    kept = said(load_study(EXAMPLE, [*hub, "compute.disk_gb=20"]), tmp_path)
    assert "set compute.remove_downloads = true" in kept
    fits = said(load_study(EXAMPLE, [*hub, "compute.disk_gb=20", "compute.remove_downloads=true"]), tmp_path)
    assert "disk_gb" not in fits


def test_a_model_of_unknown_size_is_told(tmp_path: Path) -> None:
    (tmp_path / "w" / "iter_1").mkdir(parents=True)
    raw = load_study(EXAMPLE).dump()
    raw["models"] = [{"name": "m", "source": "checkpoints", "root": str(tmp_path / "w"), "glob": "iter_*", "tokens_per_step": 1}]
    out = StringIO()
    planning.print_plan(as_study(raw), 1e12, Console(file=out, width=250), workers=1)
    assert "size unknown" in out.getvalue()
    assert "Give [[models.shape]]" in out.getvalue()
