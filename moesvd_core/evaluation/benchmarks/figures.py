"""Figures of the benchmarks as plain data in plotly's form; `page` puts them into a page, whose script gives them the colours of the page.

Shapes are those of plotly's JSON: a figure has traces ("data") and a layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.marks import METHOD_MARKS, ORIGINAL, mark

Record = Mapping[str, Cell]
Trace = dict[str, Any]
COLORS = ("#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#8A8F98")
"""Okabe-Ito, for whatever is no method."""


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: what it shows.
        caption: how to read it.
        data: plotly's traces.
        layout: plotly's layout, without colours of text, grid and paper.
        height: pixels.
    """

    title: str
    caption: str
    data: Sequence[Trace]
    layout: Mapping[str, Any]
    height: int = 440


def figures_of(name: str, table: Table) -> list[Figure]:
    """What a benchmark's figures look like."""
    return _DRAWN[name](table) if table.rows else []


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def _log(title: str) -> dict[str, Any]:
    return _axis(title, type="log", exponentformat="power")


def _number(record: Record, column: str) -> float | None:
    value = record[column]
    return None if value is None or isinstance(value, str) else float(value)


def _groups(records: Sequence[Record], column: str) -> dict[str, list[Record]]:
    """Records by the value of a column, in the order of their first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(str(record[column]), []).append(record)
    return found


def _line(name: str, records: Sequence[Record], x: str, y: str, *, scale: float = 1.0, spread: str | None = None) -> Trace:
    """A method's line with its own mark; points without a figure are left out."""
    known = [record for record in records if record[x] is not None and record[y] is not None]
    look = mark(name)
    trace: Trace = {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": [(_number(each, x) or 0.0) * scale for each in known],
        "y": [_number(each, y) for each in known], "line": {"color": look.color, "dash": look.dash, "width": 3 if name == "auto" else 1.5},
        "marker": {"color": look.color, "symbol": look.symbol, "size": 9},
        "hovertemplate": f"{name}: %{{y:.4g}} at %{{x:.4g}}<extra></extra>",
    }
    if spread is not None:
        trace["error_y"] = {"type": "data", "array": [_number(each, spread) for each in known], "color": look.color, "thickness": 1}
    return trace


def _quality(table: Table) -> list[Figure]:
    """Loss against size, one line a method."""
    methods = {name: found for name, found in _groups(table.records, "method").items() if name != "original"}
    caption = "By size of the stored model, on a logarithmic axis; lower left is better. Bars: standard deviation over calibrations."
    made = []
    for column, title in (("delta_nll", "Log-perplexity lost, nats a token"), ("kl_mean", "KL to the original, nats a token")):
        lines = [_line(name, found, "bytes", column, scale=1e-6, spread=f"{column}_spread") for name, found in methods.items()]
        made.append(Figure(title, caption, lines, {"xaxis": _axis("Size, MB"), "yaxis": _log(title)}, 520))
    return made


def _bars(records: Sequence[Record], names: str, values: str, title: str) -> Trace:
    """Horizontal bars, the first record on top, methods in their colours."""
    known = [record for record in records if record[values] is not None][::-1]
    return {
        "type": "bar", "orientation": "h", "x": [_number(each, values) for each in known], "y": [str(each[names]) for each in known],
        "marker": {"color": [METHOD_MARKS.get(str(each[names]).split(" ")[0], ORIGINAL).color for each in known]},
        "hovertemplate": f"%{{y}}: %{{x:.4g}} {title}<extra></extra>",
    }


def _bar_figure(table: Table, names: str, values: str, title: str, caption: str, *, log: bool = False) -> Figure:
    layout = {"xaxis": _log(title) if log else _axis(title), "yaxis": {"showgrid": False}, "showlegend": False}
    return Figure(title, caption, [_bars(table.records, names, values, title)], layout, 120 + 28 * len(table.rows))


def _decompose(table: Table) -> list[Figure]:
    return [
        _bar_figure(table, "method", "seconds", "Seconds to decompose the layer", "The loop of full SVDs on top.", log=True),
        _bar_figure(table, "method", "output error", "Relative error of the layer's output", "On tokens that nothing was fitted to."),
    ]


def _layer(table: Table) -> list[Figure]:
    return [_bar_figure(table, "step", "seconds", "Seconds to compress the layer", "Passes of calibration on top; in all: with both.")]


def _inference(table: Table) -> list[Figure]:
    """Models down, cells across: a model's name ends with its cell where there are several, "latent 40%, 4 × 128"."""
    return [_grid(table.records, column) for column in table.columns if column.endswith(("× original", "of ideal"))]


def _grid(records: Sequence[Record], column: str) -> Figure:
    """A heat map around 1: blue is faster, orange is slower."""
    value: dict[tuple[str, str], float] = {}
    for record in records:
        model, _, cell = str(record["model"]).rpartition(", ") if ", " in str(record["model"]) else (record["model"], "", "all")
        if (number := _number(record, column)) is not None:
            value[str(model), cell] = number
    models, cells = list(dict.fromkeys(model for model, _ in value))[::-1], list(dict.fromkeys(cell for _, cell in value))
    known = [[value.get((model, cell)) for cell in cells] for model in models]
    heat: Trace = {
        "type": "heatmap", "x": cells, "y": models, "z": [[log2(each) if each else None for each in row] for row in known],
        "zmin": -2, "zmax": 2, "colorscale": [[0, "#D55E00"], [0.5, "#DFE2E8"], [1, "#0072B2"]], "xgap": 2, "ygap": 2, "showscale": False,
        "text": [["" if each is None else f"{each:.2f}" for each in row] for row in known], "texttemplate": "%{text}",
        "hovertemplate": "%{y}, %{x}: %{text}<extra></extra>",
    }
    layout = {"xaxis": {"type": "category", "showgrid": False}, "yaxis": {"type": "category", "showgrid": False}}
    caption = "Blue: faster than the original, orange: slower; across: prompts at once × their tokens. Measured in turns."
    return Figure(column[0].upper() + column[1:], caption, [heat], layout, 140 + 32 * len(models))


def _ratios(table: Table) -> list[Figure]:
    lines = [_line(name, found, "asked", "in files") for name, found in _groups(table.records, "method").items()]
    layout = {"xaxis": _axis("Ratio asked for", tickformat=".0%"), "yaxis": _axis("Ratio counted in the files", tickformat=".0%")}
    return [Figure("Ratio asked for, and counted in the files written", "A point never lies below its ratio.", lines, layout)]


def _memory(table: Table) -> list[Figure]:
    return [_bar_figure(table, "what", "MB", "Megabytes", "Checkpoint, interpreter, and what compression takes above it.")]


def _ablation(table: Table) -> list[Figure]:
    """How many times the loss each variant has, one marker a ratio."""
    title = "Times the loss of the variant with the ingredient"
    symbols = ("circle", "diamond", "square", "triangle-up", "cross")
    traces: list[Trace] = []
    for place, (ratio, found) in enumerate(_groups(table.records, "asked").items()):
        color = COLORS[place % len(COLORS)]
        shown = [each for each in found if each["variant"] != each["beside"]][::-1]
        traces.append({
            "type": "scatter", "mode": "markers", "name": f"{float(ratio):.0%} removed",
            "x": [each["times its delta_nll"] for each in shown], "y": [f"{each['variant']} (beside {each['beside']})" for each in shown],
            "marker": {"size": 11, "color": color, "symbol": symbols[place % len(symbols)]},
            "hovertemplate": "%{y}: %{x:.3g} times<extra></extra>",
        })
    caption = "Log-perplexity lost without the ingredient over that with it; right of 1, the ingredient helps. Logarithmic axis."
    line = {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": ORIGINAL.color, "dash": "dot"}}
    layout = {"xaxis": _log(title), "yaxis": {"showgrid": True}, "shapes": [line]}
    return [Figure(title, caption, traces, layout, 200 + 32 * len({record["variant"] for record in table.records}))]


BAND = 0.2
"""Share around equality that is shaded beside predicted losses."""


def _prediction(table: Table) -> list[Figure]:
    """Predicted against measured; and what S_L, OWL and the prediction claim of the layers in one cut."""
    points = table.details["points"].records
    return [_scatter(points), *_layers_of_a_cut([point for point in points if point["layer"] is not None])]


def _scatter(points: Sequence[Record]) -> Figure:
    """All predicted points on logarithmic axes; filled and large: whole models, small: layers."""
    known = [point for point in points if point["fitted"] is not None and (_number(point, "delta_nll") or 0.0) > 0]
    ends = [f([float(point[name] or 0.0) for point in known for name in ("fitted", "delta_nll")]) for f in (min, max)] if known else [1, 1]
    equal: Trace = {"type": "scatter", "mode": "lines", "x": ends, "hoverinfo": "skip", "line": {"color": ORIGINAL.color, "width": 1}}
    band = {"line": {"width": 0}, "showlegend": False}
    traces: list[Trace] = [
        {**equal, "y": [end / (1 + BAND) for end in ends], **band},
        {**equal, "y": [end * (1 + BAND) for end in ends], **band, "fill": "tonexty", "fillcolor": "rgba(138,143,152,0.2)"},
        {**equal, "y": ends, "name": f"equal, ± {BAND:.0%}"},
    ]
    for name, found in _groups(known, "method").items():
        look = mark(name)
        whole = [point["layer"] is None for point in found]
        traces.append({
            "type": "scatter", "mode": "markers", "name": name, "x": [_number(point, "fitted") for point in found],
            "y": [_number(point, "delta_nll") for point in found],
            "error_y": {
                "type": "data", "array": [_number(point, "delta_nll_stderr") for point in found], "color": look.color, "thickness": 0.75,
                "width": 0,
            },
            "marker": {"color": look.color, "symbol": look.symbol, "size": [11 if each else 6 for each in whole], "opacity": 0.8},
            "text": [f"{point['asked']:.0%}" + ("" if point["layer"] is None else f", layer {point['layer']} alone") for point in found],
            "hovertemplate": f"{name} %{{text}}<br>predicted %{{x:.3g}}, measured %{{y:.3g}}<extra></extra>",
        })
    hidden = sum(point["fitted"] is not None for point in points) - len(known)
    caption = (
        "Large: the whole model at ratios that no law was fitted to; small: one layer cut alone. Bars: standard errors of the measured. "
        f"{hidden} points are not drawn, because nothing above zero was measured."
    )
    layout = {"xaxis": _log("Predicted by the method's law, nats a token"), "yaxis": _log("Measured, nats a token")}
    return Figure("Loss predicted and measured", caption, traces, layout, 640)


def _layers_of_a_cut(points: Sequence[Record]) -> list[Figure]:
    """What each metric says of the layers of one cut, as a share of its largest, against what was measured."""
    if not points:
        return []
    method, asked = points[-1]["method"], points[-1]["asked"]
    if any(point["method"] == "auto" for point in points):
        method, asked = next((point["method"], point["asked"]) for point in points if point["method"] == "auto")
    cut = [point for point in points if (point["method"], point["asked"]) == (method, asked)]
    traces: list[Trace] = []
    for place, (column, name, symbol) in enumerate((("as planned", "predicted", "circle"), ("S_L", "S_L", "x"), ("OWL", "OWL", "diamond"))):
        most = max(float(point[column] or 0.0) for point in cut) or 1.0
        traces.append({
            "type": "scatter", "mode": "markers+text", "name": name, "x": [float(point[column] or 0.0) / most for point in cut],
            "y": [_number(point, "delta_nll") for point in cut], "text": [str(point["layer"]) for point in cut],
            "textposition": "middle right", "marker": {"size": 10, "symbol": symbol, "color": COLORS[place + 1]},
            "hovertemplate": f"layer %{{text}}<br>{name} %{{x:.2f}} of its largest, measured %{{y:.3g}}<extra></extra>",
        })
    cut_text = f"Each layer alone, {float(asked or 0):.0%} of its experts removed by {method}"
    caption = f"{cut_text}; a metric that ranks layers well rises from left to right."
    layout = {"xaxis": _axis("Share of the metric's largest", tickformat=".0%"), "yaxis": _axis("Measured, nats a token")}
    return [Figure("S_L, OWL and the prediction beside what was measured", caption, traces, layout, 640)]


_DRAWN: Mapping[str, Callable[[Table], list[Figure]]] = {
    "quality": _quality,
    "ablation": _ablation,
    "prediction": _prediction,
    "decompose": _decompose,
    "layer": _layer,
    "inference": _inference,
    "ratios": _ratios,
    "memory": _memory,
}
