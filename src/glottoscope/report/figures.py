"""All figures of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib

from glottoscope.report.data import ReportData
from glottoscope.report.figures_intervention import intervention_figures
from glottoscope.report.figures_layers import figure_5, figure_heat
from glottoscope.report.figures_patterns import figure_4
from glottoscope.report.figures_sizes import figure_sizes, figure_sweeps
from glottoscope.report.figures_steps import figure_3, figure_control, figure_quality
from glottoscope.report.plot import ReportFigure
from glottoscope.report.style import render, style


@dataclass(frozen=True, slots=True)
class DrawnFigure:
    """A figure as files hold it."""

    name: str  # file name without suffix
    title: str
    caption: str
    svg: str
    png: bytes


def all_figures(data: ReportData) -> Iterator[DrawnFigure]:
    """Draw every figure that the data support, one after the other (one in memory at a time)."""
    with matplotlib.rc_context(style()):
        for drawn in _figures(data):
            svg, png = render(drawn.figure, drawn.name)
            yield DrawnFigure(drawn.name, drawn.title, drawn.caption, svg, png)


def _figures(data: ReportData) -> Iterator[ReportFigure]:
    models = list(reversed(data.models())) or [data.main_model]  # largest first: the headline's model
    controls = [model for _, model in data.control_models() if model not in models]
    for model in models:
        yield figure_3(data, model)
    for figure in (figure_control(data), figure_4(data)):
        if figure is not None:
            yield figure
    for model in models:
        if len(data.layers(model)) > 1:
            yield figure_5(data, model)
    for model in [*models, *controls]:
        if len(data.rows(model)) > 1:
            yield figure_heat(data, model)
    for figure in (figure_sizes(data), figure_sweeps(data)):
        if figure is not None:
            yield figure
    yield figure_quality(data)
    yield from intervention_figures(data)
