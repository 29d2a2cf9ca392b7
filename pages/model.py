"""Model: choose one, see within seconds what it is and whether it fits, analyse it; and the runs that are there."""

import os.path
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from moesvd_core.architectures.inspect import inspect
from moesvd_core.calibration.settings import Calibration
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError, MoesvdError, RunError
from moesvd_core.runs.client import RunStatus
from moesvd_core.runs.estimate import estimate
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.source import prepare
from moesvd_core.runs.workbench import Text
from pages.components import jobs, machine, next_steps, tables
from pages.components.context import Context
from pages.components.handler import refuse
from pages.components.header import is_stopping
from pages.components.model_facts import facts_html, needs_html
from pages.components.numbers import named
from pages.components.page import CHOICE, Page
from pages.components.places import named_for_people
from pages.components.run_deletion import RunDeletion
from pages.components.session import ViewState
from pages.components.text import empty, moment, sentence
from pages.components.visitor import visitor

PLANNED = ("auto", "moe-svd", "svd-llm", "expert-pruning")
"""Methods whose plans an analysis makes unless others are chosen: ours, the paper's, and what else one would do for the same bytes."""
_NAMES = {"samples": "Windows", "length": "Tokens a window", "seed": "Seed", "batch": "Windows at once"}
"""Of the calibration's numbers: setting -> field."""
_PROBE: Mapping[str, Any] = {"api_visibility": "private", "concurrency_id": "probe", "concurrency_limit": 2}
_LOOK: Mapping[str, Any] = {**_PROBE, "trigger_mode": "always_last"}
"""A name that is written while the one before it is looked up counts too."""


def build(context: Context) -> None:
    """Lay out the page."""
    purpose = "Mixture-of-Experts models, made smaller without training. Choose one, see what it is, and analyse it."
    with Page(context, "Model", purpose) as page:
        facts = gr.State(None)  # of the model in the field: `ModelFacts.as_dict()`
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                name = gr.Dropdown(
                    context.models(), value=None, allow_custom_value=True, label="Model", elem_id="model-name",
                    info="One of the list, another folder under the declared ones, or a hub id (owner/name)",
                )
                card = gr.HTML("", elem_id="model-facts")
                steps = gr.HTML("", elem_id="next-steps")
            with gr.Column(scale=5, min_width=300):
                needs = gr.HTML("", elem_id="model-needs")
                with gr.Accordion("Calibration settings", open=False):
                    fields = _fields(context)
                    probe = gr.Checkbox(
                        True, label="Measure three plans too", elem_id="analyse-probe",
                        info="Of auto, else of the first chosen: brings predicted losses to the size of measured ones, for three more "
                        "readings of the text that models are measured on.",
                    )
                analyse = gr.Button("Analyse", variant="primary", elem_id="analyse")
                jobs.Panel(page)
        runs = tables.pressed_in("runs")
        RunDeletion(page, runs, lambda state: runs_html(context, state))
        calibration, methods = fields[:-1], fields[-1]
        filled = gr.State(None)  # the run whose model and calibration the fields were given, and whether its facts were known

        page.view(_run_shown(context), [filled, name, facts, card, needs, *calibration], fields=("run",), reads=[filled, methods])
        page.view(lambda state: next_steps.html(context, state, context.status(state)), [steps])
        page.watches(lambda state, status: runs_html(context, state), [runs])
        looked = [page.state, name, *fields]
        name.input(page.changes(_probe(context)), looked, [facts, card, needs], show_progress_on=card, **_LOOK)
        asked = [page.state, name, facts, *fields]
        written = [field.input for field in fields]
        gr.on(written, page.changes(_needs(context)), asked, needs, **CHOICE)
        begun, started = [page.state, name, methods, probe, *calibration], [page.state, page.wake]
        analyse.click(page.changes(_analyse(context)), begun, started, show_progress="hidden", **_PROBE)


def _fields(context: Context) -> list[Any]:
    """What decides a calibration: dataset, samples, length, seed, batch; then the methods to plan for."""
    usual = Calibration()
    dataset = gr.Textbox(usual.dataset, label="Text", info=context.text_help)
    with gr.Row():
        samples = gr.Number(usual.samples, label=_NAMES["samples"], min_width=110, placeholder=str(usual.samples))
        length = gr.Number(None, label=_NAMES["length"], min_width=110, placeholder="the model's")
    with gr.Row():
        seed = gr.Number(usual.seed, label=_NAMES["seed"], min_width=110, placeholder=str(usual.seed))
        batch = gr.Number(usual.batch, label=_NAMES["batch"], min_width=110, placeholder=str(usual.batch))
    methods = gr.CheckboxGroup(list(METHODS), value=list(PLANNED), label="Plan for")
    return [dataset, samples, length, seed, batch, methods]


def calibration_of(context: Context, values: tuple[Any, ...], others: Mapping[str, Any] | None = None) -> Calibration:
    """The settings that the fields hold; an empty field has its usual value.

    Args:
        others: settings that have no field, where they are not the usual ones.

    Raises:
        InputError: a value out of bounds, or a text that a visitor may not read.
    """
    given: dict[str, Any] = {name: value for name, value in zip(("dataset", *_NAMES), values, strict=True) if value is not None}
    with named(_NAMES):
        return Calibration(**{**(others or {}), **given, "dataset": context.find_text(given.get("dataset", ""))})


def _run_of(context: Context, state: ViewState, model: str) -> RunFolder | None:
    """The run that is shown, where it is one of this model: analysing that again may go on with it."""
    try:
        run = context.open(state)
    except RunError:  # it was deleted meanwhile, or is damaged: nothing to go on with
        return None
    if run is None or (model != context.model_name(run.identity.model) and _place(model) != _place(run.identity.model)):
        return None
    return run


def _without_field(run: RunFolder | None) -> dict[str, Any]:
    """Settings of a run for which there is no field."""
    used = {} if run is None else Calibration.from_dict(dict(run.identity.calibration)).as_dict()
    return {name: value for name, value in used.items() if name not in ("dataset", *_NAMES)}


def _probe(context: Context) -> Callable[..., Any]:
    def probe(state: ViewState, text: str | None, *values: Any) -> tuple[Any, ...]:
        """Look at a model without loading it; where that is refused, the card says why, and what is chosen still."""
        try:
            model = context.find_model(text or "")
            with named_for_people(model, context.settings.models):
                found = inspect(model, trust_remote_code=context.settings.remote_code).as_dict()
        except MoesvdError as error:
            refuse(error)
            shown = f". Run {state.run} is still chosen." if state.run else "."
            return None, empty("This model cannot be looked at", f"{sentence(str(error))}{shown}"), ""
        card = facts_html(context.model_name(model), _remark(context, state, model), found)
        return found, card, _needs(context)(state, model, found, *values)

    return probe


def _remark(context: Context, state: ViewState, model: str) -> str:
    """Which run there is of a model, however it was written: the one of the view, else an analysed one, else the newest."""
    asked = _place(model)
    runs = [status for status in context.client.runs() if status.id and _place(status.model) == asked]
    if any(status.id == state.run for status in runs):
        return f"run {state.run}"
    found = next((status for status in runs if status.analysed), runs[0] if runs else None)
    return "not analysed here yet" if found is None else f"{'analysed in' if found.analysed else 'begun in'} run {found.id}: open it below"


def _place(model: str) -> str:
    """What a model's name means: its folder, links followed; a hub id stays itself."""
    return os.path.realpath(model) if os.path.exists(model) else model  # which `Path` refuses to say of a name that is too long


def _needs(context: Context) -> Callable[..., Any]:
    def needs(state: ViewState, model: str | None, facts: Mapping[str, Any] | None, *values: Any) -> str:
        """What analysing the model takes under these settings, and for these methods."""
        if facts is None:
            return ""
        *settings, methods = values
        run = _run_of(context, state, model or "")
        calibration = calibration_of(context, tuple(settings), _without_field(run))
        goes_on = run is not None and calibration == Calibration.from_dict(dict(run.identity.calibration))
        tokens = Text().tokens(facts["context_length"])
        needed = estimate(facts, calibration, methods=methods, tokens=tokens, run=run.path if run and goes_on else None)
        there = machine.look(context.settings.runs)
        return needs_html(facts, needed, machine.seconds(needed.flops), there, machine.download_bytes(facts))

    return needs


def _analyse(context: Context) -> Callable[..., Any]:
    def analyse(state: ViewState, text: str | None, methods: list[str], probe: bool, *values: Any) -> tuple[Any, ...]:
        """Make the run of this model and calibration, and ask for its analysis."""
        if not methods:
            raise InputError("no method is chosen to plan for: choose at least one, auto is recommended")
        context.require_rights()
        settings = context.settings
        model = context.find_model(text or "")
        calibration = calibration_of(context, values, _without_field(_run_of(context, state, model)))
        where = {"root": settings.runs, "model_roots": settings.models, "owner": visitor()}
        with named(_NAMES), named_for_people(model, settings.models):
            run = prepare(model, calibration, allow_remote_code=settings.remote_code, **where)
        if context.client.status(run).busy:
            raise InputError(f"run {run.name} is at work already: wait for it, or cancel it")
        first = [name for name in (ViewState.method, *methods) if name in methods][:1]  # whose plans are measured
        context.client.submit(run, "analyze", methods=list(dict.fromkeys([*first, *methods])), probe=bool(probe))
        return state.but(run=run.name), gr.Timer(active=True)

    return analyse


def _run_shown(context: Context) -> Callable[..., Any]:
    def shown(state: ViewState, filled: tuple[str, bool] | None, methods: list[str]) -> tuple[Any, ...]:
        """The run's model and calibration, in the fields and beside them, once: what is written there since stays when a job has ended."""
        if filled == (state.run, True):
            return tuple(gr.skip() for _ in range(10))
        run = context.open(state)
        if run is None:
            return (state.run, True), gr.Dropdown(choices=context.models()), None, _no_model(), "", *[gr.skip() for _ in range(5)]
        model, facts = context.model_name(run.identity.model), context.facts(run)
        used = Calibration.from_dict(dict(run.identity.calibration))
        values: tuple[Any, ...] = (used.dataset, used.samples, used.length, used.seed, used.batch)
        fields = values
        named = gr.Dropdown(choices=context.models(), value=model, allow_custom_value=True)
        allowed = context.settings.remote_code or not run.identity.remote_code
        if facts is None and allowed and Path(run.identity.model).is_dir():
            with named_for_people(run.identity.model, context.settings.models):
                facts = inspect(run.identity.model, trust_remote_code=run.identity.remote_code).as_dict()
        if filled == (state.run, False):
            named, fields = gr.skip(), tuple(gr.skip() for _ in values)
        if facts is None:
            return (state.run, False), named, None, empty(model, "Its facts appear once the worker has looked at it."), "", *fields
        needs = _needs(context)(state, model, facts, *values, methods)
        return (state.run, True), named, facts, facts_html(model, f"run {run.name}", facts), needs, *fields

    return shown


def runs_html(context: Context, state: ViewState) -> str:
    """All runs, newest first, each a link to it; damaged ones with the reason."""
    statuses = context.client.runs()
    if not statuses:
        return empty("No runs yet", "Choose a model and analyse it: the run appears here, and stays when you close this page.")
    columns = [
        tables.Column("run", "Run", link=lambda row: f"./?{state.but(run=row['run']).query}" if row["run"] else ""),
        tables.Column("model", "Model"),
        tables.Column("state", "State"),
        tables.Column("created", "Made", moment),
        tables.Column("run", "Delete", press=lambda row: f"Delete run {row['run']}" if row["own"] else ""),
    ]
    rows = [_row(context, status) for status in statuses]
    return tables.table(rows, columns, caption="Runs", name="runs", chosen=lambda row: row["run"] == state.run, height=420)


def _row(context: Context, status: RunStatus) -> dict[str, Any]:
    model = context.model_name(status.model) if status.model else None
    told = jobs.summary(status, stopping=is_stopping(context, status)).replace(f"{context.settings.runs}/", "")  # no folder is told
    own = status.id and not context.settings.public_demo and context.client.may_delete(status.owner)
    return {"run": status.id or None, "model": model, "state": told, "created": status.created or None, "own": own}


def _no_model() -> str:
    return empty("No model is chosen", "Choose one above: its facts appear here within seconds, before anything is loaded.")
