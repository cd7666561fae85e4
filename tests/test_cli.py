"""The commands: what they print, where they write, how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import tomli_w
from study_fixture import PLANTED, STAGES, command, glottoscope, planted, state, write_jsonl

from glottoscope import __version__
from glottoscope.study import machine
from glottoscope.study.load import PRESETS, load_study
from glottoscope.study.store import RunStore

SHARED = Path(__file__).parents[2] / "shared" / "features"

EXAMPLES = [
    {
        "feature": feature,
        "examples": [
            {"tokens": [word, "."], "activations": [2.0 + i, 0.0], "document_language": language}
            for i, (word, language) in enumerate(words)
        ],
    }
    for feature, words in enumerate(
        [[(" river", "en")] * 30, [("寺", "ja")] * 30, [(" water", "en"), ("水", "ja")] * 15, [(" gate", "en")] * 3]
    )
]


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(PLANTED), encoding="utf-8")
    return path


def test_help_names_every_command() -> None:
    ended = command("--help")
    assert ended.code == 0
    names = "demo init plan run status report measure clean intervene browse export label verify merge"
    for name in names.split():
        assert name in ended.out
        assert command(name, "--help").code == 0
    assert command("--version").out == f"glottoscope {__version__}\n"


@pytest.mark.parametrize("arguments", [("fly",), ("run",), ("run", "a.toml", "--fast"), ("demo", "--seed", "-1")])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert "Error" in ended.err
    assert "Traceback" not in ended.err


# ---- init, plan


@pytest.mark.parametrize("preset", PRESETS)
def test_init_writes_a_study_that_can_be_read(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "new" / "study.toml"
    ended = command("init", path, "--preset", preset)
    assert (ended.code, ended.err) == (0, "")
    assert f"glottoscope plan {path}" in ended.out
    assert load_study(path).study.name
    again = command("init", path)
    assert again.code == 2
    assert "exists: choose another name, or --force" in again.complaint
    assert command("init", path, "--preset", preset, "--force").code == 0


def test_plan_prints_the_papers_grid() -> None:
    ended = command("plan", Path(__file__).parents[1] / "examples" / "llm-jp-3.toml", "--device-flops", "1e15")
    assert ended.code == 0
    (total,) = (x for x in ended.out.splitlines() if x.startswith("│ total"))
    assert "1,572" in total
    for size in ("150m", "440m", "980m", "1.8b", "3.7b"):
        assert f"llm-jp-3-{size}" in ended.out


def test_plan_follows_overrides(study_file: Path) -> None:
    ended = command("plan", study_file, "--set", "layers=all", "--set", "sae.seeds=[0,1,2]")
    assert ended.code == 0
    (row,) = (x for x in ended.out.splitlines() if " m " in x)
    assert [x.strip() for x in row.split("│")][2:5] == ["2", "2", "12"]
    assert not list(study_file.parent.glob("runs"))


# ---- run, status, report, clean


def test_run_until_status_and_continue(study_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = command("run", study_file, "--out", out, "--until", "tokens", "--workers", "1", "--set", "sae.k=2")
    assert ended.code == 0
    assert "done up to tokens" in ended.out
    assert not (out / "cells").exists()
    table = command("status", out).out
    assert "2 units to do" in table
    assert "waits for the stages before" in table
    assert RunStore(out).study().sae.k == 2
    early = command("report", out)
    assert early.code == 2
    assert "the study is not complete; `glottoscope run` continues it" in early.complaint


def test_run_writes_to_runs_by_default(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("run", study_file, "--until", "pretrain", "--workers", "1").code == 0
    assert RunStore(tmp_path / "runs" / "tiny").manifest()["study"] == "tiny"


def test_status_and_report_of_a_finished_run(tiny: RunStore, tmp_path: Path) -> None:
    shutil.copytree(tiny.root, tmp_path / "run")
    ended = command("status", tmp_path / "run")
    assert ended.code == 0
    assert ended.out.count(" done") == len(STAGES)
    assert "device cpu, 1 thread(s) per process" in ended.out
    before = state(tmp_path / "run" / "report")
    ended = command("report", tmp_path / "run")
    assert ended.code == 0
    assert ended.out == f"report: {tmp_path / 'run' / 'report' / 'index.html'}\n"
    assert {n: d for n, (_, d) in state(tmp_path / "run" / "report").items()} == {n: d for n, (_, d) in before.items()}


def test_status_needs_neither_the_device_nor_the_memory_of_the_run(
    tiny: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a login node of a cluster whose nodes have GPUs."""
    root = tmp_path / "run"
    shutil.copytree(tiny.root, root)
    text = (root / "study.toml").read_text(encoding="utf-8")
    (root / "study.toml").write_text(text.replace('device = "cpu"', 'device = "cuda"'), encoding="utf-8")
    monkeypatch.setattr(machine, "machine_memory", lambda: 2**20)
    ended = command("status", root)
    assert (ended.code, ended.err) == (0, "")
    assert "units to do" in ended.out  # models of another device are other models


def test_clean_says_what_goes(tiny: RunStore, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(tiny.root, root)
    shutil.copytree(root / "cells" / "m@20", root / "cells" / "m@10")
    dry = command("clean", root, "--dry-run")
    assert (dry.code, dry.out.count("would remove")) == (0, 1)
    assert (root / "cells" / "m@10").exists()
    ended = command("clean", root)
    assert "1 item(s)" in ended.out
    assert not (root / "cells" / "m@10").exists()
    assert command("clean", root).out == "0 item(s), 0 B\n"


@pytest.mark.parametrize("name", ["status", "report", "clean"])
def test_what_is_no_run_directory_is_left_alone(tmp_path: Path, name: str) -> None:
    ended = command(name, tmp_path / "none")
    assert ended.code == 2
    assert "no such run directory" in ended.complaint
    (tmp_path / "thesis.tex").write_text("words")
    ended = command(name, tmp_path)
    assert ended.code == 2
    assert "is no run directory" in ended.complaint
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_failed_cells_are_exit_code_1(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glottoscope.study.stages import training

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(training, "train_cell", broken)
    ended = command("run", study_file, "--out", tmp_path / "out", "--workers", "1")
    assert ended.code == 1
    assert "m@20: ZeroDivisionError: a defect" in ended.err


# ---- measure


@pytest.mark.parametrize("rule", ["v1", "script", "document"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_measure(tmp_path: Path, rule: str, suffix: str) -> None:
    path, out = write_jsonl(tmp_path / "f.jsonl", EXAMPLES), tmp_path / f"table{suffix}"
    ended = command("measure", path, "--rule", rule, "--out", out, "--min-count", "5")
    assert ended.code == 0
    assert "4 features" in ended.out
    table = pyarrow.csv.read_csv(out) if suffix == ".csv" else pq.read_table(out)
    found = dict(zip(table["feature"].to_pylist(), table["language"].to_pylist(), strict=True))
    assert (found[0], found[1], found[2]) == ("en", "ja", "mixed")
    assert found[3] == ("en" if rule == "v1" else "unclassified")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "no feature"),
        (b'{"feature": 1}\n', "line 1"),
        (b'{"feature": 0, "examples": []}\n{\n', "line 2"),
        (b'{"feature": 0, "examples": [{"tokens": ["\xff"], "activations": [1]}]}\n', "UTF-8"),
        (b'{"feature": 0, "examples": [{"tokens": ["a"], "activations": [NaN]}]}\n', "finite"),
        (b'{"feature": 0, "examples": [{"tokens": ["a"], "activations": [1, 2]}]}\n', "one for each token"),
    ],
)
def test_measure_of_a_bad_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "f.jsonl"
    if content is not None:
        path.write_bytes(content)
    ended = command("measure", path, "--out", tmp_path / "o.csv")
    assert ended.code == 2
    assert words in ended.complaint
    assert str(path) in ended.complaint
    assert not (tmp_path / "o.csv").exists()


def test_measure_with_wrong_options(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", EXAMPLES)
    assert "choose one of v1, script, document" in command("measure", path, "--rule", "v3").complaint
    assert "end it in .csv or .parquet" in command("measure", path, "--out", tmp_path / "o.txt").complaint
    bare = write_jsonl(tmp_path / "b.jsonl", [{"feature": 0, "examples": [{"tokens": ["a"], "activations": [1]}]}])
    assert "document_language" in command("measure", bare, "--rule", "document").complaint


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published features are not beside this repository")
def test_measure_of_published_features(tmp_path: Path) -> None:
    (source,) = SHARED.glob("*_step1000.jsonl")
    with open(source, encoding="utf-8") as handle:
        lines = [next(handle) for _ in range(8)]
    (tmp_path / "f.jsonl").write_text("".join(lines), encoding="utf-8")
    ended = command("measure", tmp_path / "f.jsonl", "--out", tmp_path / "o.parquet")
    assert ended.code == 0
    table = pq.read_table(tmp_path / "o.parquet").to_pylist()
    published = [json.loads(line) for line in lines]
    assert [r["feature"] for r in table] == [p["feature"] for p in published]
    assert [(r["n_en"], r["n_ja"]) for r in table] == [(p["language"]["en"], p["language"]["ja"]) for p in published]


# ---- the installed program


def test_the_program_ends_with_its_exit_code(tmp_path: Path) -> None:
    done = glottoscope("run", tmp_path / "none.toml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"glottoscope: {tmp_path / 'none.toml'}: no such study file; `glottoscope init {tmp_path / 'none.toml'}` writes one\n"
    )


def test_demo_names_another_seed_another_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glottoscope.cli as cli

    started: list[tuple[str, int, Path, str]] = []
    monkeypatch.setattr(cli, "_run", lambda study, out, until, workers, machines, dry_run: started.append(
        (study.study.name, study.study.seed, out, until)))  # fmt: skip
    for arguments in ((), ("--full",), ("--seed", "3", "--out", tmp_path)):
        assert command("demo", *arguments).code == 0
    assert started == [
        ("planted", 0, Path("runs/planted"), "report"), ("planted-full", 0, Path("runs/planted-full"), "report"),
        ("planted-seed3", 3, tmp_path, "report"),
    ]  # fmt: skip


def test_set_may_be_repeated(study_file: Path, tmp_path: Path) -> None:
    ended = command("run", study_file, "--out", tmp_path / "o", "--until", "pretrain", "--workers", "1", "--set", "sae.k=2",
                    "--set", "sae.lr=[1e-3, 2e-3]")  # fmt: skip
    assert ended.code == 0
    study = RunStore(tmp_path / "o").study()
    assert (study.sae.k, study.sae.lr) == (2, (1e-3, 2e-3))
    assert study.models == load_study(study_file).models
    assert planted()["sae"]["k"] == 4
