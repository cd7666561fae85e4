"""Documents and aligned sentences from a user's files.

JSON lines, plain text, Parquet, Hugging Face `datasets` folders and NICT's Kyoto XML; for aligned sentences also
TSV. Files must be UTF-8; a byte order mark and CRLF line ends are accepted. Lone surrogates become U+FFFD, counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from glottoscope.corpus import kyoto_xml
from glottoscope.corpus.display import clean_text
from glottoscope.corpus.sources import Record, Source, find_sources, read_lines, read_records
from glottoscope.errors import InputError

FORMATS = ("jsonl", "text", "parquet", "datasets", "kyoto-xml")
ALIGNED_FORMATS = ("jsonl", "parquet", "datasets", "kyoto-xml", "tsv")

Split = Literal["train", "validation", "test"]
_SENTENCE_NUMBER = re.compile(r"(.+)\.[0-9]+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """A text of one language. Translations of each other carry the same id."""

    id: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class AlignedPair:
    """A sentence in every language (texts in the order of the languages), and the article that it comes from."""

    id: str
    article: str
    texts: tuple[str, ...]


@dataclass(slots=True)
class ReadReport:
    """What a reader met; pass one in to have it filled (readers add to it)."""

    files: int = 0
    kept: int = 0  # documents, or aligned pairs
    skipped_empty: int = 0  # documents without text, or pairs with an empty side
    replaced_characters: int = 0  # lone surrogates, now U+FFFD
    formats: set[str] = field(default_factory=set)


def read_documents(
    path: str | Path,
    *,
    language: str,
    format: str = "auto",
    text_field: str = "text",
    id_field: str = "id",
    limit: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """The documents of one language, in the order of the (sorted) files.

    A directory or glob of plain text holds one document per file (id: its path in the directory, without suffix); a
    single plain-text file holds documents separated by blank lines. A missing id becomes STEM:LINE (rows from 0 in
    columnar files), so translations without ids do not share their split. Every split of a DatasetDict is read; name
    the split's own folder to read only one. `text_field` may be a path through nested fields ("translation.en").
    Documents without text are skipped and counted.

    Args:
        path: a file, a directory (read recursively, hidden files left out) or a glob.
        format: one of FORMATS, or "auto": by suffix or the directory's content.
        limit: stop after this many documents.

    Raises:
        InputError: at the call when nothing is found or the format is unclear; while reading for an unreadable,
            damaged or invalid file (file and line or row), a missing or non-text field (fields present), a file
            with nothing but empty documents.
    """
    format, sources, single = find_sources(path, format, FORMATS)
    if format == "kyoto-xml":
        _check_kyoto([language], sources[0].path)
    report = report if report is not None else ReadReport()
    report.formats.add(format)
    per_file = format == "kyoto-xml" or (format == "text" and not single)

    def texts(source: Source) -> Iterator[tuple[str, str]]:
        if format == "kyoto-xml":
            yield source.path.stem, kyoto_xml.document_text(kyoto_xml.read_article(source.path), language)
        elif per_file:
            yield source.stem, "\n".join(line for _, line in read_lines(source.path)).strip()
        elif format == "text":
            for line, text in _paragraphs(source.path):
                yield f"{source.stem}:{line}", text
        else:
            for record in read_records(source, format, [text_field.split(".")[0]], [id_field]):
                text = _text(record, text_field)
                yield _id(record, id_field, source)[0], text

    def documents() -> Iterator[Document]:
        n_kept = 0
        for source in sources:
            report.files += 1
            n_rows, n_before = 0, n_kept
            for identifier, raw in texts(source):
                n_rows += 1
                text = _clean(raw, report)
                if not text.strip():
                    report.skipped_empty += 1
                    continue
                n_kept += 1
                report.kept += 1
                yield Document(identifier, language, text)
            if n_rows and n_kept == n_before and not per_file:
                raise InputError(f"{source.path}: all {n_rows} documents are empty: check the text field")
        if not n_kept:
            raise InputError(f"{path}: holds no text for language {language!r}: check the path and the format")

    return islice(documents(), limit)


def read_aligned(
    path: str | Path,
    *,
    languages: Sequence[str],
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    id_field: str = "id",
    limit: int | None = None,
    report: ReadReport | None = None,
) -> list[AlignedPair]:
    """Aligned sentences, in the order of the files; a pair with an empty side is skipped and counted.

    The article is what stands before the sentence number of an id ARTICLE.NUMBER, else the id itself. A missing id
    becomes STEM:LINE. Kyoto XML: sentences only, ids STEM.N as in NICT's order. TSV: a header naming the fields, or
    exactly one column per language in their order.

    Args:
        languages: at least two codes; texts come in this order.
        fields: language -> field name (a path such as "translation.en" is allowed); the code where absent.

    Raises:
        InputError: as `read_documents`; fewer than two languages.
    """
    if len(languages) < 2:
        raise InputError("aligned sentences need at least two languages")
    format, sources, _ = find_sources(path, format, ALIGNED_FORMATS)
    if format == "kyoto-xml":
        _check_kyoto(languages, sources[0].path)
    report = report if report is not None else ReadReport()
    report.formats.add(format)
    names = {language: (fields or {}).get(language, language) for language in languages}

    def rows(source: Source) -> Iterator[tuple[str, str, list[str]]]:
        if format == "kyoto-xml":
            sentences = [unit for unit in kyoto_xml.read_article(source.path) if not unit.is_title]
            for number, unit in enumerate(sentences):
                article, texts = source.path.stem, [getattr(unit, language) for language in languages]
                yield f"{article}.{number}", article, texts
            return
        # TSV has no nested fields: a dot there belongs to the name.
        required = [name if format == "tsv" else name.split(".")[0] for name in names.values()]
        for record in read_records(source, format, required, [id_field]):
            yield *_id(record, id_field, source), [_text(record, name) for name in names.values()]

    def pairs() -> Iterator[AlignedPair]:
        for source in sources:
            report.files += 1
            for identifier, article, raw in rows(source):
                texts = tuple(_clean(text, report).strip() for text in raw)
                if not all(texts):
                    report.skipped_empty += 1
                    continue
                report.kept += 1
                yield AlignedPair(identifier, article, texts)

    found = list(islice(pairs(), limit))
    if not found and limit != 0:
        raise InputError(f"{path}: holds no pair with text in all of {', '.join(languages)}: check path and fields")
    return found


def split_of(document_id: str, *, seed: int, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> Split:
    """The split of a document: a hash of seed and id alone, so translations that share an id share their split.

    For aligned sentences pass the article. Adding documents moves none of the others.
    """
    digest = hashlib.blake2b(f"{seed}:{clean_text(document_id)[0]}".encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "big") / 2**64
    if draw < fractions[0]:
        return "train"
    return "validation" if draw < fractions[0] + fractions[1] else "test"


def _check_kyoto(languages: Sequence[str], path: Path) -> None:
    unknown = [language for language in languages if language not in kyoto_xml.LANGUAGES]
    if unknown:
        raise InputError(f"{path}: Kyoto XML holds ja and en, not {', '.join(unknown)}: change language or path")


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of runs of lines without a blank one."""
    start, lines = 0, list[str]()
    for number, line in read_lines(path):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "\n".join(lines)
            lines = []
    if lines:
        yield start, "\n".join(lines)


def _text(record: Record, name: str) -> str:
    """A text field of a record; null is an empty text."""
    value = _value(record, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{record.place}: field {name!r} holds a {type(value).__name__}, not text: name a text field")
    return value


def _value(record: Record, name: str) -> Any:
    if name in record.fields:
        return record.fields[name]
    value: Any = record.fields
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            present = ", ".join(map(str, record.fields)) or "none"
            raise InputError(f"{record.place}: no field {name!r} (fields present: {present}): set the field's name")
        value = value[part]
    return value


def _id(record: Record, id_field: str, source: Source) -> tuple[str, str]:
    """(id, article) of a record."""
    value = record.fields.get(id_field)
    if value is None or value == "":
        made_up = f"{source.stem}:{record.number}"
        return made_up, made_up
    identifier = clean_text(str(value))[0]
    match = _SENTENCE_NUMBER.fullmatch(identifier)
    return identifier, match[1] if match else identifier


def _clean(text: str, report: ReadReport) -> str:
    text, replaced = clean_text(text.replace("\r\n", "\n"))
    report.replaced_characters += replaced
    return text
