"""Method, ratio and operations to be chosen where a page needs no more than that; they are the view's own, so other pages follow."""

from typing import Any

import gradio as gr

from moesvd_core.decomposition.registry import METHODS
from moesvd_core.planning import Recipe
from moesvd_core.runs.known import analysed
from pages.components.handler import warn
from pages.components.page import CHOICE, QUIET, Page
from pages.components.reach import beyond_reach, flops_percent, reach_percent, within_reach
from pages.components.session import ViewState

_HIGHEST = 80
"""Percent; of methods whose reach is not known yet."""
_RECIPE = ("run", "method", "ratio", "flops_ratio")


class RecipeControls:
    """Draws itself where it is made, and changes the page's state. The sliders have no button to reset them: no event tells of that."""

    def __init__(self, page: Page) -> None:
        self._page = page
        method = gr.Dropdown(list(METHODS), value=ViewState.method, label="Method", elem_id="recipe-method")
        with gr.Row():
            ratio = gr.Slider(0, _HIGHEST, 40, step=1, label="Ratio, %", elem_id="recipe-ratio", min_width=220, buttons=[])
            fewer = gr.Slider(0, _HIGHEST, 0, step=1, label="Operations saved, %", elem_id="recipe-flops", min_width=220, buttons=[])
        page.view(self._values, [method, ratio, fewer], fields=_RECIPE)
        keep_within_reach(page, method)
        asked = ratio.input(page.changes(_dragged), [page.state, ratio], [page.state, ratio], **CHOICE)
        saved = fewer.input(page.changes(_bounded), [page.state, fewer], [page.state, fewer], **CHOICE)
        for event in (asked, saved):  # a number out of bounds is refused before any handler: the boxes go back to the view's
            event.failure(page.changes(self._values), page.state, [method, ratio, fewer], **QUIET)

    def _values(self, state: ViewState) -> tuple[Any, ...]:
        """The view's method and ratio; methods that are planned come first, and the slider ends where the method does."""
        run = self._page.context.open(state)
        ready = [] if run is None else analysed(run)
        choices = [(name, name) for name in ready] + [(f"{name} (not planned)", name) for name in METHODS if name not in ready]
        most = None if run is None else reach_percent(run, state.method)
        percent = _HIGHEST if most is None else max(1, most)
        weighs = METHODS[state.method].bounds_flops
        bound = _HIGHEST if run is None or most is None or not weighs else max(1, flops_percent(run, state.method))
        return (
            gr.Dropdown(choices=choices, value=state.method), gr.Slider(maximum=percent, value=min(percent, round(100 * state.ratio, 2))),
            gr.Slider(maximum=bound, value=min(bound, round(100 * (state.flops_ratio or 0.0), 2)), visible=weighs),
        )


def _dragged(state: ViewState, percent: float) -> tuple[ViewState, Any]:
    """The view at another ratio; a typed part of a percent goes from the box as well."""
    return state.but(ratio=percent / 100), gr.skip() if percent == round(percent) else round(percent)


def _bounded(state: ViewState, percent: float) -> tuple[ViewState, Any]:
    """The view with another bound on operations; parts of a percent likewise."""
    return state.but(flops_ratio=round(percent) / 100 or None), gr.skip() if percent == round(percent) else round(percent)


def keep_within_reach(page: Page, method: gr.Dropdown) -> None:
    """Let the list of methods change the page's state, and bring it to what its method reaches whenever it asks for more.

    A view may whose method was not analysed when it was chosen; addresses are brought within reach when they are opened.
    """

    def within(state: ViewState) -> ViewState:
        run = page.context.open(state)
        return state if run is None else within_reach(run, state)

    def chosen(state: ViewState, name: str) -> ViewState:
        state = state.but(method=name)
        run = page.context.open(state)
        for problem in [] if run is None else beyond_reach(run, state):
            warn(problem)
        return within(state)

    beyond = gr.State(None)  # the view that asks for too much, as long as there is one
    page.view(lambda state: None if within(state) == state else state, [beyond], fields=_RECIPE)
    beyond.change(page.changes(within), page.state, page.state, **QUIET)
    method.input(page.changes(chosen), [page.state, method], page.state, **CHOICE)


def recipe_of(state: ViewState) -> Recipe:
    """What a view asks for."""
    return Recipe(method=state.method, ratio=state.ratio, flops_ratio=state.flops_ratio)
