"""A share with its 95 % interval and the counts behind it, and when two of them differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa

from glottoscope.report.data import numbers


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share with its 95 % interval (NaN where unknown) and, where known, the counts behind it."""

    value: float
    low: float
    high: float
    count: int | None
    out_of: int | None

    def __str__(self) -> str:
        text = percent(self.value)
        if self.out_of:
            text += f" ({self.count} of {self.out_of})" if self.count is not None else f" (of {self.out_of})"
        return f"{text} {bracket(self.low, self.high)}".rstrip()


def percent(value: float) -> str:
    """.2834 -> `28.3 %`."""
    return "unknown" if not math.isfinite(value) else f"{100 * value:.1f} %"


def bracket(low: float, high: float) -> str:
    """95 % interval in per cent: `[24.0, 32.5]`; empty where unknown."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]" if math.isfinite(low) and math.isfinite(high) else ""


def wilson(count: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 %)."""
    p, zz = count / n, z * z
    centre, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, (centre - half) / (1 + zz / n)), min(1.0, (centre + half) / (1 + zz / n))


def estimate(table: pa.Table, row: int, measure: str) -> Estimate:
    """A share of the table's row. A bootstrap of 0 or of all features has no width: there Wilson's "
    "interval stands in."""
    counts = {"share_bilingual": "n_bilingual"}.get(measure, measure.replace("share_", "count_", 1))
    value, low, high = (float(numbers(table, f"{measure}{end}")[row]) for end in ("", "_low", "_high"))
    count, n = (numbers(table, column)[row] for column in (counts, "n_alive"))
    n_alive = int(n) if math.isfinite(n) and n > 0 else None
    n_count = int(count) if math.isfinite(count) else None
    if math.isfinite(value) and n_alive and (value <= 0 or value >= 1):
        low, high = wilson(round(value * n_alive), n_alive)
    return Estimate(value, low, high, n_count, n_alive)


def above(a: Estimate, b: Estimate) -> bool | None:
    """True where a's interval lies wholly above b's; None where an interval is unknown."""
    if not (math.isfinite(a.low) and math.isfinite(b.high)):
        return None
    return a.low > b.high
