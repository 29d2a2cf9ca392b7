"""The head of every page: the way to the other pages, and what is being looked at (model, run, ratio, worker)."""

import gradio as gr

from moesvd_core.errors import RunError
from moesvd_core.runs.client import RunStatus
from pages.components.assets import mount
from pages.components.context import Context
from pages.components.session import ViewState
from pages.components.text import NAME, duration, escape, share

_DEMO = "<div><dt>Public demo</dt><dd>jobs and exports are off</dd></div>"
_WORDS = {
    "new": "nothing asked yet", "finished": "idle", "failed": "failed", "cancelled": "cancelled", "interrupted": "interrupted",
    "damaged": "damaged",
}


def box(value: str) -> gr.HTML:
    """The head's component. Its value carries the view's query, which the browser puts into the address."""
    return gr.HTML(value, elem_id="explorer-head", js_on_load=mount("head"))


def draw(context: Context, title: str, purpose: str, state: ViewState, status: RunStatus | None) -> str:
    """The head as HTML."""
    query = f"?{state.query}" if state.query else ""
    links = "".join(
        f'<a href="{escape("." + page.path + query)}"{" aria-current=page" if page.title == title else ""}>{escape(page.title)}</a>'
        for page in context.pages
    )
    return (
        f'<div class="head" data-query="{escape(state.query)}" data-title="{escape(f"{title} · {NAME}")}">'
        f'<div class="head-bar"><a class="brand" href="{escape("./" + query)}">{NAME}</a><nav aria-label="Pages">{links}</nav>'
        '<button type="button" class="shade" aria-label="Switch between light and dark"></button></div>'
        f"{_strip(context, state, status)}<h1>{escape(title)}</h1><p class=purpose>{escape(purpose)}</p></div>"
    )


def is_stopping(context: Context, status: RunStatus | None) -> bool:
    """Whether the job that runs was asked to stop, and has not stopped yet; a worker that hangs does not stop by being asked."""
    if status is None or status.job is None or status.state != "running" or status.hanging is not None:
        return False
    try:
        return context.client.open(status.id).cancel_file.read_text() == status.job.id
    except (RunError, OSError):  # nobody asked; or the run was deleted meanwhile
        return False


def worker(status: RunStatus | None, *, stopping: bool = False) -> str:
    """What the run's worker does, in a few words.

    Args:
        stopping: as `is_stopping`.
    """
    if status is None:
        return "no run yet"
    job = status.job
    if status.state == "queued":
        return "starting" if not status.place else f"waits, {status.place} ahead"
    if status.state != "running" or job is None:
        return _WORDS.get(status.state, status.state)
    if status.hanging is not None:
        return f"silent for {duration(status.hanging)}"
    if stopping:
        return "cancelling"
    if not job.total:
        return "starting"
    if job.done >= job.total:  # of a stage: the next one has not told of itself yet
        return f"{job.stage} done"
    left = "" if job.eta_seconds is None else f", {duration(job.eta_seconds)} left in this stage"
    return f"{job.stage} {share(job.done / job.total, 0)}{left}"


def _ratio(state: ViewState) -> str:
    if not state.run:
        return "–"
    fewer = "" if state.flops_ratio is None else f", {share(state.flops_ratio, 0)} of operations"
    return f"{share(state.ratio, 0)}{fewer}"


def _strip(context: Context, state: ViewState, status: RunStatus | None) -> str:
    model = "–" if status is None else context.model_name(status.model) or "–"
    kind = "none" if status is None else status.state
    return (
        f'<dl class="strip"><div><dt>Model</dt><dd>{escape(model)}</dd></div><div><dt>Run</dt><dd>{escape(state.run or "–")}</dd></div>'
        f"<div><dt>Ratio</dt><dd>{escape(_ratio(state))}</dd></div>"
        f'<div><dt>Worker</dt><dd class="worker {escape(kind)}">{escape(worker(status, stopping=is_stopping(context, status)))}</dd></div>'
        f"{_DEMO if context.settings.public_demo else ''}</dl>"
    )
