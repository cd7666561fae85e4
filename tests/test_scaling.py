"""`run --scale tiny`: the path of a study of hub checkpoints, gone through with random models and planted text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import tomli_w
from study_fixture import as_study, command, planted, state

from glottoscope.errors import InputError
from glottoscope.study.load import load_study
from glottoscope.study.plan import expand, summary
from glottoscope.study.scaling import scale_study
from glottoscope.study.store import RunStore
from glottoscope.study.verifying import verify

EXAMPLE = Path(__file__).parents[1] / "examples" / "llm-jp-3.toml"


def model(name: str, d_model: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "source": "checkpoints", "root": f"checkpoints/{name}", "pattern": "iter_{step:07d}", "steps": [10, 400],
        "tokens_per_step": 2_097_152, "shape": {"n_layers": 2, "d_model": d_model, "n_params": 10**6, "vocab_size": 99_584},
        **changes,
    }  # fmt: skip


CUT: dict[str, Any] = {
    "layers": "all",
    "study": {"name": "cut"},
    "corpus": {
        "kind": "text", "languages": ["en", "ja"], "context_length": 1024, "mode": "blocks",
        "train_tokens": 100_000_000, "test_tokens": 10_000_000, "validation_tokens": 10_000_000,
        "sources": [{"language": x, "path": f"wikipedia/{x}.jsonl"} for x in ("en", "ja")],
    },
    "models": [model("small", 256), model("large", 512)],
    "sae": {"n": 32768, "k": 32, "lr": [1e-3, 3e-3], "batch_tokens": 32768, "train_tokens": 100_000_000},
    "features": {"bootstrap": 20, "example_features": 192},
    "intervention": {"draws": 0, "alphas": [1.0], "parts": ["mixed", "all"], "texts": ["documents"]},
}  # fmt: skip


def write(raw: dict[str, Any], folder: Path) -> Path:
    path = folder / "cut.toml"
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return path


def test_the_papers_grid_keeps_its_form(tmp_path: Path) -> None:
    study = load_study(EXAMPLE)
    small = scale_study(study, "tiny", tmp_path)
    assert small.study.name == "llm-jp-3-tiny"
    before, after = expand(study), expand(small)
    assert [(r.name, r.layers, r.family) for r in before] == [(r.name, r.layers, r.family) for r in after]
    for old, new in zip(before, after, strict=True):
        assert old.shape is not None
        assert new.shape is not None
        assert (old.shape.n_layers, old.shape.d_model) == (new.shape.n_layers, 16 * new.shape.d_model)
        assert [(c.step, c.tokens_seen) for c in old.checkpoints] == [(c.step, c.tokens_seen) for c in new.checkpoints]
    costs = [cost for _, cost in summary(small, (small.compute.memory_gb or 0) * 2**30) if cost is not None]
    assert sum(c.setups for c in costs) == 1572
    assert [c.groups for c in costs] == [1, 1, 1, 1, 2]  # the memory plan has something to do
    assert small.compute.remove_downloads
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": planted()["corpus"], "models": planted()["models"], "sae": planted()["sae"]}, "of the planted world already"),
        ({"models": [model("m", 256, shape=None)]}, "size of model m is not known"),
        ({"corpus": {**CUT["corpus"], "languages": ["en", "de"], "sources": [{"language": x, "path": x} for x in ("en", "de")]}},
         "the planted world is English and Japanese"),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    raw = {**CUT, **changes}
    raw["models"] = [{k: v for k, v in m.items() if v is not None} for m in raw["models"]]
    with pytest.raises(InputError, match=words):
        scale_study(as_study(raw), "tiny", tmp_path)
    with pytest.raises(InputError, match="unknown scale; choose one of tiny"):
        scale_study(as_study(CUT), "huge", tmp_path)


def test_a_cut_of_the_paper_goes_through_every_line(tmp_path: Path) -> None:
    path, out = write(CUT, tmp_path), tmp_path / "out"
    ended = command("run", path, "--scale", "tiny", "--out", out, "--workers", "1")
    assert ended.code == 0, ended.err
    assert "writing 4 random checkpoints" in ended.err
    store = RunStore(out)
    assert len(list(store.scaled_dir.glob("hub/cut/*/iter_*/model.safetensors"))) == 4
    # Every checkpoint was fetched and is gone; what is left are locks.
    assert [p for p in store.downloads_dir.rglob("*") if p.is_file() and not p.name.startswith(".")] == []
    table = store.table("evolution")
    assert table.num_rows == 2 * 2 * 2
    assert sorted(set(table["step"].to_pylist())) == [10, 400]
    # The loss falls from checkpoint to checkpoint, so that there is a half of its fall.
    for name in ("small", "large"):
        rows = table.filter(pc.field("model") == name).sort_by("step")["lm_loss_en"].to_pylist()
        assert rows[0] > rows[-1]
    assert store.table("intervention").num_rows > 0
    assert (store.report_dir / "index.html").exists()
    verdict = verify(out, keep=True)
    assert (verdict.problems, verdict.unknown) == ([], [])

    # The same command again does nothing; without its hub the finished run is still whole.
    before = state(out, ("cells/**/*", "scaled/**/*", "tables/*"))
    assert command("run", path, "--scale", "tiny", "--out", out, "--workers", "1").code == 0
    assert state(out, ("cells/**/*", "scaled/**/*", "tables/*")) == before
    assert command("run", path, "--out", out).code == 2  # it belongs to the small study


def test_a_checkpoint_beyond_the_budget_is_named(tmp_path: Path) -> None:
    path, out = write({**CUT, "models": [model("small", 256), model("large", 2048)]}, tmp_path), tmp_path / "out"
    ended = command(
        "run", path, "--scale", "tiny", "--out", out, "--workers", "1", "--set", "compute.disk_gb=0.0003", "--until", "train",
    )  # fmt: skip
    assert ended.code == 2
    assert "cut/large at revision iter_0000400 needs" in ended.err
    assert "compute.disk_gb allows 0.300 MB: it is not fetched" in ended.err
    # The small model's cells fit; the one that chooses learning rates was made.
    rows = [json.loads(x) for x in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["done"] for r in rows if r["stage"] == "train"] == [1]
