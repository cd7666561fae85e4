"""Studies end to end: the public tables, equal bytes, real text, controls, checkpoints trained elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from study_fixture import PLANTED, contents, planted, planted_model, run, text_study, work_done, write_jsonl

import glottoscope as gs
from glottoscope.errors import InputError
from glottoscope.study.load import parse_study
from glottoscope.study.plan import expand, lm_memory, sae_memory
from glottoscope.study.store import RunStore

KEYS = ["control", "family", "model", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed", "sae_seed"]
FEATURES = [
    "feature", "alive", "density", "max_activation", "n_positions", "n_en", "n_ja", "n_neutral", "language", "share_low",
    "share_high", "h_token", "h_semantic", "monosemanticity", "monosemanticity_hidden", "coherence", "coherence_token",
    "single_token", "phi", "phi_null", "bilingual", "bilingual_paper", "granularity",
]  # fmt: skip
MEASURES = [
    "share_en", "share_ja", "share_mixed", "share_bilingual", "share_bilingual_paper", "share_unclassified", "share_neutral",
    "alive", "monosemanticity", "monosemanticity_multi", "monosemanticity_pooled", "monosemanticity_hidden", "coherence",
    "alignment",
]  # fmt: skip
EVOLUTION = [
    *[f"{m}{end}" for m in MEASURES for end in ("", "_low", "_high")],
    "fvu", "cosine", "l0", "lm_loss_en", "lm_loss_ja", "lm_learning_rate", "sae_learning_rate",
]  # fmt: skip


def rows(store: RunStore, name: str = "evolution") -> list[dict[str, Any]]:
    return store.table(name).to_pylist()


def sae_bytes(store: RunStore) -> dict[str, str]:
    return contents(store.root, ("cells/**/sae.safetensors", "cells/**/cfg.json"))


def floats_of(column: pa.ChunkedArray) -> np.ndarray:
    flat = column.combine_chunks()
    while pa.types.is_list(flat.type):
        flat = flat.flatten()
    return flat.drop_null().to_numpy(zero_copy_only=False) if pa.types.is_floating(flat.type) else np.zeros(0)


# ---- the public tables


@pytest.mark.parametrize(("table", "columns"), [("features", FEATURES), ("evolution", EVOLUTION)])
def test_tables_have_the_documented_columns(tiny: RunStore, table: str, columns: list[str]) -> None:
    names = tiny.table(table).column_names
    assert names[: len(KEYS)] == KEYS
    assert not [c for c in columns if c not in names]
    assert len(set(names)) == len(names)


def test_no_parquet_file_holds_nan(tiny: RunStore) -> None:
    files = sorted(tiny.root.rglob("*.parquet"))
    assert {"features", "evolution", "sweeps", "examples", "training", "vocabulary"} <= {f.stem for f in files}
    for file in files:
        table = pq.read_table(file)
        for name in table.column_names:
            assert np.isfinite(floats_of(table[name])).all(), f"{file.name}: {name}"


def test_json_files_hold_no_nan(tiny: RunStore) -> None:
    def refuse(value: str) -> None:
        raise AssertionError(value)

    for file in tiny.root.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_rows_and_keys(tiny: RunStore) -> None:
    evolution, features = rows(tiny), tiny.table("features")
    assert [(r["model"], r["step"], r["layer"], r["sae_seed"]) for r in evolution] == [
        ("m", 0, 0, 0), ("m", 0, 1, 0), ("m", 20, 0, 0), ("m", 20, 1, 0),
    ]  # fmt: skip
    assert features.num_rows == 4 * 32
    assert features["feature"].to_pylist() == list(range(32)) * 4
    assert {r["tokens_seen"] for r in evolution} == {0, 20 * 16 * 64}
    assert {(r["control"], r["family"], r["d_model"], r["lm_seed"]) for r in evolution} == {("none", "tiny", 16, 0)}


def test_shares_are_shares(tiny: RunStore) -> None:
    for row in rows(tiny):
        total = sum(row[f"share_{x}"] for x in ("en", "ja", "mixed", "unclassified", "neutral"))
        assert math.isclose(total, 1.0)
        assert row["share_bilingual"] <= row["share_mixed"]
        for measure in MEASURES:
            if row[measure] is not None:
                assert row[f"{measure}_low"] <= row[measure] + 1e-9
                assert row[measure] <= row[f"{measure}_high"] + 1e-9
        assert 0 < row["l0"] <= 4
        assert row["lm_loss_en"] > 0
    table = tiny.table("features")
    dead = [not alive for alive in table["alive"].to_pylist()]
    assert [x == "dead" for x in table["language"].to_pylist()] == dead


def test_the_csv_is_the_table(tiny: RunStore) -> None:
    import pyarrow.csv

    table, csv = tiny.table("evolution"), pyarrow.csv.read_csv(tiny.tables_dir / "evolution.csv")
    assert csv.column_names == table.column_names
    assert csv["share_mixed"].to_pylist() == pytest.approx(table["share_mixed"].to_pylist())


def test_the_learning_rate_of_the_language_model_is_recorded(tiny: RunStore) -> None:
    found = {r["step"]: r["lm_learning_rate"] for r in rows(tiny)}
    assert found[20] == pytest.approx(3e-4)  # cosine down to a tenth of 3e-3
    assert {r["sae_learning_rate"] for r in rows(tiny)} == {1e-3}


def test_examples_show_their_own_maximum(tiny: RunStore) -> None:
    folder = tiny.setup_dir("m", 20, 1, 0)
    examples, features = pq.read_table(folder / "examples.parquet").to_pylist(), pq.read_table(folder / "features.parquet")
    maximum = dict(zip(features["feature"].to_pylist(), features["max_activation"].to_pylist(), strict=True))
    assert examples
    for row in examples:
        assert len(row["tokens"]) == len(row["activations"]) == 64
        assert row["activations"][row["position"] - row["window_start"]] == pytest.approx(row["value"], rel=1e-4)
        assert row["value"] <= maximum[row["feature"]] * (1 + 1e-6)
        assert row["language"] in ("en", "ja")
    assert all(row["value"] == pytest.approx(maximum[row["feature"]], rel=1e-5) for row in examples if row["rank"] == 0)


def test_the_report_opens_without_a_network(tiny: RunStore) -> None:
    page = (tiny.report_dir / "index.html").read_text(encoding="utf-8")
    assert "<script src=" not in page
    assert "<link" not in page.replace("<link rel=icon", "") or "http" not in page.split("<link", 1)[1].split(">", 1)[0]
    assert list((tiny.report_dir / "figures").glob("*.svg"))


def test_the_manifest_names_what_made_the_results(tiny: RunStore) -> None:
    manifest = tiny.manifest()
    assert manifest["study"] == "tiny"
    assert {"torch", "transformers", "pyarrow", "python"} <= set(manifest["versions"])
    assert manifest["machine"]["threads"] == 1
    assert manifest["seeds"] == {"study": 0, "sae": [0], "lm": {"m": [0]}}
    assert str(tiny.root) not in tiny.manifest_path.read_text(encoding="utf-8")


# ---- equal bytes


def test_the_same_study_gives_the_same_bytes_with_two_workers(tiny: RunStore, tmp_path: Path) -> None:
    again = run(PLANTED, tmp_path / "elsewhere" / "again", workers=2)
    expected = contents(tiny.root)
    assert expected
    assert contents(again.root) == expected


def test_another_seed_is_another_study(tiny: RunStore, tmp_path: Path) -> None:
    other = run(planted(study={"seed": 1}), tmp_path / "run", until="train")
    assert set(sae_bytes(other).values()).isdisjoint(sae_bytes(tiny).values())


def test_the_same_start_for_every_checkpoint_of_a_layer(tmp_path: Path) -> None:
    """With a learning rate of nearly nothing the decoder stays where it began: equal over checkpoints, not over layers."""
    store = run(planted(sae={"steps": 1, "lr": [1e-12], "warmup_steps": 0}), tmp_path / "run", until="train")
    decoder = {(s, x): gs.TopKSAE.load(store.setup_dir("m", s, x, 0)).W_dec for s in (0, 20) for x in (0, 1)}
    assert torch.allclose(decoder[0, 1], decoder[20, 1], atol=1e-6)
    assert not torch.allclose(decoder[0, 0], decoder[0, 1], atol=1e-2)


# ---- from Python


def test_load_run(tiny: RunStore) -> None:
    found = gs.load_run(tiny.root)
    assert found.features.equals(tiny.table("features"))
    assert found.evolution.to_pandas().shape == (4, len(found.evolution.column_names))
    assert found.study.study.name == found.manifest["study"] == "tiny"
    assert found.path == tiny.root
    assert found.table("sweeps").num_rows > 0
    sae = found.sae(model="m", step=20, layer=1, seed=0)
    assert (sae.d, sae.n, sae.k) == (16, 32, 4)
    values, indices = sae.encode(torch.randn(5, 16))
    assert values.shape == indices.shape == (5, 4)
    with pytest.raises(InputError, match=r"no SAE for model 'm', step 7, layer 1, seed 0; there are: m@0/layer_00/seed_0"):
        found.sae(model="m", step=7, layer=1)
    with pytest.raises(InputError, match=r"no SAE for model 'x'"):
        found.sae(model="x", step=20, layer=1)
    with pytest.raises(InputError, match="no such run directory"):
        gs.load_run(tiny.root / "none")


def test_sae_and_trainer_from_python(tmp_path: Path) -> None:
    sae = gs.TopKSAE(8, 24, 3, seed=0)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 30
    trainer = gs.SAETrainer(sae, lr=1e-2, warmup_steps=5)
    losses = [float(trainer.step(x)["loss"]) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    values, indices = sae.encode(x)
    raw = sae.decode(values, indices) * x.norm(dim=1, keepdim=True)
    assert torch.allclose(raw, sae.reconstruct(x), atol=1e-4)
    sae.save(tmp_path)
    assert torch.equal(gs.TopKSAE.load(tmp_path).W_dec, sae.W_dec)
    again = gs.SAETrainer(gs.TopKSAE.load(tmp_path), lr=1e-2, warmup_steps=5)
    again.load_state_dict(trainer.state_dict())
    assert float(again.step(x)["loss"]) == float(trainer.step(x)["loss"])


# ---- grids, seeds, controls


def test_a_grid_is_chosen_at_the_final_checkpoint(tmp_path: Path) -> None:
    store = run(planted(sae={"lr": [1e-5, 1e-2], "seeds": [0, 1]}), tmp_path / "run")
    for layer in (0, 1):
        cfg = {
            (step, seed): json.loads((store.setup_dir("m", step, layer, seed) / "cfg.json").read_text())
            for step in (0, 20) for seed in (0, 1)
        }  # fmt: skip
        grid = cfg[20, 0]["grid"]
        assert set(grid) == {"1e-05", "0.01"}
        best = min(grid, key=lambda lr: grid[lr])
        assert {c["lr"] for c in cfg.values()} == {float(best)}
        assert list(cfg[0, 0]["grid"]) == [best]
    training = pq.read_table(store.setup_dir("m", 20, 1, 0) / "training.parquet").to_pylist()
    assert {(r["grid_lr"], r["chosen"]) for r in training} == {(1e-5, float(best) == 1e-5), (1e-2, float(best) == 1e-2)}
    bands = store.table("evolution_seeds")
    assert bands.num_rows == 4
    assert [(r["step"], r["layer"], r["sae_seed"]) for r in rows(store)] == [
        (s, x, seed) for s in (0, 20) for x in (0, 1) for seed in (0, 1)
    ]


def test_a_seed_added_to_a_grid_changes_nothing_of_the_first(tmp_path: Path) -> None:
    raw = planted(sae={"lr": [1e-5, 1e-2], "seeds": [0]})
    store = run(raw, tmp_path / "run", until="score")
    before = contents(store.root, ("cells/m@*/layer_*/seed_0/*",))
    run(planted(sae={"lr": [1e-5, 1e-2], "seeds": [0, 1]}), tmp_path / "run", until="score")
    assert contents(store.root, ("cells/m@*/layer_*/seed_0/*",)) == before
    assert store.setup_dir("m", 20, 1, 1).is_dir()


def test_seeds_of_a_language_model_are_one_model_in_the_report(tmp_path: Path) -> None:
    from glottoscope.study.stages.context import Context
    from glottoscope.study.stages.reporting import gather

    raw = planted()
    raw["models"][0]["seeds"] = [0, 1]
    store = run(raw, tmp_path / "run", until="report")
    assert {(r["model"], r["lm_seed"]) for r in rows(store)} == {("m", 0), ("m-s1", 1)}
    data = gather(Context.open(store.root))
    assert data.models() == ["m"] and data.main_model == "m"
    assert data.n_seeds("m") == (2, 1)
    assert set(data.over_steps("m")["lm_seed"].to_pylist()) == {0}


def test_controls_are_rows_under_their_own_names(tiny: RunStore, tmp_path: Path) -> None:
    raw = planted(controls={"shuffled": True, "frozen_decoder": True})
    store = run(raw, tmp_path / "run", until="report")
    found = {(r["control"], r["model"], r["step"]) for r in rows(store)}
    assert found == {
        ("none", "m", 0), ("none", "m", 20), ("shuffled", "m-shuffled", 20), ("frozen_decoder", "m-frozen_decoder", 20),
    }  # fmt: skip
    loss = {(r["control"], r["step"]): r["lm_loss_en"] for r in rows(store)}
    assert loss["shuffled", 20] > loss["none", 20] == loss["frozen_decoder", 20]
    start = gs.TopKSAE.load(store.setup_dir("m-frozen_decoder", 20, 1, 0)).W_dec
    assert not torch.equal(start, gs.TopKSAE.load(store.setup_dir("m", 20, 1, 0)).W_dec)
    # A control changes nothing of what it controls for.
    assert contents(store.root, ("cells/m@*/**/*",)) == contents(tiny.root, ("cells/m@*/**/*",))


def test_the_negative_control_reads_no_translations(tmp_path: Path) -> None:
    raw = planted(models=[*planted_model(), *planted_model(name="m-negative", control="negative")])
    store = run(raw, tmp_path / "run", until="pretrain")
    weights = [store.checkpoint_dir(m, s) / "model.safetensors" for m in ("m", "m-negative") for s in (0, 20)]
    data = [w.read_bytes() for w in weights]
    assert data[0] == data[2]  # the same start
    assert data[1] != data[3]


def test_one_checkpoint_only(tmp_path: Path) -> None:
    store = run(planted(models=planted_model(checkpoints=[20]), layers=[1]), tmp_path / "run", until="report")
    assert len(rows(store)) == 1
    assert (store.report_dir / "index.html").exists()


def one_layer_gb() -> float:
    """Memory for the tiny study's language model and the SAE of one layer, not of two."""
    study = parse_study(tomli_w.dumps(planted()), name="tiny", folder=Path())
    (model,) = expand(study)
    assert model.shape is not None
    sae = sae_memory(model.shape.d_model, study.sae, 1, 1, study.sae.buffer_tokens)
    return (lm_memory(study, model.shape, 2) + sae * 1.01) / 2**30


@pytest.mark.parametrize(
    "changes",
    [
        {"features": {"rule": "script"}},
        {"features": {"rule": "v1"}},
        {"features": {"theta": 0.5, "example_features": 3}},
        {"compute": {"memory_gb": one_layer_gb()}},
        {"corpus": {"shared_tokens": True}},
    ],
    ids=["script", "v1", "theta", "groups", "shared"],
)
def test_settings_of_the_planted_study(tiny: RunStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    store = run(planted(**changes), tmp_path / "run", until="score")
    assert [(r["step"], r["layer"]) for r in rows(store)] == [(s, x) for s in (0, 20) for x in (0, 1)]
    table = store.table("features").to_pylist()
    assert {r["language"] for r in table} <= {"en", "ja", "mixed", "neutral", "unclassified", "dead"}
    if "compute" in changes:  # layers in groups that fit the memory: the same numbers
        assert work_done(store)["features"] == 4
        assert store.table("features").equals(tiny.table("features"))
        assert (store.ruler_dir("m") / "hidden_layer_01.safetensors").exists()
    if "theta" in changes.get("features", {}):
        assert len(pq.read_table(store.setup_dir("m", 20, 1, 0) / "examples.parquet")["feature"].unique()) == 3


# ---- real text


def test_a_study_of_real_text(text_run: RunStore) -> None:
    table = text_run.table("features")
    assert table.column_names[: len(KEYS)] == KEYS
    assert table["phi"].null_count < table.num_rows
    assert {"en", "ja"} & set(table["language"].to_pylist())
    info = json.loads((text_run.tokens_dir / "info.json").read_text(encoding="utf-8"))
    counted = info["counted"]["train"]
    assert abs(counted["en"] - counted["ja"]) <= 48  # 1:1 by tokens, up to a block
    assert info["aligned"]["test"] == {"pairs": 80, "articles": 20, "truncated": 0}
    documents = pq.read_table(text_run.tokens_dir / "documents.parquet").to_pylist()
    split = {(r["id"]): r["split"] for r in documents}
    assert all(split[r["id"]] == r["split"] for r in documents)  # translations share their split
    examples = pq.read_table(text_run.setup_dir("m", 20, 1, 0) / "examples.parquet").to_pylist()
    assert all(split[r["document"]] == "test" for r in examples)
    assert all(" ".join(r["text"].split()) for r in examples)


@pytest.mark.parametrize("rule", ["script", "v1"])
def test_rules_on_real_text(text_run: RunStore, text_folder: Path, tmp_path: Path, rule: str) -> None:
    store = run(text_study(text_folder, features={"rule": rule}), tmp_path / "run")
    assert sae_bytes(store) == sae_bytes(text_run)
    assert {"en", "ja", "mixed"} & set(store.table("features")["language"].to_pylist())


def test_three_languages(text_folder: Path, tmp_path: Path) -> None:
    store = run(text_study(text_folder, ("en", "ja", "de")), tmp_path / "run", until="report")
    evolution = store.table("evolution")
    assert {"share_en", "share_ja", "share_de", "lm_loss_de"} <= set(evolution.column_names)
    assert {"n_en", "n_ja", "n_de"} <= set(store.table("features").column_names)
    page = (store.report_dir / "index.html").read_text(encoding="utf-8")
    assert "phi and alignment compare en with ja only" in page


def test_without_aligned_sentences_bilingual_is_null(text_folder: Path, tmp_path: Path) -> None:
    store = run(text_study(text_folder, aligned=False), tmp_path / "run", until="report")
    table = store.table("features")
    for name in ("phi", "phi_null", "bilingual"):
        assert table[name].null_count == table.num_rows
    assert table["bilingual_paper"].null_count == 0
    assert all(r["share_bilingual"] is None and r["alignment"] is None for r in rows(store))
    page = (store.report_dir / "index.html").read_text(encoding="utf-8")
    assert "bilingual_paper" in page
    assert "There are no aligned sentences" in page


def test_empty_documents_are_left_out_and_counted(text_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(text_folder, tmp_path / "text", ignore=shutil.ignore_patterns("run"))
    with open(tmp_path / "text" / "en.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"id": "e1", "text": ""}) + "\n" + json.dumps({"id": "e2", "text": "  \n"}) + "\n")
    store = run(text_study(tmp_path / "text"), tmp_path / "run", until="tokens")
    info = json.loads((store.tokens_dir / "info.json").read_text(encoding="utf-8"))
    assert info["notes"] == ["2 empty documents were left out."]


def test_checkpoints_from_a_folder_give_the_same_features(text_run: RunStore, text_folder: Path, tmp_path: Path) -> None:
    """What was trained here is an ordinary checkpoint for another study."""
    model = {
        "name": "m", "source": "checkpoints", "root": str(text_run.model_dir("m")), "pattern": "step_{step}", "steps": [0, 20],
        "tokens_per_step": 16 * 24,
    }  # fmt: skip
    raw = text_study(text_folder, models=[model])
    del raw["corpus"]["tokenizer_training"]
    store = run(raw, tmp_path / "run")
    assert sae_bytes(store) == sae_bytes(text_run)
    assert store.table("features").equals(text_run.table("features"))
    # How the language model was trained is all that this study does not know.
    known, unknown = text_run.table("evolution"), store.table("evolution")
    assert unknown["lm_learning_rate"].null_count == unknown.num_rows
    assert unknown.drop_columns(["lm_learning_rate"]).equals(known.drop_columns(["lm_learning_rate"]))
    assert not (store.root / "models").exists()


def test_labels_are_joined(tiny: RunStore, tmp_path: Path) -> None:
    key = {k: v for k, v in rows(tiny)[3].items() if k in KEYS}
    path = write_jsonl(tmp_path / "labels.jsonl", [{**key, "feature": 5, "label": 3}])
    store = run(planted(features={"labels": [str(path)]}), tmp_path / "run")
    table = store.table("features").to_pylist()
    labelled = [r for r in table if r["granularity"] is not None]
    assert [(r["step"], r["layer"], r["feature"], r["granularity"]) for r in labelled] == [(20, 1, 5, 3)]
