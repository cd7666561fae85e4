"""One feature in plain JSON: names, texts and numbers instead of ranks, gaps and levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from glottoscope.report.browser.codec import SCHEMA, listed
from glottoscope.report.browser.index import Setup
from glottoscope.report.browser.lists import FLAGS, FeatureList

if TYPE_CHECKING:
    from glottoscope.report.browser.site import Site
    from glottoscope.report.browser.texts import Texts

_SETUP = ("id", "control", "family", "model", "name", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed", "sae_seed")


def setup_words(setup: Setup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in _SETUP}


def measures_of(site: Site, found: FeatureList, f: int) -> dict[str, Any]:
    """The columns of one feature: classes and flags as words and truth values."""
    result: dict[str, Any] = {}
    for name, values in found.columns.items():
        value = None if np.isnan(values[f]) else float(values[f])
        if name == "class":
            result[name] = None if value is None else site.source.classes[int(value)]
        elif name in FLAGS:
            result[name] = None if value is None else bool(value)
        else:
            result[name] = listed(values[f : f + 1])[0]
    return result


def feature_record(site: Site, setup: Setup, f: int, record: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    """features/F.json from a feature's record and its examples in plain numbers."""
    texts, languages = site.texts, site.source.languages
    found = site.list(setup)
    maximum = float(found.max_activation[f])
    return {
        "schema": SCHEMA,
        "feature": f,
        "id": f"{setup.id}:{f}",
        "setup": setup_words(setup),
        "measures": measures_of(site, found, f),
        "tokens": {
            language: [{"token": texts.strings[rank], "count": count, "cluster": cluster} for rank, count, cluster in rows]
            for language, rows in record.get("tokens", {}).items()
        },
        "clusters": record.get("clusters", {}),
        "activations": record.get("activations"),
        "examples": _examples(texts, languages, examples, maximum),
        "pairs": _pairs(site, record.get("pairs"), maximum),
        "near": [{"id": f"{setup.id}:{other}", "cosine": cosine} for other, cosine in record.get("near") or ()],
        "over": [
            {
                "id": f"{site.setups[number].id}:{other}", "step": site.setups[number].step, "cosine": cosine,
                "mutual": bool(back),
                "nearest": {
                    language: None if found is None else {"id": f"{site.setups[number].id}:{found[0]}", "cosine": found[1]}
                    for language, found in zip(languages, rest[0], strict=True)
                } if rest else None,
            }
            for number, other, cosine, back, *rest in record.get("over", ())
        ],
        "labels": [x.entry() for x in site.labels.latest() if x.setup == setup.id and x.feature == f],
    }  # fmt: skip


def _shades(on: list[int], length: int, maximum: float) -> list[float]:
    """Activation at each position, from gaps and percents: to two digits, as the percents have them."""
    values, at = [0.0] * length, 0
    for gap, level in zip(on[0::2], on[1::2], strict=True):
        at += gap
        if at < length:
            values[at] = float(f"{level / 100 * maximum:.3g}")
    return values


def _examples(texts: Texts, languages: tuple[str, ...], found: dict[str, Any], maximum: float) -> list[dict[str, Any]]:
    result = []
    for n, block in enumerate(found.get("block", ())):
        start, language = found["start"][n], found["language"][n]
        length = found["length"][n]
        real = int(np.count_nonzero(np.asarray(texts.language[block]) != 255))
        ranks = texts.rank[np.asarray(texts.tokens[block, start : min(start + length, real)])].tolist()
        result.append({
            "block": block,
            "position": found["at"][n],
            "document": texts.document_id(int(texts.document[block, found["at"][n]])),
            "language": languages[language],
            "value": found["value"][n],
            "tokens": [texts.strings[rank] for rank in ranks],
            "activations": _shades(found["on"][n], len(ranks), maximum),
        })  # fmt: skip
    return result


def _pairs(site: Site, found: list[dict[str, Any]] | None, maximum: float) -> list[dict[str, Any]] | None:
    if found is None:
        return None
    result = []
    for row in found:
        sides = []
        for n, language in enumerate(site.source.languages[:2]):
            ranks = site.texts.side(row["pair"], n)
            tokens = [site.texts.strings[rank] for rank in ranks]
            sides.append({"language": language, "tokens": tokens, "activations": _shades(row["on"][n], len(ranks), maximum)})
        result.append({"pair": row["pair"], "sides": sides})
    return result
