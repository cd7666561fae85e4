"""The documentation is true: generated pages equal the code, columns equal the files, commands and examples work."""

import math
import os
import re
import shlex
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from pydantic import BaseModel

from glottoscope.study import config, reference
from glottoscope.study.columns import MEASURE_ONLY, NOT_IN_MEASURE, TABLES, columns_of, expand

ROOT = Path(__file__).parents[1]
LANGUAGES = ("en", "ja")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# The whole path of a study, as small as it gets; its names are those of the examples in the guide.
TINY = """
schema = 1
layers = [0, 2]
[study]
name = "planted"
[compute]
device = "cpu"
[corpus]
kind = "planted"
train_documents = 60
validation_documents = 20
test_documents = 60
aligned_pairs = 80
[[models]]
name = "d64"
source = "pretrain"
d_model = 16
n_layers = 2
steps = 1000
batch_size = 1
warmup_steps = 5
checkpoints = [0, 1000]
[sae]
n = 48
k = 4
lr = [1e-3, 3e-3]
warmup_steps = 5
batch_tokens = 256
steps = 20
seeds = [0, 1]
[features]
bootstrap = 50
min_count = 5
top_examples = 3
[intervention]
bases = [0]
draws = 2
alphas = [0.5]
tokens = 300
bootstrap = 20
[intervention.translation]
pairs = 3
draws = 1
shots = 1
max_new_tokens = 4
[report]
pattern_features = 2
pattern_examples = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny finished run in runs/planted."""
    from glottoscope.study.load import parse_study
    from glottoscope.study.runner import run_study

    folder = tmp_path_factory.mktemp("docs")
    result = run_study(parse_study(TINY, name="tiny", folder=folder), folder / "runs" / "planted", workers=1)
    assert result.exit_code == 0, result.failures
    return folder


@pytest.mark.parametrize(("name", "text"), [("configuration", reference.configuration), ("tables", reference.tables)])
def test_generated_pages_are_up_to_date(name: str, text) -> None:
    path = ROOT / "docs" / f"{name}.md"
    assert path.read_text(encoding="utf-8") == text(), f"{path} is stale: run `make docs`"


def test_every_table_of_the_study_file_has_a_section() -> None:
    models = {m for m in vars(config).values() if isinstance(m, type) and issubclass(m, BaseModel)}
    assert models - {config.Part, BaseModel} == {model for _, model in reference.SECTIONS}


def _pattern(path: str) -> str:
    """A glob for a path with the placeholders of the tables' page."""
    words = "|".join(("MODEL", "STEP", "LL", "S", "NAME", "BASE", "DONOR", "MODE", "SCALE", "A", "B", "NNN"))
    return re.sub(rf"\b({words})\b|(?<=_)(LL|S)\b", "*", path)


@pytest.mark.parametrize("table", [t for t in TABLES if t != "comet"])
def test_every_column_is_described_and_every_description_has_its_column(folder: Path, table: str) -> None:
    paths = sorted((folder / "runs" / "planted").glob(_pattern(TABLES[table].path)))
    assert paths, TABLES[table].path
    described, seen = columns_of(table, LANGUAGES), set()
    for path in paths:
        found = pq.read_table(path)
        assert set(found.column_names) <= set(described), path
        seen |= set(found.column_names)
        for name in found.column_names:
            # The bands take their types from the values: an all-null column has none.
            assert str(found.schema.field(name).type) in (described[name].type, "null"), name
            if pa.types.is_floating(found.schema.field(name).type):
                assert not any(v is not None and math.isnan(v) for v in found[name].to_pylist()), name
    assert seen == set(described)


def test_no_parquet_file_of_a_run_is_left_undescribed(folder: Path) -> None:
    described = [_pattern(Path(table.path).name) for name, table in TABLES.items() if name != "comet"]
    found = {p.name for p in (folder / "runs" / "planted").rglob("*.parquet")}
    assert [x for x in found if not any(fnmatch(x, pattern) for pattern in described)] == []
    assert [pattern for pattern in described if not any(fnmatch(x, pattern) for x in found)] == []


def test_the_columns_of_comet() -> None:
    """What is written where there are scores: making some needs COMET's own environment (tests/comet)."""
    from glottoscope.study.stages.intervene.comet_scoring import SCHEMA

    assert {f.name: str(f.type) for f in SCHEMA} == {name: c.type for name, c in columns_of("comet", LANGUAGES).items()}


def test_the_columns_of_measure(tmp_path: Path) -> None:
    from glottoscope.study.measuring import measure_examples

    path = tmp_path / "examples.jsonl"
    path.write_text('{"feature": 3, "examples": [{"tokens": [" the", " cat"], "activations": [0, 2]}]}\n', encoding="utf-8")
    added = {full for name in MEASURE_ONLY for full in expand(name, LANGUAGES)}
    expected = set(columns_of("features", LANGUAGES)) - set(NOT_IN_MEASURE) | added
    assert set(measure_examples(path).column_names) == expected


def test_expand() -> None:
    assert expand("n_{lang}", ("en", "ja")) == ["n_en", "n_ja"]
    assert expand("a{,_low}", ("en",)) == ["a", "a_low"]
    assert expand("plain", ("en",)) == ["plain"]


def _blocks(kind: str) -> list[tuple[Path, str]]:
    fence = re.compile(rf"^```{kind}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page, block) for page in PAGES for block in fence.findall(page.read_text(encoding="utf-8"))]


def test_the_commands_that_pages_name_exist() -> None:
    from glottoscope.cli import app

    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009 - a group, typed as a command
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [(page, line) for page, block in _blocks("sh") for line in block.splitlines()]
    assert lines
    for page, line in lines:
        program, *rest = shlex.split(line, comments=True) or [""]
        if program == "make":
            assert next(x for x in rest if "=" not in x) in targets, f"{page}: {line}"
        elif program.endswith("glottoscope") and rest and not rest[0].startswith("-"):
            options = {o for p in commands[rest[0]].params for o in (*p.opts, *p.secondary_opts)}
            assert {x.partition("=")[0] for x in rest if x.startswith("--")} <= options, f"{page}: {line}"


def test_the_study_files_that_pages_show_are_valid(tmp_path: Path) -> None:
    from glottoscope.study.load import parse_study

    blocks = _blocks("toml")
    whole = next(block for _, block in blocks if block.startswith("schema = 1"))
    # Most of the guide's pieces are models from checkpoints, to stand in place of the model trained there.
    start, end = whole.index("[[models]]"), whole.index("[sae]")
    rest = (whole[:start] + whole[end:]).replace("[corpus.tokenizer_training]\nvocab_size = 8000\n", "")
    for page, block in blocks:
        text = block if block.startswith("schema = 1") else f"{rest if '[[models' in block else whole}\n{block}"
        parse_study(text, name=str(page), folder=tmp_path)
    assert len(blocks) > 1


def test_the_python_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = 0
    for page, block in _blocks("python"):
        modules = re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)
        if all(find_spec(name) for name in modules):
            exec(compile(block, f"example of {page}", "exec"), {})
            ran += 1
    assert ran


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = "|".join(("work", "root", "home", "tmp", "Users", "usr", "opt", "mnt"))
    assert not re.findall(rf"(?<![\w.:/~])/(?:{places})/", text)
    # Papers and licences are linked; package registries and mirrors are the installer's business.
    hosts = set(re.findall(r"https?://([^/\s)>\"]+)", text))
    assert hosts <= {"arxiv.org", "www.apache.org", "creativecommons.org"}, hosts


def test_the_picture_of_the_readme_is_small() -> None:
    pictures = re.findall(r"docs/images/[\w.-]+\.svg", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures
    assert all(os.path.getsize(ROOT / picture) < 300_000 for picture in pictures)


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert all(f"\n   {n}. " in text for n in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
