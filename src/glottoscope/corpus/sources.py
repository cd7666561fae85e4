"""Where text comes from: files found by path, directory or glob, and the records inside them.

A record is a dict of fields with a place to name in an error ("FILE line 3"); nothing here knows documents.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from glottoscope.errors import InputError

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "text": (".txt", ".text"),
    "parquet": (".parquet",),
    "kyoto-xml": (".xml",),
    "tsv": (".tsv",),
}
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One row of a file: where it stands, its number (lines from 1, rows from 0), and its fields."""

    place: str
    number: int
    fields: dict[str, Any]


class Source(NamedTuple):
    """One file (or `datasets` split) with the stem that stands in for a missing id."""

    path: Path
    stem: str


def find_sources(path: str | Path, format: str, formats: Collection[str]) -> tuple[str, list[Source], bool]:
    """The files behind a path (a file, a directory read recursively, or a glob) and their format.

    Returns:
        The format, the files sorted by path, and whether the path named one single file.

    Raises:
        InputError: nothing there, no file of a known format, several formats mixed, an unknown format.
    """
    if format != "auto" and format not in formats:
        raise InputError(f"unknown corpus format {format!r}: use auto, {', '.join(formats)}")
    path = Path(path).expanduser()
    base = path.parent
    if path.exists():
        found = [path]
    else:
        base = _fixed_part(path)
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise InputError(f"{path}: no such file or directory: check the path in the study file")

    if format in ("auto", "datasets") and "datasets" in formats and all(_is_dataset(item) for item in found):
        return "datasets", [source for item in found for source in _dataset_files(item)], False
    if format == "datasets":
        raise InputError(f"{path}: not a folder written by save_to_disk (no state.json or dataset_dict.json)")

    files: list[Source] = []
    for item in found:
        if item.is_dir():
            inside = sorted(p for p in item.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(item)))
            files += [Source(p, p.relative_to(item).with_suffix("").as_posix()) for p in inside]
        else:
            files.append(Source(item, item.relative_to(base).with_suffix("").as_posix()))
    if format == "auto":
        present = sorted({name for source in files for name in formats if _has_suffix(source.path, name)})
        if not present:
            known = ", ".join(suffix for name in formats for suffix in SUFFIXES.get(name, ()))
            raise InputError(f"{path}: no file with a known suffix ({known}): set the format in the study file")
        if len(present) > 1:
            raise InputError(f"{path}: holds files of several formats ({', '.join(present)}): set the format")
        format = present[0]
    # An explicit format also reads files of any other name, as long as none carries the format's own suffix.
    chosen = [source for source in files if _has_suffix(source.path, format)] or files
    if not chosen:
        raise InputError(f"{path}: the directory is empty: put {format} files there")
    return format, chosen, path.is_file()


def read_records(source: Source, format: str, required: Collection[str], optional: Collection[str]) -> Iterator[Record]:
    """The records of a jsonl, parquet, datasets or tsv file, in order.

    A columnar file reads the required and optional columns alone (all of them when a required one is absent, so that
    the error can list what is there); a tsv file without a header takes the required fields as its columns.
    """
    if format == "jsonl":
        return _jsonl(source.path)
    if format == "tsv":
        return _tsv(source.path, required)
    return _columnar(source.path, required, optional, stream=format == "datasets")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a UTF-8 file; a byte order mark is dropped, CRLF is a line end.

    Raises:
        InputError: unreadable file, invalid UTF-8 (file and line).
    """
    try:
        with open(path, "rb") as handle:
            # Binary iteration splits at \n only: U+2028 and friends are legal inside a JSON string.
            for number, line in enumerate(handle, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                try:
                    yield number, line.rstrip(b"\r\n").decode()
                except UnicodeDecodeError as error:
                    byte = f"0x{line[error.start]:02x}"
                    message = f"{path} line {number}: invalid UTF-8 (byte {byte}, position {error.start + 1})"
                    raise InputError(f"{message}: convert the file to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: invalid JSON ({error}): one JSON object per line is expected") from None
        if not isinstance(fields, dict):
            raise InputError(f"{place}: a JSON {type(fields).__name__}, not an object: one object per line is expected")
        yield Record(place, number, fields)


def _tsv(path: Path, names: Collection[str]) -> Iterator[Record]:
    header: list[str] | None = None
    for number, line in read_lines(path):
        if not line.strip():
            continue
        cells = line.split("\t")
        if header is None:
            if all(name in cells for name in names):
                header = cells
                continue
            if len(cells) != len(names):
                wanted, got = ", ".join(names), ", ".join(cell[:20] for cell in cells)
                raise InputError(f"{path} line {number}: no header with the columns {wanted} (found: {got}): add it")
            header = list(names)
        if len(cells) != len(header):
            raise InputError(f"{path} line {number}: {len(cells)} columns instead of {len(header)}: repair the line")
        yield Record(f"{path} line {number}", number, dict(zip(header, cells, strict=True)))


def _columnar(path: Path, required: Collection[str], optional: Collection[str], stream: bool) -> Iterator[Record]:
    def columns(present: list[str]) -> list[str]:
        wanted = {*required, *optional} if set(required) <= set(present) else set(present)
        return [name for name in present if name in wanted]

    number = 0
    try:
        for batch in (_arrow_batches if stream else _parquet_batches)(path, columns):
            for fields in batch.to_pylist():
                yield Record(f"{path} row {number}", number, fields)
                number += 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path} after row {number}: invalid UTF-8 ({error.reason}): write the file again") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged or not the expected format ({reason}): write the file again") from None


def _parquet_batches(path: Path, columns: Callable[[list[str]], list[str]]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1024, columns=columns(file.schema_arrow.names))


def _arrow_batches(path: Path, columns: Callable[[list[str]], list[str]]) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as handle, ipc.open_stream(handle) as reader:
        for batch in reader:
            yield batch.select(columns(batch.schema.names))


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _dataset_files(directory: Path, stem: str | None = None) -> list[Source]:
    """Arrow files of a `datasets` folder written by save_to_disk, all splits of a DatasetDict in its order.

    The folder is plain Arrow streams listed in JSON, so that the datasets library is not needed.
    """
    stem = stem or directory.name
    listing = directory / "state.json"
    if not listing.is_file():
        listing = directory / "dataset_dict.json"
    try:
        content = json.loads(listing.read_bytes())
        if listing.name == "dataset_dict.json":
            splits = [str(split) for split in content["splits"]]
            return [source for split in splits for source in _dataset_files(directory / split, f"{stem}/{split}")]
        files = [directory / entry["filename"] for entry in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{listing}: not as save_to_disk writes it ({error!r}): save the dataset again") from None
    if content.get("_indices_data_files"):
        raise InputError(f"{directory}: saved with an index mapping: call flatten_indices() and save_to_disk again")
    # One dataset in several shards: rows are numbered within a shard, so the shard belongs to a missing id.
    return [Source(file, stem if len(files) == 1 else f"{stem}/{file.stem}") for file in files]


def _has_suffix(path: Path, format: str) -> bool:
    return path.suffix.lower() in SUFFIXES.get(format, ())


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of a glob that holds a wildcard."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
