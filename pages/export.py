"""Export: what will be written, how big, where; write and verify it; download it, or push it to the hub."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from moesvd_core.checkpoint.export import FORMATS
from moesvd_core.checkpoint.hub import check_request, push
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import InputError, RunError
from moesvd_core.planning import Recipe
from moesvd_core.runs.bounded import plan_at_once
from moesvd_core.runs.command_line import compress_command, export_command
from moesvd_core.runs.exports import DamagedExportError, export_folder, export_name, list_exports, open_export
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import reach, refuse_unreachable
from moesvd_core.runs.pushes import Pushes
from moesvd_core.runs.workbench import Text
from pages.components import export_parts as parts
from pages.components import jobs
from pages.components.context import Context
from pages.components.export_deletion import ExportDeletion
from pages.components.page import CHOICE, QUIET, Page
from pages.components.recipe_controls import RecipeControls, recipe_of
from pages.components.session import ViewState
from pages.components.text import empty, notice, sentence, share

OWN = "as the original"
NUMBERS = (OWN, "bfloat16", "float16", "float32")
_FORMS = [("Factored: small on disk and in memory", "factored"), ("Dense: whole matrices, loads anywhere", "dense")]
_RECIPE = ("run", "method", "ratio", "flops_ratio")
PUSH_SECONDS = 2.0


def build(context: Context) -> None:
    """Lay out the page."""
    pushes = context.pushes
    with Page(context, "Export", "Write the compressed model, see it verified, and take it with you.") as page:
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                RecipeControls(page)
                with gr.Row():
                    form = gr.Radio(_FORMS, value="factored", label="Format", elem_id="export-format", scale=2, min_width=300)
                    dtype = gr.Dropdown(list(NUMBERS), value=OWN, label="Number format", elem_id="export-dtype", min_width=200)
                fit = gr.Checkbox(
                    METHODS[ViewState.method].compensate, label="Compensate: fit each layer to what the layers before it have changed",
                    info="Better answers at the same size, for two more passes over some of the calibration text.",
                    elem_id="export-compensate",
                )
                refit = gr.Checkbox(
                    False, label="Refit routers: let them choose from changed inputs as they did before",
                    info="Changes little in what was measured; no size changes. Without it routers stay those of the original.",
                    elem_id="export-refit-router",
                )
                measured = gr.Checkbox(
                    True, label="Measure it too: perplexity and distance to the original, for its model card",
                    info=f"On {Text().windows} windows of {Text().dataset}, before it is written; what was measured already is not again.",
                    elem_id="export-measure",
                )
                summary = gr.HTML("", elem_id="export-summary", min_height=220)
            with gr.Column(scale=5, min_width=300):
                write = gr.Button("Write and verify", variant="primary", elem_id="export-write")
                jobs.Panel(page)
                with gr.Accordion("The same on the command line", open=False):
                    twin = gr.HTML("", elem_id="export-twin")
        gr.HTML('<h2 class="section">Exports of this run</h2>')
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=7, min_width=300):
                chosen = gr.Dropdown([], label="Export", elem_id="export-chosen", visible=False)
                files = gr.HTML(parts.no_exports(), elem_id="export-files", min_height=160)
            with gr.Column(scale=5, min_width=300, visible=False) as about:
                card = gr.Markdown("", elem_id="export-card")
                with gr.Accordion("Push to the Hugging Face hub", open=False) as pushing:
                    repository = gr.Textbox(label="Repository", placeholder="owner/name", max_lines=1, max_length=200, elem_id="push-to")
                    token = gr.Textbox(
                        label="Access token, with the right to write", type="password", max_lines=1, max_length=400, elem_id="push-token",
                        info="Goes to the hub and nowhere else; it is neither stored nor logged.",
                    )
                    private = gr.Checkbox(True, label="Make a new repository private", elem_id="push-private")
                    send = gr.Button("Push as one commit", elem_id="push-send")
                    pushed = gr.HTML("", elem_id="push-state", min_height=44)
                if not context.settings.public_demo:
                    ExportDeletion(page, chosen, _listed(context))
        watch = gr.Timer(PUSH_SECONDS, active=False)

        chosen_how, preview = [form, dtype, fit, refit], [summary, twin, write]
        offered = gr.State(ViewState.method)  # whose usual compensation the box was given
        page.view(lambda *values: _offered(context, *values), [fit, offered, *preview], fields=_RECIPE, reads=[offered, *chosen_how])
        changed = [form.input, dtype.input, fit.change, refit.input]
        gr.on(changed, page.changes(_preview(context)), [page.state, *chosen_how], preview, **CHOICE)
        details = [files, about, card, pushed, watch, pushing]
        page.view(_newest(context, pushes), [chosen, *details], fields=("run",))
        write.click(page.changes(_write(context)), [page.state, *chosen_how, measured], page.wake, **QUIET)
        chosen.change(page.changes(_shown(context, pushes)), [page.state, chosen], details, **QUIET)
        sent = [page.state, chosen, repository, token, private]
        send.click(page.changes(_push(context, pushes)), sent, [token, pushed, watch], **QUIET)
        watch.tick(page.changes(_pushed(context, pushes)), [page.state, chosen], [pushed, watch], **QUIET)


def place(run: RunFolder, recipe: Recipe, form: str, dtype: str) -> tuple[str, str | None]:
    """Name of the export's folder, and the number format (None: the original's).

    Raises:
        InputError: a format that there is not; the controls' own values can be forged.
    """
    if form not in FORMATS or dtype not in NUMBERS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, numbers one of {', '.join(NUMBERS)}")
    number = None if dtype == OWN else dtype
    return export_name(run.identity.model, recipe, form, number), number


def _offered(context: Context, state: ViewState, offered: str, form: str, dtype: str, fit: bool, refit: bool) -> tuple[Any, ...]:
    """The box of compensation, set as usual when another method is chosen, else left as a person set it; and the preview of just that."""
    same = offered == state.method
    fit = fit if same else METHODS[state.method].compensate
    return gr.skip() if same else fit, state.method, *_preview(context)(state, form, dtype, fit, refit)


def _preview(context: Context) -> Callable[..., Any]:
    def preview(state: ViewState, form: str, dtype: str, fit: bool, refit: bool) -> tuple[Any, ...]:
        """What the button would write, and the commands that do the same."""
        run = context.open(state)
        facts = None if run is None else context.facts(run)
        if run is None or facts is None:
            return empty("No analysed model", "Analyse a model on the Model page first."), "", gr.Button(interactive=False)
        recipe = replace(recipe_of(state), compensate=fit, refit_router=refit)
        name, number = place(run, recipe, form, dtype)
        most = reach(run, state.method)
        if most is not None and state.ratio > most:
            reason = f"{state.method} reaches {share(most)} on this model, {share(state.ratio)} is asked for: choose less."
            return notice(reason, "error"), "", gr.Button(interactive=False)
        free = shutil.disk_usage(run.path).free
        plan = plan_at_once(run, recipe)
        shown = parts.summary_html(run, plan, recipe, name=name, form=form, dtype=number, facts=facts, free=free)
        written = not parts.refusal(run, plan, form, facts)
        return shown, parts.twin_html(run, recipe, name=name, form=form, dtype=number), gr.Button(interactive=written)

    return preview


def _write(context: Context) -> Callable[..., Any]:
    def write(state: ViewState, form: str, dtype: str, fit: bool, refit: bool, measured: bool) -> Any:
        """Ask the worker for the export."""
        run = context.require_run(state)
        recipe = replace(recipe_of(state), compensate=fit, refit_router=refit)
        name, number = place(run, recipe, form, dtype)
        refuse_unreachable(run, recipe)
        folder = run.station("exports") / name
        output = str(folder.absolute())
        if _is_written(context, run, folder):
            raise InputError(f"{name} is being written already: wait for it, or cancel it")
        if context.pushes.busy_in(folder):
            raise InputError(f"{name} is being pushed to the hub: wait until that has ended")
        words: dict[str, Any] = {"output": f"out/{name}", "form": form, "dtype": number}
        command = compress_command(run.identity, recipe, **words) or export_command(run, recipe, **words)
        wanted: dict[str, Any] = {"recipe": recipe.as_dict(), "output": output, "format": form, "dtype": number}
        context.client.submit(run, "compress" if measured else "export", **wanted, overwrite=True, command=command)
        return gr.Timer(active=True)

    return write


def _is_written(context: Context, run: RunFolder, folder: Path) -> bool:
    """Whether a job of the run writes an export, or is about to."""
    output, asked = str(folder.absolute()), context.client.status(run).jobs
    return any(job.arguments.get("output") == output and job.is_open for job in asked)


def _listed(context: Context) -> Callable[[ViewState], Any]:
    def listed(state: ViewState) -> Any:
        """The run's exports, the newest chosen."""
        return _choice(_names(context, state))

    return listed


def _names(context: Context, state: ViewState) -> list[tuple[str, str]]:
    """The run's exports, newest first: what is shown, and the name; damaged ones come last and are marked."""
    run = context.open(state)
    found = [] if run is None else list_exports(run)
    return [(f"{each.name} (damaged)" if isinstance(each, DamagedExportError) else each.name, each.name) for each in found]


def _choice(names: list[tuple[str, str]]) -> gr.Dropdown:
    return gr.Dropdown(choices=names, value=names[0][1] if names else None, visible=bool(names))


def _newest(context: Context, pushes: Pushes) -> Callable[[ViewState], tuple[Any, ...]]:
    shown = _shown(context, pushes)

    def newest(state: ViewState) -> tuple[Any, ...]:
        """The run's exports, and what is chosen of them: a choice of the same name may be another export by now."""
        names = _names(context, state)
        return _choice(names), *shown(state, names[0][1] if names else None)

    return newest


def _shown(context: Context, pushes: Pushes) -> Callable[..., Any]:
    def shown(state: ViewState, name: str | None) -> tuple[Any, ...]:
        """One export's files, card, and push; of one that is damaged how, and nothing to push."""
        if not name:
            return parts.no_exports(), gr.Column(visible=False), "", "", gr.Timer(active=False), gr.Accordion(visible=False)
        run = context.require_run(state)
        try:
            export = open_export(run, name)
        except DamagedExportError as damaged:
            return notice(str(damaged), "error"), gr.Column(visible=True), "", "", gr.Timer(active=False), gr.Accordion(visible=False)
        files, card = parts.files_html(run.name, export), parts.card_text(export)
        return files, gr.Column(visible=True), card, *_push_state(pushes, export.path), gr.Accordion(visible=True)

    return shown


def _push(context: Context, pushes: Pushes) -> Callable[..., Any]:
    def start(state: ViewState, name: str | None, repository: str, token: str, private: bool) -> tuple[Any, ...]:
        """Push in the background; the field of the token is empty from then on."""
        context.require_rights()
        run = context.require_run(state)
        export = open_export(run, name or "")
        if _is_written(context, run, export.path):
            raise InputError(f"{export.name} is being written anew: wait for it, or cancel it")
        repository, token = repository.strip(), token.strip()
        check_request(repository, token)
        pushes.start(export.path, repository, lambda: push(export.path, repository, token, private=private))
        return ("", *_push_state(pushes, export.path))

    return start


def _pushed(context: Context, pushes: Pushes) -> Callable[..., Any]:
    def look(state: ViewState, name: str | None) -> tuple[Any, ...]:
        """How the push stands now; of an export that is gone that it is, and nothing more to wait for."""
        try:
            return _push_state(pushes, export_folder(context.require_run(state), name or ""))
        except RunError as gone:
            return notice(f"{sentence(str(gone))}.", "error"), gr.Timer(active=False)

    return look


def _push_state(pushes: Pushes, folder: Path) -> tuple[Any, ...]:
    state = pushes.state(folder)
    return parts.push_html(state), gr.Timer(active=state is not None and state.state == "running")
