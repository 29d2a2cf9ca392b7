"""Sensitivity: which layers bear decomposition, by every metric and by measurement; and one layer in all its detail."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError
from moesvd_core.planning import Recipe
from moesvd_core.runs.workbench import Text
from pages.components import analysis, figure, jobs, layer_figures
from pages.components import sensitivity_figures as figures
from pages.components.analysis import Sensitivity
from pages.components.context import Context
from pages.components.layers import choose, picked, picker, readable, shown_layer
from pages.components.numbers import named
from pages.components.page import CHOICE, POINT, QUIET, Page
from pages.components.session import ViewState
from pages.components.text import escape, share

_LATEST = ""
"""Choice of the list of measurements that stays with the newest one."""
_WINDOWS = 16
"""Windows of held-out text for each layer, unless others are asked for."""
_NAMES = {"windows": "Windows of text"}
"""Of numbers: setting -> field."""
_CUTS = [(share(cut / 100, 0), cut / 100) for cut in (10, 20, 30, 40, 50, 60, 70, 80)]
"""Reference cuts: the paper's figures show 20 % and 50 %."""
_ADVICE = "Analyse the model on the Model page: one pass over the calibration text tells how sensitive each layer is."


def build(context: Context) -> None:
    """Lay out the page."""
    purpose = "Which layers bear decomposition: what the metrics say, what measuring says, and how well they agree."
    with Page(context, "Sensitivity", purpose) as page:
        with gr.Row(elem_classes="columns"):
            measurement = gr.Dropdown([("latest", _LATEST)], value=_LATEST, label="Measurement", min_width=250, elem_id="measurement")
            layer = picker("sensitivity-layer")
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                metrics = figure.box("Layers by every metric", height=400, clicks=True, elem_id="sensitivity-metrics")
            with gr.Column(scale=5, min_width=300):
                routing = figure.box("Routing frequency of every expert", height=400, clicks=True, elem_id="sensitivity-routing")
        with gr.Accordion("What the metrics are", open=False):
            gr.HTML(figures.glossary())
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                lines = figure.box("Metrics beside the measured effect", height=360, clicks=True, elem_id="sensitivity-lines")
            with gr.Column(scale=5, min_width=300):
                correlations = gr.HTML("", elem_id="sensitivity-correlations", min_height=420)
        by, kept, detail = _detail()
        _measuring(page)

        page.view(_lists(context), [measurement, layer], fields=("run", "layer"), controls=[measurement])
        page.view(_overview(context), [metrics, routing, lines, correlations], fields=("run", "layer"), controls=[measurement])
        page.view(_layer(context), detail, controls=[measurement, by])
        layer.input(page.changes(choose), [page.state, layer], page.state, **CHOICE)
        for box, axis in ((metrics, "y"), (routing, "y"), (lines, "x")):
            box.select(page.changes(_clicked(axis)), page.state, page.state, **POINT)
        kept.select(page.changes(_ratio_clicked), page.state, page.state, **POINT)


def _detail() -> tuple[gr.Radio, gr.HTML, list[gr.HTML]]:
    """What shows one layer: the choice of the curves' axis, the figure of plans, and all that is drawn (that figure among it)."""
    title = gr.HTML("", elem_id="layer-facts", min_height=110)
    by = gr.Radio([("parameters kept", "share"), ("rank", "rank")], value="share", label="Loss curves by")
    with gr.Row(elem_classes="columns"):
        with gr.Column(min_width=300):
            above = figure.box("Spectrum of gate and up: what every rank loses", height=380, elem_id="layer-curves-input")
        with gr.Column(min_width=300):
            below = figure.box("Spectrum of down: what every rank loses", height=380, elem_id="layer-curves-output")
    with gr.Row(elem_classes="columns"):
        with gr.Column(min_width=300):
            loads = figure.box("Expert loads", height=380, elem_id="layer-loads")
        with gr.Column(min_width=300):
            kept = figure.box("What each method keeps, by ratio", height=380, clicks=True, elem_id="layer-kept")
    table = gr.HTML("", elem_id="layer-plans", min_height=240)
    return by, kept, [title, above, below, loads, kept, table]


def _measuring(page: Page) -> None:
    """Controls that ask for a measurement, and its progress."""
    gr.HTML('<h2 class="section">Measuring</h2>')
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=7, min_width=300):
            with gr.Row():
                method = gr.Dropdown(list(METHODS), value="auto", label="Method", min_width=140)
                ratio = gr.Dropdown(_CUTS, value=0.5, label="Removed of the layer", min_width=140)
                windows = gr.Number(_WINDOWS, label=_NAMES["windows"], min_width=140, placeholder=str(_WINDOWS))
            start = gr.Button("Measure each layer", variant="primary", elem_id="measure-layers")
        with gr.Column(scale=5, min_width=300):
            jobs.Panel(page)
    start.click(page.changes(_measure(page.context)), [page.state, method, ratio, windows], page.wake, **QUIET)


def _found(context: Context, state: ViewState, name: str | None) -> Sensitivity | None:
    run = context.open(state)
    return None if run is None else analysis.sensitivity(run, name or None)


def _nothing(context: Context, state: ViewState) -> str:
    """What stands in the place of every figure before the run's analysis has come to an end."""
    run = context.open(state)
    asked = () if run is None else context.client.status(run).jobs
    if any(job.action == "analyze" and job.is_open for job in asked):
        return figure.nothing("The model is being analysed", "This appears at the end; the Model page says how far that is.")
    return figure.nothing("Nothing was analysed yet", _ADVICE)


def _shown(state: ViewState, found: Sensitivity) -> int:
    """The layer of the view; else the one that suffers most, as far as is known."""
    column = "measured_nll" if found.measured else "S_L"
    most = int(found.layers.loc[found.layers[column].idxmax(), "layer"])
    return shown_layer(state, found.layers["layer"].tolist(), most) or 0


def _nothing_measured() -> gr.Dropdown:
    return gr.Dropdown(choices=[("nothing yet", _LATEST)], value=_LATEST)


def _lists(context: Context) -> Callable[..., tuple[Any, ...]]:
    @readable(lambda _: (_nothing_measured(), picked([], None)))
    def lists(state: ViewState, chosen: str | None) -> tuple[Any, ...]:
        """Measurements and layers to choose from."""
        run = context.open(state)
        found = _found(context, state, chosen)
        if run is None or found is None:
            return _nothing_measured(), picked([], None)
        known = analysis.sensitivity_names(run)
        latest = f"latest: {known[0][0]}" if known else "nothing yet: press “Measure each layer” below"
        choices = [(latest, _LATEST), *known[1:]]
        kept = chosen if chosen in [name for _, name in choices] else _LATEST
        return gr.Dropdown(choices=choices, value=kept), picked(found.layers["layer"].tolist(), _shown(state, found))

    return lists


def _overview(context: Context) -> Callable[..., tuple[Any, ...]]:
    @readable(lambda empty: (empty, empty, empty, ""))
    def overview(state: ViewState, chosen: str | None) -> tuple[Any, ...]:
        """All layers at once."""
        found = _found(context, state, chosen)
        if found is None:
            empty = _nothing(context, state)
            return empty, empty, empty, ""
        index = _shown(state, found)
        shown = figures.metric_map(found, index), figures.routing_map(found, index), figures.lines(found, index)
        return *shown, figures.correlation_table(found)

    return overview


def _layer(context: Context) -> Callable[..., tuple[Any, ...]]:
    @readable(lambda empty: ("", empty, empty, empty, empty, ""))
    def layer(state: ViewState, chosen: str | None, by: layer_figures.By) -> tuple[Any, ...]:
        """One layer: its spectra, its experts' loads, and what each method would keep of it."""
        found = _found(context, state, chosen)
        if found is None:
            empty = _nothing(context, state)
            return "", empty, empty, empty, empty, ""
        index, run = _shown(state, found), context.require_run(state)
        curves, plans = analysis.layer_curves(run, index), analysis.plan_tables(run)
        return (
            f'<h2 class="section">Layer {escape(index)}</h2>{layer_figures.layer_facts(found, index)}',
            layer_figures.loss_curves(curves, "input", by, index, plans, state.ratio),
            layer_figures.loss_curves(curves, "output", by, index, plans, state.ratio),
            layer_figures.loads(found, index),
            layer_figures.kept_lines(plans, index, state.ratio, state.method),
            layer_figures.kept_table(plans, index, state.ratio, state.method),
        )

    return layer


def _clicked(axis: str) -> Callable[[gr.SelectData, ViewState], ViewState]:
    def clicked(event: gr.SelectData, state: ViewState) -> ViewState:
        """A click on a layer shows it."""
        return state.but(layer=int(getattr(figure.clicked(event), axis)))

    return clicked


def _ratio_clicked(event: gr.SelectData, state: ViewState) -> ViewState:
    """A click on a method's line chooses the method and the ratio."""
    point = figure.clicked(event)
    return state.but(ratio=round(float(point.x), 2), method=point.trace)


def _measure(context: Context) -> Callable[..., Any]:
    def measure(state: ViewState, method: str, ratio: float, windows: Any) -> Any:
        """Ask the run's worker to decompose and measure each layer alone."""
        recipe = Recipe(method=method, ratio=round(float(ratio), 4))
        run = context.require_run(state)
        if any(job.action == "sensitivity" and job.is_open for job in context.client.status(run).jobs):
            raise InputError(f"run {run.name} measures its layers already: wait for it, or cancel it")
        with named(_NAMES):
            text = Text(windows=_WINDOWS if windows is None else windows)
        context.client.submit(run, "sensitivity", recipe=recipe.as_dict(), text={"windows": text.windows})
        gr.Info(f"Each layer in turn loses {share(recipe.ratio, 0)} of its experts by {method}.")
        return gr.Timer(active=True)

    return measure
