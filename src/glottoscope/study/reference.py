"""Writes docs/configuration.md from the study's models and docs/tables.md from the list of columns.

`python -m glottoscope.study.reference docs` (or `make docs`); a test holds the files against what this gives.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from glottoscope.atomic import write_text
from glottoscope.study import config
from glottoscope.study.columns import MEASURE_ONLY, NOT_IN_MEASURE, TABLES, Column, expand

NOTE = "<!-- Made by `make docs`; do not edit. -->"

# Tables of the study file in the order of a reader's questions.
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("top level", config.Study),
    ("[study]", config.StudyInfo),
    ("[compute]", config.Compute),
    ('[corpus] with kind = "planted"', config.PlantedCorpus),
    ('[corpus] with kind = "text"', config.TextCorpus),
    ("[[corpus.sources]]", config.Source),
    ("[corpus.aligned]", config.Aligned),
    ("[corpus.tokenizer_training]", config.TokenizerTraining),
    ('[[models]] with source = "pretrain"', config.PretrainModel),
    ("[models.mixture]", config.Mixture),
    ('[[models]] with source = "checkpoints"', config.CheckpointModel),
    ("[[models.checkpoints]]", config.CheckpointEntry),
    ("[models.shape]", config.Shape),
    ("[sae]", config.SAEConfig),
    ("[features]", config.FeaturesConfig),
    ("[controls]", config.Controls),
    ("[intervention]", config.InterventionConfig),
    ("[intervention.translation]", config.Translation),
    ("[report]", config.ReportConfig),
    ("[logging]", config.LoggingConfig),
    ("[logging.wandb]", config.WandbConfig),
)


def configuration() -> str:
    """docs/configuration.md."""
    lines = [
        "# The study file",
        "",
        NOTE,
        "",
        "A study is a TOML file. An unknown field is an error, and all mistakes are told at once. A default of *required* means",
        "that there is none; *none* means that the field may be left out. `--set key=value` changes any field of a run:",
        "`--set sae.k=16`, `--set models.0.lr=1e-3` (lists count from 0). Relative paths start from the study file's folder,",
        "those given with `--set` from the current one. [guide.md](guide.md) shows the file at work.",
    ]
    for heading, model in SECTIONS:
        schema = model.model_json_schema(by_alias=True)
        lines += ["", f"## {heading}", "", _first_paragraph(model), "", "| field | type | default | meaning |", "|---|---|---|---|"]
        required = set(schema.get("required", ()))
        for name, field in schema["properties"].items():
            default = "*required*" if name in required else _default(field.get("default"), field)
            lines.append(_row(f"`{name}`", _type(field), default, field.get("description", _literal_meaning(field))))
    return "\n".join(lines) + "\n"


def _first_paragraph(model: type[BaseModel]) -> str:
    text = (model.__doc__ or "").strip().split("\n\n")[0]
    return re.sub(r"METHOD (\d)", r"[method.md](method.md), section \1", text)


def _literal_meaning(field: Mapping[str, Any]) -> str:
    return "Says which table this is." if "const" in field else ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any, field: Mapping[str, Any]) -> str:
    if value is None:
        # A table whose fields all have defaults has no default of its own to show.
        return "*none*" if "default" in field else "*its defaults*"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else f"{value}"


_NAMES = {"string": "string", "integer": "integer", "number": "number", "boolean": "true or false", "object": "table"}
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        return "table"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = dict.fromkeys(_type(s) for s in schema[key] if s.get("type") != "null")
            return " or ".join(kinds)
    if "const" in schema:
        return f"`{_toml(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_toml(v)}`" for v in schema["enum"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} of {_type(schema['prefixItems'][0])}"
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"table of {_type(schema['additionalProperties'])}"
    bounds = ", ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS if name in schema)
    pattern = f" matching `{schema['pattern']}`" if "pattern" in schema else ""
    return _NAMES[schema["type"]] + (f" {bounds}" if bounds else "") + pattern


def tables() -> str:
    """docs/tables.md."""
    lines = [
        "# Every column of every table",
        "",
        NOTE,
        "",
        "All tables are Parquet. `{lang}` stands for each language code of the study, in its order. Null means undefined or not",
        "available; no column holds NaN. Rows have a fixed order, and the same study on the same machine gives the same bytes.",
        "[guide.md](guide.md) shows how to read them, [method.md](method.md) says what the measures are and are not.",
        "",
        "The **key columns** `control` ... `sae_seed` name a setup; they come first in features, evolution and sweeps.",
        "`tables/evolution.csv` is `evolution.parquet` as text. Endings `_low` and `_high` are a 95 % bootstrap interval over the",
        "features of one SAE (`alignment`: over articles); a share of 0 or 1 has an interval without width.",
    ]
    for name, table in TABLES.items():
        lines += ["", f"## {name}", "", f"`{table.path}`. {table.row}", *_columns(table.columns)]
    fewer = ", ".join(f"`{name}`" for name in NOT_IN_MEASURE)
    lines += [
        "",
        "## measure",
        "",
        "The file that `glottoscope measure --out` writes (CSV or Parquet). One feature of the examples read.",
        f"Columns as in features, without {fewer}, and with those below.",
        "`feature` is int64 and `max_activation` double here. What examples alone cannot say (density, entropies of clusters,",
        "phi, the bilingual flags) is null.",
        *_columns(MEASURE_ONLY),
    ]
    return "\n".join(lines) + "\n"


def _columns(columns: Mapping[str, Column]) -> list[str]:
    rows = ["", "| column | type | unit | meaning |", "|---|---|---|---|"]
    for name, column in columns.items():
        shown = ", ".join(f"`{full}`" for full in expand(name, ["{lang}"]))
        rows.append(_row(shown, column.type, column.unit, column.meaning))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Write both files into a folder; exit code."""
    if len(arguments) != 1:
        print("usage: python -m glottoscope.study.reference DOCS_FOLDER", file=sys.stderr)
        return 2
    for name, text in (("configuration.md", configuration()), ("tables.md", tables())):
        write_text(Path(arguments[0]) / name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
