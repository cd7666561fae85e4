"""merge: two runs of one study become one, as if one machine had made all of it; nothing is overwritten."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tomli_w
from study_fixture import PLANTED, as_study, command, contents, log_lines, planted, planted_model, run, state, text_study, work_done

from glottoscope.atomic import write_table
from glottoscope.errors import InputError
from glottoscope.study import artefacts, merging
from glottoscope.study.merging import merge
from glottoscope.study.runner import status
from glottoscope.study.store import RunStore, read_parquet
from glottoscope.study.union import unite
from glottoscope.study.verifying import verify

HERE = planted(layers=[0])
THERE = planted(
    layers=[1], sae={"seeds": [0, 1]},
    models=[*planted_model(checkpoints=[0, 10, 20]), *planted_model(name="n", layers=[0, 1])],
)  # fmt: skip
BOTH = planted(
    sae={"seeds": [0, 1]}, models=[*planted_model(checkpoints=[0, 10, 20]), *planted_model(name="n")],
)  # fmt: skip
RESULTS = ("tables/*", "cells/**/*", "models/**/*", "rulers/**/*", "tokens/**/*", "tokenizer/*")
SETUP = "cells/m@0/layer_01/seed_0"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return run(HERE, tmp_path_factory.mktemp("here") / "run")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return run(THERE, tmp_path_factory.mktemp("there") / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one run of all of it gives."""
    return results(run(BOTH, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def a(here: RunStore, tmp_path: Path) -> RunStore:
    return RunStore(shutil.copytree(here.root, tmp_path / "a"))


@pytest.fixture
def b(there: RunStore, tmp_path: Path) -> RunStore:
    return RunStore(shutil.copytree(there.root, tmp_path / "b"))


def results(store: RunStore) -> dict[str, str]:
    """File -> hash. The record of a model tells the settings of the study file, which say the same in several ways."""
    return {name: x for name, x in contents(store.root, RESULTS).items() if name.count("/") != 2 or not name.endswith("/done.json")}


def go_on(store: RunStore) -> dict[str, int]:
    """Run the joined study; returns the units that each stage did."""
    before = log_lines(store)
    run(store.study().dump(), store.root)
    return {stage: n for stage, n in work_done(store, before).items() if n}


def change(store: RunStore, folder: str, name: str, content: bytes) -> None:
    """Other bytes in a file, as its record says: what another machine might have made."""
    (store.root / folder / name).write_bytes(content)
    for stage, record in store.done(store.root / folder).items():
        if name in record["files"]:
            store.mark_done(store.root / folder, stage, record["key"], record["settings"], list(record["files"]))


# ---- joined


def test_two_machines_are_as_one(a: RunStore, there: RunStore, whole: dict[str, str]) -> None:
    before = state(there.root)
    found = merge(a.root, there.root)
    assert state(there.root) == before
    assert found.is_whole
    assert found.warnings == found.notes == found.damaged == []
    assert a.study() == as_study(BOTH)
    assert found.gained == [
        "models.m.checkpoints 10", "model n", "sae.seeds 1", "layers [1] of m",
    ]  # fmt: skip
    assert verify(a.root).problems == []
    # Only what neither held is made: layer 0 of the second seed and of the new checkpoint.
    made = [row.words for row in status(a.root) if row.stage in ("pretrain", "tokens", "train")]
    assert made == ["done", "done", "3 units to do"]
    assert go_on(a)["train"] == 3
    assert results(a) == whole
    assert merge(a.root, there.root).items == []
    assert go_on(a) == {}


def test_the_command(a: RunStore, b: RunStore, tmp_path: Path) -> None:
    before = state(a.root)
    ended = command("merge", a.root, b.root, "--dry-run")
    assert ended.code == 0, ended.err
    assert state(a.root) == before
    assert not (a.root / ".lock-holder").exists()
    assert "would come over" in ended.out
    assert f"{a.root / 'study.toml'} would gain models.m.checkpoints 10; model n; sae.seeds 1; layers [1] of m" in ended.out
    ended = command("merge", a.root, b.root)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("models: 4 artefacts of 4 folders came over")
    assert lines[-1] == f"next: glottoscope run {a.root / 'study.toml'} --out {a.root}"
    ended = command("run", a.root / "study.toml", "--out", a.root, "--until", "score", "--workers", "1")
    assert ended.code == 0, ended.err


def test_a_merge_that_was_stopped_is_repeated(
    a: RunStore, there: RunStore, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, n = merging._copy, 0

    def stopped(*arguments: Any) -> str:
        nonlocal n
        n += 1
        if n == 25:
            raise KeyboardInterrupt
        return copy(*arguments)

    monkeypatch.setattr(merging, "_copy", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge(a.root, there.root)
    monkeypatch.undo()
    assert a.study() == as_study(HERE)
    assert a.leftovers() == []
    assert verify(a.root).problems == []
    assert merge(a.root, there.root).is_whole
    go_on(a)
    assert results(a) == whole


def test_a_full_disk_is_one_line(a: RunStore, there: RunStore, whole: dict[str, str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # no file may grow beyond it
    try:
        ended = command("merge", a.root, there.root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 2
    assert "no space left on device while writing" in ended.complaint
    assert a.study() == as_study(HERE)
    assert a.leftovers() == []
    assert verify(a.root).problems == []
    assert merge(a.root, there.root).is_whole
    go_on(a)
    assert results(a) == whole


def test_part_of_a_folder(a: RunStore, there: RunStore, tmp_path: Path) -> None:
    """Trained here, features collected there."""
    other = RunStore(shutil.copytree(a.root, tmp_path / "b"))
    before = results(a)
    a.begin(a.root / "cells/m@0/layer_00/seed_0", "features", "score")
    for path in (a.root / "cells/m@0/layer_00/seed_0").iterdir():
        if path.name not in a.done(path.parent)["train"]["files"] and path.name != "done.json":
            path.unlink()
    found = merge(a.root, other.root)
    assert [(x.folder, x.stage) for x in found.items] == [("cells/m@0/layer_00/seed_0", x) for x in ("features", "score")]
    assert results(a) == before
    assert go_on(a) == {}


def test_damage_here_is_mended_by_what_lies_there(a: RunStore, tmp_path: Path) -> None:
    other = RunStore(shutil.copytree(a.root, tmp_path / "b"))
    before = results(a)
    for name in ("cells/m@0/layer_00/seed_0/sae.safetensors", "tokens/test.tokens.npy", "rulers/m/embeddings.safetensors"):
        (a.root / name).write_bytes(b"damaged")
    verify(a.root)
    merge(a.root, other.root)
    assert results(a) == before
    assert verify(a.root).problems == []
    assert not a.damaged_path.exists()
    assert go_on(a) == {}


# ---- what does not come over


def test_damage_there_is_left_there(a: RunStore, b: RunStore, whole: dict[str, str]) -> None:
    for name in ("models/n/step_20/model.safetensors", f"{SETUP}/collected.parquet"):
        content = bytearray((b.root / name).read_bytes())
        content[100] ^= 1
        (b.root / name).write_bytes(content)
    (b.root / "cells/m@10/layer_01/seed_0/sae.safetensors").unlink()
    ended = command("merge", a.root, b.root)
    assert ended.code == 1
    damaged = [x for x in ended.out.splitlines() if x.startswith("damaged in the other run: ")]
    assert [x.split(": ")[1] for x in damaged] == [
        "models/n/step_20 (pretrain)", f"{SETUP} (features)", "cells/m@10/layer_01/seed_0 (train)",
    ]  # fmt: skip
    # What was made from a damaged file may be as good as ever, but nothing here says so.
    assert f"left: {SETUP} (score): made from {SETUP} (features), which did not come over" in ended.out
    assert not (a.root / "cells/n@20").exists()
    assert set(a.done(a.root / SETUP)) == {"train"}
    assert verify(a.root).problems == []
    go_on(a)
    assert results(a) == whole


def test_other_bytes_are_a_conflict(a: RunStore, b: RunStore, whole: dict[str, str]) -> None:
    """The token vectors differ in a bit: what the other run scored with them does not come over."""
    path = b.root / "rulers/m/embeddings.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    change(b, "rulers/m", path.name, bytes(content))
    before = (a.root / "rulers/m/embeddings.safetensors").read_bytes()
    found = merge(a.root, b.root)
    assert not found.is_whole
    assert found.conflicts == ["rulers/m (means_layer_01): embeddings.safetensors is there with other bytes"]
    assert {x.split(":")[0] for x in found.left} >= {f"{SETUP} (score)", "rulers/m (clusters_hidden_layer_01)"}
    assert {x.stage for x in found.items if x.folder == SETUP} == {"train", "features"}
    assert (a.root / "rulers/m/embeddings.safetensors").read_bytes() == before
    go_on(a)
    assert results(a) == whole


def test_another_tokenizer_is_another_world(a: RunStore, b: RunStore) -> None:
    change(b, "tokenizer", "tokenizer_config.json", b"{}")
    before = results(a)
    found = merge(a.root, b.root)
    assert found.conflicts == ["tokenizer (tokenizer): same settings, other bytes"]
    assert found.items == []
    assert results(a) == before


def test_what_was_made_with_other_settings(a: RunStore, b: RunStore) -> None:
    """The study file says one thing, the artefact another: it was changed and not run again."""
    record = b.done(b.root / "models/m/step_20")["pretrain"]
    b.adopt(b.root / "models/m/step_20", "pretrain", {**record, "key": "0" * 32})
    found = merge(a.root, b.root)
    assert found.conflicts == ["models/m/step_20 (pretrain): made with other settings or from other inputs"]
    assert not (a.root / SETUP.replace("m@0", "m@20")).exists()
    assert (a.root / SETUP / "sae.safetensors").exists()  # step 0 has nothing to do with step 20


def test_models_of_earlier_settings_stay_where_they_are(a: RunStore, b: RunStore) -> None:
    shutil.copytree(b.root / "cells/n@0", b.root / "cells/old@0")
    found = merge(a.root, b.root)
    assert found.strange == len([x for x in found.items if x.folder.startswith("cells/n@0")])
    assert found.is_whole
    assert not (a.root / "cells/old@0").exists()


# ---- the last checkpoint


def test_another_last_checkpoint(tmp_path: Path) -> None:
    """The ruler of a model is its last checkpoint's: both halves are scored again with the one."""
    first = run(planted(models=planted_model(checkpoints=[0, 10])), tmp_path / "a")
    second = run(planted(models=planted_model(checkpoints=[0, 20])), tmp_path / "b")
    found = merge(first.root, second.root)
    assert found.is_whole
    setups = {f"cells/m@{step}/layer_0{layer}/seed_0" for step in (0, 20) for layer in (0, 1)}
    assert {x.split()[0] for x in found.stale} == {"rulers/m", *setups}
    done = go_on(first)
    assert "train" not in done
    assert "pretrain" not in done
    fresh = run(planted(models=planted_model(checkpoints=[0, 10, 20])), tmp_path / "fresh")
    assert results(first) == results(fresh)


def test_learning_rates_are_chosen_once(a: RunStore, b: RunStore) -> None:
    grid = {"lr": [1e-3, 3e-3]}
    early = as_study(planted(sae=grid, models=planted_model(checkpoints=[0, 10])))
    late = as_study(planted(sae=grid, models=planted_model(checkpoints=[0, 20])))
    with pytest.raises(InputError, match=r"models\.m: the last checkpoint chooses the learning rate.*add step 20 to both"):
        unite(early, late)
    with pytest.raises(InputError, match=r"sae\.seeds: the smallest seed chooses the learning rate.*add seed 0 to both"):
        unite(as_study(planted(sae={**grid, "seeds": [1]})), as_study(planted(sae={**grid, "seeds": [0]})))
    each = as_study(planted(sae={**grid, "lr_choice": "setup"}, models=planted_model(checkpoints=[0, 10])))
    assert unite(each, as_study(planted(sae={**grid, "lr_choice": "setup"}))).study.models[0].checkpoints == (0, 10, 20)


# ---- studies that do not fit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae": {"k": 2}}, "sae.k is 4 in the first and 2 in the second"),
        ({"study": {"seed": 1}}, "study.seed is 0 in the first and 1 in the second"),
        ({"compute": {"threads": 2}}, "compute.threads is 1 in the first and 2 in the second"),
        ({"features": {"theta": 0.5}}, "features.theta is not given in the first and 0.5 in the second"),
        ({"corpus": {"train_documents": 41}}, "corpus.train_documents is 40 in the first and 41 in the second"),
        ({"models": planted_model(lr=1e-3)}, "models.m.lr is 0.003 in the first and 0.001 in the second"),
        ({"models": planted_model(family="x")}, "models.m.family is not given in the first and 'x' in the second"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_must_be_equal(a: RunStore, b: RunStore, changes: dict[str, Any], words: str) -> None:
    b.study_path.write_text(tomli_w.dumps(planted(**changes)), encoding="utf-8")
    before = state(a.root)
    ended = command("merge", a.root, b.root)
    assert ended.code == 2
    assert words in ended.complaint
    assert "Only models, checkpoints, layers and seeds may" in ended.complaint
    assert state(a.root) == before


def test_settings_of_a_machine_are_ours(a: RunStore, b: RunStore) -> None:
    raw = {
        **THERE,
        "compute": {**PLANTED["compute"], "memory_gb": 3.0},
        "report": {"pattern_features": 2},
        "controls": {"shuffled": True},
    }
    b.study_path.write_text(tomli_w.dumps({**raw, "study": {"name": "tiny", "notes": "there"}}), encoding="utf-8")
    merge(a.root, b.root)
    assert a.study() == as_study({**BOTH, "controls": {"shuffled": True}})


def test_what_cannot_be_joined(a: RunStore, b: RunStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are the same folder"):
        merge(a.root, a.root)
    with pytest.raises(InputError, match="no such run directory"):
        merge(a.root, tmp_path / "none")
    with b.lock(), pytest.raises(InputError, match=rf"is running the study in {b.root} \(process \d+ on "):
        merge(a.root, b.root)
    with a.lock(), pytest.raises(InputError, match=f"another process is running the study in {a.root}"):
        merge(a.root, b.root)
    other = run(planted(study={"name": "other"}), tmp_path / "other", until="tokens")
    with pytest.raises(InputError, match=r"belongs to the study 'tiny' and .* to 'other'"):
        merge(a.root, other.root)


# ---- versions and machines


def test_other_versions_are_told_and_kept(a: RunStore, b: RunStore) -> None:
    manifest = b.manifest()
    manifest["versions"]["torch"], manifest["machine"]["sae_kernel"], manifest["versions"]["matplotlib"] = "2.0", "triton", "1.0"
    b.manifest_path.write_text(json.dumps(manifest))
    ours = a.manifest()
    found = merge(a.root, b.root)
    assert found.warnings == [
        f"torch: {ours['versions']['torch']} here, 2.0 there",
        f"sae_kernel: {ours['machine']['sae_kernel']} here, triton there",
    ]
    merged = a.manifest()["merged"]
    assert [m["versions"]["torch"] for m in merged] == ["2.0"]
    assert a.manifest()["seeds"]["lm"] == {"m": [0], "n": [0]}
    go_on(a)
    assert a.manifest()["merged"] == merged
    merge(a.root, b.root)
    assert a.manifest()["merged"] == merged


# ---- what is joined line by line


def test_logs_are_joined(a: RunStore, b: RunStore) -> None:
    """Losses were measured at other checkpoints; the rest of the log is the same."""
    found = merge(a.root, b.root)
    assert found.logs == ["m"]
    log = read_parquet(a.model_dir("m") / "log.parquet")
    assert [r["step"] for r in log.to_pylist() if r["loss_en"] is not None] == [0, 10, 20]
    assert verify(a.root).problems == []


def test_logs_that_tell_another_story_are_a_conflict(a: RunStore, b: RunStore) -> None:
    log = read_parquet(b.model_dir("m") / "log.parquet")
    loss = pa.array([None if x is None else x + 1 for x in log["loss"].to_pylist()])
    write_table(b.model_dir("m") / "log.parquet", log.set_column(log.schema.get_field_index("loss"), "loss", loss))
    change(b, "models/m", "log.parquet", (b.model_dir("m") / "log.parquet").read_bytes())
    found = merge(a.root, b.root)
    assert found.conflicts == ["models/m (pretrain): same settings, other bytes"]


def test_labels_are_joined(a: RunStore, b: RunStore) -> None:
    def line(time: str, grade: int | None, feature: int = 3, rater: str = "ann") -> str:
        return json.dumps({"setup": "m@0/layer_00/seed_0", "feature": feature, "rater": rater, "granularity": grade, "note": "",
                           "time": f"2025-01-0{time}T00:00:00Z", "blind": False, "sae": ""}) + "\n"  # fmt: skip

    for store, lines in (
        (a, [line("3", 1), line("3", 2, 4).strip()]),
        (b, [line("2", 4), line("5", 3, 4), line("1", 2, rater="bo"), "{"]),
    ):
        store.labels_path.parent.mkdir()
        store.labels_path.write_text("".join(lines), encoding="utf-8")
    assert merge(a.root, b.root, dry_run=True).labels == 2
    assert merge(a.root, b.root).labels == 2
    # Ann's later word on feature 3 was spoken here, that on feature 4 there.
    assert a.labels_path.read_text(encoding="utf-8") == line("3", 1) + line("3", 2, 4) + line("5", 3, 4) + line("1", 2, rater="bo")
    assert merge(a.root, b.root).labels == 0


# ---- one study of two


def elsewhere(**changes: Any) -> dict[str, Any]:
    """A model trained elsewhere."""
    return {"name": "x", "source": "checkpoints", "root": "/a", "tokens_per_step": 10, **changes}


def joined(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> Any:
    base = text_study(tmp_path)
    del base["corpus"]["tokenizer_training"]
    a, b = (as_study({**base, "models": [m]}) for m in (first, second))
    return unite(a, b)


def test_checkpoints_from_elsewhere(tmp_path: Path) -> None:
    found = joined(elsewhere(pattern="s{step}", steps=[1, 2]), elsewhere(pattern="s{step}", steps=[2, 3], root="/b"), tmp_path)
    assert found.study.models[0].steps == (1, 2, 3)
    assert found.study.models[0].root == "/a"
    assert found.notes == ["models.x.root differs"]
    assert found.new_final == {"x"}
    listed = [{"step": s, "path": f"s{s}"} for s in (1, 2)]
    found = joined(elsewhere(checkpoints=listed[:1]), elsewhere(checkpoints=listed), tmp_path)
    assert [c.step for c in found.study.models[0].checkpoints] == [1, 2]
    assert found.gained == ["checkpoint 2 of x"]
    with pytest.raises(InputError, match="checkpoint 1 has other tokens_seen"):
        joined(elsewhere(checkpoints=listed), elsewhere(checkpoints=[{**listed[0], "tokens_seen": 5}]), tmp_path)
    with pytest.raises(InputError, match="list them in both"):
        joined(elsewhere(checkpoints=listed), elsewhere(pattern="s{step}", steps=[1]), tmp_path)
    with pytest.raises(InputError, match=r"models\.x\.hub_id is not given in the first and 'h' in the second"):
        joined(elsewhere(pattern="s{step}", steps=[1]), elsewhere(pattern="s{step}", steps=[1], hub_id="h"), tmp_path)
    assert joined(elsewhere(glob="s*"), elsewhere(glob="s*", steps=[3]), tmp_path).study.models[0].steps == ()


def test_layers_of_each_model() -> None:
    first = as_study(planted(layers=[0], models=[*planted_model(), *planted_model(name="n", layers=[2])]))
    second = as_study(planted(layers="all"))
    with pytest.raises(InputError, match=r"models\.m\.layers: one study has layer 0 and the other 'all'"):
        unite(first, second)
    found = unite(first, as_study(planted(layers=[1])))
    assert {m.name: m.layers or found.study.layers for m in found.study.models} == {"m": (0, 1), "n": (2,)}
    assert unite(found.study, first).study == found.study
    assert unite(found.study, first).gained == []


# ---- what is made from what

MADE = [
    (("tokens", "tokens"), ("tokenizer", "tokenizer"), True),
    (("models/m/step_20", "pretrain"), ("tokens", "tokens"), False),
    (("models/m/step_20", "pretrain"), ("tokens/pretrain", "lm_text"), True),
    (("cells/m@20/layer_01/seed_0", "train"), ("tokens", "tokens"), True),
    (("cells/m@20/layer_01/seed_0", "train"), ("models/m/step_20", "pretrain"), True),
    (("cells/m@20/layer_01/seed_0", "train"), ("models/m/step_10", "pretrain"), False),
    (("cells/m@20/layer_01/seed_0", "score"), ("models/m/step_10", "pretrain"), True),  # the last step's ruler
    (("cells/m-shuffled@20/layer_01/seed_0", "train"), ("models/m/step_20", "pretrain"), True),
    (("cells/m-s1@20/layer_01/seed_0", "train"), ("models/m/step_20", "pretrain"), False),
    (("cells/m@20/layer_01/seed_0", "train"), ("models/m", "pretrain"), False),
    (("report", "report"), ("models/m", "pretrain"), True),
    (("cells/m@20/layer_01/seed_0", "features"), ("cells/m@20/layer_01/seed_0", "train"), True),
    (("cells/m@20/layer_01/seed_1", "features"), ("cells/m@20/layer_01/seed_0", "train"), False),
    (("cells/m@20/layer_01/seed_0", "train"), ("cells/m@20/layer_01/seed_0", "features"), False),
    (("cells/m@20/layer_01/seed_0", "score"), ("cells/m@20", "cell"), True),
    (("cells/m@20/layer_01/seed_0", "score"), ("cells/m@2", "cell"), False),
    (("cells/m@20/layer_01/seed_0", "score"), ("rulers/m", "clusters_embeddings"), True),
    (("cells/n@20/layer_01/seed_0", "score"), ("rulers/m", "clusters_embeddings"), False),
    (("cells/m@20/layer_01/seed_0", "features"), ("rulers/m", "means_layer_01"), False),
    (("rulers/m", "clusters_embeddings"), ("rulers/m", "means_layer_01"), True),
    (("interventions/study/m@0+m@20/layers_01-add-matched/seed_0", "prepare"), ("cells/m@20/layer_01/seed_0", "score"), True),
    (("interventions/study/n@0+n@20/layers_01-add-matched/seed_0", "prepare"), ("cells/m@20/layer_01/seed_0", "score"), False),
    (("interventions/x/m@0+m@20/l/seed_0", "effects"), ("interventions/x/m@0+m@20/l/seed_0", "documents-000"), True),
    (("interventions/x/m@0+m@20/l/seed_0", "effects"), ("interventions/y/m@0+m@20/l/seed_0", "prepare"), False),
    (("tables", "tables"), ("cells/m@20/layer_01/seed_0", "score"), True),
    (("tables", "tables"), ("interventions/x/m@0+m@20/l/seed_0", "effects"), False),
    (("tables", "intervention"), ("interventions/x/m@0+m@20/l/seed_0", "effects"), True),
    (("report", "report"), ("tables", "intervention"), True),
    ((".", "study"), ("tokenizer", "tokenizer"), False),
]  # fmt: skip


@pytest.mark.parametrize(("what", "source", "expected"), MADE, ids=lambda x: ":".join(x) if isinstance(x, tuple) else "")
def test_what_is_made_from_what(what: tuple[str, str], source: tuple[str, str], expected: bool) -> None:
    assert artefacts.is_made_from(*what, *source) is expected


def test_nothing_comes_before_what_it_is_made_from(there: RunStore) -> None:
    folders = list(artefacts.folders(there.root))
    order = [(f, s) for f in folders for s in sorted(there.done(there.root / f), key=lambda s, f=f: artefacts.place(f, s))]
    for n, what in enumerate(order):
        assert not any(artefacts.is_made_from(*what, *later) for later in order[n:])
