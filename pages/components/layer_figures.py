"""Drawings of one layer: what every rank of it loses, who gets its tokens, and what each method would keep of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moesvd_core.marks import mark
from moesvd_core.planning import Ranks, SideCurve
from moesvd_core.planning.curves import Side
from pages.components import figure, tables
from pages.components.analysis import Sensitivity, layer_of, plan_at
from pages.components.layers import CHOSEN
from pages.components.sensitivity_figures import METRICS
from pages.components.text import number, share

By = Literal["share", "rank"]
"""What the loss is drawn against: the share of parameters kept, in which structures compare; or the rank itself."""
Plans = Mapping[str, Mapping[str, Any]]
"""By method, from `analysis.plan_tables`."""
_FLOOR = 1e-6
"""Losses below this share of the largest are rounding; a logarithmic axis would draw them all the way down."""
_POINTS = 257
"""Ranks that a curve is drawn at, at most."""
_SIDE_WORDS: Mapping[Side, str] = {"input": "gate and up", "output": "down"}


def loss_curves(curves: Mapping[tuple[str, ...], Sequence[SideCurve]], side: Side, by: By, layer: int, plans: Plans, ratio: float) -> str:
    """Truncation loss of one side at every rank, one line a method, with what each method's plan chose at a ratio."""
    shares = {"title": {"text": "Kept of this side's parameters"}, "tickformat": ".0%", "range": [0, 1.02]}
    drawn = go.Figure(layout={
        "xaxis": shares if by == "share" else {"title": {"text": "Rank of each matrix"}},
        "yaxis": {"title": {"text": "Truncation loss, mnat a token"}, "type": "log", "tickformat": "~g", "dtick": 1},
        "hovermode": "closest",
    })
    frames: list[pd.DataFrame] = []
    size = 1
    for names, own in curves.items():
        name = ", ".join(names)
        curve = next((each for each in own if each.side == side), None)
        if curve is None:
            continue
        size = curve.dense_parameters
        table = _one_line(name, curve)
        frames.append(table)
        shown = table[(table["loss"] > _FLOOR * table["loss"].max()) & (table["kept"] <= (1.02 if by == "share" else np.inf))]
        if shown.empty:  # what the method loses is counted on the other side
            continue
        style = mark(names[0])
        drawn.add_scatter(
            x=shown["kept" if by == "share" else "rank"], y=shown["loss"], name=name, legendgroup=name, mode="lines",
            customdata=shown[["rank", "kept"]], line={"color": style.color, "dash": style.dash, "width": 2},
            hovertemplate=f"{name}, {curve.structure}<br>rank %{{customdata[0]}}, %{{customdata[1]:.1%}} kept"
            "<br>%{y:.4g} mnat a token<extra></extra>",
        )
    if not frames:
        return figure.nothing("No loss curves yet", "Analyse the model on the Model page: its layers are decomposed once, for every ratio.")
    for name, table in plans.items():
        _mark_plan(drawn, name, layer_of(plan_at(table, ratio) or {"layers": ()}, layer), side, by, size)
    words = f"{_SIDE_WORDS[side]} of layer {layer}"
    caption = (
        f"What {words} loses when every expert keeps the same rank. Points: what each method chose at ratio {share(ratio, 0)}, "
        "below its line where its ranks differ by expert."
    )
    return figure.drawing(drawn, _named(frames, loss="loss (mnat a token)"), caption, f"loss-curves-layer-{layer}-{side}")


def loads(found: Sensitivity, layer: int) -> str:
    """Who gets the tokens of a layer."""
    own = found.experts[found.experts["layer"] == layer]
    even = float(own["f"].sum() / len(own))
    dashed = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": even, "y1": even, "line": {"color": "#8A8F98", "dash": "dash"}}
    drawn = go.Figure(layout={
        "xaxis": {"title": {"text": "Expert"}, "dtick": max(1, len(own) // 16), "showgrid": False}, "shapes": [dashed],
        "yaxis": {"title": {"text": "Share of tokens"}, "tickformat": ".0%", "rangemode": "tozero"}, "bargap": 0.3, "showlegend": False,
    })
    drawn.add_bar(
        x=own["expert"], y=own["f"], name="load", marker={"color": "#7C93B8"}, customdata=own[["r", "a", "saliency"]],
        hovertemplate="Expert %{x}<br>%{y:.2%} of tokens<br>rank %{customdata[0]}, outliers %{customdata[1]:.2%}"
        "<br>REAP saliency %{customdata[2]:.3g}<extra></extra>",
    )
    caption = f"Layer {layer}, calibration text; dashed: {even:.1%}, an even spread."
    return figure.drawing(drawn, own, caption, f"experts-layer-{layer}")


def kept_lines(plans: Plans, layer: int, ratio: float, method: str) -> str:
    """How much of a layer each method keeps at every ratio of the whole model."""
    if not plans:
        return figure.nothing("No plans yet", "Analyse the model on the Model page: plans of all ratios come with it.")
    drawn = go.Figure(layout={
        "xaxis": {"title": {"text": "Ratio: removed of the whole model"}, "tickformat": ".0%"},
        "yaxis": {"title": {"text": "Kept of this layer's experts"}, "tickformat": ".0%", "range": [-0.03, 1.05]},
        "hovermode": "closest",
        "shapes": [{"type": "line", "yref": "paper", "x0": ratio, "x1": ratio, "y0": 0, "y1": 1, "line": {"color": CHOSEN, "width": 1.5}}],
    })
    frames = []
    for name, table in plans.items():
        rows = [(plan["asked_ratio"], layer_of(plan, layer)) for plan in table["plans"]]
        own = pd.DataFrame([
            {"method": name, "ratio": asked, "kept": own["parameters"] / own["original_parameters"], "loss": 1000 * own["predicted_loss"]}
            for asked, own in rows if own is not None
        ])
        if own.empty:
            continue
        frames.append(own)
        style = mark(name)
        drawn.add_scatter(
            x=own["ratio"], y=own["kept"], name=name, legendgroup=name, mode="lines+markers", customdata=own["loss"],
            line={"color": style.color, "dash": style.dash, "width": 3 if name == method else 2},
            marker={"size": 7, "symbol": style.symbol, "maxdisplayed": 12},
            hovertemplate=f"{name} at ratio %{{x:.0%}}<br>%{{y:.1%}} of layer {layer} kept<br>"
            "truncation loss %{customdata:.3g} mnat a token<extra></extra>",
        )
    caption = f"Layer {layer}. The line stands at {share(ratio, 0)}: choose another ratio and method by a point."
    return figure.drawing(drawn, _named(frames, loss="loss (mnat a token)"), caption, f"kept-layer-{layer}")


def kept_table(plans: Plans, layer: int, ratio: float, method: str) -> str:
    """What each method would store for a layer at a ratio, and why, as HTML."""
    if not plans:
        return ""
    rows = []
    for name, table in plans.items():
        own = layer_of(plan_at(table, ratio) or {"layers": ()}, layer)
        if own is None:
            rows.append({"method": name, "reason": f"reaches {share(table['max_ratio'], 0)} at most"})
            continue
        rows.append({
            "method": name, "kept": own["parameters"] / own["original_parameters"], "predicted": 1000 * own["predicted_loss"],
            "input": _stored(own, "input"), "output": _stored(own, "output"), "reason": own["reason"],
        })
    columns = [
        tables.Column("method", "Method"),
        tables.Column("kept", "Kept", share, number=True),
        tables.Column("input", "Gate and up"),
        tables.Column("output", "Down"),
        tables.Column("predicted", "Truncation loss, mnat a token", number, number=True),
        tables.Column("reason", "Why"),
    ]
    return tables.table(
        rows, columns, caption=f"What each method keeps of layer {layer} at ratio {share(ratio, 0)} (ranks: least · median · most)",
        name=f"kept-layer-{layer}", chosen=lambda row: row["method"] == method,
    )


def layer_facts(found: Sensitivity, layer: int) -> str:
    """The layer's figures, each with its place among all layers."""
    table = found.layers.set_index("layer")
    pairs = []
    for name, metric in METRICS.items():
        if name == "f":
            continue
        title, value = metric.title + (", mnat" if metric.unit.startswith("mnat") else ""), float(table.loc[layer, name])
        if value != value:
            pairs.append((title, "–", "not measured yet"))
            continue
        place = int((table[name] > value).sum()) + 1
        order = "highest" if place == 1 else "lowest" if place == len(table) else f"{_ordinal(place)} highest"
        pairs.append((title, metric.show(value), order))
    return tables.facts(pairs, f"Layer {layer}")


def _ordinal(place: int) -> str:
    ending = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def _one_line(name: str, curve: SideCurve) -> pd.DataFrame:
    """A side as a whole, all slots at one rank; losses in thousandths of a nat."""
    whole = curve.as_one_slot()
    rank_R = np.unique(np.linspace(0, whole.max_rank, _POINTS).round().astype(int))
    kept_R = (whole.fixed_cost + whole.parameters_SP(rank_R)[0]) / whole.dense_parameters
    loss_R = 1000 * whole.loss_SR[0, rank_R]
    return pd.DataFrame({
        "method": name, "structure": curve.structure, "side": curve.side, "rank": rank_R, "kept": kept_R, "loss": loss_R,
    })


def _named(frames: Sequence[pd.DataFrame], **names: str) -> pd.DataFrame:
    """Tables one below the other, with units in the names of their columns."""
    return pd.concat(frames, ignore_index=True).rename(columns=names)


def _mark_plan(drawn: go.Figure, name: str, plan: Mapping[str, Any] | None, side: Side, by: By, size: int) -> None:
    """A point for what a plan chose; nothing for a side that stays dense, which loses nothing. `size`: the side's original parameters."""
    if plan is None or plan["structure"][side] == "dense" or not plan["side_predicted_loss"][side] > 0:
        return
    kept = plan["side_parameters"][side] / size
    style = mark(name)
    point = {"symbol": style.symbol.removesuffix("-open"), "size": 11, "color": style.color, "line": {"width": 1.5, "color": "#ffffff"}}
    drawn.add_scatter(
        x=[kept if by == "share" else plan["ranks"][side].median], y=[1000 * plan["side_predicted_loss"][side]],
        name=f"{name}, planned", mode="markers", showlegend=False, marker=point,
        hovertemplate=f"{name} chose {_stored(plan, side)}<br>{kept:.1%} kept<br>%{{y:.4g}} mnat a token<extra></extra>",
    )


def _stored(plan: Mapping[str, Any], side: Side) -> str:
    """Structure and ranks of one side: "per-expert 8 · 96 · 160"."""
    if plan["structure"][side] == "dense":
        return "dense"
    ranks: Ranks = plan["ranks"][side]
    return f"{plan['structure'][side]} {ranks.words}"
