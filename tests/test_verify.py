"""verify: damage is found and named, nothing else is; the next run mends it, and the tables come out byte for byte the same."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from study_fixture import BRIEF, PLANTED, command, contents, intervened, log_lines, run, work_done

from glottoscope.atomic import TEMPORARY_PREFIX
from glottoscope.errors import InputError
from glottoscope.study import artefacts, verifying
from glottoscope.study.runner import status
from glottoscope.study.store import RunStore, file_digest
from glottoscope.study.verifying import Verdict, verify

RAW = {**PLANTED, "intervention": BRIEF}
SETUP = "cells/m@20/layer_01/seed_0"
EXPERIMENT = "interventions/study/m@0+m@20/layers_01-add-matched/seed_0"


@pytest.fixture(scope="module")
def finished(tiny: RunStore, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The tiny study with an intervention and its report. Never written to."""
    store = intervened(tiny, tmp_path_factory.mktemp("verify") / "run", BRIEF)
    return run(RAW, store.root, until="report")


@pytest.fixture
def copy(finished: RunStore, tmp_path: Path) -> RunStore:
    shutil.copytree(finished.root, tmp_path / "run")
    return RunStore(tmp_path / "run")


def flip(path: Path, seed: int = 0) -> None:
    """Flip one bit of one byte, somewhere."""
    rng, data = random.Random(f"{path.name}{seed}"), bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def results(store: RunStore) -> dict[str, str]:
    """File -> hash of everything but who ran it, with which code, and how the trainings got on."""
    found = contents(store.root, ("**/*",)).items()
    return {name: x for name, x in found if name not in ("manifest.json", "done.json") and not name.startswith("metrics/")}


def found(verdict: Verdict) -> dict[str, str]:
    return {p.path: p.state for p in verdict.problems}


def units(store: RunStore, before: int) -> dict[str, int]:
    return {stage: n for stage, n in work_done(store, before).items() if n}


def mend(store: RunStore) -> dict[str, int]:
    """Run again; returns the units that each stage did."""
    before = log_lines(store)
    run(RAW, store.root, until="report")
    return units(store, before)


# ---- what is whole


@pytest.mark.parametrize("quick", [False, True])
def test_a_finished_run_is_whole(finished: RunStore, quick: bool) -> None:
    before = results(finished)
    verdict = verify(finished.root, quick=quick, keep=True)
    assert (verdict.problems, verdict.unknown, verdict.uncheckable, verdict.leftovers, verdict.unsized) == ([], [], [], 0, 0)
    apart = ("done.json", "log.jsonl", ".lock")
    files = [p for p in finished.root.rglob("*") if p.is_file() and p.name not in apart and p.parent != finished.metrics_dir]
    assert verdict.files == len(files)
    assert verdict.read == (0 if quick else sum(p.stat().st_size for p in files))
    assert results(finished) == before


def test_the_command(copy: RunStore) -> None:
    ended = command("verify", copy.root)
    assert ended.code == 0, ended.err
    assert "0 damaged, 0 missing, 0 unknown" in ended.out
    flip(copy.cells_dir / "m@20/layer_01/seed_0/sae.safetensors")
    (copy.report_dir / "index.html").unlink()
    (copy.root / "notes.txt").write_text("mine")
    for _ in range(2):  # --keep changes nothing, so it says the same again
        ended = command("verify", copy.root, "--keep")
        assert ended.code == 1
        lines = ended.out.splitlines()
        assert lines[0] == f"damaged  {SETUP}/sae.safetensors (train): its bytes have changed"
        assert lines[1] == "missing  report/index.html (report): it is not there"
        assert lines[2] == "unknown  notes.txt: no record names it"
        assert "1 damaged, 1 missing, 1 unknown" in lines[3]
        assert lines[4] == f"nothing was changed; `glottoscope verify {copy.root}` lets the next run make them again"
    ended = command("verify", copy.root)
    assert ended.code == 1
    assert ended.out.splitlines()[-3:] == ["the next run makes again:", f"  {SETUP}: train", "  report: report"]
    words = {row.stage: row.words for row in status(copy.root)}
    assert words["train"] == "1 units to do"


# ---- what is damaged

# One file of each kind, and the stages that are done again for it.
KINDS = {
    "manifest.json": set(),
    "study.toml": set(),
    "tokenizer/tokenizer.json": {"pretrain"},
    "models/m/step_20/model.safetensors": {"pretrain"},
    "models/m/step_0/config.json": {"pretrain"},
    "models/m/log.parquet": {"pretrain"},
    "tokens/train.tokens.npy": {"tokens"},
    "tokens/aligned/test.ids.json": {"tokens"},
    "tokens/vocabulary.parquet": {"tokens"},
    "tokens/info.json": {"tokens"},
    f"{SETUP}/sae.safetensors": {"train"},
    f"{SETUP}/cfg.json": {"train"},
    f"{SETUP}/training.parquet": {"train"},
    f"{SETUP}/collected.parquet": {"features"},
    f"{SETUP}/examples.parquet": {"features"},
    f"{SETUP}/quality.json": {"features"},
    f"{SETUP}/features.parquet": {"score"},
    f"{SETUP}/row.json": {"score"},
    "cells/m@0/cell.json": {"features"},
    "rulers/m/embeddings.safetensors": {"features"},
    "rulers/m/hidden_layer_01.safetensors": {"features"},
    "rulers/m/clusters_embeddings.safetensors": {"score"},
    f"{EXPERIMENT}/sets.npz": {"intervene"},
    f"{EXPERIMENT}/documents-000.npz": {"intervene"},
    f"{EXPERIMENT}/intervention.parquet": {"intervene"},
    "tables/features.parquet": {"score"},
    "tables/evolution.csv": {"score"},
    "tables/intervention.parquet": {"intervene"},
    "report/index.html": {"report"},
    "report/figures/heat_m.png": {"report"},
}


def test_a_flipped_bit_is_named(copy: RunStore) -> None:
    for name in KINDS:
        whole = (copy.root / name).read_bytes()
        flip(copy.root / name)
        assert found(verify(copy.root, keep=True)) == {name: "damaged"}
        (copy.root / name).write_bytes(whole)
    assert verify(copy.root).problems == []


# A kind of each folder: what depends on a mended file is not made again.
MENDED = (
    "manifest.json", "models/m/step_20/model.safetensors", "tokens/info.json", f"{SETUP}/sae.safetensors",
    f"{SETUP}/collected.parquet", f"{SETUP}/row.json", "cells/m@0/cell.json", "rulers/m/hidden_layer_01.safetensors",
    "rulers/m/clusters_embeddings.safetensors", f"{EXPERIMENT}/documents-000.npz", "report/index.html",
)  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_a_flipped_bit_is_mended(copy: RunStore, name: str) -> None:
    before = results(copy)
    flip(copy.root / name)
    assert found(verify(copy.root)) == {name: "damaged"}
    assert set(mend(copy)) == KINDS[name]
    assert results(copy) == before
    assert verify(copy.root).problems == []
    assert not copy.damaged_path.exists()


def test_what_is_made_from_a_mended_file_is_not_made_again(copy: RunStore) -> None:
    (copy.tokens_dir / "test.tokens.npy").unlink()
    flip(copy.checkpoint_dir("m", 20) / "model.safetensors")
    assert found(verify(copy.root)) == {"models/m/step_20/model.safetensors": "damaged", "tokens/test.tokens.npy": "missing"}
    assert mend(copy) == {"pretrain": 1, "tokens": 1}


RECORDS = (
    "done.json", "models/m/done.json", "models/m/step_20/done.json", "tokens/done.json", "cells/m@0/done.json",
    f"{SETUP}/done.json", "rulers/m/done.json", f"{EXPERIMENT}/done.json", "tables/done.json", "report/done.json",
)  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_flipped_bit_of_a_record_is_found(finished: RunStore, tmp_path: Path, name: str) -> None:
    """Wherever it is: in a key, a hash, a size, a setting, a stage's name, a bracket."""
    folder = tmp_path / "run"
    shutil.copytree((finished.root / name).parent, folder / Path(name).parent, dirs_exist_ok=True)
    shutil.copy(finished.manifest_path, folder)
    whole = (folder / name).read_bytes()
    for seed in range(25):
        flip(folder / name, seed)
        state = found(verify(folder, keep=True))
        assert state.get(name) == "damaged", (folder / name).read_bytes()
        (folder / name).write_bytes(whole)
    assert name not in found(verify(folder, keep=True))


@pytest.mark.parametrize("damage", ["{", "", "[]", "null", "\udc80"])
def test_a_record_that_is_none(copy: RunStore, damage: str) -> None:
    before = results(copy)
    path = copy.root / SETUP / "done.json"
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    verdict = verify(copy.root)
    assert found(verdict) == {f"{SETUP}/done.json": "damaged"}
    # Its files are neither unknown nor whole.
    assert verdict.unknown == []
    assert set(verdict.uncheckable) == {f"{SETUP}/{p.name}" for p in (copy.root / SETUP).iterdir()}
    assert verdict.made_again == [f"{SETUP}: everything"]
    mend(copy)
    assert results(copy) == before


@pytest.mark.parametrize("damage", [("tiny", "tinz"), ('"study"', '"study')], ids=["another name", "not JSON"])
def test_whose_directory_it_is_outlives_damage(copy: RunStore, damage: tuple[str, str]) -> None:
    before = results(copy)
    for path in (copy.manifest_path, copy.study_path):
        path.write_text(path.read_text(encoding="utf-8").replace(*damage), encoding="utf-8")
    assert "manifest.json" in found(verify(copy.root))
    with pytest.raises(InputError, match="belongs to the study 'tiny', not to 'other'"):
        run({**RAW, "study": {"name": "other"}}, copy.root)
    assert mend(copy) == {}
    assert results(copy) == before
    assert verify(copy.root).problems == []


def test_a_changed_setting_on_record_is_made_again(copy: RunStore) -> None:
    """The learning rate of a checkpoint goes from its record into the tables."""
    before = results(copy)
    path = copy.checkpoint_dir("m", 20) / "done.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"learning_rate": 0.0003', '"learning_rate": 0.0009'), encoding="utf-8"
    )
    assert found(verify(copy.root)) == {"models/m/step_20/done.json": "damaged"}
    assert mend(copy) == {"pretrain": 1}
    assert results(copy) == before


def test_damage_everywhere_at_once(copy: RunStore) -> None:
    before = results(copy)
    names = [n for n in KINDS if n != "tokenizer/tokenizer.json"]
    for name in names:
        flip(copy.root / name)
    assert found(verify(copy.root)) == dict.fromkeys(names, "damaged")
    mend(copy)
    assert results(copy) == before


def test_a_repair_with_other_bytes_makes_what_is_made_from_it_again(copy: RunStore) -> None:
    """As on a machine whose last bits differ: here the bytes on record are changed instead."""
    path, record = copy.root / SETUP / "done.json", copy.done(copy.root / SETUP)
    before = contents(copy.root)
    record["features"]["files"]["collected.parquet"] = "0" * 64
    record["features"] = artefacts.signed("features", record["features"])
    path.write_text(json.dumps(record, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    assert found(verify(copy.root)) == {f"{SETUP}/collected.parquet": "damaged"}
    done = mend(copy)
    # Its scores, the tables, the intervention that reads its classes, the report; no other setup.
    assert (done["features"], done["score"], done["report"]) == (1, 2, 1)
    assert done["intervene"] >= 3
    assert contents(copy.root) == before
    assert verify(copy.root).problems == []


# ---- sizes only


def test_quick_looks_at_sizes(copy: RunStore) -> None:
    flip(copy.root / SETUP / "sae.safetensors")
    assert verify(copy.root, quick=True, keep=True).problems == []
    whole = (copy.root / SETUP / "sae.safetensors").read_bytes()
    (copy.root / SETUP / "sae.safetensors").write_bytes(whole[:-1])
    (copy.tables_dir / "sweeps.parquet").unlink()
    verdict = verify(copy.root, quick=True)
    assert [(p.path, p.why) for p in verdict.problems] == [
        (f"{SETUP}/sae.safetensors", f"{len(whole) - 1:,} bytes instead of {len(whole):,}"),
        ("tables/sweeps.parquet", "it is not there"),
    ]


def test_records_of_the_first_version(copy: RunStore) -> None:
    """Without sizes and checksums: hashes are compared, and sizes where there are any."""
    for folder in artefacts.folders(copy.root):
        path = copy.root / folder / "done.json"
        old = {stage: {k: r[k] for k in ("key", "settings", "files")} for stage, r in copy.done(path.parent).items()}
        path.write_text(json.dumps(old, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    assert verify(copy.root).problems == []
    verdict = verify(copy.root, quick=True)
    assert verdict.problems == []
    assert verdict.unsized == verdict.files
    flip(copy.root / SETUP / "row.json")
    assert found(verify(copy.root)) == {f"{SETUP}/row.json": "damaged"}


# ---- what is no result


def test_files_that_no_record_names(copy: RunStore) -> None:
    (copy.root / SETUP / "thoughts.md").write_text("mine")
    states = copy.cell_dir("m", 20) / ".resume"
    states.mkdir()
    (states / "state_5.safetensors").write_bytes(b"half")
    (copy.cells_dir / f"{TEMPORARY_PREFIX}01-x").mkdir()
    copy.labels_path.parent.mkdir()
    copy.labels_path.write_text("{}\n")
    verdict = verify(copy.root)
    assert verdict.problems == []
    assert verdict.unknown == [f"{SETUP}/thoughts.md"]
    assert verdict.leftovers == 1
    assert (copy.root / SETUP / "thoughts.md").exists()


def test_an_unfinished_run_is_whole(tmp_path: Path) -> None:
    store = run(PLANTED, tmp_path / "run", until="tokens")
    assert verify(store.root).problems == []
    shutil.rmtree(store.tokens_dir)
    assert verify(store.root).problems == []  # nothing says that it was ever there


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        verify(tmp_path / "none")
    with pytest.raises(InputError, match="is no run directory"):
        verify(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_at_work_is_only_looked_at(copy: RunStore) -> None:
    flip(copy.root / SETUP / "row.json")
    with copy.lock():
        with pytest.raises(InputError, match="another process is running the study"):
            verify(copy.root)
        assert found(verify(copy.root, keep=True)) == {f"{SETUP}/row.json": "damaged"}


def test_what_a_run_mends_meanwhile_is_no_damage(copy: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy.root / SETUP / "row.json"
    record = copy.done(path.parent)["score"]
    path.write_text("{}\n")
    look = verifying._look

    def mended(*arguments: object) -> object:
        problem = look(*arguments)  # pyright: ignore[reportArgumentType]
        if problem is not None and problem.path.endswith("row.json"):
            copy.mark_done(path.parent, "score", record["key"], {}, ["features.parquet", "row.json"])
        return problem

    monkeypatch.setattr(verifying, "_look", mended)
    assert verify(copy.root, keep=True).problems == []
    assert copy.done(path.parent)["score"]["files"]["row.json"] == file_digest(path)
