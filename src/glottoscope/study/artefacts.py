"""What a run directory is made of, told from its records alone: which artefacts there are, and which is made from which.

An artefact is a stage of a folder: an entry of the folder's `done.json`. Here folders are named relative to the run
directory, "." for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONTROLS = ("", "-shuffled", "-frozen_decoder")  # models made from another's weights, by the end of their name
# The order in which things are made: (top folder, stage) -> place. What comes later may be made from what comes earlier.
ORDER = (
    ("tokenizer", "tokenizer"),
    ("tokens", "lm_text"),
    ("models", "pretrain"),
    ("tokens", "tokens"),
    ("cells", "train"),
    ("cells", "features|cell"),
    ("rulers", "means_.*"),
    ("rulers", "clusters_.*"),
    ("cells", "score"),
    ("tables", "tables"),
    ("interventions", "prepare"),
    ("interventions", "(?!prepare|effects|comet).*"),
    ("interventions", "comet"),
    ("interventions", "effects"),
    ("tables", "intervention"),
    ("report", "report"),
)


def signed(stage: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a checksum of itself under "check"."""
    plain = {k: v for k, v in record.items() if k != "check"}
    return {**plain, "check": _checksum(stage, plain)}


FIRST = {"key", "settings", "files"}  # what a record of the first version holds, which has no checksum


def is_whole(stage: str, record: Any) -> bool:
    """Whether a record is what was once written; one of the first version is taken at its word."""
    if not isinstance(record, dict) or not set(record) >= FIRST or not isinstance(record["files"], dict):
        return False
    if "check" not in record:
        return set(record) == FIRST
    return record["check"] == _checksum(stage, {k: v for k, v in record.items() if k != "check"})


def _checksum(stage: str, record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([stage, record], sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def folders(root: Path) -> Iterator[str]:
    """Folders with a record, in an order in which nothing comes before what it is made from; hidden ones hold none."""
    found = []
    for path, below, files in os.walk(root):
        below[:] = [x for x in below if not x.startswith(".")]
        if "done.json" in files:
            found.append(Path(path).relative_to(root).as_posix())
    tops = {top: n for n, top in enumerate(dict.fromkeys((".", *(top for top, _ in ORDER))))}
    # Rulers are made from models and tokens alone, and cells are scored by them.
    rank = {**tops, "rulers": tops["models"] + 0.5}
    # tokens/pretrain is read by models, and the tokens themselves by none.
    return iter(sorted(found, key=lambda x: (rank.get(x.split("/")[0], len(tops)), x)))


def place(folder: str, stage: str) -> int:
    """Place of an artefact in ORDER; -1 for what nothing is made from."""
    top = folder.split("/")[0]
    for n, (where, pattern) in enumerate(ORDER):
        if top == where and re.fullmatch(pattern, stage):
            return n
    return -1


def is_made_from(folder: str, stage: str, source: str, source_stage: str) -> bool:
    """Whether the artefact (folder, stage) may have been made from (source, source_stage), by their names alone.

    Where names cannot tell, the answer is yes.
    """
    mine, theirs = place(folder, stage), place(source, source_stage)
    if theirs < 0 or mine <= theirs:
        return False
    top, from_top = folder.split("/")[0], source.split("/")[0]
    if top == "report" or from_top == "tokenizer":
        return True
    if from_top == "tokens":
        return top not in ("tokens", "models") or (source_stage == "lm_text" and top == "models")
    if top in ("tables", "tokens"):
        return top == "tables" and not (from_top == "models" and step_of(source) is None)
    if from_top == "interventions":
        return folder == source
    if from_top == "tables":
        return False
    if from_top == "models" and step_of(source) is None:
        return False  # the log of a model: shown, not read
    related = {f"{_model(source)}{x}" for x in (CONTROLS if from_top in ("models", "rulers") else ("",))}
    if not related & models_of(folder):
        return False
    if top == "interventions" or from_top == "rulers":
        return True
    if from_top == "models":
        return top == "rulers" or stage == "score" or step_of(source) == step_of(folder)
    return top == "cells" and (folder == source or (source_stage == "cell" and folder.startswith(f"{source}/")))


def dependants(root: Path, source: str, source_stage: str) -> dict[str, list[str]]:
    """Folder -> stages on record that may have been made from an artefact."""
    result = {}
    for folder in folders(root):
        try:
            stages = json.loads((root / folder / "done.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if found := [s for s in stages if is_made_from(folder, s, source, source_stage)]:
            result[folder] = found
    return result


def models_of(folder: str) -> set[str]:
    """Models that an artefact's folder is about; none for what belongs to the whole study."""
    parts = folder.split("/")
    if parts[0] == "interventions":
        return {cell.rpartition("@")[0] for cell in "".join(parts[2:3]).split("+")}
    return {_model(folder)} if parts[0] in ("cells", "models", "rulers") else set()


def _model(folder: str) -> str:
    top, name, *_ = [*folder.split("/"), ""]
    return name.rpartition("@")[0] if top == "cells" else name


def step_of(folder: str) -> str | None:
    """Checkpoint that an artefact's folder is about."""
    top, name, *below = [*folder.split("/"), ""]
    if top == "cells":
        return name.rpartition("@")[2]
    return below[0].removeprefix("step_") or None
