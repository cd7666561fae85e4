"""Reading a study file: TOML and overrides in, a `Study` out, every mistake of it in one message."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from glottoscope.errors import InputError
from glottoscope.study.config import CheckpointModel, PlantedCorpus, PretrainModel, Study, TextCorpus

PRESETS = ("planted", "planted-full", "text", "llm-jp-3")
_TAGS = {"pretrain": PretrainModel, "checkpoints": CheckpointModel, "planted": PlantedCorpus, "text": TextCorpus}


def preset_text(name: str) -> str:
    """The commented study file of a preset, as text."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}" + _did_you_mean(near))
    return (Path(__file__).parent / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        path: TOML file. Relative paths in it start from its folder.
        overrides: `key=value` pairs, the key dotted (`corpus.sources.0.path`), the value TOML (a bare word is a
            string). Relative paths given here start from the current folder.

    Raises:
        InputError: file missing or not TOML (with the line), or fields unknown, missing or wrong: all at once.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such study file; `glottoscope init {path}` writes one") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_study(text, name=str(path), folder=path.resolve().parent, overrides=overrides)


def parse_study(text: str, *, name: str, folder: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study from TOML text; `folder` is what its relative paths start from. Errors as in `load_study`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name}: not TOML: {error}") from None
    # A root given on the command line decides where the file's own relative paths start, so it comes first.
    roots = [x for x in overrides if x.partition("=")[0].strip() == "corpus.root"]
    for override in roots:
        _set(raw, override)
    if roots and isinstance(raw["corpus"]["root"], str):
        raw["corpus"]["root"] = str(Path(raw["corpus"]["root"]).expanduser().resolve())
    _resolve_paths(raw, folder)
    for override in overrides:
        if override not in roots:
            _set(raw, override)
    if overrides:
        _resolve_paths(raw, Path.cwd())
    schema = raw.get("schema", 1)
    if isinstance(schema, int) and schema > 1:
        raise InputError(f"{name}: schema {schema} is newer than this glottoscope knows (1): update glottoscope")
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        # A list whose entries are wrong is reported by pydantic as too short besides: only an empty one is.
        errors = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        lines = list(dict.fromkeys(_explain(e) for e in errors))
        joined = "; ".join(lines)
        raise InputError(f"{name}: {joined}") from None


def dump_study(study: Study) -> str:
    """The study as TOML that `parse_study` reads back to an equal study."""
    return tomli_w.dumps(study.dump())


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths of a raw study absolute, in place; what is absolute already stays."""

    def absolute(value: Any, base: Path) -> Any:
        return str((base / Path(value).expanduser()).resolve()) if isinstance(value, str) else value

    corpus = raw.get("corpus")
    if isinstance(corpus, dict) and corpus.get("kind") == "text":
        if "root" in corpus:
            corpus["root"] = absolute(corpus["root"], folder)
        base = Path(corpus["root"]) if isinstance(corpus.get("root"), str) else folder
        # Without a root, a source belongs to the folder it was first written in; with one, to the root. The root may
        # still be overridden, so sources below it stay relative until they are read.
        if "root" not in corpus:
            for source in _tables(corpus.get("sources")):
                if "path" in source:
                    source["path"] = absolute(source["path"], base)
            aligned = corpus.get("aligned")
            if isinstance(aligned, dict):
                for key in ("train", "dev", "test"):
                    if key in aligned:
                        aligned[key] = absolute(aligned[key], base)
        tokenizer = corpus.get("tokenizer")
        if isinstance(tokenizer, str) and (tokenizer.startswith((".", "/", "~")) or (folder / tokenizer).exists()):
            corpus["tokenizer"] = absolute(str(Path(tokenizer).expanduser()), folder)
    compute = raw.get("compute")
    if isinstance(compute, dict) and "hub" in compute:
        compute["hub"] = absolute(compute["hub"], folder)
    for model in _tables(raw.get("models")):
        if isinstance(model.get("root"), str):
            model["root"] = absolute(str(Path(model["root"]).expanduser()), folder)
        elif "hub_id" not in model:
            for checkpoint in _tables(model.get("checkpoints")):
                if isinstance(checkpoint.get("path"), str):
                    checkpoint["path"] = absolute(str(Path(checkpoint["path"]).expanduser()), folder)
        tokenizer = model.get("tokenizer")
        if isinstance(tokenizer, str) and (tokenizer.startswith((".", "/", "~")) or (folder / tokenizer).exists()):
            model["tokenizer"] = absolute(str(Path(tokenizer).expanduser()), folder)
    intervention = raw.get("intervention")
    translation = intervention.get("translation") if isinstance(intervention, dict) else None
    if isinstance(translation, dict) and isinstance(translation.get("files"), list):
        translation["files"] = [absolute(x, folder) for x in translation["files"]]
    features = raw.get("features")
    if isinstance(features, dict) and isinstance(features.get("labels"), list):
        features["labels"] = [absolute(x, folder) for x in features["labels"]]


def corpus_path(corpus: TextCorpus, path: str) -> Path:
    """Where a source or aligned file of the corpus lies."""
    return Path(corpus.root) / path if corpus.root is not None else Path(path)


def _tables(value: Any) -> list[dict[str, Any]]:
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override!r}: write key=value, as in --set sae.k=16")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set study.name=trial
    target: Any = raw
    parts = key.strip().split(".")
    for depth, part in enumerate(parts[:-1]):
        target = _item(target, part, override) if isinstance(target, list) else target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise InputError(f"--set {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a table")
    if isinstance(target, list):
        _item(target, parts[-1], override)
        target[int(parts[-1])] = value
    else:
        target[parts[-1]] = value


def _item(values: list[Any], part: str, override: str) -> Any:
    if not part.isdigit() or int(part) >= len(values):
        raise InputError(f"--set {override!r}: {part!r} is no index of a list of {len(values)}; count from 0")
    return values[int(part)]


def _explain(error: Mapping[str, Any]) -> str:
    """One pydantic error as one clause that names the field and the remedy."""
    # Pydantic names the member of a union too: a tag of ours, or a type as in `layers.tuple[int, ...]`.
    location = [x for x in error["loc"] if x not in _TAGS and "[" not in str(x)]
    field = ".".join(str(x) for x in location) or "study"
    kind = error["type"]
    if kind == "extra_forbidden":
        names = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.4)
        return f"unknown field {field}" + (_did_you_mean(near) or f" (known here: {', '.join(names)})")
    if kind == "missing":
        return f"missing field {field}"
    if kind == "union_tag_not_found":
        tag = "kind = 'planted' | 'text'" if field.startswith("corpus") else "source = 'pretrain' | 'checkpoints'"
        return f"missing field in {field}: {tag}"
    if kind == "union_tag_invalid":
        return f"{field}: {error['msg']}"
    message = re.sub(r"^Value error, ", "", error["msg"])
    given = error.get("input")
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{field}: {message}{shown}"


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Names of the fields of the model at a pydantic location, for suggestions."""
    model: Any = Study
    for part in location:
        if isinstance(part, int):
            continue
        if part in _TAGS:
            model = _TAGS[part]
            continue
        model = _inner_model(model.model_fields[part].annotation) if part in model.model_fields else model
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return [f.alias or name for name, f in model.model_fields.items()]


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None


def _did_you_mean(near: Sequence[str]) -> str:
    return f": did you mean {near[0]!r}?" if near else ""
