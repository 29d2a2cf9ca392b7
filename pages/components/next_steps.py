"""Where to go from a finished analysis: one line for each of the other pages, so that nobody has to guess what they are for."""

from moesvd_core.runs.client import RunStatus
from pages.components.context import Context
from pages.components.session import ViewState
from pages.components.text import escape

ANSWERS = {
    "/sensitivity": "Which layers bear it, and which metric says so",
    "/ratio": "How small it may become, and what that costs",
    "/similarity": "How alike its experts are, beside chance",
    "/compare": "Both models answering the same prompt",
    "/export": "The compressed checkpoint on disk, verified",
}
"""Path of a page: the question it answers."""


def html(context: Context, state: ViewState, status: RunStatus | None) -> str:
    """Links to the pages that show the run of the view; "" before its analysis has finished."""
    if status is None or not any(job.action == "analyze" and job.state == "finished" for job in status.jobs):
        return ""
    links = "".join(
        f'<a href="{escape(f".{page.path}?{state.query}")}"><b>{escape(page.title)}</b><span>{escape(ANSWERS[page.path])}</span></a>'
        for page in context.pages if page.path in ANSWERS
    )
    return f'<p class="figure-title">What the analysis tells</p><div class="next-steps">{links}</div>'
