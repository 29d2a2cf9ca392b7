"""Figures of the benchmarks as plain data in plotly's form; `page` puts them into a page, whose script gives them the colours of the page.

Shapes are those of plotly's JSON: a figure has traces ("data") and a layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesvd_core.evaluation.benchmarks.table import Cell, Table
from moesvd_core.marks import METHOD_MARKS, ORIGINAL, mark

Record = Mapping[str, Cell]
Trace = dict[str, Any]
RATIO_COLORS = ("#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#8A8F98")
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


def _inference(table: Table) -> list[Figure]:
    columns = [column for column in table.columns if column.endswith("× original")]
    names = table.columns[0]
    return [_bar_figure(table, names, column, column, "Tokens a second, the original's = 1; measured in turns.") for column in columns]


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
        color = RATIO_COLORS[place % len(RATIO_COLORS)]
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


_DRAWN: Mapping[str, Callable[[Table], list[Figure]]] = {
    "quality": _quality,
    "ablation": _ablation,
    "decompose": _decompose,
    "inference": _inference,
    "ratios": _ratios,
    "memory": _memory,
}
