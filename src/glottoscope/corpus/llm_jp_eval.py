"""Translation data in the JSON format that LLM-jp-eval's preprocessing writes (ALT and WikiCorpus, both directions).

One object per file: `instruction` (text), `output_length` (the most tokens of an answer) and `samples`, a list of
{"input", "output"}; up to version 1 also `few_shots`, a list like `samples`. Version 2 has no `few_shots` (its shots
are the first samples of the file of the same name in the folder `train` beside) and adds settings that are not read
here. File names tell the direction: alt-e-to-j, alt-j-to-e, wikicorpus-e-to-j, wikicorpus-j-to-e.

Written from the public description of versions 1 and 2 (DATASET_en.md of the repository llm-jp/llm-jp-eval).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from glottoscope.corpus.display import clean_text
from glottoscope.errors import InputError

Pair = tuple[str, str]

_LANGUAGES = {"e": "en", "j": "ja"}
_DIRECTION = re.compile(r"(?:.*[-_])?([ej])[-_]to[-_]([ej])", re.IGNORECASE)


class TranslationFile(NamedTuple):
    """What one file holds. Texts are stripped; pairs and shots are (source, target)."""

    direction: tuple[str, str]  # language codes: source, target
    pairs: list[Pair]
    shots: list[Pair]  # empty where the file has none
    instruction: str | None
    output_length: int | None  # the most tokens that LLM-jp-eval lets a model generate
    skipped_empty: int  # samples without text on one side


def read_translation(path: str | Path, *, direction: tuple[str, str] | None = None) -> TranslationFile:
    """One file of LLM-jp-eval, in its order; samples with an empty side are skipped and counted.

    Args:
        direction: language codes of source and target; needed where the file's name does not tell them.

    Raises:
        InputError: a file that cannot be read or is not such JSON; a sample without a text field (its number from
            1); no sample with text; a direction that is unknown or contradicts the file's name.
    """
    path = Path(path).expanduser()
    direction = _direction(path, direction)
    content = _load(path)
    if "samples" not in content:
        present = ", ".join(content) or "none"
        raise InputError(f"{path}: no field 'samples' (fields present: {present}): give a file as LLM-jp-eval writes it")
    pairs, skipped = _pairs(path, "samples", content["samples"])
    if not pairs:
        raise InputError(f"{path}: holds no sample with text on both sides: run LLM-jp-eval's preprocessing again")
    shots, _ = _pairs(path, "few_shots", content.get("few_shots") or [])
    instruction, output_length = content.get("instruction"), content.get("output_length")
    if instruction is not None and not isinstance(instruction, str):
        raise InputError(f"{path}: field 'instruction' holds a {type(instruction).__name__}, not text: repair it")
    if output_length is not None and (not isinstance(output_length, int) or isinstance(output_length, bool) or output_length < 1):
        raise InputError(f"{path}: field 'output_length' holds {output_length!r}, not a number of tokens: repair it")
    instruction = clean_text(instruction)[0].strip() if instruction else None
    return TranslationFile(direction, pairs, shots, instruction or None, output_length, skipped)


def shots_file(path: str | Path) -> Path | None:
    """The file whose first samples LLM-jp-eval takes as shots: the same name in the folder `train` beside, or None."""
    path = Path(path).expanduser().absolute()
    beside = path.parent.parent / "train" / path.name
    return beside if path.parent.name != "train" and beside.is_file() else None


def _direction(path: Path, given: tuple[str, str] | None) -> tuple[str, str]:
    if given is not None and (not all(given) or given[0] == given[1]):
        raise InputError(f"{path}: direction {given[0]!r} to {given[1]!r}: name two different languages")
    match = _DIRECTION.fullmatch(path.stem)
    if match is None or match[1].lower() == match[2].lower():
        if given is None:
            raise InputError(f"{path}: the name does not end in e-to-j or j-to-e: give the direction")
        return given
    named = (_LANGUAGES[match[1].lower()], _LANGUAGES[match[2].lower()])
    if given not in (None, named):
        says = f"the name says {'-'.join(named)}, the direction {'-'.join(given)}"
        raise InputError(f"{path}: {says}: rename the file or correct the direction")
    return named


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8 (position {error.start + 1}): convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: invalid JSON ({error}): run LLM-jp-eval's preprocessing again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON {type(content).__name__}, not an object: give a file as LLM-jp-eval writes it")
    return content


def _pairs(path: Path, field: str, samples: Any) -> tuple[list[Pair], int]:
    """The (input, output) texts of a list of samples, and how many have an empty side."""
    if not isinstance(samples, list):
        raise InputError(f"{path}: field {field!r} holds a {type(samples).__name__}, not a list of samples: repair it")
    found = list[Pair]()
    for number, sample in enumerate(samples, 1):
        place = f"{path} {field} {number}"
        if not isinstance(sample, dict):
            raise InputError(f"{place}: a {type(sample).__name__}, not an object with input and output: repair it")
        source, target = (_text(place, sample, name) for name in ("input", "output"))
        if source and target:
            found.append((source, target))
    return found, len(samples) - len(found)


def _text(place: str, sample: dict[str, Any], name: str) -> str:
    if name not in sample:
        raise InputError(f"{place}: no field {name!r} (fields present: {', '.join(sample) or 'none'}): add it")
    value = sample[name]
    if not isinstance(value, str):
        raise InputError(f"{place}: field {name!r} holds a {type(value).__name__}, not text: repair it")
    return clean_text(value)[0].strip()
