"""What pages that show one layer among all have in common: choosing it, and marking it in a figure."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from moesvd_core.errors import RunError
from pages.components import figure
from pages.components.session import ViewState
from pages.components.text import sentence

CHOSEN = "#D55E00"
"""Colour of the frame around what was chosen: seen on every colour of cividis, on light and on dark."""


def picker(elem_id: str) -> gr.Dropdown:
    """A list of layers; the same choice as a click in a figure."""
    return gr.Dropdown([], label="Layer", min_width=250, elem_id=elem_id)


def picked(layers: Sequence[int], shown: int | None) -> gr.Dropdown:
    """The list of a run's layers with the one that is shown."""
    return gr.Dropdown(choices=[(str(layer), layer) for layer in layers], value=shown)


def choose(state: ViewState, layer: int | None) -> ViewState:
    """The view with a layer chosen in the list."""
    return state if layer is None else state.but(layer=layer)


def readable(otherwise: Callable[[str], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A view that says in its place what is wrong with the run's files, instead of staying as it was.

    Args:
        otherwise: value of a figure's box that says so -> values of the view's outputs.
    """

    def wrapped(draw: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(draw)
        def drawn(*arguments: Any) -> Any:
            try:
                return draw(*arguments)
            except RunError as error:
                return otherwise(figure.nothing("This cannot be read", sentence(f"{error}.")))

        return drawn

    return wrapped


def shown_layer(state: ViewState, layers: Sequence[int], otherwise: int | None = None) -> int | None:
    """The layer of the view if there is such a layer; else `otherwise`, or the first; None where there is none."""
    if state.layer in layers:
        return state.layer
    return otherwise if otherwise is not None else next(iter(layers), None)


def band(layer: int | None) -> list[dict[str, Any]]:
    """Shapes that mark a layer on a horizontal axis."""
    if layer is None:
        return []
    place = {"type": "rect", "xref": "x", "yref": "paper", "x0": layer - 0.5, "x1": layer + 0.5, "y0": 0, "y1": 1}
    return [{**place, "fillcolor": "rgba(128,136,150,0.16)", "line": {"width": 0}, "layer": "below"}]


def frame(layer: int | None, columns: int) -> list[dict[str, Any]]:
    """Shapes that mark a layer's row in a heatmap of so many columns."""
    if layer is None:
        return []
    place = {"type": "rect", "x0": -0.5, "x1": columns - 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
    return [{**place, "line": {"color": CHOSEN, "width": 2}}]


def down(count: int) -> dict[str, Any]:
    """A vertical axis of layers, the first on top."""
    return {"autorange": "reversed", "title": {"text": "Layer"}, "dtick": max(1, count // 20), "showgrid": False, "zeroline": False}


def across(layers: Sequence[int]) -> dict[str, Any]:
    """A horizontal axis of layers."""
    ends = [min(layers) - 0.5, max(layers) + 0.5]
    return {"title": {"text": "Layer"}, "dtick": max(1, len(layers) // 12), "range": ends, "showgrid": False, "zeroline": False}
