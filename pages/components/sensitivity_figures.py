"""Drawings of how sensitive layers are: every metric by layer, routing by expert, and how well each metric ranks what was measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moesvd_core.marks import Mark, mark
from pages.components import colors, figure, tables
from pages.components.analysis import Sensitivity
from pages.components.layers import across, band, down, frame
from pages.components.text import escape, number, sentence

_TEXT_LAYERS = 26
"""Up to so many layers a cell has room for its number."""
_TEXT_EXPERTS = 16


@dataclass(frozen=True)
class Metric:
    """A column of the table of layers.

    Attributes:
        title: its name.
        head: above a narrow column.
        unit: behind a value.
        meaning: one clause.
        show: value -> text, without the unit.
        line: how it is drawn by layer: as the method that relies on it; None: it is not.
    """

    title: str
    head: str
    unit: str
    meaning: str
    show: Callable[[float], str] = number
    line: Mark | None = None


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _thousandths(value: float) -> str:
    return f"{1000 * value:.3g}"


METRICS: Mapping[str, Metric] = {
    "f": Metric("Load f", "f", "of tokens", "largest share of tokens that one expert gets", _percent),
    "r": Metric("Rank r", "r", "directions", "principal rank of the experts' weights, mean over routed tokens", "{:.0f}".format),
    "a": Metric("Outliers a", "a", "of activations", "share of activations above twice their mean size", _percent),
    "S_L": Metric("S_L", "S_L", "", "the paper's sensitivity, Σ f·r·a", "{:.1f}".format, mark("moe-svd")),
    "OWL": Metric("OWL", "OWL", "of weights", "OWL's outlier ratio of the layer", _percent, mark("owl")),
    "predicted": Metric(
        "Truncation loss", "Loss", "mnat a token", "by the spectra, in the output metric, on calibration text; it ranks layers, and is too "
        "small: the Ratio page scales it by what was measured", _thousandths, mark("auto"),
    ),
    "measured_nll": Metric("Measured ΔNLL", "ΔNLL", "mnat a token", "this layer alone decomposed, on held-out text", _thousandths),
    "measured_kl": Metric("Measured KL", "KL", "mnat a token", "divergence from the original, on the same text", _thousandths),
}
"""Columns of `sensitivity.layer_table`; losses are shown in thousandths of a nat."""


def glossary() -> str:
    """What every column says, as HTML."""
    rows = "".join(
        f"<dt>{escape(metric.title)}</dt><dd>{escape(sentence(metric.meaning))}</dd>" for metric in METRICS.values()
    )
    nat = "<dt>A nat</dt><dd>Unit of loss: 0.01 nats a token (10 mnat) more is 1 % more perplexity</dd>"
    return f'<dl class="glossary">{rows}{nat}</dl>'


def metric_map(found: Sensitivity, chosen: int | None) -> str:
    """Layer × metric. Every column has its own scale from its least to its most: the metrics share no unit."""
    table = found.layers
    names = list(METRICS)
    value_LM = table[names].to_numpy(dtype=float)
    with np.errstate(invalid="ignore"):
        least_M, most_M = np.nanmin(_known(value_LM), axis=0), np.nanmax(_known(value_LM), axis=0)
        scaled_LM = (value_LM - least_M) / np.where(most_M > least_M, most_M - least_M, 1.0)
    text = [[_short(value, METRICS[name]) for name, value in zip(names, row, strict=True)] for row in value_LM]
    hover = [[_words(METRICS[name], cell) for name, cell in zip(names, row, strict=True)] for row in text]
    few = len(table) <= _TEXT_LAYERS
    heat = go.Heatmap(
        z=scaled_LM, x=[METRICS[name].head for name in names], y=table["layer"].tolist(), zmin=0, zmax=1, colorscale=colors.MAGNITUDE,
        xgap=2, ygap=int(few), text=text, texttemplate="%{text}" if few else None, showscale=False, customdata=hover,
        hovertemplate="Layer %{y}, %{customdata}<extra></extra>",
    )
    layout = {"yaxis": down(len(table)), "xaxis": {"side": "top", "showgrid": False, "tickangle": 0}, "shapes": frame(chosen, len(names))}
    cut = f"Losses in thousandths of a nat a token (mnat), {found.cut}. " if found.label else "Nothing was measured yet. "
    caption = f"{cut}Colour runs from the least (dark) to the most (bright) of each column. Choose a layer by its row."
    return figure.drawing(go.Figure(heat, layout), _with_units(table), caption, found.name)


def routing_map(found: Sensitivity, chosen: int | None) -> str:
    """Layer × expert: the share of tokens that the router sends there."""
    wide = found.experts.pivot(index="layer", columns="expert", values="f")
    even = float(wide.sum(axis=1).mean() / wide.shape[1])
    few = wide.shape[1] <= _TEXT_EXPERTS and len(wide) <= _TEXT_LAYERS
    heat = go.Heatmap(
        z=wide.to_numpy(), x=wide.columns.tolist(), y=wide.index.tolist(), zmin=0, colorscale=colors.MAGNITUDE,
        xgap=int(few), ygap=int(few), texttemplate="%{z:.0%}" if few else None,
        hovertemplate="Layer %{y}, expert %{x}<br>%{z:.2%} of tokens<extra></extra>",
        colorbar={"tickformat": ".0%", "title": {"text": "of tokens", "side": "right", "font": {"size": 14}}},
    )
    layout = {
        "yaxis": down(len(wide)), "shapes": frame(chosen, wide.shape[1]),
        "xaxis": {"side": "top", "showgrid": False, "tickprefix": "E", "dtick": max(1, wide.shape[1] // 8), "tickangle": 0},
    }
    caption = f"Share of calibration tokens that reach the expert; {even:.1%} each if they were spread evenly."
    return figure.drawing(go.Figure(heat, layout), found.experts, caption, "routing")


def lines(found: Sensitivity, chosen: int | None) -> str:
    """Metrics by layer beside the measured effect, each as a share of its own largest: Figure 1 left and middle of the paper."""
    if not found.measured:
        return figure.nothing("Nothing was measured yet", "“Measure each layer”, at the foot of this page, decomposes one layer at a time.")
    table = found.layers
    drawn = go.Figure(layout={
        "xaxis": across(table["layer"].tolist()), "shapes": band(chosen), "hovermode": "closest", "bargap": 0.35,
        "yaxis": {"title": {"text": "Share of the largest layer's"}, "tickformat": ".0%", "rangemode": "tozero"},
    })
    truth = table["measured_nll"]
    drawn.add_bar(
        x=table["layer"], y=truth / truth.abs().max(), name="Measured ΔNLL", marker={"color": "rgba(138,143,152,0.55)"},
        customdata=1000 * truth, hovertemplate="Layer %{x}<br>Measured ΔNLL %{customdata:.3g} mnat a token<extra></extra>",
    )
    for name, metric in METRICS.items():
        if metric.line is None or not table[name].notna().any():
            continue
        drawn.add_scatter(
            x=table["layer"], y=table[name] / table[name].abs().max(), name=metric.title, mode="lines+markers",
            customdata=[_short(value, metric) for value in table[name]],
            line={"color": metric.line.color, "dash": metric.line.dash, "width": 2},
            marker={"symbol": metric.line.symbol, "size": 8, "color": metric.line.color},
            hovertemplate=f"Layer %{{x}}<br>{metric.title} %{{customdata}} {metric.unit}<extra></extra>",
        )
    caption = f"Each layer alone, {found.cut}: a metric that ranks layers well rises and falls with the bars."
    return figure.drawing(drawn, _with_units(table), caption, f"{found.name}-by-layer")


def correlation_table(found: Sensitivity) -> str:
    """Spearman's rank correlation of each metric with each measured effect, as HTML."""
    rows = [{**row, "title": METRICS[str(row["metric"])].title} for row in found.correlations.to_dict("records")]
    if not found.measured:
        return ""
    count = max(int(row["layers"]) for row in rows)
    shown = [
        tables.Column("title", "Metric"),
        tables.Column("measured_nll", "with ΔNLL", _signed, number=True),
        tables.Column("measured_kl", "with KL", _signed, number=True),
    ]
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    best = max((row for row in rows if row["measured_nll"] is not None), key=lambda row: row["measured_nll"], default=None)
    made = tables.table(
        rows, shown, caption=f"Rank correlation with what was measured, {count} layers", name=f"{found.name}-correlations",
        chosen=lambda row: best is not None and row["metric"] == best["metric"],
    )
    chance = 1.96 / np.sqrt(count - 1) if count > 1 else 1.0
    return made + (
        f'<p class="figure-remark">Spearman: 1 ranks the layers as measuring does, 0 is no relation, −1 the reverse. With {count} layers, '
        f"anything within ±{min(chance, 1):.2f} may be chance. Measured: {escape(found.cut)}.</p>"
    )


def _known(value_LM: np.ndarray) -> np.ndarray:
    """Columns without any value become zeros, which colour nothing."""
    return np.where(np.isnan(value_LM).all(axis=0), 0.0, value_LM)


def _short(value: float, metric: Metric) -> str:
    return "–" if value != value else metric.show(value)


def _with_units(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is, with a unit in the name of every column."""
    names = {name: f"{name} ({metric.unit.replace('mnat', 'nats')})" for name, metric in METRICS.items() if metric.unit}
    return table.rename(columns=names)


def _words(metric: Metric, shown: str) -> str:
    return f"{metric.title}: {shown} {metric.unit}<br>{metric.meaning}"


def _signed(value: Any) -> str:
    return f"{value:+.2f}".replace("-", "−")

