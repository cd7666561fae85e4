"""The run directory: the only module that knows its paths, and the only one that says what is complete.

Every artefact folder ends with its own `done.json`, written last. It maps a stage to the key of what made the
artefact (a hash over settings and the keys of its inputs) and to the hashes and sizes of the files made. A stage whose
key is already there is not run again; nothing else is kept, so nothing grows with the number of cells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glottoscope.atomic import TEMPORARY_PREFIX, write_json, write_text
from glottoscope.errors import InputError
from glottoscope.study import artefacts
from glottoscope.study.config import Study
from glottoscope.study.load import dump_study, parse_study
from glottoscope.study.locks import RUN_HOLDER, RUN_LOCK, hold_records, hold_run

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
RESUME_FOLDER = ".resume"


def digest(*parts: Any) -> str:
    """Hash of plain values (JSON with sorted keys): the key of an artefact."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def json_text(value: Any) -> str:
    """What `write_json` writes: equal values give equal bytes."""
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class DamagedManifest(InputError):
    """The manifest is missing or unreadable; `run` writes it again where study.toml tells whose directory it is."""


class RunStore:
    """A run directory. Opening one changes nothing; `create` writes the study and the manifest."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    # ---- identity

    @property
    def study_path(self) -> Path:
        return self.root / "study.toml"

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    def create(self, study: Study, manifest: Mapping[str, Any]) -> None:
        """Make or take over the run directory of `study`.

        Raises:
            InputError: the folder belongs to another study, or holds files that are no run directory.
        """
        self.check_owner(study)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # What merged runs were made with stays known.
            known = {"merged": merged} if (merged := self._merged()) else {}
            identity = {"schema": SCHEMA, "study": study.study.name, **known, **manifest}
            text, key = dump_study(study), digest(identity, study.identity())
            if self._holds(text, identity) and self.is_done(self.root, "study", key):
                return
            # The manifest names the owner, so it must never be missing beside a study file.
            write_json(self.manifest_path, identity)
            write_text(self.study_path, text)
            self.mark_done(self.root, "study", key, {"name": study.study.name}, [self.manifest_path.name, self.study_path.name])
        except PermissionError as error:
            raise InputError(f"{self.root} cannot be written ({error.strerror}): choose another --out") from None
        except OSError as error:
            raise InputError(f"{self.root} cannot be made ({error.strerror}): choose another --out") from None

    def _holds(self, text: str, identity: Mapping[str, Any]) -> bool:
        """Whether study file and manifest say just this; half a pair, or a damaged one, does not."""
        try:
            return self.study_path.read_text(encoding="utf-8") == text and self.manifest() == identity
        except (OSError, ValueError, DamagedManifest):
            return False

    def _merged(self) -> list[Any]:
        with contextlib.suppress(InputError, OSError):
            return list(self.manifest().get("merged", ()))
        return []

    def check_owner(self, study: Study) -> None:
        """Refuse a folder that is not this study's to write in. Changes nothing.

        Raises:
            InputError: the folder belongs to another study, was written by a newer glottoscope, or holds files that
                are no run directory.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root} is a file, not a folder: choose another --out")
        if self.manifest_path.exists() or self.study_path.exists() or "study" in self.done(self.root):
            owner = self._owner()
            if owner != study.study.name:
                raise InputError(f"{self.root} belongs to the study {owner!r}, not to {study.study.name!r}: choose another --out")
        # What a killed start leaves (its lock, temporary files) is no one's property.
        elif self.root.is_dir() and any(
            p.name not in (RUN_LOCK, RUN_HOLDER) and not p.name.startswith(TEMPORARY_PREFIX) for p in self.root.iterdir()
        ):
            raise InputError(f"{self.root} is not empty and is no run directory: choose another --out")

    def _owner(self) -> str:
        """Name of the study that this directory belongs to: of its record, which has a checksum; else of the manifest, else of
        study.toml. A run mends all of them."""
        record = self.done(self.root).get("study", {})
        if artefacts.is_whole("study", record) and "name" in record["settings"]:
            return record["settings"]["name"]
        try:
            return self.manifest()["study"]
        except DamagedManifest:
            if not self.study_path.exists():
                raise
        return self._read_study().study.name

    def manifest(self) -> dict[str, Any]:
        """Identity, versions, seeds and hashes of the run."""
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such run directory; `glottoscope run STUDY.toml --out {self.root}` makes it")
        if not self.manifest_path.exists():
            raise DamagedManifest(f"{self.root} is no run directory: it has no manifest.json")
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedManifest(f"{self.manifest_path} is damaged ({error}): run the study again to mend it") from None
        if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int) or "study" not in manifest:
            raise DamagedManifest(f"{self.manifest_path} is damaged (no schema or study): run the study again to mend it")
        if manifest["schema"] > SCHEMA:
            raise InputError(f"{self.root} was written by a newer glottoscope (schema {manifest['schema']}): update yours")
        return manifest

    def study(self) -> Study:
        """The study that filled this directory."""
        self.manifest()
        if not self.study_path.exists():
            raise InputError(f"{self.root} has no study.toml: run the study again to mend it")
        return self._read_study()

    def _read_study(self) -> Study:
        text = self.study_path.read_text(encoding="utf-8")
        return parse_study(text, name=str(self.study_path), folder=self.root)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the directory for this process: two runs on one directory would redo each other's work."""
        return hold_run(self.root)

    # ---- paths

    @property
    def models_dir(self) -> Path:
        return self.root / "models"

    @property
    def tokenizer_dir(self) -> Path:
        return self.root / "tokenizer"

    def model_dir(self, model: str) -> Path:
        """Folder of a model trained here: its log and one folder per checkpoint."""
        return self.models_dir / model

    def checkpoint_dir(self, model: str, step: int) -> Path:
        return self.model_dir(model) / f"step_{step}"

    def pretrain_states_dir(self, model: str) -> Path:
        """Hidden folder of the states of a model's training that is not done; gone when it is."""
        return self.model_dir(model) / RESUME_FOLDER

    @property
    def downloads_dir(self) -> Path:
        """Hidden folder of what is fetched from a hub: the study's inputs, no results of it."""
        return self.root / ".downloads"

    @property
    def scaled_dir(self) -> Path:
        """What `--scale tiny` puts in the place of a study's text and models."""
        return self.root / "scaled"

    @property
    def tokens_dir(self) -> Path:
        return self.root / "tokens"

    @property
    def aligned_dir(self) -> Path:
        return self.tokens_dir / "aligned"

    @property
    def cells_dir(self) -> Path:
        return self.root / "cells"

    def cell_dir(self, model: str, step: int) -> Path:
        return self.cells_dir / f"{model}@{step}"

    def train_states_dir(self, model: str, step: int) -> Path:
        """Hidden folder of the states of a cell's SAE trainings that are not done: a folder for each group of layers."""
        return self.cell_dir(model, step) / RESUME_FOLDER

    def train_state_dir(self, model: str, step: int, layers: Sequence[int]) -> Path:
        return self.train_states_dir(model, step) / f"layers_{_ranges(layers)}"

    def setup_dir(self, model: str, step: int, layer: int, seed: int) -> Path:
        return self.cell_dir(model, step) / f"layer_{layer:02d}" / f"seed_{seed}"

    @property
    def rulers_dir(self) -> Path:
        return self.root / "rulers"

    def ruler_dir(self, model: str) -> Path:
        """Token vectors of a model's final checkpoint and their clusters: the same ruler at all steps."""
        return self.rulers_dir / model

    @property
    def interventions_dir(self) -> Path:
        return self.root / "interventions"

    def intervention_dir(self, name: str, pair: str, layers: str, seed: int) -> Path:
        """Folder of one intervention: its plan, what was measured, and its rows of the table."""
        return self.interventions_dir / name / pair / f"layers_{layers}" / f"seed_{seed}"

    @property
    def tables_dir(self) -> Path:
        return self.root / "tables"

    def table_path(self, name: str) -> Path:
        return self.tables_dir / f"{name}.parquet"

    @property
    def report_dir(self) -> Path:
        return self.root / "report"

    @property
    def labels_path(self) -> Path:
        """What people say of the features: the one file that is no result of the study, and that no stage touches."""
        return self.root / "labels" / "labels.jsonl"

    def sae_hash(self, setup: str) -> str:
        """First 16 digits of the SHA-256 of the SAE of `setup` (its folder below cells/); "" where none is complete."""
        record = self.done(self.cells_dir / setup).get("train")
        files = record.get("files") if isinstance(record, dict) else None
        return str(files.get("sae.safetensors", ""))[:16] if isinstance(files, dict) else ""

    @property
    def sources_path(self) -> Path:
        return self.root / "sources.json"

    def record_sources(self, hashes: Mapping[str, str]) -> None:
        """Keep the hashes of the corpus files: path -> SHA-256."""
        write_json(self.sources_path, dict(hashes))
        self.mark_done(self.root, "sources", digest(dict(hashes)), {}, [self.sources_path.name])

    def recorded_sources(self) -> dict[str, str]:
        """What `record_sources` kept; empty where nothing was."""
        try:
            found = json.loads(self.sources_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def log_path(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def work_dir(self) -> Path:
        """Signs of life of the units at work; empty, or not there, while nothing runs."""
        return self.root / "work"

    def sign_path(self, unit: str) -> Path:
        """Where a unit says that it is at work: a file name that any file system takes, another one for each unit."""
        plain = re.sub(r"[^A-Za-z0-9._@+-]+", "_", unit)[:80]
        return self.work_dir / f"{plain}-{digest(unit)[:8]}.json"

    @property
    def metrics_dir(self) -> Path:
        """How trainings got on, for people and their loggers: no results, named by no record."""
        return self.root / "metrics"

    def metrics_path(self, unit: str) -> Path:
        """Where a training unit writes its metrics; names of models and cells need no change but for spaces."""
        return self.metrics_dir / f"{re.sub(r'[^A-Za-z0-9._@+-]+', '_', unit)}.jsonl"

    def logger_dir(self, name: str) -> Path:
        """What a logger keeps of the metrics in files."""
        return self.metrics_dir / name

    # ---- what is complete

    def done(self, folder: Path) -> dict[str, Any]:
        """Stage -> record of an artefact folder; empty where nothing is complete."""
        try:
            record = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError:
            record = None
        # A damaged record means the work is not known to be complete: do it again.
        return record if isinstance(record, dict) else {}

    def is_done(self, folder: Path, stage: str, key: str) -> bool:
        """Whether `stage` was completed in `folder` with exactly these settings and inputs, and its files are there."""
        record = self.done(folder).get(stage)
        if not isinstance(record, dict) or record.get("key") != key:
            return False
        return all((folder / name).exists() for name in record.get("files", ()))

    def begin(self, folder: Path, *stages: str) -> None:
        """Forget that `stages` were complete in `folder`: called before the first of their files is replaced.

        Without it an interrupted rewrite, followed by a return to the old settings, would pass for complete.
        """
        if (folder / "done.json").exists():
            with hold_records(folder):
                record = self.done(folder)
                kept = {name: value for name, value in record.items() if name not in stages}
                if kept != record:
                    write_json(folder / "done.json", kept)

    def mark_done(self, folder: Path, stage: str, key: str, settings: Mapping[str, Any], files: list[str]) -> None:
        """Write the record of a completed stage, last of all, with the hashes and sizes of its files."""
        hashes = {name: file_digest(folder / name) for name in sorted(files)}
        sizes = {name: (folder / name).stat().st_size for name in hashes}
        self.adopt(folder, stage, {"key": key, "settings": dict(settings), "files": hashes, "sizes": sizes})

    def adopt(self, folder: Path, stage: str, record: Mapping[str, Any]) -> None:
        """Write a record whose files are there, with a checksum of itself."""
        lost = self._damaged().get(self._name(folder), {}).get(stage)
        if lost is not None and lost.get("key") == record["key"] and lost.get("files") != record["files"]:
            # Repaired on another machine, last bits may differ: what was made from the old bytes is made again.
            for other, stages in artefacts.dependants(self.root, self._name(folder), stage).items():
                self.begin(self.root / other, *stages)
        # Several units complete stages of one folder (rulers, layer groups): without the lock one of two would be lost.
        with hold_records(folder):
            whole = {**self.done(folder), stage: artefacts.signed(stage, record)}
            write_text(folder / "done.json", json_text(whole))
        if lost is not None:
            self._note_damaged(folder, {stage: None})

    # ---- damage

    @property
    def damaged_path(self) -> Path:
        """What `verify` found damaged and no run has made again yet: folder -> stage -> key and hashes."""
        return self.root / "damaged.json"

    def forget(self, folder: Path, *stages: str) -> None:
        """Say that files of `stages` are damaged: the next run makes these stages again.

        What was made from them stays, unless the new bytes differ from those on record.
        """
        record = self.done(folder)
        whole = [s for s in stages if artefacts.is_whole(s, record.get(s))]
        if whole:
            self._note_damaged(folder, {s: {k: record[s][k] for k in ("key", "files")} for s in whole})
        self.begin(folder, *stages)

    def is_repair(self, folder: Path, stage: str, key: str) -> bool:
        """Whether making `stage` with this key only mends damage, so that what was made from it can stay."""
        return self._damaged().get(self._name(folder), {}).get(stage, {}).get("key") == key

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()

    def _damaged(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.damaged_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _note_damaged(self, folder: Path, changes: Mapping[str, Any]) -> None:
        with hold_records(self.root):
            found, name = self._damaged(), self._name(folder)
            stages = {k: v for k, v in {**found.get(name, {}), **changes}.items() if v is not None}
            found = {k: v for k, v in {**found, name: stages}.items() if v}
            if found:
                write_json(self.damaged_path, found)
            else:
                self.damaged_path.unlink(missing_ok=True)

    # ---- tables

    def table(self, name: str) -> pa.Table:
        """A table of the run.

        Raises:
            InputError: it is not there yet; says which command makes it.
        """
        path = self.table_path(name)
        if not path.exists():
            self.manifest()
            raise InputError(f"{path} is not there: the study is not complete; `glottoscope run` continues it")
        return read_parquet(path)

    def table_or_none(self, name: str) -> pa.Table | None:
        return self.table(name) if self.table_path(name).exists() else None

    # ---- housekeeping

    def remove(self, path: Path) -> int:
        """Remove a file or folder of this run; returns the bytes freed."""
        if self.root.resolve() not in path.resolve().parents:
            raise InputError(f"{path} is not inside {self.root}")
        size = tree_size(path)
        if path.is_dir():
            # Without its record first, a folder that is half removed would pass for complete.
            (path / "done.json").unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return size

    def leftovers(self) -> list[Path]:
        """Temporary files that a killed process left behind."""
        return sorted(self.root.rglob(f"{TEMPORARY_PREFIX}*"))


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read_parquet(path: Path) -> pa.Table:
    """Read a Parquet file of a run directory; a damaged one is named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and run the study again") from None


def tree_size(path: Path) -> int:
    """Bytes of a file or folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(os.lstat(p).st_size for p in path.rglob("*") if p.is_file())
