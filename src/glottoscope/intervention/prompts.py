"""Few-shot prompts for translation: the template, its text, its token ids with the shared part held once, and the cut.

A prompt is intro + one shot per example + query. Texts are put in once: braces in a sentence are just characters.

Shapes: P prompts, T tokens of the longest prompt after the shared part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np
import numpy.typing as npt

from glottoscope.errors import InputError

Shots = Sequence[tuple[str, str]]
Encode = Callable[[list[str]], list[list[int]]]
IntArray = npt.NDArray[np.int64]

_NAMES = ("source_name", "target_name")
_ALLOWED = {
    "intro": (*_NAMES, "instruction"),
    "shot": (*_NAMES, "source", "target", "number"),
    "query": (*_NAMES, "source"),
}
_REQUIRED = {"intro": (), "shot": ("source", "target"), "query": ("source",)}


@dataclass(frozen=True, slots=True)
class Template:
    """The parts of a prompt, with fields in braces ({{ and }} are braces themselves).

    Args:
        shot: one example; {source} and {target}, and if wanted {source_name}, {target_name} and {number} (from 1).
            The text after {target} begins with `stop`, so that the model sees where a translation ends.
        query: what the model continues; {source}, and if wanted {source_name}, {target_name}.
        stop: the text that ends a translation.
        intro: comes first; if wanted {source_name}, {target_name} and {instruction}.

    Raises:
        InputError: a field is missing, unknown or repeated where it cannot be, or a brace is not closed.
    """

    shot: str = "{source_name}: {source}\n{target_name}: {target}\n"
    query: str = "{source_name}: {source}\n{target_name}:"
    stop: str = "\n"
    intro: str = ""

    def __post_init__(self) -> None:
        if not self.stop:
            raise InputError(r'template stop: is empty: set the text that ends a translation, such as "\n"')
        for part in _ALLOWED:
            fields = [name for _, name in _pieces(part, getattr(self, part)) if name is not None]
            unknown = [name for name in fields if name not in _ALLOWED[part]]
            if unknown:
                allowed = ", ".join(f"{{{name}}}" for name in _ALLOWED[part])
                raise InputError(f"template {part}: unknown field {{{unknown[0]}}}: use {allowed}, or {{{{ for a brace")
            for name in _REQUIRED[part]:
                if name not in fields:
                    raise InputError(f"template {part}: no {{{name}}}: put it where the {name} sentence goes")
        pieces = _pieces("shot", self.shot)
        ends = [i for i, (_, name) in enumerate(pieces) if name == "target"]
        if len(ends) > 1:
            raise InputError("template shot: {target} stands there twice: keep the one that the model is to continue")
        after = ""
        for literal, name in pieces[ends[0] + 1 :]:
            after += literal
            if name is not None:
                break
        if not after.startswith(self.stop):
            raise InputError(f"template shot: {after!r} follows {{target}}, not the stop {self.stop!r}: make them agree")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of P prompts: prompt p is `prefix` followed by the last `length[p]` ids of `rows[p]`.

    Args:
        prefix: the longest common beginning (BOS included) that leaves every prompt a token of its own.
        rows: [P, T], padded on the left with 0.
        length: [P], at least 1.
        dropped: shots left out at the front so that every prompt fits.
    """

    prefix: list[int]
    rows: IntArray
    length: IntArray
    dropped: int = 0

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Where `rows` holds a token [P, T]."""
        width = self.rows.shape[1]
        return np.arange(width)[None, :] >= width - self.length[:, None]


def build_prompts(
    template: Template,
    shots: Shots,
    sources: Sequence[str],
    *,
    source_name: str,
    target_name: str,
    instruction: str | None = None,
) -> list[str]:
    """The text of one prompt per source; shots are (source, target) texts, in their order.

    Raises:
        InputError: the intro asks for an instruction and there is none, or a shot's translation holds the stop.
    """
    fields = {"source_name": source_name, "target_name": target_name}
    if instruction is not None:
        fields["instruction"] = instruction
    intro = _pieces("intro", template.intro)
    if instruction is None and any(name == "instruction" for _, name in intro):
        raise InputError("template intro: {instruction} is used, but this data has no instruction: write it out instead")
    text = [_fill(intro, fields)]
    shot = _pieces("shot", template.shot)
    for number, (source, target) in enumerate(shots, 1):
        if template.stop in target:
            raise InputError(f"shot {number}: its translation holds the stop {template.stop!r}: choose another stop or shot")
        text.append(_fill(shot, {**fields, "source": source, "target": target, "number": str(number)}))
    shared, query = "".join(text), _pieces("query", template.query)
    return [shared + _fill(query, {**fields, "source": source}) for source in sources]


def encode_prompts(encode: Encode, prompts: Sequence[str], *, bos_id: int | None) -> Prompts:
    """Token ids of prompts, with their common beginning held once so that it goes through a model once.

    Args:
        encode: token ids of texts, without special tokens.
        bos_id: put before every prompt; None for a model without one.

    Raises:
        InputError: no prompts, or a prompt without tokens.
    """
    return _share(_encode(encode, prompts, bos_id), dropped=0)


def fit_prompts(
    encode: Encode,
    template: Template,
    shots: Shots,
    sources: Sequence[str],
    *,
    source_name: str,
    target_name: str,
    instruction: str | None = None,
    bos_id: int | None,
    max_length: int | None,
    new_tokens: int,
) -> Prompts:
    """`build_prompts` and `encode_prompts`, with as many shots as leave every prompt room in the model.

    Shots are dropped from the front, for all prompts alike, so that all prompts stay comparable.

    Args:
        max_length: positions of the model; None where it has no limit.
        new_tokens: of these, kept free for the translation.

    Raises:
        InputError: as the two, and when a prompt does not fit even without shots (its row, from 1).
    """
    dropped = 0
    while True:
        texts = build_prompts(
            template, shots[dropped:], sources, source_name=source_name, target_name=target_name, instruction=instruction
        )
        ids = _encode(encode, texts, bos_id)
        row = max(range(len(ids)), key=lambda row: len(ids[row]))
        if max_length is None or len(ids[row]) + new_tokens <= max_length:
            return _share(ids, dropped=dropped)
        if dropped == len(shots):
            raise InputError(
                f"prompt of row {row + 1}: {len(ids[row])} tokens without shots and {new_tokens} for the translation are more "
                f"than the model's {max_length}: leave out this row, shorten the template or ask for fewer new tokens"
            )
        dropped += 1


def cut_output(text: str, stop: str) -> str:
    """A generated text up to the first stop, stripped."""
    return text.split(stop, 1)[0].strip()


def stop_token_ids(pieces: Sequence[bytes], stop: str) -> set[int]:
    """Ids of the tokens whose bytes hold the whole stop: after one of them nothing more need be generated.

    A stop spread over several tokens is not found this way; `cut_output` cuts there all the same.

    Args:
        pieces: the bytes of every token, by id.
    """
    wanted = stop.encode()
    return {index for index, piece in enumerate(pieces) if wanted in piece}


def _pieces(part: str, text: str) -> list[tuple[str, str | None]]:
    """(literal text, field that follows it or None) in order."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"template {part}: {error}: write {{{{ or }}}} for a brace") from None
    # "{source!r}", "{source:9}": refused as unknown fields, under the name that was written.
    return [
        (literal, name if name is None else name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else ""))
        for literal, name, spec, conversion in parsed
    ]


def _fill(pieces: list[tuple[str, str | None]], fields: dict[str, str]) -> str:
    return "".join(literal + (fields[name] if name is not None else "") for literal, name in pieces)


def _encode(encode: Encode, prompts: Sequence[str], bos_id: int | None) -> list[list[int]]:
    if not prompts:
        raise InputError("there are no sentences to translate: check the aligned file and its limit")
    start = [] if bos_id is None else [bos_id]
    ids = [[*start, *row] for row in encode(list(prompts))]
    empty = next((row for row, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise InputError(f"prompt of row {empty + 1}: has no tokens: leave out this row or add words to the template")
    return ids


def _share(ids: list[list[int]], dropped: int) -> Prompts:
    # The first and the last in lexical order differ earliest: what these two share, all share.
    first, last = min(ids), max(ids)
    limit = min(len(row) for row in ids) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    length = np.array([len(row) - shared for row in ids], dtype=np.int64)
    rows = np.zeros((len(ids), int(length.max())), dtype=np.int64)
    prompts = Prompts(ids[0][:shared], rows, length, dropped)
    rows[prompts.mask] = np.concatenate([row[shared:] for row in ids])
    return prompts
