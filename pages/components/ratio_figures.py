"""What a smaller model costs, over all methods: predicted by their plans, and measured; and the figures of one measured plan."""

from collections.abc import Mapping, Sequence
from math import exp, isfinite
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from moesvd_core.decomposition.registry import METHODS
from moesvd_core.marks import ORIGINAL, mark
from moesvd_core.planning import LossLaw, Recipe
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import Measured, analysed, loss_laws, measurements
from moesvd_core.runs.workbench import Text
from pages.components import figure, plan_table, tables
from pages.components.text import escape, number, recipe_name, share

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_LEAST_SHOWN, _MOST_SHOWN = 0.15, 1.0
"""Nats a token above the original that the curve has room for, at least and at most."""


def on_dataset(run: RunFolder, text: Text) -> list[Measured]:
    """Plans that were measured on a data set, whatever its part; the largest part of it last for each recipe."""
    rows = [row for row in measurements(run) if row.recipe is not None and row.figures["dataset"] == text.dataset]
    return sorted(rows, key=lambda row: (row.ratio, row.figures["windows"] * row.figures["length"]))


def original_nll(run: RunFolder, dataset: str) -> float | None:
    """The original's loss on the largest part of a data set that was measured, nats a token; None where there is none.

    Not on the part that the slider measures: what was drawn before would move with the first plan that is measured there.

    Raises:
        RunError: a file of the run is damaged.
    """
    found = [run.read_json("evaluations", file.name) for file in (run.path / "evaluations").glob("original--*.json")]
    known = [row for row in found if row is not None and row["dataset"] == dataset]
    return float(max(known, key=lambda row: row["tokens"])["nll"]) if known else None


def curve(run: RunFolder, method: str, text: Text, flops_ratio: float | None = None) -> str:
    """Quality against size of all planned methods as the value of a figure; the view's method, with its bound on operations, on top.

    Points are the original's perplexity times what was measured on the very same tokens for each plan, so that points measured on few
    windows and on many stand beside each other.

    Args:
        flops_ratio: of the view; plans with another bound on operations are left out, as are those with refitted routers, which the
            explorer has on offer for exports alone.

    Raises:
        RunError: a file of the run is damaged.
    """
    names = analysed(run)
    base = original_nll(run, text.dataset)
    if not names or base is None:
        return figure.nothing("Nothing to compare yet", "The curve of every planned method appears here once the original is measured.")
    points: dict[str, list[Measured]] = {}
    for row in {row.recipe: row for row in on_dataset(run, text) if row.recipe and not row.recipe.refit_router}.values():
        if row.recipe and row.recipe.flops_ratio in (None, flops_ratio if row.recipe.method == method else None):
            points.setdefault(_line(row.recipe), []).append(row)
    lines = {_line(recipe): recipe for recipe in (Recipe(method=name) for name in sorted(names, key=lambda name: name == method))}
    top = Recipe(method=method, flops_ratio=flops_ratio)
    if method in names:
        lines[_line(top)] = top
    made = {name: plan_table.totals(run, line.method, line.flops_ratio) for name, line in lines.items()}
    totals = {name: found for name, found in made.items() if found is not None}
    whole = max(total["bytes"][0] for total in totals.values())
    unit, word = next((each for each in _UNITS if whole >= each[0]), (1.0, "B"))
    laws = loss_laws(run, names, text.dataset)
    predicted = {name: _predicted(run, lines[name], laws.get(lines[name].method)) for name in totals}
    drawn = go.Figure(layout={"meta": unit, "hovermode": "closest"})
    for name, total in totals.items():
        look = mark(lines[name].method)
        hover = f"{name}, predicted: %{{y:.4g}} at %{{x:.3g}}<extra></extra>"
        drawn.add_scatter(
            x=[value / unit for value in total["bytes"]], y=[_perplexity(base + loss) for loss in predicted[name]],
            name=name, mode="lines", line={"color": look.color, "dash": look.dash, "width": 3 if name == _line(top) else 1.5},
            opacity=1 if name == _line(top) else 0.75, legendgroup=name, hovertemplate=hover,
        )
    for name, rows in sorted(points.items(), key=lambda pair: pair[0] == _line(top)):
        for compensated in (False, True):
            same = [row for row in rows if row.recipe and row.recipe.compensate is compensated]
            _add_measured(drawn, name, same, base, unit, name == _line(top), compensated)
    look = {"color": ORIGINAL.color, "symbol": ORIGINAL.symbol, "size": 11}
    hover = "original: %{y:.4g}<extra></extra>"
    drawn.add_scatter(x=[whole / unit], y=[exp(base)], name="original", mode="markers", marker=look, hovertemplate=hover)
    added = [row.figures["delta_nll"] for rows in points.values() for row in rows]
    highest = exp(base + max([_LEAST_SHOWN, *(1.1 * each for each in added if each < _MOST_SHOWN)]))
    drawn.update_layout(
        xaxis={"title": {"text": f"Size, {word}"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "Perplexity"}, "range": [exp(base - 0.03), highest]},
    )
    caption = (
        f"Markers: the loss measured on held-out text of {Path(text.dataset).name}, added to the original's perplexity, {exp(base):.4g} on "
        f"the most of it that was measured; open ones are compensated. Lines: the loss predicted from "
        f"calibration{_fit_text(method, laws.get(method))}. The dotted line is the slider."
    )
    return figure.drawing(drawn, _table(totals, predicted, points, base), caption, "quality-by-size")


def _line(recipe: Recipe) -> str:
    """Name of the line that a recipe's plans lie on."""
    return recipe_name(recipe.unfitted())


def _predicted(run: RunFolder, line: Recipe, law: LossLaw | None) -> list[float]:
    """What each plan of a method is predicted to lose: by the law that measured plans tell, else as it was planned."""
    plans = plan_table.layer_losses(run, line.method, line.flops_ratio)
    return [sum(losses.values()) if law is None else law.loss(losses) for losses in plans]


def _fit_text(method: str, law: LossLaw | None) -> str:
    """What predictions were fitted to, and how far the fit is off."""
    if law is None:
        return ""
    of, over = (" of all methods", f"{method} has too few of its own; over all of them") if law.shared else ("", method)
    return f", fitted to {law.points} measured plans{of} ({over}: off by {share(law.error, 0)} in the median)"


def measured_html(run: RunFolder, recipe: Recipe, text: Text, otherwise: str) -> str:
    """Figures of one plan, measured; before that `otherwise`."""
    found = next((row for row in reversed(on_dataset(run, text)) if row.recipe == recipe), None)
    if found is None:
        return nothing_measured(otherwise)
    figures = found.figures
    error, paired = figures["perplexity_stderr"], figures["delta_nll_stderr"]
    pairs = [
        ("Perplexity", number(figures["perplexity"], 4), f"original {number(found.original_perplexity, 4)}{_within(error)}"),
        ("Loss added", f"{figures['delta_nll']:+.4f}".replace("-", "−"), f"nats a token{_within(paired)}"),
        ("KL to the original", number(figures["kl_mean"]), f"nats a token; 95 % below {number(figures['kl_p95'])}"),
        ("Same first choice", share(figures["top1_agreement"]), "of all tokens predicted"),
    ]
    on = f"{Path(figures['dataset']).name}, {figures['windows']} windows of {figures['length']} tokens"
    if METHODS[recipe.method].compensate and not recipe.compensate:
        on += ", before compensation, which exports get"
    title = f"Measured at {share(recipe.ratio, 0)} by {recipe_name(recipe)}: {on}"
    return f'<div class="measured"><p class="figure-title">{escape(title)}</p>{tables.facts(pairs, "Measured")}</div>'


def nothing_measured(words: str) -> str:
    """What stands in the place of measured figures."""
    return f'<div class="measured"><p class="figure-title">Measured</p><p class="quiet-text">{escape(words)}</p></div>'


def is_measured(run: RunFolder, recipe: Recipe, text: Text) -> bool:
    """Whether a plan has its point on the curve."""
    return any(row.recipe == recipe for row in on_dataset(run, text))


def _within(error: float | None) -> str:
    return "" if error is None else f", ± {number(error, 2)}"


def _add_measured(
    drawn: go.Figure, line: str, rows: Sequence[Measured], base: float, unit: float, chosen: bool, compensated: bool
) -> None:
    """Points of one line; those that were compensated are drawn open."""
    if not rows or rows[0].recipe is None:
        return
    look, name = mark(rows[0].recipe.method), recipe_name(rows[0].recipe)
    symbol = f"{look.symbol.removesuffix('-open')}-open" if compensated else look.symbol
    drawn.add_scatter(
        x=[row.bytes / unit for row in rows], y=[exp(base + row.figures["delta_nll"]) for row in rows], name=name, mode="markers",
        marker={"color": look.color, "symbol": symbol, "size": 11 if chosen else 8}, legendgroup=line, showlegend=False,
        hovertemplate=f"{name}, measured: %{{y:.4g}} at %{{x:.3g}}<extra></extra>",
    )


def _table(
    totals: Mapping[str, Mapping[str, Sequence[float]]], predicted: Mapping[str, Sequence[float]], points: Mapping[str, Sequence[Measured]],
    base: float,
) -> pd.DataFrame:
    """Everything that is drawn: one row a plan, measured figures where there are some."""
    rows: list[dict[str, Any]] = [{"method": "original", "ratio": 0.0, "predicted perplexity": exp(base)}]
    for name, total in totals.items():
        measured, fitted = (
            {round(row.ratio, 6): row.figures for row in points.get(name, ()) if row.recipe and row.recipe.compensate is compensated}
            for compensated in (False, True)
        )
        for place, ratio in enumerate(total["ratio"]):
            figures, better = measured.get(round(ratio, 6), {}), fitted.get(round(ratio, 6), {})
            rows.append({
                "method": name, "ratio": ratio, "bytes": total["bytes"][place],
                "parameters": total["parameters"][place], "operations a token": total["flops"][place],
                "predicted perplexity": _perplexity(base + predicted[name][place]),
                "measured perplexity": figures.get("perplexity"), "windows": figures.get("windows"),
                "loss added, nats": figures.get("delta_nll"), "KL, nats": figures.get("kl_mean"),
                "drawn at perplexity": exp(base + figures["delta_nll"]) if figures else None,
                "measured perplexity, compensated": better.get("perplexity"), "windows, compensated": better.get("windows"),
            })
    return pd.DataFrame(rows)


def _perplexity(nll: float) -> float | None:
    """Perplexity of a loss, None where it is too large to be drawn."""
    return exp(nll) if isfinite(nll) and nll < 50 else None
