"""NICT's XML of the Japanese-English Bilingual Corpus of Wikipedia's Kyoto Articles.

An article holds a title, paragraphs and sections; every title and sentence carries its Japanese original `<j>`
and several English versions `<e type ver>`, of which the checked one is the corpus's translation.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from glottoscope.errors import InputError

LANGUAGES = ("ja", "en")
# Sentences of one paragraph: Japanese puts no space between them.
_SENTENCE_SPACE = {"ja": "", "en": " "}


class Unit(NamedTuple):
    """A title or a sentence; a text is empty where its version is missing."""

    is_title: bool
    paragraph: int  # running number; a title is a paragraph of its own, and so are sentences outside paragraphs
    ja: str
    en: str


def read_article(path: Path) -> list[Unit]:
    """The titles and sentences of one article, in document order.

    Raises:
        InputError: unreadable or malformed XML (file and line), or XML without NICT's `<sen>` elements.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ElementTree.ParseError as error:
        reason = str(error).split(":")[0]
        raise InputError(f"{path} line {error.position[0]}: malformed XML ({reason}): repair the file") from None
    except (ValueError, LookupError) as error:
        raise InputError(f"{path} line 1: unusable XML encoding ({error}): convert the file to UTF-8") from None
    units = list(_walk(root, [0]))
    if not any(not unit.is_title for unit in units):
        raise InputError(f"{path}: holds no <sen> element, so it is not NICT's Kyoto XML: set another format")
    return units


def _walk(element: ElementTree.Element, paragraph: list[int]) -> Iterator[Unit]:
    for child in element:
        if child.tag in ("tit", "sen"):
            if child.tag == "tit" or element.tag != "par":
                paragraph[0] += 1
            yield Unit(child.tag == "tit", paragraph[0], _text(child.find("j")), _english(child))
        else:
            if child.tag == "par":
                paragraph[0] += 1
            yield from _walk(child, paragraph)


def _english(element: ElementTree.Element) -> str:
    """The latest checked version, else the latest translation; empty versions are passed over."""
    versions = [
        (version.get("type") == "check", int(version.get("ver", "0")), _text(version))
        for version in element.findall("e")
        if _text(version)
    ]
    return max(versions, key=lambda version: version[:2])[2] if versions else ""


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def document_text(units: list[Unit], language: str) -> str:
    """Title, section titles and sentences of one language: a paragraph to a line."""
    lines: dict[int, list[str]] = {}
    for unit in units:
        text: str = getattr(unit, language)
        if text:
            lines.setdefault(unit.paragraph, []).append(text)
    return "\n".join(_SENTENCE_SPACE[language].join(line) for line in lines.values())
