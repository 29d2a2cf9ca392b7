"""What a run's worker does, on the page: progress, time left, place in the queue, log, cancel, resume.

    panel = jobs.Panel(page)                     # where it should stand; it follows the run of the view
    button.click(page.changes(start), [page.state, ...], page.state)      # start submits, and returns the state

Work is not bound to the tab: the panel finds it again by the run in the address.
"""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from moesvd_core.errors import RunError
from moesvd_core.runs.client import RunStatus
from moesvd_core.runs.folder import RunFolder
from pages.components.context import Context
from pages.components.header import is_stopping, worker
from pages.components.page import Page
from pages.components.session import ViewState
from pages.components.text import duration, escape, share

LOG_LINES = 40
_LOG_BYTES = 200_000
"""How far back the log is read; a line takes some hundred bytes."""
ACTION_WORDS = {
    "analyze": "Analysis", "sensitivity": "Measuring each layer alone", "plan": "Planning", "measure": "Measuring a plan",
    "compress": "Compression", "export": "Export", "evaluate": "Evaluation", "similarity": "Comparing experts",
}


class Panel:
    """Draws itself where it is made, and follows the run of the page's state."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._status = gr.HTML(draw(None), elem_classes="jobs")
        with gr.Row(elem_classes="actions"):
            self._cancel = gr.Button("Cancel", visible=False, size="md", min_width=120, scale=0)
            self._resume = gr.Button("Resume", visible=False, size="md", min_width=120, scale=0)
        with gr.Accordion("Log", open=False):
            self._log = gr.HTML(log_html([]))
        page.ticks(self._draw, [self._status, self._cancel, self._resume, self._log])
        outputs = [self._status, self._cancel, self._resume, self._log, page.wake]
        for button, act in ((self._cancel, page.context.client.cancel), (self._resume, partial(resume, page.context))):
            button.click(page.changes(self._acting(act)), page.state, outputs, show_progress="hidden", api_visibility="private")

    def _acting(self, act: Any) -> Any:
        def pressed(state: ViewState) -> list[Any]:
            context = self._page.context
            act(context.require_run(state))
            return [*self._draw(state, context.status(state)), gr.Timer(active=True)]

        return pressed

    def _draw(self, state: ViewState, status: RunStatus | None) -> tuple[Any, ...]:
        run = self._page.context.open(state) if status is not None else None
        stopping = is_stopping(self._page.context, status)
        return (
            draw(status, stopping=stopping),
            gr.Button(visible=status is not None and status.busy, interactive=not stopping),
            gr.Button(visible=resumable(status)),
            log_html([] if run is None else log_lines(run)),
        )


def resume(context: Context, run: RunFolder) -> None:
    """Go on, unless that may write an export anew which is just being read.

    Raises:
        RunError: it may; or as `Client.resume`.
    """
    if context.pushes.busy_in(run.path):
        raise RunError(f"an export of run {run.name} is being pushed to the hub: resume once that has ended")
    context.client.resume(run)


def resumable(status: RunStatus | None) -> bool:
    """Whether the latest work ended before it was done."""
    return status is not None and not status.busy and status.state in ("interrupted", "failed", "cancelled")


def draw(status: RunStatus | None, *, stopping: bool = False) -> str:
    """The state of a run's work as HTML.

    Args:
        stopping: as `is_stopping`.
    """
    if status is None or status.job is None:
        return _frame("Nothing runs", "", None, "Work that you start appears here, with progress and time left.")
    job = status.job
    title = ACTION_WORDS.get(job.action, job.action)
    waiting = [each for each in status.jobs if each.state == "queued" and each is not job]
    more = f" Then {len(waiting)} more of this run." if waiting else ""
    if job.state == "queued":
        ahead = "Its worker starts." if not status.place else f"{_jobs(status.place)} first on this machine; then it starts by itself."
        return _frame(f"{title} waits", "queued", 0.0, ahead + more)
    if job.state == "running":
        done = job.done / job.total if job.total else 0.0
        left = f", {duration(job.eta_seconds)} left in this stage" if job.eta_seconds is not None else ""
        count = f"{job.stage}: {job.done} of {job.total}{left}" if job.total else "starting"
        if status.hanging is not None:
            silent = f"Its worker has given no sign of life for {duration(status.hanging)}: it may hang."
            return _frame(f"{title} hangs", "running", done, f"{silent} Cancel ends it, and resume goes on. {count}.{more}")
        if stopping:
            return _frame(f"Cancelling: {title}", "running", done, f"It stops within seconds, and what was finished is kept.{more}")
        return _frame(f"{title} runs", "running", done, f"{count}{f' ({_told(job.message, status.model)})' if job.message else ''}.{more}")
    if job.state == "finished":
        return _frame(f"{title} finished", "finished", None, f"Took {duration((job.ended or 0) - (job.started or job.ended or 0))}.")
    advice = "" if job.state == "failed" else " Nothing is lost: resume goes on from where it was."
    reached = job.done / job.total if job.total else 0.0
    return _frame(f"{title} {job.state}", job.state, reached, f"{_told(job.error or job.state, status.model)}.{advice}")


def summary(status: RunStatus, *, stopping: bool = False) -> str:
    """The state of a run's work in a line: "Analysis finished", "Analysis calibrate 44 %, 58 s left in this stage".

    Args:
        stopping: as `is_stopping`.
    """
    if status.state == "damaged":
        return status.error
    if status.job is None:
        return "nothing asked yet"
    return f"{ACTION_WORDS.get(status.job.action, status.job.action)} {worker(status, stopping=stopping) if status.busy else status.state}"


def log_lines(run: RunFolder) -> list[str]:
    """The last lines of a run's diary for people, newest first, times in UTC."""
    try:
        start = max(0, run.log.path.stat().st_size - _LOG_BYTES)
    except FileNotFoundError:
        return []
    events, _ = run.log.read(start)
    lines = []
    for event in events:
        data = event.data
        clock = _clock(event.time)
        match event.kind:
            case "progress":
                lines.append(f"{clock}  {data.get('stage')} {data.get('done')}/{data.get('total')}  {data.get('message', '')}")
            case "submitted":
                lines.append(f"{clock}  {data.get('action')} asked for (job {event.job})")
            case kind:
                lines.append(f"{clock}  {kind}{': ' + str(data['error']) if data.get('error') else ''} (job {event.job})")
    return [_told(line, run.identity.model) for line in reversed(lines[-LOG_LINES:])]


def log_html(lines: list[str]) -> str:
    """Lines of a log."""
    return f'<pre class="log" tabindex="0" aria-label="Log of the run">{escape(chr(10).join(lines)) or "Nothing was done yet."}</pre>'


def _frame(title: str, kind: str, done: float | None, text: str) -> str:
    percent = "" if done is None else share(done, 0)
    bar = "" if done is None else (
        '<div class="progress" role="progressbar" aria-label="Progress of the stage" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * done:.0f}"><div style="width:{100 * done:.1f}%"></div></div>'
    )
    return (
        f'<div class="job {escape(kind)}">'
        f'<div class="job-head"><p class="job-title" role="status">{escape(title)}</p><p>{percent}</p></div>'
        f"{bar}<p class=job-text>{escape(text)}</p></div>"
    )


def _told(text: str, model: str) -> str:
    """Text of a worker without the folders that the machine keeps the model in."""
    return text.replace(model, Path(model).name) if model and Path(model).is_absolute() else text


def _jobs(number: int) -> str:
    return "1 job comes" if number == 1 else f"{number} jobs come"


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S}"
