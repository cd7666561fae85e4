"""What the report is made from: one plain record, and how rows are picked out of its tables.

The report knows no paths and runs no model. `study` fills a `ReportData`; everything here is a view of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glottoscope.errors import InputError

KEY = ("control", "family", "model", "d_model", "n_params", "step", "tokens_seen", "layer", "lm_seed", "sae_seed")
INTERVENTION = (
    *("experiment", "control", "model", "lm_seed", "sae_seed", "layer", "layers"),
    *("base_step", "donor_model", "donor_step", "base_tokens", "donor_tokens"),
    *("text", "arm", "part", "draw", "mode", "scale", "alpha", "chosen", "metric", "language"),
    *("value", "change", "change_low", "change_high", "gap_closed", "gap_closed_low", "gap_closed_high"),
    *("added_norm", "change_per_norm", "mass", "n_features", "n_units"),
    *("rank", "n_random", "rank_other", "n_random_other", "note"),
)
NO_SIGNAL_CONTROLS = ("negative", "no_switching")  # controls that are whole language models followed over steps
CONTROL_NAMES = {
    "negative": "negative control (no cross-lingual signal)",
    "no_switching": "control without code switching",
    "shuffled": "final model with shuffled weights",
    "frozen_decoder": "SAE with a frozen decoder",
    "embeddings": "SAE on the embeddings",
}

Spans = list[tuple[str, float]]
"""Consecutive pieces of text with their activation relative to the feature's maximum (0..1)."""


@dataclass(frozen=True, slots=True)
class PatternExample:
    """One feature at one checkpoint with the texts that activate it (Figure 4 of the paper)."""

    model: str
    step: int
    layer: int
    role: Literal["early", "middle", "last"]
    feature: int
    language: str  # a language code, mixed, neutral or unclassified
    bilingual: bool | None
    phi: float | None
    examples: list[tuple[str, Spans]]  # (language code of the document, spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything the report shows. Tables have the columns named in the run directory's contract.

    Columns that a study could not measure may be null or absent: the report then says so.
    """

    name: str  # study.name
    evolution: pa.Table  # one row per setup
    languages: list[str]
    k: int  # active features per token of the SAE
    activation_threshold: float = 0.7  # share of the feature's maximum above which a position counts
    phi_threshold: float = 0.4  # of `bilingual`
    monosemanticity_threshold: float = 0.5  # of `bilingual_paper`
    language_share: float = 0.9  # above it a feature is one language's
    theta_percentile: float | None = None  # of pair cosines, above which token clusters merge; None: theta was given
    features: pa.Table | None = None
    evolution_seeds: pa.Table | None = None
    sweeps: pa.Table | None = None  # key, sweep, value, measure, result
    truth: pa.Table | None = None  # key, auc_phi, auc_flag, n_truth_bilingual, n_alive
    intervention: pa.Table | None = None  # one row per condition, text, language and metric: INTERVENTION
    patterns: list[PatternExample] = field(default_factory=list)
    pretrain_log: pa.Table | None = None  # model, step, tokens_seen, loss, lr, loss_<lang>
    settings: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    language_names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    choices: list[tuple[str, str, str]] = field(default_factory=list)  # (what, ours, the paper's)
    detectable: dict[str, Any] = field(default_factory=dict)
    turning: list[dict[str, Any]] = field(default_factory=list)
    licences: list[tuple[str, str, str]] = field(default_factory=list)  # (what, licence, attribution)
    middle_layers: dict[str, int] = field(default_factory=dict)  # model -> layer, where the default is not wanted

    def __post_init__(self) -> None:
        missing = [name for name in (*KEY, "share_mixed") if name not in self.evolution.column_names]
        if missing:
            raise InputError(f"evolution table: column(s) {', '.join(missing)} missing: run the score stage again")
        if self.evolution.num_rows == 0:
            raise InputError("evolution table has no rows: nothing was measured, so there is no report to write")
        if self.intervention is not None:
            missing = [name for name in INTERVENTION if name not in self.intervention.column_names]
            if missing:
                raise InputError(f"intervention table: column(s) {', '.join(missing)} missing: run the intervene stage again")

    def language_name(self, code: str) -> str:
        """The language's English name, or its code."""
        return self.language_names.get(code, {"en": "English", "ja": "Japanese"}.get(code, code))

    def models(self, control: str = "none") -> list[str]:
        """Names of the models with rows of that control, smallest first (parameters, then name)."""
        table = where(self.evolution, control=control)
        pairs = zip(table["n_params"].to_pylist(), table["model"].to_pylist(), strict=True)
        size = {}
        for n_params, model in pairs:
            size[model] = max(size.get(model, 0), n_params or 0)
        return sorted(size, key=lambda model: (size[model], model))

    @property
    def main_model(self) -> str:
        """The largest model that is not a control (or the largest at all, where only controls were run)."""
        names = self.models()
        return names[-1] if names else str(self.evolution["model"][0].as_py())

    def layers(self, model: str) -> list[int]:
        """Measured layers of a model in order, without rows of other SAEs (embeddings, frozen decoder)."""
        table = self.rows(model)
        return sorted(set(table["layer"].to_pylist()))

    def middle_layer(self, model: str) -> int:
        """The measured layer nearest to half of the deepest measured one (the deeper on a tie)."""
        if model in self.middle_layers:
            return self.middle_layers[model]
        layers = self.layers(model)
        return min(layers, key=lambda layer: (abs(layer - layers[-1] / 2), -layer))

    def control_of(self, model: str) -> str:
        """The `control` value of a model's own rows: `none` if it has such rows, else a whole-model control's."""
        values = distinct(where(self.evolution, model=model), "control")
        return next((value for value in ("none", *NO_SIGNAL_CONTROLS) if value in values), values[0] if values else "none")

    def rows(
        self,
        model: str,
        *,
        control: str | None = None,
        layer: int | None = None,
        step: int | None = None,
        all_seeds: bool = False,
    ) -> pa.Table:
        """Rows of one model sorted by tokens seen and layer; without `all_seeds` only its first LM and SAE seed."""
        wanted = {"model": model, "control": control or self.control_of(model), "layer": layer, "step": step}
        table = where(self.evolution, **{name: value for name, value in wanted.items() if value is not None})
        if not all_seeds:
            table = first_seeds(table)
        return table.sort_by([(name, "ascending") for name in ("tokens_seen", "step", "layer", "lm_seed", "sae_seed")])

    def over_steps(self, model: str, *, control: str | None = None) -> pa.Table:
        """Rows of a model at its middle layer over training, first seeds."""
        return self.rows(model, control=control, layer=self.middle_layer(model))

    def last_step(self, model: str) -> int:
        """Step with the largest `tokens_seen`."""
        table = self.rows(model)
        return int(table["step"][table.num_rows - 1].as_py())

    def control_models(self) -> list[tuple[str, str]]:
        """(control, model) of the whole-model controls that were followed over training."""
        return [(control, model) for control in NO_SIGNAL_CONTROLS for model in self.models(control)]

    def n_seeds(self, model: str) -> tuple[int, int]:
        """Number of LM seeds and of SAE seeds of a model."""
        table = self.rows(model, all_seeds=True)
        return len(distinct(table, "lm_seed")), len(distinct(table, "sae_seed"))

    def model_label(self, model: str) -> str:
        """`toy-128 (d = 128, 1.2 M parameters)`."""
        table = self.rows(model)
        d_model, n_params = table["d_model"][0].as_py(), table["n_params"][0].as_py()
        parts = [f"d = {d_model}"] if d_model else []
        parts += [f"{short_number(n_params)} parameters"] if n_params else []
        return f"{model} ({', '.join(parts)})" if parts else model


def where(table: pa.Table, **wanted: Any) -> pa.Table:
    """Rows whose columns equal the wanted values (None: is null)."""
    for column, value in wanted.items():
        table = table.filter(pc.field(column).is_null() if value is None else pc.field(column) == value)
    return table


def distinct(table: pa.Table, column: str) -> list[Any]:
    """Values of a column, each once, in order, null last."""
    values = set(table[column].to_pylist())
    return sorted(values - {None}) + ([None] if None in values else [])


def first_seeds(table: pa.Table) -> pa.Table:
    """Rows of the smallest LM seed and, of these, of the smallest SAE seed."""
    for column in ("lm_seed", "sae_seed"):
        if table.num_rows:
            table = where(table, **{column: distinct(table, column)[0]})
    return table


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column as float64 [rows]; null, or a column that does not exist, gives NaN."""
    if column == "n_supportable" and column not in table.column_names:
        column = "count_supportable"  # as the feature statistics name it
    if column not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return table[column].cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def interval(table: pa.Table, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value, low, high) of a measure, float64 [rows] each, NaN where unknown."""
    return numbers(table, measure), numbers(table, f"{measure}_low"), numbers(table, f"{measure}_high")


def measured(table: pa.Table, column: str) -> bool:
    """True where at least one row has a finite value."""
    return bool(np.isfinite(numbers(table, column)).any())


def short_number(value: float) -> str:
    """1234567 -> `1.2 M`."""
    for scale, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
