"""A plotly figure that reports clicks, follows light and dark, can be used by keyboard, and hands out its data.

    plot = figure.box("Sensitivity by layer", height=420, clicks=True)
    plot.select(page.changes(pick), page.state, page.state, **POINT)
    def pick(event: gr.SelectData, state: ViewState) -> ViewState:
        return state.but(layer=figure.clicked(event).y)
    def draw(state) -> str:
        return figure.drawing(go.Figure(...), table, "Measured on ...", "sensitivity")     # or figure.nothing("...", "...")

A figure without a title, colours of its own for text and axes, or a size: the browser adds these. Axis titles with units, please.
"""

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
import plotly.graph_objects as go

from pages.components.assets import PLOTLY, mount
from pages.components.text import escape


@dataclass(frozen=True)
class Click:
    """A point of a figure that was clicked, or chosen by arrow keys and Enter.

    Attributes:
        x, y: as the axes say them.
        z: of a heatmap, else None.
        trace: its name, else its number.
        custom: the point's `customdata`, None without.
    """

    x: Any
    y: Any
    z: float | None
    trace: str
    custom: Any


def box(label: str, *, height: int = 380, clicks: bool = False, elem_id: str | None = None) -> gr.HTML:
    """The figure's component; it takes its full height from the start, so that nothing jumps when data arrives.

    Args:
        label: what the figure shows, also read out to people who do not see it; shown above it.
        height: of the drawing, pixels.
        clicks: whether points can be chosen (`.select`).
    """
    title = f'<p class="figure-title">{escape(label)}</p>'
    given = f'data-label="{escape(label)}" data-height="{height}" data-clicks="{int(clicks)}" style="min-height:{height + 110}px"'
    frame = f'<figure class="figure" {given}>{title}</figure>'
    return gr.HTML("", html_template=frame, js_on_load=mount("figure"), head=PLOTLY, elem_id=elem_id)


def drawing(figure: go.Figure, table: pd.DataFrame, caption: str, name: str) -> str:
    """The value of a box.

    Args:
        figure: what is drawn.
        table: the same data, to be looked at and downloaded as CSV.
        caption: what it is measured on, and how to read it; one or two sentences.
        name: of the CSV file, without ending.
    """
    drawn = json.loads(figure.to_json())
    drawn["layout"].pop("template", None)  # the browser has its own for light and dark
    rows = json.loads(table.to_json(orient="values", double_precision=12))
    data = {"figure": drawn, "columns": [str(column) for column in table.columns], "rows": rows, "caption": caption, "name": name}
    return json.dumps(data, separators=(",", ":"))


def nothing(title: str, advice: str) -> str:
    """The value of a box that has nothing to show yet: what would be here, and what to do to have it."""
    return json.dumps({"empty": title, "advice": advice})


def clicked(event: gr.SelectData) -> Click:
    """The point of a `.select` event."""
    x, y = event.index
    value = event.value
    return Click(x, y, value.get("z"), str(value["trace"]), value.get("custom"))
