"""A page with one figure and nothing else, for the test of the figure: `python figure_app.py PORT`."""

import os
import sys
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import gradio as gr
import pandas as pd
import plotly.graph_objects as go

from pages.components import assets, figure
from pages.components.theme import theme

Z = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]


def draw(kind: str) -> str:
    """A heatmap, lines, or nothing."""
    if kind == "nothing":
        return figure.nothing("Nothing yet", "Analyse a model first.")
    if kind == "lines":
        drawn = go.Figure([go.Scatter(x=[1, 2, 3], y=row, name=f"row {number}") for number, row in enumerate(Z)])
    else:
        cells = go.Heatmap(z=Z, y=[10, 11], customdata=[["a", "b", "c"], ["d", "e", "f"]])
        drawn = go.Figure(cells, layout={"yaxis": {"autorange": "reversed"}})
    table = pd.DataFrame({"name": ["=1+1", "plain, with comma"], "value": [0.1, None]})
    return figure.drawing(drawn, table, "Measured on nothing.", kind)


def tell(event: gr.SelectData) -> str:
    """The chosen point."""
    point = figure.clicked(event)
    return f"{point.x} {point.y} {point.z} {point.trace} {point.custom}"


with gr.Blocks(analytics_enabled=False) as app:
    kind = gr.Textbox("heatmap", label="Kind")
    plot = figure.box("Heat of things", height=300, clicks=True)
    chosen = gr.Textbox(label="Chosen")
    app.load(draw, kind, plot)
    kind.submit(draw, kind, plot)
    plot.select(tell, None, chosen)

if __name__ == "__main__":
    app.launch(
        server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True, theme=theme(), head=assets.head(), run_history=False,
        app_kwargs=assets.app_kwargs(Path.cwd()),
    )
