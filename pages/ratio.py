"""Ratio: drag a slider and see what of which expert is kept, what that is predicted to cost, and measure it."""

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError
from moesvd_core.live import is_calibrated
from moesvd_core.planning import Recipe
from moesvd_core.runs.bounded import has_curves
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import analysed
from moesvd_core.runs.workbench import Text
from pages.components import figure, jobs, machine, recipe_controls
from pages.components import ratio_figures as figures
from pages.components import ratio_stage as stage
from pages.components.context import Context
from pages.components.handler import tell
from pages.components.page import POINT, QUIET, Page
from pages.components.reach import flops_within, reach_percent, within_reach
from pages.components.recipe_controls import keep_within_reach
from pages.components.session import ViewState
from pages.components.text import escape, recipe_name, sentence

TEXT = Text(windows=32)
"""What plans are measured on while a person waits: enough to tell plans apart, since original and compressed read the same tokens."""
AT_ONCE_SECONDS = 15.0
"""Plans are measured as soon as the slider is let go where this machine needs no longer for it, by its own estimate."""
_LARGEST = 80
_HEAVY: Mapping[str, Any] = {**QUIET, "concurrency_id": "gpu", "concurrency_limit": 1, "trigger_mode": "always_last"}


def build(context: Context) -> None:
    """Lay out the page."""
    with Page(context, "Ratio", "How small the model may become, and what that costs.") as page:
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=280):
                method = gr.Dropdown(list(METHODS), value="auto", label="Method", elem_id="ratio-method")
            with gr.Column(scale=7, min_width=280):
                about = gr.HTML("", elem_id="ratio-about", min_height=52)
        control = stage.control()
        measured, newest = gr.HTML("", elem_id="ratio-measured", min_height=116), gr.State(None)  # and the plan measured last
        expert_map = stage.expert_map()
        with gr.Row(elem_classes="columns"):
            with gr.Column(min_width=300):
                stage.retained()
            with gr.Column(min_width=300):
                curve = figure.box("Quality by size, all methods", height=372, elem_id="ratio-curve")
        gr.HTML('<h2 class="section">Work</h2>')
        with gr.Row(elem_classes="actions"):
            plan = gr.Button("Plan this method", elem_id="ratio-plan", min_width=180, scale=0)
            measure = gr.Button("Measure this plan", elem_id="ratio-measure", min_width=180, scale=0)
        jobs.Panel(page)

        page.view(_method_shown(context), [method, about, plan], fields=("run", "method", "flops_ratio"))
        page.view(_plans(context), [control], fields=("run", "method", "flops_ratio"))
        page.view(_measured(context), [measured, measure], fields=("run", "method", "ratio", "flops_ratio"))
        page.view(_curve(context), [curve], fields=("run", "method", "flops_ratio"))
        keep_within_reach(page, method)
        control.release(page.changes(_released), page.state, page.state, **POINT)
        expert_map.select(page.changes(_layer_chosen), page.state, page.state, **POINT)
        answered = [measured, curve, newest]
        measured.change(page.changes(_measure_at_once(context)), [page.state, measured], answered, **_HEAVY)  # whenever it says “Measuring”
        newest.change(page.changes(_plans(context)), page.state, control, **QUIET)  # each point may change what all plans are predicted
        plan.click(page.changes(_plan(context)), page.state, page.wake, **QUIET)
        measure.click(page.changes(_measure(context)), page.state, page.wake, **QUIET)


def _released(event: gr.EventData, state: ViewState) -> ViewState:
    """The view at the ratio, and with the operations saved, where the sliders were let go."""
    percent, saved = event.percent, event.flops
    if not isinstance(percent, int) or not 0 <= percent <= _LARGEST:
        raise InputError(f"ratio must be a whole percent in [0, {_LARGEST}], got {percent!r}")
    if not isinstance(saved, int) or not 0 <= saved < 100:
        raise InputError(f"operations saved must be a whole percent in [0, 100), got {saved!r}")
    fewer = saved / 100 if saved and METHODS[state.method].bounds_flops else None
    return state.but(ratio=percent / 100, flops_ratio=fewer)


def _layer_chosen(event: gr.EventData, state: ViewState) -> ViewState:
    """The view with a layer lit, or none."""
    layer = event.layer
    if layer is not None and not isinstance(layer, int):
        raise InputError(f"layer must be a whole number, got {layer!r}")
    return state.but(layer=layer)


def _method_shown(context: Context) -> Callable[[ViewState], Any]:
    def shown(state: ViewState) -> tuple[Any, ...]:
        """The list of methods, what the chosen one does, and whether it has to be planned first."""
        run = context.open(state)
        planned = [] if run is None else analysed(run)
        names = [(name if name in planned or not planned else f"{name} (not planned)", name) for name in METHODS]
        chosen = METHODS[state.method]
        text = f'<p class="ratio-about">{escape(chosen.description)} <span>Source: {escape(chosen.reference)}</span></p>'
        missing = state.method not in planned or (state.flops_ratio is not None and not has_curves(run, state.method))
        return gr.Dropdown(choices=names, value=state.method), text, gr.Button(interactive=bool(planned) and missing)

    return shown


def _plans(context: Context) -> Callable[[ViewState], str]:
    def drawn(state: ViewState) -> str:
        """The plans of the view's method, with what they are predicted to lose by all that was measured so far."""
        return stage.drawing(context.open(state), state, TEXT.dataset)

    return drawn


def _measured(context: Context) -> Callable[[ViewState], Any]:
    def shown(state: ViewState) -> tuple[Any, ...]:
        """The figures of this plan where it was measured before, else how that comes about."""
        run = context.open(state)
        recipe = None if run is None else recipe_of(run, state)
        if run is None or recipe is None:
            return figures.nothing_measured("Plans that were measured show their figures here."), gr.Button(interactive=False)
        own = context.client.owns(run)
        at_once = own and answers_at_once(context, run)
        if not own:
            words = f"Not measured yet. The run belongs to {run.identity.owner}, who alone adds to it."
        elif at_once:
            words = f"Measuring {recipe_name(recipe)} at {100 * recipe.ratio:.0f} % …"
        else:
            words = "Not measured yet. A job of the run can do it: press “Measure this plan” below, once no other is at work."
        by_job = own and not (at_once or figures.is_measured(run, recipe, TEXT) or context.client.status(run).busy)
        return figures.measured_html(run, recipe, TEXT, words), gr.Button(interactive=by_job)

    return shown


def _curve(context: Context) -> Callable[[ViewState], str]:
    def drawn(state: ViewState) -> str:
        run = context.open(state)
        if run is None:
            return figure.nothing("No run is chosen", "Choose a model on the Model page and analyse it.")
        return figures.curve(run, state.method, TEXT, flops_within(run, state))

    return drawn


def _measure_at_once(context: Context) -> Callable[[ViewState], Any]:
    def measure(state: ViewState, card: str) -> Any:
        """Swap the plan in and measure it, where that takes seconds; the card, which may tell of another plan yet, says what came of it."""
        run = context.open(state)
        recipe = None if run is None else recipe_of(run, state)
        if run is None or recipe is None or escape(_unmeasured(recipe)) in card:  # once is enough: the card may have come from here
            return gr.skip(), gr.skip(), gr.skip()
        if not figures.is_measured(run, recipe, TEXT):
            if not context.client.owns(run) or not answers_at_once(context, run):  # a job may have come since the card was drawn
                now = _measured(context)(state)[0]
                return gr.skip() if now == card else now, gr.skip(), gr.skip()
            try:
                context.live_model(run).measure(recipe, TEXT)
            except Exception as error:
                return figures.nothing_measured(f"{_unmeasured(recipe)}: {tell(error, measure)}."), gr.skip(), gr.skip()
        now = figures.measured_html(run, recipe, TEXT, "")
        if now == card:
            return gr.skip(), gr.skip(), gr.skip()
        return now, figures.curve(run, state.method, TEXT, recipe.flops_ratio), recipe

    return measure


def _unmeasured(recipe: Recipe) -> str:
    """What the card says of a plan that could not be measured at once, before the reason."""
    return sentence(f"{recipe_name(recipe)} at {100 * recipe.ratio:.0f} % could not be measured")


def _plan(context: Context) -> Callable[[ViewState], Any]:
    def plan(state: ViewState) -> Any:
        """Ask the run's worker for all plans of the method."""
        context.client.submit(context.require_run(state), "analyze", methods=[state.method])
        return gr.Timer(active=True)

    return plan


def _measure(context: Context) -> Callable[[ViewState], Any]:
    def measure(state: ViewState) -> Any:
        """Ask the run's worker to measure the plan."""
        run = context.require_run(state)
        recipe = recipe_of(run, state)
        if recipe is None:
            raise InputError(f"{state.method} is not planned yet: press “Plan this method” first")
        context.client.submit(run, "measure", recipe=recipe.as_dict(), text=vars(TEXT))
        return gr.Timer(active=True)

    return measure


def recipe_of(run: RunFolder, state: ViewState) -> Recipe | None:
    """What the view asks for, at most as far as its method reaches; None where the method was not planned."""
    return None if reach_percent(run, state.method) is None else recipe_controls.recipe_of(within_reach(run, state))


def answers_at_once(context: Context, run: RunFolder) -> bool:
    """Whether a plan of the run's model can be measured while a person waits: it is calibrated, fits, is small, and no job is at work."""
    facts = context.facts(run)
    if facts is None or not is_calibrated(run) or context.client.queue():
        return False
    tokens = TEXT.tokens(facts["context_length"])
    return context.live.fits(run, facts["bytes"]) and machine.seconds(2 * facts["active_parameters"] * tokens) < AT_ONCE_SECONDS
