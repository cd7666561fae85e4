"""`--dry-run`: says what the command does afterwards, and changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console
from study_fixture import BRIEF, PLANTED, as_study, command, hub_study, planted, work_done
from test_scaling import CUT

import glottoscope as gs
from glottoscope.lm.hub import FolderHub
from glottoscope.study import machine
from glottoscope.study.plan import Room
from glottoscope.study.planning import announce
from glottoscope.study.store import RunStore, json_text


def everything(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def units(text: str) -> dict[str, str]:
    """Stage -> units, as printed."""
    rows = (re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if line.startswith("│"))
    return {row[0]: row[1] for row in rows}


def test_run_says_what_it_then_does(tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    said = command("run", path, "--out", out, "--workers", "1", "--until", "features", "--dry-run")
    assert said.code == 0
    assert not out.exists()
    assert "which it would make" in said.out
    assert command("run", path, "--out", out, "--workers", "1", "--until", "features").code == 0
    done = work_done(RunStore(out))
    told = units(said.out)
    assert {s: n for s, n in told.items() if n != "?"} == {s: str(done[s]) for s, n in told.items() if n != "?"}
    assert told["pretrain"] == "2"  # the tokenizer and the model

    before = everything(out)
    again = command("run", path, "--out", out, "--workers", "1", "--until", "features", "--dry-run")
    assert set(units(again.out).values()) == {"0"}
    path.write_text(tomli_w.dumps(planted(sae={"k": 2})), encoding="utf-8")
    changed = units(command("run", path, "--out", out, "--workers", "1", "--until", "features", "--dry-run").out)
    assert (changed["pretrain"], changed["tokens"], changed["train"]) == ("0", "0", "2")
    assert everything(out) == before
    other = command("run", path, "--out", out, "--set", "study.name=other", "--dry-run")
    assert other.code == 2
    assert "belongs to the study 'tiny'" in other.complaint


def test_demo_and_the_small_study_write_nothing(tmp_path: Path) -> None:
    said = command("demo", "--out", tmp_path / "demo", "--workers", "1", "--dry-run")
    assert said.code == 0
    assert units(said.out)["tokens"] == "1"
    path = tmp_path / "cut.toml"
    path.write_text(tomli_w.dumps(CUT), encoding="utf-8")
    said = command("run", path, "--scale", "tiny", "--out", tmp_path / "small", "--workers", "1", "--dry-run")
    assert said.code == 0
    assert "would write 4 random checkpoints" in said.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.toml"]


def test_what_cannot_be_trained_is_said_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    monkeypatch.setattr(machine, "machine_memory", lambda: 2 * 2**30)
    for dry in (True, False):
        ended = command("run", path, "--out", out, "--workers", "64", *(["--dry-run"] if dry else []))
        assert ended.code == 2
        assert "(80% of this machine's 2.0 GiB by 64 workers): fewer --workers, or lower sae.n" in ended.complaint
        assert "memory_gb" not in ended.complaint
    assert not list((out / "models").glob("*")), "models were trained first"
    # What needs no SAE is not kept from running.
    assert command("run", path, "--out", out, "--workers", "64", "--until", "tokens", "--dry-run").code == 0
    assert command("plan", path, "--workers", "64", "--device-flops", "1e10").code == 0


def test_a_cluster_is_not_reckoned_with_as_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    monkeypatch.setattr(machine, "machine_memory", lambda: 2**20)
    said = command(
        "run", path, "--out", tmp_path / "out", "--engine", "ray", "--address", "10.0.0.1:6379", "--workers", "128", "--dry-run"
    )
    assert said.code == 0, said.err
    assert "--engine ray, at most 128 unit(s) at once" in said.out
    assert "the nodes decide how many units are at work at once, and how the layers of a cell are grouped" in said.out
    assert "worker(s)" not in said.out
    text = StringIO()
    study = as_study(PLANTED)
    room = Room(2**30, 2**31, "the largest node's memory", alone=0.0)
    announce(study, tmp_path / "out", 128, room, Console(file=text, width=200), nodes=True)
    assert text.getvalue() == ""


def test_the_small_study_heeds_owner_until_and_engine(tmp_path: Path) -> None:
    path, out = tmp_path / "cut.toml", tmp_path / "small"
    path.write_text(tomli_w.dumps(CUT), encoding="utf-8")
    arguments = ("run", path, "--scale", "tiny", "--out", out, "--workers", "1")
    wrong = command(*arguments, "--engine", "slurm")
    assert (wrong.code, list(tmp_path.iterdir())) == (2, [path]), "checkpoints were written first"
    assert "unknown engine" in wrong.complaint
    told = units(command(*arguments, "--until", "train", "--dry-run").out)
    assert "train" in told and "features" not in told
    store = RunStore(out)
    store.create(as_study(planted()), {"study": "tiny"})
    other = command(*arguments, "--dry-run")
    assert other.code == 2
    assert "belongs to the study 'tiny'" in other.complaint


def test_intervene_and_clean_of_a_finished_run(tiny: RunStore, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(tiny.root, root, ignore=shutil.ignore_patterns(".lock*"))
    (root / "cells" / "gone@3").mkdir()
    (root / "cells" / "gone@3" / "x").write_text("x")
    before = everything(root)
    said = command("intervene", root, "--base", "0", "--layer", "1", "--draws", "0", "--dry-run")
    assert said.code == 0, said.err
    assert units(said.out)["plan"] == "1"
    assert "would write to" in said.out
    assert command("intervene", root, "--base", "7", "--dry-run").code == 2
    assert "would remove" in command("clean", root, "--dry-run").out
    assert everything(root) == before


def test_checkpoints_of_a_hub_whose_size_only_they_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, configs = FolderHub.fetch, []

    def counting(hub: FolderHub, repo: str, revision: str, names: Iterable[str], folder: Path) -> None:
        configs.extend(folder for _ in range(set(names) == {"config.json"}))
        fetch(hub, repo, revision, names, folder)

    monkeypatch.setattr(FolderHub, "fetch", counting)
    path, out, here = tmp_path / "hub.toml", tmp_path / "out", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path.write_text(tomli_w.dumps(hub_study(tmp_path, intervention=BRIEF)), encoding="utf-8")
    arguments = ("run", path, "--out", out, "--workers", "1", "--until", "score")
    said = command(*arguments, "--dry-run")
    assert said.code == 0, said.err
    assert units(said.out)["tokens"] == "1"
    assert not out.exists()
    assert not list(here.iterdir())
    configs.clear()
    assert command(*arguments).code == 0
    # Once to look at the interventions, once by the driver; no unit asks again.
    assert len(configs) == 2
    assert not any(folder.exists() for folder in configs)

    def look() -> int:
        assert command("status", out).code == 0
        assert command(*arguments, "--dry-run").code == 0
        return gs.load_run(out).features_dataset.count_rows()

    before = contents(out)
    n_rows = look()
    assert n_rows == 2 * 2 * 32
    assert contents(out) == before
    record = json.loads((out / "done.json").read_text(encoding="utf-8"))
    del record["shapes"]  # as an earlier version left it
    (out / "done.json").write_text(json_text(record), encoding="utf-8")
    before = contents(out)
    assert look() == n_rows
    assert contents(out) == before
    # What a run recorded is enough to look at it where its hub is not reached.
    assert command(*arguments).code == 0
    (tmp_path / "hub").rename(tmp_path / "away")
    assert command("status", out).code == 0
    assert gs.load_run(out).features_dataset.count_rows() == n_rows


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with the time of its last change: making a file and removing it shows, too."""
    found = {str(p.relative_to(root)): p for p in sorted(root.rglob("*"))}
    return {name: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for name, p in [("", root), *found.items()]}
