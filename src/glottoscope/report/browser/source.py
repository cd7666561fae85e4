"""What the study hands to the browser: the run directory and the words and settings that its tables do not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from glottoscope.report.browser.labels import Label
from glottoscope.study.config import CLASS_NAMES
from glottoscope.study.store import RunStore

# (model, layer, feature [R], token [R], count [R]) -> cluster of each row, int64 [R], or None where there are no clusters.
# Rows are sorted by feature, then token, each pair once.
ClusterLabels = Callable[[str, int, NDArray[Any], NDArray[Any], NDArray[Any]], "NDArray[Any] | None"]

_SHARES = ("0-1", "-1-1", "cosine", "AUC", "share")


class Measure(NamedTuple):
    """One number of a feature, of a setup, or of both, and what it means."""

    name: str
    label: str
    unit: str
    meaning: str  # of a feature's number; where setups alone have it, of theirs
    digits: int  # decimals to show
    setup_meaning: str | None = None  # of a setup's number, where features have one of the same name

    @property
    def decimals(self) -> int | None:
        """Decimals kept in the data; None: four significant digits."""
        return 4 if self.unit in _SHARES and self.name != "density" else None


@dataclass(frozen=True, kw_only=True)
class SiteSource:
    """A run directory and what is said about it.

    Attributes:
        store: the run directory; nothing is written into it.
        version: of glottoscope. study: name of the study. title: heading of the site.
        languages: codes in the study's order. language_names: code -> English name.
        thresholds: activation, phi, monosemanticity, language_share, phi_firing, as the study has them.
        rule: which language a position counts for. window: tokens of an example. k: active features per token.
        measures: what the columns mean. controls: control -> words.
        names: model -> shown name, one for all LM seeds of a model. middle: model -> the layer that is shown first.
        special_ids: tokens that are no text. licences: (what, licence, attribution). notes: one sentence or more each.
        partial: what is missing of the run, one plain sentence each.
        activation_edges: edges of the bins of activations.parquet. clusters: of tokens in a layer's hidden states.
        agreement: labels -> {"pairs": [...], "measures": [...]}.
    """

    store: RunStore
    study: str
    title: str
    version: str
    languages: tuple[str, ...]
    language_names: Mapping[str, str]
    thresholds: Mapping[str, float]
    rule: str
    window: int
    k: int
    measures: tuple[Measure, ...]
    controls: Mapping[str, str]
    names: Mapping[str, str]
    special_ids: tuple[int, ...]
    middle: Mapping[str, int] = field(default_factory=dict)
    licences: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    activation_edges: NDArray[Any] | None = None
    clusters: ClusterLabels | None = None
    agreement: Callable[[Sequence[Label]], dict[str, Any]] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """What a feature can be: a language, or one of the other classes."""
        return (*self.languages, *(name for name in CLASS_NAMES if name not in ("bilingual", "all")))

    def measure(self, name: str) -> Measure | None:
        return next((m for m in self.measures if m.name == name), None)
